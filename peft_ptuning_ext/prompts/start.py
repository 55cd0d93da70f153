# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where a prompt starts: vectors of the model's scale or of tokens, and the tokens that a deep prompt starts at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import PromptTuningInit
from transformers import AutoTokenizer

from ..config import PTuningConfig


if TYPE_CHECKING:
    from .layer import PTuningLayer

# How many of the model's embeddings are looked at for their mean and standard deviation.
SCALE_SAMPLE = 4096

# How many tokens are given to the model, to see the scale of its keys and values.
STATES_SAMPLE = 64


def start_vectors(layer: PTuningLayer, config: PTuningConfig) -> torch.Tensor:
    """The vectors at which the prompt of a new adapter starts, shape (V, H), float32 on the CPU."""
    vocabulary = layer.get_base_layer().num_embeddings
    if starts_at_tokens(config):
        return layer.embed_ids(token_ids(config, vocabulary))
    sample = layer.embed_ids(spread_ids(vocabulary, SCALE_SAMPLE))
    return sample.mean() + sample.std() * torch.randn(config.num_virtual_tokens, sample.shape[-1])


def starts_at_tokens(config: PTuningConfig) -> bool:
    """Whether the prompt starts at tokens of the vocabulary. One from a file gets its values from there."""
    is_text = config.prompt_tuning_init == PromptTuningInit.TEXT and not config._from_file
    return is_text or config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB


def token_ids(config: PTuningConfig, vocabulary: int) -> torch.Tensor:
    """The ids of the tokens that the prompt starts at, shape (V,)."""
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        return torch.randint(vocabulary, (config.num_virtual_tokens,))
    tokenizer = config._tokenizer
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, trust_remote_code=False)
    ids = tokenizer(config.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"`prompt_tuning_init_text` {config.prompt_tuning_init_text!r} has no tokens.")
    if max(ids) >= vocabulary:
        raise ValueError(
            f"The tokenizer gives id {max(ids)}, and the model has {vocabulary} embeddings: "
            "`tokenizer_name_or_path` is not this model's tokenizer."
        )
    repeats = -(-config.num_virtual_tokens // len(ids))
    return torch.tensor((ids * repeats)[: config.num_virtual_tokens])


def spread_ids(vocabulary: int, most: int) -> torch.Tensor:
    """Ids of at most `most` tokens, evenly spread: the scale is that of the model and not of a draw."""
    return torch.linspace(0, vocabulary - 1, min(vocabulary, most)).long()
