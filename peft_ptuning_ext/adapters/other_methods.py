# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters of other methods on a model with prompts: made active together with a prompt, or without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..config import PTuningConfig
from ..prompts.layer import PTuningLayer


# What to do about two adapters that train the same module, such as a head.
ONE_COPY = (
    "Only one copy can be used at a time. Let one adapter train the module: leave `task_type` and `modules_to_save` "
    "out of the config of the other."
)


# Modules of adapters, of this method and of others.
KINDS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def has_other_methods(model: nn.Module) -> bool:
    """Whether layers of other methods are in a model."""
    return any(isinstance(module, KINDS) and not isinstance(module, PTuningLayer) for module in model.modules())


def check_copies(model: nn.Module, config: PTuningConfig) -> None:
    """Refuses to train a module in full of which an adapter of another method has a copy already.

    Args:
        model (`nn.Module`): The model without the new prompt.
        config ([`PTuningConfig`]): The config of the new prompt.

    Raises:
        ValueError: One of its `modules_to_save` has such a copy.
    """
    endings, prompts = tuple(config.modules_to_save or ()), _prompts(model)
    for name, module in model.named_modules():
        is_copied = isinstance(module, ModulesToSaveWrapper) and name.endswith(endings)
        if is_copied and (others := module._adapters - prompts):
            raise ValueError(f"Adapter {min(others)!r} has a copy of {name!r}, and the prompt another. {ONE_COPY}")


def activate(model: nn.Module, names: Sequence[str], inference_mode: bool = False) -> None:
    """Makes exactly these adapters active, whichever methods they are of, and trains them unless in inference mode.

    Each layer gets the names that it has. PEFT's `set_adapter` hands all names to all layers, with which the layers of
    its TrainableTokens fail at the next call.

    Args:
        model (`nn.Module`): The model with the adapters.
        names (`Sequence[str]`): Which of them.
        inference_mode (`bool`, defaults to `False`): Whether they are frozen.

    Raises:
        ValueError: Two of them can't be active together, or train the same module in full.
    """
    for module, found in check_together(model, names).items():
        if module.merged_adapters and set(module.merged_adapters) != set(found):
            message = f"Adapters {module.merged_adapters} are merged. They are unmerged to make others active."
            warnings.warn(message, stacklevel=3)
            module.unmerge()
        module.set_adapter(list(names) if isinstance(module, PTuningLayer) else found, inference_mode=inference_mode)


def check_together(model: nn.Module, names: Sequence[str]) -> dict[nn.Module, list[str]]:
    """Refuses adapters that can't be active together; returns which of them each module has.

    Args:
        model (`nn.Module`): The model with the adapters.
        names (`Sequence[str]`): Which of them.

    Raises:
        ValueError: Two of them train the same module in full, one is there twice, or has a template beside others.
    """
    modules = [module for module in model.modules() if isinstance(module, KINDS)]
    own = {module: [name for name in names if name in module._get_available_adapters()] for module in modules}
    for module, found in own.items():
        if isinstance(module, PTuningLayer):
            module.check_together(found)
        elif len(found) > 1 and isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"Adapters {found} each have a copy of the same {type(module.original_module).__name__}. {ONE_COPY}"
            )
    return own


@contextmanager
def keeping_others_active(model: nn.Module) -> Iterator[None]:
    """Inside, a prompt is made active; modules that adapters of other methods train in full stay as they were.

    PEFT would switch them off, because the prompt has no copy of them.
    """
    prompts, before = _prompts(model), []
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            others = [name for name in module.active_adapters if name not in prompts]
            before.append((module, others, [(p, p.requires_grad) for p in module.parameters()]))
    yield
    for module, others, parameters in before:
        if others and not module.active_adapters:
            module.set_adapter(others)
            for parameter, requires_grad in parameters:
                parameter.requires_grad_(requires_grad)


def _prompts(model: nn.Module) -> set[str]:
    """Names of all prompts of a model."""
    return {name for module in model.modules() if isinstance(module, PTuningLayer) for name in module.ptuning_encoders}
