# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Puts the prompt in front inside the backbone and takes its positions off again on the way out.

The hooks take everything from the module they are called with and keep no state between calls, so that a copied,
pickled or replicated model, and several threads on one model, are right.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import nn
from transformers import Cache

from ..backbone import Backbone, pool
from ..prompts.layer import PTuningLayer
from .cache import (
    filled_length,
    forget_prompt,
    held_prompt,
    hide_prompt,
    is_filled,
    is_static,
    open_view,
    remember_prompt,
)
from .layout import (
    columns_behind_padding,
    count_positions,
    leading_padding,
    take_columns,
    trim,
    user_columns,
    widen_embeds,
    widen_per_token,
    widen_positions,
)
from .routing import RoutedForward, entering
from .shared_prompt import (
    ARGUMENT,
    InFront,
    NotShareable,
    SharedPrompt,
    SharingAttention,
    checkpoints_reentrantly,
    is_sharded,
    record_prompt,
    takes_shared_prompt,
)


# Per-token inputs that get the prompt's columns, and those that are not read at the backbone's positions.
WIDENED_INPUTS = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"})
UNTOUCHED_INPUTS = frozenset({"encoder_hidden_states", "encoder_attention_mask", "labels", "shift_labels"})
# Arguments that describe several texts packed in one row. The attention that shares a prompt reads positions instead.
PACKING_INPUTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
# Arguments that speak of positions or lengths in ways that have no rule for a prompt.
REFUSED_INPUTS = frozenset({"lengths", "entity_position_ids", "global_attention_mask", "cross_attention_mask"})

Handle = torch.utils.hooks.RemovableHandle | RoutedForward | SharingAttention


def attach(model: nn.Module, backbone: Backbone) -> list[Handle]:
    """Registers the hooks on the backbone (and the decoder that attends to it); their handles undo it."""
    stack = model.get_submodule(backbone.name)
    handles = [
        stack.register_forward_pre_hook(_Widen(backbone), with_kwargs=True),
        stack.register_forward_hook(_Trim(backbone), with_kwargs=True),
    ]
    if not backbone.name:
        handles.append(RoutedForward(stack))
    if backbone.not_shared is None:
        handles.append(SharingAttention(stack))
    if backbone.decoder is not None:
        decoder = model.get_submodule(backbone.decoder)
        handles.append(decoder.register_forward_pre_hook(_WidenMemoryMask(backbone), with_kwargs=True))
    return handles


def find_layer(stack: nn.Module, backbone: Backbone) -> PTuningLayer:
    """Returns the tuner layer of a backbone module."""
    layer = stack.get_submodule(backbone.embedding)
    if not isinstance(layer, PTuningLayer):
        raise ValueError(
            f"The input embedding of {type(stack).__name__} was replaced after the P-tuning adapter was added. "
            "Resize or replace embeddings first and add the adapter then."
        )
    return layer


