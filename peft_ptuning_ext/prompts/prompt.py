# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What stands in front of the text of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch


# By layer, keys and values as attention receives them, each (1, key-value heads, V, D).
States = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Prompt:
    """The prompt of one call, as vectors that enter the backbone, or as keys and values in every layer.

    A cache that was filled behind a prompt has a `Prompt`, too. It then tells which prompt that was.

    Args:
        names (`tuple[str, ...]`): The adapters that it is made of.
        length (`int`): V.
        vectors (`torch.Tensor`, *optional*): What enters the first layer, (1, V, H).
        states (`dict[int, tuple]`, *optional*): Its keys and values in every layer.
        places (`torch.Tensor`, *optional*):
            In a cache: the columns of the text that it stands before, (B or 1, V); `None`: behind the padding on the
            left, if there is any and distance is counted in columns.
        ends_in_padding (`bool`, defaults to `False`):
            In a cache: whether some row had nothing but padding so far, and may have more.
        takes_positions (`bool`, defaults to `True`): Whether the text's positions begin at V, rather than at 0.
        filled (`torch.Tensor`, *optional*):
            In a cache of rows with a template: how many of the V vectors each row has so far, (B,); `None`: all.
        in_cache (`frozenset[int]`):
            In a cache: the layers whose keys and values there begin with the prompt's. In the others attention puts
            the `states` in front.
    """

    names: tuple[str, ...]
    length: int
    vectors: Optional[torch.Tensor] = None
    states: Optional[States] = None
    places: Optional[torch.Tensor] = None
    ends_in_padding: bool = False
    takes_positions: bool = True
    filled: Optional[torch.Tensor] = None
    in_cache: frozenset[int] = frozenset()

    @property
    def positions(self) -> int:
        """How many positions it takes from the text: V or 0."""
        return self.length if self.takes_positions else 0
