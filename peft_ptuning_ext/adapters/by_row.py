# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter for each row of a batch: its prompt, and its head where it has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from ..prompts.adapter import find_layer
from ..prompts.choice import Names, Rows, choosing, chosen_rows, read_rows


# Arguments of `generate` that `forward` does not have.
OF_GENERATE = {"generation_config", "max_length", "max_new_tokens", "num_beams", "num_return_sequences", "streamer"}

# The attribute of a head that has the hook.
HOOKED = "ptuning_by_row"


@contextmanager
def use_adapters(model: nn.Module, adapter_names: Sequence[str | tuple[str, ...]]) -> Iterator[None]:
    """Inside, each row of a batch has adapters of its own.

    A `PeftModel` takes `adapter_names` in its calls and in `generate`. This is the same for a transformers model that
    has the adapters, whose `generate` takes no arguments of others. Each thread chooses for itself.

    Args:
        model (`nn.Module`): A `PeftModel`, or a transformers model with adapters of this package.
        adapter_names (`list`):
            For each row the name of an adapter, a tuple of names whose prompts stand in this order, or `"__base__"`
            for none. Where a row becomes several that are next to each other (beams, several answers, the choices of
            a question), they have its adapters.

    Raises:
        TypeError: It is not a list of names.
        ValueError: A name is unknown, a row has several heads, or the model has no adapters of this package.

    Example:

    ```python
    with use_adapters(model, ["style", "__base__", ("style", "task")]):
        outputs = model.generate(**batch)
    ```
    """
    with choose_adapters(model.base_model if isinstance(model, PeftModel) else model, adapter_names, True):
        yield


@contextmanager
def choose_adapters(model: nn.Module, adapter_names: Any, may_repeat: bool) -> Iterator[None]:
    """As [`use_adapters`]; `may_repeat`: whether a batch may have several rows in place of each."""
    layer = find_layer(model)
    if layer is None:
        raise ValueError(f"This {type(model).__name__} has no P-tuning adapter of this package.")
    rows = read_rows(adapter_names, layer.ptuning_encoders, may_repeat)
    heads = []
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            heads.append(module)
            for names in set(rows.names):
                _head_of(module, names)
            if not hasattr(module, HOOKED):
                setattr(module, HOOKED, module.register_forward_hook(_apply_heads, with_kwargs=True))
        elif isinstance(module, TrainableTokensWrapper):
            _check_same_rows(module, rows)
    with choosing((layer, *heads), rows):
        yield


def may_repeat(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments may turn a row into several: `generate`, and the choices of a question."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    has_choices = isinstance(ids, torch.Tensor) and ids.dim() == 3 and not ids.is_floating_point()
    return has_choices or not OF_GENERATE.isdisjoint(kwargs)


def _head_of(wrapper: ModulesToSaveWrapper, names: Names) -> nn.Module:
    """The head of a row's adapters.

    Raises:
        ValueError: Several of them have one.
    """
    found = [name for name in dict.fromkeys(names) if name in wrapper.modules_to_save]
    if len(found) > 1:
        raise ValueError(
            f"The adapters {found} of a row have each a module of their own (`modules_to_save`) in place of one "
            f"{type(wrapper.original_module).__name__}. A row can have one of them."
        )
    return wrapper.modules_to_save[found[0]] if found else wrapper.original_module


def _apply_heads(wrapper: ModulesToSaveWrapper, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a head: the outputs of each row's own, (B, …), in place of those of the active adapter's.

    PEFT's wrapper takes `adapter_names` too, but only around a single linear layer. The heads of RoBERTa and others
    are made of several.
    """
    rows = chosen_rows(wrapper)
    if rows is None or wrapper.disable_adapters:
        return None
    inputs, *others = args
    of_rows = rows.of_batch(type(wrapper.original_module).__name__, len(inputs))
    heads = [_head_of(wrapper, names) for names in of_rows]
    outputs, order = [], []
    for head in dict.fromkeys(heads):
        own = [row for row, other in enumerate(heads) if other is head]
        outputs.append(head(inputs[own], *others, **kwargs))
        order += own
    return torch.cat(outputs)[torch.tensor(order, device=output.device).argsort()]


def _check_same_rows(wrapper: TrainableTokensWrapper, rows: Rows) -> None:
    """Refuses trained rows of the vocabulary that are not those of all rows of the batch."""
    trained = {tuple(n for n in names if n in wrapper.token_adapter.trainable_tokens_delta) for names in rows.names}
    active = tuple(n for n in wrapper.active_adapters if n in wrapper.token_adapter.trainable_tokens_delta)
    if trained != {active}:
        raise ValueError(
            "`adapter_names` chooses among adapters that train tokens of the vocabulary (`trainable_token_indices`), "
            f"and these are the same for a whole batch: those of {list(active)} are active. Call the model for each."
        )
