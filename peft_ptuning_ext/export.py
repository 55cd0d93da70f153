# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What a trained prompt becomes for others: a table without its network, stock PEFT's format and back, embeddings."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, PeftType, PromptTuningConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ModulesToSaveWrapper, get_peft_model_state_dict
from safetensors.torch import save, save_file
from torch import nn

from .backbone import Backbone, find_backbone
from .card import fill_card
from .checkpoint import ENCODER_KEY, CheckpointSource, read_tensors, replacing
from .config import PromptEncoderType, PTuningConfig
from .encoder import PromptEncoder, build_encoder
from .layer import PTuningLayer


# Key of the table in a checkpoint of stock prompt learning.
STOCK_KEY = "prompt_embeddings"
STOCK_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)

# Task types with which stock PEFT computes something else than this package, and what.
STOCK_DIFFERS: dict[str, str] = {
    "SEQ_CLS": "it pools by position from states that begin with the prompt: BERT and its kin classify by the first "
    "prompt vector instead of [CLS]",
    "TOKEN_CLS": "it fails on labels, and its logits begin with V that belong to no token",
    "QUESTION_ANS": "its start and end logits are shifted by V",
    "FEATURE_EXTRACTION": "its hidden states begin with V that belong to no token",
}


@dataclass(frozen=True)
class Adapter:
    """One adapter of this package on a model."""

    name: str
    config: PTuningConfig
    layer: PTuningLayer
    base_model: nn.Module

    @property
    def base_model_name(self) -> str:
        """Name of the model that the adapter is for; empty if it has none."""
        return self.config.base_model_name_or_path or getattr(self.base_model, "name_or_path", None) or ""

    @torch.no_grad()
    def prompt(self) -> torch.Tensor:
        """The prompt as it is used after training, shape (V, H), in its encoder's dtype."""
        encoder = self.layer.ptuning_encoders[self.name]
        was_training = encoder.training
        try:
            encoder.eval()
            return self.layer.prompt(self.name).detach().clone()
        finally:
            encoder.train(was_training)


def find_adapter(model: nn.Module, adapter_name: Optional[str] = None) -> Adapter:
    """Finds an adapter of this package on a `PeftModel` or a transformers model.

    Raises:
        ValueError: There is none, none of this name, or no name was given and none is active.
    """
    layer = next((module for module in model.modules() if isinstance(module, PTuningLayer)), None)
    if layer is None:
        raise ValueError(f"This {type(model).__name__} has no P-tuning adapter of this package.")
    adapter_name = layer.named_or_active(adapter_name)
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    return Adapter(adapter_name, model.peft_config[adapter_name], layer, base_model)


def fold_prompt(model: nn.Module, adapter_name: Optional[str] = None) -> None:
    """Replaces the network of a prompt (`MLP`, `LSTM`, `RESIDUAL`) by the V × H numbers that come out of it, in place.

    Outputs in evaluation mode stay bitwise the same, and what is saved shrinks to the table. The table is trained
    further as plain vectors if the network was trained; an optimizer made before still holds the network.

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.

    Raises:
        ValueError: There is no such adapter.
    """
    adapter = find_adapter(model, adapter_name)
    layer, network = adapter.layer, adapter.layer.ptuning_encoders[adapter.name]
    if type(network) is PromptEncoder:
        return
    prompt, config = adapter.prompt(), copy.copy(adapter.config)  # other adapters may have the same config
    config.encoder_reparameterization_type = PromptEncoderType.NONE
    config.encoder_hidden_size = config.encoder_num_layers = None
    config.encoder_dropout = 0.0
    table = build_encoder(config, prompt.shape[1]).to(prompt)
    table.start_at(prompt)
    table.requires_grad_(network.embedding.requires_grad).train(network.training)
    layer.ptuning_encoders[adapter.name] = table
    model.peft_config[adapter.name] = config
    layer.kept_prompts.forget(adapter.name)


