# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter for each row of a batch: each row equals its adapter alone."""

from __future__ import annotations

import copy
import threading
from collections import Counter

import pytest
import torch
from families import CELLS, DECODERS, FAMILIES, make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from plain_kernels import kernels  # noqa: F401
from reference import POOLED, S, V, main_output, make_batch
from releases import CACHE, CHECKPOINTING
from transformers import DynamicCache, StaticCache

from peft_ptuning_ext import PromptTemplate, export_to_peft, use_adapters
from peft_ptuning_ext.forward.attention import register


BASE = "__base__"
CLOSE = {"rtol": 0, "atol": 1e-5}
cells = pytest.mark.parametrize(("family", "task"), CELLS, ids=lambda value: value.replace(" ", "-"))
families = pytest.mark.parametrize(("family", "task"), {family: (family, task) for family, task in CELLS}.values())
decoders = pytest.mark.parametrize("family", DECODERS)
padded = pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])

# They have a table of positions and can't be told which to use.
ONE_LENGTH = {"BART"}
# Deep prompts that don't go through transformers' attention interface.
ONE_DEEP_LENGTH = {"DeBERTa-v2", "MPNet", "Bloom", "Falcon"}
ROWS = ["default", BASE, "long", "deep", "other", "deep and long"]
ROWS_OF_ONE_LENGTH = ["default", "other", "default"]
ADAPTERS = {
    "long": {"length": V + 4},
    "other": {},
    "network": {"length": 3, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8},
    "deep": {"length": V - 1, "prompt_depth": "DEEP"},
    "deeper": {"length": V + 1, "prompt_depth": "DEEP"},
}


