# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A prompt without its network, in every layer, and as embeddings."""

from __future__ import annotations

from typing import Optional

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import PromptDepth, PTuningConfig
from ..forward.deep import record_prompt, take_prompts
from ..prompts.adapter import Adapter, find_adapter, find_stack
from ..prompts.build import build_encoder
from ..prompts.deep import DeepPromptEncoder, shapes_of
from ..prompts.encoder import PromptEncoder
from ..prompts.prompt import States


def fold_prompt(model: nn.Module, adapter_name: Optional[str] = None) -> None:
    """Replaces the network of a prompt (`MLP`, `LSTM`, `RESIDUAL`) by the numbers that come out of it, in place.

    These are V × H vectors, or the keys and values of a deep prompt. Outputs in evaluation mode stay bitwise the same,
    and what is saved shrinks to the numbers. They are trained further as such if the network was trained. An optimizer
    or trainer that was made before still holds the network, so make a new one. Dropout inside a network goes with it.
    That of a deep prompt stays, because it acts on the keys and values.

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.

    Raises:
        ValueError: There is no such adapter.
    """
    adapter = find_adapter(model, adapter_name)
    if type(adapter.layer.ptuning_encoders[adapter.name]) in (PromptEncoder, DeepPromptEncoder):
        return
    prompt = adapter.states() if adapter.is_deep else adapter.prompt()
    _replace_encoder(model, adapter, adapter.config.of_plain_prompt(), prompt)


def unfold_prompt(model: nn.Module, adapter_name: Optional[str] = None) -> None:
    """Makes a prompt at the input a deep one that computes the same, in place; a network of it is folded away.

    On a causal decoder, V vectors at the input become V keys and values in every layer, whatever the text is. They are
    what a deep prompt with `shift_positions=True` consists of. Outputs in evaluation mode stay the same up to
    rounding, and training goes on in every layer. An optimizer or trainer that was made before still holds the former
    parameters, so make a new one. Calls with `token_type_ids`, which GPT-2 takes, are an exception: a deep prompt has
    no token type, and so no embedding of one.

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.

    Raises:
        ValueError:
            There is no such adapter, its prompt is deep already, it has a template, or the prompt's keys and values
            depend on the text (in an encoder, say). The model is then as it was.
    """
    adapter = find_adapter(model, adapter_name)
    if adapter.is_deep:
        raise ValueError(f"The prompt of adapter {adapter.name!r} is deep already.")
    if adapter.config.prompt_template is not None:
        raise ValueError(
            f"The vectors of adapter {adapter.name!r} stand where its `prompt_template` says. Their keys and values "
            "depend on the text in front of them, so they are no deep prompt."
        )
    stack, layer = find_stack(model), adapter.layer
    states, modules = record_prompt(stack, adapter.prompt().to(layer.dtype or stack.dtype))
    config = adapter.config.of_plain_prompt()
    config.prompt_depth, config.shift_positions = PromptDepth.DEEP, True
    config.forget_start()
    take_prompts(stack, stack.ptuning.backbone, modules)
    _replace_encoder(model, adapter, config, states)


def _replace_encoder(model: nn.Module, adapter: Adapter, config: PTuningConfig, prompt: torch.Tensor | States) -> None:
    """Gives an adapter the plain encoder that `config` asks for, which starts at `prompt`."""
    former, width = adapter.layer.ptuning_encoders[adapter.name], adapter.layer.get_base_layer().embedding_dim
    encoder = build_encoder(config, width, shapes_of(prompt) if config.is_deep else None)
    encoder.to(next(former.parameters())).start_at(prompt)
    is_trained = any(parameter.requires_grad for parameter in former.parameters())
    adapter.layer.ptuning_encoders[adapter.name] = encoder.requires_grad_(is_trained).train(former.training)
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
            There is no such adapter, its prompt is deep, `input_ids` is not one text or has not the V placeholders of
            a template, or adapters train rows of the vocabulary and this one is not active.
    """
    adapter = find_adapter(model, adapter_name)
    if adapter.is_deep:
        raise ValueError(
            f"The prompt of adapter {adapter.name!r} is deep: it stands in every layer, and an engine that takes "
            "embeddings gives them to the first layer only. Serve this model with the package, or train the prompt "
            "with prompt_depth='INPUT'."
        )
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
