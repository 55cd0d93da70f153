# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A deep prompt in attention that calculates by itself, of MPNet and DeBERTa-v2.

Hooks give an attention V more rows, put the prompt's keys and values there instead of what its projections make of
them, and take the rows off what comes out. All of the text sees the prompt, which has no distance to it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..backbone import key_value_projections
from ..prompts.prompt import Prompt, States
from .call import Call
from .checkpointing import is_checkpointed


# The attribute of an attention that has hooks of ours: their handles.
HANDLES = "ptuning_handles"

# DeBERTa-v2's method that scores the distance of each query to each key.
DISTANCES = "disentangled_attention_bias"


@dataclass
class _InFront:
    """What hooks do now: put `states` in front, or note those of the text if there are none."""

    states: Optional[States]
    length: int
    noted: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)


# The prompt of the call that is running, if it has a deep one.
_running: ContextVar[Optional[_InFront]] = ContextVar("running", default=None)


def run(stack: PreTrainedModel, forward: Callable, call: Call, prompt: Prompt) -> Any:
    """Runs a call with a deep prompt; see [`~peft_ptuning_ext.forward.deep.run`]."""
    if is_checkpointed(stack):
        raise ValueError(
            f"{call.stack} can't take a prompt in every layer under gradient checkpointing, which runs its layers "
            "again when the call that the prompt belongs to is over. Turn gradient checkpointing off."
        )
    changes = {}
    if prompt.positions and "position_ids" in call.backbone.parameters:
        positions = call.positions()
        if positions is None:
            positions = torch.arange(call.tokens.shape[1], device=call.tokens.device)[None]
            positions = positions + call.backbone.first_position
        changes["position_ids"] = positions + prompt.shift(len(call.tokens))
    call.check_lengths(0, prompt.positions, call.mask)
    token = _running.set(_InFront(prompt.states, prompt.length))
    try:
        return forward(**call.arguments(**changes))
    finally:
        _running.reset(token)


def record(stack: PreTrainedModel, arguments: dict[str, Any]) -> States:
    """Returns the keys and values that a backbone makes of one text, each (1, heads, N, D)."""
    was_attached, recording = is_attached(stack), _InFront(None, 0)
    if not was_attached:
        attach(stack)
    token = _running.set(recording)
    try:
        stack(**arguments)
    finally:
        _running.reset(token)
        if not was_attached:
            detach(stack)
    return {layer: (states["key"], states["value"]) for layer, states in recording.noted.items()}


def attach(stack: PreTrainedModel) -> None:
    """Lets the attention of each layer take a prompt; [`detach`] undoes it."""
    for layer, attention in enumerate(_attentions(stack)):
        handles = [attention.register_forward_pre_hook(_widen, with_kwargs=True)]
        handles.append(attention.register_forward_hook(_trim))
        for kind, name in zip(("key", "value"), key_value_projections(attention), strict=True):
            hook = functools.partial(_put_in_front, layer, kind, _heads(attention))
            handles.append(getattr(attention, name).register_forward_hook(hook))
        setattr(attention, HANDLES, handles)
        if hasattr(attention, DISTANCES):
            setattr(attention, DISTANCES, functools.partial(_distances_to_text, attention))


def detach(stack: PreTrainedModel) -> None:
    """Undoes [`attach`]."""
    for attention in _attentions(stack):
        for handle in vars(attention).pop(HANDLES, ()):
            handle.remove()
        vars(attention).pop(DISTANCES, None)


def is_attached(stack: PreTrainedModel) -> bool:
    """Whether its attention takes prompts."""
    return any(hasattr(attention, HANDLES) for attention in _attentions(stack))


def _attentions(stack: PreTrainedModel) -> list[nn.Module]:
    return [module for module in stack.modules() if key_value_projections(module)]


def _heads(attention: nn.Module) -> int:
    return attention.num_attention_heads


def _widen(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Optional[tuple]:
    """Forward pre-hook of an attention: V more rows, (B, V+S, H), in which its projections find the prompt."""
    in_front = _running.get()
    if in_front is None or in_front.states is None:
        return None
    given = inspect.signature(type(attention).forward).bind(attention, *args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    del given["self"]
    length = in_front.length
    for name in ("hidden_states", "query_states"):
        if given.get(name) is not None:
            given[name] = functional.pad(given[name], (0, 0, length, 0))
    seen = 1 if hasattr(attention, DISTANCES) else 0  # DeBERTa-v2's mask says what is seen, MPNet's is added
    for name, fill in (("attention_mask", seen), ("position_bias", 0)):
        if (value := given.get(name)) is not None:  # (B, heads or 1, S or 1, S)
            given[name] = functional.pad(value, (length, 0, length if value.shape[-2] > 1 else 0, 0), value=fill)
    return (), given


def _trim(attention: nn.Module, args: tuple, output: tuple) -> Optional[tuple]:
    """Forward hook of an attention: takes the rows off again, of what comes out and of its attention maps."""
    in_front = _running.get()
    if in_front is None or in_front.states is None:
        return None
    hidden, *maps = output
    return hidden[:, in_front.length :], *(m if m is None else m[..., in_front.length :, :] for m in maps)


def _put_in_front(
    layer: int, kind: str, heads: int, projection: nn.Module, args: tuple, output: torch.Tensor
) -> Optional[torch.Tensor]:
    """Forward hook of a projection, whose output is (B, S, heads · D)."""
    in_front = _running.get()
    if in_front is None:
        return None
    if in_front.states is None:
        by_head = output.unflatten(-1, (heads, -1)).transpose(1, 2)
        in_front.noted.setdefault(layer, {}).setdefault(kind, by_head)
        return None
    state = in_front.states[layer][kind == "value"]  # (1, heads, V, D)
    state = state.transpose(1, 2).flatten(2).to(output)
    return torch.cat([state.expand(len(output), -1, -1), output[:, in_front.length :]], dim=1)


def _distances_to_text(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any) -> Any:
    """DeBERTa-v2's scores of distance, (B · heads, V+S, V+S): those of the text, and 0 for the prompt."""
    original, in_front = getattr(type(attention), DISTANCES), _running.get()
    if in_front is None or in_front.states is None:
        return original(attention, query, key, *args)
    length = in_front.length
    token = _running.set(None)  # the text's projections are used again in there
    try:
        scores = original(attention, query[:, length:], key[:, length:], *args)
    finally:
        _running.reset(token)
    return functional.pad(scores, (length, 0, length, 0))
