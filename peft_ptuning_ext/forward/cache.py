# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Caches that hold a prompt among the user's tokens, and report the user's tokens only.

`generate` and callers slice their inputs by the length that a cache reports, so it has to be the user's length. The
layers need the true length. Such a cache therefore gets a class that reports the user's length. The backbone gets a
view of the cache that reports the true length. Both share one state.

A prompt whose keys and values are put in front in attention is not in the cache. Either way, `cache.ptuning_prompt` is
the [`Prompt`] that the cache was filled behind.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from ..prompts.prompt import Prompt


class CacheWithPrompt:
    """Mixed into the class of a cache whose columns hold V virtual tokens beside the user's."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return max(super().get_seq_length(*args, **kwargs) - self.ptuning_prompt.length, 0)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (CacheWithPrompt, _plain_class(type(self))), self.__dict__


class StaticCacheBesidePrompt:
    """Mixed into the class of a static cache whose prompt is in front in attention.

    Such a cache has its length on the device. Whether it was emptied can be asked for there, which would make every
    step wait, or noted when it is.
    """

    def reset(self) -> None:
        super().reset()
        clear_prompt(self)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (StaticCacheBesidePrompt, _plain_class(type(self))), self.__dict__


@functools.cache
def _mixed_class(mixin: type, cache_class: type[Cache]) -> type[Cache]:
    return type(f"{cache_class.__name__}BehindPrompt", (mixin, cache_class), {})


def _plain_class(cache_class: type[Cache]) -> type[Cache]:
    is_mixed = issubclass(cache_class, (CacheWithPrompt, StaticCacheBesidePrompt))
    return cache_class.__mro__[2] if is_mixed else cache_class


def _rebuild(mixin: type, cache_class: type[Cache]) -> Cache:
    mixed = _mixed_class(mixin, cache_class)
    return mixed.__new__(mixed)


def note_prompt_beside(cache: Cache, prompt: Prompt) -> None:
    """Notes that `cache` is filled behind a prompt that attention puts in front."""
    is_noted = getattr(cache, "ptuning_prompt", None) is not None
    cache.ptuning_prompt = prompt
    if not is_noted and not torch.compiler.is_compiling() and is_static(cache):
        cache.__class__ = _mixed_class(StaticCacheBesidePrompt, _plain_class(type(cache)))


@torch.compiler.disable  # it can't compile a change of class
def note_prompt(cache: Cache, prompt: Prompt) -> None:
    """Makes `cache` report the user's tokens only, in place; it holds, or is about to, V columns more."""
    cache.ptuning_prompt = prompt
    cache.__class__ = _mixed_class(CacheWithPrompt, _plain_class(type(cache)))


def clear_prompt(cache: Cache) -> None:
    """Makes `cache`, which was emptied, one that was filled behind no prompt."""
    cache.__class__ = _plain_class(type(cache))
    cache.ptuning_prompt = None


def full_view(cache: Cache) -> Cache:
    """Returns a cache with the same state as one that holds a prompt, which reports all columns."""
    view = object.__new__(_plain_class(type(cache)))
    view.__dict__ = cache.__dict__
    return view


def is_static(cache: Any) -> bool:
    """Whether a cache has room for a fixed number of columns."""
    cache = getattr(cache, "self_attention_cache", cache)  # of one that holds what cross-attention sees, too
    return isinstance(cache, Cache) and any(isinstance(layer, StaticLayer) for layer in cache.layers)
