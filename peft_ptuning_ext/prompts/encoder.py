# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt encoders: trainable parameters → the prompt P of shape (V, H). Nothing here knows transformers.

A new encoder is one class with one tensor function, `reparameterize`, and a line in `build.ENCODERS`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Optional

import torch
from torch import nn

from ..config import PTuningConfig


class PromptEncoder(nn.Module):
    """Plain trainable vectors: the parameters are the prompt (Lester et al., 2021, section 2).

    Args:
        config ([`PTuningConfig`]): Length V and the sizes of the network.
        width (`int`): Width H of the model's input embedding.

    Under DeepSpeed ZeRO-3, `gathered_constants` are copies of the parameters that are never trained, by name. Trainer
    leaves out what is frozen when it saves, and the one process that writes can't gather it.
    """

    def __init__(self, config: PTuningConfig, width: int):
        super().__init__()
        self.num_virtual_tokens = config.num_virtual_tokens
        self.gathered_constants: dict[str, torch.Tensor] = {}
        template = config.prompt_template
        self.placeholder_id = None if template is None else template.placeholder_id
        self.embedding = nn.Parameter(torch.zeros(config.num_virtual_tokens, width))

    def forward(self) -> torch.Tensor:
        """Returns the prompt, shape (V, H), in the dtype of the parameters."""
        return self.embedding

    @torch.no_grad()
    def start_at(self, prompt: torch.Tensor) -> None:
        """Sets the parameters so that `forward()` returns `prompt`, shape (V, H)."""
        self.embedding.copy_(prompt)

    def freeze_constants(self) -> None:
        """Freezes the parameters that are never trained, after all of them were made trainable."""


class _NetworkEncoder(PromptEncoder):
    """`embedding` (V, H) → `reparameterize` → (V, H), plus a constant that makes the start what was asked for.

    A random network maps all of its inputs to nearly the same point, far from the model's embeddings. The constant
    `offset` (V, H) moves that start to the chosen vectors. It is saved with the encoder and stays frozen.
    """

    def __init__(self, config: PTuningConfig, width: int):
        super().__init__(config, width)
        # A parameter, not a buffer: trainers that copy an adapter, such as TRL's for DPO, copy its parameters only.
        self.offset = nn.Parameter(torch.zeros_like(self.embedding))

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        super().register_parameter(name, param)
        # transformers replaces a parameter that it loads by a trainable one.
        if name == "offset":
            self.freeze_constants()

    def freeze_constants(self) -> None:
        self.offset.requires_grad_(False)

    def reparameterize(self, embedding: torch.Tensor) -> torch.Tensor:
        """Maps (V, H) to (V, H)."""
        raise NotImplementedError

    def forward(self) -> torch.Tensor:
        if is_partitioned(self.offset):
            self.gathered_constants = {"offset": self.offset.detach().clone()}
        return self.reparameterize(self.embedding) + self.offset

    @torch.no_grad()
    def start_at(self, prompt: torch.Tensor) -> None:
        super().start_at(prompt)
        was_training = self.training
        self.eval()  # dropout would leave its noise in the constant
        self.offset.copy_(prompt - self.reparameterize(self.embedding))
        self.train(was_training)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed ZeRO-3 spreads a parameter over processes, and gathers it for calls of its module."""
    return hasattr(parameter, "ds_id")


def hidden_layers(sizes: list[int], dropout: float) -> list[nn.Module]:
    """Linear, ReLU and dropout for each step of `sizes`."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return layers


class MLPEncoder(_NetworkEncoder):
    """A perceptron applied to each vector, the shape of PEFT's `PromptEncoder` of type MLP."""

    def __init__(self, config: PTuningConfig, width: int):
        super().__init__(config, width)
        sizes = [width] + [config.encoder_hidden_size] * config.encoder_num_layers
        self.mlp = nn.Sequential(*hidden_layers(sizes, config.encoder_dropout), nn.Linear(sizes[-1], width))

    def reparameterize(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.mlp(embedding)


class LSTMEncoder(_NetworkEncoder):
    """A bidirectional LSTM along the prompt and a two-layer perceptron (Liu et al., 2021, section 3.2, equation 5)."""

    def __init__(self, config: PTuningConfig, width: int):
        super().__init__(config, width)
        both = 2 * config.encoder_hidden_size
        self.lstm = nn.LSTM(
            input_size=width,
            hidden_size=config.encoder_hidden_size,
            num_layers=config.encoder_num_layers,
            dropout=config.encoder_dropout,
            bidirectional=True,
            batch_first=True,
        )
        self.mlp = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width))

    def reparameterize(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.lstm(embedding.unsqueeze(0))[0].squeeze(0))


class ResidualEncoder(_NetworkEncoder):
    """P' = P + LayerNorm(up(ReLU(down(P)))), shared by the vectors (Razdaibiedina et al., 2023, section 3)."""

    def __init__(self, config: PTuningConfig, width: int):
        super().__init__(config, width)
        sizes = [width] + [config.encoder_hidden_size] * config.encoder_num_layers
        self.mlp = nn.Sequential(*hidden_layers(sizes, config.encoder_dropout), nn.Linear(sizes[-1], width))
        self.norm = nn.LayerNorm(width)

    def reparameterize(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding + self.norm(self.mlp(embedding))
