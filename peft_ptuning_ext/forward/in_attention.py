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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import Cache, PreTrainedModel

from ..backbone import is_adapted
from ..prompts.adapter import layer_of
from ..prompts.layer import PTuningLayer
from ..prompts.prompt import Prompt, States
from .attention import KEYWORD, InFront, Recording
from .cache import is_taken_in, layers_attended, note_prompt_beside, take_in
from .call import Call, count_positions
from .other_methods import is_of_another_method, settings_of
from .seen import NotRecorded


# How many bytes of keys and values are stored for the prompts of a model: those of 400 prompts of V = 20 on a
# Llama 3 8B in bfloat16.
MAX_BYTES = 2**30


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
    if call.cached_prompt is None and is_taken_in():
        in_front.given = {}
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
            take_in(cache, layers_attended(cache, in_front.given or {}))
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


def open_stored(stack: PreTrainedModel, device: torch.device) -> Optional[StoredStates]:
    """What is stored for a backbone as it is now; `None` if nothing may be stored or taken from there."""
    if torch.is_grad_enabled() or stack.training or torch.compiler.is_compiling():
        return None
    return stack.ptuning.states if stack.ptuning.states.check(stack, device) else None


def with_states(
    stack: PreTrainedModel,
    forward: Callable,
    prompts: Sequence[Prompt],
    stored: Optional[StoredStates],
    front: Optional[Prompt] = None,
) -> list[Prompt]:
    """Returns prompts with their keys and values: those stored, where no gradient is asked for, or new ones.

    Args:
        stack (`PreTrainedModel`): The backbone.
        forward (`Callable`): Its own `forward`.
        prompts (`Sequence[Prompt]`): With their vectors, (1, V, H), in the dtype of the text's embeddings.
        stored ([`StoredStates`], *optional*): As of [`open_stored`].
        front ([`Prompt`], *optional*): A deep prompt that stands in front of each.

    Raises:
        NotRecorded: The pass showed that the backbone does not call its attention exactly once per layer.
    """
    layer, found = layer_of(stack), {}
    for prompt in prompts:
        if stored is not None and (states := stored.find(layer, prompt)) is not None:
            found[prompt.names] = states
    missing = [prompt for prompt in prompts if prompt.names not in found]
    for length in sorted({prompt.length for prompt in missing}):  # those of one length in one pass
        alike = [prompt for prompt in missing if prompt.length == length]
        vectors = [prompt.vectors for prompt in alike]
        states = record(stack.config, forward, vectors[0] if len(alike) == 1 else torch.cat(vectors), front)
        if stored is not None:
            # Values come as transposed views. Each further call would read them out of order.
            states = {index: (key.contiguous(), value.contiguous()) for index, (key, value) in states.items()}
        for row, prompt in enumerate(alike):
            own = states
            if len(alike) > 1:  # copies, so that one of them can be dropped
                own = {i: tuple(state[row : row + 1].clone() for state in pair) for i, pair in states.items()}
            found[prompt.names] = own
            if stored is not None:
                stored.store(layer, prompt, own)
    return [Prompt(prompt.names, prompt.length, states=found[prompt.names]) for prompt in prompts]


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

    All entries are dropped when anything of the backbone is another: a tensor (by identity, address and version
    counter), which adapters of other methods act there and how much, hooks, dtype, device, autocast. An entry is
    dropped when its prompt is another, and when it is trained. On a CPU the prompt's values are compared, too, for
    which another device would have to be waited for. Writing through `parameter.data` or to a plain attribute, such as
    the scale of an attention, leaves no other trace; `drop()` is for that. Nothing is stored while a module of the
    backbone is in training mode, nor beside a layer of another method of which not all can be told.

    Args:
        max_bytes (`int`): How much is stored; what was used longest ago goes first.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._backbone: Optional[list[tuple]] = None
        self._entries: dict[tuple[str, ...], tuple[torch.Tensor, Any, States]] = {}

    def check(self, stack: nn.Module, device: torch.device) -> bool:
        """Drops all entries if the backbone is not as it was; returns whether it can be told what it is."""
        backbone = _fingerprint(stack, device)
        if not _is_same(self._backbone, backbone):
            self.drop()
        self._backbone = backbone
        return backbone is not None

    def find(self, layer: PTuningLayer, prompt: Prompt) -> Optional[States]:
        """Returns the states of a prompt if they are still those of its vectors, (1, V, H)."""
        if (entry := self._entries.pop(prompt.names, None)) is None:
            return None
        (of_vectors, encoders, states), vectors = entry, prompt.vectors
        is_same = (of_vectors.shape, of_vectors.dtype, of_vectors.device) == (
            vectors.shape,
            vectors.dtype,
            vectors.device,
        )
        if not is_same or not _is_same(encoders, _fingerprint_of_prompt(layer, prompt.names)):
            return None
        if vectors.device.type == "cpu" and not torch.equal(of_vectors, vectors):
            return None
        self._entries[prompt.names] = entry  # behind all that were used longer ago
        return states

    def store(self, layer: PTuningLayer, prompt: Prompt, states: States) -> None:
        """Stores the states that were computed from a prompt's vectors, (1, V, H)."""
        encoders = _fingerprint_of_prompt(layer, prompt.names)
        if encoders is None:
            return
        self._entries[prompt.names] = prompt.vectors.clone(), encoders, states
        self.limit(self.max_bytes)

    def limit(self, max_bytes: int) -> None:
        """Sets how much is stored, and drops what is above."""
        self.max_bytes = max_bytes
        sizes = {names: _bytes_of(states) for names, (_, _, states) in list(self._entries.items())}
        total = sum(sizes.values())
        for names, size in sizes.items():
            if total <= max_bytes:
                return
            self._entries.pop(names, None)
            total -= size

    def drop(self, *adapter_names: str) -> None:
        """Drops the entries that one of the adapters is part of; without a name, all."""
        for names in list(self._entries):
            if not adapter_names or not set(names).isdisjoint(adapter_names):
                self._entries.pop(names, None)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple:
        return StoredStates, (self.max_bytes,)  # copies and pickles of a model begin with none


