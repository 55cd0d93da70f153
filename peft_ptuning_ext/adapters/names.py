# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Names in the state dict of a compiled model: those of the plain model, so that one file fits both."""

from __future__ import annotations

from accelerate.utils import is_compiled_module
from torch import nn

from ..files.checkpoint import saved_name


def to_saved_names(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Hook behind `state_dict`: removes the modules that `torch.compile` puts in between from the names."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[prefix + saved_name(key.removeprefix(prefix))] = state_dict.pop(key)


def from_saved_names(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Hook in front of `load_state_dict`: gives the names that the model has, compiled as it is."""
    names = [prefix + name for name, part in nn.Module.named_modules(module) if is_compiled_module(part)]
    for compiled in names:  # the outer ones come first
        for key in [key for key in state_dict if key.startswith(f"{compiled}.")]:
            inner = key.removeprefix(f"{compiled}.").removeprefix("_orig_mod.")
            state_dict[f"{compiled}._orig_mod.{inner}"] = state_dict.pop(key)