class _Widen:
    """Forward pre-hook of the backbone: puts the prompt into its inputs."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        widened = self._widen(stack, args, kwargs)
        return (args, entering(stack, kwargs)) if widened is None else ((), entering(stack, widened))

    def _widen(self, stack: nn.Module, args: tuple, kwargs: dict) -> Optional[dict]:
        """The backbone's inputs by name, with the prompt; `None` if they are to stay as they are."""
        layer = find_layer(stack, self.backbone)
        adapter_name = layer.prompted_adapter
        inputs = {**dict(zip(self.backbone.parameters, args)), **kwargs}
        cache = inputs.get("past_key_values")
        if isinstance(cache, Cache):
            inputs["past_key_values"] = open_view(cache)
            if is_filled(cache):
                _check_cache(cache, adapter_name)
            else:
                forget_prompt(cache)  # it was reset
        if adapter_name is None:
            return None
        input_ids, inputs_embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if (input_ids is None) == (inputs_embeds is None):
            return None  # the model has its own error for this
        if inputs_embeds is None and input_ids.dim() != 2:
            raise ValueError(f"{type(stack).__name__} got `input_ids` of shape {tuple(input_ids.shape)}, not (B, S).")
        batch_size, user_length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        _check_names(stack, inputs)
        held = held_prompt(cache)
        if isinstance(held, SharedPrompt) and not takes_shared_prompt(stack):
            raise ValueError(
                "The cache was filled behind a shared prompt, and the attention implementation was then changed to "
                f"{stack.config._attn_implementation!r}, which does not see it. Begin with an empty cache."
            )
        if isinstance(held, SharedPrompt) or (held is None and self._shares(stack, inputs, batch_size)):
            try:
                return self._share(stack, layer, adapter_name, inputs, user_length)
            except NotShareable as reason:
                layer.not_shared = str(reason)

        self._check(stack, inputs, batch_size, user_length)
        past = filled_length(cache)
        if held is not None:
            self._check_length(stack, inputs, past - held.length + user_length, held.length)
            return self._widen_step(inputs, user_length, past, held.length)
        prompt = layer.prompt(adapter_name)
        self._check_length(stack, inputs, user_length, len(prompt))
        if inputs_embeds is None:
            inputs_embeds = layer.embed(input_ids)
        if isinstance(cache, Cache):
            hide_prompt(cache, adapter_name, len(prompt))
            inputs["past_key_values"] = open_view(cache)
        return self._widen_first(inputs, prompt, inputs_embeds)

    def _shares(self, stack: nn.Module, inputs: dict, batch_size: int) -> bool:
        """Whether the rows of a call that begins a sequence are to share the prompt."""
        if why_concatenated(stack, self.backbone) is not None:
            return False
        if not torch.is_grad_enabled() or batch_size > 1 or inputs.get("past_key_values") is not None:
            return True
        # One row: two passes that read the weights cost more than a longer one. But what can't be widened is not.
        return not _is_plain_mask(inputs.get("attention_mask")) or _is_packed(inputs) or bool(_packing(inputs))

    def _share(self, stack: nn.Module, layer: PTuningLayer, adapter_name: str, inputs: dict, user_length: int) -> dict:
        """The inputs of a call whose rows share the prompt: only the positions are others."""
        length = layer.prompt_length(adapter_name)
        cache, mask, positions = (inputs.get(key) for key in ("past_key_values", "attention_mask", "position_ids"))
        past, mask = filled_length(cache), _plain_mask(mask)
        if positions is None:
            _check_packing(stack, inputs)
        if not isinstance(past, torch.Tensor):
            _check_mask_length(mask, past, user_length)
            self._check_length(stack, inputs, past + user_length, length)
        held = held_prompt(cache)
        prompt = held if isinstance(held, SharedPrompt) else self._shared_prompt(stack, layer, adapter_name, inputs)
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        columns = (torch.arange(user_length, device=tokens.device) + past)[None]
        if positions is None:
            positions = columns if mask is None else take_columns(count_positions(mask), columns)
        if isinstance(cache, Cache):
            remember_prompt(cache, prompt)
        reach = None if isinstance(past, torch.Tensor) else past + user_length + length
        distances = functools.partial(_distances, columns + length, mask, positions + length)
        in_front = InFront(prompt, distances, user_length, reach)
        return {**inputs, "position_ids": positions + length, ARGUMENT: in_front}

    def _shared_prompt(self, stack: nn.Module, layer: PTuningLayer, adapter_name: str, inputs: dict) -> SharedPrompt:
        """The keys and values of the prompt: those kept, where no gradient is asked for, or new ones."""
        embeds = layer.prompt(adapter_name)[None]
        if inputs.get("inputs_embeds") is not None:
            embeds = embeds.to(inputs["inputs_embeds"])
        else:
            embeds = embeds.to(layer.weight.dtype if layer.weight.is_floating_point() else stack.dtype)
        keeps = not torch.is_grad_enabled() and not stack.training and not torch.compiler.is_compiling()
        prompt = layer.kept_prompts.find(stack, adapter_name, embeds) if keeps else None
        if prompt is None:
            prompt = record_prompt(stack, adapter_name, embeds, entering(stack, {}))
            if keeps:
                layer.kept_prompts.keep(stack, embeds, prompt)
        return prompt

    def _widen_first(self, inputs: dict, prompt: torch.Tensor, inputs_embeds: torch.Tensor) -> dict:
        """The inputs of a call that begins a sequence, with the prompt in front."""
        length = prompt.shape[0]
        widened = {**inputs, "input_ids": None, "inputs_embeds": widen_embeds(prompt, inputs_embeds)}
        positions = self._positions(inputs)
        if positions is not None:
            # A decoder that is told its positions (by `generate`, say) counts from 0, whatever its table begins with.
            is_told = self.backbone.is_causal and inputs.get("position_ids") is not None
            first = 0 if is_told else self.backbone.first_position
            widened["position_ids"] = widen_positions(positions, length, first)
        if inputs.get("token_type_ids") is not None:
            widened["token_type_ids"] = widen_per_token(inputs["token_type_ids"], length, 0)
        mask = inputs.get("attention_mask")
        if mask is not None:
            widened["attention_mask"] = widen_per_token(mask, length, 1)
            padding = _padding(self.backbone, mask)
            if padding is not None:
                columns = columns_behind_padding(padding, mask.shape[1] + length, length)
                widened["inputs_embeds"] = widened["inputs_embeds"].take_along_dim(columns[..., None], dim=1)
                for key in ("attention_mask", "position_ids", "token_type_ids"):
                    if widened.get(key) is not None:
                        widened[key] = take_columns(widened[key], columns)
        return widened

    def _widen_step(self, inputs: dict, user_length: int, past: int, length: int) -> dict:
        """The inputs of a call that goes on behind a cache which holds the prompt: nothing is put in front."""
        widened = dict(inputs)
        mask = inputs.get("attention_mask")
        if mask is not None:
            _check_mask_length(mask, past - length, user_length)
            widened["attention_mask"] = _widen_mask(self.backbone, mask, length)
        positions = self._positions(inputs)
        if positions is not None:
            widened["position_ids"] = positions[..., -user_length:] + length
        return widened

    def _positions(self, inputs: dict) -> Optional[torch.Tensor]:
        """The user's positions; those that padding does not change if none were given; `None`: the model's own."""
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is None and mask is not None and self._counts:
            return count_positions(mask) + self.backbone.first_position
        return positions

    @property
    def _counts(self) -> bool:
        """Whether positions count the unmasked tokens: in decoders, and where the base counts from behind padding."""
        return "position_ids" in self.backbone.parameters and (
            self.backbone.is_causal or self.backbone.first_position > 0
        )

    def _check(self, stack: nn.Module, inputs: dict, batch_size: int, user_length: int) -> None:
        """Refuses what would otherwise be silently wrong."""
        name = type(stack).__name__
        _check_packing(stack, inputs)
        if is_static(inputs.get("past_key_values")):
            raise ValueError(
                f"{name} got a static cache, which has no room for the prompt: it is concatenated here, because "
                f"{why_concatenated(stack, self.backbone)}. Leave `cache_implementation` at its default."
            )
        mask = inputs.get("attention_mask")
        if not _is_plain_mask(mask):
            kind = f"{mask.dim()}-D mask" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"{name} got an attention mask that has no room for the prompt ({kind}) instead of a 2-D one (B, S): "
                f"the prompt is concatenated here, because {why_concatenated(stack, self.backbone)}."
            )
        for key, value in inputs.items():
            if key in WIDENED_INPUTS or key in UNTOUCHED_INPUTS or not isinstance(value, torch.Tensor):
                continue
            is_per_token = tuple(value.shape[:2]) == (batch_size, user_length)
            if is_per_token and (user_length > 1 or value.dim() > 2):
                raise ValueError(
                    f"{name} got the per-token input `{key}` of shape {tuple(value.shape)}, for which P-tuning has no "
                    "rule: what a virtual token's value should be is not known."
                )
        if self.backbone.is_causal and _is_packed(inputs):
            raise ValueError(
                f"{name} got several texts packed into one row, of which only the first would see the prompt. "
                "Pass one text per row, padded, with an attention mask."
            )

    def _check_length(self, stack: nn.Module, inputs: dict, text: int, length: int) -> None:
        limit, mask = self.backbone.max_positions, inputs.get("attention_mask")
        if limit is None or text + length <= limit:
            return
        if mask is not None and self._counts:
            text = int(mask.sum(-1).max())  # padding takes no position
        if text + length > limit:
            raise ValueError(
                f"{length} virtual tokens and {text} text tokens are {length + text} positions, and "
                f"{type(stack).__name__} has {limit}. Truncate the text to {limit - length} tokens."
            )