def _bytes_of(states: States) -> int:
    return sum(state.nbytes for pair in states.values() for state in pair)


def _fingerprint(stack: nn.Module, device: torch.device) -> Optional[list[tuple]]:
    """What of a backbone the keys and values of its prompts depend on; `None` if not all of it can be told."""
    kind = device.type
    fingerprint: list[tuple] = []
    plain: list[Any] = []  # numbers of hooks, which no two hooks share, and settings of other methods
    for module in _modules(stack):
        if "_is_replica" in vars(module):
            return None  # of DataParallel: its weights are new at every call
        if isinstance(module, PTuningLayer):
            plain.append(module.merges)
        elif module.training:
            return None  # dropout is drawn anew
        elif is_of_another_method(module):
            if (settings := settings_of(module)) is None:
                return None
            plain.append(settings)
        if (tensors := _note(module, plain)) is None:
            return None
        fingerprint += tensors
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return [(autocast, plain), *fingerprint]


def _fingerprint_of_prompt(layer: PTuningLayer, names: tuple[str, ...]) -> Optional[list[tuple]]:
    """What a prompt is made of; `None` if not all of it can be told."""
    fingerprint: list[tuple] = []
    plain: list[Any] = []
    for name in names:
        for module in layer.encoder(name).modules():
            if (tensors := _note(module, plain)) is None:
                return None
            fingerprint += tensors
    return [(None, plain), *fingerprint]


def _modules(stack: nn.Module) -> Iterator[nn.Module]:
    """The modules of a backbone without its prompts, of which there may be thousands."""
    left = [stack]
    while left:
        module = left.pop()
        yield module
        is_layer = isinstance(module, PTuningLayer)
        left += (child for name, child in module.named_children() if not (is_layer and name == "ptuning_encoders"))


def _note(module: nn.Module, plain: list[Any]) -> Optional[list[tuple]]:
    """A module's own tensors; the numbers of its hooks go to `plain`. `None` if the tensors can't be told."""
    plain += (*module._forward_pre_hooks, *module._forward_hooks)
    noted = []
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None:
            continue
        if tensor.is_inference() or tensor.is_meta:
            return None  # no version counter; values that are elsewhere
        noted.append((weakref.ref(tensor), tensor.data_ptr(), tensor._version))
    return noted


def _is_same(one: Optional[list[tuple]], other: Optional[list[tuple]]) -> bool:
    # A tensor has one weak reference as long as it lives: by identity, a tensor in place of a dead one differs.
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(one, other))