def make_many(family: str, task: str, names=tuple(ADAPTERS), **options) -> PeftModel:
    model = make_adapted(family, task, **options)
    torch.manual_seed(5)
    for name in names:
        model.add_adapter(name, make_config(task, **ADAPTERS[name]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:  # copies of one head otherwise
            parameter.data.normal_(std=0.3)
    return model.eval()


def rows_of(family: str) -> list:
    if family in ONE_LENGTH:
        return ROWS_OF_ONE_LENGTH
    left_out = {"deep", "deep and long"} if family in ONE_DEEP_LENGTH else set()
    return [row for row in ROWS if row not in left_out]


def named(rows: list) -> list:
    return [("deep", "long") if row == "deep and long" else row for row in rows]


def alone(model: PeftModel, row, call):
    """What `call` returns where the adapters of one row are active for all rows."""
    if row == BASE:
        with model.disable_adapter():
            return call()
    model.base_model.set_adapter([row] if isinstance(row, str) else list(row), inference_mode=True)
    try:
        return call()
    finally:
        model.base_model.set_adapter(["default"], inference_mode=True)


def row_of(batch: dict, i: int) -> dict:
    return {name: value[i : i + 1] for name, value in batch.items()}


@cells
@padded
@pytest.mark.parametrize("grads", [False, True], ids=["without gradients", "with gradients"])
def test_each_row_is_its_adapter_alone(family: str, task: str, pad_left: bool, grads: bool) -> None:
    model, rows = make_many(family, task), named(rows_of(family))
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):  # each adapter has a head
        rows = [row for row in rows if isinstance(row, str)]
    if pad_left and FAMILIES[family].kind == "encoder" and task in POOLED:
        pytest.skip("the head reads padding")
    batch = make_batch(family, task, (S, S - 2, S, 3, S - 1, S)[: len(rows)], pad_left=pad_left)
    with torch.set_grad_enabled(grads):
        found = main_output(model(**batch, adapter_names=rows))
        expected = [
            alone(model, row, lambda i=i: main_output(model(**row_of(batch, i)))) for i, row in enumerate(rows)
        ]
    per_row = len(found) // len(rows)
    mask = batch["attention_mask"].flatten(0, -2)
    for i, one in enumerate(expected):
        mine = found[i * per_row : (i + 1) * per_row]
        if mine.dim() == 3 and mine.shape[1] == mask.shape[1]:
            seen = mask[i * per_row : (i + 1) * per_row].bool()
            mine, one = mine[seen], one[seen]
        torch.testing.assert_close(mine, one, rtol=0, atol=2e-5)


def test_rows_of_one_length_are_bitwise_their_adapters_where_concatenated() -> None:
    model = make_many("BERT", "SEQ_CLS")
    batch, rows = make_batch("BERT", "SEQ_CLS", (S, S, S)), ROWS_OF_ONE_LENGTH
    backbone, head, seen = model.base_model.model.bert, model.base_model.model.classifier, []
    backbone.register_forward_hook(lambda *call: seen.append(call[-1][:2]))
    found = model(**batch, adapter_names=rows).logits
    together = hidden, pooled = seen.pop()
    assert hidden.shape[:2] == batch["input_ids"].shape
    for row in dict.fromkeys(rows):
        mine = [i for i, other in enumerate(rows) if other == row]
        alone(model, row, lambda: model(**batch))
        for ours, its in zip(together, seen.pop(), strict=True):
            torch.testing.assert_close(ours[mine], its[mine], rtol=0, atol=0)
        # PEFT gives each head its rows only, and some processors round a product of fewer rows otherwise.
        expected = alone(model, row, lambda mine=mine: head(pooled[mine]))
        torch.testing.assert_close(found[mine], expected, rtol=0, atol=0)


@families
def test_each_adapter_gets_the_gradient_of_its_rows(family: str, task: str) -> None:
    model, rows = make_many(family, task), [row for row in rows_of(family) if isinstance(row, str) and row in ADAPTERS]
    rows = ["default", *rows, "default"]
    model.set_requires_grad(list(model.peft_config), True)
    batch = make_batch(family, task, (S,) * len(rows))
    weights = torch.randn(3, generator=torch.Generator().manual_seed(2))

    def loss(output: torch.Tensor, i: int) -> torch.Tensor:
        return (output.square() * weights[i % 3]).sum()

    def gradients() -> dict:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    outputs = main_output(model(**batch, adapter_names=rows))
    sum(loss(each, i) for i, each in enumerate(outputs.unflatten(0, (len(rows), -1)))).backward()
    found = gradients()
    for i, row in enumerate(rows):
        model.set_adapter(row)
        loss(main_output(model(**row_of(batch, i))), i).backward()
    expected = gradients()
    assert {*found} >= {n for n, g in expected.items() if g.abs().max() > 0}
    assert {n.split(".")[-2] for n in found} | {n.split(".")[-3] for n in found} >= {*rows}
    for name, gradient in found.items():
        other = expected.get(name, torch.zeros_like(gradient))  # a head that no row had
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * max(other.abs().max().item(), 1e-2))


def generated(model: PeftModel, batch: dict, **options) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
@decoders
@torch.no_grad()
def test_a_generated_row_has_the_ids_of_its_adapter(family: str, way: str) -> None:
    model, rows = make_many(family, "CAUSAL_LM"), named(rows_of(family))
    if way == "static" and family in ("Bloom", "Falcon"):
        pytest.skip("no static cache there")
    if way == "chunks":
        batch = make_batch(family, "CAUSAL_LM", (S,) * len(rows))
    else:
        batch = make_batch(family, "CAUSAL_LM", (S, S - 2, S, 3, S - 1, S)[: len(rows)], pad_left=True)
    found = generated(model, batch, adapter_names=rows, **WAYS[way])
    expected = [
        alone(model, row, lambda i=i: generated(model, row_of(batch, i), **WAYS[way])) for i, row in enumerate(rows)
    ]
    assert found.tolist() == torch.cat(expected).tolist()


