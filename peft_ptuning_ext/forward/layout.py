# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Pure tensor functions: the prompt's columns put into a backbone's inputs and taken off its outputs."""

from __future__ import annotations

from typing import Any, Optional

import torch


def widen_embeds(prompt: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """[P; E(x)]: prompt (V, H) in front of inputs_embeds (B, S, H), in the latter's dtype → (B, V+S, H)."""
    prompt = prompt.to(device=inputs_embeds.device, dtype=inputs_embeds.dtype)
    return torch.cat([prompt.expand(inputs_embeds.shape[0], -1, -1), inputs_embeds], dim=1)


def widen_per_token(values: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    """`length` columns of `fill` in front of a per-token input such as a mask: (B, S) → (B, V+S)."""
    return torch.cat([values.new_full((values.shape[0], length), fill), values], dim=1)


def widen_positions(positions: torch.Tensor, length: int, first: int = 0) -> torch.Tensor:
    """first … first+V-1 for the prompt, V + `positions` for the user: (…, B, S) → (…, B, V+S).

    Leading dimensions, as of multimodal rotary positions (3, B, S), all get the prompt's positions.
    """
    prompt = torch.arange(first, first + length, device=positions.device, dtype=positions.dtype)
    return torch.cat([prompt.expand(*positions.shape[:-1], length), positions + length], dim=-1)


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count the unmasked tokens only, as `generate` makes them: (B, S) → (B, S); masked ones get 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def leading_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """How many zeros each row of a mask (B, S) begins with: (B, 1)."""
    return (attention_mask.long().cumsum(-1) == 0).sum(-1, keepdim=True)


def columns_behind_padding(padding: torch.Tensor, total: int, length: int) -> torch.Tensor:
    """Reorders [P; pads; text] to [pads; P; text]: column indices (B, V+S) into the former, given padding (B, 1)."""
    column = torch.arange(total, device=padding.device)
    in_padding, in_prompt = column < padding, column < padding + length
    return torch.where(in_padding, column + length, torch.where(in_prompt, column - padding, column))


def user_columns(padding: torch.Tensor, total: int, length: int) -> torch.Tensor:
    """Where the user's columns are in [pads; P; text]: column indices (B, S), given padding (B, 1)."""
    column = torch.arange(total - length, device=padding.device)
    return torch.where(column < padding, column, column + length)


def take_columns(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Picks columns (B, N) of values (…, B, V+S), or (…, 1, V+S) for all rows alike → (…, B, N)."""
    return values.take_along_dim(columns.view((1,) * (values.dim() - 2) + columns.shape), dim=-1)


def trim(value: Any, batch_size: int, total: int, length: int, columns: Optional[torch.Tensor] = None) -> Any:
    """Takes the prompt's positions off an output of a backbone, whatever its nesting.

    Args:
        value (`Any`):
            (B, V+S, …) tensors lose their V positions, (B·(V+S), E) router logits their V rows of each sequence and
            attention maps (B, heads, V+S, V+S) their V rows, not the columns; tuples and lists are walked; all else
            is left alone.
        batch_size (`int`): B.
        total (`int`): V + S.
        length (`int`): V.
        columns (`torch.Tensor`, *optional*): Where the user's columns are, (B, S); by default behind the first V.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() == 4 and value.shape[2:] == (total, total):
            return value[:, :, length:] if columns is None else value.take_along_dim(columns[:, None, :, None], dim=2)
        if value.dim() >= 3 and value.shape[1] == total:
            if columns is None:
                return value[:, length:]
            return value.take_along_dim(columns.view(*columns.shape, *(1,) * (value.dim() - 2)), dim=1)
        if value.dim() == 2 and value.shape[0] == batch_size * total:
            rows = value.unflatten(0, (batch_size, total))
            return trim(rows, batch_size, total, length, columns).flatten(0, 1)
        return value
    if type(value) in (tuple, list):
        return type(value)(trim(item, batch_size, total, length, columns) for item in value)
    return value
