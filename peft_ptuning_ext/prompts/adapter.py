# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Finds an adapter of this package on a model."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch import nn

from ..config import PTuningConfig
from .layer import PTuningLayer
from .prompt import States


# The attribute of a backbone at which it carries what it is attached to.
ATTACHMENT = "ptuning"


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

    @property
    def is_deep(self) -> bool:
        """Whether the prompt is keys and values in every layer."""
        return self.layer.is_deep(self.name)

    def prompt(self) -> torch.Tensor:
        """The prompt as it is used after training, shape (V, H), in its encoder's dtype.

        Raises:
            ValueError: The prompt is deep and has no vectors.
        """
        return self._after_training(self.layer.prompt).detach().clone()

    def states(self) -> States:
        """A deep prompt as it is used after training: keys and values by layer, each (1, key-value heads, V, D)."""
        encoded = self._after_training(self.layer.encode)
        return {layer: tuple(state.detach().clone() for state in pair) for layer, pair in encoded.items()}

    @torch.no_grad()
    def _after_training(self, encode: Callable[[str], Any]) -> Any:
        encoder = self.layer.ptuning_encoders[self.name]
        was_training = encoder.training
        try:
            encoder.eval()
            return encode(self.name)
        finally:
            encoder.train(was_training)


def find_stack(model: nn.Module) -> Optional[nn.Module]:
    """Finds the backbone in a model that prompts are attached to; `None` if there is none."""
    return next((module for module in model.modules() if ATTACHMENT in vars(module)), None)


def find_layer(model: nn.Module) -> Optional[PTuningLayer]:
    """Finds the tuner layer of a model; `None` if there is none."""
    return next((module for module in model.modules() if isinstance(module, PTuningLayer)), None)


def layer_of(stack: nn.Module) -> PTuningLayer:
    """Returns the tuner layer of a backbone that prompts are attached to."""
    # Accelerate's regional compilation wraps modules inside a model.
    layer = without_compilation(operator.attrgetter(stack.ptuning.backbone.embedding)(stack))
    if not isinstance(layer, PTuningLayer):
        raise ValueError(
            f"The input embedding of {type(stack).__name__} was replaced after the P-tuning adapter was added, by a "
            f"{type(layer).__name__}. Put there what another method needs, and resize or replace embeddings, first. "
            "Add the prompt then."
        )
    return layer


def find_adapter(model: nn.Module, adapter_name: Optional[str] = None) -> Adapter:
    """Finds an adapter of this package on a `PeftModel` or a transformers model.

    Raises:
        ValueError: There is none, none of this name, or no name was given and none is active.
    """
    layer = find_layer(model)
    if layer is None:
        raise ValueError(f"This {type(model).__name__} has no P-tuning adapter of this package.")
    adapter_name = layer.named_or_active(adapter_name)
    config = without_compilation(model).peft_config[adapter_name]
    return Adapter(adapter_name, config, layer, base_of(model))


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a `PeftModel`, a compiled model, or both."""
    model = without_compilation(model)
    return without_compilation(model.get_base_model()) if isinstance(model, PeftModel) else model


def without_compilation(model: nn.Module) -> nn.Module:
    """The model inside a compiled one."""
    return model._orig_mod if is_compiled_module(model) else model
