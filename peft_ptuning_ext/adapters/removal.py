# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Removes adapters from a model, after use or after an error, and with the last of them all that was put into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..files.checkpoint import ENCODER_KEY
from ..forward.wrap import detach
from ..prompts.adapter import find_layer, find_stack
from ..prompts.layer import PTuningLayer
from .by_row import remove_hooks
from .requires_grad import requires_grad_by_name, restore_requires_grad
from .vocabulary import restore_resizing_and_tying


def remove_adapters(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Removes adapters; with the last of them the backbone's wrapping, the tuner layer and that of trained modules.

    Adapters of another model around the same backbone stay, and so do those of other methods.

    Args:
        model (`nn.Module`): The model with the tuner layer.
        adapter_names (`Iterable[str]`): Names of the adapters. Those that the model does not have are no error.
    """
    names = set(adapter_names)
    for path, module in reversed(list(model.named_modules())):  # what is inside first
        if isinstance(module, PTuningLayer):
            _remove_prompts(model, path, module, names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            _remove_trained_copies(model, path, module, names)
    if find_layer(model) is None:
        if find_stack(model) is not None:  # somebody has replaced the embedding, and the tuner layer with it
            detach(model)
        restore_resizing_and_tying(model)
        remove_hooks(model)


def _remove_prompts(model: nn.Module, path: str, layer: PTuningLayer, names: set[str]) -> None:
    stack = find_stack(model)
    for name in names & layer.ptuning_encoders.keys():
        del layer.ptuning_encoders[name]
        stack.ptuning.states.drop(name)
    if not layer.ptuning_encoders and layer.bank is None:
        if stack is not None:  # else attaching has failed
            detach(model)
        getattr(model, "hf_device_map", {}).pop(f"{path}{ENCODER_KEY}".rstrip("."), None)
        model.set_submodule(path, layer.base_layer)
        _renew_gradient_hooks(model)
        return
    if names & set(layer.active_adapters):
        layer.set_adapter(next(iter(layer.ptuning_encoders), []))
    layer.enable_without_adapters()


def _renew_gradient_hooks(model: nn.Module) -> None:
    """Puts the hooks of `enable_input_require_grads`, which were on the tuner layer, on the embedding in its place."""
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()
            module.enable_input_require_grads()


def _remove_trained_copies(model: nn.Module, path: str, wrapper: AuxiliaryTrainingWrapper, names: set[str]) -> None:
    if wrapper._adapters <= names:
        model.set_submodule(path, wrapper.original_module)
        return
    others = [name for name in wrapper.active_adapters if name not in names]
    for name in names & wrapper._adapters:
        wrapper.delete_adapter(name, new_active_adapters=others)


@contextmanager
def undone_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Inside, an adapter is added. After an error it is removed, and those that were active before are again."""
    requires_grad = requires_grad_by_name(model)
    active = {
        module: module.active_adapter
        for module in model.modules()
        if isinstance(module, (PTuningLayer, AuxiliaryTrainingWrapper))
    }
    try:
        yield
    except BaseException:
        remove_adapters(model, [adapter_name])
        for module, names in active.items():
            module.set_adapter(names)
        restore_requires_grad(model, requires_grad)
        raise
