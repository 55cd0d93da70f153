# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where a deep prompt starts: at keys and values that the model itself makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..backbone import Backbone, max_positions, table_of
from ..config import PromptInit, PTuningConfig
from ..forward import deep, deep_decoder
from ..prompts.deep import Shapes, random_states, shapes_of
from ..prompts.prompt import States
from ..prompts.start import STATES_SAMPLE, spread_ids, starts_at_tokens, token_ids


@dataclass(frozen=True)
class DeepStart:
    """What a pass of the model has shown, and where a prompt starts.

    Args:
        config ([`PTuningConfig`]): The config of the new adapter.
        measured (`dict[int, tuple]`): Keys and values by layer that the model makes of N tokens, (1, heads, N, D).
        modules (`dict[int, nn.Module]`): The attention of each layer of the backbone, where it could be told.
    """

    config: PTuningConfig
    measured: States
    modules: dict[int, nn.Module]

    @property
    def shapes(self) -> Shapes:
        """What each layer takes."""
        return shapes_of(self.measured)

    def states(self) -> States:
        """Returns the keys and values at which the prompt starts, each (1, key-value heads, V, D)."""
        if _is_of_tokens(self.config):
            return self.measured
        zero_values = self.config.prompt_tuning_init == PromptInit.ZERO_VALUES
        return random_states(self.measured, self.config.num_virtual_tokens, zero_values)


def find_deep_start(model: nn.Module, backbone: Backbone, config: PTuningConfig) -> DeepStart:
    """Finds where a deep prompt starts, by one pass of the model over some tokens. The model is not changed.

    Args:
        model (`nn.Module`): The model without the new adapter.
        backbone ([`Backbone`]): Facts about it.
        config ([`PTuningConfig`]): The config of the new adapter.

    Raises:
        ValueError: The model's attention can't be given keys and values, the text of the start has no tokens, or what
            the model makes of the tokens is NaN or infinite.
    """
    stacks = _stacks(model, backbone, config)
    stack = model.get_submodule(backbone.name)
    vocabulary = table_of(model.get_submodule(backbone.embedding_path)).num_embeddings
    if _is_of_tokens(config):
        ids, first_position = token_ids(config, vocabulary), _first_position(backbone, config)
        advice = "Choose a smaller `num_virtual_tokens` or prompt_tuning_init='RANDOM'."
        _check_length(stacks, f"A deep prompt that starts at tokens is {len(ids)} of them here", len(ids), advice)
    else:
        limits = [limit for each in stacks if (limit := max_positions(each)) is not None]
        ids, first_position = spread_ids(vocabulary, min([STATES_SAMPLE, *limits])), 0
    measured, modules = {}, {}
    if config.is_in_encoder:
        measured, modules = deep.measure(stack, backbone, ids, first_position)
    if config.is_in_decoder:
        decoder = model.get_submodule(backbone.decoder)
        measured = measured | deep_decoder.measure(stack, decoder, ids, first_position)
    if config.prompt_tuning_init != PromptInit.ADAPTER and not config._from_file:  # it starts at what was measured
        _check_finite(stack, measured)
    return DeepStart(config, measured, modules)


def states_of_vectors(model: nn.Module, backbone: Backbone, config: PTuningConfig, vectors: torch.Tensor) -> States:
    """Returns what the model itself makes of a prompt at its input, as the start of a deep one.

    Args:
        model (`nn.Module`): The model without the new adapter.
        backbone ([`Backbone`]): Facts about it.
        config ([`PTuningConfig`]): The config of the new adapter.
        vectors (`torch.Tensor`): The prompt at the input, (V, H).

    Returns:
        `dict[int, tuple]`: Keys and values by layer, each (1, key-value heads, V, D).

    Raises:
        ValueError: The model can't read V vectors, or what it makes of them is NaN or infinite.
    """
    what = f"The prompt at which a deep one starts has {len(vectors)} vectors"
    advice = "Start at a shorter prompt, or choose prompt_tuning_init='RANDOM'."
    _check_length(_stacks(model, backbone, config), what, len(vectors), advice)
    stack = model.get_submodule(backbone.name)
    table = table_of(model.get_submodule(backbone.embedding_path)).weight
    vectors = vectors.to(table.dtype if table.is_floating_point() else stack.dtype)
    states = deep.measure(stack, backbone, vectors, _first_position(backbone, config))[0]
    _check_finite(stack, states)
    return states


def _stacks(model: nn.Module, backbone: Backbone, config: PTuningConfig) -> list[nn.Module]:
    """The stacks that read tokens here: an encoder reads those of its decoder, too."""
    paths = [backbone.name, backbone.decoder] if config.is_in_decoder else [backbone.name]
    return [model.get_submodule(path) for path in paths]


def _is_of_tokens(config: PTuningConfig) -> bool:
    """Whether the prompt starts at what the model makes of V tokens. V of a file's config is not known to be right."""
    return starts_at_tokens(config) and not config._from_file


def _check_length(stacks: list[nn.Module], what: str, length: int, advice: str) -> None:
    """Refuses a start that is longer than what the model can read."""
    for stack in stacks:
        if (limit := max_positions(stack)) is not None and length > limit:
            raise ValueError(f"{what}, and {type(stack).__name__} can read {limit}. {advice}")


def _check_finite(stack: nn.Module, states: States) -> None:
    """Refuses a start that is NaN or infinite. A model in float16 makes such numbers where they exceed 65,504."""
    found = [state for pair in states.values() for state in pair if not state.is_meta]
    if not all(state.isfinite().all() for state in found):
        raise ValueError(
            f"{type(stack).__name__} in {stack.dtype} gives the deep prompt keys and values to start at, and some of "
            "them are NaN or infinite. If the model is in float16, load it in bfloat16 or float32. Otherwise look for "
            "NaN and infinite values in its weights."
        )


def _first_position(backbone: Backbone, config: PTuningConfig) -> int:
    """The position of the first token that the prompt starts at.

    Where positions are rotations, tokens at -V … -1 stand right in front of a text that begins at 0.
    """
    is_rotary = backbone.is_rotary and "position_ids" in backbone.parameters
    return -config.num_virtual_tokens if is_rotary and not config.shift_positions else 0
