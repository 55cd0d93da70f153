# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt in each row: V more tokens beside the user's on the way in, taken off on the way out.

This is right for every backbone. What it costs is V more tokens in every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn
from transformers import Cache

from ..backbone import DISTANCE_BY_MASK, PER_TOKEN_FILLS, Backbone, pool
from ..prompts.adapter import layer_of
from ..prompts.choice import Rows
from ..prompts.prompt import Prompt, by_row
from .cache import full_view, is_static, note_prompt
from .call import Call, leading_padding
from .layout import Layout


# Inputs with one value for each token that have a rule: how the prompt's values are chosen.
RULED_INPUTS = {"input_ids", "inputs_embeds", "position_ids", *PER_TOKEN_FILLS}


def begin(
    stack: nn.Module,
    forward: Callable,
    call: Call,
    prompt: Prompt,
    embeds: torch.Tensor,
    why_in_row: Callable[[], Optional[str]],
) -> Any:
    """Runs a call that begins a sequence.

    Args:
        stack (`nn.Module`): The backbone.
        forward (`Callable`): Its own `forward`.
        call ([`Call`]): What was asked.
        prompt ([`Prompt`]): With its vectors, (1, V, H), or (G, V, H) of G different ones.
        embeds (`torch.Tensor`): The embeddings of the text, (B, S, H).
        why_in_row (`Callable`): Returns why the prompt stands in the row, for messages.

    Returns:
        The outputs of `forward` at the text's positions. An encoder-decoder's encoder keeps the prompt's, to which its
        decoder attends.

    Raises:
        ValueError: An input has no rule for a prompt in the row, or the text is too long.
    """
    _check(call, why_in_row)
    rows, text = embeds.shape[:2]
    present = prompt.present(rows)
    call.check_lengths(0, prompt.length if present is None else prompt.shift(rows), call.mask)
    places = None if call.mask is None else _places(call.backbone, call.mask, prompt.length)
    layout = Layout.at(places, prompt.length, text)
    vectors = by_row(prompt.by_row(prompt.vectors), rows)
    widened = {"input_ids": None, "inputs_embeds": layout.spread(vectors, embeds)}
    for name, value in PER_TOKEN_FILLS.items():
        if call.given.get(name) is not None:
            widened[name] = layout.fill(value, call.given[name])
    if present is not None:
        mask = present.new_ones(rows, text, dtype=torch.long) if call.mask is None else call.mask
        widened["attention_mask"] = layout.spread(present, mask)
    if (positions := _positions(call, prompt, layout)) is not None:
        widened["position_ids"] = positions
    ends_in_padding = _ends_in_padding(call, places)
    cached_prompt = dataclasses.replace(
        prompt, vectors=None, of_row=None, places=places, ends_in_padding=ends_in_padding
    )
    if call.cache is not None:
        note_prompt(call.cache, cached_prompt)
        widened[call.backbone.cache_name] = full_view(call.cache)
    output = forward(**call.arguments(**widened))
    return output if call.backbone.decoder is not None else _trim(stack, call, layout, cached_prompt, output)


def _positions(call: Call, prompt: Prompt, layout: Layout) -> Optional[torch.Tensor]:
    """The positions of a row, (B or 1, V+S) or (3, B, V+S); `None`: those that the model makes by itself.

    Where rows have prompts of different lengths, a model would count what a row lacks, and so it is told.
    """
    backbone, rows, positions = call.backbone, len(call.tokens), call.positions()
    columns = None
    if prompt.lengths is not None and "position_ids" in backbone.parameters:
        missing = layout.length - by_row(prompt.lengths[:, None], rows)
        of_row = torch.arange(layout.length + layout.text, device=missing.device)
        columns = (of_row - missing).clamp(min=0) + backbone.first_position
    if positions is None:
        return columns
    # If the caller of a decoder passed positions, the prompt gets 0 to V-1. Otherwise it begins at the model's own
    # first position (2 for RoBERTa).
    is_told = backbone.is_causal and call.given_positions is not None
    counted = layout.positions(positions, 0 if is_told else backbone.first_position, prompt.shift(rows))
    is_own = call.given_positions is None and backbone.is_causal and columns is not None
    return prompt.counted_or(columns, counted) if is_own else counted