def _distances(columns: torch.Tensor, mask: Optional[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """How far behind the prompt's first token the columns of a call are: (B or 1, S)."""
    if mask is not None:
        return columns - leading_padding(mask)
    return positions if positions.dim() == 2 else columns  # not those of multimodal embeddings


class _Trim:
    """Forward hook of the backbone: takes the prompt's positions off its outputs.

    The encoder of an encoder-decoder keeps them: its output is what the decoder attends to.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __call__(self, stack: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        layer = find_layer(stack, self.backbone)
        adapter_name = layer.prompted_adapter
        if adapter_name is None or self.backbone.decoder is not None:
            return output
        if (in_front := kwargs.get(ARGUMENT)) is not None:
            for value in output if isinstance(output, tuple) else output.values():
                if isinstance(value, Cache):
                    remember_prompt(value, in_front.prompt)
            return output
        is_tuple = isinstance(output, tuple)
        output = list(output) if is_tuple else output
        length = layer.prompt_length(adapter_name)
        keys = range(len(output)) if is_tuple else list(output)
        for key in keys:
            if isinstance(output[key], Cache):
                hide_prompt(output[key], adapter_name, length)

        if _has_prompt_in_front(kwargs):
            batch_size, total = kwargs["inputs_embeds"].shape[:2]
            if output[0].shape[1] != total:
                raise ValueError(
                    f"{type(stack).__name__} was given {total} positions and returned {output[0].shape[1]}: it adds "
                    "or merges positions, and which of them are the prompt's can't be told."
                )
            mask = kwargs.get("attention_mask")
            padding = None if mask is None else _padding(self.backbone, mask)
            columns = None if padding is None else user_columns(padding, total, length)
            pooled = "pooler_output" if not is_tuple else 1 if getattr(stack, "pooler", None) is not None else None
            for key in keys:
                if key != pooled:
                    output[key] = trim(output[key], batch_size, total, length, columns)
                elif output[key] is not None:
                    output[key] = pool(stack, output[0])
        return tuple(output) if is_tuple else output


def _has_prompt_in_front(kwargs: dict) -> bool:
    """Whether the call that ends now began a sequence: the cache holds no more than it was given."""
    inputs_embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
    if inputs_embeds is None:
        return False
    return not isinstance(cache, Cache) or open_view(cache).get_seq_length() <= inputs_embeds.shape[1]


class _WidenMemoryMask:
    """Forward pre-hook of a decoder: lets it see the prompt in what its encoder hands over."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple[tuple, dict]]:
        memory, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if memory is None or mask is None or memory.shape[1] <= mask.shape[1]:
            return None
        widened = _widen_mask(self.backbone, mask, memory.shape[1] - mask.shape[1])
        return args, {**kwargs, "encoder_attention_mask": widened}


def why_concatenated(stack: nn.Module, backbone: Backbone) -> Optional[str]:
    """Why the prompt is not shared by the rows of a batch; `None` if it is."""
    reason = backbone.not_shared or find_layer(stack, backbone).not_shared
    if reason is None and not takes_shared_prompt(stack):
        return f"its attention implementation was changed to {stack.config._attn_implementation!r}"
    if reason is None and is_sharded(stack):
        return "its weights are spread over processes (FSDP, ZeRO-3)"
    if reason is None and torch.is_grad_enabled() and checkpoints_reentrantly(stack):
        return "it checkpoints gradients, and not with `use_reentrant=False`"
    return reason


def _is_plain_mask(mask: Any) -> bool:
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)


def _plain_mask(mask: Any) -> Optional[torch.Tensor]:
    """The 2-D mask (B, N) of masks by kind of layer, which some models make of it; `None` if it can't be told."""
    if _is_plain_mask(mask):
        return mask
    of_all = mask.get("full_attention") if isinstance(mask, dict) else None
    if of_all is None:
        return None
    seen = of_all[:, 0, -1]  # by the last token: all but padding
    return seen if seen.dtype == torch.bool else seen == 0


def _check_names(stack: nn.Module, inputs: dict) -> None:
    """Refuses arguments by name."""
    name = type(stack).__name__
    if refused := [key for key in REFUSED_INPUTS if inputs.get(key) is not None]:
        raise ValueError(f"{name} got `{refused[0]}`, for which P-tuning has no rule.")


def _packing(inputs: dict) -> list[str]:
    """The arguments of packing that are given."""
    return [key for key in PACKING_INPUTS if inputs.get(key) is not None]


def _check_packing(stack: nn.Module, inputs: dict) -> None:
    """Refuses arguments of packing where the attention does not read positions."""
    if packing := _packing(inputs):
        raise ValueError(
            f"{type(stack).__name__} got `{packing[0]}`: several texts packed into one row, of which only the first "
            "would see the prompt. Pass one text per row, padded, with an attention mask, or, where the prompt is "
            "shared, `position_ids` that begin anew with each text."
        )


def _check_mask_length(mask: Optional[torch.Tensor], past: int, user_length: int) -> None:
    if mask is not None and mask.shape[1] < past + user_length:
        raise ValueError(
            f"The attention mask covers {mask.shape[1]} tokens, but the cache holds {past} and {user_length} are new. "
            "Pass a mask of all of the user's tokens, without the virtual ones."
        )


def _check_cache(cache: Cache, adapter_name: Optional[str]) -> None:
    """Refuses to go on under one adapter behind a cache that was filled under another."""
    held = getattr(held_prompt(cache), "adapter_name", None)
    if held != adapter_name:
        under = {None: "no adapter"}
        raise ValueError(
            f"The cache was filled under {under.get(held, f'adapter {held!r}')}, and now "
            f"{under.get(adapter_name, f'adapter {adapter_name!r}')} is active. Begin with an empty cache."
        )


def _padding(backbone: Backbone, attention_mask: torch.Tensor) -> Optional[torch.Tensor]:
    """Padding on the left, (B, 1), where the prompt has to stand behind it; `None` where it may stand in front.

    Padding between the prompt and the text would make the text's output depend on how much of it there is, and push
    the prompt out of a sliding window.
    """
    if not backbone.beside_text:
        return None
    if not torch.compiler.is_compiling() and not (attention_mask[:, 0] == 0).any():
        return None
    return leading_padding(attention_mask)


def _widen_mask(backbone: Backbone, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """`attention_mask` (B, S) with the prompt's ones, (B, V+S), in front or behind padding on the left."""
    widened = widen_per_token(attention_mask, length, 1)
    padding = _padding(backbone, attention_mask)
    if padding is None:
        return widened
    return take_columns(widened, columns_behind_padding(padding, widened.shape[1], length))


def _is_packed(inputs: dict) -> bool:
    """Whether positions start anew within a row, the way transformers recognises packed texts."""
    positions = inputs.get("position_ids")
    if positions is None or positions.dim() != 2 or torch.compiler.is_compiling():
        return False
    if inputs.get("attention_mask") is not None or inputs.get("past_key_values") is not None:
        return False
    return bool((positions.diff(dim=-1) != 1).any())
