# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A prompt bank: each row equals its adapter, wherever the adapter came from; beside others it harms none."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from banks import (
    BASE,
    CLOSE,
    ONE_LENGTH,
    cells,
    check_same,
    fill,
    look,
    make_many,
    names_of,
    reopened,
)
from families import make_model
from making import make_config
from peft import LoraConfig, get_peft_model
from reference import S, V, main_output, make_batch

from peft_ptuning_ext import PromptBank, use_adapters
from peft_ptuning_ext.prompts import stored
from peft_ptuning_ext.prompts.adapter import find_stack


@cells
@torch.no_grad()
def test_rows_are_those_of_the_adapters(family, task, tmp_path) -> None:
    """Prompts of several lengths, depths and encoders, with their heads: as PEFT's adapters, and from disk."""
    model = make_many(family, task)
    rows = [*names_of(family), *([] if family in ONE_LENGTH else [BASE])]
    batch = make_batch(family, task, lengths=(S, S - 2, S, S - 1, S)[: len(rows)])
    expected = main_output(model(**batch, adapter_names=rows))
    base = make_model(family, task).eval()
    before = look(base, batch)
    bank = PromptBank(base)
    for name in model.peft_config:
        bank.add(model, name, adapter_name=name)
    torch.testing.assert_close(main_output(bank(**batch, adapter_names=rows)), expected, **CLOSE)
    again = reopened(bank, tmp_path, family, task)
    torch.testing.assert_close(main_output(again(**batch, adapter_names=rows)), expected, **CLOSE)
    assert sorted(again) == sorted(model.peft_config)
    assert torch.equal(main_output(bank(**batch)), before[-1])
    assert bank.unload() is base
    check_same(look(base, batch), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptBank(base)


@pytest.mark.parametrize(("family", "task"), [("Llama", "CAUSAL_LM"), ("T5", "SEQ_2_SEQ_LM"), ("GPT-2", "CAUSAL_LM")])
@torch.no_grad()
def test_generation(family, task, tmp_path) -> None:
    model = make_many(family, task)
    bank = reopened(fill(model, family, task), tmp_path, family, task)
    rows = [*names_of(family), BASE]
    batch = make_batch(family, task, lengths=(S, S - 2, S, S - 1, S)[: len(rows)], pad_left=True)
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **options, adapter_names=rows)
    assert torch.equal(bank.generate(**batch, **options, adapter_names=rows), expected)
    beams = model.generate(**batch, **options, num_beams=2, num_return_sequences=2, adapter_names=rows)
    assert torch.equal(
        bank.generate(**batch, **options, num_beams=2, num_return_sequences=2, adapter_names=rows), beams
    )


@pytest.mark.parametrize("name", ["network", "long", "deep"])
@torch.no_grad()
def test_one_name_for_all_rows(name, tmp_path) -> None:
    """For batches of any size, in place of an active adapter."""
    model = make_many("BERT", "SEQ_CLS")
    bank = reopened(fill(model, "BERT", "SEQ_CLS"), tmp_path, "BERT", "SEQ_CLS")
    model.set_adapter(name)
    for lengths in [(S,), (S, S - 2, S)]:
        batch = make_batch("BERT", "SEQ_CLS", lengths)
        expected = model(**batch).logits
        torch.testing.assert_close(bank(**batch, adapter_names=name).logits, expected, **CLOSE)
        with use_adapters(model, name):
            torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)


