# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter for each row of a batch: its prompt, and its head where it has one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from ..forward.checkpointing import is_checkpointed
from ..prompts.adapter import base_of, find_layer, find_stack
from ..prompts.choice import BASE, CHOOSING, Names, Rows, choosing, chosen_rows, read_rows
from ..prompts.layer import PTuningLayer
from ..prompts.stored import Ready


# Arguments of `generate` that `forward` does not have.
OF_GENERATE = {"generation_config", "max_length", "max_new_tokens", "num_beams", "num_return_sequences", "streamer"}

# Arguments that have a row for each of the batch.
OF_INPUT = ("input_ids", "inputs", "inputs_embeds")

# The attribute of a head that has the hook.
HOOKED = "ptuning_by_row"


@contextmanager
def use_adapters(model: nn.Module, adapter_names: str | Sequence[str | tuple[str, ...]]) -> Iterator[None]:
    """Inside, each row of a batch has adapters of its own, or all rows have the one that is named.

    A `PeftModel` takes `adapter_names` in its calls and in `generate`. This is the same for a transformers model that
    has the adapters, whose `generate` takes no arguments of others. Each thread chooses for itself: one that is
    started inside has not chosen, and needs a `use_adapters` of its own.

    Args:
        model (`nn.Module`): A `PeftModel`, or a transformers model with adapters of this package or a bank.
        adapter_names (`str` or `list`):
            A name for all rows; or for each row the name of an adapter, a tuple of names whose prompts stand in this
            order, or `"__base__"` for none. Where a row becomes several that are next to each other (beams, several
            answers, the choices of a question), they have its adapters.

    Raises:
        TypeError: It is not a list of names.
        ValueError: A name is unknown, a row has several heads, or the model has no adapters of this package.

    Example:

    ```python
    with use_adapters(model, ["style", "__base__", ("style", "task")]):
        outputs = model.generate(**batch)
    ```
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names  # one row, and all are in its place
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`use_adapters` takes a model, got a {type(model).__name__}. Of a bank pass `bank.base_model`."
        )
    with choose_adapters(base_of(model), names, may_repeat=True):
        yield


@contextmanager
def choose_for_call(model: nn.Module, adapter_names: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """As [`choose_adapters`], for one call of the model or of its `generate` with these arguments."""
    _check_number(adapter_names, args, kwargs)
    with choose_adapters(model, adapter_names, _may_repeat(model, args, kwargs)):
        yield


@contextmanager
def choose_adapters(model: nn.Module, adapter_names: Any, may_repeat: bool) -> Iterator[None]:
    """As [`use_adapters`], with a list of names.

    Args:
        model (`nn.Module`): The model with the tuner layer, and no `PeftModel`.
        adapter_names (`list`): As of [`use_adapters`].
        may_repeat (`bool`): Whether a batch may have several rows in place of each.
    """
    layer = find_layer(model)
    if layer is None:
        raise ValueError(f"This {type(model).__name__} has no P-tuning adapter of this package, and no prompt bank.")
    rows = read_rows(adapter_names, layer.known, may_repeat)
    _check_enabled(layer, rows)
    for names in {names for names in rows.names if len(names) > 1}:
        layer.check_together(names)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    heads = _find_heads(model, layer, wrappers, set(rows.names))
    for wrapper in wrappers:
        if isinstance(wrapper, TrainableTokensWrapper):
            _check_same_rows(wrapper, rows)
    for module in heads:
        if not hasattr(module, HOOKED):
            setattr(module, HOOKED, module.register_forward_hook(_apply_heads, with_kwargs=True))
    stack = find_stack(model)
    inside = set(stack.modules()) & heads.keys() if heads else set()
    _check_rerun(stack, {module: heads[module] for module in inside})
    differ_inside = any(len(set(heads[module].values())) > 1 for module in inside)
    with choosing((layer, *heads), replace(rows, heads=heads, differ_inside=differ_inside)):
        yield


def _check_number(adapter_names: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuses names that are not one for each row that is given: a row that becomes several does so later."""
    given = [*args[:1], *(kwargs.get(name) for name in OF_INPUT)]
    rows = next((len(value) for value in given if isinstance(value, torch.Tensor) and value.dim()), None)
    if rows is None or not isinstance(adapter_names, (list, tuple)) or not adapter_names:
        return
    if rows != len(adapter_names):
        raise ValueError(
            f"The batch has {rows} rows, and `adapter_names` has {len(adapter_names)}. Pass one name for each row of "
            f"the batch; {BASE!r} is a row without an adapter."
        )


def _check_enabled(layer: PTuningLayer, rows: Rows) -> None:
    """Refuses prompts of a bank while they would be left out."""
    stored = [name for names in rows.names for name in names if name not in layer.ptuning_encoders]
    if layer.disable_adapters and stored:
        raise ValueError(
            f"`adapter_names` has {stored[0]!r} of the bank, and the adapters of the model are disabled, and the bank "
            "with them. Enable them first; where no adapter is left, by `bank.layer.enable_adapters(True)`."
        )


