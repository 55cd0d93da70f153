# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""To the formats of stock PEFT's prompt tuning and prefix tuning, and back."""

from __future__ import annotations

import inspect
import os
import tempfile
from typing import Any, Optional

import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..backbone import Backbone, find_backbone
from ..config import PromptDepth, PTuningConfig
from ..files.checkpoint import ENCODER_KEY, CheckpointSource, read_tensors, replacing, saved_name
from ..forward.deep import measure
from ..prompts.adapter import Adapter, find_adapter, without_compilation
from ..prompts.deep import LayerShape, shapes_of, to_table, without_batch
from ..prompts.prompt import States
from ..prompts.saved import STOCK_KEY, STOCK_TYPES, from_stock, stock_depth, stock_layer, stock_shape


# Task types with which stock PEFT computes something else from a prompt at the input than this package, and what.
STOCK_DIFFERS: dict[str, str] = {
    "SEQ_CLS": "it pools by position from states that begin with the prompt: BERT and its kin classify by the first "
    "prompt vector instead of [CLS]",
    "TOKEN_CLS": "it fails on labels, and its logits begin with V that belong to no token",
    "QUESTION_ANS": "its start and end logits are shifted by V",
    "FEATURE_EXTRACTION": "its hidden states begin with V that belong to no token",
}

# Sizes in a stock config, and what they are called in that of a model.
SIZES = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}

# Task types for which stock PEFT trains and loads a head beside the prompt.
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

# Why stock PEFT computes something else from a deep prompt that leaves positions alone.
UNSHIFTED = (
    "it lets the text's positions begin at V, and this prompt was trained with the model's own. Train with "
    "shift_positions=True to export"
)


def export_to_peft(
    model: nn.Module, directory: str, adapter_name: Optional[str] = None, force: Optional[str] = None
) -> None:
    """Writes an adapter that PEFT loads without this package: prompt or prefix tuning, the network folded away.

    A prompt at the input becomes `PROMPT_TUNING`, for `CAUSAL_LM` and `SEQ_2_SEQ_LM`; a deep one `PREFIX_TUNING`, for
    all task types of a model without an encoder apart. Logits and generated tokens of stock PEFT equal those of this
    package where no padding stands on the left (stock PEFT leaves the gap between prompt and text there).

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        directory (`str`): Folder to write to; made if it is not there.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.
        force (`str`, *optional*):
            The adapter's task type, to export where stock PEFT computes something else all the same. A head that was
            trained beside the prompt is written too.

    Raises:
        ValueError:
            Stock PEFT would compute something else or can't run, `force` names another task type, or the adapter has a
            prompt template or trains rows of the vocabulary (`trainable_token_indices`).
    """
    adapter = find_adapter(model, adapter_name)
    if adapter.config.trainable_token_indices is not None:
        raise ValueError(
            "The adapter trains rows of the vocabulary beside the prompt (`trainable_token_indices`), for which stock "
            "PEFT's prompts have no place. Stay with this package."
        )
    if adapter.config.prompt_template is not None:
        raise ValueError(
            "The adapter has a prompt template, and stock PEFT puts a prompt in front of every text. Stay with this "
            "package."
        )
    backbone = find_backbone(adapter.base_model)
    task_type = _task_type(adapter)
    _check_stock(task_type, adapter.config, backbone, adapter.base_model, force)
    heads = trained_modules(adapter)
    if heads and task_type not in WITH_HEAD:
        raise ValueError(
            f"The adapter has trained modules beside the prompt ({', '.join(heads)}), for which stock PEFT's "
            f"{task_type} prompts have no place."
        )

    config_class, table, sizes = _deep_table(adapter) if adapter.is_deep else _input_table(adapter)
    tensors = {STOCK_KEY: table.float().cpu().contiguous()}
    for name, module in heads.items():
        tensors |= {f"base_model.{name}.{key}": value.cpu().contiguous() for key, value in module.state_dict().items()}
    config = config_class(
        task_type=task_type,
        num_virtual_tokens=len(table),
        num_transformer_submodules=1,
        modules_to_save=adapter.config.modules_to_save if heads else None,
        base_model_name_or_path=adapter.base_model_name or None,
        revision=adapter.config.revision,
        inference_mode=True,
        **sizes,
    )
    with replacing(directory) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)


