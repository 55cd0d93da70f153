# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Checks a saved prompt before a model is changed for it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.func import functional_call


# Attribute of the tuner layer under which the encoders are saved: `….ptuning_encoders.embedding` and so on.
ENCODER_KEY = ".ptuning_encoders."
# Attribute of an embedding under which PEFT saves the rows that are trained by `trainable_token_indices`.
TOKENS_KEY = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class CheckpointSource:
    """Where a config was loaded from, and so where its weights are.

    Args:
        model_id (`str`): Folder, or repository on the Hub.
        subfolder (`str`, *optional*): Folder inside it.
        safetensors_only (`bool`): Whether a `.bin` pickle is refused.
        download_kwargs (`dict`): Arguments for [`~huggingface_hub.hf_hub_download`].
    """

    model_id: str
    subfolder: Optional[str] = None
    safetensors_only: bool = True
    download_kwargs: dict[str, Any] = field(default_factory=dict)

    def find(self) -> Optional[str]:
        """Returns the path of the safetensors file, or `None` if there is a pickle that the caller asked for.

        Raises:
            ValueError: There are no weights, or only a pickle and the caller did not ask for it.
        """
        folder = os.path.join(self.model_id, self.subfolder) if self.subfolder else self.model_id
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(path):
            return path
        is_local = os.path.isdir(folder)
        if not is_local and self.safetensors_only:
            try:
                return hf_hub_download(
                    self.model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=self.subfolder, **self.download_kwargs
                )
            except (EntryNotFoundError, HFValidationError):
                pass
        if not self.safetensors_only:
            return None
        if os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
            raise ValueError(
                f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}, only the pickle {WEIGHTS_NAME}, which can run code when "
                "it is loaded. If you trust it, pass `use_safetensors=False` to `PeftModel.from_pretrained`; beside "
                "other adapters, to `PTuningConfig.from_pretrained`, and that config to `model.add_adapter(name, "
                "config)` before `model.load_adapter(folder, name)`."
            )
        raise ValueError(
            f"{folder} has an adapter config but no {SAFETENSORS_WEIGHTS_NAME} beside it. To start a new adapter with "
            "its settings, pass `dataclasses.replace(config)`."
        )


def saved_name(name: str) -> str:
    """The name under which a module or tensor is saved: the one that it has in a model that is not compiled.

    `torch.compile(module)` puts the module inside another, as its `_orig_mod`. Inside a trained head the names stay
    those of the head, which PEFT looks up itself.
    """
    path, separator, inside = name.partition(".modules_to_save.")
    return ".".join(part for part in path.split(".") if part != "_orig_mod") + separator + inside


@contextmanager
def replacing(directory: str | os.PathLike, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty folder whose files are moved into `directory` when the block ends, and are gone if it fails.

    Each file is moved in one step, so that a process that is killed leaves whole files, and those that were there as
    long as the block ran. What is unfinished then stays in a folder `.unfinished-…` in `directory`.

    Args:
        directory (`str` or `os.PathLike`): Where the files go; made if it is not there.
        stale (`Sequence[str]`): Patterns of files in `directory` that are deleted unless they were replaced.

    Raises:
        ValueError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, and a folder is needed.")
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".unfinished-", dir=directory) as name:
            folder = Path(name)
            yield folder
            files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
            # The files that describe the others come last.
            for path in sorted(files, key=lambda path: (path.suffix == ".json", path)):
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / path, directory / path)
            for path in {path for pattern in stale for path in directory.glob(pattern)}:
                if path.relative_to(directory) not in files:
                    path.unlink()
    except BaseException:
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()
        raise


