# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts that are not the same for all rows, and prompts in every layer together with others at the input.

The prompts of a batch become one [`Prompt`] of B rows and as many columns as the longest has. A shorter one stands at
the end of its columns. Its other columns are hidden by masks, and the positions of its text begin earlier.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..prompts.choice import Names, Rows
from ..prompts.layer import PTuningLayer
from ..prompts.prompt import Prompt, States
from . import deep, in_attention, in_row, one_pass
from .call import Call
from .seen import NotRecorded


def run(
    stack: PreTrainedModel,
    forward: Callable,
    call: Call,
    layer: PTuningLayer,
    names: Names | Rows,
    dtype: torch.dtype,
    why_in_row: Callable[[], Optional[str]],
) -> Any:
    """Runs a call that begins a sequence.

    Args:
        stack (`PreTrainedModel`): The backbone.
        forward (`Callable`): Its own `forward`.
        call ([`Call`]): What was asked.
        layer ([`PTuningLayer`]): The tuner layer.
        names (`tuple[str, ...]` or [`Rows`]): The adapters, for all rows or by row.
        dtype (`torch.dtype`): That of the text's embeddings.
        why_in_row (`Callable`): Returns why a prompt at the input stands in the row now, if it does.

    Raises:
        ValueError: The model can't have such prompts in one batch.
    """
    of_rows = names.of_batch(call.stack, len(call.tokens)) if isinstance(names, Rows) else (names,)
    check_no_template(layer, of_rows)
    if torch.is_grad_enabled():  # training may write through `.data`, which leaves no trace
        stack.ptuning.states.drop(*{name for each in of_rows for name in each})
    is_due = one_pass.is_due(stack, call)
    if len({layer.is_deep(name) for each in of_rows for name in each}) > 1:  # the one pass has no deep prompts
        is_due = is_due and (torch.is_grad_enabled() or not one_pass.has_pass_of_its_own(stack, call))
    if why_in_row() is None and not is_due:
        try:
            prompts = _with_states(stack, forward, layer, list(dict.fromkeys(of_rows)), dtype)
            joined = join(names, of_rows, prompts, call.tokens.device, call.backbone.counts_itself)
            return in_attention.run(forward, call, joined)
        except NotRecorded as reason:
            stack.ptuning.not_recorded = str(reason)
    vectors, states = (_part(call, layer, names, of_rows, is_deep, dtype) for is_deep in (False, True))
    if why_in_row() is None and is_due and states is None and not one_pass.costs_more(call, vectors):
        try:
            return one_pass.run(stack, forward, call, vectors, call.embeds(layer.embed))
        except NotRecorded as reason:
            stack.ptuning.not_recorded = str(reason)

    def why() -> str:
        others = "gradients are asked for" if torch.is_grad_enabled() else "it has no pass of its own in this call"
        return why_in_row() or others

    if states is None:
        return _run_in_row(stack, forward, call, layer, vectors, why)
    _check_deep(call, states)
    run_deep = functools.partial(_run_deep, stack, forward, layer, states)
    if vectors is None:
        return run_deep(**call.given)
    if call.cache is not None:
        raise ValueError(
            f"{call.stack} got a cache, and it can't go on behind a prompt in every layer and one at the input at "
            f"once, because the second stands in the row here: {why()}. Leave the cache out."
        )
    if call.backbone.is_rotary and not call.backbone.is_causal and call.given_positions is None:
        positions = in_attention.text_positions(call, call.plain_mask, states)
        call = dataclasses.replace(call, given=call.arguments(position_ids=positions), given_positions=positions)
    if "use_cache" in call.backbone.parameters:
        run_deep = functools.partial(run_deep, use_cache=False)
    return _run_in_row(stack, run_deep, call, layer, vectors, why)


def _run_in_row(
    stack: nn.Module,
    forward: Callable,
    call: Call,
    layer: PTuningLayer,
    prompt: Prompt,
    why_in_row: Callable[[], Optional[str]],
) -> Any:
    if prompt.lengths is not None:
        in_row.check_positions(call)
    return in_row.begin(stack, forward, call, prompt, call.embeds(layer.embed), why_in_row)


def _run_deep(stack: nn.Module, forward: Callable, layer: PTuningLayer, prompt: Prompt, **given: Any) -> Any:
    """The call of a backbone with a deep prompt, whose text may begin with a prompt at the input."""
    return deep.run(stack, forward, Call.read(stack, stack.ptuning.backbone, (), given), prompt, layer.embed)


def check_no_template(layer: PTuningLayer, of_rows: Sequence[Names]) -> None:
    """Refuses adapters whose prompt stands where a template says.

    Raises:
        ValueError: There is one.
    """
    for name in {name for names in of_rows for name in names}:
        if layer.encoder(name).placeholder_id is not None:
            raise ValueError(
                f"Adapter {name!r} has a prompt template, which says where in a text its prompt stands. It can't be "
                "chosen by row, or together with others. Make it the active one: `model.set_adapter`."
            )


def _check_deep(call: Call, prompt: Prompt) -> None:
    way = call.backbone.deep_way
    if prompt.lengths is not None and way != "attention":
        raise ValueError(
            f"{call.stack} takes a prompt in every layer through its {way}, and all rows of a batch need such prompts "
            "of one length. Pass rows with adapters of one length and depth."
        )


