# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the first prompt of a model puts into it, before it holds a prompt."""

from __future__ import annotations

from torch import nn

from ..backbone import Backbone
from ..forward import deep, deep_decoder
from ..forward.wrap import attach
from ..prompts.adapter import find_stack
from ..prompts.layer import PTuningLayer
from .vocabulary import allow_resizing_and_tying


def install(model: nn.Module, backbone: Backbone) -> PTuningLayer:
    """Puts a tuner layer without prompts around the input embedding, and wraps the backbone's `forward`."""
    path = backbone.embedding_path
    layer = PTuningLayer(model.get_submodule(path), backbone.embed_scale)
    model.set_submodule(path, layer)
    attach(model, backbone)
    allow_resizing_and_tying(model, path)
    return layer


def take_deep_prompts(
    model: nn.Module, backbone: Backbone, modules: dict[int, nn.Module], in_encoder: bool, in_decoder: bool
) -> None:
    """Lets layers take keys and values in front of their text.

    Args:
        model (`nn.Module`): The model with the tuner layer.
        backbone ([`Backbone`]): Facts about it.
        modules (`dict[int, nn.Module]`): The attention of each layer of the backbone, where it could be told.
        in_encoder (`bool`): Whether the layers of the backbone are meant.
        in_decoder (`bool`): Whether those of the decoder that attends to it are.
    """
    stack = find_stack(model)
    if in_encoder:
        deep.take_prompts(stack, backbone, modules)
    if in_decoder:
        deep_decoder.take_prompts(stack, model.get_submodule(backbone.decoder))
