# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Attention with a prompt in front: what the attention of an adapted backbone calls, for each of its layers.

Transformers looks an attention function up by the name in the config. An adapted backbone's config has a name of ours,
whose function puts the prompt's keys and values in front and calls the function of the name before.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..backbone import adapted_name, attention_functions, is_adapted, own_name
from ..prompts.prompt import Prompt, States
from .back_ends import Inputs, NamedAttention, attend, check_form, copies
from .cache import put_in_front
from .call import leading_padding


# The argument by which the backbone hands the prompt down to its attention.
KEYWORD = "ptuning_prompt"

# The attribute of an attention that has no `layer_idx`: which layer it is.
LAYER = "ptuning_layer"


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
        present (`torch.Tensor`, *optional*): Which of the prompt's columns each row has, (B, V); `None`: all.
        masks (`dict`): Masks with the prompt's columns, and what else layers share.
        attended (`int`): How many layers were called so far that do not say which they are.
        given (`dict`, *optional*):
            By layer, weak references to the keys and values that attention was given, which caches may move or drop;
            `None`: they are not noted.
    """

    prompt: Prompt
    queries: int
    past: int | torch.Tensor
    mask: Optional[torch.Tensor]
    positions: Optional[torch.Tensor] = None
    is_causal: bool = True
    present: Optional[torch.Tensor] = None
    masks: dict = field(default_factory=dict)
    attended: int = 0
    given: Optional[dict[int, tuple[weakref.ref, weakref.ref]]] = None

    def attend(self, attention, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, Any]:
        """The attention of one layer to [prompt; text].

        Args:
            attention (`Callable`): The attention function of the model.
            module (`nn.Module`): The attention layer.
            query (`torch.Tensor`): (B, heads, S, D).
            key (`torch.Tensor`): The text's, (B, key-value heads, N, D), V + N if the cache holds the prompt.
            value (`torch.Tensor`): Of the same shape.
            mask (`Any`): The text's, of the kind that the attention function takes.
            kwargs (`dict`): The further arguments of the attention function.
        """
        layer, length = layer_of(module), self.prompt.length
        if layer is None:
            layer, self.attended = self.attended, self.attended + 1
        if self.given is not None:
            self.given[layer] = weakref.ref(key), weakref.ref(value)
        window, is_causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
        if window is not None and not isinstance(self.past, torch.Tensor):
            # A window longer than the whole sequence hides nothing.
            window = None if self.past + self.queries + length <= window else window
        # A single token sees all. In a step of `generate`, this is all that happens in a layer.
        sees_all = mask is None and window is None and query.shape[2] == 1 and "position_bias" not in kwargs
        sees_all = sees_all and self.present is None
        both = None
        if layer in self.prompt.in_cache:
            if sees_all:
                return attention(module, query, key, value, None, **kwargs)
            both = key, value
            key, value = key[:, :, length:], value[:, :, length:]
        prompt_key, prompt_value = self.prompt.states[layer]
        if not key.dtype == prompt_key.dtype == prompt_value.dtype or prompt_key.device != key.device:
            # Under autocast, keys that went through rotary embeddings may be float32 beside values in bfloat16.
            prompt_key, prompt_value = prompt_key.to(key), prompt_value.to(key)
        if sees_all and copies(key, prompt_key):
            both = put_in_front(prompt_key, key), put_in_front(prompt_value, value)
            return attention(module, query, *both, None, **kwargs)
        is_causal = self.is_causal if is_causal is None else is_causal
        states = (prompt_key, prompt_value)
        inputs = Inputs(attention, module, query, key, value, mask, kwargs, *states, window, is_causal, both)
        return attend(self, inputs)

    def share(self, given: Any, key: Any, make: Callable[[], Any]) -> Any:
        """What is made of what layers were `given`, once for all that were given the same; `key` tells uses apart."""
        if torch.compiler.is_compiling():
            return make()
        of_given, made = self.masks.get(key, (self, None))
        if of_given is not given:
            made = make()
            self.masks[key] = given, made
        return made

    def distances(self, device: torch.device) -> torch.Tensor:
        """How far behind the prompt's first token the tokens of the call are: (B or 1, S)."""
        if self.mask is None and self.positions is not None and self.positions.dim() == 2:
            return self.positions.to(device)  # those of multimodal embeddings are no distances
        columns = torch.arange(self.queries, device=device)[None] + self.past + self.prompt.length
        return columns if self.mask is None else columns - leading_padding(self.mask).to(device)


