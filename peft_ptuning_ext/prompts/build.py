# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Which encoder a config asks for."""

from __future__ import annotations

from typing import Optional

from ..config import PromptDepth, PromptEncoderType, PTuningConfig
from .deep import DeepMLPEncoder, DeepPromptEncoder, Shapes
from .encoder import LSTMEncoder, MLPEncoder, PromptEncoder, ResidualEncoder


ENCODERS: dict[tuple[PromptDepth, PromptEncoderType], type[PromptEncoder] | type[DeepPromptEncoder]] = {
    (PromptDepth.INPUT, PromptEncoderType.NONE): PromptEncoder,
    (PromptDepth.INPUT, PromptEncoderType.MLP): MLPEncoder,
    (PromptDepth.INPUT, PromptEncoderType.LSTM): LSTMEncoder,
    (PromptDepth.INPUT, PromptEncoderType.RESIDUAL): ResidualEncoder,
    (PromptDepth.DEEP, PromptEncoderType.NONE): DeepPromptEncoder,
    (PromptDepth.DEEP, PromptEncoderType.MLP): DeepMLPEncoder,
}


def build_encoder(
    config: PTuningConfig, width: int, shapes: Optional[Shapes] = None
) -> PromptEncoder | DeepPromptEncoder:
    """Returns the encoder that `config` asks for, its prompt not yet started.

    Args:
        config ([`PTuningConfig`]): Which encoder, its length V and sizes.
        width (`int`): Width H of the model's input embedding.
        shapes (`dict[int, LayerShape]`, *optional*): What each layer of the model takes, for a deep prompt.
    """
    encoder_class = ENCODERS[config.prompt_depth, config.encoder_reparameterization_type]
    return encoder_class(config, width) if shapes is None else encoder_class(config, width, shapes)
