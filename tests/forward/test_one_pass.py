# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt and texts in one packed row: when they are, and that every output is that of the stored keys and values."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from families import DECODERS
from making import make_adapted
from reference import V, embedding_and_backbone, make_batch
from releases import CACHE, CHECKPOINTING
from torch import nn
from transformers import DynamicCache, StaticCache


S = 7
SHARED = [family for family in DECODERS if family not in ("Bloom", "Falcon")]
CLOSE = {"rtol": 0, "atol": 1e-5}


def stack_of(model: nn.Module) -> nn.Module:
    return embedding_and_backbone(model.get_base_model())[1]


def watch(model: nn.Module) -> list[tuple[int, int]]:
    """Records batch size and tokens of every pass through the first layer."""
    shapes: list[tuple[int, int]] = []
    layer = next(m for n, m in stack_of(model).named_modules() if n.endswith((".0", "layers.0", "h.0")))
    layer.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(tuple(args[0].shape[:2])), with_kwargs=True)
    return shapes


def both_ways(model: nn.Module, **inputs) -> tuple:
    """The outputs of a call with gradients, in one pass, and of the same call without, behind stored states."""
    shapes = watch(model)
    packed = model(**inputs)
    rows, text = (inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]).shape[:2]
    assert shapes == [(1, V + rows * text)]
    with torch.no_grad():
        return packed, model(**inputs)


