# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt in attention: its keys and values are computed once for all rows, and put in front when attention runs.

What comes first does not depend on what follows, so on a causal decoder the keys and values of the prompt are the same
for every row. One pass of the prompt at batch size 1 makes them. Everything else is the base model's own doing on the
user's tokens, whose positions begin at V: its masks, its cache (which never holds the prompt) and its outputs have the
user's length.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import Cache, PreTrainedModel

from ..backbone import is_adapted
from ..prompts.layer import PTuningLayer
from ..prompts.prompt import Prompt, States
from .attention import KEYWORD, InFront, Recording
from .cache import note_prompt_beside, take_in
from .call import Call, count_positions
from .seen import NotRecorded


# For how many adapters of a model keys and values are stored; the oldest entry goes first.
MAX_STORED = 16

# Modules of adapters of other methods.
STATEFUL = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def run(forward: Callable, call: Call, prompt: Prompt) -> Any:
    """Runs a call with a prompt in front of its text.

    Args:
        forward (`Callable`): The backbone's own `forward`.
        call ([`Call`]): What was asked.
        prompt ([`Prompt`]): With its states.

    Returns:
        The outputs of `forward`, which have the text's length. Attention maps have V more columns.

    Raises:
        ValueError: The text is too long, or its mask too short.
    """
    mask, past, is_causal = call.plain_mask, call.past, call.backbone.is_causal
    rows = call.tokens.shape[0]
    if call.given_positions is None:
        call.check_packing()
    if not isinstance(past, torch.Tensor):
        call.check_lengths(past, prompt.shift(rows), mask)
    positions = text_positions(call, mask, prompt)
    from_prompt = None if positions is None else positions + prompt.length
    in_front = InFront(prompt, call.tokens.shape[1], past, mask, from_prompt, is_causal, prompt.present(rows))
    if call.cache is not None:
        note_prompt_beside(call.cache, prompt)
    arguments = {**call.given, KEYWORD: in_front}
    if positions is not None and "position_ids" in call.backbone.parameters:
        arguments["position_ids"] = positions + prompt.shift(rows) if prompt.needs_telling else from_prompt
    output = forward(**arguments)
    if call.cached_prompt is None:
        values = output if isinstance(output, tuple) else output.values()
        for cache in {id(value): value for value in (call.cache, *values) if isinstance(value, Cache)}.values():
            note_prompt_beside(cache, prompt)
            take_in(cache)
    return output


def text_positions(call: Call, mask: Optional[torch.Tensor], prompt: Prompt) -> Optional[torch.Tensor]:
    """The text's positions, (B or 1, S), or (3, B, S) of images; `None` where they are left to an encoder.

    An encoder with rotary positions is told those that leave padding out: the prompt's keys have positions of their
    own, and padding on the left would change the distance to them.
    """
    backbone = call.backbone
    if call.given_positions is not None:
        return call.given_positions
    if not (backbone.is_causal or backbone.is_rotary or prompt.positions):
        return None
    text = call.tokens.shape[1]
    positions = (torch.arange(text, device=call.tokens.device) + call.past)[None]
    if mask is not None and (backbone.counts_tokens or backbone.is_rotary):
        positions = prompt.counted_or(positions, count_positions(mask).take_along_dim(positions, dim=-1))
    return positions + backbone.first_position


def why_not(stack: PreTrainedModel) -> Optional[str]:
    """Why a backbone whose attention can take a prompt is not given one now; `None` if it is."""
    if not takes_prompt(stack):
        return f"its attention implementation was changed to {stack.config._attn_implementation!r}"
    return None


def takes_prompt(stack: PreTrainedModel) -> bool:
    """Whether the attention of this backbone is one that takes a prompt now."""
    return is_adapted(stack.config._attn_implementation)


def is_sharded(stack: PreTrainedModel) -> bool:
    """Whether processes gather the weights of its modules as they run (FSDP, DeepSpeed ZeRO-3).

    All processes then have to run the same modules, and a module's backward pass has to end where its output's begins.
    A pass for the prompt alone does neither: only some processes may need it, and of its last layer only the keys
    and values are used.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False  # looking through the modules takes as long as a small layer does
    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in stack.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in stack.parameters()
    )


def checkpoints_reentrantly(stack: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on, of the kind that passes no gradient to what a layer gets by name."""
    for module in stack.modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True
    return False


def with_states(stack: PreTrainedModel, forward: Callable, prompt: Prompt, front: Optional[Prompt] = None) -> Prompt:
    """Returns the prompt with its keys and values: those stored, where no gradient is asked for, or new ones.

    Args:
        stack (`PreTrainedModel`): The backbone.
        forward (`Callable`): Its own `forward`.
        prompt ([`Prompt`]): With its vectors, (1, V, H), in the dtype of the text's embeddings.
        front ([`Prompt`], *optional*): A deep prompt that stands in front of it.

    Raises:
        NotRecorded: The pass showed that the backbone does not call its attention exactly once per layer.
    """
    vectors, stored = prompt.vectors, stack.ptuning.states
    is_stored = not torch.is_grad_enabled() and not stack.training and not torch.compiler.is_compiling()
    is_stored = is_stored and front is None
    if is_stored and (states := stored.find(stack, prompt.names, vectors)) is not None:
        return Prompt(prompt.names, prompt.length, states=states)
    states = record(stack.config, forward, vectors, front)
    if is_stored:
        # Values come as transposed views. Each further call would read them out of order.
        states = {layer: (key.contiguous(), value.contiguous()) for layer, (key, value) in states.items()}
        stored.store(stack, prompt.names, vectors, states)
    return Prompt(prompt.names, prompt.length, states=states)


