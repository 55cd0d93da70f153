# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Continuous batching (`generate_batch`): the prompt stands once in front of all keys of transformers' paged cache.

Continuous batching puts the new tokens of many requests into one row. A mask tells which keys are whose. The cache
returns the prompt's keys and values in front of those of the requests, and the mask gets V columns that every token
sees. The text's positions begin at V. The cache's blocks hold the text only, so a request needs no memory for the
prompt.

What is in the blocks depends on the prompt in front of them. So each manager serves the one prompt that it was made
for.
"""

from __future__ import annotations

import copy
import functools
import weakref
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ..backbone import own_name
from ..prompts.adapter import find_stack, layer_of
from ..prompts.choice import Rows, describe
from ..prompts.layer import PTuningLayer
from ..prompts.prompt import Prompt
from .attention import adapt_attention
from .deep import in_evaluation, record_prompt
from .other_methods import state_of_others


# The method of a model that all ways to continuous batching go through.
ENTRY = "init_continuous_batching"

# Attention implementations that get masks of four dimensions, and how transformers calls them behind a paged cache.
MASKED_NAMES = ("sdpa", "eager")
PAGED_NAMES = ("sdpa", "paged|eager")


@dataclass(frozen=True)
class Served:
    """What a manager was made for.

    Args:
        names (`tuple[str, ...]`): The adapters that were active; empty for the base model.
        prompt ([`Prompt`], *optional*): Their prompt, with its states.
        values (`tuple`): The tensors that the prompt was made of, as weak references, with their versions.
        others (`list`): What the adapters of other methods did beside it.
    """

    names: tuple[str, ...]
    prompt: Optional[Prompt] = None
    values: tuple = ()
    others: list = field(default_factory=list)

    def is_current(self, stack: Optional[nn.Module]) -> bool:
        """Whether a backbone has the same prompt in front now."""
        if stack is None:  # the adapters were removed
            return not self.names
        layer = layer_of(stack)
        return self.names == layer.prompt_names and self.values == _values(layer, self.names)

    def takes_requests(self, stack: Optional[nn.Module]) -> bool:
        """Whether a new request is answered as all are: with the same prompt, beside the same adapters of others."""
        return self.is_current(stack) and (not self.names or self.others == state_of_others(stack))

    def check(self, stack: Optional[nn.Module]) -> None:
        """Refuses to go on once another adapter is active, or the values of the prompt were changed.

        Raises:
            ValueError: The prompt is another one now.
        """
        if not self.is_current(stack):
            was = f"adapter {self.names[0]!r}" if self.names else "no adapter"
            raise ValueError(
                f"This manager of continuous batching was made under {was}, and the prompt is another one now. Its "
                "blocks hold keys and values of texts behind the prompt of then. Stop the manager, and make a new one."
            )


# By backbone, what the manager that was made last serves. Its cache is made later, by a thread of its own.
_served: weakref.WeakKeyDictionary[nn.Module, Served] = weakref.WeakKeyDictionary()


def attach(model: nn.Module) -> None:
    """Lets the generating model around a backbone serve prompts by continuous batching; `detach` undoes it."""
    for module in model.modules():
        if isinstance(module, GenerationMixin) and find_stack(module) is not None:
            setattr(module, ENTRY, functools.partial(init_continuous_batching, module))


def detach(model: nn.Module) -> None:
    """Undoes [`attach`]."""
    _served.pop(find_stack(model), None)
    for module in model.modules():
        if getattr(vars(module).get(ENTRY), "func", None) is init_continuous_batching:
            delattr(module, ENTRY)


def init_continuous_batching(
    model: PreTrainedModel,
    generation_config: Any = None,
    continuous_batching_config: Optional[ContinuousBatchingConfig] = None,
    **further: Any,
) -> ContinuousBatchingManager:
    """What the method of this name does on a model with adapters.

    Args:
        model (`PreTrainedModel`): The model that generates.
        generation_config (`GenerationConfig`, *optional*): As transformers takes it.
        continuous_batching_config (`ContinuousBatchingConfig`, *optional*): As transformers takes it.
        further (`dict`): The other arguments of transformers' method.

    Raises:
        ValueError: The prompt can't stand in front of paged keys. Nothing is changed then.
    """
    stack = find_stack(model)
    served = _served[stack] = _serve(stack)
    kept = getattr(model, "_cached_continuous_batching_manager", None)
    if kept is not None and not getattr(kept, "ptuning_served", served).takes_requests(stack):
        model.destroy_cached_continuous_batching_manager()
    config = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
    config = copy.copy(config) if config is not None else ContinuousBatchingConfig()
    if served.prompt is not None:
        # `generate_batch` tells the longest text here. What fails behind this, it writes to its log only.
        _check_length(stack, served, getattr(further.get("workload_hints"), "max_prompt_length", 0))
        _check_config(config)
        config.auto_switch_to_flash = False  # flash kernels take no mask
    _leave_attention(stack)
    try:
        make = getattr(type(model), ENTRY)
        manager = make(model, generation_config, continuous_batching_config=config, **further)
    except BaseException:
        _take_attention(stack)
        raise
    manager.ptuning_served = served
    manager.add_request = functools.partial(_add_request, manager)
    manager.stop = functools.partial(_stop, manager)
    return manager


def _check_config(config: ContinuousBatchingConfig) -> None:
    if config.default_compile_level or config.varlen_compile_config or config.decode_compile_config:
        raise ValueError(
            "Continuous batching with a prompt can't be compiled. Leave `default_compile_level`, "
            "`varlen_compile_config` and `decode_compile_config` of the `ContinuousBatchingConfig` at their defaults."
        )


def _add_request(manager: ContinuousBatchingManager, input_ids: list[int], *args: Any, **kwargs: Any) -> Any:
    """`manager.add_request`, behind a check of the adapter and of the length of the text."""
    stack, served = find_stack(manager.model), manager.ptuning_served
    served.check(stack)
    if not served.takes_requests(stack):
        raise ValueError(
            f"This manager of continuous batching was made beside adapters of other methods which have changed since, "
            f"and the prompt of adapter {served.names[0]!r} with them. Stop the manager, and make a new one."
        )
    _check_length(stack, served, len(input_ids))
    return type(manager).add_request(manager, input_ids, *args, **kwargs)


def _check_length(stack: nn.Module, served: Served, text: int) -> None:
    """Refuses a text that has no positions left behind the prompt."""
    limit = stack.ptuning.backbone.max_positions if served.prompt is not None else None
    if limit is not None and text + served.prompt.positions > limit:
        length = served.prompt.positions
        raise ValueError(
            f"{length} virtual tokens and {text} text tokens are {length + text} positions, and "
            f"{type(stack).__name__} has {limit}. Truncate the text to {limit - length} tokens."
        )


def _stop(manager: ContinuousBatchingManager, *args: Any, **kwargs: Any) -> None:
    """`manager.stop`. The attention takes prompts in other calls again."""
    try:
        type(manager).stop(manager, *args, **kwargs)
    finally:
        if (stack := find_stack(manager.model)) is not None:
            _take_attention(stack)


def _leave_attention(stack: PreTrainedModel) -> None:
    """Gives the attention the name that transformers knows as one for continuous batching."""
    stack.config._attn_implementation = own_name(stack.config._attn_implementation)


def _take_attention(stack: PreTrainedModel) -> None:
    backbone = stack.ptuning.backbone
    if backbone.deep_way == "attention" and backbone.not_in_attention is None:
        adapt_attention(stack)


def _serve(stack: PreTrainedModel) -> Served:
    """The prompt that is active, with its keys and values.

    Raises:
        ValueError: It can't stand in front of paged keys.
    """
    layer = layer_of(stack)
    names = layer.prompt_names
    if not names:
        return Served(())
    if (reason := _why_not(stack, layer)) is not None:
        raise ValueError(
            f"Continuous batching can't put the prompt of {describe(names)} in front of the texts of a "
            f"{type(stack).__name__}: {reason}. Call `generate` with a padded batch."
        )
    with torch.no_grad(), in_evaluation(stack):
        make = layer.make_deep_prompt if layer.is_deep(names[0]) else layer.make_prompt
        prompt = make(names, layer.dtype or stack.dtype)
    states = prompt.states or record_prompt(stack, prompt.vectors[0])[0]
    # Values come as transposed views. Each step would read them out of order.
    states = {
        index: (key.detach().contiguous(), value.detach().contiguous()) for index, (key, value) in states.items()
    }
    prompt = Prompt(names, prompt.length, states=states, taken=prompt.taken)
    return Served(names, prompt, _values(layer, names), state_of_others(stack))


def _why_not(stack: PreTrainedModel, layer: PTuningLayer) -> Optional[str]:
    """Why the active prompt can't stand in front of paged keys; `None` if it can."""
    attachment = stack.ptuning
    backbone = attachment.backbone
    if backbone.decoder is not None or not backbone.is_causal:
        return "it is no decoder"
    if isinstance(layer.prompt_names, Rows):
        return "`adapter_names` chooses adapters by row, and its rows are made of many texts"
    if len({layer.is_deep(name) for name in layer.prompt_names}) > 1:
        return "a prompt in every layer is composed with one at the input"
    if layer.placeholder_id is not None:
        return "its slots are in the texts, of which a step may bring a part"
    if backbone.deep_way != "attention":
        return backbone.not_deep or "its attention does not go through transformers' attention interface"
    if (implementation := own_name(stack.config._attn_implementation)) not in (*MASKED_NAMES, *PAGED_NAMES):
        return f"its attention implementation is {implementation!r}, not one of {[*MASKED_NAMES]}"
    if layer.is_deep(layer.prompt_names[0]):
        return None
    return backbone.not_in_attention or backbone.not_recorded or attachment.not_recorded