@torch.no_grad()
def test_beside_adapters(tmp_path) -> None:
    """Rows of a batch have adapters of the model, prompts of the bank, and both one behind the other."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM", (S, S, S))
    rows = ["default", ("default", "long"), "deep"]
    expected = model(**batch, adapter_names=rows).logits
    fill(model).save(tmp_path)
    beside = make_many(names=["default"])
    with pytest.raises(ValueError, match="The bank has a prompt 'default', and so has the model"):
        PromptBank.from_pretrained(beside, tmp_path)
    bank = fill(model)
    bank.delete("default")
    bank.save(tmp_path)
    bank = PromptBank.from_pretrained(beside, tmp_path)
    torch.testing.assert_close(beside(**batch, adapter_names=rows).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="has a prompt 'long'"):
        beside.add_adapter("long", make_config("CAUSAL_LM"))
    with pytest.raises(ValueError, match="The model has an adapter 'default'"):
        bank.add(model, "default")
    beside.unload()
    assert torch.equal(
        bank(**batch, adapter_names=["long"] * 3).logits, fill(model)(**batch, adapter_names="long").logits
    )


@torch.no_grad()
def test_beside_lora(tmp_path) -> None:
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = fill(model)
    base = bank.unload()
    torch.manual_seed(3)
    lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    plain = lora(**batch).logits
    embeds = torch.cat([model.base_model.prompt_embeddings(), lora.get_input_embeddings()(batch["input_ids"][0])])
    expected = lora(inputs_embeds=embeds[None]).logits[0, V:]
    bank = PromptBank(lora)
    bank.add(model, "one")
    found = bank(**batch, adapter_names=["one", BASE]).logits
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1, : S - 2], plain[1, : S - 2], rtol=0, atol=1e-5)
    assert bank.unload() is lora
    assert torch.equal(lora(**batch).logits, plain)


@torch.no_grad()
def test_those_used_last_stay_ready(tmp_path, monkeypatch) -> None:
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM", (S, S, S, S))
    bank = reopened(fill(model), tmp_path)
    rows = ["default", "network", "long", "deep"]
    expected = model(**batch, adapter_names=rows).logits
    monkeypatch.setattr(stored, "MAX_BYTES", 2 * stored.OBJECTS + 3000)
    for _ in range(2):
        torch.testing.assert_close(bank(**batch, adapter_names=rows).logits, expected, **CLOSE)
        assert 1 <= len(bank._prompts._ready) <= 2
    bank(**batch, adapter_names="long")
    assert list(bank._prompts._ready)[-1] == "long"


@torch.no_grad()
def test_replaced_and_deleted() -> None:
    """What was computed of a former prompt of a name is not used again."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = fill(model)
    bank(**batch, adapter_names="network")
    bank.add(model, "network", adapter_name="default")
    assert torch.equal(bank(**batch, adapter_names="network").logits, model(**batch).logits)
    kept = find_stack(bank._base).ptuning.states
    assert len(kept) == 1
    bank.delete("network")
    assert len(kept) == 0
    assert "network" not in bank
    assert len(bank) == 3
    with pytest.raises(ValueError, match=r"has 'network', and the adapters are \['deep', 'default', 'long'\]"):
        bank(**batch, adapter_names="network")
    with pytest.raises(ValueError, match="There is no prompt 'network' in the bank, only"):
        bank.delete("network")
    model.base_model._layer().ptuning_encoders["default"].embedding.add_(1)  # the bank has a copy
    assert not torch.equal(bank(**batch, adapter_names="default").logits, model(**batch).logits)


@torch.no_grad()
def test_threads_choose_for_themselves(tmp_path) -> None:
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = reopened(fill(model), tmp_path)
    names, found = ["default", "network", "long", "deep"], {}
    together = threading.Barrier(len(names))

    def run(name: str) -> None:
        with torch.no_grad():
            together.wait(20)
            found[name] = [bank(**batch, adapter_names=[name, BASE]).logits for _ in range(5)]

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in names:
        expected = model(**batch, adapter_names=[name, BASE]).logits
        for logits in found[name]:
            torch.testing.assert_close(logits, expected, **CLOSE)


