# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt of an adapter on disk or on the Hub, as a start for another one."""

from __future__ import annotations

from typing import Optional

import torch
from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..config import PromptDepth, PTuningConfig
from ..files.checkpoint import CheckpointSource, check_values, read_prompt, read_tensors
from .build import build_encoder
from .deep import Shapes
from .prompt import States


# Key of the table in a checkpoint of stock prompt learning, and the types of such adapters.
STOCK_KEY = "prompt_embeddings"
STOCK_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


def load_prompt(config: PTuningConfig, width: int, shapes: Optional[Shapes] = None) -> torch.Tensor | States:
    """Loads the prompt of a saved adapter, at which another one is to start, and nothing else of it.

    Args:
        config ([`PTuningConfig`]): The config of the new adapter, which names the saved one.
        width (`int`): Width H of the model's input embedding.
        shapes (`dict[int, LayerShape]`, *optional*): What each layer takes, for a deep prompt.

    Returns:
        Vectors (V, H), or keys and values by layer, each (1, key-value heads, V, D), float32.

    Raises:
        ValueError:
            There is no adapter with such a prompt, it has another depth or length, or its file can't be read or holds
            NaN or infinite values.
    """
    model_id, length = config.prompt_tuning_init_adapter, config.num_virtual_tokens
    saved = PeftConfig.from_pretrained(model_id)
    is_stock = saved.peft_type in STOCK_TYPES
    if not is_stock and not isinstance(saved, PTuningConfig):
        raise ValueError(
            f"`prompt_tuning_init_adapter` names {model_id}, an adapter of type {saved.peft_type.value}. Prompts can "
            f"start at those of {', '.join(kind.value for kind in (PeftType('PTUNING'), *STOCK_TYPES))}."
        )
    depth = PromptDepth.INPUT if is_stock else saved.prompt_depth
    if depth is not config.prompt_depth:
        raise ValueError(
            f"`prompt_depth` is {config.prompt_depth.value!r}, and the prompt of {model_id}, at which "
            f"`prompt_tuning_init_adapter` starts, has {depth.value!r}. Give both the same depth, or, on a causal "
            "decoder, make a prompt at the input a deep one with `unfold_prompt`."
        )
    if saved.num_virtual_tokens != length:
        raise ValueError(
            f"`num_virtual_tokens` is {length}, and the prompt of {model_id}, at which `prompt_tuning_init_adapter` "
            f"starts, has {saved.num_virtual_tokens} vectors. Give both the same number."
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
            encoder = build_encoder(saved, width, shapes)
        return read_prompt(path, encoder)
    # Of an encoder-decoder's rows, stock PEFT puts the first V in front of the encoder and the others nowhere.
    rows = length * (saved.num_transformer_submodules or 1)
    tensors = read_tensors(path, {STOCK_KEY: (rows, width)}, with_others=False)
    check_values(tensors, path)
    return tensors[STOCK_KEY][:length].float()
