# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Encoders of deep prompts: trainable parameters → keys and values of V positions in every layer.

The method is "P-Tuning v2" (Liu et al., 2022, https://huggingface.co/papers/2110.07602, section 3.2). Nothing here
knows transformers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import nn

from ..config import PTuningConfig
from .encoder import hidden_layers, is_partitioned
from .prompt import States


class LayerShape(NamedTuple):
    """What one layer's attention takes in front of its text: `heads` key-value heads, of widths D."""

    heads: int
    key_width: int
    value_width: int

    @property
    def width(self) -> int:
        """How many numbers one position has, keys and values together."""
        return self.heads * (self.key_width + self.value_width)


# By layer, in order.
Shapes = dict[int, LayerShape]
# The items of `States`.
Pairs = tuple[tuple[int, tuple[torch.Tensor, torch.Tensor]], ...]


def shapes_of(states: States) -> Shapes:
    """Returns the shapes of keys and values, each (1, key-value heads, N, D)."""
    return {
        layer: LayerShape(key.shape[1], key.shape[3], value.shape[3]) for layer, (key, value) in sorted(states.items())
    }


def describe(shapes: Shapes) -> str:
    """Says in words what keys and values a model takes, for messages."""
    kinds = sorted(set(shapes.values()))
    sizes = " or ".join(f"{kind.heads} key-value heads of {kind.key_width}" for kind in kinds)
    return f"{len(shapes)} layers with {sizes}"


class _ByLayer(nn.Module):
    """Keys, or values, of all layers: one parameter for each, by its number.

    It is called for its parameters, because DeepSpeed ZeRO-3 gathers them when their module is called.
    """

    def forward(self) -> list[torch.Tensor]:
        return list(self.parameters())


class DeepPromptEncoder(nn.Module):
    """Plain trainable keys and values (Liu et al., 2022, section 3.2).

    Args:
        config ([`PTuningConfig`]): Length V, and dropout on what comes out.
        width (`int`): Width H of the model's input embedding.
        shapes (`dict[int, LayerShape]`): What each layer takes.
    """

    parameters_class = _ByLayer
    placeholder_id = None  # it stands in no text

    def __init__(self, config: PTuningConfig, width: int, shapes: Shapes):
        super().__init__()
        length = self.num_virtual_tokens = config.num_virtual_tokens
        self.gathered_constants: dict[str, torch.Tensor] = {}  # as of `PromptEncoder`
        self.shift_positions = config.shift_positions
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.shapes = dict(sorted(shapes.items()))
        self.keys, self.values = self.parameters_class(), self.parameters_class()
        for layer, shape in self.shapes.items():
            for kind, width in ((self.keys, shape.key_width), (self.values, shape.value_width)):
                kind.register_parameter(str(layer), nn.Parameter(torch.zeros(shape.heads, length, width)))

    def forward(self) -> Pairs:
        """Returns keys and values by layer, each (1, key-value heads, V, D), in the dtype of the parameters.

        They come as pairs for `dict`: DeepSpeed ZeRO-3 fails on a module that returns a dict with numbers as keys.
        """
        return self._drop(self._constants())

    @torch.no_grad()
    def start_at(self, states: States) -> None:
        """Sets the parameters so that `forward()` returns `states` in evaluation."""
        for layer, own in self._constants().items():
            for state, value in zip(own, states[layer], strict=True):
                state.copy_(value)

    def freeze_constants(self) -> None:
        """Freezes the parameters that are never trained, after all of them were made trainable."""

    def _constants(self) -> States:
        pairs = zip(self.shapes, self.keys(), self.values(), strict=True)
        return {layer: (key[None], value[None]) for layer, key, value in pairs}

    def _drop(self, states: States) -> Pairs:
        if not self.training or self.dropout.p == 0:
            return tuple(states.items())
        return tuple((layer, (self.dropout(key), self.dropout(value))) for layer, (key, value) in states.items())


class _Constants(_ByLayer):
    """Parameters that are never trained."""

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        # transformers replaces a parameter that it loads by a trainable one.
        super().register_parameter(name, None if param is None else param.requires_grad_(False))


class DeepMLPEncoder(DeepPromptEncoder):
    """A perceptron from V vectors to all keys and values (Liu et al., 2022, section 3.3, "reparameterization").

    Its keys and values are constants, which make the start what was asked for. They are saved and stay frozen.
    """

    parameters_class = _Constants

    def __init__(self, config: PTuningConfig, width: int, shapes: Shapes):
        super().__init__(config, width, shapes)
        self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
        sizes = [width] + [config.encoder_hidden_size] * config.encoder_num_layers
        outputs = sum(shape.width for shape in shapes.values())
        self.mlp = nn.Sequential(*hidden_layers(sizes, 0), nn.Linear(sizes[-1], outputs))

    def freeze_constants(self) -> None:
        for constants in (self.keys, self.values):
            constants.requires_grad_(False)

    def reparameterize(self, embedding: torch.Tensor) -> States:
        """Maps (V, H) to keys and values by layer, each (1, key-value heads, V, D)."""
        states = {}
        parts = self.mlp(embedding).split([shape.width for shape in self.shapes.values()], dim=1)
        for (layer, shape), part in zip(self.shapes.items(), parts, strict=True):
            by_head = part.unflatten(1, (shape.heads, -1)).transpose(0, 1)[None]  # (1, heads, V, D of both)
            states[layer] = tuple(by_head.split([shape.key_width, shape.value_width], dim=-1))
        return states

    def forward(self) -> Pairs:
        made, constants = self.reparameterize(self.embedding), self._constants()
        if is_partitioned(self.embedding):
            self.gathered_constants = {
                f"{kind}.{layer}": state[0].detach().clone()
                for layer, pair in constants.items()
                for kind, state in zip(("keys", "values"), pair, strict=True)
            }
        return self._drop({layer: _pairwise(operator.add, made[layer], constants[layer]) for layer in made})

    @torch.no_grad()
    def start_at(self, states: States) -> None:
        made = self.reparameterize(self.embedding)
        super().start_at({layer: _pairwise(operator.sub, states[layer], made[layer]) for layer in states})


def _pairwise(function: Callable, one: tuple, other: tuple) -> tuple:
    """`function` of both keys, and of both values."""
    return tuple(map(function, one, other))


def random_states(sample: States, length: int, zero_values: bool = False) -> States:
    """Draws V = `length` keys and values at the scale of the model's own.

    Args:
        sample (`dict[int, tuple]`): Keys and values that the model makes of some tokens, each (1, heads, N, D).
        length (`int`): V.
        zero_values (`bool`): Whether all values are 0, so that the prompt says nothing yet.

    Returns:
        `dict[int, tuple]`: Normal numbers, with the mean and standard deviation of each channel over the N tokens.
    """

    def draw(states: torch.Tensor) -> torch.Tensor:
        mean, std = states.mean(2, keepdim=True), states.std(2, keepdim=True, correction=0)
        # Drawn on the CPU, so that a seed gives the same prompt on every device.
        return mean + std * torch.randn(1, states.shape[1], length, states.shape[3]).to(states.device)

    return {
        layer: (draw(key), torch.zeros_like(draw(value)) if zero_values else draw(value))
        for layer, (key, value) in sample.items()
    }


def to_table(states: States) -> torch.Tensor:
    """Keys and values, each (1, key-value heads, V, D), as one row for each position: layer by layer, keys first."""
    return torch.cat([state[0].transpose(0, 1).flatten(1) for pair in states.values() for state in pair], dim=1)


def states_of(table: torch.Tensor, shapes: Shapes) -> States:
    """What [`to_table`] has made a table of, for layers of these shapes."""
    widths = [shape.heads * width for shape in shapes.values() for width in (shape.key_width, shape.value_width)]
    parts = iter(table.split(widths, dim=1))
    return {
        layer: tuple(next(parts).unflatten(1, (shape.heads, -1)).transpose(0, 1).contiguous()[None] for _ in range(2))
        for layer, shape in shapes.items()
    }


def cast(states: States, dtype: Optional[torch.dtype]) -> States:
    """Keys and values in `dtype`; as they are for `None`."""
    return {layer: (key.to(dtype), value.to(dtype)) for layer, (key, value) in states.items()} if dtype else states


def without_batch(states: States) -> States:
    """By layer, keys and values as (key-value heads, V, D)."""
    return {layer: (key[0], value[0]) for layer, (key, value) in states.items()}
