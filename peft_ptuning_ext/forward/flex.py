# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Flex attention with a prompt in front: a block mask that asks the text's own, V columns further on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import BlockMask, flex_attention_mask


if TYPE_CHECKING:
    from .attention import InFront
    from .back_ends import Inputs


def attend(front: InFront, inputs: Inputs) -> tuple[torch.Tensor, Any]:
    """Attention whose mask is a `BlockMask`; `None`: all is seen."""
    mask = inputs.mask
    if mask is None:
        return inputs.run(None)
    return inputs.run(front.share(mask, inputs.window, lambda: _widen(front, inputs, mask)))


def _widen(front: InFront, inputs: Inputs, mask: BlockMask) -> BlockMask:
    """The text's block mask with the prompt's columns.

    Raises:
        ValueError: Heads have masks of their own.
    """
    rows, heads, queries, tokens = mask.shape
    if heads > 1:
        raise ValueError(
            f"{type(inputs.module).__name__} got a block mask for {heads} heads, and one for all heads can be widened "
            "by a prompt. Use `create_block_mask` with `H=None`."
        )
    length, window, device, of_text = front.prompt.length, inputs.window, inputs.key.device, mask.mask_mod
    distances = None if window is None else front.distances(device).expand(rows, -1)

    def of_both(row, head, query, key):
        is_seen = key < length
        if distances is not None:
            is_seen = is_seen & (distances[row, query] - key < window)
        return is_seen | (key >= length) & of_text(row, head, query, (key - length).clamp(min=0))

    sizes = {"q_length": queries, "kv_length": length + tokens}
    return flex_attention_mask(batch_size=rows, mask_function=of_both, device=device, **sizes)
