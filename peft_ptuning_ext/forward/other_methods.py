# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters of other methods inside the backbone: what decides their output, beside their tensors.

The keys and values of a prompt are made by the whole backbone, with what a LoRA adds to it. So they can be stored as
long as the LoRA does the same.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from peft.tuners.ia3 import layer as ia3
from peft.tuners.lora import layer as lora
from peft.tuners.lora import variants
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from ..prompts.layer import PTuningLayer


# Layers whose output follows from their input, their tensors, and what `settings_of` returns. A class that is derived
# from one of them may do anything else.
KNOWN_LAYERS = {
    *(lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d),
    *(ia3.Linear, ia3.Conv2d, ia3.Conv3d),
    TrainableTokensLayer,
}
KNOWN_WRAPPERS = (ModulesToSaveWrapper, TrainableTokensWrapper)

# Variants of LoRA of which the same is true.
KNOWN_VARIANTS = {
    *(variants.DoraLinearVariant, variants.DoraEmbeddingVariant),
    *(variants.DoraConv1dVariant, variants.DoraConv2dVariant, variants.DoraConv3dVariant),
}


def is_of_another_method(module: nn.Module) -> bool:
    """Whether a module belongs to adapters of another method, unless it is a `PTuningLayer`."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def settings_of(module: nn.Module) -> Optional[tuple[Any, ...]]:
    """What decides the output of a layer of another method beside its tensors; `None` if not all of it can be told.

    Args:
        module (`nn.Module`): The layer, of which [`is_of_another_method`] is true.
    """
    if type(module) not in KNOWN_LAYERS and not isinstance(module, KNOWN_WRAPPERS):
        return None
    plain = vars(module)
    if any(type(variant) not in KNOWN_VARIANTS for variant in plain.get("lora_variant", {}).values()):
        return None
    scaling = tuple(plain.get("scaling", {}).items())
    return module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters), scaling


def state_of_others(stack: nn.Module) -> list[tuple[Any, ...]]:
    """What tells whether the adapters of other methods in a backbone do what they did before.

    Args:
        stack (`nn.Module`): The backbone. Its base weights are left out, except those that have such an adapter.
    """
    others = [module for module in stack.modules() if is_of_another_method(module)]
    others = [module for module in others if not isinstance(module, PTuningLayer)]
    return [(settings_of(module), *map(_value_of, module.parameters())) for module in others]


def _value_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