def export_to_peft(
    model: nn.Module, directory: str, adapter_name: Optional[str] = None, force: Optional[str] = None
) -> None:
    """Writes an adapter that PEFT loads without this package: prompt tuning, the network folded away.

    For `CAUSAL_LM` and `SEQ_2_SEQ_LM`, logits and generated tokens of stock PEFT equal those of this package where no
    padding stands on the left (stock PEFT leaves the gap between prompt and text there).

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        directory (`str`): Folder to write to; made if it is not there.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.
        force (`str`, *optional*):
            The adapter's task type, to export where stock PEFT computes something else all the same. A head that was
            trained beside the prompt is written too.

    Raises:
        ValueError: Stock PEFT would compute something else, or `force` names another task type.
    """
    adapter = find_adapter(model, adapter_name)
    backbone = find_backbone(adapter.base_model)
    task_type = _task_type(adapter)
    _check_stock(task_type, backbone, adapter.base_model, force)
    heads = trained_modules(adapter)
    if heads and task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ValueError(
            f"The adapter has trained modules beside the prompt ({', '.join(heads)}), for which stock PEFT's "
            f"{task_type} prompts have no place."
        )

    prompt = adapter.prompt().float().cpu().contiguous()
    tensors = {STOCK_KEY: prompt}
    for name, module in heads.items():
        tensors |= {f"base_model.{name}.{key}": value.cpu().contiguous() for key, value in module.state_dict().items()}
    config = PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_layers=_size(adapter.base_model, "num_hidden_layers"),
        num_attention_heads=_size(adapter.base_model, "num_attention_heads"),
        base_model_name_or_path=adapter.base_model_name or None,
        revision=adapter.config.revision,
        inference_mode=True,
    )
    with replacing(directory) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)


