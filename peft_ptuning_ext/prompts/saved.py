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
from .deep import LayerShape, Shapes, describe, states_of
from .prompt import States


# Key of the table in a checkpoint of stock prompt learning, and the types of such adapters: those that hold vectors
# for the input, and those that hold keys and values for every layer.
STOCK_KEY = "prompt_embeddings"
STOCK_INPUT_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
STOCK_DEEP_TYPES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
STOCK_TYPES = (*STOCK_INPUT_TYPES, *STOCK_DEEP_TYPES)


def load_prompt(config: PTuningConfig, width: int, shapes: Optional[Shapes] = None) -> torch.Tensor | States:
    """Loads the prompt of a saved adapter, at which another one is to start, and nothing else of it.

    Args:
        config ([`PTuningConfig`]): The config of the new adapter, which names the saved one.
        width (`int`): Width H of the model's input embedding.
        shapes (`dict[int, LayerShape]`, *optional*): What each layer takes, for a deep prompt.

    Returns:
        Vectors (V, H) of a prompt at the input, or the keys and values of a deep one by layer, each (1, key-value
        heads, V, D); float32.

    Raises:
        ValueError:
            There is no adapter with such a prompt, it can't be the start of one of this depth or length, or its file
            can't be read or holds NaN or infinite values.
    """
    model_id, length = config.prompt_tuning_init_adapter, config.num_virtual_tokens
    saved = PeftConfig.from_pretrained(model_id)
    is_stock = saved.peft_type in STOCK_TYPES
    if not is_stock and not isinstance(saved, PTuningConfig):
        raise ValueError(
            f"`prompt_tuning_init_adapter` names {model_id}, an adapter of type {saved.peft_type.value}. Prompts can "
            f"start at those of {', '.join(kind.value for kind in (PeftType('PTUNING'), *STOCK_TYPES))}."
        )
    depth = stock_depth(saved) if is_stock else saved.prompt_depth
    if depth is PromptDepth.DEEP and not config.is_deep:
        raise ValueError(
            f"`prompt_depth` is 'INPUT', and the prompt of {model_id}, at which `prompt_tuning_init_adapter` starts, "
            "is 'DEEP': no vectors at the input compute what its keys and values do. Choose prompt_depth='DEEP'."
        )
    if config.is_deep and depth is PromptDepth.INPUT and getattr(saved, "prompt_template", None) is not None:
        raise ValueError(
            f"The vectors of {model_id}, at which `prompt_tuning_init_adapter` starts, stand where its template says. "
            "Their keys and values depend on the text in front of them, so no deep prompt can start there."
        )
    if depth is PromptDepth.INPUT and config.is_in_decoder:
        raise ValueError(
            f"`prompt_stacks` is {config.prompt_stacks.value!r}, and the prompt of {model_id}, at which "
            "`prompt_tuning_init_adapter` starts, stands at the input of the encoder: it has nothing for the decoder. "
            "Choose prompt_stacks='ENCODER'."
        )
    if saved.num_virtual_tokens != length:
        raise ValueError(
            f"`num_virtual_tokens` is {length}, and the prompt of {model_id}, at which `prompt_tuning_init_adapter` "
            f"starts, has {saved.num_virtual_tokens} virtual tokens. Give both the same number."
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
            encoder = build_encoder(saved, width, shapes if depth is PromptDepth.DEEP else None)
        return read_prompt(path, encoder)
    expected = stock_shape(saved, model_id, width, shapes)
    tensors = read_tensors(path, {STOCK_KEY: expected}, with_others=False)
    check_values(tensors, path)
    return from_stock(tensors[STOCK_KEY].float(), saved, shapes)


def stock_depth(config: PeftConfig) -> PromptDepth:
    """Where the prompt of a stock adapter enters the model."""
    return PromptDepth.DEEP if config.peft_type in STOCK_DEEP_TYPES else PromptDepth.INPUT


def stock_shape(config: PeftConfig, model_id: str, width: int, shapes: Optional[Shapes] = None) -> tuple[int, int]:
    """Returns the shape of the table that a stock adapter has saved.

    Args:
        config ([`~peft.PeftConfig`]): Its config.
        model_id (`str`): Its name, for messages.
        width (`int`): Width H of the model's input embedding.
        shapes (`dict[int, LayerShape]`, *optional*): What each layer of the model takes, for keys and values.

    Raises:
        ValueError: The config is not of an adapter for such a model.
    """
    length, submodules = config.num_virtual_tokens, config.num_transformer_submodules
    if stock_depth(config) is PromptDepth.INPUT:
        if submodules not in (None, 1, 2):
            raise ValueError(f"`num_transformer_submodules` of {model_id} must be 1 or 2, got {submodules!r}.")
        return length * (submodules or 1), width
    if submodules not in (None, 1):
        raise ValueError(
            f"`num_transformer_submodules` of {model_id} is {submodules!r}: its keys and values stand in the decoder "
            "of an encoder-decoder, and prompts of this package in the encoder."
        )
    kind = stock_layer(shapes)
    sizes = {"num_layers": len(shapes), "num_attention_heads": kind.heads, "token_dim": kind.heads * kind.key_width}
    for name, expected in sizes.items():
        if (found := getattr(config, name)) not in (None, expected):
            raise ValueError(
                f"`{name}` of {model_id} is {found!r}, and this model has {expected}: {describe(shapes)}. The adapter "
                "was made for another model."
            )
    return length, len(shapes) * kind.width


def stock_layer(shapes: Shapes) -> LayerShape:
    """Returns what each layer of a model takes, if all take the same, as stock PEFT has it.

    Raises:
        ValueError: Layers differ, or keys and values do.
    """
    kinds = sorted(set(shapes.values()))
    if len(kinds) > 1 or kinds[0].key_width != kinds[0].value_width or [*shapes] != [*range(len(shapes))]:
        sizes = " or ".join(f"{kind.heads} × {kind.key_width} and {kind.heads} × {kind.value_width}" for kind in kinds)
        raise ValueError(
            f"Stock PEFT gives keys and values of one size to all layers, and this model takes {sizes} in layers "
            f"{[*shapes]}. Stay with this package."
        )
    return kinds[0]


def from_stock(table: torch.Tensor, config: PeftConfig, shapes: Optional[Shapes] = None) -> torch.Tensor | States:
    """The prompt in a table of stock PEFT: vectors (V, H), or keys and values by layer, (1, key-value heads, V, D)."""
    if stock_depth(config) is PromptDepth.INPUT:
        # Of an encoder-decoder's rows, stock PEFT puts the first V in front of the encoder and the others nowhere.
        return table[: config.num_virtual_tokens].clone()
    stock_layer(shapes)
    return states_of(table, shapes)
