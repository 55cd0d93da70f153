# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt computed once for all rows of a batch, when that is allowed, and kept between calls.

What comes first does not depend on what follows, so on a causal decoder the keys and values of the prompt are the same
for every row. They are made by one pass of the prompt at batch size 1 and put in front of the text's when attention
runs. Everything else is the base model's own doing on the user's tokens, whose positions begin at V: its masks, its
cache (which never holds the prompt) and its outputs have the user's length.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .merged_attention import can_merge, merged_attention


# The argument by which the backbone hands the prompt down to its attention.
ARGUMENT = "ptuning_prompt"

# Attention implementations that take a prompt, under the names that they have while they do.
IMPLEMENTATIONS = {"sdpa": "ptuning_sdpa", "eager": "ptuning_eager"}

# Kinds of layers whose memory of the prompt is its keys and values, all of them or those within a window.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

# Rotary embeddings whose frequencies depend on how long the whole text is, prompt and all.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

# Arguments of a decoder that are images which its layers attend to: the prompt's states depend on them.
ATTENDED_INPUTS = frozenset({"cross_attention_states", "image_encoder_embeddings"})

# For how many adapters of a model keys and values are kept; the one stored first goes first.
KEPT_ADAPTERS = 16


@dataclass(frozen=True)
class SharedPrompt:
    """Keys and values of one adapter's prompt in every layer.

    Args:
        adapter_name (`str`): The adapter.
        length (`int`): V.
        layers (`dict[int, tuple]`): By layer, keys and values as attention receives them, (1, key-value heads, V, D).
    """

    adapter_name: str
    length: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class NotShareable(Exception):
    """What a pass of the prompt found out about the backbone: the reason why its rows can't share a prompt."""


