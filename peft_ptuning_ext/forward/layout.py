# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where the prompt stands in a row: pure tensor functions, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch


@dataclass(frozen=True)
class Layout:
    """The places of V virtual tokens among S tokens of a text.

    Args:
        length (`int`): V.
        text (`int`): S.
        order (`torch.Tensor`, *optional*):
            For each column of the row, the column of [prompt; text] that stands there, (B or 1, V+S). With V=2, S=3
            and the prompt before the text's second token it is 2 0 1 3 4. `None`: the prompt is in front of all.
        columns (`torch.Tensor`, *optional*): Where the text's columns are in the row, (B or 1, S); `None`: behind V.
    """

    length: int
    text: int
    order: Optional[torch.Tensor] = None
    columns: Optional[torch.Tensor] = None

    @classmethod
    def at(cls, places: Optional[torch.Tensor], length: int, text: int) -> Layout:
        """Lays out a row.

        Args:
            places (`torch.Tensor`, *optional*):
                For each virtual token, the column of the text that it stands before, (B or 1, V); `None`: in front.
            length (`int`): V.
            text (`int`): S.
        """
        if places is None:
            return cls(length, text)
        columns = torch.arange(text, device=places.device).expand(len(places), -1)
        # Virtual tokens get even numbers, so that each stands before the token of its place.
        order = torch.cat([2 * places, 2 * columns + 1], dim=1).argsort(dim=1, stable=True)
        return cls(length, text, order, order.argsort(dim=1)[:, length:])

    def spread(self, prompt: torch.Tensor, values: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Puts the prompt's values among the text's.

        Args:
            prompt (`torch.Tensor`): V values along `dim`, for each row or one row for all.
            values (`torch.Tensor`): The text's, S along `dim`: (B, S, …) for `dim=1`, (…, B, S) for `dim=-1`.
            dim (`int`, defaults to 1): The dimension of the tokens.
        """
        shape = list(values.shape)
        shape[dim] = self.length
        row = torch.cat([prompt.to(values).expand(shape), values], dim=dim)
        return row if self.order is None else row.take_along_dim(_beside(self.order, row, dim), dim=dim)

    def fill(self, value: int, values: torch.Tensor) -> torch.Tensor:
        """Puts `value` at the prompt's places among (B, S) values → (B, V+S)."""
        return self.spread(values.new_full((1, 1), value), values)

    def positions(self, positions: torch.Tensor, first: int, shift: int | torch.Tensor) -> torch.Tensor:
        """Positions from `first` on for the prompt, `shift` + `positions` for the text: (…, B, S) → (…, B, V+S).

        Leading dimensions, as of multimodal rotary positions (3, B, S), all get the prompt's positions. Where `shift`
        is (B, 1), each row has as many of the V vectors, the last ones.
        """
        prompt = torch.arange(first, first + self.length, device=positions.device)
        if isinstance(shift, torch.Tensor):
            prompt = (prompt - self.length + shift).clamp(min=first)
        return self.spread(prompt, positions + shift, dim=-1)

    def trim(self, value: Any, batch_size: int) -> Any:
        """Takes the prompt's positions off an output of a backbone for B = `batch_size` rows, whatever its nesting.

        (B, V+S, …) tensors lose their V positions. Router logits (B·(V+S), E) lose the V rows of each sequence.
        Attention maps (B, heads, V+S, V+S) lose the prompt's rows, not its columns. Tuples and lists are walked, and
        all else is left alone.
        """
        if type(value) in (tuple, list):
            return type(value)(self.trim(item, batch_size) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        total = self.length + self.text
        if value.dim() == 4 and value.shape[2:] == (total, total):
            return self._text(value, dim=2)
        if value.dim() >= 3 and value.shape[1] == total:
            return self._text(value, dim=1)
        if value.dim() == 2 and value.shape[0] == batch_size * total:
            return self._text(value.unflatten(0, (batch_size, total)), dim=1).flatten(0, 1)
        return value

    def _text(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """The text's part of a value with V+S along `dim`, whose rows are its first dimension."""
        if self.columns is None:
            return value.narrow(dim, self.length, self.text)
        columns = self.columns.view(len(self.columns), *(1,) * (dim - 1), self.text, *(1,) * (value.dim() - dim - 1))
        return value.take_along_dim(columns, dim=dim)


def _beside(indices: torch.Tensor, values: torch.Tensor, dim: int) -> torch.Tensor:
    """`indices` (B or 1, N) with the dimensions of `values`, whose tokens are along `dim`, 1 or -1."""
    extra = (1,) * (values.dim() - 2)
    return indices.view(*indices.shape, *extra) if dim == 1 else indices.view(*extra, *indices.shape)