@pytest.mark.parametrize("family", ["T5", "BART"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_a_generated_row_of_an_encoder_decoder(family: str, beams: int) -> None:
    model, rows = make_many(family, "SEQ_2_SEQ_LM"), named(rows_of(family))
    batch = make_batch(family, "SEQ_2_SEQ_LM", (S, S - 2, S, 3, S - 1, S)[: len(rows)])
    del batch["decoder_input_ids"]
    found = generated(model, batch, adapter_names=rows, num_beams=beams)
    expected = [
        alone(model, row, lambda i=i: generated(model, row_of(batch, i), num_beams=beams))
        for i, row in enumerate(rows)
    ]
    assert found.tolist() == torch.cat(expected).tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 2", "GPT-2", "Bloom"])
@torch.no_grad()
def test_steps_without_positions_equal_one_call(family: str, kind: str) -> None:
    model, rows = make_many(family, "CAUSAL_LM"), named(rows_of(family))
    if kind == "static" and family == "Bloom":
        pytest.skip("no static cache there")
    batch = make_batch(family, "CAUSAL_LM", (S, S - 2, S, 3, S - 1, S)[: len(rows)], pad_left=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=S)
    whole = model(**batch, adapter_names=rows).logits
    parts = [
        model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], adapter_names=rows, **{CACHE: cache}).logits
        for a, b in ((0, 5), (5, 6), (6, S))
    ]
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[seen], whole[seen], **CLOSE)


def test_a_cache_belongs_to_the_rows_that_filled_it() -> None:
    model = make_many("Llama", "CAUSAL_LM")
    ids = torch.arange(5, 12)[None].repeat(2, 1)
    for rows in (["default", "other"], ["long", "deep"]):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, adapter_names=rows, **{CACHE: cache})
            for others in (rows[::-1], ["other", "other"], None):
                with pytest.raises(ValueError, match="The cache was filled under adapters by row"):
                    model(input_ids=ids[:, :1], adapter_names=others, **{CACHE: cache})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama", "BERT"])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    task = dict(CELLS)[family]
    model, rows = make_many(family, task), ["default", "long", BASE, "other"]
    batch = make_batch(family, task, (S,) * 4)
    model.set_requires_grad(list(model.peft_config), True)
    found = []
    for is_on in (False, True):
        model.train()
        if is_on:
            getattr(model.base_model.model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
        torch.manual_seed(0)
        main_output(model(**batch, adapter_names=rows)).square().sum().backward()
        found.append([p.grad for _, p in model.named_parameters() if p.grad is not None])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "flex_attention", "of sdpa", "of flash"])
@torch.no_grad()
def test_every_attention_hides_what_a_row_lacks(implementation: str, family: str) -> None:
    rows = named(ROWS)
    batch = make_batch(family, "CAUSAL_LM", (S,) * len(rows))
    made = make_many(family, "CAUSAL_LM", sizes={"attn_implementation": "eager"}), make_many(family, "CAUSAL_LM")
    for model in made:
        model.double()
    made[1].config._attn_implementation = register(implementation)
    for given in (batch, {"input_ids": batch["input_ids"]}):
        expected, found = (model(**given, adapter_names=rows).logits for model in made)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_threads_choose_for_themselves() -> None:
    model = make_many("Llama", "CAUSAL_LM")
    ids = torch.arange(5, 12)[None]
    names = ["default", "long", "other", "deep", BASE]
    with torch.no_grad():
        expected = {name: alone(model, name, lambda: model(input_ids=ids).logits) for name in names}
    right: list = []
    all_have_chosen = threading.Barrier(len(names), timeout=10)

    def wait(*_) -> None:
        all_have_chosen.wait()

    model.get_base_model().register_forward_pre_hook(wait)

    def ask(name: str) -> None:
        with torch.no_grad():
            for _ in range(3):
                if torch.allclose(model(input_ids=ids, adapter_names=[name]).logits, expected[name], atol=1e-5):
                    right.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == sorted(names * 3)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@torch.no_grad()