def assert_same(found, expected) -> None:
    """Compares whatever a model returns: tensors, tuples of them, caches."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found.detach(), expected, equal_nan=True, **CLOSE)
    elif isinstance(expected, DynamicCache):
        assert found.get_seq_length() == expected.get_seq_length()
        for one, other in zip(found.layers, expected.layers, strict=True):
            # With gradients, a cache does not take the prompt in.
            text = one.keys.shape[2]
            assert_same((one.keys, one.values), (other.keys[:, :, -text:], other.values[:, :, -text:]))
    elif isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found is expected is None or found == expected


@pytest.mark.parametrize("lengths", [(S,), (1, 1), (S, S, S), (S, 4, 1)], ids=str)
@pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", SHARED)
def test_every_output_is_that_of_stored_states(family, pad_left, lengths) -> None:
    model = make_adapted(family, sizes={"attn_implementation": "eager"})
    batch = make_batch(family, "CAUSAL_LM", lengths, pad_left)
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    if family in ("Mixtral", "Qwen3-MoE"):
        asked["output_router_logits"] = True
    packed, stored = both_ways(model, **batch, **asked, labels=batch["input_ids"])
    assert packed.keys() == stored.keys()
    for name in stored:
        assert_same(packed[name], stored[name])


@pytest.mark.parametrize("window", [2, V, V + 2, V + S - 1, V + S, 99])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Mistral", "Gemma 2", "Gemma 3"])
def test_a_window_of_any_length_sees_as_much_of_the_prompt(family, implementation, window) -> None:
    if (family, implementation) == ("Gemma 2", "sdpa"):
        pytest.skip("it refuses softcapping")
    model = make_adapted(family, sizes={"sliding_window": window, "attn_implementation": implementation})
    packed, stored = both_ways(model, **make_batch(family, "CAUSAL_LM", (S, 4), pad_left=True))
    assert_same(packed.logits, stored.logits)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT-2"])
def test_texts_packed_by_their_positions(family) -> None:
    model = make_adapted(family)
    ids = make_batch(family, "CAUSAL_LM", (9, 9))["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    packed, stored = both_ways(model, input_ids=ids, position_ids=positions, use_cache=False)
    assert_same(packed.logits, stored.logits)
    assert_same(*(each.logits for each in both_ways(model, input_ids=ids, position_ids=positions)))  # one text
    described = {"seq_idx": torch.tensor([[0] * 4 + [1] * 5]), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    first = {"input_ids": ids[:1], "position_ids": positions[:1], "use_cache": False}
    assert_same(model(**first, **described).logits, packed.logits[:1])  # as TRL tells what it has packed
    alone = model(input_ids=ids[:1, 4:]).logits
    torch.testing.assert_close(packed.logits[:1, 4:], alone, **CLOSE)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_mask_of_the_callers_own_is_the_texts(kind) -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM", (S, S))
    seen = torch.rand(2, 1, S, S).tril() > 0.2
    mask = seen if kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    packed, stored = both_ways(model, input_ids=batch["input_ids"], attention_mask=mask)
    assert_same(packed.logits, stored.logits)
    assert not torch.allclose(packed.logits, model(batch["input_ids"]).logits, atol=1e-4)


def test_masks_by_kind_of_layer_are_the_texts() -> None:
    model, batch = make_adapted("Gemma 3"), make_batch("Gemma 3", "CAUSAL_LM", (S, S))
    seen = torch.rand(2, 2, 1, S, S).tril() > 0.2
    masks = {"full_attention": seen[0], "sliding_attention": seen[1]}
    packed, stored = both_ways(model, input_ids=batch["input_ids"], attention_mask=masks)
    assert_same(packed.logits, stored.logits)


@pytest.mark.parametrize("returned", [None, True, False], ids=str)
@pytest.mark.parametrize("asked", [None, True, False], ids=str)
@pytest.mark.parametrize("of_config", [True, False], ids=["cache", "no cache"])
def test_outputs_are_of_the_kind_that_was_asked_for(of_config, asked, returned) -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM", (S, 4))
    model.get_base_model().config.use_cache = of_config
    options = {"use_cache": asked, "return_dict": returned, "output_hidden_states": True}
    packed, stored = both_ways(model, **batch, **{key: value for key, value in options.items() if value is not None})
    assert (type(packed), len(packed)) == (type(stored), len(stored))
    assert isinstance(packed, tuple) == (returned is False)
    for found, expected in zip(packed, stored) if isinstance(packed, tuple) else zip(packed.values(), stored.values()):
        assert_same(found, expected)


@pytest.mark.parametrize("make_cache", [None, DynamicCache, StaticCache], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 3", "GPT-2"])
def test_a_text_goes_on_behind_the_cache_that_a_pass_has_filled(family, make_cache) -> None:
    model = make_adapted(family)
    ids = make_batch(family, "CAUSAL_LM", (9, 9))["input_ids"]
    expected = model(input_ids=ids).logits
    options = {"config": model.get_base_model().config, "max_cache_len": 12}
    cache = None if make_cache is None else make_cache(**options if make_cache is StaticCache else {})
    first = model(input_ids=ids[:, :6], **{CACHE: cache}, use_cache=True)
    torch.testing.assert_close(first.logits, expected[:, :6], **CLOSE)
    assert cache is None or first[CACHE] is cache
    later = model(input_ids=ids[:, 6:], **{CACHE: first[CACHE]}).logits
    torch.testing.assert_close(later, expected[:, 6:], **CLOSE)
    later.sum().backward()
    prompt = next(parameter for name, parameter in model.named_parameters() if "ptuning_" in name)
    assert prompt.grad.abs().max() > 0  # through the keys and values in the cache


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_holds_no_values_of_texts(use_reentrant) -> None:
    model, batch = make_adapted("Llama").train(), make_batch("Llama", "CAUSAL_LM", (S, S))
    getattr(model.get_base_model(), f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    values = []

    def note(_, args, value) -> None:
        values.append(weakref.ref(value))

    stack_of(model).layers[0].self_attn.v_proj.register_forward_hook(note)
    output = model(**batch)
    gc.collect()
    assert [value() for value in values] == [None]  # it is made again in the backward pass
    output.logits.sum().backward()
    assert len(values) == 2


def test_a_layer_that_attends_otherwise_sends_the_prompt_to_the_row() -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM", (S, S))
    expected = model(**batch).logits
    attention = stack_of(model).layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "ptuning_prompt"}), with_kwargs=True
    )
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    assert model.prompt_route.startswith("concatenated: not all of its layers")


def test_an_input_without_a_rule_is_refused() -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM", (S, S))
    with pytest.raises(ValueError, match="per-token input `colours`.*no rule"):
        model(**batch, colours=torch.zeros(2, S))


def test_processes_that_gather_weights_pass_once_with_and_without_gradients(monkeypatch) -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM", (S, 4))
    with torch.no_grad():
        expected = model(**batch).logits
    monkeypatch.setattr("peft_ptuning_ext.forward.one_pass.is_sharded", lambda stack: True)
    shapes = watch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    assert shapes == [(1, V + 2 * S)]


@pytest.mark.parametrize(
    ("rows", "text", "length", "is_packed"),
    [(1, S, V, False), (2, S, V, True), (16, S, V, True), (16, S, 1, True), (2, 9 * S, 1, False)],
)
def test_the_way_that_computes_fewer_positions_by_enough_is_taken(rows, text, length, is_packed, monkeypatch) -> None:
    model = make_adapted("Llama", length=length)
    width = model.get_base_model().config.hidden_size
    monkeypatch.setattr("peft_ptuning_ext.forward.one_pass.OVERHEAD", 0.05 * width)  # a twentieth of the positions
    shapes = watch(model)
    model(input_ids=torch.randint(5, 90, (rows, text)))
    packed, in_row = (1, length + rows * text), (rows, length + text)
    assert shapes == [packed if is_packed else in_row]
    assert is_packed == (packed[1] <= 0.95 * rows * in_row[1])


def test_what_has_no_place_in_a_row_is_packed_at_any_cost(monkeypatch) -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM", (S, S))
    monkeypatch.setattr("peft_ptuning_ext.forward.one_pass.OVERHEAD", float("inf"))
    ids, mask = batch["input_ids"], torch.ones(2, 1, S, S, dtype=torch.bool).tril()
    cache = StaticCache(model.get_base_model().config, max_cache_len=9)
    positions = torch.arange(S).expand(2, -1)
    for inputs in ({"attention_mask": mask}, {CACHE: cache}, {"position_ids": positions}):
        shapes = watch(model)
        model(input_ids=ids, **inputs)
        assert shapes == [(1, V + 2 * S)]
    shapes = watch(model)
    model(**batch)
    assert shapes == [(2, V + S)]
