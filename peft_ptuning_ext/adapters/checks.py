# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What is refused when an adapter is added: each check reads a model and a config, and changes neither."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Optional

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backbone import Backbone
from ..config import PromptEncoderType, PTuningConfig
from ..files.checkpoint import ENCODER_KEY, CheckpointSource, check_file, saved_name
from ..prompts.build import build_encoder
from ..prompts.deep import Shapes
from ..prompts.layer import PTuningLayer, execution_device
from .vocabulary import embedding_state


# Attributes of the model that PEFT's class for a task type reads, and arguments that it passes to `forward`, given or
# not, beside those that all of these classes pass.
TASK_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SEQ_CLS": (("config",), ("labels",)),
    "TOKEN_CLS": (("config",), ("labels",)),
    "QUESTION_ANS": (("config",), ("start_positions", "end_positions")),
    "CAUSAL_LM": (("config", "prepare_inputs_for_generation"), ("labels",)),
    "SEQ_2_SEQ_LM": (
        ("prepare_inputs_for_generation",),
        ("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    ),
    "FEATURE_EXTRACTION": ((), ()),
}
COMMON_ARGUMENTS = ("input_ids", "attention_mask", "inputs_embeds")
COMMON_ARGUMENTS += ("output_attentions", "output_hidden_states", "return_dict")


def check_is_new(model: nn.Module, adapter_name: str) -> None:
    """Raises `ValueError` if the backbone has an adapter of this name, which another model around it was given."""
    layers = [module for module in model.modules() if isinstance(module, PTuningLayer)]
    if any(layer.bank is not None and adapter_name in layer.bank for layer in layers):
        raise ValueError(
            f"The prompt bank of this {type(model).__name__} has a prompt {adapter_name!r}. Choose another name for "
            "the adapter, or delete the prompt from the bank first."
        )
    if any(adapter_name in layer.known for layer in layers):
        raise ValueError(
            f"The backbone of this {type(model).__name__} has an adapter named {adapter_name!r} already, which "
            "another model around the same backbone was given. Choose another `adapter_name`: both prompts "
            "are then at the backbone, and `set_adapter` of either model says which of them is in front."
        )


def check_adapter(
    model: nn.Module, backbone: Backbone, config: PTuningConfig, adapter_names: Iterable[str], is_in_peft_model: bool
) -> None:
    """Refuses a config that does not fit the model.

    Args:
        model (`nn.Module`): The model without the new adapter.
        backbone ([`Backbone`]): Facts about it.
        config ([`PTuningConfig`]): The config of the new adapter.
        adapter_names (`Iterable[str]`): Names of all adapters, the new one's among them.
        is_in_peft_model (`bool`): Whether a `PeftModel` calls the model, rather than transformers itself.

    Raises:
        ValueError: The task type, the names in the config, its length, its stacks or offloaded weights don't fit.
    """
    if is_in_peft_model:
        _check_task_type(model, config.task_type)
    _check_offloaded_modules(model, config)
    if config._from_file:
        _check_offloaded_embedding(model, backbone.embedding_path, config, is_in_peft_model)
    _check_names(adapter_names, backbone.embedding_path, config)
    _check_length(model, backbone, config)
    _check_positions(model, backbone, config)
    _check_template(model, backbone, config)
    _check_cloze(model, config)
    _check_stacks(model, backbone, config)


def _check_task_type(model: nn.Module, task_type: Optional[str]) -> None:
    """Refuses a task type whose class of PEFT can't call this model."""
    task = str(getattr(task_type, "value", task_type))
    if task not in TASK_NEEDS:
        return
    attributes, arguments = TASK_NEEDS[task]
    missing = [f"`{attribute}`" for attribute in attributes if not hasattr(model, attribute)]
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # The decorators of transformers' models take arguments that a signature does not show.
    if not takes_any and not isinstance(model, PreTrainedModel):
        passed = (*COMMON_ARGUMENTS, *arguments)
        missing += [f"the argument `{argument}` of `forward`" for argument in passed if argument not in parameters]
    if missing:
        raise ValueError(
            f"`task_type` is {task!r}, and {type(model).__name__} lacks {', '.join(missing)}, which PEFT's model for "
            "this task uses. Choose the task type that this model is for. If there is none, leave `task_type` out and "
            "name a head to train in `modules_to_save`."
        )


def _check_offloaded_modules(model: nn.Module, config: PTuningConfig) -> None:
    """Refuses to train a module whose weights are elsewhere: what is loaded into a copy of it would be lost."""
    endings = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if name.endswith(endings) and any(execution_device(part) is not None for part in module.modules()):
            raise ValueError(
                f"`modules_to_save` names {name!r}, whose weights are offloaded: PEFT can neither train nor load "
                "a copy of it. Load the model with a `device_map` that keeps it on a device."
            )


def _check_offloaded_embedding(
    model: nn.Module, embedding_path: str, config: PTuningConfig, is_in_peft_model: bool
) -> None:
    """Refuses to load a prompt beside an offloaded embedding where its values would be lost."""
    name, device_map = type(model).__name__, getattr(model, "hf_device_map", None)
    table = model.get_submodule(embedding_path)
    table = table.get_base_layer() if isinstance(table, PTuningLayer) else table
    is_offloaded = execution_device(table) is not None
    if is_offloaded and device_map is None and not is_in_peft_model:
        raise ValueError(
            f"The weights of this {name} are offloaded and it has no `hf_device_map`: `load_adapter` of "
            "transformers would lose the prompt. Call `PeftModel.from_pretrained(model, folder)`."
        )
    # PeftModel.from_pretrained has taken the hooks off. It writes plain vectors to disk beside the embedding, but
    # not the parameters of a network.
    is_on_disk = not is_offloaded and table.weight.is_meta and "disk" in (device_map or {}).values()
    if is_on_disk and config.encoder_reparameterization_type is not PromptEncoderType.NONE:
        raise ValueError(
            f"The input embedding of this {name} is on disk, where PEFT has no place for the network of a prompt "
            "encoder. Load the model again and call its own `model.load_adapter(folder)`."
        )


def _check_names(adapter_names: Iterable[str], embedding_path: str, config: PTuningConfig) -> None:
    """Refuses an adapter named like the module it is in, and a module to train in full that holds the prompt."""
    reserved = ENCODER_KEY.strip(".")
    for name in adapter_names:
        if name == reserved:
            raise ValueError(f"An adapter can't be named {reserved!r}, the name of the module it is in.")
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"An adapter can't be named {name!r}: in torch, the name of a module can't be empty, have a dot, or "
                "be an attribute of `nn.ModuleDict`. Choose another name."
            )
    for name in config.modules_to_save or ():
        if f".{name}." in f".{embedding_path}.":
            raise ValueError(
                f"`modules_to_save` names {name!r}, which holds the input embedding that the prompt goes with. "
                "Name the modules to train without it."
            )