def test_a_model_of_transformers() -> None:
    model = make_model("Llama", "CAUSAL_LM")
    for i, (name, length) in enumerate({"one": V, "two": V + 2}.items()):
        torch.manual_seed(i)
        model.add_adapter(make_config("CAUSAL_LM", length), name)
    batch = make_batch("Llama", "CAUSAL_LM", (S, S), pad_left=True)
    with use_adapters(model, ["one", "two"]):
        found = generated(model, batch, num_beams=2)
    for i, name in enumerate(("one", "two")):
        model.set_adapter(name)
        assert found[i].tolist() == generated(model, row_of(batch, i), num_beams=2)[0].tolist()


@torch.no_grad()
def test_a_copy_made_while_rows_are_chosen_has_its_active_adapter() -> None:
    model = make_many("Llama", "CAUSAL_LM")
    ids = torch.arange(5, 12)[None]
    with use_adapters(model, ["long"]):
        other = copy.deepcopy(model)
        found = other(input_ids=ids).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, between its graphs
@pytest.mark.parametrize("grads", [False, True])
def test_compiled_is_the_same(grads: bool) -> None:
    model = make_many("Llama", "CAUSAL_LM")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    batch = make_batch("Llama", "CAUSAL_LM", (S, S)) | {"use_cache": False}
    for rows in (["default", "long"], ["long", BASE], None, ["other", "other"]):
        with torch.set_grad_enabled(grads):
            expected = model(**batch, adapter_names=rows).logits
            torch.testing.assert_close(compiled(**batch, adapter_names=rows).logits, expected, **CLOSE)


def test_a_disabled_model_is_the_base() -> None:
    model = make_many("Llama", "CAUSAL_LM")
    batch = make_batch("Llama", "CAUSAL_LM", (S, S))
    with model.disable_adapter():
        torch.testing.assert_close(
            model(**batch, adapter_names=["long", "other"]).logits, model(**batch).logits, rtol=0, atol=0
        )


