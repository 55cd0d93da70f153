# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A key-value cache that holds a prompt, and to the outside only the user's tokens.

`generate`, position bookkeeping and callers slice their inputs by the length that a cache reports, so it has to be the
user's; the layers need the true one. A cache that holds a prompt therefore gets a class that reports the former, and
the backbone gets a view of it that reports the latter. Both share one state.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

from transformers import Cache


class _HidesPrompt:
    """Mixed into the class of a cache whose first V columns are a prompt. `ptuning_prompt` is (adapter, V)."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return max(super().get_seq_length(*args, **kwargs) - self.ptuning_prompt[1], 0)

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


def hide_prompt(cache: Cache, adapter_name: str, length: int) -> None:
    """Makes `cache` report the user's tokens only, in place; it holds, or is about to, V = `length` columns more."""
    cache.ptuning_prompt = (adapter_name, length)
    cache.__class__ = _hiding_class(_open_class(type(cache)))


def forget_prompt(cache: Cache) -> None:
    """Undoes [`hide_prompt`] on a cache that was emptied."""
    if isinstance(cache, _HidesPrompt):
        cache.__class__ = _open_class(type(cache))
        del cache.ptuning_prompt


def open_view(cache: Cache) -> Cache:
    """Returns a cache with the same state that reports all columns."""
    if not isinstance(cache, _HidesPrompt):
        return cache
    view = object.__new__(_open_class(type(cache)))
    view.__dict__ = cache.__dict__
    return view


def held_prompt(cache: Cache) -> tuple[Optional[str], int]:
    """Returns the adapter whose prompt the cache holds, and V; (None, 0) if it holds none."""
    return getattr(cache, "ptuning_prompt", (None, 0))
