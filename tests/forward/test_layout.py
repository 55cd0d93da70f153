# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Properties of where a prompt stands in a row, over shapes, masks and dtypes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ptuning_ext.forward.call import count_positions, leading_padding
from peft_ptuning_ext.forward.layout import Layout


sizes = st.integers(1, 6)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@st.composite
def masks(draw, dtype=torch.long) -> torch.Tensor:
    rows = draw(st.integers(1, 4))
    columns = draw(st.integers(1, 8))
    return torch.tensor([[draw(st.integers(0, 1)) for _ in range(columns)] for _ in range(rows)], dtype=dtype)


@st.composite
def places(draw) -> tuple[torch.Tensor, int, int]:
    """Places of V virtual tokens in a text of S tokens, in any order: (B, V), V and S."""
    rows, length, text = draw(sizes), draw(sizes), draw(sizes)
    return torch.tensor([[draw(st.integers(0, text)) for _ in range(length)] for _ in range(rows)]), length, text


@given(batch=sizes, length=sizes, text=st.integers(0, 6), width=sizes, dtype=dtypes, prompt_dtype=dtypes)
def test_trim_undoes_spread(batch, length, text, width, dtype, prompt_dtype) -> None:
    embeds = torch.randn(batch, text, width).to(dtype)
    prompt = torch.randn(1, length, width).to(prompt_dtype)
    layout = Layout.at(None, length, text)
    row = layout.spread(prompt, embeds)
    assert row.dtype == dtype
    assert row.shape == (batch, length + text, width)
    assert torch.equal(row[:, :length], prompt.to(dtype).expand(batch, -1, -1))
    assert torch.equal(layout.trim(row, batch), embeds)


@given(batch=sizes, length=sizes, text=sizes, heads=sizes, experts=sizes, in_front=st.booleans())
def test_trim_takes_what_has_the_prompts_rows_and_nothing_else(batch, length, text, heads, experts, in_front) -> None:
    total = length + text
    hidden, router = torch.randn(batch, total, 5), torch.randn(batch * total, experts)
    attention, other, nothing = torch.randn(batch, heads, total, total), torch.randn(3), None
    streams = torch.randn(batch, total, 2, 5)
    output = (hidden, (hidden, None), [router], attention, other, nothing, streams)
    # All of the prompt before the text's first token is another way to say that it is in front.
    layout = Layout.at(None if in_front else torch.zeros(batch, length, dtype=torch.long), length, text)
    trimmed = layout.trim(output, batch)
    assert torch.equal(trimmed[0], hidden[:, length:])
    assert torch.equal(trimmed[1][0], hidden[:, length:])
    assert trimmed[1][1] is None
    assert torch.equal(trimmed[2][0], router.view(batch, total, experts)[:, length:].reshape(-1, experts))
    assert torch.equal(trimmed[3], attention[:, :, length:])
    assert trimmed[4] is other
    assert trimmed[5] is None
    assert torch.equal(trimmed[6], streams[:, length:])


@given(where=places())
def test_every_token_keeps_its_order_and_every_virtual_token_its_place(where) -> None:
    places, length, text = where
    layout = Layout.at(places, length, text)
    prompt = -torch.arange(1, length + 1)[None]
    tokens = torch.arange(text).expand(len(places), -1)
    for row, wanted in zip(layout.spread(prompt, tokens).tolist(), places.tolist(), strict=True):
        assert [token for token in row if token >= 0] == list(range(text))
        for number, place in enumerate(wanted, start=1):
            assert len([token for token in row[: row.index(-number)] if token >= 0]) == place
    hidden = torch.randn(len(places), text, 3)
    row = layout.spread(torch.randn(1, length, 3), hidden)
    assert torch.equal(layout.trim(row, len(places)), hidden)


@given(mask=masks(), length=sizes, fill=st.integers(0, 1), as_bool=st.booleans())
def test_filled_mask_has_the_prompt_in_front(mask, length, fill, as_bool) -> None:
    mask = mask.bool() if as_bool else mask
    filled = Layout.at(None, length, mask.shape[1]).fill(fill, mask)
    assert filled.dtype == mask.dtype
    assert (filled[:, :length] == fill).all()
    assert torch.equal(filled[:, length:], mask)


@given(mask=masks())
def test_counted_positions_count_the_real_tokens(mask) -> None:
    positions = count_positions(mask)
    for row, seen in zip(positions, mask.bool()):
        assert row[seen].tolist() == list(range(int(seen.sum())))
        assert (row >= 0).all()


@given(length=sizes, text=sizes, first=st.integers(0, 3), leading=st.sampled_from([(), (3,), (4,)]))
def test_positions_go_on_behind_the_prompt(length, text, first, leading) -> None:
    positions = torch.arange(text).expand(*leading, 2, text) + first
    row = Layout.at(None, length, text).positions(positions, first, length)
    assert torch.equal(row, torch.arange(first, first + length + text).expand(*leading, 2, -1))


@given(length=sizes, text=sizes, first=st.integers(0, 3), lengths=st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_positions_begin_where_the_prompt_of_a_row_does(length, text, first, lengths) -> None:
    shift = torch.tensor([min(each, length) for each in lengths])[:, None]
    row = Layout.at(None, length, text).positions(torch.arange(text).expand(2, -1) + first, first, shift)
    for positions, own in zip(row, shift[:, 0].tolist(), strict=True):
        missing = length - own
        assert positions[missing:].tolist() == list(range(first, first + own + text))
        assert positions[:missing].tolist() == [first] * missing


@given(mask=masks(), length=sizes, leading=st.sampled_from([(), (3,)]))
def test_the_prompt_stands_between_padding_and_text(mask, length, leading) -> None:
    batch, text = mask.shape
    padding = leading_padding(mask)
    layout = Layout.at(padding.expand(-1, length), length, text)
    marks = torch.arange(1, text + 1).expand(*leading, batch, text)
    row = layout.spread(torch.zeros(length), marks, dim=-1)
    for ordered, seen, pads in zip(
        row.reshape(-1, batch, length + text)[-1].tolist(), mask.tolist(), padding.tolist()
    ):
        (pads,) = pads
        assert seen[:pads] == [0] * pads
        assert seen[pads : pads + 1] in ([], [1])
        assert ordered == list(range(1, pads + 1)) + [0] * length + list(range(pads + 1, text + 1))