def check_file(
    path: str,
    encoder: nn.Module,
    place: str,
    trained: Mapping[str, torch.Tensor],
    embeddings: Mapping[str, torch.Tensor],
) -> None:
    """Checks what a safetensors file holds for an adapter. Nothing larger than what is expected is read.

    Args:
        path (`str`): The file.
        encoder (`nn.Module`): The encoder of the config, on the meta device.
        place (`str`): Path of the model's input embedding, with which the encoder's keys begin.
        trained (`Mapping[str, torch.Tensor]`): The state of modules trained beside the prompt, by name in the model.
        embeddings (`Mapping[str, torch.Tensor]`):
            The weights that PEFT saves too if the vocabulary was changed: they may be there.

    Raises:
        ValueError:
            The file can't be read, or holds another encoder or other modules, or values of which some, or the prompt
            that comes of them, are NaN or infinite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            names = {key.rpartition(ENCODER_KEY)[2]: key for key in keys if ENCODER_KEY in key}
            others = {key.removeprefix("base_model.model."): key for key in keys if ENCODER_KEY not in key}
            for name, key in names.items():
                if key.removeprefix("base_model.model.") != f"{place}{ENCODER_KEY}{name}":
                    found = key.partition(ENCODER_KEY)[0].removeprefix("base_model.model.")
                    raise ValueError(
                        f"{path} holds a prompt for {found!r}, and the input embedding of this model is {place!r}. It "
                        "was made for another class of model."
                    )
            shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in names.items()}
            _check_shapes(shapes, encoder.state_dict(), path)
            if foreign := sorted(others.keys() - trained.keys() - embeddings.keys()):
                raise ValueError(
                    f"{path} holds {foreign[0]!r}, which is no part of the prompt nor of a module that its config "
                    "trains beside it."
                )
            for name, tensor in {**embeddings, **trained}.items():
                if name not in others and name in embeddings:
                    continue
                if name not in others:
                    raise ValueError(
                        f"{path} lacks {name!r}, which PEFT trains beside the prompt for this task type. An adapter "
                        "that was saved without it can be loaded by `model.load_adapter` of transformers."
                    )
                found = tuple(file.get_slice(others[name]).get_shape())
                if found != (expected := tuple(getattr(tensor, "ds_shape", tensor.shape))):
                    raise ValueError(
                        f"{path}: {name!r} has shape {found}, and the model's has {expected}. Load the model with the "
                        "`num_labels`, and resize its vocabulary to the size, that the adapter was trained with."
                    )
            state = {name: file.get_tensor(key) for name, key in names.items()}
            check_values(state, path)
            for name, key in others.items():
                value = file.get_tensor(key)
                if value.is_floating_point():  # a head may count batches
                    check_values({name: value}, path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error
    _evaluate(encoder, state, path)


def read_prompt(path: str, encoder: nn.Module) -> Any:
    """Reads the prompt that a safetensors file holds for any place in a model, and nothing else of the file.

    Args:
        path (`str`): The file.
        encoder (`nn.Module`): The encoder of the config, on the meta device.

    Returns:
        What the encoder makes in evaluation, float32: vectors (V, H), or keys and values by layer.

    Raises:
        ValueError: The file can't be read, holds no such encoder, or values that are NaN or infinite.
    """
    with _reading(path) as file:
        keys = [key for key in list(file.keys()) if ENCODER_KEY in key]
        shapes = {key.rpartition(ENCODER_KEY)[2]: tuple(file.get_slice(key).get_shape()) for key in keys}
        _check_shapes(shapes, encoder.state_dict(), path)
        state = {key.rpartition(ENCODER_KEY)[2]: file.get_tensor(key) for key in keys}
    check_values(state, path)
    return _evaluate(encoder, state, path)


@torch.no_grad()
def _evaluate(encoder: nn.Module, state: Mapping[str, torch.Tensor], path: str) -> Any:
    made = functional_call(encoder.eval(), {name: value.float() for name, value in state.items()}, ())
    prompt = made if isinstance(made, torch.Tensor) else dict(made)
    by_layer = {} if isinstance(prompt, torch.Tensor) else prompt
    parts = {f"prompt of layer {layer}": torch.cat([key, value], dim=-1) for layer, (key, value) in by_layer.items()}
    check_values(parts or {"prompt": prompt}, path)
    return prompt


@contextmanager
def _reading(path: str) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error


def read_tensors(
    path: str, shapes: Mapping[str, tuple[int, ...]], with_others: bool = True
) -> dict[str, torch.Tensor]:
    """Reads a safetensors file after the shapes of the tensors in `shapes` were checked; only those, or all.

    Raises:
        ValueError: The file can't be read, lacks one of them, or it has another shape.
    """
    with _reading(path) as file:
        keys = list(file.keys())
        for name, expected in shapes.items():
            if name not in keys:
                raise ValueError(f"{path} has no {name!r}.")
            if (found := tuple(file.get_slice(name).get_shape())) != expected:
                raise ValueError(
                    f"{path}: {name!r} has shape {found}, expected {expected}. The adapter was made for a "
                    "model of another width, or its config is another's."
                )
        return {key: file.get_tensor(key) for key in keys if with_others or key in shapes}


def saved_vocabulary(folder: Path, modules_to_save: Sequence[str]) -> Optional[int]:
    """Returns how many rows the vocabulary has that PEFT has saved beside a prompt; `None` if there is none.

    Args:
        folder (`Path`): Folder of the adapter.
        modules_to_save (`Sequence[str]`): Names of the modules that are trained beside the prompt.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    with _reading(str(path)) as file:
        for key in list(file.keys()):
            is_trained = ENCODER_KEY in key or key.endswith(TOKENS_KEY)
            is_head = any(f".{name}." in key for name in modules_to_save)
            shape = file.get_slice(key).get_shape()
            if not is_trained and not is_head and len(shape) == 2:
                return shape[0]
    return None