def check_saved_apart(layer: PTuningLayer, adapter_name: str, embedding_path: str) -> None:
    """Refuses an adapter beside others if PEFT would leave out parts of it, or of them, when it saves.

    To save one adapter, PEFT drops every tensor that has the name of another one as a part of its own name. This check
    needs the tensors, so it runs when the adapter is on the model; the caller takes the adapter off after an error.

    Raises:
        ValueError: One of both is named like a part of the other's tensors.
    """
    for other in layer.ptuning_encoders.keys() - {adapter_name}:
        for name, reserved in ((adapter_name, other), (other, adapter_name)):
            for key in layer.ptuning_encoders[name].state_dict():
                path = f"base_model.model.{embedding_path}{ENCODER_KEY}{name}.{key}"
                if f".{reserved}." in f"{path}.":
                    raise ValueError(
                        f"Adapters can't be named {name!r} and {reserved!r} on one model: {path} of the first one has "
                        f"{reserved!r} as a part of its name, and PEFT would not save it. Choose another name."
                    )


def _check_length(model: nn.Module, backbone: Backbone, config: PTuningConfig) -> None:
    """Refuses a prompt that leaves no position for a text."""
    length, limit = config.num_virtual_tokens, backbone.max_positions
    takes_positions = config.shift_positions or not config.is_deep
    if takes_positions and limit is not None and length >= limit:
        raise ValueError(
            f"`num_virtual_tokens` is {length}, and {type(model).__name__} has {limit} positions for the "
            "prompt and the text together."
        )


