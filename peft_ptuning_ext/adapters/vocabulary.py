# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a model with prompts: rows of it that are trained beside a prompt, its size, and what is tied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    set_additional_trainable_modules,
)
from torch import nn
from transformers import PreTrainedModel

from ..config import check_token_indices
from ..files.checkpoint import TOKENS_KEY
from ..prompts.layer import PTuningLayer


# What `trainable_token_indices` may be: ids for the input embedding, or for each embedding by name.
TokenIndices = Optional[list[int] | dict[str, list[int]]]


def token_rows(
    model: nn.Module, embedding_path: str, indices: TokenIndices, modules_to_save: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Checks the rows that `trainable_token_indices` names, and tells their shapes, before anything is changed.

    Args:
        model (`nn.Module`): The model without the new adapter.
        embedding_path (`str`): Path of the input embedding that the prompt belongs to.
        indices (`list[int]` or `dict[str, list[int]]`, *optional*): The config's `trainable_token_indices`.
        modules_to_save (`Sequence[str]`): Names of the modules that are trained in full.

    Returns:
        `dict[str, torch.Tensor]`: By the name under which PEFT saves them, tensors on the meta device.

    Raises:
        ValueError: There is no such embedding or row, or `modules_to_save` names the module too.
    """
    check_token_indices(indices)
    if indices is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(indices, dict):
        table = _input_embedding(model)
        indices = {next((name for name, module in modules.items() if module is table), "embed_tokens"): indices}
    rows = {}
    for target, ids in indices.items():
        paths = [name for name in modules if name.endswith(target)]
        if not paths:
            raise ValueError(
                f"`trainable_token_indices` names {target!r}, and {type(model).__name__} has no such module. "
                "Name the input embedding, or give a list of ids for it."
            )
        for path in paths:
            if path.endswith(tuple(modules_to_save)):
                raise ValueError(
                    f"{path!r} is named by `trainable_token_indices` and by `modules_to_save`. Name it in one."
                )
            shape = _shape_of_rows(path, modules[path], ids)
            rows[_path_inside(path, embedding_path) + TOKENS_KEY] = torch.empty(shape, device="meta")
    return rows


def _shape_of_rows(path: str, module: nn.Module, ids: list[int]) -> tuple[int, int]:
    table = _bare(module)
    if not isinstance(table, (nn.Embedding, nn.Linear)):
        raise ValueError(
            f"`trainable_token_indices` names {path!r}, a {type(table).__name__} and no table of tokens. Name the "
            "input embedding, or give a list of ids for it."
        )
    if max(ids) >= len(table.weight):
        raise ValueError(
            f"`trainable_token_indices` has id {max(ids)}, and {path!r} has {len(table.weight)} rows. Call "
            "`resize_token_embeddings` first."
        )
    return len(ids), table.weight.shape[1]


def embedding_state(
    model: nn.Module, embedding_path: str, rows: dict[str, torch.Tensor], modules_to_save: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The weights of input and output embedding, by the names under which PEFT saves them if it does.

    Args:
        model (`nn.Module`): The model without the new adapter.
        embedding_path (`str`): Path of the input embedding that the prompt belongs to.
        rows (`dict[str, torch.Tensor]`): What [`token_rows`] returns.
        modules_to_save (`Sequence[str]`): Names of the modules that are trained in full.
    """
    state, table, head = {}, _input_embedding(model), _output_embedding(model)
    for name, module in model.named_modules():
        if module is table:
            names = [_path_inside(name, embedding_path)]
        elif module is head:
            is_trained = name.endswith(tuple(modules_to_save))
            names = [name, f"{name}.original_module", f"{name}.modules_to_save"] if is_trained else [name]
        else:
            continue
        if rows:
            names += [f"{name}.token_adapter.base_layer" for name in names]
            state[name + TOKENS_KEY] = next(iter(rows.values()))
        weights = _bare(module).state_dict()
        state |= {f"{name}.{key}": value for name in names for key, value in weights.items()}
    return state


def train_token_rows(
    model: nn.Module, adapter_name: str, indices: TokenIndices, inference_mode: bool, is_active: bool
) -> None:
    """Puts PEFT's wrapper for trained rows inside the tuner layer, and around what is tied to the embedding.

    Args:
        model (`nn.Module`): The model with the tuner layer.
        adapter_name (`str`): Name of the adapter.
        indices (`list[int]` or `dict[str, list[int]]`): The config's `trainable_token_indices`.
        inference_mode (`bool`): Whether the rows are loaded for inference.
        is_active (`bool`): Whether the adapter is active; otherwise its rows are not used yet.

    Raises:
        ValueError: A module with trained rows has a bias.
    """
    model_config = BaseTuner.get_model_config(model)
    if isinstance(_output_embedding(model), ModulesToSaveWrapper):  # the head is trained in full, by itself
        model_config = {**model_config, "tie_word_embeddings": False}
    config = SimpleNamespace(trainable_token_indices=indices, inference_mode=inference_mode, modules_to_save=None)
    with _without_tuner_layer(model):
        set_additional_trainable_modules(model, config, model_config, adapter_name, activate_adapter=is_active)
    allow_adapters_without_rows(model)
    for name, module in model.named_modules():
        if not isinstance(module, TrainableTokensWrapper):
            continue
        if not is_active and adapter_name in module.active_adapters:  # PEFT activates what is tied
            module.set_adapter([])
        if getattr(module.original_module, "bias", None) is not None:
            raise ValueError(
                f"`trainable_token_indices` trains rows of {name!r}, which has a bias, and PEFT's TrainableTokens "
                "would leave the bias out. Untie it from the input embedding, or leave the field out."
            )


def allow_adapters_without_rows(model: nn.Module) -> None:
    """Lets adapters be saved and loaded that train no rows, on a model of which another adapter trains some."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.__class__ = TokenRowsWrapper


class TokenRowsWrapper(TrainableTokensWrapper):
    """PEFT's wrapper for trained rows, which fails to save and load a model's adapters that train none."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._adapters else {}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._adapters else {}


def allow_resizing_and_tying(model: nn.Module, embedding_path: str) -> None:
    """Gives each transformers model around the tuner layer methods that resize and tie what the layer is around.

    transformers' own do so with plain embeddings only.
    """
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and f"{embedding_path}.".startswith(f"{name}." if name else ""):
            module.resize_token_embeddings = ResizeTokenEmbeddings(module)
            module.tie_weights = TieWeights(module)


def restore_resizing_and_tying(model: nn.Module) -> None:
    """Gives each transformers model its own methods back."""
    for module in model.modules():
        for name in ("resize_token_embeddings", "tie_weights"):
            if isinstance(vars(module).get(name), (ResizeTokenEmbeddings, TieWeights)):
                delattr(module, name)


class ResizeTokenEmbeddings:
    """Stands in for `resize_token_embeddings` of a transformers model that has the tuner layer."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        model = self.model
        _, layer = _find_tuner_layer(model)
        for module in (layer.base_layer, _input_embedding(model), _output_embedding(model)):
            if isinstance(module, AuxiliaryTrainingWrapper):
                raise ValueError(
                    "An adapter trains rows of the vocabulary or the output embedding (`trainable_token_indices`, "
                    "`modules_to_save`), which keep their size. Get the base model back with `unload()`, resize it, "
                    "and add the adapter then."
                )
        with _without_tuner_layer(model):
            return type(model).resize_token_embeddings(model, *args, **kwargs)


class TieWeights:
    """Stands in for `tie_weights` of a transformers model that has the tuner layer.

    transformers looks for weights under the names that they have in the base model, and sets them there.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with _bare_modules(self.model):
            type(self.model).tie_weights(self.model, *args, **kwargs)


@contextmanager
def _bare_modules(model: nn.Module) -> Iterator[None]:
    """Inside, the modules of the base model stand in their places, without the tuner layer and PEFT's wrappers."""
    wrappers: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_inside = any(name.startswith(f"{outer}.") for outer in wrappers)
        if isinstance(module, (PTuningLayer, AuxiliaryTrainingWrapper)) and not is_inside:
            wrappers[name] = module
    for name, module in wrappers.items():
        model.set_submodule(name, _bare(module))
    try:
        yield
    finally:
        for name, module in wrappers.items():
            model.set_submodule(name, module)


@contextmanager
def _without_tuner_layer(model: nn.Module) -> Iterator[None]:
    """Inside, the embedding stands in the model without the tuner layer; behind, the layer is around it again.

    PEFT and transformers find an embedding, and what is tied to it, only if nothing of ours is around it.
    """
    path, layer = _find_tuner_layer(model)
    model.set_submodule(path, layer.base_layer)
    try:
        yield
    finally:
        layer.base_layer = model.get_submodule(path)
        model.set_submodule(path, layer)


def _find_tuner_layer(model: nn.Module) -> tuple[str, PTuningLayer]:
    return next((name, module) for name, module in model.named_modules() if isinstance(module, PTuningLayer))


def _input_embedding(model: nn.Module) -> Optional[nn.Module]:
    """The input embedding with what stands around it; `None` if the model is none of transformers."""
    return getattr(model, "get_input_embeddings", lambda: None)()


def _output_embedding(model: nn.Module) -> Optional[nn.Module]:
    """The head over the vocabulary with what stands around it; `None` if the model has none."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _bare(module: nn.Module) -> nn.Module:
    """The module of the base model, below the tuner layer and PEFT's wrappers."""
    while isinstance(module, (PTuningLayer, AuxiliaryTrainingWrapper)):
        module = module.base_layer if isinstance(module, PTuningLayer) else module.original_module
    return module


def _path_inside(path: str, embedding_path: str) -> str:
    """The path that an embedding has once the tuner layer is there."""
    return f"{path}.base_layer" if path == embedding_path else path
