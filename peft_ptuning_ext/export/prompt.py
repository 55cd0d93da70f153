# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A prompt without its network, and as embeddings."""

from __future__ import annotations

import copy
from typing import Optional

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import PromptEncoderType
from ..prompts.adapter import find_adapter, find_stack
from ..prompts.encoder import PromptEncoder, build_encoder


def fold_prompt(model: nn.Module, adapter_name: Optional[str] = None) -> None:
    """Replaces the network of a prompt (`MLP`, `LSTM`, `RESIDUAL`) by the V × H numbers that come out of it, in place.

    Outputs in evaluation mode stay bitwise the same, and what is saved shrinks to the table. The table is trained
    further as plain vectors if the network was trained; an optimizer made before still holds the network.

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.

    Raises:
        ValueError: There is no such adapter.
    """
    adapter = find_adapter(model, adapter_name)
    layer, network = adapter.layer, adapter.layer.ptuning_encoders[adapter.name]
    if type(network) is PromptEncoder:
        return
    prompt, config = adapter.prompt(), copy.copy(adapter.config)  # other adapters may have the same config
    config.encoder_reparameterization_type = PromptEncoderType.NONE
    config.encoder_hidden_size = config.encoder_num_layers = None
    config.encoder_dropout = 0.0
    table = build_encoder(config, prompt.shape[1]).to(prompt)
    table.start_at(prompt)
    table.requires_grad_(network.embedding.requires_grad).train(network.training)
    layer.ptuning_encoders[adapter.name] = table
    model.peft_config[adapter.name] = config
    find_stack(model).ptuning.states.drop(adapter.name)


@torch.no_grad()
def to_prompt_embeds(model: nn.Module, input_ids: torch.Tensor, adapter_name: Optional[str] = None) -> torch.Tensor:
    """Returns what enters the model for one text: the prompt and the embeddings of the tokens.

    This is what engines take in the place of token ids, such as `prompt_embeds` of vLLM.

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        input_ids (`torch.Tensor`): Token ids of one text without padding, shape (S,) or (1, S).
        adapter_name (`str`, *optional*): Which adapter; by default the active one.

    Returns:
        `torch.Tensor`: shape (V + S, H), in the dtype and on the device of the model's embeddings. With a prompt
        template the virtual tokens are among the S, and the shape is (S, H).

    Raises:
        ValueError:
            There is no such adapter, `input_ids` is not one text or has not the V placeholders of a template, or
            adapters train rows of the vocabulary and this one is not active.
    """
    adapter = find_adapter(model, adapter_name)
    if input_ids.dim() == 2 and len(input_ids) == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise ValueError(f"`input_ids` must be one text, shape (S,) or (1, S), got {tuple(input_ids.shape)}.")
    if (
        isinstance(adapter.layer.base_layer, AuxiliaryTrainingWrapper)
        and adapter.name not in adapter.layer.prompt_names
    ):
        raise ValueError(
            f"The embeddings are those of the active adapter, with the rows that it trains. Activate {adapter.name!r} "
            "with `set_adapter` first."
        )
    embeds = adapter.layer.look_up(input_ids.to(adapter.layer.weight.device))
    prompt, template = adapter.prompt().to(embeds), adapter.config.prompt_template
    if template is None:
        return torch.cat([prompt, embeds])
    slots = (input_ids == template.placeholder_id).to(embeds.device)
    if (found := int(slots.sum())) != len(prompt):
        raise ValueError(
            f"`input_ids` has {found} tokens with the placeholder's id, and the prompt template has {len(prompt)}. "
            "Encode the text with the template."
        )
    return embeds.masked_scatter(slots[:, None], prompt)
