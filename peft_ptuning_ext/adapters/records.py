# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters as the records of a prompt bank: what is kept of them, and whether it fits a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..backbone import Backbone
from ..config import PTuningConfig
from ..files.bank import Record
from ..files.checkpoint import ENCODER_KEY, CheckpointSource, read_prompt, read_tensors
from ..prompts.adapter import Adapter
from ..prompts.build import build_encoder
from ..prompts.deep import Shapes, describe, shapes_of, to_table
from ..prompts.layer import execution_device
from ..prompts.stored import SETTINGS
from .checks import check_weights


# Fields of a config which are the same for all rows of a batch.
OF_ALL_ROWS = ("trainable_token_indices", "prompt_template", "cloze")


def settings_of(config: PTuningConfig) -> dict[str, Any]:
    """The settings of a prompt in a bank, as in JSON.

    Raises:
        ValueError: The adapter has something that can't be chosen by row.
    """
    if odd := [name for name in OF_ALL_ROWS if getattr(config, name)]:
        raise ValueError(
            f"The adapter has `{odd[0]}`, which is the same for all rows of a batch. A bank holds prompts that each "
            "row can have by itself. Load this adapter with PEFT."
        )
    given = {name: getattr(config, name) for name in SETTINGS}
    defaults = {name: PTuningConfig.__dataclass_fields__[name].default for name in SETTINGS}
    return {name: getattr(value, "value", value) for name, value in given.items() if value != defaults[name]}


def record_of(adapter: Adapter) -> tuple[Record, Optional[Shapes]]:
    """What a bank keeps of an adapter on a model, and the shapes of a deep prompt's layers."""
    states = adapter.states() if adapter.is_deep else None
    table = adapter.prompt() if states is None else to_table(states)
    trained = {
        path: wrapper.modules_to_save[adapter.name].state_dict()
        for path, wrapper in adapter.base_model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter.name in wrapper.modules_to_save
    }
    modules = {
        path: {name: value.detach().cpu().clone() for name, value in state.items()} for path, state in trained.items()
    }
    record = Record(table.cpu().contiguous(), settings_of(adapter.config), modules)
    return record, None if states is None else shapes_of(states)


def read_config(folder: str) -> PTuningConfig:
    """Reads the config of a saved adapter.

    Raises:
        ValueError: There is none, or it is of another method.
    """
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, PTuningConfig):
        raise ValueError(
            f"{folder} has an adapter of type {config.peft_type.value}, and a bank holds those of PTUNING. "
            "`import_from_peft` makes one of a stock prompt."
        )
    return config


def read_record(
    folder: str, config: PTuningConfig, model: nn.Module, backbone: Backbone, shapes: Optional[Shapes]
) -> Record:
    """Reads what a bank keeps of a saved adapter, after all of its file was checked.

    Args:
        folder (`str`): Folder, or repository on the Hub.
        config ([`PTuningConfig`]): Its config.
        model (`nn.Module`): The model of the bank.
        backbone ([`Backbone`]): Facts about it.
        shapes (`dict[int, LayerShape]`, *optional*): What each layer of the model takes, for a deep prompt.

    Raises:
        ValueError: The file can't be read, or does not fit the model.
    """
    source = CheckpointSource(folder)
    check_weights(source, model, backbone, config, {}, shapes)
    with torch.device("meta"):
        encoder = build_encoder(config, backbone.width, shapes)
    prompt = read_prompt(source.find(), encoder)
    endings = tuple(config.modules_to_save or ())
    paths = [path for path, _ in model.named_modules() if path.endswith(endings)]
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in read_tensors(source.find(), {}).items():
        name = key.removeprefix("base_model.model.")
        path = next((path for path in paths if name.startswith(f"{path}.")), None)
        if ENCODER_KEY not in key and path is not None:
            modules.setdefault(path, {})[name.removeprefix(f"{path}.")] = value.clone()
    table = prompt if shapes is None else to_table(prompt)
    return Record(table.contiguous(), settings_of(config), modules)


def check_table(
    shape: tuple[int, ...], model: nn.Module, backbone: Backbone, shapes: Optional[Shapes], whose: str
) -> None:
    """Refuses a table of vectors, or of keys and values, that is of another model."""
    width = backbone.width if shapes is None else sum(layer.width for layer in shapes.values())
    if len(shape) != 2 or shape[1] != width:
        takes = f"vectors of {width} numbers" if shapes is None else f"{width} numbers a position ({describe(shapes)})"
        raise ValueError(f"{whose} has the shape {shape}, and this {type(model).__name__} takes {takes}.")


def check_modules(modules: Mapping[str, Mapping[str, Any]], model: nn.Module, whose: str) -> None:
    """Refuses modules that do not fit in the place of the model's own: by their tensors, or the shapes of those."""
    for path, state in modules.items():
        try:
            own = model.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{whose} has a module {path!r}, and this {type(model).__name__} has none. It is for another class of "
                "model."
            ) from None
        own = own.original_module if isinstance(own, ModulesToSaveWrapper) else own
        if any(execution_device(part) is not None for part in own.modules()):
            raise ValueError(
                f"{whose} has a module {path!r} of its own, and the weights of the model's are offloaded. Load the "
                "model with a `device_map` that keeps it on a device."
            )
        expected = {name: tuple(value.shape) for name, value in own.state_dict().items()}
        found = {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}
        if odd := sorted(found.keys() ^ expected.keys()):
            raise ValueError(
                f"{whose} and this {type(model).__name__} have other tensors in {path!r}: one of both has no "
                f"{odd[0]!r}. If an adapter of another method stands in that module of the model, unload it."
            )
        if found != expected:
            raise ValueError(
                f"{whose} has {path!r} of shapes {found}, and the model's has {expected}. Rows of one batch have "
                "outputs of one width: load the model with the `num_labels` that the adapter was trained with."
            )
