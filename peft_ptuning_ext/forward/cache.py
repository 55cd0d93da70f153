# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What a key-value cache knows of the prompt that it was filled behind.

A prompt that is shared stands beside the cache, which holds the user's tokens only and remembers the prompt.

A prompt that is concatenated is in the cache. `generate`, position bookkeeping and callers slice their inputs by the
length that a cache reports, so it has to be the user's; the layers need the true one. Such a cache therefore gets a
class that reports the former, and the backbone gets a view of it that reports the latter. Both share one state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Optional

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from .shared_prompt import SharedPrompt


@dataclass(frozen=True)
class HeldPrompt:
    """The adapter whose prompt is in a cache, and V."""

    adapter_name: str
    length: int


class _HidesPrompt:
    """Mixed into the class of a cache whose first V columns are the prompt that `ptuning_prompt` describes."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return max(super().get_seq_length(*args, **kwargs) - self.ptuning_prompt.length, 0)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (_open_class(type(self)),), self.__dict__


@functools.cache
def _hiding_class(cache_class: type[Cache]) -> type[Cache]:
    return type(f"{cache_class.__name__}BehindPrompt", (_HidesPrompt, cache_class), {})


def _open_class(cache_class: type[Cache]) -> type[Cache]:
    return cache_class.__mro__[2] if issubclass(cache_class, _HidesPrompt) else cache_class


def _rebuild(cache_class: type[Cache]) -> Cache:
    hiding = _hiding_class(cache_class)
    return hiding.__new__(hiding)


@torch.compiler.disable  # it can't compile a change of class
def hide_prompt(cache: Cache, adapter_name: str, length: int) -> None:
    """Makes `cache` report the user's tokens only, in place; it holds, or is about to, V = `length` columns more."""
    cache.ptuning_prompt = HeldPrompt(adapter_name, length)
    cache.__class__ = _hiding_class(_open_class(type(cache)))


def remember_prompt(cache: Cache, prompt: SharedPrompt) -> None:
    """Notes that `cache` is filled behind a prompt that stands beside it."""
    if held_prompt(cache) is not prompt:
        forget_prompt(cache)
        cache.ptuning_prompt = prompt


def forget_prompt(cache: Cache) -> None:
    """Undoes [`hide_prompt`] or [`remember_prompt`] on a cache that was emptied."""
    if isinstance(cache, _HidesPrompt):
        cache.__class__ = _open_class(type(cache))
    if held_prompt(cache) is not None:
        del cache.ptuning_prompt


def open_view(cache: Cache) -> Cache:
    """Returns a cache with the same state that reports all columns."""
    if not isinstance(cache, _HidesPrompt):
        return cache
    view = object.__new__(_open_class(type(cache)))
    view.__dict__ = cache.__dict__
    return view


def held_prompt(cache: Any) -> Optional[HeldPrompt | SharedPrompt]:
    """Returns the prompt that a cache was filled behind; `None` if there is none, or no cache."""
    return getattr(cache, "ptuning_prompt", None)


def filled_length(cache: Any) -> int | torch.Tensor:
    """How many columns a cache holds, a prompt's too; 0 if it is none. A tensor only while compiling."""
    if not isinstance(cache, Cache):
        return 0
    length = open_view(cache).get_seq_length()
    return length if torch.compiler.is_compiling() else int(length)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds anything, for what can be told without breaking a graph that is being compiled."""
    length = filled_length(cache)
    return held_prompt(cache) is not None if isinstance(length, torch.Tensor) else length > 0


def is_static(cache: Any) -> bool:
    """Whether a cache has room for a fixed number of columns."""
    cache = getattr(cache, "self_attention_cache", cache)  # of one that holds what cross-attention sees, too
    return isinstance(cache, Cache) and any(isinstance(layer, StaticLayer) for layer in cache.layers)
