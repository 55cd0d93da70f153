# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A new adapter made of others: their weighted sum, or one behind the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import PTuningConfig
from ..prompts.adapter import Adapter
from ..prompts.prompt import States


# How adapters may be combined.
COMBINATIONS = ("linear", "cat")

# What must be the same in all of them, because the new adapter has it once.
OF_ALL = ("prompt_depth", "shift_positions", "prompt_stacks")


def check_combination(adapters: Sequence[Adapter], weights: Sequence[float], combination_type: str) -> None:
    """Refuses what can't be combined.

    Args:
        adapters (`Sequence[Adapter]`): What is to be combined.
        weights (`Sequence[float]`): A number for each.
        combination_type (`str`): `"linear"` or `"cat"`.

    Raises:
        ValueError: There is no such combination, or these adapters have none.
    """
    names = [adapter.name for adapter in adapters]
    if combination_type not in COMBINATIONS:
        raise ValueError(f"`combination_type` must be one of {list(COMBINATIONS)}, got {combination_type!r}.")
    if not names or len(names) != len(weights):
        raise ValueError(f"`weights` must have a number for each of the adapters {names}, got {list(weights)}.")
    if combination_type == "cat" and any(weight != 1 for weight in weights):
        raise ValueError(
            f"Prompts that stand one behind the other (`cat`) have no weights but 1, got {list(weights)}."
        )
    first = adapters[0].config
    for adapter in adapters:
        config = adapter.config
        for field in ("modules_to_save", "trainable_token_indices", "prompt_template"):
            if getattr(config, field):
                raise ValueError(
                    f"Adapter {adapter.name!r} has `{field}`, for which a combination has no rule. Combine adapters "
                    "of prompts alone."
                )
        if differing := [field for field in OF_ALL if getattr(config, field) != getattr(first, field)]:
            raise ValueError(f"The adapters {names} differ in `{differing[0]}`, and can't be combined.")
        if combination_type == "linear" and config.num_virtual_tokens != first.num_virtual_tokens:
            lengths = [adapter.config.num_virtual_tokens for adapter in adapters]
            raise ValueError(f"A weighted sum (`linear`) needs prompts of one length, and {names} have {lengths}.")


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], combination_type: str
) -> tuple[PTuningConfig, torch.Tensor | States]:
    """The config of the new adapter, which has no network, and its vectors (V, H) or keys and values by layer."""
    config = adapters[0].config.of_plain_prompt()
    config.forget_start()
    if combination_type == "cat":
        config.num_virtual_tokens = sum(adapter.config.num_virtual_tokens for adapter in adapters)

    def join(values: Sequence[torch.Tensor]) -> torch.Tensor:
        if combination_type == "cat":
            return torch.cat([*values], dim=-2)
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    if not config.is_deep:
        return config, join([adapter.prompt() for adapter in adapters])
    parts = [adapter.states() for adapter in adapters]
    return config, {
        layer: tuple(join(kind) for kind in zip(*(part[layer] for part in parts), strict=True)) for layer in parts[0]
    }