def check_positions(call: Call) -> None:
    """Refuses prompts of different lengths in one batch where the text can't be told where it begins.

    Raises:
        ValueError: The model has a table of positions, and takes none.
    """
    if "position_ids" not in call.backbone.parameters and call.backbone.max_positions is not None:
        raise ValueError(
            f"{call.stack} can't be told positions (it takes no `position_ids`), and `adapter_names` has prompts of "
            "different lengths in one batch. Pass rows with prompts of one length."
        )


def _trim(stack: nn.Module, call: Call, layout: Layout, cached_prompt: Prompt, output: Any) -> Any:
    """Takes the prompt's positions off the outputs of a backbone, and tells their caches of the prompt."""
    total = layout.length + layout.text
    if output[0].shape[1] != total:
        raise ValueError(
            f"{call.stack} was given {total} positions and returned {output[0].shape[1]}: it adds or merges "
            "positions, and which of them are the prompt's can't be told."
        )
    is_tuple = isinstance(output, tuple)
    pooled = "pooler_output" if not is_tuple else 1 if getattr(stack, "pooler", None) is not None else None
    trimmed = list(output) if is_tuple else output
    for key in range(len(output)) if is_tuple else list(output):
        if isinstance(trimmed[key], Cache):
            note_prompt(trimmed[key], cached_prompt)
        elif key == pooled and trimmed[key] is not None:
            trimmed[key] = pool(stack, trimmed[0])  # of the text, which comes first and is trimmed by now
        else:
            trimmed[key] = layout.trim(trimmed[key], len(call.tokens))
    return tuple(trimmed) if is_tuple else trimmed


def go_on(forward: Callable, call: Call, why_in_row: Callable[[], Optional[str]]) -> Any:
    """Runs a call behind a cache that holds the prompt: nothing is put in front.

    Args:
        forward (`Callable`): The backbone's own `forward`.
        call ([`Call`]): What was asked.
        why_in_row (`Callable`): Returns why the prompt stands in the row, for messages.

    Raises:
        ValueError: An input has no rule for a prompt in the row, or the text is too long.
    """
    _check(call, why_in_row)
    prompt, (rows, text) = call.cached_prompt, call.tokens.shape[:2]
    before = call.past - prompt.length
    call.check_lengths(before, prompt.shift(rows), call.mask)
    widened = {}
    if call.mask is not None or prompt.lengths is not None:
        mask = call.tokens.new_ones(rows, before + text) if call.mask is None else call.mask
        widened["attention_mask"] = _widen_later_mask(call, prompt, mask)
    positions, columns = call.positions(), torch.arange(text, device=call.tokens.device)[None] + before
    if positions is None and prompt.needs_telling and "position_ids" in call.backbone.parameters:
        positions = columns
    elif positions is not None and call.given_positions is None:
        positions = prompt.counted_or(columns, positions[..., -text:])
    if positions is not None:
        widened["position_ids"] = positions[..., -text:] + prompt.shift(rows)
    output = forward(**call.arguments(**widened))
    for value in output if isinstance(output, tuple) else output.values():
        if isinstance(value, Cache):
            note_prompt(value, prompt)
    return output


def widen_encoder_mask(stack: nn.Module, decoder: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple]:
    """Forward pre-hook of a decoder: lets it see the prompt in what its encoder, `stack`, hands over."""
    hidden_states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if hidden_states is None or mask is None or hidden_states.shape[1] <= mask.shape[1]:
        return None
    length, layer, backbone = hidden_states.shape[1] - mask.shape[1], layer_of(stack), stack.ptuning.backbone
    names = layer.prompt_names
    if isinstance(names, Rows):
        lengths = [layer.length_at_input(each) for each in names.of_batch(type(decoder).__name__, len(mask))]
        prompt = Prompt(names, length, lengths=torch.tensor(lengths, device=mask.device))
        layout = Layout.at(_places(backbone, mask, length), length, mask.shape[1])
        widened = _fill(layout, prompt, mask)
    else:
        widened = widen_mask(backbone, mask, length)
    return args, {**kwargs, "encoder_attention_mask": widened}


