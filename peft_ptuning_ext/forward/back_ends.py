# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Back ends of attention: how each kind of attention function is given keys and values in front of the text's.

Kinds differ in their masks. Those of `sdpa` and `eager` are tensors (B or 1, heads or 1, S, N), those of
`flex_attention` are block masks, and flash attention gets those of padding only, (B, N). `BACK_ENDS` names the kinds
of transformers' own functions. Of any other function, its mask tells the kind. Where a mask does not say what is ahead
of a token, the function is tried on two tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import BlockMask, flash_attention_mask

from . import flash, flex
from .cache import put_in_front
from .merged_attention import can_merge, merged_attention
from .seen import Form, check_packing, form_of


if TYPE_CHECKING:
    from .attention import InFront


# Up to so many numbers of keys, copying them for a single query takes less time than merging two attentions.
SMALL = 2**15


@dataclass(frozen=True)
class NamedAttention:
    """An attention function that is known by its name only, or that looks its own name up.

    Args:
        name (`str`): The model's own name of it.
        function (`Callable`): What is registered under the name.
        mask_function (`Callable`, *optional*): What makes its masks; `None`: it gets none.
    """

    name: str
    function: Callable
    mask_function: Optional[Callable] = None

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        if self.function is flash_attention_forward or "/" in self.name:
            # It looks in the config which of its kernels to call, and there finds the name of an adapted model.
            config = _Seen(module.config, _attn_implementation=self.name)
            module = _Seen(module, config=config)
        return self.function(module, *args, **kwargs)


class _Seen:
    """An object as it is, except for some attributes."""

    def __init__(self, seen: Any, **instead: Any):
        self.__dict__.update(instead, seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.seen, name)


@dataclass
class Inputs:
    """What the attention of one layer is called with, and what comes in front.

    Args:
        attention (`Callable`): The attention function of the model.
        module (`nn.Module`): The attention layer.
        query (`torch.Tensor`): (B, heads, S, D).
        key (`torch.Tensor`): The text's, (B, key-value heads, N, D).
        value (`torch.Tensor`): The text's.
        mask (`Any`): The text's.
        kwargs (`dict`): The further arguments of the attention function.
        prompt_key (`torch.Tensor`): (1, key-value heads, V, D).
        prompt_value (`torch.Tensor`): Of the same shape.
        window (`int`, *optional*): How many tokens back a query looks, itself among them, if that hides any.
        is_causal (`bool`): Whether a query without a mask looks back only.
        both (`tuple`, *optional*): Keys and values of [prompt; text] if the cache holds the prompt, too.
    """

    attention: Callable
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    kwargs: dict
    prompt_key: torch.Tensor
    prompt_value: torch.Tensor
    window: Optional[int]
    is_causal: bool
    both: Optional[tuple[torch.Tensor, torch.Tensor]] = None

    def run(self, mask: Any, key_value: Optional[tuple[torch.Tensor, torch.Tensor]] = None) -> tuple:
        """Calls the attention function with [prompt; text] or other keys and values."""
        key_value = self.both if key_value is None else key_value
        if key_value is None:
            key_value = put_in_front(self.prompt_key, self.key), put_in_front(self.prompt_value, self.value)
        if (bias := self.kwargs.get("position_bias")) is not None:  # the prompt has no distance to the text
            bias = bias[..., : self.key.shape[2]]
            self.kwargs["position_bias"] = functional.pad(bias, (self.prompt_key.shape[2], 0))
        return self.attention(self.module, self.query, *key_value, mask, **self.kwargs)

    def as_autocast(self) -> Inputs:
        """In the dtype that autocast asks for: kernels behind a `CausalBias` are called past autocast."""
        device = self.query.device.type
        if not torch.is_autocast_enabled(device):
            return self
        dtype, names = torch.get_autocast_dtype(device), ("query", "key", "value", "prompt_key", "prompt_value")
        return dataclasses.replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def attend(front: InFront, inputs: Inputs) -> tuple[torch.Tensor, Any]:
    """The attention of one layer to [prompt; text], by the back end of its attention function.

    Raises:
        NotRecorded: The function gets no mask, and does not see the right keys without one.
    """
    return _back_end(inputs)(front, inputs)


def _back_end(inputs: Inputs) -> Callable:
    attention, mask = inputs.attention, inputs.mask
    if isinstance(mask, BlockMask):
        return flex.attend
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        return with_tensors
    if isinstance(attention, NamedAttention):
        return BACK_ENDS.get(attention.function, by_sight)
    return BACK_ENDS.get(attention, with_tensors)


def copies(key: torch.Tensor, prompt_key: torch.Tensor) -> bool:
    """Whether for a single query keys are copied side by side, rather than two attentions merged.

    Args:
        key (`torch.Tensor`): The text's, (B, key-value heads, N, D).
        prompt_key (`torch.Tensor`): (1, key-value heads, V, D).
    """
    if key.device.type != "cpu":
        return True
    return key.numel() + key.shape[0] * prompt_key.numel() <= SMALL and not torch.is_grad_enabled()