@dataclass
class Recording:
    """Takes the place of [`InFront`] in the pass of the prompt itself, and notes what attention is given.

    Args:
        front ([`InFront`], *optional*): A deep prompt that stands in front of it.
    """

    front: Optional[InFront] = None
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
        check_form(attention, module, query, value, kwargs)
        if self.front is not None:
            return self.front.attend(attention, module, query, key, value, mask, kwargs)
        return attention(module, query, key, value, mask, **kwargs)


def layer_of(module: nn.Module) -> Optional[int]:
    """Which layer an attention is; `None` if it does not say, as where all layers are one module."""
    layer = getattr(module, "layer_idx", None)
    return getattr(module, LAYER, None) if layer is None else layer


def _own_eager_attention(attention_class: type[nn.Module]) -> Callable:
    """Every model has an eager attention of its own, in the file of its attention class."""
    for parent in attention_class.__mro__:
        if (function := getattr(sys.modules[parent.__module__], "eager_attention_forward", None)) is not None:
            return function
    raise ValueError(f"{attention_class.__name__} has no eager attention. Choose `attn_implementation='sdpa'`.")


def _attention_of(implementation: str, module: nn.Module) -> Callable:
    """The attention function of a layer, as its model would find it."""
    function = attention_functions(type(module)).get(implementation)
    if function is None and implementation == "eager":
        return _own_eager_attention(type(module))
    if function is None:
        raise ValueError(
            f"The attention implementation {implementation!r} is not registered. Register it with "
            "`AttentionInterface.register`, as it was where the adapter was added."
        )
    if function in (sdpa_attention_forward, flex_attention_forward):
        return function
    return NamedAttention(implementation, function, ALL_MASK_ATTENTION_FUNCTIONS.get(implementation))


def register(implementation: str) -> str:
    """Registers the attention of adapted models with this implementation, and returns its name."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        prompt, function = kwargs.pop(KEYWORD, None), _attention_of(implementation, module)
        if prompt is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        return prompt.attend(function, module, query, key, value, attention_mask, kwargs)

    name = adapted_name(implementation)
    AttentionInterface.register(name, attention)
    if (mask_function := ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)) is not None:
        AttentionMaskInterface.register(name, mask_function)
    return name


class _Registered:
    """What an adapted backbone carries at `ptuning_attention`: wherever it is loaded, its attention is registered."""

    def __init__(self, implementation: str):
        self.implementation = implementation
        register(implementation)

    def __reduce__(self) -> tuple:
        return _Registered, (self.implementation,)


# The backbones whose config has a name of ours. Several may have one config, which is then written back by the last.
_adapted: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def adapt_attention(stack: PreTrainedModel) -> None:
    """Lets the attention of `stack` take a prompt."""
    implementation = own_name(stack.config._attn_implementation)
    stack.ptuning_attention = _Registered(implementation)
    stack.config._attn_implementation = adapted_name(implementation)
    _adapted.add(stack)


def restore_attention(stack: PreTrainedModel) -> None:
    """Undoes [`adapt_attention`]."""
    _adapted.discard(stack)
    vars(stack).pop("ptuning_attention", None)
    implementation = stack.config._attn_implementation
    if is_adapted(implementation) and not any(other.config is stack.config for other in _adapted):
        stack.config._attn_implementation = own_name(implementation)
