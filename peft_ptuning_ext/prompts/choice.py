# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapters are in front of which row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Optional

import torch
from torch import nn


# What PEFT calls a row without an adapter.
BASE = "__base__"

# How many names a message shows.
SHOWN = 20

# The adapters of one row, in the order in which their prompts stand; empty for none.
Names = tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """The adapters of each row, not the same for all.

    Args:
        names (`tuple[tuple[str, ...], ...]`): By row, the adapters whose prompts stand in front of it.
        may_repeat (`bool`, defaults to `False`):
            Whether a batch may have several rows in place of each, next to each other: beams, answers, choices.
        heads (`Mapping`):
            By module that some adapter has one of its own for, and by names, that of a row; `None`: the module itself.
        differ_inside (`bool`, defaults to `False`):
            Whether such a module inside the backbone is not the same for all rows.
    """

    names: tuple[Names, ...]
    may_repeat: bool = field(default=False, compare=False)
    heads: Mapping[nn.Module, Mapping[Names, Optional[nn.Module]]] = field(default_factory=dict, compare=False)
    differ_inside: bool = field(default=False, compare=False)

    def of_call(self, stack: str, rows: int) -> Names | Rows:
        """The adapters for a batch of B = `rows` rows: those of all of them if they are the same."""
        self.of_batch(stack, rows)
        return self.names[0] if len(set(self.names)) == 1 else self

    def of_batch(self, stack: str, rows: int) -> tuple[Names, ...]:
        """The adapters of each of B = `rows` rows.

        Raises:
            ValueError: The batch has another number of rows.
        """
        number = len(self.names)
        if rows != number and (rows % number or not self.may_repeat):
            raise ValueError(
                f"{stack} got {rows} rows, and `adapter_names` has {number}. Pass one name for each row of the batch; "
                f"{BASE!r} is a row without an adapter."
            )
        return tuple(names for names in self.names for _ in range(rows // number))


def describe(names: Names | Rows) -> str:
    """What is in front, for messages."""
    if isinstance(names, Rows):
        return f"adapters by row ({', '.join(describe(row) for row in names.names)})"
    if not names:
        return "no adapter"
    return f"adapter {names[0]!r}" if len(names) == 1 else f"adapters {list(names)}"


def read_rows(adapter_names: Any, known: Collection[str], may_repeat: bool) -> Rows:
    """Reads `adapter_names`: for each row the name of an adapter, a tuple of names, or `"__base__"`.

    Args:
        adapter_names (`Any`): What the caller passed.
        known (`Collection[str]`): Names of the adapters that are there, which may be many.
        may_repeat (`bool`): As of [`Rows`].

    Raises:
        TypeError: It is not a list of names.
        ValueError: It is empty, or a name is unknown.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(
            f"`adapter_names` must be a list with the name of an adapter for each row, got {adapter_names!r}."
        )
    if not adapter_names:
        raise ValueError("`adapter_names` is empty. Pass one name for each row of the batch.")
    rows = tuple(_read_row(row, known) for row in adapter_names)
    return Rows(rows, may_repeat)


def _read_row(row: Any, known: Collection[str]) -> Names:
    names = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, (tuple, list)) else (row,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`adapter_names` must have a name, or a tuple of names, for each row, got {row!r}.")
        if name not in known and (name != BASE or len(names) > 1):
            raise ValueError(
                f"`adapter_names` has {name!r}, and the adapters are {list_names(known)}. {BASE!r} alone is a row "
                "without an adapter, and a tuple of names puts several prompts in front of a row."
            )
    return () if names == (BASE,) else names


def list_names(names: Collection[str]) -> str:
    """Names for a message, of which there may be thousands."""
    some = sorted(islice(names, SHOWN))
    return f"{some} and {len(names) - SHOWN} others" if len(names) > SHOWN else f"{some}"


# By modules, what was chosen for the calls that run now. Each thread has its own.
_chosen: ContextVar[tuple[tuple[tuple[Any, ...], Rows], ...]] = ContextVar("chosen", default=())

# The attribute of a module for which some thread has chosen: how many have. A compiled model looks at it, for what a
# thread has chosen can't be compiled.
CHOOSING = "ptuning_choosing"
_counting = threading.Lock()


@contextmanager
def choosing(modules: tuple[Any, ...], rows: Rows) -> Iterator[None]:
    """Inside, calls of the model with these modules have adapters by row."""
    token = _chosen.set(((modules, rows), *_chosen.get()))
    _count(modules, 1)
    try:
        yield
    finally:
        _count(modules, -1)
        _chosen.reset(token)


def _count(modules: tuple[Any, ...], more: int) -> None:
    with _counting:
        for module in modules:
            setattr(module, CHOOSING, getattr(module, CHOOSING, 0) + more)


@contextmanager
def repeating() -> Iterator[None]:
    """Inside, a batch may have several rows in place of each, if adapters were chosen by row."""
    token = _chosen.set(tuple((modules, replace(rows, may_repeat=True)) for modules, rows in _chosen.get()))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_rows(module: Any) -> Rows | None:
    """What was chosen for the calls of the model with this module; `None`: the active adapters, for all rows."""
    return _find(module) if getattr(module, CHOOSING, 0) else None


@torch.compiler.disable
def _find(module: Any) -> Rows | None:
    for modules, rows in _chosen.get():
        if any(other is module for other in modules):
            return rows
    return None