def test_gradients_reach_what_is_in_front_of_the_bank(tmp_path) -> None:
    """A bank is not trained, and does not keep others from it: an adapter behind a prompt of the bank is."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    beside = make_many(names=["default"]).train()
    bank = PromptBank(beside)
    bank.add(model, "long", adapter_name="long")
    beside(**batch, labels=batch["input_ids"], adapter_names=[("long", "default"), BASE]).loss.backward()
    found = beside.base_model._layer().ptuning_encoders["default"].embedding.grad
    model.train()(**batch, labels=batch["input_ids"], adapter_names=[("long", "default"), BASE]).loss.backward()
    expected = model.base_model._layer().ptuning_encoders["default"].embedding.grad
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_names_are_as_many_as_rows() -> None:
    """Two names for four rows are a mistake, and not one name for each two rows."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM", lengths=(S, S, S, S))
    bank, ids = fill(model), batch["input_ids"]
    for call, options in ((bank, {}), (bank.generate, {"max_new_tokens": 2}), (model.generate, {"max_new_tokens": 2})):
        with pytest.raises(ValueError, match="batch has 4 rows, and `adapter_names` has 2"):
            call(**batch, adapter_names=["default", "long"], **options)
    with pytest.raises(ValueError, match="batch has 4 rows, and `adapter_names` has 2"):
        bank.generate(ids, adapter_names=["default", "long"], max_new_tokens=2)
    assert len(bank.generate(ids[:2], adapter_names=["default", "long"], max_new_tokens=2, num_beams=2)) == 2
    assert torch.equal(bank(**batch, adapter_names="long").logits, bank(**batch, adapter_names=["long"] * 4).logits)


@torch.no_grad()
def test_a_bank_that_was_unloaded() -> None:
    """It does not touch the bank that the model has now, and says so."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    old = fill(model)
    new = PromptBank(old.unload())
    new.add(model, "long", adapter_name="default")
    expected = new(**batch, adapter_names="long").logits
    calls = [
        lambda: old(**batch, adapter_names=["long", "long"]),
        lambda: old.generate(**batch, adapter_names="long", max_new_tokens=2),
        lambda: old.add(model, "other", adapter_name="deep"),
        lambda: old.delete("long"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="This bank is not on its LlamaForCausalLM any more"):
            call()
    old.unload()
    assert torch.equal(new(**batch, adapter_names="long").logits, expected)
    new.unload()
    for call in calls:
        with pytest.raises(ValueError, match="This bank is not on its LlamaForCausalLM any more"):
            call()


@pytest.mark.parametrize("bank_first", [False, True])
def test_what_trains_is_as_before_the_adapters(bank_first) -> None:
    """A bank that stays on the model freezes nothing."""
    base = make_model("Llama", "CAUSAL_LM")
    bank = PromptBank(base) if bank_first else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        model = get_peft_model(base, make_config("CAUSAL_LM"))
    bank = PromptBank(model) if bank is None else bank
    model.unload()
    assert all(parameter.requires_grad for parameter in base.parameters())
    bank.unload()
    assert all(parameter.requires_grad for parameter in base.parameters())


@torch.no_grad()
def test_nothing_stays_on_heads() -> None:
    base, batch = make_model("RoBERTa", "SEQ_CLS").eval(), make_batch("RoBERTa", "SEQ_CLS")
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    bank = PromptBank(base)
    bank.add(make_many("RoBERTa", "SEQ_CLS", ["default"]), "first")
    bank(**batch, adapter_names=["first", BASE])
    bank.unload()
    assert not any(module._forward_hooks for module in base.modules())
    assert {name: set(vars(module)) for name, module in base.named_modules()} == before


@torch.no_grad()
def test_disabled_adapters() -> None:
    """A prompt that is asked for by name is not left out in silence, and is there when no adapter is left."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = fill(model)
    expected = bank(**batch, adapter_names="long").logits
    bank.base_model.add_adapter(make_config("CAUSAL_LM"), "own")
    bank.base_model.disable_adapters()
    with pytest.raises(ValueError, match="the adapters of the model are disabled, and the bank with them"):
        bank(**batch, adapter_names="long")
    bank.base_model.delete_adapter("own")
    assert torch.equal(bank(**batch, adapter_names="long").logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_heads_in_other_dtypes(dtype, tmp_path) -> None:
    """A head is used in the model's dtype, also when that changes between two calls."""
    model, batch = make_many("RoBERTa", "SEQ_CLS"), make_batch("RoBERTa", "SEQ_CLS")
    bank, rows = reopened(fill(model, "RoBERTa", "SEQ_CLS"), tmp_path, "RoBERTa", "SEQ_CLS"), ["default", "network"]
    bank(**batch, adapter_names=rows)
    bank.base_model.to(dtype)
    found = bank(**batch, adapter_names=rows).logits
    encoders = model.base_model._layer().ptuning_encoders
    kept = copy.deepcopy(encoders)
    model.to(dtype)
    encoders.float().load_state_dict(kept.state_dict())
    torch.testing.assert_close(found, model(**batch, adapter_names=rows).logits, **CLOSE)


def test_heads_where_they_can_not_be() -> None:
    """Offloaded weights would be those of the base model; and LoRA inside a head has no place in that of a row."""
    model, batch = make_many("RoBERTa", "SEQ_CLS", ["default"]), make_batch("RoBERTa", "SEQ_CLS")
    base = make_model("RoBERTa", "SEQ_CLS").eval()
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="'classifier' of its own, and the weights of the model's are offloaded"):
        PromptBank(base).add(model, "first")
    lora = LoraConfig(target_modules=["query", "dense"])
    with_lora = get_peft_model(make_model("RoBERTa", "SEQ_CLS"), lora)
    with pytest.raises(ValueError, match="other tensors in 'classifier'.*an adapter of another method"):
        PromptBank(with_lora).add(model, "first")
    bank = fill(model, "RoBERTa", "SEQ_CLS")
    bank.base_model.add_adapter(lora)
    with pytest.raises(ValueError, match="'classifier' of the bank does not fit into the model any more"):
        bank(**batch, adapter_names="default")


