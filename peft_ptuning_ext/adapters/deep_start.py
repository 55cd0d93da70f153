# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where a deep prompt starts: at keys and values that the model itself makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..backbone import Backbone, table_of
from ..config import PromptInit, PTuningConfig
from ..forward.deep import measure
from ..prompts.deep import Shapes, random_states, shapes_of
from ..prompts.prompt import States
from ..prompts.start import STATES_SAMPLE, spread_ids, starts_at_tokens, token_ids


@dataclass(frozen=True)
class DeepStart:
    """What a pass of the model has shown.

    Args:
        states (`dict[int, tuple]`): Where the prompt starts: keys and values by layer, (1, key-value heads, V, D).
        modules (`dict[int, nn.Module]`): The attention of each layer, where it could be told.
    """

    states: States
    modules: dict[int, nn.Module]

    @property
    def shapes(self) -> Shapes:
        """What each layer takes."""
        return shapes_of(self.states)


def find_deep_start(model: nn.Module, backbone: Backbone, config: PTuningConfig) -> DeepStart:
    """Finds where a deep prompt starts, by one pass of the model over some tokens. The model is not changed.

    Args:
        model (`nn.Module`): The model without the new adapter.
        backbone ([`Backbone`]): Facts about it.
        config ([`PTuningConfig`]): The config of the new adapter.

    Raises:
        ValueError: The model's attention can't be given keys and values, or the text of the start has no tokens.
    """
    stack = model.get_submodule(backbone.name)
    vocabulary = table_of(model.get_submodule(backbone.embedding_path)).num_embeddings
    length = config.num_virtual_tokens
    if starts_at_tokens(config):
        states, modules = measure(stack, backbone, token_ids(config, vocabulary), _first_position(backbone, config))
        return DeepStart(states, modules)
    most = STATES_SAMPLE if backbone.max_positions is None else min(STATES_SAMPLE, backbone.max_positions)
    sample, modules = measure(stack, backbone, spread_ids(vocabulary, most))
    zero_values = config.prompt_tuning_init == PromptInit.ZERO_VALUES
    return DeepStart(random_states(sample, length, zero_values), modules)


def _first_position(backbone: Backbone, config: PTuningConfig) -> int:
    """The position of the first token that the prompt starts at.

    Where positions are rotations, tokens at -V … -1 stand right in front of a text that begins at 0.
    """
    is_rotary = backbone.is_rotary and "position_ids" in backbone.parameters
    return -config.num_virtual_tokens if is_rotary and not config.shift_positions else 0
