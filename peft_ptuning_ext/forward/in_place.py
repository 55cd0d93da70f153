# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt in place: the token ids have placeholders, and their embeddings are the prompt's vectors.

Nothing is widened and nothing is taken off. Positions, masks, labels, lengths and caches are those of the ids, as they
would be without a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from transformers import Cache

from ..prompts.choice import Names
from ..prompts.layer import PTuningLayer
from ..prompts.prompt import Prompt
from .cache import note_prompt_beside
from .call import Call


def run(forward: Callable, call: Call, layer: PTuningLayer, names: Names, dtype: torch.dtype) -> Any:
    """Runs a call whose ids have placeholders, or one behind a cache that has all of them.

    Args:
        forward (`Callable`): The backbone's own `forward`.
        call ([`Call`]): What was asked.
        layer ([`PTuningLayer`]): The tuner layer.
        names (`tuple[str, ...]`): The adapter that has a template.
        dtype (`torch.dtype`): That of the embeddings.

    Returns:
        The outputs of `forward`.

    Raises:
        ValueError: Embeddings were given in place of ids, or a row has not V placeholders.
    """
    if call.is_embedded:
        raise ValueError(
            f"{call.stack} got `inputs_embeds`, and the adapter's prompt template finds its slots by their token id. "
            "Pass `input_ids`."
        )
    slots = call.tokens == layer.placeholder_of(names)
    before = call.cached_prompt
    if before is not None and before.filled is None:
        _check_none_left(call, slots)
        return forward(**call.given)
    prompt = layer.make_prompt(names, dtype)
    order = slots.long().cumsum(1) - 1  # (B, S): which vector each slot gets
    if before is not None:
        order = order + before.filled[:, None]
    filled = _check_filled(call, order[:, -1] + 1, prompt.length)
    embeds = layer.embed(call.tokens)
    vectors = prompt.vectors[0][order[slots]].to(embeds)
    arguments = call.arguments(input_ids=None, inputs_embeds=embeds.masked_scatter(slots[..., None], vectors))
    if (positions := positions_of_ids(call)) is not None:
        arguments["position_ids"] = positions
    output = forward(**arguments)
    noted = Prompt(prompt.names, prompt.length, filled=filled)
    for value in (call.cache, *(output if isinstance(output, tuple) else output.values())):
        if isinstance(value, Cache):
            note_prompt_beside(value, noted)
    return output


def positions_of_ids(call: Call) -> Optional[torch.Tensor]:
    """The positions of the ids, (B, S), where the backbone would not find them by itself; or `None`.

    A decoder that is told none counts what is no padding, as `generate` does. Models that count tokens from behind a
    padding id (RoBERTa) can't tell them from embeddings.
    """
    backbone = call.backbone
    if call.given_positions is not None or not backbone.counts_tokens:
        return None
    if backbone.first_position == 0:
        positions = call.positions()
        return None if positions is None else positions[:, -call.tokens.shape[1] :]
    padding = backbone.first_position - 1
    is_text = call.tokens != padding
    return (is_text.cumsum(1) + call.past) * is_text + padding


def _check_filled(call: Call, filled: torch.Tensor, length: int) -> Optional[torch.Tensor]:
    """How many of V = `length` vectors each row has now, (B,), if a later part of the text may bring the others.

    Only a cache that the caller has passed can go on, in parts of at least two tokens. A single token is one that was
    generated, and all of the text has come before it.
    """
    if torch.compiler.is_compiling():  # it would break the graph
        return None
    counts = filled.tolist()
    may_go_on = call.cache is not None and call.tokens.shape[1] > 1
    wrong = [i for i, count in enumerate(counts) if count > length or (count < length and not may_go_on)]
    if wrong:
        row = wrong[0]
        behind = "" if call.cache is None else ", with those in the cache"
        raise ValueError(
            f"Row {row} of `input_ids` has {counts[row]} tokens with the placeholder's id{behind}, and the adapter's "
            f"prompt template has {length}. Encode rows with the template once: `template.encode(tokenizer, row)`. "
            "What changes ids behind that must leave slots alone: truncation, packing, and collators that mask "
            "tokens. They leave alone what `special_tokens_mask` marks."
        )
    return None if min(counts, default=length) == length else filled


def _check_none_left(call: Call, slots: torch.Tensor) -> None:
    """Refuses slots behind a text that has all of them.

    A single token is not looked at: it was generated, and looking would make the device wait at every step.
    """
    if call.tokens.shape[1] == 1 or torch.compiler.is_compiling() or not slots.any():
        return
    row = int(slots.any(1).nonzero()[0])
    raise ValueError(
        f"Row {row} of `input_ids` has {int(slots[row].sum())} more tokens with the placeholder's id, and the cache "
        "holds all of the template's. Begin with an empty cache."
    )
