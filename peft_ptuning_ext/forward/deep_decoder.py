# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Deep prompts in the decoder of an encoder-decoder: keys and values in front of those of its self-attention.

The backbone that prompts are attached to is the encoder, which a step of `generate` does not call. So hooks on the
decoder put its part of the prompt in front. Its cache and its cross-attention stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from peft.utils.integrations import gather_params_ctx
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from ..backbone import why_not_in_decoder
from ..prompts.adapter import layer_of
from ..prompts.choice import Names, Rows, describe
from ..prompts.layer import PTuningLayer
from ..prompts.prompt import Prompt, States
from .attention import KEYWORD, InFront, Recording, adapt_attention, restore_attention
from .attention import layer_of as index_of
from .checkpointing import checkpoints_reentrantly
from .deep import check_implementation, first_decoder_layer, in_evaluation, record_call, refusal
from .in_attention import NotRecorded, check_recording
from .rows import join


# What to choose where a decoder takes no prompt.
INSTEAD = "prompt_stacks='ENCODER' or prompt_depth='INPUT'"


@dataclass
class DeepDecoder:
    """What [`take_prompts`] did to a decoder.

    Args:
        module (`PreTrainedModel`): The decoder.
        handles (`list[RemovableHandle]`): Its hooks.
    """

    module: PreTrainedModel
    handles: list[RemovableHandle]


@dataclass
class SelfAttentionOnly:
    """Lets cross-attention alone, to which a decoder hands its arguments down, too.

    Args:
        inner ([`InFront`] or [`Recording`]): What self-attention gets.
    """

    inner: InFront | Recording

    def attend(self, attention, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, Any]:
        if not module.is_causal:
            return attention(module, query, key, value, mask, **kwargs)
        return self.inner.attend(attention, module, query, key, value, mask, kwargs)


