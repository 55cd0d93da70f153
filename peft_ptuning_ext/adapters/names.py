# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Names in a model with prompts: those that it has without them, and uncompiled, so that one file fits all.

Another method's layer on the input embedding is inside the tuner layer. Its parameters get the names that they have
where there is no prompt, so that PEFT saves a file that fits a model with that adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from accelerate.utils import is_compiled_module
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..files.checkpoint import ENCODER_KEY, saved_name
from ..prompts.layer import PTuningLayer


def naming(module: nn.Module) -> Callable[[str], str]:
    """Returns what makes names to be saved of the names of modules and tensors in `module`."""
    path = _embedding_of_others(module)
    if path is None:
        return saved_name
    inside = f"{path}.base_layer"

    def name_of(name: str) -> str:
        name = saved_name(name)
        return path + name.removeprefix(inside) if f"{name}.".startswith(f"{inside}.") else name

    return name_of


def _embedding_of_others(module: nn.Module) -> Optional[str]:
    """The saved name of the tuner layer if a layer of another method is inside it."""
    for name, layer in nn.Module.named_modules(module):
        if isinstance(layer, PTuningLayer):
            inside = layer.base_layer
            is_theirs = isinstance(inside, BaseTunerLayer)
            if isinstance(inside, AuxiliaryTrainingWrapper):
                is_theirs = inside._adapters.isdisjoint(layer.ptuning_encoders)
            return saved_name(name) if is_theirs else None
    return None


def to_saved_names(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Hook behind `state_dict`: gives tensors the names to be saved."""
    name_of = naming(module)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[prefix + name_of(key.removeprefix(prefix))] = state_dict.pop(key)


def from_saved_names(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Hook in front of `load_state_dict`: gives tensors the names that the model has, as it is."""
    if (path := _embedding_of_others(module)) is not None:
        place = f"{prefix}{path}"
        for key in [key for key in state_dict if key.startswith(f"{place}.") and ENCODER_KEY not in key]:
            state_dict[f"{place}.base_layer{key.removeprefix(place)}"] = state_dict.pop(key)
    names = [prefix + name for name, part in nn.Module.named_modules(module) if is_compiled_module(part)]
    for compiled in names:  # the outer ones come first
        for key in [key for key in state_dict if key.startswith(f"{compiled}.")]:
            inner = key.removeprefix(f"{compiled}.").removeprefix("_orig_mod.")
            state_dict[f"{compiled}._orig_mod.{inner}"] = state_dict.pop(key)