def _values(layer: PTuningLayer, names: tuple[str, ...]) -> tuple:
    """What the prompt and the vocabulary are made of, to be compared: by identity, address and version counter."""
    if not names:
        return ()
    encoders = [layer.ptuning_encoders[name] for name in names if name in layer.ptuning_encoders]
    tensors = [tensor for module in (layer.base_layer, *encoders) for tensor in module.parameters()]
    return tuple((weakref.ref(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def is_paged(arguments: dict[str, Any]) -> bool:
    """Whether a call of the backbone is a step of continuous batching."""
    return isinstance(arguments.get("cache"), PagedAttentionCache)


def run(stack: PreTrainedModel, forward: Any, given: dict[str, Any]) -> Any:
    """Runs a step of continuous batching.

    Args:
        stack (`PreTrainedModel`): The backbone.
        forward (`Callable`): Its own `forward`.
        given (`dict`): What it was called with.

    Raises:
        ValueError: The prompt is another one than that which the cache was filled behind.
    """
    cache = given["cache"]
    if not isinstance(cache, PagedBehindPrompt):
        _bind(stack, cache)
    served = cache.ptuning_served
    served.check(stack)
    prompt = served.prompt
    if prompt is None:
        return forward(**given)
    implementation, mask = stack.config._attn_implementation, given.get("attention_mask")
    if mask is None or implementation not in PAGED_NAMES:
        raise ValueError(
            f"The attention implementation of this {type(stack).__name__} was changed to {implementation!r} while "
            f"continuous batching was going on. With a prompt it has to be one of {[*PAGED_NAMES]}."
        )
    positions = given["position_ids"]
    window = getattr(stack.config, "sliding_window", None)
    if isinstance(mask, dict):
        mask = {kind: _widen(part, kind, positions, prompt.length, window) for kind, part in mask.items()}
    else:
        (kind,) = given["cu_seq_lens_k"]
        mask = _widen(mask, kind, positions, prompt.length, window)
    changes = {"attention_mask": mask, "position_ids": positions + prompt.positions}
    return forward(**{**given, **changes})


def _bind(stack: PreTrainedModel, cache: PagedAttentionCache) -> None:
    """Notes at a new cache what stands in front of its texts, and lets it return that."""
    served = _served.get(stack) or Served(())
    cache.ptuning_served = served
    cache.__class__ = _class_behind_prompt(type(cache))


def _widen(mask: torch.Tensor, kind: str, positions: torch.Tensor, length: int, window: Optional[int]) -> torch.Tensor:
    """Puts the prompt's columns in front: (1, 1, Q, K) → (1, 1, Q, V + K), for Q tokens at `positions`, (1, Q)."""
    columns = mask.new_zeros((*mask.shape[:-1], length))
    if kind == "sliding_attention" and window is not None:
        distance = positions[:, None, :, None] + length - torch.arange(length, device=mask.device)
        columns = columns.masked_fill(distance >= window, torch.finfo(mask.dtype).min)
    return torch.cat([columns, mask], dim=-1)


class PagedBehindPrompt:
    """Mixed into the class of a paged cache: the prompt is in front of the keys and values that it returns."""

    def update(self, key_states, value_states, layer_idx, kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = super().update(key_states, value_states, layer_idx, kwargs)
        if (prompt := self.ptuning_served.prompt) is None:
            return key, value
        of_key, of_value = prompt.states[layer_idx]
        return torch.cat([of_key.to(key), key], dim=2), torch.cat([of_value.to(value), value], dim=2)


@functools.cache
def _class_behind_prompt(cache_class: type[PagedAttentionCache]) -> type[PagedAttentionCache]:
    return type(f"{cache_class.__name__}BehindPrompt", (PagedBehindPrompt, cache_class), {})