def take_prompts(stack: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Lets a decoder take deep prompts; [`leave_prompts`] undoes it.

    Args:
        stack (`PreTrainedModel`): The encoder, with prompts attached.
        decoder (`PreTrainedModel`): The decoder that attends to it.
    """
    if stack.ptuning.deep_decoder is not None:
        return
    adapt_attention(decoder)
    before = decoder.register_forward_pre_hook(functools.partial(_put_in_front, stack), with_kwargs=True)
    behind = decoder.register_forward_hook(_note_prompt, with_kwargs=True)
    stack.ptuning.deep_decoder = DeepDecoder(decoder, [before, behind])


def leave_prompts(stack: PreTrainedModel) -> None:
    """Undoes [`take_prompts`], if it was called."""
    if (taken := stack.ptuning.deep_decoder) is None:
        return
    for handle in taken.handles:
        handle.remove()
    restore_attention(taken.module)
    stack.ptuning.deep_decoder = None


def _put_in_front(stack: PreTrainedModel, decoder: PreTrainedModel, args: tuple, kwargs: dict) -> Optional[tuple]:
    """Forward pre-hook of a decoder: gives its self-attention the prompt of the active adapter.

    Raises:
        ValueError: The cache was filled under another adapter, or attention does not see the prompt.
    """
    given = (
        {**dict(zip(inspect.signature(type(decoder).forward).parameters, ("", *args))), **kwargs} if args else kwargs
    )
    cache = next((value for value in given.values() if isinstance(value, Cache)), None)
    past = 0 if cache is None else cache.get_seq_length()
    past = past if torch.compiler.is_compiling() else int(past)
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:  # the decoder has its own error
        return None
    layer = layer_of(stack)
    names = _names_in_decoder(stack, decoder, layer, len(tokens))
    cached = getattr(cache, "ptuning_prompt", None)
    # While compiling, how much a static cache holds can't be told; what it was filled behind can.
    if cached is not None if isinstance(past, torch.Tensor) else past > 0:
        _check_cache(decoder, names, cached)
    else:
        cached = None  # the cache was reset, if it was filled
    if not names:
        return None
    check_implementation(decoder)
    dtype = tokens.dtype if tokens.is_floating_point() else decoder.dtype
    prompt = cached or _decoder_part(stack, layer, names, dtype, tokens)
    _check_checkpointing(decoder, prompt)
    if cache is not None:
        cache.ptuning_prompt = prompt
    mask = given.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    in_front = InFront(prompt, tokens.shape[1], past, mask, present=prompt.present(len(tokens)))
    return args, {**kwargs, KEYWORD: SelfAttentionOnly(in_front)}


def _note_prompt(decoder: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
    """Forward hook of a decoder: tells a cache that the decoder has made which prompt it was filled behind."""
    if (given := kwargs.get(KEYWORD)) is None:
        return
    for value in output if isinstance(output, tuple) else output.values():
        if isinstance(value, Cache):
            value.ptuning_prompt = given.inner.prompt


def _names_in_decoder(
    stack: PreTrainedModel, decoder: PreTrainedModel, layer: PTuningLayer, rows: int
) -> Names | Rows:
    """The adapters that have a prompt in the decoder, for all of B = `rows` rows or by row."""
    first = first_decoder_layer(stack)

    def are_inside(names: Names) -> Names:
        deep = (name for name in names if layer.is_deep(name))
        return tuple(name for name in deep if any(i >= first for i in layer.encoder(name).shapes))

    names = layer.prompt_names
    if not isinstance(names, Rows):
        return are_inside(names)
    inside = replace(names, names=tuple(map(are_inside, names.names)))
    return inside.of_call(type(decoder).__name__, rows)


def _decoder_part(
    stack: PreTrainedModel, layer: PTuningLayer, names: Names | Rows, dtype: torch.dtype, tokens: torch.Tensor
) -> Prompt:
    """The prompt of some adapters in the layers of the decoder, which are numbered from 0 here."""
    first = first_decoder_layer(stack)

    def make(names: Names) -> Optional[Prompt]:
        if not names:
            return None
        prompt = layer.make_deep_prompt(names, dtype)
        return replace(prompt, states={i - first: pair for i, pair in prompt.states.items() if i >= first})

    if not isinstance(names, Rows):
        return make(names)
    of_rows = names.of_batch(type(stack).__name__, len(tokens))
    return join(names, of_rows, {each: make(each) for each in dict.fromkeys(of_rows)}, tokens.device)


def _check_cache(decoder: PreTrainedModel, names: Names | Rows, cached: Optional[Prompt]) -> None:
    """Refuses to go on behind a cache whose text has seen another prompt than what follows would."""
    filled = () if cached is None else cached.names
    if filled != names:
        was, now = (f"the prompt of {describe(each)}" if each else "no prompt" for each in (filled, names))
        raise ValueError(
            f"The cache of {type(decoder).__name__} was filled behind {was} of the decoder's, and now {now} is "
            "active. Begin with an empty cache."
        )


def _check_checkpointing(decoder: PreTrainedModel, prompt: Prompt) -> None:
    """Refuses the kind of gradient checkpointing that passes no gradient to what a layer gets by name."""
    is_trained = any(state.requires_grad for pair in prompt.states.values() for state in pair)
    if is_trained and torch.is_grad_enabled() and checkpoints_reentrantly(decoder):
        raise ValueError(
            f"{type(decoder).__name__} checkpoints gradients with `use_reentrant=True`, which passes no gradient to "
            "its prompt in every layer. Turn gradient checkpointing on with `use_reentrant=False`."
        )


def measure(
    stack: PreTrainedModel,
    decoder: PreTrainedModel,
    token_ids: torch.Tensor,
    first_position: int = 0,
) -> States:
    """Returns the keys and values that a decoder's self-attention makes of tokens that the encoder reads, too.

    Args:
        stack (`PreTrainedModel`): The encoder, with prompts attached or not.
        decoder (`PreTrainedModel`): The decoder that attends to it.
        token_ids (`torch.Tensor`): Ids (N,).
        first_position (`int`): The position of the first of them in the decoder, where it is not the model's own.

    Returns:
        `dict[int, tuple]`: Keys and values (1, key-value heads, N, D) by layer, numbered behind the encoder's.

    Raises:
        ValueError: The decoder's self-attention can't be reached.
    """
    if (reason := why_not_in_decoder(decoder)) is not None:
        raise refusal(decoder, reason, INSTEAD)
    ids = token_ids[None].to(stack.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameters = [*stack.parameters(), *decoder.parameters()]
    recording = Recording()
    with torch.no_grad(), in_evaluation(stack), in_evaluation(decoder), gather_params_ctx(parameters):
        encoded = stack(**inputs)[0]
        inputs |= {"encoder_hidden_states": encoded, "encoder_attention_mask": inputs["attention_mask"]}
        if first_position and "position_ids" in inspect.signature(type(decoder).forward).parameters:
            inputs["position_ids"] = torch.arange(len(token_ids), device=stack.device)[None] + first_position
        record_call(decoder, {**inputs, "use_cache": False}, SelfAttentionOnly(recording))
    try:
        _check_layers(decoder, recording)
    except NotRecorded as reason:
        raise refusal(decoder, str(reason), INSTEAD) from None
    first = first_decoder_layer(stack)
    return {first + index: pair for index, pair in sorted(recording.states.items())}


def _check_layers(decoder: PreTrainedModel, recording: Recording) -> None:
    """Raises `NotRecorded` unless each self-attention of the decoder was called once, and says which layer it is."""
    causal = [module for module in decoder.modules() if getattr(module, "is_causal", None) is True]
    is_each = {id(module) for module in causal} == {id(module) for module in recording.modules.values()}
    if not is_each or any(index_of(module) is None for module in causal):
        raise NotRecorded("not all of its layers hand their arguments down to a self-attention of their own")
    check_recording(recording, decoder.config, len(causal))