def check_form(attention: Callable, *sample: Any) -> None:
    """Looks whether a function can be given a prompt; `sample` is that of `form_of`.

    Raises:
        NotRecorded: It can't.
    """
    if not isinstance(attention, NamedAttention) or attention.function in BACK_ENDS:
        return
    if attention.mask_function in (None, flash_attention_mask):
        form_of(attention, *sample)


def with_tensors(front: InFront, inputs: Inputs, additive: bool = False) -> tuple[torch.Tensor, Any]:
    """Attention with a mask (B or 1, heads or 1, S, N or more), boolean or additive.

    `None` stands for a causal mask, or for none in a backbone that looks both ways.
    """
    query, key, given, window = inputs.query, inputs.key, inputs.mask, inputs.window
    queries, tokens = query.shape[2], key.shape[2]
    is_sdpa = inputs.attention is sdpa_attention_forward
    is_causal = inputs.is_causal and queries > 1
    mask = given if given is None else given[..., :tokens]
    if mask is None and is_causal and queries < front.queries:  # the queries are those of the last tokens only
        mask = torch.ones(front.queries, tokens, dtype=torch.bool, device=key.device).tril()[None, None, -queries:]
    is_whole = inputs.both is not None or (queries == 1 and copies(key, inputs.prompt_key))
    is_whole = is_whole or len(inputs.prompt_key) > 1  # of each row its own
    sees_prompt = front.present is None
    if is_sdpa and window is None and not is_whole and can_merge(query, key, inputs.value, inputs.kwargs):
        parts = (query, key, inputs.value, inputs.prompt_key, inputs.prompt_value)
        return merged_attention(*parts, mask, is_causal, inputs.kwargs.get("scaling")), None
    if mask is None and window is None and not is_causal and sees_prompt:
        return inputs.run(None)  # all is seen
    has_bias = inputs.kwargs.get("position_bias") is not None
    takes_bias = is_sdpa and sees_prompt and not has_bias and not torch.compiler.is_compiling()
    if takes_bias and mask is None and window is None and queries == tokens:
        return inputs.as_autocast().run(causal_lower_right(tokens, tokens + front.prompt.length))
    widen = functools.partial(_widen, front, inputs, mask)
    mask = front.share(given, (window, queries, tokens), widen).to(key.device)
    if additive and mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    return inputs.run(mask)


def _widen(front: InFront, inputs: Inputs, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """The text's mask with the prompt's columns."""
    queries, tokens, device = inputs.query.shape[2], inputs.key.shape[2], inputs.key.device
    length = front.prompt.length
    if mask is None:
        mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool, device=device)
        if inputs.is_causal and queries > 1:
            # A static cache has columns behind the text. Another has dropped what is out of a window.
            before = 0 if isinstance(front.past, torch.Tensor) else min(front.past, tokens - queries)
            mask = mask.tril(before)
            mask = mask if inputs.window is None else mask.triu(before + 1 - inputs.window)
    if inputs.window is None:
        visible = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
    else:
        column = torch.arange(length, device=device)
        # Some models compute queries for the last tokens only.
        visible = front.distances(device)[:, None, -queries:, None] - column < inputs.window
    if front.present is not None:
        visible = visible & front.present.to(device)[:, None, None]
    if mask.dtype != torch.bool:
        visible = mask.new_zeros(()).masked_fill(~visible, torch.finfo(mask.dtype).min)
    shape = torch.broadcast_shapes(mask.shape[:-1], visible.shape[:-1])
    return torch.cat([visible.expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)


def by_sight(front: InFront, inputs: Inputs) -> tuple[torch.Tensor, Any]:
    """Attention of somebody's own function, whose mask does not say what is ahead: none, or one of padding, (B, N)."""
    is_causal = inputs.is_causal and inputs.query.shape[2] > 1
    if inputs.mask is None and inputs.window is None and not is_causal and front.present is None:
        return inputs.run(None)  # all is seen
    sample = (inputs.module, inputs.query, inputs.value, inputs.kwargs)
    form = form_of(inputs.attention, *sample, is_causal=inputs.is_causal)
    if form is Form.NONE or inputs.mask is not None:
        return flash.attend(front, inputs)
    if flash.starts_of_texts(front, inputs) is not None:
        check_packing(inputs.attention, *sample)
    return with_tensors(front, inputs, additive=form is Form.ADDITIVE)


# The kinds of transformers' own attention functions. Each takes (front, inputs).
BACK_ENDS: dict[Callable, Callable] = {
    sdpa_attention_forward: with_tensors,
    flash_attention_forward: flash.attend,
    flex_attention_forward: flex.attend,
}
