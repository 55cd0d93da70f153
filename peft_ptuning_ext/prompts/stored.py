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
    """

    encoder: PromptEncoder | DeepPromptEncoder
    modules: dict[str, dict[str, torch.Tensor]]
    nbytes: int
    made: dict[str, nn.Module] = field(default_factory=dict)

    def module(self, path: str, like: nn.Module) -> nn.Module:
        """The module that was trained for a path in the model, made from a copy of what the base model has there.

        Raises:
            ValueError: It has integers in place of numbers to compute with, or the other way round.
        """
        if path not in self.made:
            made = copy.deepcopy(like).requires_grad_(False).eval()
            for name, value in made.state_dict().items():
                if value.is_floating_point() != (found := self.modules[path][name]).is_floating_point():
                    raise ValueError(f"{path!r} of the bank has {name!r} of type {found.dtype}, not {value.dtype}.")
            made.load_state_dict(self.modules[path], assign=True)
            self.made[path] = made
        return self.made[path]


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
        """The config of a prompt, which has no network."""
        if self._records[name] is not None:
            return config_of(self._records[name].table.shape, self._records[name].settings)
        return config_of(self._file.shapes[name], self._file.settings.get(name, {}))

    def modules_of(self, name: str) -> Mapping[str, Any]:
        """The modules that were trained beside a prompt, by path in the model: their tensors, or the shapes."""
        record = self._records[name]
        return self._file.modules.get(name, {}) if record is None else record.modules

    def ready(self, name: str, device: torch.device) -> Ready:
        """Returns a prompt that is ready for use on a device.

        Raises:
            KeyError: There is none of this name.
            ValueError: Some of its values in the file are NaN or infinite.
        """
        ready = self._ready.pop(name, None)
        if ready is None or next(ready.encoder.parameters()).device != device:
            ready = self._make_ready(name, device)
        self._ready[name] = ready  # behind all that were used longer ago
        return ready

    def _make_ready(self, name: str, device: torch.device) -> Ready:
        record, config = self[name], self.config(name)
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
        ready = Ready(encoder, modules, OBJECTS + sum(tensor.nbytes for tensor in tensors))
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


def config_of(shape: tuple[int, ...], settings: Mapping[str, Any]) -> PTuningConfig:
    """The config of a prompt without a network, whose table has a shape (V, …).

    Raises:
        TypeError, ValueError: The settings are none of a prompt, or the table has no rows.
    """
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise ValueError(f"{unknown[0]!r} is no setting of a prompt in a bank, which has {list(SETTINGS)}.")
    return PTuningConfig(num_virtual_tokens=shape[0], **settings)
