# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the layers of a backbone run under gradient checkpointing now, and of which kind."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def is_checkpointed(stack: nn.Module) -> bool:
    """Whether gradient checkpointing is on, so that layers run again in the backward pass."""
    return next(_checkpointed(stack), None) is not None


def checkpoints_reentrantly(stack: nn.Module) -> bool:
    """Whether gradient checkpointing is on, of the kind that passes no gradient to what a layer gets by name."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in _checkpointed(stack))
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)


def _checkpointed(stack: nn.Module) -> Iterator[nn.Module]:
    return (
        module for module in stack.modules() if module.training and getattr(module, "gradient_checkpointing", False)
    )
