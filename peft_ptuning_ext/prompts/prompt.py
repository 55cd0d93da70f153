# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What stands in front of the text of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from .choice import Names, Rows


# By layer, keys and values as attention receives them, each (1, key-value heads, V, D), or (B, …) by row.
States = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Prompt:
    """The prompt of one call, as vectors that enter the backbone, or as keys and values in every layer.

    A cache that was filled behind a prompt has a `Prompt`, too. It then tells which prompt that was.

    Args:
        names (`tuple[str, ...]` or [`Rows`]): The adapters that it is made of, for all rows or by row.
        length (`int`): V, of which a row may have fewer, at the end.
        vectors (`torch.Tensor`, *optional*):
            What enters the first layer: (1, V, H), or (G, V, H) of the G different prompts of a batch.
        states (`dict[int, tuple]`, *optional*): Its keys and values in every layer.
        places (`torch.Tensor`, *optional*):
            In a cache: the columns of the text that it stands before, (B or 1, V); `None`: behind the padding on the
            left, if there is any and distance is counted in columns.
        ends_in_padding (`bool`, defaults to `False`):
            In a cache: whether some row had nothing but padding so far, and may have more.
        taken (`int`, *optional*): How many positions it takes from the text, at most if rows differ; `None`: V.
        filled (`torch.Tensor`, *optional*):
            In a cache of rows with a template: how many of the V vectors each row has so far, (B,); `None`: all.
        in_cache (`frozenset[int]`):
            In a cache: the layers whose keys and values there begin with the prompt's. In the others attention puts
            the `states` in front.
        lengths (`torch.Tensor`, *optional*): How many of the V columns each row has, (B,); `None`: all.
        starts (`torch.Tensor`, *optional*): How many positions it takes from each row, (B,), if rows differ.
        bare (`torch.Tensor`, *optional*): Which rows have no adapter, (B,); `None`: none.
        of_row (`torch.Tensor`, *optional*):
            Which of the G vectors each row has, (B,); `None`: all rows the only one, or each its own.
    """

    names: Names | Rows
    length: int
    vectors: Optional[torch.Tensor] = None
    states: Optional[States] = None
    places: Optional[torch.Tensor] = None
    ends_in_padding: bool = False
    taken: Optional[int] = None
    filled: Optional[torch.Tensor] = None
    in_cache: frozenset[int] = frozenset()
    lengths: Optional[torch.Tensor] = None
    starts: Optional[torch.Tensor] = None
    bare: Optional[torch.Tensor] = None
    of_row: Optional[torch.Tensor] = None

    @property
    def positions(self) -> int:
        """How many positions it takes from the text, at most if rows differ."""
        return self.length if self.taken is None else self.taken

    @property
    def needs_telling(self) -> bool:
        """Whether the text's positions begin elsewhere than at the column behind the prompt's."""
        return self.starts is not None or self.positions != self.length

    def present(self, rows: int) -> Optional[torch.Tensor]:
        """Which of the V columns each of B = `rows` rows has, (B, V); `None`: all."""
        if self.lengths is None:
            return None
        columns = torch.arange(self.length, device=self.lengths.device)
        return by_row(columns >= self.length - self.lengths[:, None], rows)

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """What each row has of values that there are for each of the G prompts: (G, …) → (B, …)."""
        return values if self.of_row is None else values[self.of_row.to(values.device)]

    def by_prompt(self, values: torch.Tensor) -> torch.Tensor:
        """What each of the G prompts has of values of rows, the same in all rows of a prompt: (B,) → (G,)."""
        if self.of_row is None:
            return values
        return values.new_zeros(len(self.vectors)).index_copy(0, self.of_row, values)

    def counted_or(self, columns: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Positions (B, S) that count what is no padding, and those of the columns in rows without a prompt.

        Such a row is to be that of the base model, which leaves padding out only where it is told.
        """
        return (
            counted if self.bare is None else torch.where(by_row(self.bare[:, None], len(counted)), columns, counted)
        )

    def shift(self, rows: int) -> int | torch.Tensor:
        """What is added to the text's positions: one number, or one for each of B = `rows` rows, (B, 1)."""
        return self.positions if self.starts is None else by_row(self.starts[:, None], rows)


def by_row(values: torch.Tensor, rows: int) -> torch.Tensor:
    """One value for each of B = `rows` rows, of which several that are next to each other may share one."""
    number = values.shape[0]
    return values if number in (1, rows) else values.repeat_interleave(rows // number, dim=0)