def _input_table(adapter: Adapter) -> tuple[type[PeftConfig], torch.Tensor, dict[str, Optional[int]]]:
    """The kind of stock adapter that a prompt at the input becomes, its table (V, H), and the sizes in its config."""
    prompt, config = adapter.prompt(), adapter.base_model.config.get_text_config()
    sizes = {name: getattr(config, theirs, None) for name, theirs in SIZES.items()}
    return PromptTuningConfig, prompt, {**sizes, "token_dim": prompt.shape[1]}


def _deep_table(adapter: Adapter) -> tuple[type[PeftConfig], torch.Tensor, dict[str, Optional[int]]]:
    """The kind that a deep prompt becomes, its table (V, L · 2 · heads · D), and the sizes in its config."""
    states = adapter.states()
    kind = stock_layer(shapes_of(states))
    _check_heads(kind, adapter.base_model)
    sizes = {"num_layers": len(states), "num_attention_heads": kind.heads, "token_dim": kind.heads * kind.key_width}
    return PrefixTuningConfig, to_table(states), {**sizes, "encoder_hidden_size": sizes["token_dim"]}


def _check_heads(kind: LayerShape, base_model: nn.Module) -> None:
    """Refuses a model whose config says other sizes: stock PEFT takes those of key-value heads from there."""
    sizes = base_model.config.get_text_config().to_dict()
    heads = sizes.get("num_key_value_heads", kind.heads)
    width = sizes.get("head_dim") or kind.key_width
    if "num_key_value_heads" in sizes and (heads, width) != (kind.heads, kind.key_width):
        raise ValueError(
            f"The config of {type(base_model).__name__} says {heads} key-value heads of {width}, which stock PEFT "
            f"goes by, and its attention takes {kind.heads} of {kind.key_width}. Stay with this package."
        )