@dataclass
class _Recording:
    """Passed in place of [`InFront`] while the prompt itself is computed."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    windows: dict[int, Optional[int]] = field(default_factory=dict)
    attended: int = 0

    def attend(self, attention, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, Any]:
        layer = getattr(module, "layer_idx", None)
        self.layers[layer] = key, value
        self.windows[layer] = kwargs.get("sliding_window")
        self.attended += 1
        return attention(module, query, key, value, mask, **kwargs)


@dataclass
class InFront:
    """A prompt in front of the text of one call.

    Args:
        prompt ([`SharedPrompt`]): The prompt.
        distances (`Callable`):
            Returns how many tokens, the prompt's too, stand between the prompt's first and each of the call's, (B or
            1, S). Only windows ask for it.
        queries (`int`): How many tokens the call has, S.
        reach (`int`, *optional*): One more than the largest of them can be, if known.
    """

    prompt: SharedPrompt
    distances: Callable[[], torch.Tensor]
    queries: int
    reach: Optional[int] = None
    masks: dict = field(default_factory=dict)

    def attend(self, attention, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, Any]:
        """The attention of one layer to [prompt; text].

        Args:
            attention (`Callable`): The attention function of the model.
            module (`nn.Module`): The attention layer.
            query (`torch.Tensor`): (B, heads, S, D).
            key (`torch.Tensor`): The text's, (B, key-value heads, N, D).
            value (`torch.Tensor`): The text's.
            mask (`torch.Tensor`, *optional*):
                The text's, (B or 1, heads or 1, S, N or more), boolean or additive; `None`: causal.
            kwargs (`dict`): The further arguments of the attention function.
        """
        window = kwargs.get("sliding_window")
        if window is not None and self.reach is not None and self.reach <= window:
            window = None  # it reaches back to the prompt's first token
        prompt_key, prompt_value = (tensor.to(key) for tensor in self.prompt.layers[module.layer_idx])
        tokens, mask = key.shape[2], mask if mask is None else mask[..., : key.shape[2]]
        if mask is None and 1 < query.shape[2] < self.queries:  # only of the last tokens
            mask = torch.ones(self.queries, tokens, dtype=torch.bool, device=key.device).tril()
            mask = mask[None, None, -query.shape[2] :]
        if attention is sdpa_attention_forward and window is None and can_merge(query, key, value, kwargs):
            scale = kwargs.get("scaling")
            return merged_attention(query, key, value, prompt_key, prompt_value, mask, scale), None
        key = torch.cat([prompt_key.expand(len(key), -1, -1, -1), key], dim=2)
        value = torch.cat([prompt_value.expand(len(value), -1, -1, -1), value], dim=2)
        if mask is None and window is None and query.shape[2] in (1, tokens):
            if query.shape[2] > 1:
                mask = causal_lower_right(tokens, key.shape[2])
        else:
            mask = self._mask(mask, query.shape[2], tokens, window, key.device)
        return attention(module, query, key, value, mask, **kwargs)

    def _mask(
        self, mask: Optional[torch.Tensor], queries: int, tokens: int, window: Optional[int], device: torch.device
    ) -> torch.Tensor:
        """The text's mask with the prompt's columns; the layers of a call share one for each window."""
        if torch.compiler.is_compiling():
            return self._widen_mask(mask, queries, tokens, window, device)
        of_mask, widened = self.masks.get((window, queries), (self, None))
        if of_mask is not mask:
            widened = self._widen_mask(mask, queries, tokens, window, device)
            self.masks[window, queries] = mask, widened
        return widened.to(device)

    def _widen_mask(
        self, mask: Optional[torch.Tensor], queries: int, tokens: int, window: Optional[int], device: torch.device
    ) -> torch.Tensor:
        length = self.prompt.length
        if mask is None:
            mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool, device=device)
            mask = mask if queries == 1 else mask.tril()
        if window is None:
            visible = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
        else:
            column = torch.arange(length, device=device)
            # Some models let only the last tokens ask.
            visible = self.distances().to(device)[:, None, -queries:, None] - column < window
        if mask.dtype != torch.bool:
            visible = mask.new_zeros(()).masked_fill(~visible, torch.finfo(mask.dtype).min)
        shape = torch.broadcast_shapes(mask.shape[:-1], visible.shape[:-1])
        return torch.cat([visible.expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)


def _attend(attention, module, query, key, value, mask, kwargs):
    prompt = kwargs.pop(ARGUMENT, None)
    if prompt is None:
        return attention(module, query, key, value, mask, **kwargs)
    return prompt.attend(attention, module, query, key, value, mask, kwargs)


def _sdpa_attention(module, query, key, value, attention_mask, **kwargs):
    return _attend(ALL_ATTENTION_FUNCTIONS["sdpa"], module, query, key, value, attention_mask, kwargs)


def _eager_attention(module, query, key, value, attention_mask, **kwargs):
    return _attend(_own_eager_attention(type(module)), module, query, key, value, attention_mask, kwargs)


def _own_eager_attention(attention_class: type[nn.Module]):
    """Every model has an eager attention of its own, in the file of its attention class."""
    for parent in attention_class.__mro__:
        if (function := getattr(sys.modules[parent.__module__], "eager_attention_forward", None)) is not None:
            return function
    raise ValueError(f"{attention_class.__name__} has no eager attention. Choose `attn_implementation='sdpa'`.")


AttentionInterface.register(IMPLEMENTATIONS["sdpa"], _sdpa_attention)
AttentionInterface.register(IMPLEMENTATIONS["eager"], _eager_attention)
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], sdpa_mask)
AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], eager_mask)


class SharingAttention:
    """Lets the attention of `stack` take a prompt until `remove()`, like a handle of a hook."""

    def __init__(self, stack: PreTrainedModel):
        self.config = stack.config
        self.config._attn_implementation = IMPLEMENTATIONS[self.config._attn_implementation]

    def remove(self) -> None:
        self.config._attn_implementation = _original(self.config)


def _original(config: PreTrainedConfig) -> str:
    """The attention implementation of a model without a prompt."""
    names = {name: original for original, name in IMPLEMENTATIONS.items()}
    return names.get(config._attn_implementation, config._attn_implementation)


def why_not_shared(stack: PreTrainedModel) -> Optional[str]:
    """Why the prompt can't be shared by the rows in this backbone; `None` if it can."""
    config = stack.config
    parameters = inspect.signature(type(stack).forward).parameters
    if not type(stack)._supports_attention_backend or not any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    ):
        return "its attention does not go through transformers' attention interface"
    if not getattr(config, "is_causal", True) or not any(
        getattr(module, "is_causal", None) is True for module in stack.modules()
    ):
        return "its attention is not causal"
    if "position_ids" not in parameters:
        return "it can't be told positions"
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"it has layers of another kind than attention ({', '.join(sorted(kinds)) or 'chunked_attention'})"
    if getattr(config, "add_cross_attention", False) or ATTENDED_INPUTS & parameters.keys():
        return "it has cross-attention"
    if _rope_types(config) & LENGTH_DEPENDENT_ROPE:
        return "its rotary embedding depends on the length of the whole text"
    if config._attn_implementation not in {*IMPLEMENTATIONS, *IMPLEMENTATIONS.values()}:
        return f"its attention implementation is {config._attn_implementation!r}, not one of {[*IMPLEMENTATIONS]}"
    if config.output_attentions:
        return "its config asks for `output_attentions`"
    return None


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """The kinds of rotary embedding in a config, one for all layers or one by kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {entry.get("rope_type", "default") for entry in (rope, *rope.values()) if isinstance(entry, dict)}


def checkpoints_reentrantly(stack: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on, of the kind that passes no gradient to what a layer gets by name."""
    for module in stack.modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True
    return False


