# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A file with any number of prompts, of which one is read when it is needed.

It is a safetensors file. Its header, which is read when the file is opened, is the table of names: each prompt is a
tensor with its name, and so is each tensor of a module that was trained beside it. Nothing here knows transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoint import check_values, replacing


FILE_NAME = "prompt_bank.safetensors"
# The entry of the header that tells what the file is, and its value's "format".
ENTRY, FORMAT = "prompt_bank", 1
# What the names of tensors begin with, in front of that of a prompt: "prompt:name", "module:classifier/weight:name".
PROMPT, MODULE = "prompt", "module"


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt as it is stored.

    Args:
        table (`torch.Tensor`): Vectors (V, H), or the keys and values of a deep prompt, (V, numbers of a position).
        settings (`dict`): Fields of its config that are not at their defaults, as in JSON.
        modules (`dict`): The state of the modules that were trained beside it, by their path in the model.
    """

    table: torch.Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


class BankFile:
    """An open file of prompts. It stays as it was opened, even if another is moved to its path.

    Args:
        path (`str`): The file.

    Attributes:
        base_model_name (`str`): Name of the model that the prompts are for; empty if it has none.
        layers (`dict[str, list]`): What the layers take that deep prompts are for, by the stacks that they are in.
        shapes (`dict[str, tuple]`): By prompt, the shape of its table.
        settings (`dict[str, dict]`): By prompt, its settings if it has any.
        modules (`dict[str, dict[str, dict[str, tuple]]]`): By prompt that has some, the shapes of its modules' states.

    Raises:
        ValueError: It can't be read, or is no such file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = str(path)
        try:
            self._identity = _identify(self.path)
            self._file = safe_open(self.path, framework="pt")
            self._read_header()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error

    def _read_header(self) -> None:
        try:
            entry = json.loads((self._file.metadata() or {})[ENTRY])
            if entry["format"] != FORMAT:
                raise ValueError(
                    f"{self.path} is a prompt bank of format {entry['format']!r}, and this release reads {FORMAT}. "
                    "Install a newer release of peft_ptuning_ext."
                )
            self.base_model_name = entry["base_model_name_or_path"]
            self.layers, self.settings = entry["layers"], entry["settings"]
            values = [self.base_model_name, self.layers, self.settings, *self.settings.values()]
            if [type(value) for value in values] != [str, dict] + [dict] * (len(self.settings) + 1):
                raise TypeError
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{self.path} is no prompt bank: its header does not tell what it holds.") from error
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.modules: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
        for key in list(self._file.keys()):
            kind, _, rest = key.partition(":")
            shape = tuple(self._file.get_slice(key).get_shape())
            if kind == PROMPT and len(shape) == 2:
                self.shapes[rest] = shape
            elif kind == MODULE:
                place, _, name = rest.partition(":")
                path, _, tensor = place.partition("/")
                self.modules.setdefault(name, {}).setdefault(path, {})[tensor] = shape
            else:
                raise ValueError(f"{self.path} holds {key!r} of shape {shape}, which is no part of a prompt bank.")
        if unknown := sorted((self.settings.keys() | self.modules.keys()) - self.shapes.keys()):
            raise ValueError(f"{self.path} has something of a prompt {unknown[0]!r}, but not the prompt.")

    def read(self, name: str) -> Record:
        """Reads one prompt.

        Raises:
            ValueError:
                Some of its values are NaN, infinite or no numbers to be trained, or somebody has written to the file.
        """
        self._check_is_same()
        modules = {
            path: {tensor: self._file.get_tensor(_module_key(path, tensor, name)) for tensor in state}
            for path, state in self.modules.get(name, {}).items()
        }
        record = Record(self._file.get_tensor(f"{PROMPT}:{name}"), self.settings.get(name, {}), modules)
        check_record(record, f"{self.path}, prompt {name!r}")
        return record

    def _check_is_same(self) -> None:
        """Refuses a file into which others have written: its numbers are others, or gone."""
        try:
            found = _identify(self.path)
        except OSError:  # deleted or moved away: what is open stays
            return
        if found != self._identity and found[0] == self._identity[0]:
            raise ValueError(
                f"{self.path} was written to after the prompt bank was opened. Open the bank again. To replace a file "
                "that is in use, move another one to its place, as `save` does."
            )

    def __deepcopy__(self, memo: dict) -> BankFile:
        return self  # nothing of it changes

    def __reduce__(self) -> tuple:
        return _reopen, (self.path, self._identity)


def check_record(record: Record, where: str) -> None:
    """Raises `ValueError` if a prompt, or what was trained beside it, has values that are NaN or infinite."""
    check_values({"prompt": record.table}, where)
    # A module may count something, such as batches.
    for path, state in record.modules.items():
        numbers = {f"{path}.{name}": value for name, value in state.items() if value.is_floating_point()}
        check_values(numbers, where)


def _module_key(path: str, tensor: str, name: str) -> str:
    return f"{MODULE}:{path}/{tensor}:{name}"


def _identify(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _reopen(path: str, identity: tuple[int, int, int]) -> BankFile:
    file = BankFile(path)
    if file._identity != identity:
        raise ValueError(f"{path} was replaced after the prompt bank was opened. Open it again.")
    return file


def write_bank(
    directory: str | os.PathLike, records: Mapping[str, Record], base_model_name: str, layers: Mapping[str, list]
) -> None:
    """Writes prompts by name to a folder, as one file: whole, or not at all.

    Values that come from a file are not copied into memory.

    Args:
        directory (`str` or `os.PathLike`): The folder; made if it is not there.
        records (`Mapping[str, Record]`): By name.
        base_model_name (`str`): Name of the model that they are for.
        layers (`Mapping[str, list]`): What its layers take, for deep prompts, by the stacks that those are in.

    Raises:
        ValueError: `directory` is a file, or there are more names than a header holds.
    """
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        tensors[f"{PROMPT}:{name}"] = record.table
        for path, state in record.modules.items():
            tensors |= {_module_key(path, tensor, name): value for tensor, value in state.items()}
        if record.settings:
            settings[name] = record.settings
    entry = {
        "format": FORMAT,
        "base_model_name_or_path": base_model_name,
        "layers": dict(layers),
        "settings": settings,
    }
    with replacing(directory) as folder:
        try:
            save_file(tensors, folder / FILE_NAME, {ENTRY: json.dumps(entry)})
        except SafetensorError as error:
            raise ValueError(f"{len(records)} prompts can't be written as one safetensors file: {error}") from error