ERRORS = {
    "unknown": (["default", "lnog"], ValueError, r"'lnog', and the adapters are \['deep', 'deeper', 'default'"),
    "composed with none": (["default", ("long", BASE)], ValueError, "alone is a row without an adapter"),
    "plus": (["default", "long+other"], ValueError, "'long\\+other'"),
    "too few": (["default"], ValueError, "got 2 rows, and `adapter_names` has 1"),
    "too many": (["default"] * 3, ValueError, "got 2 rows, and `adapter_names` has 3"),
    "none": ([], ValueError, "is empty"),
    "a name": ("default", TypeError, "must be a list"),
    "a number": (["default", 3], TypeError, "must have a name"),
    "one in a tuple": (["default", ("long", 3)], TypeError, "must have a name"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_names_are_refused(case: str) -> None:
    model = make_many("Llama", "CAUSAL_LM")
    names, error, message = ERRORS[case]
    batch = make_batch("Llama", "CAUSAL_LM", (S, S))
    expected = model(**batch).logits
    with pytest.raises(error, match=message):
        model(**batch, adapter_names=names)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(ONE_LENGTH))
def test_a_model_that_is_told_no_positions_has_prompts_of_one_length(family: str) -> None:
    model = make_many(family, "SEQ_CLS")
    for rows in (["default", "long"], ["default", BASE]):
        with pytest.raises(ValueError, match="can't be told positions"):
            model(**make_batch(family, "SEQ_CLS", (S, S)), adapter_names=rows)


@pytest.mark.parametrize("family", sorted(ONE_DEEP_LENGTH))
def test_other_ways_of_deep_prompts_need_one_length(family: str) -> None:
    task = dict(CELLS)[family]
    model = make_many(family, task)
    with pytest.raises(ValueError, match="prompts? of one length|of one length"):
        model(**make_batch(family, task, (S, S)), adapter_names=["deep", "deeper"])


def test_rows_with_deep_prompts_in_other_stacks_are_refused() -> None:
    model = make_adapted("T5", "SEQ_2_SEQ_LM", prompt_depth="DEEP")
    model.add_adapter("both", make_config("SEQ_2_SEQ_LM", prompt_depth="DEEP", prompt_stacks="BOTH"))
    with pytest.raises(ValueError, match="other `prompt_stacks` in one batch.* Pass the rows of each"):
        model(**make_batch("T5", "SEQ_2_SEQ_LM", (S, S)), adapter_names=["default", "both"])


def test_a_row_has_one_head() -> None:
    model = make_many("BERT", "SEQ_CLS")
    with pytest.raises(ValueError, match=r"\['default', 'long'\] of a row have each a module of their own"):
        model(**make_batch("BERT", "SEQ_CLS", (S, S)), adapter_names=[("default", "long"), "other"])


def test_a_text_that_is_too_long_for_its_row_is_refused() -> None:
    model = make_many("GPT-2", "CAUSAL_LM")
    limit = model.config.max_position_embeddings
    ids = torch.randint(5, 90, (2, limit - V))
    with torch.no_grad():
        model(input_ids=ids, adapter_names=[BASE, "default"])
        with pytest.raises(ValueError, match=f"{V + 4} virtual tokens and {limit - V} text tokens"):
            model(input_ids=ids, adapter_names=[BASE, "long"])


# Composed prompts, the same for all rows.


@cells
@pytest.mark.parametrize("grads", [False, True], ids=["without gradients", "with gradients"])
def test_composed_prompts_are_one_prompt_made_of_both(family: str, task: str, grads: bool) -> None:
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        pytest.skip("each adapter has a head of its own")
    model, batch = make_many(family, task, ["long", "other"]), make_batch(family, task)
    torch.manual_seed(0)
    model.add_adapter("both", make_config(task, 2 * V + 4))
    layer = next(m for m in model.modules() if hasattr(m, "ptuning_encoders"))
    layer.ptuning_encoders["both"].start_at(torch.cat([layer.encode("long"), layer.encode("other")]).detach())
    with torch.set_grad_enabled(grads):
        expected = alone(model, "both", lambda: main_output(model(**batch)))
        found = alone(model, ("long", "other"), lambda: main_output(model(**batch)))
        reversed_ = alone(model, ("other", "long"), lambda: main_output(model(**batch)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (reversed_ - expected).abs().max() > 1e-4


@decoders
def test_a_deep_prompt_stands_in_front_of_one_at_the_input(family: str) -> None:
    """As in the base model behind a cache that holds the deep one, reading the other as embeddings."""
    model = make_many(family, "CAUSAL_LM", ["long", "deep"])
    ids = torch.randint(5, 90, (2, S))
    base, deep = make_model(family, "CAUSAL_LM"), model.base_model.prompt_key_values("deep")
    cache = DynamicCache()
    for index, pair in deep.items():
        cache.update(*(state[None].expand(2, -1, -1, -1).detach() for state in pair), index)
    vectors = model.base_model.prompt_embeddings("long").detach()
    layer = next(m for m in model.modules() if hasattr(m, "ptuning_encoders"))
    embeds = torch.cat([vectors.expand(2, -1, -1), layer.embed(ids)], dim=1)
    total = deep[0][0].shape[1] + embeds.shape[1]
    arguments = {"inputs_embeds": embeds / layer.embed_scale, "attention_mask": torch.ones(2, total)}
    if family != "Bloom":
        arguments["position_ids"] = torch.arange(embeds.shape[1])[None].expand(2, -1)
    with torch.no_grad():
        expected = base(**arguments, **{CACHE: cache}).logits[:, len(vectors) :]
        found = alone(model, ("long", "deep"), lambda: model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    with_gradients = alone(model, ("deep", "long"), lambda: model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(with_gradients.detach(), expected, rtol=0, atol=2e-5)


def test_composed_prompts_are_trained_together_and_saved_apart(tmp_path) -> None:
    model = make_many("Llama", "CAUSAL_LM", ["long", "deep"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.base_model.set_adapter(["long", "deep"])
    batch = make_batch("Llama", "CAUSAL_LM", (S, S))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.split("ptuning_encoders.")[1].split(".")[0] for n in moved} == {"long", "deep"}
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch).logits
    loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path / "long", "long")
    loaded.load_adapter(tmp_path / "deep", "deep")
    loaded.base_model.set_adapter(["long", "deep"])
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)


def test_what_can_not_be_composed_is_refused() -> None:
    model = make_many("Llama", "CAUSAL_LM", ["long"])
    with pytest.raises(ValueError, match="can be active once"):
        model.base_model.set_adapter(["long", "long"])
    assert model.base_model.active_adapters == ["default"]


def test_several_active_prompts_are_not_taken_for_one(tmp_path) -> None:
    model = make_many("Llama", "CAUSAL_LM", ["long", "other"])
    model.base_model.set_adapter(["long", "other"])
    for call in (model.base_model.prompt_embeddings, lambda: export_to_peft(model, tmp_path / "new")):
        with pytest.raises(ValueError, match=r"\['long', 'other'\] are active together. Name one"):
            call()
    assert not (tmp_path / "new").exists()
    assert len(model.base_model.prompt_embeddings("long")) == V + 4


def test_heads_of_rows_are_disabled_with_their_prompts() -> None:
    model = make_many("BERT", "SEQ_CLS", ["other"])
    batch = make_batch("BERT", "SEQ_CLS", (S, S))
    with model.disable_adapter():
        expected = model(**batch).logits
        with use_adapters(model, ["default", "other"]):
            torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_what_both_depths_with_gradients_have_no_room_for_is_refused() -> None:
    model = make_many("Llama", "CAUSAL_LM", ["long", "deep"])
    model.base_model.set_adapter(["long", "deep"])
    ids = torch.arange(5, 12)[None]
    with pytest.raises(ValueError, match="got a cache.*: gradients are asked for. Leave the cache out"):
        model(input_ids=ids, **{CACHE: DynamicCache()})
    mask = torch.ones(7, 7).tril().bool()[None, None]
    with pytest.raises(ValueError, match="4-D mask.* concatenated here, because gradients are asked for"):
        model(input_ids=ids, attention_mask=mask)


def test_active_adapters_stay_where_several_are_refused() -> None:
    model = make_many("BERT", "SEQ_CLS", ["other"])
    batch = make_batch("BERT", "SEQ_CLS", (S, S))
    expected = model(**batch).logits
    with pytest.raises(ValueError, match="each have a copy of the same Linear"):
        model.base_model.set_adapter(["other", "default"])
    assert model.base_model.active_adapters == ["default"]
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_trained_rows_of_the_vocabulary_are_those_of_all_rows() -> None:
    model, batch = make_adapted(trainable_token_indices=[5, 6]), make_batch("Llama", "CAUSAL_LM")
    model.add_adapter("other", make_config("CAUSAL_LM", trainable_token_indices=[7, 8]))
    model.set_adapter("default")
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, adapter_names=["default"] * 2).logits, expected, **CLOSE)
    for names in (["default", "other"], ["other", "other"], ["default", BASE]):
        with pytest.raises(ValueError, match="the same for a whole batch: those of .'default'. are active"):
            model(**batch, adapter_names=names)
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)