def _may_repeat(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments may turn a row into several.

    `generate` does, the choices of a question do, and a model that says so (`ClozeClassifier`).
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    has_choices = isinstance(ids, torch.Tensor) and ids.dim() == 3 and not ids.is_floating_point()
    return has_choices or getattr(model, "repeats_rows", False) or not OF_GENERATE.isdisjoint(kwargs)


Heads = dict[nn.Module, dict[Names, Optional[nn.Module]]]


def _check_rerun(stack: nn.Module, inside: Heads) -> None:
    """Refuses modules inside the backbone that would be others when layers run again in the backward pass."""
    if not inside or not torch.is_grad_enabled() or not is_checkpointed(stack):
        return
    if any(set(by_names.values()) != {_active_head(module)} for module, by_names in inside.items()):
        raise ValueError(
            "`adapter_names` chooses among modules inside the backbone (`modules_to_save`), and gradient "
            "checkpointing runs its layers again in the backward pass, when the choice is over. Switch gradient "
            "checkpointing off, or call the model for each of the adapters, the active one."
        )


def _find_heads(
    model: nn.Module, layer: PTuningLayer, wrappers: Collection[nn.Module], different: Collection[Names]
) -> Heads:
    """By module that some adapter has one of its own for, and by the names of a row, that of the row.

    It is `None` where a row has the base model's own, which is the module itself.

    Raises:
        ValueError: Several adapters of a row have one.
    """
    modules = {wrapper for wrapper in wrappers if isinstance(wrapper, ModulesToSaveWrapper)}
    stored = {name: layer.stored(name) for names in different for name in names if name not in layer.ptuning_encoders}
    places = {}
    for name, ready in stored.items():
        for path in ready.modules:
            try:
                places[model.get_submodule(path)] = path
            except AttributeError:
                raise ValueError(
                    f"The prompt {name!r} of the bank came with a module {path!r}, and this {type(model).__name__} "
                    "around the same backbone has none. Call the model that the bank is on."
                ) from None
    return {
        module: {names: _head_of(module, names, places.get(module), stored) for names in different}
        for module in modules | places.keys()
    }


def _head_of(module: nn.Module, names: Names, path: Optional[str], stored: dict[str, Ready]) -> Optional[nn.Module]:
    is_wrapper = isinstance(module, ModulesToSaveWrapper)
    wrapped, own = (module.modules_to_save, module.original_module) if is_wrapper else ({}, None)
    in_bank = {name for name in names if name in stored and path in stored[name].modules}
    found = [name for name in dict.fromkeys(names) if name in wrapped or name in in_bank]
    if len(found) > 1:
        raise ValueError(
            f"The adapters {found} of a row have each a module of their own (`modules_to_save`) in place of one "
            f"{type(own or module).__name__}. A row can have one of them."
        )
    if not found:
        return own
    return wrapped[found[0]] if found[0] in wrapped else stored[found[0]].module(path, own or module)


def _apply_heads(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a head: the outputs of each row's own, (B, …), in place of those of the active adapter's.

    PEFT's wrapper takes `adapter_names` too, but only around a single linear layer. The heads of RoBERTa and others
    are made of several.
    """
    rows = chosen_rows(module)
    if rows is None or getattr(module, "disable_adapters", False):
        return None
    active, by_names = _active_head(module), rows.heads[module]
    different = {by_names[names] for names in rows.names}
    if different == {active}:
        return None
    inputs = args[0] if args else None
    others = [value for value in (*args[1:], *kwargs.values()) if value is not None]
    is_single = isinstance(inputs, torch.Tensor) and all(isinstance(value, (bool, int, float)) for value in others)
    if not is_single or not isinstance(output, torch.Tensor):
        own = getattr(module, "original_module", module)
        raise ValueError(
            f"A {type(own).__name__}, of which adapters have one of their own (`modules_to_save`), gets or gives more "
            "than one tensor, and so can't be chosen by `adapter_names`. Call the model for each of the adapters, the "
            "active one."
        )
    if len(different) == 1:  # also inside the backbone, which computes prompts that are not as many as the rows
        return different.pop()(*args, **kwargs)
    # The backbone has checked the batch. Inside it, some modules get the tokens of all rows behind each other.
    of_batch = replace(rows, may_repeat=True).of_batch(type(module).__name__, len(inputs))
    heads = [by_names[names] for names in of_batch]
    outputs, order = [], []
    for head in dict.fromkeys(heads):
        own = [row for row, other in enumerate(heads) if other is head]
        outputs.append(output[own] if head is active else head(inputs[own], *args[1:], **kwargs))
        order += own
    return torch.cat(outputs)[torch.tensor(order, device=output.device).argsort()]


def _active_head(module: nn.Module) -> Optional[nn.Module]:
    """The head that a module has called itself; `None` if it is one, and no wrapper."""
    if not isinstance(module, ModulesToSaveWrapper):
        return None
    names = module.active_adapters
    is_own = not names or any(name not in module.modules_to_save for name in names)
    return module.original_module if is_own else module.modules_to_save[names[0]]


def remove_hooks(model: nn.Module) -> None:
    """Takes off what the choice of adapters has left on modules of a model."""
    for module in model.modules():
        if (hook := vars(module).pop(HOOKED, None)) is not None:
            hook.remove()
        vars(module).pop(CHOOSING, None)


def _check_same_rows(wrapper: TrainableTokensWrapper, rows: Rows) -> None:
    """Refuses trained rows of the vocabulary that are not those of all rows of the batch."""
    trained = {tuple(n for n in names if n in wrapper.token_adapter.trainable_tokens_delta) for names in rows.names}
    active = tuple(n for n in wrapper.active_adapters if n in wrapper.token_adapter.trainable_tokens_delta)
    if trained != {active}:
        raise ValueError(
            "`adapter_names` chooses among adapters that train tokens of the vocabulary (`trainable_token_indices`), "
            f"and these are the same for a whole batch: those of {list(active)} are active. Call the model for each."
        )
