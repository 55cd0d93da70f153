# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Different prompts and their texts in one packed row: each prompt is there once, and the outputs are right."""

from __future__ import annotations

import pytest
import torch
from families import DECODERS
from making import make_adapted, make_config
from peft import PeftModel
from plain_kernels import kernels  # noqa: F401
from reference import V, embedding_and_backbone, make_batch
from releases import CACHE, CHECKPOINTING
from torch import nn

from peft_ptuning_ext.forward.attention import register


S, LONGEST = 7, V + 4
BASE = "__base__"
SHARED = [family for family in DECODERS if family not in ("Bloom", "Falcon")]
CLOSE = {"rtol": 0, "atol": 1e-5}
ADAPTERS = {
    "long": {"length": LONGEST},
    "other": {},
    "network": {"length": 3, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8},
}

# Adapters of the rows of a batch, how many prompts stand in its packed row, and how many columns each has there.
CHOICES = {
    "two, some rows alike": (["default", "other", "default", "default"], 2, V),
    "all lengths": (["other", "long", "network", "other"], 3, LONGEST),
    "rows without a prompt": ([BASE, "long", BASE, "long"], 2, LONGEST),
    "one composed of two": ([("network", "other"), "long", "long", ("network", "other")], 2, V + 4),
    "all different": (["default", "other", "long", "network"], 4, LONGEST),
}


def make_many(family: str, **options) -> PeftModel:
    model = make_adapted(family, **options)
    torch.manual_seed(5)
    for name, of_adapter in ADAPTERS.items():
        model.add_adapter(name, make_config("CAUSAL_LM", **of_adapter))
    model.set_requires_grad(list(model.peft_config), True)
    return model.eval()


def stack_of(model: nn.Module) -> nn.Module:
    return embedding_and_backbone(model.get_base_model())[1]


def watch(model: nn.Module) -> list[tuple[int, int]]:
    """Records batch size and tokens of every pass through the first layer."""
    shapes: list[tuple[int, int]] = []
    modules = stack_of(model).named_modules()
    layer = next(m for n, m in modules if n.endswith(("layers.0", "h.0")) and "ptuning" not in n)
    layer.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(tuple(args[0].shape[:2])), with_kwargs=True)
    return shapes


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, **CLOSE)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", SHARED)
def test_every_output_is_that_of_stored_states(family: str, pad_left: bool, choice: str) -> None:
    model = make_many(family, sizes={"attn_implementation": "eager"})
    names, number, longest = CHOICES[choice]
    batch = make_batch(family, "CAUSAL_LM", (S, S - 2, S, 4), pad_left)
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    if family in ("Mixtral", "Qwen3-MoE"):
        asked["output_router_logits"] = True
    shapes = watch(model)
    packed = model(**batch, **asked, labels=batch["input_ids"], adapter_names=names)
    assert shapes == [(1, number * longest + 4 * S)]
    with torch.no_grad():
        stored = model(**batch, **asked, labels=batch["input_ids"], adapter_names=names)
    assert packed.keys() == stored.keys()
    text = batch["attention_mask"].bool()
    assert_same(packed.loss, stored.loss)
    assert_same(packed.logits[text], stored.logits[text])
    for one, other in zip(packed.hidden_states, stored.hidden_states, strict=True):
        assert_same(one[text], other[text])
    for one, other in zip(packed.attentions, stored.attentions, strict=True):
        assert_same(one.transpose(1, 2)[text], other.transpose(1, 2)[text])
    for one, other in zip(packed[CACHE].layers, stored[CACHE].layers, strict=True):
        length = one.keys.shape[2]  # with gradients, a cache does not take the prompts in
        for name in ("keys", "values"):
            seen = [getattr(layer, name)[:, :, -length:].transpose(1, 2)[text[:, -length:]] for layer in (one, other)]
            assert_same(*seen)
    for one, other in zip(packed.get("router_logits", ()), stored.get("router_logits", ()), strict=True):
        assert_same(one[text.flatten()], other[text.flatten()])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", SHARED)
def test_gradients_are_those_of_prompts_in_each_row(family: str, choice: str, monkeypatch) -> None:
    model, (names, number, longest) = make_many(family), CHOICES[choice]
    batch = make_batch(family, "CAUSAL_LM", (S, S - 2, S, 4))
    shapes, found = watch(model), []
    for overhead in (0, float("inf")):
        monkeypatch.setattr("peft_ptuning_ext.forward.one_pass.OVERHEAD", overhead)
        model(**batch, labels=batch["input_ids"], adapter_names=names).loss.backward()
        found.append(gradients(model))
    assert shapes == [(1, number * longest + 4 * S), (4, longest + S)]
    assert all(gradient.abs().max() > 0 for gradient in found[0].values())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_gradient_checkpointing_changes_nothing(family: str, use_reentrant: bool) -> None:
    model, batch = make_many(family), make_batch(family, "CAUSAL_LM", (S, S - 2, S, 4))
    names, found = CHOICES["all lengths"][0], []
    for is_on in (False, True):
        model.train()
        if is_on:
            getattr(model.get_base_model(), f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model(**batch, labels=batch["input_ids"], adapter_names=names).loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [2, V, LONGEST, LONGEST + 2, LONGEST + S, 99])
