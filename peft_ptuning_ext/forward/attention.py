# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Attention with a prompt in front: what the attention of an adapted backbone calls, for each of its layers.

Transformers looks an attention function up by the name in the config. An adapted backbone's config has a name of ours,
whose function puts the prompt's keys and values in front and calls the function of the name before.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..backbone import ATTENTION_NAMES
from ..prompts.prompt import Prompt, States
from .call import leading_padding
from .merged_attention import can_merge, merged_attention


# The argument by which the backbone hands the prompt down to its attention.
KEYWORD = "ptuning_prompt"

# The attribute of an attention that has no `layer_idx`: which layer it is.
LAYER = "ptuning_layer"

# Up to so many numbers of keys, copying them for a single query takes less time than merging two attentions.
SMALL = 2**15


@dataclass
class InFront:
    """A prompt in front of the text of one call.

    Args:
        prompt ([`Prompt`]): With its states.
        queries (`int`): How many tokens the call has, S.
        past (`int` or `torch.Tensor`): How many tokens of the text are in the cache; a tensor while compiling.
        mask (`torch.Tensor`, *optional*): The text's 2-D mask, (B, past + S).
        positions (`torch.Tensor`, *optional*):
            The call's positions, counted from the prompt's first token: (B or 1, S), or (3, B, S) of images; `None`
            for those of the columns.
        is_causal (`bool`): Whether the backbone looks back only.
        masks (`dict`): Masks with the prompt's columns, which layers share.
        attended (`int`): How many layers were called so far that do not say which they are.
    """

    prompt: Prompt
    queries: int
    past: int | torch.Tensor
    mask: Optional[torch.Tensor]
    positions: Optional[torch.Tensor] = None
    is_causal: bool = True
    masks: dict = field(default_factory=dict)
    attended: int = 0

    def attend(self, attention, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, Any]:
        """The attention of one layer to [prompt; text].

        Args:
            attention (`Callable`): The attention function of the model.
            module (`nn.Module`): The attention layer.
            query (`torch.Tensor`): (B, heads, S, D).
            key (`torch.Tensor`): The text's, (B, key-value heads, N, D).
            value (`torch.Tensor`): The text's.
            mask (`torch.Tensor`, *optional*):
                The text's, (B or 1, heads or 1, S, N or more), boolean or additive; `None`: causal, or all of it for a
                backbone that looks both ways.
            kwargs (`dict`): The further arguments of the attention function.
        """
        layer = layer_of(module)
        if layer is None:
            layer, self.attended = self.attended, self.attended + 1
        prompt_key, prompt_value = self.prompt.states[layer]
        if not key.dtype == prompt_key.dtype == prompt_value.dtype or prompt_key.device != key.device:
            # Under autocast, keys that went through rotary embeddings may be float32 beside values in bfloat16.
            prompt_key, prompt_value = prompt_key.to(key), prompt_value.to(key)
        window, queries, tokens = kwargs.get("sliding_window"), query.shape[2], key.shape[2]
        if window is not None and not isinstance(self.past, torch.Tensor):
            # A window longer than the whole sequence hides nothing.
            window = None if self.past + self.queries + self.prompt.length <= window else window
        given_mask, mask = mask, mask if mask is None else mask[..., :tokens]
        is_causal = self.is_causal and queries > 1
        if mask is None and is_causal and queries < self.queries:  # the queries are those of the last tokens only
            mask = torch.ones(self.queries, tokens, dtype=torch.bool, device=key.device).tril()[None, None, -queries:]
        copied = key.numel() + len(key) * prompt_key.numel()
        is_small = queries == 1 and copied <= SMALL and not torch.is_grad_enabled()
        is_plain = attention is sdpa_attention_forward and window is None
        if is_plain and not is_small and can_merge(query, key, value, kwargs):
            scale = kwargs.get("scaling")
            return merged_attention(query, key, value, prompt_key, prompt_value, mask, is_causal, scale), None
        if len(key) > 1:
            prompt_key, prompt_value = (t.expand(len(key), -1, -1, -1) for t in (prompt_key, prompt_value))
        key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        if (bias := kwargs.get("position_bias")) is not None:  # the prompt has no distance to the text
            kwargs["position_bias"] = functional.pad(bias[..., :tokens], (self.prompt.length, 0))
        if mask is None and window is None and not is_causal:
            pass  # all is seen
        elif mask is None and window is None and queries == tokens and bias is None:
            mask = causal_lower_right(tokens, key.shape[2])
        else:
            mask = self._mask(given_mask, mask, queries, tokens, window, key.device)
        return attention(module, query, key, value, mask, **kwargs)

    def _mask(
        self,
        given: Optional[torch.Tensor],
        mask: Optional[torch.Tensor],
        queries: int,
        tokens: int,
        window: Optional[int],
        device: torch.device,
    ) -> torch.Tensor:
        """The text's mask with the prompt's columns. Layers that were `given` one mask share the result."""
        if torch.compiler.is_compiling():
            return self._widen_mask(mask, queries, tokens, window, device)
        of_mask, widened = self.masks.get((window, queries, tokens), (self, None))
        if of_mask is not given:
            widened = self._widen_mask(mask, queries, tokens, window, device)
            self.masks[window, queries, tokens] = given, widened
        return widened.to(device)

    def _widen_mask(
        self, mask: Optional[torch.Tensor], queries: int, tokens: int, window: Optional[int], device: torch.device
    ) -> torch.Tensor:
        length = self.prompt.length
        if mask is None:
            mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool, device=device)
            mask = mask.tril() if self.is_causal and queries > 1 else mask
        if window is None:
            visible = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
        else:
            column = torch.arange(length, device=device)
            # Some models compute queries for the last tokens only.
            visible = self._distances(device)[:, None, -queries:, None] - column < window
        if mask.dtype != torch.bool:
            visible = mask.new_zeros(()).masked_fill(~visible, torch.finfo(mask.dtype).min)
        shape = torch.broadcast_shapes(mask.shape[:-1], visible.shape[:-1])
        return torch.cat([visible.expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)

    def _distances(self, device: torch.device) -> torch.Tensor:
        """How far behind the prompt's first token the tokens of the call are: (B or 1, S)."""
        if self.mask is None and self.positions is not None and self.positions.dim() == 2:
            return self.positions.to(device)  # those of multimodal embeddings are no distances
        columns = torch.arange(self.queries, device=device)[None] + self.past + self.prompt.length
        return columns if self.mask is None else columns - leading_padding(self.mask).to(device)


@dataclass
class Recording:
    """Takes the place of [`InFront`] in the pass of the prompt itself, and notes what attention is given."""

    states: States = field(default_factory=dict)
    windows: dict[int, Optional[int]] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    attended: int = 0

    def attend(self, attention, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, Any]:
        layer = layer_of(module)
        layer = self.attended if layer is None else layer
        self.states[layer] = key, value
        self.modules[layer] = module
        self.windows[layer] = kwargs.get("sliding_window")
        self.attended += 1
        return attention(module, query, key, value, mask, **kwargs)


def layer_of(module: nn.Module) -> Optional[int]:
    """Which layer an attention is; `None` if it does not say, as where all layers are one module."""
    layer = getattr(module, "layer_idx", None)
    return getattr(module, LAYER, None) if layer is None else layer


def _sdpa_attention(module, query, key, value, attention_mask, **kwargs):
    prompt, attention = kwargs.pop(KEYWORD, None), ALL_ATTENTION_FUNCTIONS["sdpa"]
    if prompt is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    return prompt.attend(attention, module, query, key, value, attention_mask, kwargs)


def _eager_attention(module, query, key, value, attention_mask, **kwargs):
    prompt, attention = kwargs.pop(KEYWORD, None), _own_eager_attention(type(module))
    if prompt is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    return prompt.attend(attention, module, query, key, value, attention_mask, kwargs)


def _own_eager_attention(attention_class: type[nn.Module]):
    """Every model has an eager attention of its own, in the file of its attention class."""
    for parent in attention_class.__mro__:
        if (function := getattr(sys.modules[parent.__module__], "eager_attention_forward", None)) is not None:
            return function
    raise ValueError(f"{attention_class.__name__} has no eager attention. Choose `attn_implementation='sdpa'`.")


AttentionInterface.register(ATTENTION_NAMES["sdpa"], _sdpa_attention)
AttentionInterface.register(ATTENTION_NAMES["eager"], _eager_attention)
AttentionMaskInterface.register(ATTENTION_NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(ATTENTION_NAMES["eager"], eager_mask)

# The backbones whose config has a name of ours. Several may have one config, which is then written back by the last.
_adapted: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def adapt_attention(stack: PreTrainedModel) -> None:
    """Lets the attention of `stack` take a prompt."""
    config = stack.config
    config._attn_implementation = ATTENTION_NAMES.get(config._attn_implementation, config._attn_implementation)
    _adapted.add(stack)


def restore_attention(stack: PreTrainedModel) -> None:
    """Undoes [`adapt_attention`]."""
    _adapted.discard(stack)
    originals = {name: original for original, name in ATTENTION_NAMES.items()}
    implementation = stack.config._attn_implementation
    if implementation in originals and not any(other.config is stack.config for other in _adapted):
        stack.config._attn_implementation = originals[implementation]