def import_from_peft(
    base_model: nn.Module,
    model_id: str,
    adapter_name: str = "default",
    is_trainable: bool = False,
    force: Optional[str] = None,
    subfolder: Optional[str] = None,
    **download_kwargs: Any,
) -> PeftModel:
    """Makes a stock adapter one of this package, without a network.

    `PROMPT_TUNING` and `P_TUNING` become a prompt at the input, `PREFIX_TUNING` and `CARTRIDGE` a deep one with
    `shift_positions=True`. Stock PEFT saves the numbers only, not the network that made them, so they are all that
    there is to go on with. With `is_trainable`, all of them are trained, those too that a `CARTRIDGE` keeps frozen.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`):
            The model that the adapter was trained on, or one that has adapters of this package already, which is then
            given another.
        model_id (`str`): Folder, or repository on the Hub.
        adapter_name (`str`, defaults to `"default"`): Name of the adapter.
        is_trainable (`bool`, defaults to `False`): Whether the prompt is trained on.
        force (`str`, *optional*):
            The adapter's task type, to take it over where stock PEFT computes something else all the same.
        subfolder (`str`, *optional*): Folder inside `model_id`.
        download_kwargs: `revision`, `token`, `cache_dir` and so on, as for [`~huggingface_hub.hf_hub_download`].

    Returns:
        [`~peft.PeftModel`]

    Raises:
        ValueError:
            It is another kind of adapter, its file is damaged or does not fit the model, or stock PEFT computes
            something else for its task. The model is then as it was.
    """
    if adapter_name in getattr(base_model, "peft_config", {}):
        raise ValueError(f"The model has an adapter named {adapter_name!r} already. Choose another `adapter_name`.")
    config = PeftConfig.from_pretrained(model_id, subfolder=subfolder, **download_kwargs)
    if config.peft_type not in STOCK_TYPES:
        raise ValueError(
            f"{model_id} is an adapter of type {config.peft_type.value}. Those that can be taken over are "
            f"{', '.join(kind.value for kind in STOCK_TYPES)}."
        )
    bare = without_compilation(base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model)
    backbone = find_backbone(bare)
    own = PTuningConfig(
        task_type=config.task_type,
        num_virtual_tokens=config.num_virtual_tokens,
        prompt_depth=stock_depth(config),
        shift_positions=stock_depth(config) is PromptDepth.DEEP,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    _check_stock(config.task_type, own, backbone, bare, force)
    folder = os.path.join(model_id, subfolder or "")
    if os.path.isfile(os.path.join(folder, WEIGHTS_NAME)) and SAFETENSORS_WEIGHTS_NAME not in os.listdir(folder):
        raise ValueError(
            f"{folder} has only the pickle {WEIGHTS_NAME}, which can run code when it is loaded. If you trust it, "
            "load it with stock PEFT and save it again: that writes safetensors."
        )
    path = CheckpointSource(str(model_id), subfolder, True, download_kwargs).find()
    stack, a_token = bare.get_submodule(backbone.name), torch.zeros(1, dtype=torch.long)
    shapes = shapes_of(measure(stack, backbone, a_token)[0]) if own.is_deep else None
    tensors = read_tensors(path, {STOCK_KEY: stock_shape(config, model_id, backbone.width, shapes)})
    encoder = _encoder_state(from_stock(tensors.pop(STOCK_KEY), config, shapes))
    heads = {f"base_model.model.{key.removeprefix('base_model.')}": value for key, value in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        place = f"base_model.model.{saved_name(backbone.embedding_path)}{ENCODER_KEY}"
        prompt = {f"{place}{name}": value for name, value in encoder.items()}
        save_file({**prompt, **heads}, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        own.save_pretrained(folder)
        if not isinstance(base_model, PeftModel):
            return PeftModel.from_pretrained(base_model, folder, adapter_name, is_trainable=is_trainable)
        base_model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
        return base_model


def _encoder_state(prompt: torch.Tensor | States) -> dict[str, torch.Tensor]:
    """The state of a plain encoder with this prompt, by name."""
    if isinstance(prompt, torch.Tensor):
        return {"embedding": prompt}
    by_layer = without_batch(prompt).items()
    keys = {f"keys.{layer}": key.contiguous() for layer, (key, _) in by_layer}
    return keys | {f"values.{layer}": value.contiguous() for layer, (_, value) in by_layer}


def _check_stock(
    task_type: Optional[str],
    config: PTuningConfig,
    backbone: Backbone,
    base_model: nn.Module,
    force: Optional[str],
) -> None:
    """Refuses what stock PEFT can't run, and, unless the caller named the task type, what it computes differently."""
    if task_type is None:
        raise ValueError(
            f"The adapter on this {type(base_model).__name__} has no task type, without which stock PEFT leaves the "
            "prompt out."
        )
    if force is not None and force != task_type:
        raise ValueError(f"`force` must name the adapter's task type, {task_type!r}, got {force!r}.")
    if config.is_deep:
        if (reason := _why_no_prefix(task_type, backbone, base_model)) is not None:
            raise ValueError(
                f"Stock PEFT's prefix tuning is no deep prompt of {type(base_model).__name__}: {reason}. Stay with "
                "this package."
            )
        reason = None if config.shift_positions or "position_ids" not in backbone.parameters else UNSHIFTED
    else:
        reason = STOCK_DIFFERS.get(task_type)
        if reason is None and backbone.embed_scale != 1:
            name = type(base_model).__name__
            reason = f"{name} scales the embeddings of token ids only, and it hands over embeddings"
    if reason is not None and force is None:
        raise ValueError(
            f"Stock PEFT computes something else for {task_type}: {reason}. Keep using this package. "
            f"With force={task_type!r} it is taken all the same, and outputs differ."
        )


def _why_no_prefix(task_type: str, backbone: Backbone, base_model: nn.Module) -> Optional[str]:
    """Why stock PEFT has no prefix tuning of a model that puts keys and values where a deep prompt has them."""
    if backbone.decoder is not None or task_type == "SEQ_2_SEQ_LM":
        return "it puts keys and values in the decoder's cache, where they take positions, and here they take none"
    takers = [base_model]
    if task_type in WITH_HEAD:  # else only the whole model is given a cache
        takers += [module for module in base_model.children() if isinstance(module, PreTrainedModel)][:1]
    names = [name for taker in takers for name in inspect.signature(taker.forward).parameters]
    if not {"past_key_values", "cache"} & {*names}:
        return "it hands them over in a cache, which this model does not take"
    if "position_ids" not in backbone.parameters and backbone.deep_way != "cache":
        return "it moves the text's positions by V, and the text can't be told positions here"
    return None


def _task_type(adapter: Adapter) -> Optional[str]:
    """The adapter's task type; where it has none, that of a generating model."""
    if adapter.config.task_type is not None:
        return str(getattr(adapter.config.task_type, "value", adapter.config.task_type))
    if not getattr(adapter.base_model, "can_generate", lambda: False)():
        return None
    return "SEQ_2_SEQ_LM" if adapter.base_model.config.is_encoder_decoder else "CAUSAL_LM"


def trained_modules(adapter: Adapter) -> dict[str, nn.Module]:
    """Modules that the adapter trains and saves beside the prompt, by the names that they are saved under."""
    return {
        saved_name(name): module.modules_to_save[adapter.name]
        for name, module in adapter.base_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter.name in module.modules_to_save
    }
