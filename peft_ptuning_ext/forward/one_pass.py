# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt and all texts in one pass: a packed row of V + B·S positions, which only attention takes apart.

Linear layers, norms and experts work on single positions, and notice nothing. Attention lets the prompt see itself,
and each text the prompt and itself. The weights are read once, and each position of the prompt is computed once.
Gradients reach the prompt through the hidden states. So this works wherever the backbone alone does: under every kind
of gradient checkpointing, and with weights that are spread over processes.

Where rows have prompts of their own, each of the G different ones is there once: G·V + B·S positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..backbone import PACKING_INPUTS, PER_TOKEN_FILLS
from ..prompts.layer import PTuningLayer
from ..prompts.prompt import Prompt
from .attention import KEYWORD, InFront, layer_of
from .cache import PassingCache, is_static, note_prompt_beside, take_in
from .call import Call
from .checkpointing import is_checkpointed
from .in_attention import NotRecorded, check_recording, is_sharded, text_positions
from .in_row import RULED_INPUTS


# The share of positions above which this way pays, times the width H of the model: what it costs to take a row apart.
OVERHEAD = 36

# Arguments of attention that describe the texts, and say nothing of the prompt.
OF_TEXTS = {*PACKING_INPUTS, "max_length_q", "max_length_k"}


# Keys and values of one layer.
Pair = tuple[torch.Tensor, torch.Tensor]


def is_due(stack: PreTrainedModel, call: Call) -> bool:
    """Whether a call that begins a sequence goes this way, and not behind keys and values that are stored.

    Nothing is stored with gradients, nor in training, where dropout is drawn anew. Processes that gather weights have
    to run the same modules, whatever they have stored. And token types are embeddings that a prompt gets in the row.
    """
    if call.cache is None and call.given.get(call.backbone.cache_name) is not None:
        return False  # of another kind than transformers', for which the model has its own answer
    if isinstance(call.past, torch.Tensor):
        return False  # compiled: whether the cache is empty can't be told
    return torch.is_grad_enabled() or stack.training or not has_pass_of_its_own(stack, call)


def has_pass_of_its_own(stack: PreTrainedModel, call: Call) -> bool:
    """Whether the keys and values of a prompt can be computed apart from the texts of a call."""
    return call.given.get("token_type_ids") is None and not is_sharded(stack)


def costs_more(call: Call, prompt: Prompt) -> bool:
    """Whether V more tokens in each row cost less than this way, and the row has a place for all inputs.

    This way computes G·V + B·S positions instead of B·(V + S). Taking the row apart in each layer moves numbers that
    are proportional to B·S·H, and a layer's own work is proportional to B·S·H². So it is worth its time where the
    share of positions that it saves is above a constant divided by H. The constant is measured (docs/measurements.md).
    """
    rows, text = call.tokens.shape[:2]
    number, length = prompt.vectors.shape[:2]
    if (rows - number) * length * call.backbone.width >= OVERHEAD * rows * (text + length):
        return False
    is_plain = call.plain_mask is call.mask and (call.mask is not None or call.given_positions is None)
    return is_plain and not call.packing and not (call.cache is not None and is_static(call.cache))


def run(stack: PreTrainedModel, forward: Callable, call: Call, prompt: Prompt, embeds: torch.Tensor) -> Any:
    """Runs a call that begins a sequence.

    Args:
        stack (`PreTrainedModel`): The backbone, a causal decoder.
        forward (`Callable`): Its own `forward`.
        call ([`Call`]): What was asked.
        prompt ([`Prompt`]): With its vectors, (G, V, H).
        embeds (`torch.Tensor`): The embeddings of the texts, (B, S, H).

    Returns:
        The outputs of `forward`, which have the texts' shape. Attention maps have V more columns.

    Raises:
        NotRecorded: The pass showed that the backbone does not call its attention exactly once per layer.
        ValueError: The text is too long, or its mask too short.
    """
    if call.given_positions is None:
        call.check_packing()
    call.check_per_token({*RULED_INPUTS, *PACKING_INPUTS})
    rows, text = embeds.shape[:2]
    call.check_lengths(0, prompt.shift(rows), call.plain_mask)
    positions = text_positions(call, call.plain_mask, prompt)
    of_texts = positions + prompt.shift(rows)
    in_front = InFront(prompt, text, 0, call.plain_mask, positions + prompt.length, present=prompt.present(rows))
    passing = PassingCache() if _has_cache(stack, call) else None
    packed = Packed(stack.config, call, prompt, embeds, in_front, passing, _is_constant(stack, embeds))
    in_row = of_texts.expand(*of_texts.shape[:-2], rows, text).flatten(-2).unsqueeze(-2)
    of_prompts = packed.positions.repeat(packed.number).expand(*in_row.shape[:-1], -1)
    nothing = embeds.new_zeros(1, 1, 1, 1)  # a model takes a mask of four dimensions as it is
    arguments = {
        "input_ids": None,
        "inputs_embeds": torch.cat([packed.vectors.flatten(0, 1), embeds.flatten(0, 1)])[None],
        "attention_mask": dict.fromkeys(call.mask, nothing) if isinstance(call.mask, dict) else nothing,
        "position_ids": torch.cat([of_prompts, in_row], dim=-1),
        call.backbone.cache_name: passing,
        "use_cache": passing is not None and _is_asked(stack.config, call),
        "return_dict": True,
        KEYWORD: packed,
    }
    for name, value in PER_TOKEN_FILLS.items():
        if name != "attention_mask" and call.given.get(name) is not None:
            given = call.given[name].flatten(0, 1)[None]
            fill = given.new_full((1, packed.length, *given.shape[2:]), value)
            arguments[name] = torch.cat([fill, given], dim=1)
    output = forward(**call.arguments(**arguments))
    check_recording(packed, stack.config)
    for name, value in output.items():
        output[name] = packed.unpack(value)
    if passing is not None:
        cache = packed.fill_cache(passing)
        if _is_asked(stack.config, call):
            output[call.backbone.cache_name] = cache
    is_dict = call.given.get("return_dict")
    return output if (stack.config.return_dict if is_dict is None else is_dict) else output.to_tuple()