def with_modules(family: str, module: str) -> PeftModel:
    """Two adapters, each with a module of its own inside the backbone."""
    base, names = make_model(family, "CAUSAL_LM"), ("default", "other")
    model = get_peft_model(base, make_config("CAUSAL_LM", length=8, modules_to_save=[module]))
    model.add_adapter("other", make_config("CAUSAL_LM", length=8, modules_to_save=[module]))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if any(f"modules_to_save.{adapter}." in name for adapter in names):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("grads", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize(
    ("family", "module"), [("Llama", "norm"), ("Llama", "mlp"), ("Llama", "q_proj"), ("OPT", "fc1"), ("GPT-2", "mlp")]
)
def test_modules_inside_the_backbone_are_those_of_each_row(family: str, module: str, grads: bool) -> None:
    """OPT's get the tokens of all rows behind each other, 8·2 of two prompts among them: a multiple of 4 rows."""
    model, names = with_modules(family, module), ["default", "other", "other", BASE]
    batch = make_batch(family, "CAUSAL_LM", (S, S - 2, S, 3))
    with torch.set_grad_enabled(grads):
        expected = torch.cat([model(**row_of(batch, i), adapter_names=[name]).logits for i, name in enumerate(names)])
        found = [model(**batch, adapter_names=names).logits]
        with use_adapters(model, names):
            found.append(model(**batch).logits)
    seen = batch["attention_mask"].bool()
    for logits in found:
        torch.testing.assert_close(logits[seen], expected[seen], rtol=0, atol=2e-5)
    model.base_model.set_adapter("other", inference_mode=True)  # nothing wrong is stored
    with torch.no_grad():
        torch.testing.assert_close(model(**row_of(batch, 1)).logits, expected[1:2], rtol=0, atol=2e-5)


def test_modules_inside_the_backbone_generate_for_each_row() -> None:
    model, names = with_modules("OPT", "fc1"), ["default", "other", "other", BASE]
    batch = make_batch("OPT", "CAUSAL_LM", (S, S - 2, S, 3), pad_left=True)
    found = generated(model, batch, adapter_names=names)
    for i, name in enumerate(names):
        assert torch.equal(found[i], generated(model, row_of(batch, i), adapter_names=[name])[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_modules_inside_the_backbone_are_not_chosen_anew_in_the_backward_pass(use_reentrant: bool) -> None:
    model, batch = with_modules("Llama", "mlp"), make_batch("Llama", "CAUSAL_LM", (S, S))
    getattr(model.base_model.model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    model.train()
    for names in (["default", "other"], ["other", "other"]):
        with pytest.raises(ValueError, match="gradient checkpointing runs its layers again in the backward pass"):
            model(**batch, adapter_names=names)
    model(**batch, adapter_names=["default", "default"]).logits.sum().backward()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("long", "placed")] * 2, "'placed' has a prompt template"),
        ([("placed", "deep")] * 2, "'placed' has a prompt template"),
        ([("long", "long"), "long"], "can be active once"),
    ],
)
def test_a_tuple_of_a_row_is_held_to_what_active_adapters_are(rows: list, message: str) -> None:
    model, batch = make_many("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM", (S, S))
    template = PromptTemplate("{prompt:2} {text}", placeholder="<p>", placeholder_id=98)
    model.add_adapter("placed", make_config("CAUSAL_LM", length=2, prompt_template=template))
    with pytest.raises(ValueError, match=message):
        model(**batch, adapter_names=rows)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, adapter_names=rows, max_new_tokens=2)


