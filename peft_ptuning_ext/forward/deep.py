# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Deep prompts: how their keys and values get in front of the text's in every layer.

Nothing of the input is widened, and the text's positions are the model's own unless the prompt takes some. There are
three ways, of which [`~peft_ptuning_ext.backbone.Backbone`] names one. Where attention goes through transformers'
interface, it is given the prompt there. Where it calculates by itself, the prompt is put behind what its projections
make. A causal decoder that allows neither finds the prompt in its cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..backbone import DISTANCE_BY_MASK, Backbone, own_name, table_of
from ..prompts.layer import PTuningLayer, execution_device
from ..prompts.prompt import Prompt, States
from . import in_attention, in_row, projections
from .attention import KEYWORD, LAYER, Recording, adapt_attention, layer_of, register
from .cache import full_view, note_prompt
from .call import Call
from .checkpointing import checkpoints_reentrantly, is_checkpointed
from .in_attention import NotRecorded, check_recording
from .in_place import positions_of_ids


# Why a cache holds the prompt, for messages.
WHY_CACHED = "it stands in every layer, and attention does not go through transformers' attention interface"


def run(
    stack: PreTrainedModel,
    forward: Callable,
    call: Call,
    prompt: Prompt,
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> Any:
    """Runs a call that begins a sequence behind a deep prompt.

    Args:
        stack (`PreTrainedModel`): The backbone.
        forward (`Callable`): Its own `forward`.
        call ([`Call`]): What was asked.
        prompt ([`Prompt`]): With its states.
        embed (`Callable`): Ids (B, S) → embeddings (B, S, H).

    Raises:
        ValueError: The attention implementation was changed to one that does not take a prompt, or a cache is needed
            and can't be used.
    """
    if call.backbone.decoder is not None:
        prompt = _encoder_part(stack, prompt)
        if not prompt.states:  # only the decoder has one
            return forward(**call.given)
    way = call.backbone.deep_way
    if way == "cache":
        return _run_behind_cache(stack, forward, call, prompt)
    if way == "projections":
        return projections.run(stack, forward, call, prompt)
    check_implementation(stack)
    if torch.is_grad_enabled() and checkpoints_reentrantly(stack):
        call, prompt = _gather_gradients(call, prompt, embed)
    return in_attention.run(forward, call, prompt)


def first_decoder_layer(stack: PreTrainedModel) -> int:
    """The number of a decoder's first layer in a deep prompt: layers are numbered behind those of its encoder."""
    return stack.config.num_hidden_layers


def _encoder_part(stack: PreTrainedModel, prompt: Prompt) -> Prompt:
    """The prompt in the layers of an encoder-decoder's encoder."""
    first = first_decoder_layer(stack)
    return dataclasses.replace(prompt, states={i: pair for i, pair in prompt.states.items() if i < first})


def _gather_gradients(
    call: Call, prompt: Prompt, embed: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Call, Prompt]:
    """Lets gradients reach a prompt that layers get by name under reentrant gradient checkpointing.

    Such layers run again in a backward pass of their own, which ends at what is a leaf. The prompt's states become
    leaves, and the text's embeddings, whose gradient comes last, hand on what was gathered there.
    """
    states = [state for pair in prompt.states.values() for state in pair]
    leaves = [state.detach().requires_grad_(state.requires_grad) for state in states]
    embeds = _Gathering.apply(call.embeds(embed), leaves, *states)
    pairs = dict(zip(prompt.states, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
    positions = call.given_positions if call.is_embedded else positions_of_ids(call)
    positions = call.given_positions if positions is None else positions
    given = call.arguments(input_ids=None, inputs_embeds=embeds)
    call = dataclasses.replace(call, given=given, tokens=embeds, is_embedded=True, given_positions=positions)
    return call, dataclasses.replace(prompt, states=pairs)


class _Gathering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeds: torch.Tensor, leaves: list[torch.Tensor], *states: torch.Tensor) -> torch.Tensor:
        """`embeds`, which now need a gradient."""
        ctx.leaves = leaves
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return gradient, None, *gathered


def check_implementation(stack: PreTrainedModel) -> None:
    """Refuses an attention implementation that does not see a deep prompt."""
    if not in_attention.takes_prompt(stack):
        raise ValueError(
            f"The attention implementation of this {type(stack).__name__} was changed to "
            f"{stack.config._attn_implementation!r}, which does not see a prompt in every layer. Set it before the "
            "adapter is added."
        )


def _run_behind_cache(stack: PreTrainedModel, forward: Callable, call: Call, prompt: Prompt) -> Any:
    """Puts the prompt into an empty cache and goes on behind it."""
    name, cache = call.backbone.cache_name, call.cache
    if is_checkpointed(stack):
        raise ValueError(
            f"{call.stack} takes a prompt in every layer through its cache, which transformers leaves out under "
            "gradient checkpointing. Turn gradient checkpointing off."
        )
    _check_padding(call)
    call.check_one_text()  # here, because behind a cache no row counts as packed
    is_own = cache is None
    if is_own and call.given.get(name) is not None:
        raise ValueError(
            f"{call.stack} got a {type(call.given[name]).__name__} as `{name}`. Pass a cache of transformers, such as "
            "`DynamicCache()`: it holds the prompt, too."
        )
    cache = DynamicCache(config=stack.config) if is_own else full_view(cache)
    if in_row.is_static(cache):
        raise ValueError(
            f"{call.stack} got a static cache, which has no room for a prompt in every layer. Leave "
            "`cache_implementation` at its default."
        )
    for layer, states in prompt.states.items():
        cache.update(*(state.expand(len(call.tokens), -1, -1, -1) for state in states), layer)
    places = torch.zeros(len(call.tokens), prompt.length, dtype=torch.long, device=call.tokens.device)
    behind = Prompt(prompt.names, prompt.length, places=places, taken=prompt.taken, starts=prompt.starts)
    note_prompt(cache if is_own else call.cache, behind)
    given = call.arguments(**{name: full_view(cache)})
    filled = dataclasses.replace(call, given=given, cache=given[name], past=prompt.length, cached_prompt=behind)
    output = in_row.go_on(forward, filled, lambda: WHY_CACHED)
    return _without_cache(output) if is_own and call.given.get("use_cache") is False else output


@torch.compiler.disable  # The check needs values, which a graph lacks. The graph ends here anyway, at the cache.
def _check_padding(call: Call) -> None:
    """Refuses padding between the prompt and the text where distance is counted in columns."""
    mask = call.plain_mask
    if mask is None or not call.backbone.beside_text or call.stack in DISTANCE_BY_MASK:
        return
    if not torch.compiler.is_exporting() and (mask[:, 0] == 0).any():
        raise ValueError(
            f"{call.stack} measures distance in columns, and a prompt in every layer stands in its cache in front of "
            "all columns: padding on the left would stand between both. Pad on the right."
        )


def _without_cache(output: Any) -> Any:
    """The outputs of a caller that has asked for no cache."""
    if isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, Cache))
    return type(output)(**{name: value for name, value in output.items() if not isinstance(value, Cache)})