@pytest.mark.parametrize("family", ["Mistral", "Gemma 3"])
def test_a_window_of_any_length_sees_as_much_of_each_prompt(family: str, window: int) -> None:
    model = make_many(family, sizes={"sliding_window": window})
    batch = make_batch(family, "CAUSAL_LM", (S, 4, S, S), pad_left=True)
    names, seen = CHOICES["all lengths"][0], batch["attention_mask"].bool()
    for given, compared in ((batch, seen), ({"input_ids": batch["input_ids"]}, torch.ones_like(seen))):
        packed = model(**given, adapter_names=names).logits
        with torch.no_grad():
            assert_same(packed[compared], model(**given, adapter_names=names).logits[compared])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "flex_attention", "of sdpa", "of flash"])
def test_every_attention_hides_what_a_prompt_lacks(implementation: str, family: str) -> None:
    names = CHOICES["all lengths"][0]
    batch = make_batch(family, "CAUSAL_LM", (S,) * 4)
    made = make_many(family, sizes={"attn_implementation": "eager"}), make_many(family)
    for model in made:
        model.double()
    made[1].config._attn_implementation = register(implementation)
    for given in (batch, {"input_ids": batch["input_ids"]}):
        shapes = watch(made[1])
        expected, found = (model(**given, adapter_names=names).logits for model in made)
        assert shapes == [(1, 3 * LONGEST + 4 * S)]
        torch.testing.assert_close(found, expected, **CLOSE)


def test_texts_packed_by_their_positions_have_the_prompt_of_their_row() -> None:
    model = make_many("Llama")
    ids = make_batch("Llama", "CAUSAL_LM", (9, 9, 9))["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6], [*range(9)]])
    names = ["long", "other", "long"]
    found = model(input_ids=ids, position_ids=positions, use_cache=False, adapter_names=names).logits
    for row, begin, end in ((0, 0, 4), (0, 4, 9), (1, 0, 2), (1, 2, 9), (2, 0, 9)):
        alone = model(input_ids=ids[row : row + 1, begin:end], adapter_names=[names[row]]).logits
        torch.testing.assert_close(found[row, begin:end], alone[0], **CLOSE)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT-2"])
def test_a_text_goes_on_behind_the_cache_that_a_pass_has_filled(family: str) -> None:
    model, names = make_many(family), CHOICES["all lengths"][0]
    ids = make_batch(family, "CAUSAL_LM", (9,) * 4)["input_ids"]
    expected = model(input_ids=ids, adapter_names=names).logits
    first = model(input_ids=ids[:, :6], use_cache=True, adapter_names=names)
    torch.testing.assert_close(first.logits, expected[:, :6], **CLOSE)
    later = model(input_ids=ids[:, 6:], **{CACHE: first[CACHE]}, adapter_names=names).logits
    torch.testing.assert_close(later, expected[:, 6:], **CLOSE)
    later.sum().backward()
    found = gradients(model)
    for name in ("other", "long", "network"):  # through the keys and values in the cache
        assert any(f".{name}." in parameter for parameter in found)


def test_a_step_of_training_leaves_nothing_stored_of_what_it_trains() -> None:
    model, names = make_many("Llama"), ["long", "other", "long"]
    ids, stored = make_batch("Llama", "CAUSAL_LM", (S,) * 3)["input_ids"], stack_of(model).ptuning.states
    with torch.no_grad():
        model(input_ids=ids, adapter_names=["long", "other", "default"])
    assert len(stored) == 3
    model(input_ids=ids, adapter_names=names)
    assert len(stored) == 1
    model(input_ids=ids, adapter_names=[BASE] * 3)
    assert len(stored) == 1


@pytest.mark.parametrize(
    ("names", "is_packed"),
    [
        (["default", "other"] * 4, True),
        (["default"] * 6 + ["other", BASE], True),
        (["default", "other"], False),  # nothing is there twice
        (["default", "other", "long", BASE, "default"], False),
    ],
)
def test_the_way_that_computes_fewer_positions_by_enough_is_taken(names, is_packed, monkeypatch) -> None:
    model = make_many("Llama")
    width = model.get_base_model().config.hidden_size
    monkeypatch.setattr("peft_ptuning_ext.forward.one_pass.OVERHEAD", 0.15 * width)  # three of twenty positions
    rows, longest = len(names), LONGEST if "long" in names else V
    packed, in_row = len(set(names)) * longest + rows * S, rows * (longest + S)
    shapes = watch(model)
    model(input_ids=torch.randint(5, 90, (rows, S)), adapter_names=names)
    assert shapes == [(1, packed) if is_packed else (rows, longest + S)]
    assert is_packed == (packed <= 0.85 * in_row)
