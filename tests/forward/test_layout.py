# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Properties of widen and trim over shapes, masks and dtypes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ptuning_ext.forward.layout import (
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


sizes = st.integers(1, 6)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@st.composite
def masks(draw, dtype=torch.long) -> torch.Tensor:
    rows = draw(st.integers(1, 4))
    columns = draw(st.integers(1, 8))
    return torch.tensor([[draw(st.integers(0, 1)) for _ in range(columns)] for _ in range(rows)], dtype=dtype)


@given(batch=sizes, length=sizes, text=st.integers(0, 6), width=sizes, dtype=dtypes, prompt_dtype=dtypes)
def test_trim_undoes_widen(batch, length, text, width, dtype, prompt_dtype) -> None:
    embeds = torch.randn(batch, text, width).to(dtype)
    prompt = torch.randn(length, width).to(prompt_dtype)
    widened = widen_embeds(prompt, embeds)
    assert widened.dtype == dtype
    assert widened.shape == (batch, length + text, width)
    assert torch.equal(widened[:, :length], prompt.to(dtype).expand(batch, -1, -1))
    assert torch.equal(trim(widened, batch, length + text, length), embeds)


@given(batch=sizes, length=sizes, text=sizes, heads=sizes, experts=sizes)
def test_trim_takes_what_has_the_prompts_rows_and_nothing_else(batch, length, text, heads, experts) -> None:
    total = length + text
    hidden, router = torch.randn(batch, total, 5), torch.randn(batch * total, experts)
    attention, other, nothing = torch.randn(batch, heads, total, total), torch.randn(3), None
    streams = torch.randn(batch, total, 2, 5)
    output = (hidden, (hidden, None), [router], attention, other, nothing, streams)
    trimmed = trim(output, batch, total, length)
    assert torch.equal(trimmed[0], hidden[:, length:])
    assert torch.equal(trimmed[1][0], hidden[:, length:])
    assert trimmed[1][1] is None
    assert torch.equal(trimmed[2][0], router.view(batch, total, experts)[:, length:].reshape(-1, experts))
    assert torch.equal(trimmed[3], attention[:, :, length:])
    assert trimmed[4] is other
    assert trimmed[5] is None
    assert torch.equal(trimmed[6], streams[:, length:])


@given(mask=masks(), length=sizes, fill=st.integers(0, 1), as_bool=st.booleans())
def test_widened_mask_has_the_prompt_in_front(mask, length, fill, as_bool) -> None:
    mask = mask.bool() if as_bool else mask
    widened = widen_per_token(mask, length, fill)
    assert widened.dtype == mask.dtype
    assert (widened[:, :length] == fill).all()
    assert torch.equal(widened[:, length:], mask)


@given(mask=masks())
def test_counted_positions_count_the_real_tokens(mask) -> None:
    positions = count_positions(mask)
    for row, seen in zip(positions, mask.bool()):
        assert row[seen].tolist() == list(range(int(seen.sum())))
        assert (row >= 0).all()


@given(length=sizes, text=sizes, first=st.integers(0, 3), leading=st.sampled_from([(), (3,), (4,)]))
def test_positions_go_on_behind_the_prompt(length, text, first, leading) -> None:
    positions = torch.arange(text).expand(*leading, 2, text) + first
    widened = widen_positions(positions, length, first)
    assert torch.equal(widened, torch.arange(first, first + length + text).expand(*leading, 2, -1))


@given(mask=masks(), length=sizes)
def test_the_prompt_stands_between_padding_and_text(mask, length) -> None:
    batch, text = mask.shape
    total = text + length
    padding = leading_padding(mask)
    marks = torch.arange(1, text + 1).expand(batch, text)
    columns = columns_behind_padding(padding, total, length)
    ordered = take_columns(widen_per_token(marks, length, 0), columns)
    for row, seen, pads in zip(ordered.tolist(), mask.tolist(), padding[:, 0].tolist()):
        assert seen[:pads] == [0] * pads
        assert seen[pads : pads + 1] in ([], [1])
        assert row == list(range(1, pads + 1)) + [0] * length + list(range(pads + 1, text + 1))
    back = user_columns(padding, total, length)
    assert torch.equal(take_columns(ordered, back), marks)
    assert torch.equal(trim(ordered[..., None].float(), batch, total, length, back)[..., 0], marks.float())
    shared = take_columns(torch.arange(total)[None], columns)  # one row for all
    assert torch.equal(shared, columns)
