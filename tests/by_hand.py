# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What a deep prompt must equal: decoders with a cache filled by hand, encoders with attention written out by hand.

Nothing here uses the package.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from families import FAMILIES
from reference import embedding_and_backbone, main_output
from releases import CACHE
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


States = dict[int, tuple[torch.Tensor, torch.Tensor]]


def deep_by_hand(family: str, base: PreTrainedModel, states: States, batch: dict, shift: bool = False) -> torch.Tensor:
    """The main output of a base model behind keys and values, each (key-value heads, V, D) by layer."""
    if FAMILIES[family].kind == "decoder":
        _, stack = embedding_and_backbone(base)
        inputs, forward = cache_by_hand(base, states, batch, shift), stack.forward
        stack.forward = lambda *args, **kwargs: forward(*args, **kwargs | inputs)  # some heads hand no positions on
        try:
            return main_output(base(**batch))
        finally:
            del stack.forward
    with attending_by_hand(family, base, states):
        return main_output(base(**batch))


def cache_by_hand(base: PreTrainedModel, states: States, batch: dict, shift: bool = False) -> dict:
    """A cache with the prompt, the mask that covers it, and the text's positions."""
    _, stack = embedding_and_backbone(base)
    mask = batch["attention_mask"]
    cache = DynamicCache(config=stack.config)
    for layer, (key, value) in states.items():
        cache.update(key.expand(len(mask), -1, -1, -1), value.expand(len(mask), -1, -1, -1), layer)
    length = len(key[0])
    inputs = {CACHE: cache, "attention_mask": torch.cat([mask.new_ones(len(mask), length), mask], dim=1)}
    if "position_ids" in inspect.signature(type(stack).forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + length * shift
    return inputs


@contextmanager
def attending_by_hand(family: str, base: PreTrainedModel, states: States) -> Iterator[None]:
    """Inside, every layer of an encoder attends to its keys and values, too.

    So does the decoder of an encoder-decoder in its self-attention, if there are keys and values of its layers, whose
    numbers follow those of the encoder.
    """
    _, stack = embedding_and_backbone(base)
    if family in OWN_ATTENTION:
        name, forward = OWN_ATTENTION[family]
        modules = [module for module in stack.modules() if type(module).__name__ == name]
        for layer, module in enumerate(modules):
            module.forward = partial(forward, module, states[layer])
        try:
            yield
        finally:
            for module in modules:
                del module.forward
        return
    before, first = stack.config._attn_implementation, stack.config.num_hidden_layers
    in_order = iter([pair for layer, pair in states.items() if layer < first])
    layers = {module: in_order for module in stack.modules() if first > min(states)}
    stacks = [stack]
    if max(states) >= first:
        stacks.append(base.get_decoder())
        in_order = iter([pair for layer, pair in states.items() if layer >= first])
        layers |= {module: in_order for module in stacks[1].modules() if getattr(module, "is_causal", False)}

    def attend(module, query, key, value, attention_mask, **kwargs):
        if module not in layers:  # cross-attention, or a stack without a prompt
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
        return _attend(next(layers[module]), query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", eager_mask)
    for stack in stacks:
        stack.config._attn_implementation = "by_hand"
    try:
        yield
    finally:
        for stack in stacks:
            stack.config._attn_implementation = before


def _attend(states, query, key, value, mask, scaling=None, position_bias=None, sliding_window=None, **_):
    length, tokens = states[0].shape[1], key.shape[2]
    of_prompt, of_text = query @ states[0].mT, query @ key.mT
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    of_prompt, of_text = of_prompt * scale, of_text * scale
    if position_bias is not None:
        of_text = of_text + position_bias
    if mask is not None:
        of_text = of_text + mask
    if sliding_window is not None:
        distance = length + torch.arange(tokens)[:, None] - torch.arange(length)
        of_prompt = of_prompt.masked_fill(distance >= sliding_window, float("-inf"))
    shares = torch.cat([of_prompt, of_text], dim=-1).softmax(-1)
    output = shares[..., :length] @ states[1] + shares[..., length:] @ value
    return output.transpose(1, 2), None


def _heads(module: nn.Module, projection: Callable, hidden: torch.Tensor) -> torch.Tensor:
    return projection(hidden).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)


def _mpnet(module, states, hidden_states, attention_mask=None, position_bias=None, **_):
    query, key, value = (_heads(module, p, hidden_states) for p in (module.q, module.k, module.v))
    output, _ = _attend(states, query, key, value, attention_mask, position_bias=position_bias)
    return (module.o(output.flatten(2)),)


def _deberta(module, states, hidden_states, attention_mask, *_, relative_pos, rel_embeddings, **__):
    projections = module.query_proj, module.key_proj, module.value_proj
    query, key, value = (_heads(module, p, hidden_states) for p in projections)
    flat = [tensor.flatten(0, 1) for tensor in (query, key)]
    parts = 1 + len(module.pos_att_type)
    bias = module.disentangled_attention_bias(*flat, relative_pos, rel_embeddings, parts).view(*query.shape[:3], -1)
    mask = torch.zeros(attention_mask.shape).masked_fill(~attention_mask.bool(), torch.finfo().min)
    scale = 1 / math.sqrt(query.shape[-1] * parts)
    return _attend(states, query, key, value, mask, scale, bias)[0].flatten(2), None


# Attention that calculates by itself: the name of its class, and what it does, written out.
OWN_ATTENTION = {
    "MPNet": ("MPNetSelfAttention", _mpnet),
    "DeBERTa-v2": ("DisentangledSelfAttention", _deberta),
}
