# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter on a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save

from ..files.card import fill_card
from ..prompts.adapter import find_adapter


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
    state = get_peft_model_state_dict(
        model, state_dict=_without_values(model), adapter_name=adapter.name, save_embedding_layers=False
    )
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    zeros = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    size = len(save(zeros, metadata={"format": "pt"}))
    card = ModelCard("---\n{}\n---\n")
    card.data.license = license
    fill_card(card, name, adapter.config, adapter.base_model_name, shapes, size, metrics)
    return card


def _without_values(model: PeftModel) -> dict[str, torch.Tensor]:
    """The state dict on the meta device. A card needs shapes only, and one process may hold a part of the values.

    Tensors of FSDP2 have the shape of the whole. DeepSpeed ZeRO-3 leaves empty tensors with the shape as `ds_shape`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        key: torch.empty(getattr(parameters.get(key), "ds_shape", value.shape), dtype=value.dtype, device="meta")
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
