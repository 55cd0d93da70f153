# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Caches that take the prompt in behind the first call, and what can be done with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from making import make_adapted
from reference import V, make_batch
from releases import CACHE
from transformers import DynamicCache

from peft_ptuning_ext.forward import cache as caches
from peft_ptuning_ext.forward.cache import LayerWithPrompt


CLOSE = {"rtol": 0, "atol": 1e-5}
FAMILIES = pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mistral", "Gemma 2", "Gemma 3", "Qwen3-MoE"])
IMPLEMENTATIONS = pytest.mark.parametrize("sizes", [{}, {"attn_implementation": "eager"}], ids=["sdpa", "eager"])
S = 7


def steps(model, family: str, pad_left: bool, cache: DynamicCache | None = None) -> tuple[list[torch.Tensor], list]:
    """Logits of a first call, three steps of a token and one of two, and which layers hold the prompt then."""
    batch = make_batch(family, "CAUSAL_LM", (S, S - 3), pad_left=True) if pad_left else None
    ids = batch["input_ids"] if pad_left else torch.randint(5, 90, (2, S), generator=torch.Generator().manual_seed(3))
    mask = batch["attention_mask"] if pad_left else torch.ones_like(ids)
    cache, found = DynamicCache(config=model.config) if cache is None else cache, []
    with torch.no_grad():
        found.append(model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits)
        for count in (1, 1, 1, 2):
            mask = torch.cat([mask, mask.new_ones(2, count)], dim=1)
            more = torch.full((2, count), 11 + count)
            found.append(model(input_ids=more, attention_mask=mask, **{CACHE: cache}).logits)
    return found, [isinstance(layer, LayerWithPrompt) for layer in cache.layers]


@pytest.mark.parametrize("depth", ["INPUT", "DEEP"])
@pytest.mark.parametrize("pad_left", [False, True], ids=["whole", "padded"])
@IMPLEMENTATIONS
@FAMILIES
def test_a_prompt_in_the_cache_equals_one_in_front(monkeypatch, family, sizes, pad_left, depth) -> None:
    model = make_adapted(family, sizes=sizes, prompt_depth=depth)
    found, are_inside = steps(model, family, pad_left)
    assert any(are_inside) == (family != "Mistral")  # whose layers all have a window
    monkeypatch.setattr(caches, "FEW", 0)
    expected, are_inside = steps(model, family, pad_left)
    assert not any(are_inside)
    torch.testing.assert_close(found, expected, **CLOSE)


@FAMILIES
def test_a_cache_that_knows_no_windows(monkeypatch, family) -> None:
    """Without a config it keeps what has left a window, and holds the prompt in every layer."""
    model = make_adapted(family)
    found, are_inside = steps(model, family, True, DynamicCache())
    assert all(are_inside)
    expected, _ = steps(model, family, True)
    torch.testing.assert_close(found, expected, **CLOSE)


def filled(model, rows: int = 2) -> tuple[torch.Tensor, DynamicCache]:
    ids = torch.randint(5, 90, (rows, S), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **{CACHE: cache})
    assert [layer.keys.shape[2] for layer in cache.layers] == [V + S] * 2
    return ids, cache


def follow(model, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **{CACHE: cache}).logits


def test_every_length_is_the_text_s() -> None:
    _, cache = filled(make_adapted())
    assert cache.get_seq_length() == S
    assert cache.get_mask_sizes(3, 0) == (S + 3, 0)
    assert cache.get_mask_sizes(3, 1) == (S + 3, 0)


def test_a_cut_cache_is_one_of_the_shorter_text() -> None:
    model = make_adapted()
    ids, cache = filled(model)
    cache.crop(-3)
    assert cache.get_seq_length() == S - 3
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -3:]
    torch.testing.assert_close(follow(model, ids[:, -3:], cache), expected, **CLOSE)
    for layer in cache.layers:  # as in earlier releases of transformers: how many tokens are left
        layer.crop(S - 2)
    torch.testing.assert_close(follow(model, ids[:, -2:], cache), expected[:, -2:], **CLOSE)


@pytest.mark.parametrize("way", ["reset", "crop", "crop by more"])
@pytest.mark.parametrize("then", ["the same", "the base"])
def test_an_emptied_cache_is_a_new_one(way, then) -> None:
    model = make_adapted()
    ids, cache = filled(model)
    cache.reset() if way == "reset" else cache.crop(-S if way == "crop" else -S - 2)
    assert cache.get_seq_length() == 0
    if then == "the base":
        with model.disable_adapter():
            expected = follow(model, ids[:1], DynamicCache())
            found = follow(model, ids[:1], cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [S] * 2
    else:
        found, expected = follow(model, ids[:1], cache), follow(model, ids[:1], DynamicCache())
        assert [layer.keys.shape[2] for layer in cache.layers] == [V + S] * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ],
    ids=["reordered", "repeated", "selected"],
)
def test_rows_take_their_prompt_along(change, rows) -> None:
    model = make_adapted()
    ids, cache = filled(model, rows=3)
    change(cache)
    more = torch.arange(20, 20 + len(rows))[:, None]
    with torch.no_grad():
        expected = model(input_ids=torch.cat([ids[rows], more], dim=1)).logits[:, -1:]
    torch.testing.assert_close(follow(model, more, cache), expected, **CLOSE)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "file"]
)
def test_a_copy_goes_on_as_the_cache_itself_would(copied) -> None:
    model = make_adapted()
    ids, cache = filled(model)
    other = copied(cache)
    found = follow(model, ids[:, :1], other)
    assert (other.get_seq_length(), cache.get_seq_length()) == (S + 1, S)
    torch.testing.assert_close(found, follow(model, ids[:, :1], cache), rtol=0, atol=0)


def test_with_gradients_the_cache_takes_nothing_in() -> None:
    model = make_adapted()
    cache = DynamicCache(config=model.config)
    ids = torch.arange(5, 5 + S)[None]
    model(input_ids=ids, **{CACHE: cache})
    assert [layer.keys.shape[2] for layer in cache.layers] == [S] * 2
    found = model(input_ids=ids[:, :1], **{CACHE: cache}).logits
    expected = model(input_ids=torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_step_copies_no_prompt(monkeypatch) -> None:
    """It concatenates what the cache does, two tensors a layer."""
    model = make_adapted()
    ids, cache = filled(model)
    copies, cat = [], torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda tensors, *args, **kwargs: copies.append(1) or cat(tensors, *args, **kwargs)
    )
    with model.disable_adapter(), torch.no_grad():
        base = DynamicCache(config=model.config)
        model(input_ids=ids, **{CACHE: base})
        copies.clear()
        model(input_ids=ids[:, :1], **{CACHE: base})
    of_base = len(copies)
    copies.clear()
    follow(model, ids[:, :1], cache)
    assert len(copies) == of_base