@torch.no_grad()
def test_modules_inside_the_backbone() -> None:
    """Prompts are computed apart from the rows, with the module of their adapter where all rows have the same."""
    base, batch = make_model("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM")
    model = get_peft_model(base, make_config("CAUSAL_LM", modules_to_save=["mlp"])).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_(std=0.3)
    expected, bank = model(**batch).logits, fill(model)
    for found in (model, bank):
        logits = found(**batch, adapter_names=["default"] * 2).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    rows = make_batch("Llama", "CAUSAL_LM", lengths=(S, S, S))
    found = fill(model)(**rows, adapter_names=["default", BASE, BASE]).logits
    torch.testing.assert_close(found[:1], model(**rows).logits[:1], rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(found[1:], model(**rows).logits[1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_another_model_around_the_backbone() -> None:
    """It has the prompts, and not the heads."""
    bank, batch = fill(make_many("Llama", "SEQ_CLS"), "Llama", "SEQ_CLS"), make_batch("Llama", "CAUSAL_LM")
    other = make_model("Llama", "CAUSAL_LM").eval()
    other.model = bank.base_model.model
    with (
        pytest.raises(ValueError, match="came with a module 'score', and this LlamaForCausalLM around the same"),
        use_adapters(other, "default"),
    ):
        other(**batch)


@torch.no_grad()
def test_replaced_while_it_is_made_ready(monkeypatch) -> None:
    """What a thread makes of a former prompt does not stay for the calls that come after."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = fill(model)
    make, changes = stored.StoredPrompts._make_ready, [lambda: bank.add(model, "network", adapter_name="long")]

    def replace_meanwhile(prompts, name, *args):
        ready = make(prompts, name, *args)
        if changes:
            changes.pop()()
        return ready

    monkeypatch.setattr(stored.StoredPrompts, "_make_ready", replace_meanwhile)
    bank(**batch, adapter_names="network")
    found = bank(**batch, adapter_names="network").logits
    assert torch.equal(found, bank(**batch, adapter_names="long").logits)
