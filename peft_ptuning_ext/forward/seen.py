# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What an attention function sees: tried on two tokens behind two, because neither its name nor its code tells.

A function that gets no mask goes by the model's being causal. Where there are more keys than queries, some let the
first query see the first key only, some let the last query see the last key. Values that are 1 at one key and 0 at all
others show which queries see it, whatever the function does with scores.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Optional

import torch
from torch import nn
from transformers.masking_utils import flash_attention_mask


class NotRecorded(Exception):
    """What a pass of the prompt found out about the backbone: why its keys and values can't be computed apart."""


class Form(Enum):
    """The mask with which a function sees what is in front of the text, and of the text what is not ahead."""

    NONE = "no mask"
    ADDITIVE = "additive"
    BOOLEAN = "boolean"


# What functions were found to take. By kind of device, too: a function may call another kernel on each.
_forms: dict[tuple[Any, str, bool], Optional[Form]] = {}
_keeps_apart: dict[tuple[Any, str], bool] = {}

# Two queries and their keys, and two keys more in front of these.
CAUSAL_ALONE = ((True, False), (True, True))
CAUSAL = ((True, True, True, False), (True, True, True, True))
ALL = ((True,) * 4,) * 2
# Two texts of one token, each behind a prompt of one.
APART = ((True, True, False, False), (False, False, True, True))

# In which order forms are tried on a function, by its mask function: first what it gets without a prompt. What only
# gets masks of padding might read past the end of another.
ORDERS = {None: [Form.NONE, Form.BOOLEAN, Form.ADDITIVE], flash_attention_mask: [Form.NONE]}
OTHER = [Form.BOOLEAN, Form.ADDITIVE, Form.NONE]

# Arguments that say nothing about two tokens.
LEFT_OUT = {"dropout": 0.0, "position_ids": None, "position_bias": None, "sliding_window": None}
LEFT_OUT |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))


def form_of(
    attention: Any,
    module: nn.Module,
    query: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict,
    is_causal: Optional[bool] = None,
) -> Form:
    """Returns the mask that a function takes to which the model gives none, or one of padding.

    Args:
        attention ([`NamedAttention`]): The function.
        module (`nn.Module`): A layer that calls it.
        query (`torch.Tensor`): (B, heads, S, D), of which only shape, dtype and device are read.
        value (`torch.Tensor`): (B, key-value heads, N, D), likewise.
        kwargs (`dict`): The further arguments of a call.
        is_causal (`bool`, *optional*): Whether the layer looks back only; by default, as it says.

    Raises:
        NotRecorded: It takes none.
    """
    if query.is_meta:
        return Form.NONE
    is_causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    form = _find_form(attention, is_causal, module, query, value, kwargs)
    if form is None:
        raise NotRecorded(f"its attention implementation {attention.name!r} does not see keys in front of the text's")
    return form


def check_packing(attention: Any, module: nn.Module, query: torch.Tensor, value: torch.Tensor, kwargs: dict) -> None:
    """Refuses several texts in one row for a function that does not keep them apart; arguments as for [`form_of`]."""
    if not query.is_meta and not _is_packing_seen(attention, module, query, value, kwargs):
        raise ValueError(
            f"The attention implementation {attention.name!r} got several texts packed into one row, and does not "
            "keep them apart by `cu_seq_lens_q` and `cu_seq_lens_k`. Pass one text per row, padded, with an attention "
            "mask."
        )


@torch.compiler.disable
def _find_form(attention: Any, is_causal: bool, *sample: Any) -> Optional[Form]:
    key = (attention, sample[1].device.type, is_causal)
    if key not in _forms:
        expected = dict.fromkeys(Form, CAUSAL) | {Form.NONE: CAUSAL if is_causal else ALL}
        forms = ORDERS.get(attention.mask_function, OTHER)
        if forms is not OTHER and is_causal and not _sees(CAUSAL_ALONE, attention, *sample, form=Form.NONE):
            forms = []  # its model sees what is ahead, prompt or not
        _forms[key] = next((form for form in forms if _sees(expected[form], attention, *sample, form=form)), None)
    return _forms[key]


@torch.compiler.disable
def _is_packing_seen(attention: Any, *sample: Any) -> bool:
    key = (attention, sample[1].device.type)
    if key not in _keeps_apart:
        query = sample[1]
        of_queries = torch.tensor([0, 1, 2], dtype=torch.int32, device=query.device)
        lengths = {"cu_seq_lens_q": of_queries, "cu_seq_lens_k": 2 * of_queries, "max_length_q": 1, "max_length_k": 2}
        _keeps_apart[key] = _sees(APART, attention, *sample, form=Form.NONE, **lengths)
    return _keeps_apart[key]


@torch.no_grad()
def _sees(
    expected: tuple[tuple[bool, ...], ...],
    attention: Callable,
    module: nn.Module,
    query: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict,
    form: Form,
    **more: Any,
) -> bool:
    """Whether each query sees exactly the keys that are expected."""
    width, (heads, of_values), number = query.shape[-1], value.shape[1::2], len(expected[0])
    seen = torch.tensor(expected, device=query.device)[None, None]
    masks = {Form.NONE: None, Form.BOOLEAN: seen}
    masks[Form.ADDITIVE] = query.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(query.dtype).min)
    queries, keys = query.new_zeros(1, query.shape[1], 2, width), query.new_zeros(1, heads, number, width)
    arguments = {name: LEFT_OUT.get(name, argument) for name, argument in kwargs.items()} | more
    shown = []
    try:
        for key in range(number):
            values = value.new_zeros(1, heads, number, of_values)
            values[:, :, key] = 1
            output, *_ = attention(module, queries, keys, values, masks[form], **arguments)
            shown.append(output[0].flatten(1) > 0)  # (2, heads · D)
    except Exception:  # whatever it says of a mask that it does not take
        return False
    columns = torch.stack(shown, dim=1)  # (2, keys, heads · D)
    return bool((columns == seen[0, 0, :, :, None]).all())
