# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Flex attention with a prompt in front: a block mask that asks the text's own, V columns further on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch.nn.attention.flex_attention import noop_mask
from transformers.masking_utils import BlockMask, flex_attention_mask


if TYPE_CHECKING:
    from .attention import InFront
    from .back_ends import Inputs


def attend(front: InFront, inputs: Inputs) -> tuple[torch.Tensor, Any]:
    """Attention whose mask is a `BlockMask`; `None`: all is seen."""
    mask = inputs.mask
    if mask is None and front.present is None:
        return inputs.run(None)
    return inputs.run(front.share(mask, inputs.window, lambda: _widen(front, inputs, mask)))


def _widen(front: InFront, inputs: Inputs, mask: Optional[BlockMask]) -> BlockMask:
    """The text's block mask, by default one that hides nothing, with the prompt's columns.

    Raises:
        ValueError: Heads have masks of their own.
    """
    rows, heads, queries, tokens = (1, 1, inputs.query.shape[2], inputs.key.shape[2]) if mask is None else mask.shape
    if heads > 1:
        raise ValueError(
            f"{type(inputs.module).__name__} got a block mask for {heads} heads, and one for all heads can be widened "
            "by a prompt. Use `create_block_mask` with `H=None`."
        )
    length, window, device = front.prompt.length, inputs.window, inputs.key.device
    of_text = noop_mask if mask is None else mask.mask_mod
    rows = rows if front.present is None else len(front.present)
    distances = None if window is None else front.distances(device).expand(rows, -1)
    present = None if front.present is None else front.present.to(device)

    def of_both(row, head, query, key):
        is_seen = key < length
        if present is not None:
            is_seen = is_seen & present[row, key.clamp(max=length - 1)]
        if distances is not None:
            is_seen = is_seen & (distances[row, query] - key < window)
        return is_seen | (key >= length) & of_text(row, head, query, (key - length).clamp(min=0))

    sizes = {"q_length": queries, "kv_length": length + tokens}
    return flex_attention_mask(batch_size=rows, mask_function=of_both, device=device, **sizes)