def _part(
    call: Call, layer: PTuningLayer, names: Names | Rows, of_rows: Sequence[Names], is_deep: bool, dtype: torch.dtype
) -> Optional[Prompt]:
    """The deep prompts of a batch, or those at its input; `None` if there are none."""
    chosen = [tuple(name for name in each if layer.is_deep(name) == is_deep) for each in of_rows]
    make = layer.make_deep_prompt if is_deep else layer.make_prompt
    prompts = {each: make(each, dtype) if each else None for each in dict.fromkeys(chosen)}
    return join(names, chosen, prompts, call.tokens.device, call.backbone.counts_itself) if any(chosen) else None


def _with_states(
    stack: PreTrainedModel, forward: Callable, layer: PTuningLayer, chosen: Sequence[Names], dtype: torch.dtype
) -> dict[Names, Optional[Prompt]]:
    """The prompts of adapters with their keys and values: deep ones in front, then what the others become there."""
    fronts = {each: tuple(name for name in each if layer.is_deep(name)) for each in chosen}
    made = {each: layer.make_deep_prompt(front, dtype) if front else None for each, front in fronts.items()}
    inputs = {each: tuple(name for name in each if not layer.is_deep(name)) for each in chosen}
    plain = [layer.make_prompt(each, dtype) for each in chosen if each and inputs[each] == each]
    if plain:
        stored = in_attention.open_stored(stack, plain[0].vectors.device)
        made |= {prompt.names: prompt for prompt in in_attention.with_states(stack, forward, plain, stored)}
    for each in chosen:
        if fronts[each] and inputs[each]:
            behind = [layer.make_prompt(inputs[each], dtype)]
            (prompt,) = in_attention.with_states(stack, forward, behind, None, made[each])
            made[each] = _behind(each, made[each], prompt)
    return made


def _behind(names: Names, front: Prompt, behind: Prompt) -> Prompt:
    """Two prompts with states as one."""
    states = {
        index: tuple(torch.cat([one.to(other), other], dim=2) for one, other in zip(front.states[index], pair))
        for index, pair in behind.states.items()
    }
    length, positions = front.length + behind.length, front.positions + behind.positions
    return Prompt(names, length, states=states, taken=positions)


def join(
    names: Names | Rows,
    of_rows: Sequence[Names],
    prompts: dict[Names, Optional[Prompt]],
    device: torch.device,
    counts_itself: bool = True,
) -> Prompt:
    """The prompts of all rows as one.

    Args:
        names (`tuple[str, ...]` or [`Rows`]): What was chosen.
        of_rows (`Sequence`): The adapters of each row, in `prompts`, or those of all.
        prompts (`dict`): By adapters, their prompt with vectors (1, V, H) or with states; `None` for none.
        device (`torch.device`): Where lengths and positions are needed.
        counts_itself (`bool`): As of [`~peft_ptuning_ext.backbone.Backbone`].

    Raises:
        ValueError: Some prompts are in other layers than others.
    """
    made = {each: prompt for each, prompt in prompts.items() if prompt is not None}
    length = max(prompt.length for prompt in made.values())
    order = list(prompts)
    is_in_order = list(of_rows) == order
    index = None if is_in_order else torch.tensor([order.index(each) for each in of_rows], device=device)
    some = next(iter(made.values()))
    if any((prompt.states or {}).keys() != (some.states or {}).keys() for prompt in made.values()):
        raise ValueError(
            "`adapter_names` has deep prompts of other `prompt_stacks` in one batch. They have keys and values in "
            "other layers. Pass the rows of each `prompt_stacks` in a batch of their own."
        )

    def gather(values: list[Optional[torch.Tensor]]) -> torch.Tensor:
        like = next(value for value in values if value is not None)
        padded = [_pad(value, like, length) for value in values]
        return padded[0] if len(padded) == 1 else torch.cat(padded)

    def gather_by_row(values: list[Optional[torch.Tensor]]) -> torch.Tensor:
        whole = gather(values)
        return whole if index is None else whole[index.to(whole.device)]

    states: Optional[States] = None
    if some.states is not None:
        of_layer = {i: [None if p is None else p.states[i] for p in prompts.values()] for i in some.states}
        states = {
            i: tuple(gather_by_row([None if pair is None else pair[kind] for pair in pairs]) for kind in (0, 1))
            for i, pairs in of_layer.items()
        }
    vectors = None if some.vectors is None else gather([None if p is None else p.vectors for p in prompts.values()])
    lengths = [0 if prompts[each] is None else prompts[each].length for each in of_rows]
    bare = [not each for each in names.names] if isinstance(names, Rows) and not counts_itself else []
    starts = [0 if prompts[each] is None else prompts[each].positions for each in of_rows]
    return Prompt(
        names,
        length,
        vectors=vectors,
        states=states,
        taken=max(starts),
        lengths=torch.tensor(lengths, device=device) if len(set(lengths)) > 1 else None,
        starts=torch.tensor(starts, device=device) if len(set(starts)) > 1 or len(set(lengths)) > 1 else None,
        bare=torch.tensor(bare, device=device) if any(bare) else None,
        of_row=None if vectors is None else index,
    )


def _pad(value: Optional[torch.Tensor], like: torch.Tensor, length: int) -> torch.Tensor:
    """(1, V, H) or (1, heads, V, D) with as many columns as `length`, behind zeros."""
    if value is None:
        return like.new_zeros(*like.shape[:-2], length, like.shape[-1])
    return functional.pad(value, (0, 0, length - value.shape[-2], 0))
