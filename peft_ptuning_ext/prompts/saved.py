# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt of an adapter on disk or on the Hub, as a start for another one."""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..config import PTuningConfig
from ..files.checkpoint import CheckpointSource, check_values, read_prompt, read_tensors
from .encoder import build_encoder


# Key of the table in a checkpoint of stock prompt learning, and the types of such adapters.
STOCK_KEY = "prompt_embeddings"
STOCK_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


def load_prompt(model_id: str, length: int, width: int) -> torch.Tensor:
    """Loads the prompt of a saved adapter, whatever its task, and nothing else of it.

    Args:
        model_id (`str`): Folder, or repository on the Hub.
        length (`int`): Number V of vectors that it has to have.
        width (`int`): Their width H.

    Returns:
        `torch.Tensor`: shape (V, H), float32.

    Raises:
        ValueError: There is no adapter with such a prompt, or its file can't be read or holds NaN or infinite values.
    """
    config = PeftConfig.from_pretrained(model_id)
    is_stock = config.peft_type in STOCK_TYPES
    if not is_stock and not isinstance(config, PTuningConfig):
        raise ValueError(
            f"`prompt_tuning_init_adapter` names {model_id}, an adapter of type {config.peft_type.value}. Prompts can "
            f"start at those of {', '.join(kind.value for kind in (PeftType('PTUNING'), *STOCK_TYPES))}."
        )
    if config.num_virtual_tokens != length:
        raise ValueError(
            f"`num_virtual_tokens` is {length}, and the prompt of {model_id}, at which `prompt_tuning_init_adapter` "
            f"starts, has {config.num_virtual_tokens} vectors. Give both the same number."
        )
    try:
        path = CheckpointSource(model_id).find()
    except ValueError as error:
        raise ValueError(
            f"`prompt_tuning_init_adapter` names {model_id}, which has no {SAFETENSORS_WEIGHTS_NAME}. Load that "
            "adapter and save it again, which writes one."
        ) from error
    if not is_stock:
        with torch.device("meta"):
            encoder = build_encoder(config, width)
        return read_prompt(path, encoder)
    # Of an encoder-decoder's rows, stock PEFT puts the first V in front of the encoder and the others nowhere.
    rows = length * (config.num_transformer_submodules or 1)
    tensors = read_tensors(path, {STOCK_KEY: (rows, width)}, with_others=False)
    check_values(tensors, path)
    return tensors[STOCK_KEY][:length].float()