def measure(
    stack: PreTrainedModel, backbone: Backbone, tokens: torch.Tensor, first_position: int = 0
) -> tuple[States, dict[int, nn.Module]]:
    """Returns the keys and values that a backbone itself makes of tokens, by one pass of them in evaluation.

    Args:
        stack (`PreTrainedModel`): The backbone, with prompts attached or not.
        backbone ([`Backbone`]): Facts about it.
        tokens (`torch.Tensor`): Ids (N,), or vectors (N, H) in the dtype of the text's embeddings.
        first_position (`int`): The position of the first of them, where it is not the model's own.

    Returns:
        `tuple[dict, dict]`: By layer, keys and values (1, key-value heads, N, D); and the modules that attend.

    Raises:
        ValueError: Its attention can't be reached.
    """
    if backbone.deep_way is None:
        raise refusal(stack, backbone.not_deep)
    try:
        return _pass_of(stack, backbone, tokens, first_position)
    except NotRecorded as reason:
        raise refusal(stack, str(reason)) from None


def _pass_of(
    stack: PreTrainedModel, backbone: Backbone, tokens: torch.Tensor, first_position: int = 0
) -> tuple[States, dict[int, nn.Module]]:
    """As [`measure`], but raises [`NotRecorded`] where the pass can't be recorded."""
    # A copy of vectors, because there are models that scale their embeddings in place.
    tokens = tokens[None].to(device_of(stack, backbone), copy=True)
    given = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
    if not tokens.is_meta:  # there, transformers can't look whether a mask hides anything
        given["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if first_position:
        given["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None] + first_position
    with torch.no_grad(), in_evaluation(stack), gather_params_ctx(stack.parameters()):
        if backbone.deep_way == "cache":
            return _fill_cache(stack, backbone, given), {}
        if backbone.deep_way == "projections":
            return projections.record(stack, given), {}
        recording = _record(stack, given)
        return recording.states, recording.modules


def device_of(stack: PreTrainedModel, backbone: Backbone) -> int | str | torch.device:
    """Returns where a backbone computes, which is not where an offloaded one has its weights."""
    device = execution_device(table_of(stack.get_submodule(backbone.embedding)))
    return stack.device if device is None else device


@contextmanager
def in_evaluation(stack: nn.Module) -> Iterator[None]:
    """Inside, nothing is drawn at random, and no prompt is in front.

    Quantized layers of bitsandbytes are in training mode. In evaluation on a CPU they repack their weights, and have
    no gradients from then on.
    """
    was_training = {module: module.training for module in stack.modules()}
    layers = [module for module in stack.modules() if isinstance(module, PTuningLayer)]
    try:
        for module in was_training:
            module.training = type(module).__module__.startswith("bitsandbytes")
        with ExitStack() as entered:
            for layer in layers:
                entered.enter_context(layer.without_prompt())
            yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _fill_cache(stack: PreTrainedModel, backbone: Backbone, arguments: dict[str, Any]) -> States:
    cache = DynamicCache()  # one that keeps what has left a window, too
    stack(**arguments, **{backbone.cache_name: cache, "use_cache": True})
    return {index: (layer.keys, layer.values) for index, layer in enumerate(cache.layers)}


def _record(stack: PreTrainedModel, arguments: dict[str, Any]) -> Recording:
    recording = Recording()
    record_call(stack, arguments, recording)
    check_recording(recording, stack.config)
    return recording


def record_call(stack: PreTrainedModel, arguments: dict[str, Any], recording: Any) -> None:
    """Calls a stack so that its attention is handed to `recording`, whether or not it takes prompts by now."""
    config, implementation = stack.config, stack.config._attn_implementation
    config._attn_implementation = register(own_name(implementation))
    try:
        stack(**arguments, **{KEYWORD: recording})
    finally:
        config._attn_implementation = implementation


def record_prompt(stack: PreTrainedModel, vectors: torch.Tensor) -> tuple[States, dict[int, nn.Module]]:
    """Returns the keys and values that a prompt at the input of a causal decoder becomes in every layer.

    Args:
        stack (`PreTrainedModel`): The backbone, with prompts attached.
        vectors (`torch.Tensor`): The prompt, (V, H), in the dtype of the text's embeddings.

    Returns:
        `tuple[dict, dict]`: By layer, keys and values (1, key-value heads, V, D); and the modules that attend.

    Raises:
        ValueError: They depend on the text, or a deep prompt can't take their place.
    """
    backbone = stack.ptuning.backbone
    if (reason := _why_not_apart(stack)) is not None:
        raise _not_apart(stack, reason)
    try:
        return _pass_of(stack, backbone, vectors)
    except NotRecorded as reason:
        raise _not_apart(stack, str(reason)) from None


def _not_apart(stack: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"In {type(stack).__name__}, the keys and values of a prompt at the input can't be computed apart from the "
        f"text: {reason}."
    )


def _why_not_apart(stack: PreTrainedModel) -> Optional[str]:
    """Why keys and values of a prompt at the input can't be those of a deep one; `None` if they can."""
    attachment = stack.ptuning
    backbone = attachment.backbone
    if backbone.not_deep is not None or backbone.deep_way != "cache":
        return backbone.not_deep or backbone.not_recorded or attachment.not_recorded
    if type(stack).__name__ in DISTANCE_BY_MASK:  # it needs no positions
        return None
    if backbone.beside_text:
        return "it measures distance in columns, and padding would stand between a prompt in its cache and the text"
    return backbone.not_recorded


def take_prompts(stack: PreTrainedModel, backbone: Backbone, modules: dict[int, nn.Module]) -> None:
    """Lets the attention of a backbone take deep prompts; [`leave_prompts`] undoes it.

    Args:
        stack (`PreTrainedModel`): The backbone, with prompts attached.
        backbone ([`Backbone`]): Facts about it.
        modules (`dict[int, nn.Module]`): The attention of each layer, as [`measure`] has found it.
    """
    if backbone.deep_way == "projections" and not projections.is_attached(stack):
        projections.attach(stack)
    elif backbone.deep_way == "attention":
        adapt_attention(stack)
        if len(set(modules.values())) == len(modules):  # else all layers are one module, and are counted
            for layer, module in modules.items():
                if layer_of(module) is None:
                    setattr(module, LAYER, layer)


def leave_prompts(stack: PreTrainedModel) -> None:
    """Undoes [`take_prompts`], except for the name of the attention, which is that of prompts at the input, too."""
    projections.detach(stack)
    for module in stack.modules():
        vars(module).pop(LAYER, None)


def refusal(stack: nn.Module, reason: str, instead: str = "prompt_depth='INPUT'") -> ValueError:
    """The error for a stack that takes no deep prompt, for a `reason`, and what to choose `instead`."""
    return ValueError(
        f"A prompt in every layer (prompt_depth='DEEP') can't be given to {type(stack).__name__}: {reason}. "
        f"Choose {instead}."
    )