def _check_positions(model: nn.Module, backbone: Backbone, config: PTuningConfig) -> None:
    """Refuses to shift, or not to shift, the positions of a text of which the model is not told any."""
    if not config.is_deep or "position_ids" in backbone.parameters or backbone.deep_way is None:
        return
    name = type(model).__name__
    if backbone.deep_way != "cache" and config.shift_positions:
        raise ValueError(
            f"`shift_positions` is True, and {name} can't be told positions: it counts them by itself, from its first "
            "one on. Leave `shift_positions` at False."
        )
    # Models without a table measure distances, which no shift changes.
    if backbone.deep_way == "cache" and backbone.max_positions is not None and not config.shift_positions:
        raise ValueError(
            f"`shift_positions` is False, and {name} counts positions from behind the prompt in its cache. Pass "
            "shift_positions=True."
        )


def _check_stacks(model: nn.Module, backbone: Backbone, config: PTuningConfig) -> None:
    """Refuses to choose a stack where there is one only."""
    if config.prompt_stacks is not None and backbone.decoder is None:
        raise ValueError(
            f"`prompt_stacks` is {config.prompt_stacks.value!r}, and {type(model).__name__} has no decoder beside "
            "the stack that gets the prompt. Leave `prompt_stacks` out."
        )


def _check_template(model: nn.Module, backbone: Backbone, config: PTuningConfig) -> None:
    """Refuses a placeholder that the model has no row for."""
    if config.prompt_template is None:
        return
    table = model.get_submodule(backbone.embedding_path)
    table = table.get_base_layer() if isinstance(table, PTuningLayer) else table
    token_id, rows = config.prompt_template.placeholder_id, getattr(table, "num_embeddings", None)
    if rows is not None and token_id >= rows:
        raise ValueError(
            f"The placeholder {config.prompt_template.placeholder!r} of `prompt_template` has id {token_id}, and "
            f"{type(model).__name__} has {rows} embeddings. Call `resize_token_embeddings(len(tokenizer))` first."
        )


def _check_cloze(model: nn.Module, config: PTuningConfig) -> None:
    """Refuses an adapter for label words that this model does not have, and one that would not save a calibration."""
    found = getattr(model, "cloze_settings", None)
    if found is not None and found["calibration"] is not None and "score" not in (config.modules_to_save or ()):
        raise ValueError(
            f"The calibration {found['calibration']!r} of a {type(model).__name__} is trained and saved beside the "
            "adapter, which PEFT does for task_type='SEQ_CLS'. Pass this task type, or name 'score' in "
            "`modules_to_save`."
        )
    if config.cloze is not None and config.cloze != found:
        raise ValueError(
            f"The adapter was trained on a ClozeClassifier with {config.cloze}, and {type(model).__name__} has "
            f"{found}. Load it with `ClozeClassifier.from_pretrained(language_model, tokenizer, folder)`."
        )


def check_weights(
    source: CheckpointSource,
    model: nn.Module,
    backbone: Backbone,
    config: PTuningConfig,
    rows: dict[str, torch.Tensor],
    shapes: Optional[Shapes] = None,
) -> None:
    """Refuses a file of weights that does not fit the model and the config that it lies beside.

    Args:
        source ([`CheckpointSource`]): Where the config was loaded from.
        model (`nn.Module`): The model without the new adapter.
        backbone ([`Backbone`]): Facts about it.
        config ([`PTuningConfig`]): The config.
        rows (`dict[str, torch.Tensor]`): What [`~peft_ptuning_ext.adapters.vocabulary.token_rows`] returns.
        shapes (`dict[int, LayerShape]`, *optional*): What each layer takes, for a deep prompt.

    Raises:
        ValueError: There is no such file, or [`~peft_ptuning_ext.files.checkpoint.check_file`] refuses it.
    """
    path = source.find()
    if path is None:  # a pickle, as the caller has asked for: its tensors are checked when PEFT has read them
        return
    with torch.device("meta"):
        encoder = build_encoder(config, backbone.width, shapes)
    trained = {**_trained_state(model, config), **rows}
    embeddings = embedding_state(model, backbone.embedding_path, rows, config.modules_to_save or ())
    check_file(path, encoder, saved_name(backbone.embedding_path), _as_saved(trained), _as_saved(embeddings))


def _trained_state(model: nn.Module, config: PTuningConfig) -> dict[str, torch.Tensor]:
    """The state of the modules that PEFT is to train beside the prompt, by name in the model."""
    endings = tuple(config.modules_to_save or ())
    state = {}
    for name, module in model.named_modules():
        if name.endswith(endings):
            module = getattr(module, "original_module", module)  # of another adapter
            state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return state


def _as_saved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {saved_name(name): value for name, value in state.items()}