def check_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Checks the encoder in an adapter's state dict, as [`check_file`] does."""
    found = {key.rpartition(ENCODER_KEY)[2]: value for key, value in state.items() if ENCODER_KEY in key}
    _check_shapes({name: tuple(value.shape) for name, value in found.items()}, expected, "The adapter's state")
    check_values(found, "The adapter's state")


def check_beside(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Checks what is beside the encoder in an adapter's state dict, which is about to be loaded into a model.

    Raises:
        ValueError: A tensor has another shape than the model's, or has NaN or infinite values.
    """
    for key, value in state.items():
        own = None if ENCODER_KEY in key else _tensor_of(model, key)
        if own is None:
            continue  # PEFT has its own word for what the model lacks
        if own.shape != value.shape:
            raise ValueError(
                f"The adapter's state: {key!r} has shape {tuple(value.shape)}, and the model's {tuple(own.shape)}. "
                "The adapter was made for another model, or with another number of labels."
            )
        if value.is_floating_point():
            check_values({key: value}, "The adapter's state")


def _tensor_of(model: nn.Module, key: str) -> Optional[torch.Tensor]:
    """The tensor of a model, or of the model below its adapters, by a key of a `PeftModel`; `None` if it has none."""
    for name in (key, key.removeprefix("base_model.model.")):
        path, _, last = name.rpartition(".")
        try:
            found = getattr(model.get_submodule(path), last)
        except AttributeError:
            continue
        return found if isinstance(found, torch.Tensor) else None  # trained tokens are by adapter there
    return None


def check_values(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises `ValueError` if a tensor has NaN or infinite values, or none that can be trained."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name!r} is of type {tensor.dtype}, no floating point.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name!r} holds NaN or infinite values.")


def _layers(names: Collection[str]) -> set[str]:
    """The layers of a deep prompt that an encoder's tensors are for."""
    return {layer for name in names for kind, _, layer in [name.partition(".")] if kind in ("keys", "values")}


def _check_shapes(found: Mapping[str, tuple], expected: Mapping[str, torch.Tensor], where: str) -> None:
    if not found:
        raise ValueError(f"{where} holds no P-tuning prompt.")
    layers, expected_layers = _layers(found), _layers(expected)
    if bool(layers) != bool(expected_layers):
        depths = ("prompt_depth='INPUT', in front of the input", "prompt_depth='DEEP', in every layer")
        raise ValueError(
            f"{where} holds a prompt of {depths[bool(layers)]}, and its config asks for "
            f"{depths[bool(expected_layers)]}. The two files do not belong together."
        )
    if layers != expected_layers:
        raise ValueError(
            f"{where} holds keys and values for {len(layers)} layers, and the model has {len(expected_layers)}. The "
            "adapter was made for another model."
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{where} lacks {missing} of the prompt encoder that its config asks for.")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{where} holds {unexpected}, which the prompt encoder of its config does not have.")
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise ValueError(
                f"{where}: {name!r} of the prompt encoder has shape {found[name]}, expected {tuple(tensor.shape)}. "
                "The adapter was made for a model of another width, or for another config."
            )