def import_from_peft(
    base_model: nn.Module,
    model_id: str,
    adapter_name: str = "default",
    is_trainable: bool = False,
    force: Optional[str] = None,
    subfolder: Optional[str] = None,
    **download_kwargs: Any,
) -> PeftModel:
    """Makes a stock `PROMPT_TUNING` or `P_TUNING` adapter one of this package, with plain vectors.

    Stock PEFT saves the vectors only, not the network that made them, so they are all that there is to go on with.

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
            f"{' and '.join(kind.value for kind in STOCK_TYPES)}."
        )
    bare = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    backbone = find_backbone(bare)
    _check_stock(config.task_type, backbone, bare, force)

    own = PTuningConfig(
        task_type=config.task_type,
        num_virtual_tokens=config.num_virtual_tokens,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    length, submodules = own.num_virtual_tokens, config.num_transformer_submodules
    if submodules not in (None, 1, 2):
        raise ValueError(f"`num_transformer_submodules` of {model_id} must be 1 or 2, got {submodules!r}.")
    folder = os.path.join(model_id, subfolder or "")
    if os.path.isfile(os.path.join(folder, WEIGHTS_NAME)) and SAFETENSORS_WEIGHTS_NAME not in os.listdir(folder):
        raise ValueError(
            f"{folder} has only the pickle {WEIGHTS_NAME}, which can run code when it is loaded. If you trust it, "
            "load it with stock PEFT and save it again: that writes safetensors."
        )
    path = CheckpointSource(str(model_id), subfolder, True, download_kwargs).find()
    tensors = read_tensors(path, {STOCK_KEY: (length * (submodules or 1), backbone.width)})
    # Of an encoder-decoder's rows, stock PEFT puts the first V in front of the encoder and the others nowhere.
    prompt = tensors.pop(STOCK_KEY)[:length].clone()
    heads = {f"base_model.model.{key.removeprefix('base_model.')}": value for key, value in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        key = f"base_model.model.{backbone.embedding_path}{ENCODER_KEY}embedding"
        save_file({key: prompt, **heads}, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        own.save_pretrained(folder)
        if not isinstance(base_model, PeftModel):
            return PeftModel.from_pretrained(base_model, folder, adapter_name, is_trainable=is_trainable)
        base_model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
        return base_model


@torch.no_grad()
def to_prompt_embeds(model: nn.Module, input_ids: torch.Tensor, adapter_name: Optional[str] = None) -> torch.Tensor:
    """Returns what enters the model for one text: the prompt and the embeddings of the tokens.

    This is what engines take in the place of token ids, such as `prompt_embeds` of vLLM.

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        input_ids (`torch.Tensor`): Token ids of one text without padding, shape (S,) or (1, S).
        adapter_name (`str`, *optional*): Which adapter; by default the active one.

    Returns:
        `torch.Tensor`: shape (V + S, H), in the dtype and on the device of the model's embeddings.

    Raises:
        ValueError: There is no such adapter, or `input_ids` is not one text.
    """
    adapter = find_adapter(model, adapter_name)
    if input_ids.dim() == 2 and len(input_ids) == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise ValueError(f"`input_ids` must be one text, shape (S,) or (1, S), got {tuple(input_ids.shape)}.")
    embeds = adapter.layer.embed(input_ids.to(adapter.layer.weight.device))
    return torch.cat([adapter.prompt().to(embeds), embeds])


def make_model_card(
    model: PeftModel,
    name: str,
    adapter_name: Optional[str] = None,
    license: str = "unknown",
    metrics: Optional[Mapping[str, float]] = None,
) -> ModelCard:
    """Makes the card of an adapter: base model, task, prompt and sizes, metrics, and the lines that load it.

    `card.save(path)` writes it, `card.push_to_hub(name)` puts it on the Hub, where later pushes of the model leave it.

    Args:
        model (`PeftModel`): The model that has the adapter.
        name (`str`): Name under which the adapter is loaded: a repository on the Hub or a folder.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.
        license (`str`, defaults to `"unknown"`): The Hub's identifier of the licence that you give it.
        metrics (`Mapping[str, float]`, *optional*): What was measured, by name.

    Returns:
        [`~huggingface_hub.ModelCard`]

    Raises:
        ValueError: The model has no such adapter.
    """
    adapter = find_adapter(model, adapter_name)
    state = get_peft_model_state_dict(model, adapter_name=adapter.name, save_embedding_layers=False)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    size = len(save({key: value.contiguous() for key, value in state.items()}, metadata={"format": "pt"}))
    card = ModelCard("---\n{}\n---\n")
    card.data.license = license
    fill_card(card, name, adapter.config, adapter.base_model_name, shapes, size, metrics)
    return card


def _check_stock(task_type: Optional[str], backbone: Backbone, base_model: nn.Module, force: Optional[str]) -> None:
    """Refuses what stock PEFT computes differently, unless the caller named the task type."""
    if task_type is None:
        raise ValueError(
            f"The adapter on this {type(base_model).__name__} has no task type, without which stock PEFT leaves the "
            "prompt out."
        )
    if force is not None and force != task_type:
        raise ValueError(f"`force` must name the adapter's task type, {task_type!r}, got {force!r}.")
    reason = STOCK_DIFFERS.get(task_type)
    if reason is None and backbone.embed_scale != 1:
        reason = f"{type(base_model).__name__} scales the embeddings of token ids only, and it hands over embeddings"
    if reason is not None and force is None:
        raise ValueError(
            f"Stock PEFT computes something else for {task_type}: {reason}. Stay with this package, or pass "
            f"force={task_type!r} to take it all the same."
        )


def _task_type(adapter: Adapter) -> Optional[str]:
    """The adapter's task type; where it has none, that of a generating model."""
    if adapter.config.task_type is not None:
        return str(getattr(adapter.config.task_type, "value", adapter.config.task_type))
    if not getattr(adapter.base_model, "can_generate", lambda: False)():
        return None
    return "SEQ_2_SEQ_LM" if adapter.base_model.config.is_encoder_decoder else "CAUSAL_LM"


def trained_modules(adapter: Adapter) -> dict[str, nn.Module]:
    """Modules that the adapter trains and saves beside the prompt, by their path in the base model."""
    return {
        name: module.modules_to_save[adapter.name]
        for name, module in adapter.base_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter.name in module.modules_to_save
    }


def _size(model: nn.Module, name: str) -> Optional[int]:
    return getattr(model.config.get_text_config(), name, None)