def widen_mask(backbone: Backbone, mask: torch.Tensor, length: int) -> torch.Tensor:
    """`mask` (B, N) with the ones of V = `length` virtual tokens at their places: (B, V+N)."""
    return Layout.at(_places(backbone, mask, length), length, mask.shape[1]).fill(1, mask)


def _places(backbone: Backbone, mask: torch.Tensor, length: int) -> Optional[torch.Tensor]:
    """The columns of a text that the prompt stands before, (B, V); `None`: in front of all rows' columns.

    Padding on the left of the text stays on the left of the prompt where distance is counted in columns. Otherwise the
    text's output would depend on how much padding there is, and the prompt would leave a sliding window.
    """
    if not backbone.beside_text:
        return None
    if not torch.compiler.is_compiling() and not (mask[:, 0] == 0).any():
        return None
    return leading_padding(mask).expand(-1, length)


def _ends_in_padding(call: Call, places: Optional[torch.Tensor]) -> bool:
    """Whether some row of a first chunk is nothing but padding, so that the next chunk may begin with more of it."""
    if places is None or torch.compiler.is_compiling():
        return False
    return bool((places[:, :1] == call.tokens.shape[1]).any())


def _widen_later_mask(call: Call, prompt: Prompt, mask: torch.Tensor) -> torch.Tensor:
    """The mask (B, N) of a later call with the prompt's ones where the cache has the prompt: (B, V+N)."""
    places = prompt.places
    if places is not None and len(places) not in (1, len(mask)):
        places = _places(call.backbone, mask, prompt.length)
        return _fill(Layout.at(places, prompt.length, mask.shape[1]), prompt, mask)
    # Without such a row nothing is asked of the device, for which every step would wait.
    goes_on = prompt.ends_in_padding and (leading_padding(mask) > places[:, :1]).any()
    if goes_on and call.backbone.beside_text and call.stack not in DISTANCE_BY_MASK:
        raise ValueError(
            f"{call.stack} got a row that begins with more padding than the first chunk of tokens had. The prompt "
            "stands behind the first chunk's padding, and belongs behind all of it. Pass a longer first chunk, or "
            "choose a larger `prefill_chunk_size`."
        )
    return _fill(Layout.at(places, prompt.length, mask.shape[1]), prompt, mask)


def _fill(layout: Layout, prompt: Prompt, mask: torch.Tensor) -> torch.Tensor:
    """A mask (B, N) with ones, or what of the prompt each row has, at the prompt's places: (B, V+N)."""
    present = prompt.present(len(mask))
    return layout.fill(1, mask) if present is None else layout.spread(present, mask)


def _check(call: Call, why_in_row: Callable[[], Optional[str]]) -> None:
    """Refuses what would otherwise be silently wrong."""
    call.check_packing()
    if call.cache is not None and is_static(call.cache):
        raise ValueError(
            f"{call.stack} got a static cache, which has no room for the prompt: it is concatenated here, because "
            f"{why_in_row()}. Leave `cache_implementation` at its default."
        )
    if call.mask is not None and not (isinstance(call.mask, torch.Tensor) and call.mask.dim() == 2):
        kind = f"{call.mask.dim()}-D mask" if isinstance(call.mask, torch.Tensor) else type(call.mask).__name__
        raise ValueError(
            f"{call.stack} got an attention mask that has no room for the prompt ({kind}) instead of a 2-D one "
            f"(B, S): the prompt is concatenated here, because {why_in_row()}."
        )
    call.check_per_token(RULED_INPUTS)
    call.check_one_text()