def is_sharded(stack: PreTrainedModel) -> bool:
    """Whether processes gather the weights of its modules as they run (FSDP, DeepSpeed ZeRO-3).

    All processes then have to run the same modules, and a module's backward pass has to end where its output's begins.
    A pass for the prompt alone keeps to neither: only some processes may need it, and of its last layer only the keys
    and values are used.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False  # looking through the modules takes as long as a small layer does
    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in stack.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in stack.parameters()
    )


def takes_shared_prompt(stack: PreTrainedModel) -> bool:
    """Whether the attention of this backbone is one that takes a prompt now."""
    return stack.config._attn_implementation in IMPLEMENTATIONS.values()


def record_prompt(
    stack: PreTrainedModel, adapter_name: str, inputs_embeds: torch.Tensor, kwargs: dict
) -> SharedPrompt:
    """Computes the keys and values of a prompt by one pass of the backbone.

    Args:
        stack (`PreTrainedModel`): The backbone.
        adapter_name (`str`): The prompt's adapter.
        inputs_embeds (`torch.Tensor`): The prompt, (1, V, H).
        kwargs (`dict`): What else its `forward` is to be given.

    Raises:
        NotShareable: Its attention is not what it says.
    """
    length = inputs_embeds.shape[1]
    recording = _Recording()
    positions = torch.arange(length, device=inputs_embeds.device)[None]
    # A copy of the prompt, because there are models that scale their embeddings in place.
    arguments = {"inputs_embeds": inputs_embeds.clone(), "position_ids": positions, "use_cache": False}
    stack.forward(**arguments, **kwargs, **{ARGUMENT: recording})
    # A copy, too: layers that are computed again for their gradients record again.
    layers, config = dict(recording.layers), stack.config
    if len(layers) != config.num_hidden_layers:
        raise NotShareable("not all of its layers hand their arguments down to an attention of their own")
    if recording.attended != len(layers):
        raise NotShareable("its layers attend more than once")
    if getattr(config, "sliding_window", None) is not None:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
        if any(kinds[layer] == "sliding_attention" and window is None for layer, window in recording.windows.items()):
            raise NotShareable("its attention does not tell its sliding window")
    return SharedPrompt(adapter_name, length, layers)


class KeptPrompts:
    """Keys and values of prompts kept between calls that need no gradients, one for each adapter.

    They are dropped when anything that they were made of is another: the prompt's values, a tensor of the backbone
    (by identity, address and version counter), dtype, device, autocast. What leaves no such trace, as writing through
    `parameter.data`, is not seen: `forget()` is for that. Nothing is kept while adapters of other methods are inside
    the backbone, whose state has no version.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, Any, SharedPrompt]] = {}

    def find(self, stack: nn.Module, adapter_name: str, inputs_embeds: torch.Tensor) -> Optional[SharedPrompt]:
        """Returns the prompt of an adapter if it is still that of `inputs_embeds`, (1, V, H)."""
        kept = self._kept.get(adapter_name)
        if kept is None:
            return None
        of_embeds, fingerprint, prompt = kept
        is_same = of_embeds.shape == inputs_embeds.shape and of_embeds.dtype == inputs_embeds.dtype
        if (
            is_same
            and of_embeds.device == inputs_embeds.device
            and torch.equal(of_embeds, inputs_embeds)
            and _is_same(fingerprint, _fingerprint(stack, inputs_embeds.device))
        ):
            return prompt
        self._kept.pop(adapter_name, None)
        return None

    def keep(self, stack: nn.Module, inputs_embeds: torch.Tensor, prompt: SharedPrompt) -> None:
        """Keeps a prompt that was computed from `inputs_embeds`, (1, V, H)."""
        fingerprint = _fingerprint(stack, inputs_embeds.device)
        if fingerprint is None:
            return
        self._kept[prompt.adapter_name] = inputs_embeds.clone(), fingerprint, prompt
        for adapter_name in list(self._kept)[:-KEPT_ADAPTERS]:
            self._kept.pop(adapter_name, None)

    def forget(self, adapter_name: Optional[str] = None) -> None:
        """Drops the prompt of an adapter, or of all."""
        if adapter_name is None:
            self._kept.clear()
        else:
            self._kept.pop(adapter_name, None)

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple:
        return KeptPrompts, ()  # copies and pickles of a model begin with none


def _fingerprint(stack: nn.Module, device: torch.device) -> Optional[list[tuple]]:
    """What a prompt's keys and values depend on besides the prompt; `None` if not all of it can be told."""
    kind = device.type
    fingerprint: list[tuple] = [(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,)]
    ours: set[nn.Module] = set()
    for module in stack.modules():
        if getattr(module, "_is_replica", False):
            return None  # of DataParallel: its weights are new at every call
        if "ptuning_encoders" in getattr(module, "adapter_layer_names", ()):
            ours = {module, *module.ptuning_encoders.modules()}
        if module in ours:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return None
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.is_inference() or tensor.is_meta:
                return None  # no version counter; values that are elsewhere
            fingerprint.append((weakref.ref(tensor), tensor.data_ptr(), tensor._version))
    return fingerprint


def _is_same(one: Optional[list[tuple]], other: Optional[list[tuple]]) -> bool:
    # A tensor has one weak reference as long as it lives: by identity, a tensor in place of a dead one differs.
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(one, other))
