# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts beside the adapters of a model: any number of them, of which those in use are made ready."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn

from ..config import PTuningConfig
from ..files.bank import BankFile, Record
from .build import build_encoder
from .choice import list_names
from .deep import DeepPromptEncoder, Shapes, states_of
from .encoder import PromptEncoder


# The fields of a prompt's config that it keeps in a bank, where they are not at their defaults.
SETTINGS = ("prompt_depth", "prompt_stacks", "shift_positions")
# How many bytes of prompts are ready for use, those that were used last.
MAX_BYTES = 2**28
# How many of them the objects of one prompt need beside its numbers.
OBJECTS = 2**13


@dataclass(frozen=True)
class Ready:
    """A prompt that is ready for use.

    Args:
        encoder (`nn.Module`): Gives the vectors, or the keys and values, on the model's device.
        modules (`dict`): The state of the modules that were trained beside it, by their path in the model.
        nbytes (`int`): How much memory it needs.
        source ([`~peft_ptuning_ext.files.bank.Record`], *optional*): What it was made of; `None`: the file.
    """

    encoder: PromptEncoder | DeepPromptEncoder
    modules: dict[str, dict[str, torch.Tensor]]
    nbytes: int
    source: Optional[Record] = None
    made: dict[str, nn.Module] = field(default_factory=dict)

    def module(self, path: str, like: nn.Module) -> nn.Module:
        """The module that was trained for a path in the model, made from a copy of what the base model has there.

        It has the dtype of the base model's and is on its device, as PEFT loads it.

        Raises:
            ValueError:
                It has integers in place of numbers to compute with, or the other way round; or the base model's has
                other tensors now.
        """
        own, given = like.state_dict(), self.modules[path]
        made = self.made.get(path)
        if made is not None and _kinds(made.state_dict()) == _kinds(own):
            return made
        if odd := sorted(own.keys() ^ given.keys()):
            raise ValueError(
                f"{path!r} of the bank does not fit into the model any more: one of both has no {odd[0]!r}. Adapters "
                "of other methods can't stand in a module of which prompts of a bank have one of their own."
            )
        for name, value in own.items():
            if value.is_floating_point() != given[name].is_floating_point():
                raise ValueError(f"{path!r} of the bank has {name!r} of type {given[name].dtype}, not {value.dtype}.")
        made = copy.deepcopy(like).requires_grad_(False).eval()
        made.load_state_dict({name: given[name].to(value) for name, value in own.items()}, assign=True)
        self.made[path] = made
        return made


class StoredPrompts(Mapping[str, Record]):
    """Prompts by name: those in a file, which are read when they are needed, and those that were added since.

    Args:
        width (`int`): Width H of the model's input embedding.
        file ([`~peft_ptuning_ext.files.bank.BankFile`], *optional*): Where prompts are read from.

    Attributes:
        shapes (`dict[str | None, dict]`):
            By `prompt_stacks`, what each layer takes in front of its text, once there are deep prompts.
    """

    def __init__(self, width: int, file: Optional[BankFile] = None) -> None:
        self.width = width
        self.shapes: dict[Optional[str], Shapes] = {}
        self._file = file
        # None: in the file.
        self._records: dict[str, Optional[Record]] = dict.fromkeys(file.shapes if file is not None else ())
        self._ready: dict[str, Ready] = {}

    def __getitem__(self, name: str) -> Record:
        record = self._records[name]
        return self._file.read(name) if record is None else record

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def put(self, name: str, record: Record) -> None:
        """Adds a prompt, or replaces one."""
        self._records[name] = record
        self._ready.pop(name, None)

    def remove(self, name: str) -> None:
        """Removes a prompt."""
        del self._records[name]
        self._ready.pop(name, None)

    def config(self, name: str) -> PTuningConfig:
        """The config of a prompt, which has no network.

        Raises:
            ValueError: There is none of this name.
        """
        if (record := self._find(name)) is not None:
            return config_of(record.table.shape, record.settings)
        return config_of(self._file.shapes[name], self._file.settings.get(name, {}))

    def modules_of(self, name: str) -> Mapping[str, Any]:
        """The modules that were trained beside a prompt, by path in the model: their tensors, or the shapes."""
        record = self._find(name)
        return self._file.modules.get(name, {}) if record is None else record.modules

    def ready(self, name: str, device: torch.device) -> Ready:
        """Returns a prompt that is ready for use on a device.

        Raises:
            ValueError: There is none of this name, or some of its values in the file are NaN or infinite.
        """
        ready, source = self._ready.pop(name, None), self._find(name)
        # Another thread may have replaced the prompt while this one had, or made, what was ready of the former.
        if ready is None or ready.source is not source or next(ready.encoder.parameters()).device != device:
            ready = self._make_ready(name, source, device)
        self._ready[name] = ready  # behind all that were used longer ago
        return ready

    def _find(self, name: str) -> Optional[Record]:
        try:
            return self._records[name]
        except KeyError:
            raise ValueError(f"There is no prompt {name!r} in the bank, only {list_names(self)}.") from None

    def _make_ready(self, name: str, source: Optional[Record], device: torch.device) -> Ready:
        record = self._file.read(name) if source is None else source
        config = config_of(record.table.shape, record.settings)
        shapes = self.shapes[config.prompt_stacks] if config.is_deep else None
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference have no version counter
            with torch.device("meta"):
                encoder = build_encoder(config, self.width, shapes)
            encoder = encoder.to_empty(device=device).to(record.table.dtype).requires_grad_(False).eval()
            encoder.start_at(record.table if shapes is None else states_of(record.table, shapes))
            modules = {
                path: {name: value.to(device, copy=True) for name, value in state.items()}
                for path, state in record.modules.items()
            }
        tensors = [record.table, *(value for state in modules.values() for value in state.values())]
        ready = Ready(encoder, modules, OBJECTS + sum(tensor.nbytes for tensor in tensors), source)
        self._make_room(ready.nbytes)
        return ready

    def _make_room(self, nbytes: int) -> None:
        sizes = {name: ready.nbytes for name, ready in list(self._ready.items())}
        total = nbytes + sum(sizes.values())
        for name, size in sizes.items():
            if total <= MAX_BYTES:
                return
            self._ready.pop(name, None)
            total -= size

    def __deepcopy__(self, memo: dict) -> StoredPrompts:
        other = copy.copy(self)
        other._records, other._ready, other.shapes = dict(self._records), {}, dict(self.shapes)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ready": {}}


def _kinds(state: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (value.dtype, value.device) for name, value in state.items()}


def config_of(shape: tuple[int, ...], settings: Mapping[str, Any]) -> PTuningConfig:
    """The config of a prompt without a network, whose table has a shape (V, …).

    Raises:
        TypeError, ValueError: The settings are none of a prompt, or the table has no rows.
    """
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise ValueError(f"{unknown[0]!r} is no setting of a prompt in a bank, which has {list(SETTINGS)}.")
    return PTuningConfig(num_virtual_tokens=shape[0], **settings)
