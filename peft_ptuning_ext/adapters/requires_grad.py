# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Which parameters train: noted before PEFT changes it, and set back."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def requires_grad_by_name(model: nn.Module) -> dict[str, bool]:
    """Returns `requires_grad` of each parameter of a model."""
    return {_plain(name): parameter.requires_grad for name, parameter in model.named_parameters()}


def restore_requires_grad(
    model: nn.Module, before: Mapping[str, bool], frozen: Container[nn.Parameter] = frozenset()
) -> None:
    """Sets `requires_grad` of a model's parameters to what it was before, unless they are to stay frozen."""
    for name, parameter in model.named_parameters():
        if parameter not in frozen:
            parameter.requires_grad_(before.get(_plain(name), parameter.requires_grad))


def _plain(name: str) -> str:
    """The name of a parameter in the base model: a tuner layer may have come or gone around it."""
    return name.replace(".base_layer.", ".")


@contextmanager
def keeping_requires_grad(model: nn.Module) -> Iterator[None]:
    """Inside, `requires_grad` may be set; behind, each parameter's is as it was, even if its name is another."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, requires_grad in before:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