def record(config: Any, forward: Callable, vectors: torch.Tensor, front: Optional[Prompt] = None) -> States:
    """Computes the keys and values of a prompt (1, V, H) by one pass of the backbone, behind a deep one if given.

    Raises:
        NotRecorded: The pass showed that the backbone does not call its attention exactly once per layer.
    """
    length = vectors.shape[1]
    positions = torch.arange(length, device=vectors.device)[None]
    recording = Recording()
    if front is not None:
        positions = positions + front.positions
        recording.front = InFront(front, length, 0, None, positions - front.positions + front.length)
    # A copy of the prompt, because there are models that scale their embeddings in place.
    arguments = {"inputs_embeds": vectors.clone(), "position_ids": positions, "use_cache": False}
    forward(**arguments, **{KEYWORD: recording})
    # A copy of the dict: with gradient checkpointing the layers run again in the backward pass and would overwrite it.
    states = dict(recording.states)
    check_recording(recording, config)
    return states


def check_recording(recording: Recording, config: Any, expected: Optional[int] = None) -> None:
    """Raises `NotRecorded` unless each layer called its attention once: as many as the config says, or `expected`."""
    layers = len(recording.states)
    if layers != (config.num_hidden_layers if expected is None else expected):
        raise NotRecorded("not all of its layers hand their arguments down to an attention of their own")
    if recording.attended != layers:
        raise NotRecorded("its layers attend more than once")
    if getattr(config, "sliding_window", None) is not None:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
        if any(kinds[layer] == "sliding_attention" and window is None for layer, window in recording.windows.items()):
            raise NotRecorded("its attention does not tell its sliding window")


class StoredStates:
    """Keys and values of prompts, stored between calls that need no gradients, one entry for each prompt.

    An entry is dropped when anything that it was made of is another: a tensor of the prompt or the backbone (by
    identity, address and version counter), hooks, dtype, device, autocast; and when the prompt is trained. On a CPU
    the prompt's values are compared, too, for which another device would have to be waited for. Writing through
    `parameter.data` or to a plain attribute, such as the scale of an attention, leaves no other trace; `drop()` is for
    that. Nothing is stored while a module of the backbone is in training mode, nor while adapters of other methods are
    inside, whose state has no version.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, ...], tuple[torch.Tensor, Any, States]] = {}

    def find(self, stack: nn.Module, names: tuple[str, ...], vectors: torch.Tensor) -> Optional[States]:
        """Returns the states of a prompt if they are still those of its `vectors`, (1, V, H)."""
        entry = self._entries.get(names)
        if entry is None:
            return None
        of_vectors, fingerprint, states = entry
        is_same = of_vectors.shape == vectors.shape and of_vectors.dtype == vectors.dtype
        if (
            is_same
            and of_vectors.device == vectors.device
            and _is_same(fingerprint, _fingerprint(stack, names, vectors.device))
            and (vectors.device.type != "cpu" or torch.equal(of_vectors, vectors))
        ):
            return states
        self._entries.pop(names, None)
        return None

    def store(self, stack: nn.Module, names: tuple[str, ...], vectors: torch.Tensor, states: States) -> None:
        """Stores the states that were computed from `vectors`, (1, V, H)."""
        fingerprint = _fingerprint(stack, names, vectors.device)
        if fingerprint is None:
            return
        self._entries[names] = vectors.clone(), fingerprint, states
        for oldest in list(self._entries)[:-MAX_STORED]:
            self._entries.pop(oldest, None)

    def drop(self, adapter_name: Optional[str] = None) -> None:
        """Drops the entries that an adapter is part of, or all."""
        for names in list(self._entries):
            if adapter_name is None or adapter_name in names:
                self._entries.pop(names, None)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple:
        return StoredStates, ()  # copies and pickles of a model begin with none


def _fingerprint(stack: nn.Module, names: tuple[str, ...], device: torch.device) -> Optional[list[tuple]]:
    """What the keys and values of a prompt depend on; `None` if not all of it can be told."""
    kind = device.type
    fingerprint: list[tuple] = []
    hooks: list[int] = []  # their numbers, which no two hooks share
    ours: set[nn.Module] = set()
    others: set[nn.Module] = set()  # prompts of other adapters
    for module in stack.modules():
        if getattr(module, "_is_replica", False):
            return None  # of DataParallel: its weights are new at every call
        if isinstance(module, PTuningLayer):
            ours = {module, *module.ptuning_encoders.modules()}
            others = ours.difference(*(module.ptuning_encoders[name].modules() for name in names))
        if module in others:
            continue
        if module not in ours and (isinstance(module, STATEFUL) or module.training):
            return None  # state without a version; dropout, which is drawn anew
        hooks += (*module._forward_pre_hooks, *module._forward_hooks)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.is_inference() or tensor.is_meta:
                return None  # no version counter; values that are elsewhere
            fingerprint.append((weakref.ref(tensor), tensor.data_ptr(), tensor._version))
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return [(autocast, hooks), *fingerprint]


def _is_same(one: Optional[list[tuple]], other: Optional[list[tuple]]) -> bool:
    # A tensor has one weak reference as long as it lives: by identity, a tensor in place of a dead one differs.
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(one, other))