@pytest.mark.parametrize("rows", [[("deep", "long")] * 2, ["deep", "long"]], ids=["composed", "by row"])
def test_both_depths_generate_in_training_mode(rows: list) -> None:
    model, batch = make_many("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM", (S, S))
    expected = generated(model, batch, adapter_names=rows)
    assert torch.equal(generated(model.train(), batch, adapter_names=rows), expected)


def test_modules_with_several_inputs_are_refused() -> None:
    model, batch = with_modules("Llama", "self_attn"), make_batch("Llama", "CAUSAL_LM", (S, S))
    for names in (["default", "other"], ["other", "other"]):
        with pytest.raises(ValueError, match="A LlamaAttention.* more than one tensor.*Call the model for each"):
            model(**batch, adapter_names=names)
    assert torch.equal(model(**batch, adapter_names=["default", "default"]).logits, model(**batch).logits)


def test_the_active_head_is_computed_once() -> None:
    model, batch = make_many("BERT", "SEQ_CLS"), make_batch("BERT", "SEQ_CLS", (S, S, S))
    calls = Counter()
    for name, head in model.base_model.model.classifier.modules_to_save.items():
        head.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(**batch, adapter_names=["default", "other", "default"])
    assert calls == {"default": 1, "other": 1}
    model(**batch, adapter_names=["default"] * 3)
    assert calls == {"default": 2, "other": 1}
