# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Flash attention with a prompt in front.

Its kernels align the last query with the last key. So V more keys in front need no other mask than V ones for padding,
and a window reaches into the prompt as far as it reaches into a text. Texts that are packed in one row are told by
their lengths; each is given a prompt of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Optional

import torch
from transformers.integrations.flash_attention import flash_attention_forward

from .seen import check_packing


if TYPE_CHECKING:
    from .attention import InFront
    from .back_ends import Inputs


def attend(front: InFront, inputs: Inputs) -> tuple[torch.Tensor, Any]:
    """Attention whose mask is (B, N), true or 1 where there is no padding; `None` if there is none."""
    given = inputs.mask
    if given is None and (starts := starts_of_texts(front, inputs)) is not None:
        return _attend_packed(front, inputs, starts)
    if given is None and front.present is None:
        return inputs.run(None)
    rows, _, tokens, _ = inputs.key.shape

    def widen() -> torch.Tensor:
        of_text = front.present.new_ones(rows, tokens) if given is None else given[:, :tokens]
        of_prompt = of_text.new_ones(rows, front.prompt.length) if front.present is None else front.present
        return torch.cat([of_prompt.to(of_text), of_text], dim=1)

    return inputs.run(front.share(given, tokens, widen).to(inputs.key.device))


def starts_of_texts(front: InFront, inputs: Inputs) -> Optional[list[int]]:
    """Where the packed texts begin, and where the last one ends; `None` if no texts are packed."""
    lengths, positions = (inputs.kwargs.get(name) for name in ("cu_seq_lens_q", "position_ids"))
    if lengths is not None:
        return front.share(lengths, "lengths", lengths.tolist)
    rows, _, queries, _ = inputs.query.shape
    if positions is None or positions.dim() != 2 or rows > 1 or queries == 1 or positions.shape[1] != queries:
        return None

    def find() -> Optional[list[int]]:
        later = (positions[0].diff() != 1).nonzero()[:, 0].tolist()
        return [0, *(column + 1 for column in later), queries] if later else None

    return front.share(positions, "positions", find)


def _attend_packed(front: InFront, inputs: Inputs, starts: list[int]) -> tuple[torch.Tensor, Any]:
    """Attention of each packed text to [prompt; text], with the lengths of both."""
    if inputs.attention.function is not flash_attention_forward:
        check_packing(inputs.attention, inputs.module, inputs.query, inputs.value, inputs.kwargs)
    pairs = ((inputs.prompt_key, inputs.key), (inputs.prompt_value, inputs.value))
    key_value = tuple(_pack(prompt, text, starts) for prompt, text in pairs)
    of_queries = torch.tensor(starts, dtype=torch.int32, device=inputs.key.device)
    prompts = front.prompt.length * torch.arange(len(starts), dtype=torch.int32, device=inputs.key.device)
    longest = max(end - start for start, end in pairwise(starts))
    inputs.kwargs |= {
        "position_ids": None,
        "cu_seq_lens_q": of_queries,
        "cu_seq_lens_k": of_queries + prompts,
        "max_length_q": longest,
        "max_length_k": longest + front.prompt.length,
    }
    return inputs.run(None, key_value)


def _pack(prompt: torch.Tensor, texts: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """(1, heads, V, D) and (B, heads, N, D) → (1, heads, sum of V + lengths, D)."""
    row = texts.transpose(0, 1).flatten(1, 2)[None]
    parts = [part for start, end in pairwise(starts) for part in (prompt, row[:, :, start:end])]
    return torch.cat(parts, dim=2)
