# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Caches that hold a prompt among the user's tokens, and report the user's tokens only.

`generate` and callers slice their inputs by the length that a cache reports, so it has to be the user's length. The
layers need the true length. Such a cache therefore gets a class that reports the user's length. The backbone gets a
view of the cache that reports the true length. Both share one state.

A prompt whose keys and values are put in front in attention is not in the cache at first. Where a layer of the cache
grows by concatenation, it then takes them in, so that no later step has to put them in front again. Either way,
`cache.ptuning_prompt` is the [`Prompt`] that the cache was filled behind.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..prompts.prompt import Prompt, by_row


# Up to so many rows times V, on a CPU, a step takes no longer with the prompt in each row of the cache. Above, reading
# the prompt once for all rows is faster.
FEW = 512


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


class LayerWithPrompt(DynamicLayer):
    """A layer of a cache whose keys and values begin with the prompt's, and which reports the text's only.

    Its `keys` and `values` are (B, key-value heads, V + N, D). The masks that are made by it are of N columns.
    """

    prompt_length: int

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] - self.prompt_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # in earlier releases of transformers the number of tokens to be left
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        removed = min(-tokens_to_remove, self.get_seq_length())
        end = self.keys.shape[-2] - removed
        self.keys, self.values = self.keys[..., :end, :], self.values[..., :end, :]

    def reset(self) -> None:
        self.__class__, self.keys, self.values, self.is_initialized = DynamicLayer, None, None, False


class PassingCache(DynamicCache):
    """An empty cache that holds nothing: attention gets back what it gives, which is noted.

    Attributes:
        states (`dict[int, tuple]`): By layer, what its attention gave to be held, two tensors (B, heads, N, D).
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.states[layer_idx] = key_states, value_states
        return key_states, value_states


def is_taken_in() -> bool:
    """Whether a cache that is filled now takes the prompt in."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled())


def layers_attended(cache: Cache, given: Mapping[int, tuple[weakref.ref, weakref.ref]]) -> set[int]:
    """The layers of a cache that hold the keys and values which their attention was given.

    Some hold what keys and values are made from (DeepSeek), or fewer heads (JetMoe).
    """
    layers = getattr(cache, "layers", ())
    return {index for index, pair in given.items() if index < len(layers) and _holds(layers[index], *pair)}


def _holds(layer: Any, key: weakref.ref, value: weakref.ref) -> bool:
    """Whether a layer of a cache holds these very tensors."""
    held = getattr(layer, "keys", None), getattr(layer, "values", None)
    return None not in held and held[0] is key() and held[1] is value()


def take_in(cache: Cache, attended: Collection[int]) -> None:
    """Puts the keys and values of the prompt behind which `cache` was filled into the layers that grow.

    Layers that drop columns, that have a fixed number, or that are moved or quantized between calls, stay without.

    Args:
        cache (`Cache`): The cache.
        attended (`Collection[int]`): The layers that hold the keys and values which attention was given.
    """
    prompt: Prompt = cache.ptuning_prompt
    if prompt.in_cache or not is_taken_in():
        return
    layers = [] if getattr(cache, "offloading", False) else getattr(cache, "layers", [])
    taken = []
    for index, layer in enumerate(layers):
        states = prompt.states.get(index) if index in attended else None
        if states is None or type(layer) is not DynamicLayer or not layer.is_initialized:
            continue
        is_shared = len(states[0]) == 1
        if is_shared and layer.keys.device.type == "cpu" and layer.keys.shape[0] * prompt.length > FEW:
            continue
        layer.keys, layer.values = (put_in_front(*pair) for pair in zip(states, (layer.keys, layer.values)))
        layer.__class__, layer.prompt_length = LayerWithPrompt, prompt.length
        taken.append(index)
    cache.ptuning_prompt = dataclasses.replace(prompt, in_cache=frozenset(taken))


def put_in_front(prompt: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Keys or values of all rows: (1 or B, heads, V, D) and (B, heads, N, D) → (B, heads, V + N, D)."""
    rows = text.shape[0]
    of_rows = by_row(prompt.to(text), rows)
    return torch.cat([of_rows if len(of_rows) == rows else of_rows.expand(rows, -1, -1, -1), text], dim=2)


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
    noted = getattr(cache, "ptuning_prompt", None)
    if noted is prompt:
        return
    cache.ptuning_prompt = prompt
    if noted is None and not torch.compiler.is_compiling() and is_static(cache):
        cache.__class__ = _mixed_class(StaticCacheBesidePrompt, _plain_class(type(cache)))


@torch.compiler.disable  # it can't compile a change of class
def note_prompt(cache: Cache, prompt: Prompt) -> None:
    """Makes `cache` report the user's tokens only, in place; it holds, or is about to, V columns more."""
    cache.ptuning_prompt = prompt
    cache.__class__ = _mixed_class(CacheWithPrompt, _plain_class(type(cache)))


def clear_prompt(cache: Cache) -> None:
    """Makes `cache`, which was emptied, one that was filled behind no prompt."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, LayerWithPrompt):  # all of the text was taken from it, and the prompt is left
            layer.reset()
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
