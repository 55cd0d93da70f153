# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Lets `model.forward(...)` of a bare backbone run the hooks that `model(...)` runs.

Torch runs hooks when a module is called, and callers of a bare backbone, sentence-transformers for one, call its
`forward`; the prompt would be left out without a word. The backbone therefore gets a class of the same name whose
`forward` becomes a call, unless it is entered from one.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


# Argument with which the hook on the backbone tells `forward` that it was entered by a call.
ENTERED = "ptuning_entered"


@functools.cache
def _routed_class(original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # An instance's own `forward`, as accelerate puts there, stands between the hooks and this one.
        if kwargs.pop(ENTERED, False) or "forward" in self.__dict__:
            return original.forward(self, *args, **kwargs)
        return self(*args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        return _rebuild, (original,), self.__getstate__()

    body = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"forward": forward, "__reduce_ex__": __reduce_ex__, "is_ptuning_routed": True}
    return type(original.__name__, (original,), body)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    routed = _routed_class(original)
    return routed.__new__(routed)


class RoutedForward:
    """Routes the `forward` of `stack` through its call until `remove()`, like a handle of a hook."""

    def __init__(self, stack: nn.Module):
        self.stack = stack
        stack.__class__ = _routed_class(type(stack))

    def remove(self) -> None:
        self.stack.__class__ = type(self.stack).__base__


def entering(stack: nn.Module, kwargs: dict) -> dict:
    """Returns the arguments of a call that is about to enter `stack.forward`."""
    is_routed = getattr(type(stack), "is_ptuning_routed", False) and "forward" not in stack.__dict__
    return {**kwargs, ENTERED: True} if is_routed else kwargs