def _is_constant(stack: PreTrainedModel, embeds: torch.Tensor) -> bool:
    """Whether nothing but the prompt gives a gradient to what the first layer makes of the texts."""
    if embeds.requires_grad:
        return False
    others = set(stack.modules())
    for module in stack.modules():
        if isinstance(module, PTuningLayer):
            others -= set(module.modules())
    parameters = (parameter for module in others for parameter in module._parameters.values() if parameter is not None)
    has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in others)
    return not has_hooks and not any(parameter.requires_grad for parameter in parameters)


def _has_cache(stack: PreTrainedModel, call: Call) -> bool:
    """Whether the backbone by itself would fill a cache: one that it was given, or one that it returns."""
    if is_checkpointed(stack):
        return False
    return call.cache is not None or _is_asked(stack.config, call)


def _is_asked(config: Any, call: Call) -> bool:
    """Whether a cache is returned, by the call or else by the config."""
    use_cache = call.given.get("use_cache")
    return bool(getattr(config, "use_cache", False) if use_cache is None else use_cache)


@dataclass
class Packed:
    """Takes the place of [`InFront`] in the pass of a packed row, and takes the row apart for attention.

    Args:
        config (`PreTrainedConfig`): The backbone's.
        call ([`Call`]): What was asked.
        prompt ([`Prompt`]): With its vectors, (G, V, H).
        embeds (`torch.Tensor`): The embeddings of the texts, (B, S, H).
        in_front ([`InFront`]): The prompt in front of the texts; its states are those of one layer.
        passing ([`PassingCache`], *optional*): What notes the tokens for a cache; `None`: there is no cache to fill.
        is_constant (`bool`): Whether the first layer needs no gradient of the texts' queries, keys and values.
        states (`dict`): By layer, keys and values in front of the texts, if a cache is filled.
        held (`set[int]`): The layers whose cache holds the keys and values that attention is given.
        windows (`dict[int, int]`): By layer, how far back it looks.
        masks (`dict[bool, tuple]`): Masks of the prompts and of the texts, by whether a layer has a window.
        attended (`int`): How often attention was called.
        first (`nn.Module`, *optional*): The attention of the first layer.
        positions (`torch.Tensor`): Those of a prompt, (V,).
        columns (`torch.Tensor`, *optional*):
            Where each row finds what stands in front of it among the V columns of its prompt, (B, V); `None`: there.
    """

    config: Any
    call: Call
    prompt: Prompt
    embeds: torch.Tensor
    in_front: InFront
    passing: Optional[PassingCache]
    is_constant: bool
    states: dict[int, Optional[Pair]] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    windows: dict[int, Optional[int]] = field(default_factory=dict)
    masks: dict[bool, tuple[Any, Any]] = field(default_factory=dict)
    attended: int = 0
    first: Optional[nn.Module] = None
    positions: torch.Tensor = field(init=False)
    columns: Optional[torch.Tensor] = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.positions = torch.arange(self.prompt.length, device=self.embeds.device)
        if (lengths := self.prompt.lengths) is not None:
            self.columns = (self.positions - self.prompt.length + lengths[:, None]).clamp(min=0)

    @property
    def number(self) -> int:
        """How many prompts there are, G."""
        return len(self.prompt.vectors)

    @property
    def length(self) -> int:
        """How many positions they have, G·V."""
        return self.number * self.prompt.length

    @property
    def vectors(self) -> torch.Tensor:
        """Those of the prompts, (G, V, H). A shorter one begins in the first column, and repeats its last one."""
        vectors, lengths = self.prompt.vectors, self.prompt.lengths
        if lengths is None:
            return vectors
        columns = self.positions + self.prompt.length - self.prompt.by_prompt(lengths)[:, None]
        return vectors.take_along_dim(columns.clamp(max=self.prompt.length - 1)[..., None], dim=1)

    def in_front_of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Keys or values of the prompts, (G, heads, V, D), in front of the rows: (B or 1, heads, V, D)."""
        values = self.prompt.by_row(values)
        return values if self.columns is None else values.take_along_dim(self.columns[:, None, :, None], dim=2)

    def attend(self, attention, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, Any]:
        """The attention of one layer: of the prompt to itself, and of each text to the prompt and itself.

        Args:
            attention (`Callable`): The attention function of the model.
            module (`nn.Module`): The attention layer.
            query (`torch.Tensor`): (1, heads, G·V + B·S, D).
            key (`torch.Tensor`): (1, key-value heads, G·V + B·S, D).
            value (`torch.Tensor`): Likewise.
            mask (`Any`): What the model has made of a mask that says nothing.
            kwargs (`dict`): The further arguments of the attention function.
        """
        if not query.shape[2] == key.shape[2] == self.length + self.embeds.shape[:2].numel():
            raise NotRecorded("its attention does not get one query and one key for each position")
        of_prompts, of_texts = zip(*map(self._apart, (query, key, value)))
        in_front_of_texts = tuple(self.in_front_of_rows(tensor) for tensor in of_prompts[1:])
        self.first = module if self.first is None else self.first
        if self.is_constant and module is self.first:
            of_texts = [tensor.detach() for tensor in of_texts]
        layer = layer_of(module)
        layer, window = self.attended if layer is None else layer, kwargs.get("sliding_window")
        # Without a cache nothing is held: under gradient checkpointing this object lives on until the backward pass.
        self.states[layer] = None
        if self.passing is not None:
            self.states[layer], noted = in_front_of_texts, self.passing.states.get(layer)
            if noted is not None and noted[0] is key and noted[1] is value:
                self.held.add(layer)
        self.windows[layer] = window
        self.attended += 1
        prompt_mask, text_mask = self._masks(window is not None)
        alone, beside = {name: kwargs[name] for name in kwargs if name not in OF_TEXTS}, dict(kwargs)
        if kwargs.get("position_ids") is not None:
            alone["position_ids"] = self.positions.expand(self.number, -1)
            beside["position_ids"] = self.in_front.positions
        output, _ = attention(module, *of_prompts, prompt_mask, **alone)
        prompt = dataclasses.replace(self.prompt, states={layer: in_front_of_texts})
        in_front = dataclasses.replace(self.in_front, prompt=prompt)
        outputs, weights = in_front.attend(attention, module, *of_texts, text_mask, beside)
        return torch.cat([output.flatten(0, 1), outputs.flatten(0, 1)])[None], weights

    def _masks(self, has_window: bool) -> tuple[Any, Any]:
        """The masks of the prompts and of the texts, each for itself, of the kind that attention takes."""
        if has_window not in self.masks:
            make = create_sliding_window_causal_mask if has_window else create_causal_mask
            mask, positions = self.call.mask, self.call.given_positions
            if isinstance(mask, dict):
                mask = mask["sliding_attention" if has_window else "full_attention"]
            if self.passing is not None or (positions is not None and positions.dim() != 2):
                positions = None  # as in transformers: where there is a cache, a row is one text
            of_texts = make(self.config, self.embeds, mask, None, positions)
            self.masks[has_window] = make(self.config, self.prompt.vectors, None, None), of_texts
        return self.masks[has_window]

    def unpack(self, value: Any) -> Any:
        """The texts' part of an output, whatever its nesting: (1, G·V + B·S, …) → (B, S, …), or of routers (…, E)."""
        if type(value) in (tuple, list):
            return type(value)(self.unpack(item) for item in value)
        rows, text = self.embeds.shape[:2]
        length, total = self.length, self.length + rows * text
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() == 3 and value.shape[:2] == (1, total):
            return value[0, length:].unflatten(0, (rows, text))
        return value[length:] if value.dim() == 2 and len(value) == total else value

    def _apart(self, states: torch.Tensor) -> Pair:
        """Takes queries, keys or values apart: (1, heads, G·V + B·S, D) → (G, heads, V, D) and (B, heads, S, D)."""
        prompts, texts = states[0].split([self.length, states.shape[2] - self.length], dim=1)
        prompts = prompts.unflatten(1, self.prompt.vectors.shape[:2])
        return prompts.transpose(0, 1), texts.unflatten(1, self.embeds.shape[:2]).transpose(0, 1)

    def fill_cache(self, passing: PassingCache) -> Cache:
        """The given cache or a new one, filled with the texts as behind the prompt.

        Raises:
            NotRecorded: The backbone holds something else than one column for each position.
        """
        total = self.length + self.embeds.shape[:2].numel()
        if {*passing.states} != {*self.states} or any(
            state.dim() != 4 or state.shape[2] != total for pair in passing.states.values() for state in pair
        ):
            raise NotRecorded("its cache does not hold one column for each position")
        cache = DynamicCache(config=self.config) if self.call.cache is None else self.call.cache
        for layer, pair in passing.states.items():
            cache.update(*(self._apart(state)[1] for state in pair), layer)
        note_prompt_beside(cache, dataclasses.replace(self.prompt, vectors=None, of_row=None, states=self.states))
        take_in(cache, self.held)
        return cache
