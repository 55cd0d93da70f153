# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A prompt bank: each row equals its adapter, wherever the adapter came from; and what is refused changes nothing."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import threading
import warnings
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import cpu_offload
from families import CELLS, make_model
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, get_peft_model
from reference import S, V, main_output, make_batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_ptuning_ext.bank
import peft_ptuning_ext.files.bank
from peft_ptuning_ext import PromptBank, PTuningConfig, use_adapters
from peft_ptuning_ext.files.bank import BankFile
from peft_ptuning_ext.prompts import stored
from peft_ptuning_ext.prompts.adapter import find_stack


BASE = "__base__"
# A head of a row computes its rows, and the base model's all of them: the last bits may differ.
CLOSE = {"rtol": 0, "atol": 1e-6}
FILE = "prompt_bank.safetensors"
cells = pytest.mark.parametrize(("family", "task"), CELLS, ids=lambda value: value.replace(" ", "-"))
# They have a table of positions and can't be told which to use.
ONE_LENGTH = {"BART"}
# Deep prompts that don't go through transformers' attention interface, and so have one length in a batch.
ONE_DEEP_LENGTH = {"DeBERTa-v2", "MPNet", "Bloom", "Falcon"}
ADAPTERS = {
    "network": {"length": V, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8},
    "long": {"length": V + 4},
    "deep": {"length": V - 1, "prompt_depth": "DEEP"},
}


def names_of(family: str) -> list[str]:
    if family in ONE_LENGTH:
        return ["default", "network"]
    return ["default", "network", "long"] + ([] if family in ONE_DEEP_LENGTH else ["deep"])


def make_many(family: str = "Llama", task: str = "CAUSAL_LM", names: list[str] | None = None) -> PeftModel:
    """A model with adapters whose prompts, and heads, all differ."""
    model = make_adapted(family, task)
    torch.manual_seed(5)
    for name in names_of(family) if names is None else names:
        if name != "default":
            model.add_adapter(name, make_config(task, **ADAPTERS[name]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:  # copies of one head otherwise
            parameter.data.normal_(std=0.3)
    return model.eval()


def fill(model: PeftModel, family: str = "Llama", task: str = "CAUSAL_LM") -> PromptBank:
    """A bank on another copy of the base model, with all adapters of `model`."""
    bank = PromptBank(make_model(family, task).eval())
    for name in model.peft_config:
        bank.add(model, name, adapter_name=name)
    return bank


def reopened(bank: PromptBank, folder: Path, family: str = "Llama", task: str = "CAUSAL_LM") -> PromptBank:
    bank.save(folder)
    return PromptBank.from_pretrained(make_model(family, task).eval(), folder)


def look(model: torch.nn.Module, batch: dict) -> tuple:
    """What of a model a failed call must leave as it was."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        return modules, [p.requires_grad for p in model.parameters()], state, main_output(model(**batch))


def check_same(one: tuple, other: tuple) -> None:
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    assert all(torch.equal(value, other[2][key]) for key, value in one[2].items())
    assert torch.equal(one[3], other[3])


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


@pytest.mark.parametrize("name", ["default", "network", "deep"])
@torch.no_grad()
def test_adapters_are_added_from_folders(name, tmp_path) -> None:
    model = make_many("BERT", "SEQ_CLS")
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    bank, batch = PromptBank(make_model("BERT", "SEQ_CLS").eval()), make_batch("BERT", "SEQ_CLS")
    bank.add(folder, "added")
    expected = model(**batch, adapter_names=[name, BASE]).logits
    torch.testing.assert_close(bank(**batch, adapter_names=["added", BASE]).logits, expected, **CLOSE)
    shutil.rmtree(folder)
    torch.testing.assert_close(bank(**batch, adapter_names=["added", BASE]).logits, expected, **CLOSE)


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
def test_a_model_with_a_bank_is_saved_as_without(tmp_path) -> None:
    bank, batch = fill(make_many()), make_batch("Llama", "CAUSAL_LM")
    base = bank._base
    base.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, base(**batch).logits)
    base.load_state_dict({name: value * 2 for name, value in loaded.state_dict().items()})
    assert torch.equal(base.state_dict()["model.embed_tokens.weight"], 2 * loaded.model.embed_tokens.weight)


@torch.no_grad()
def test_nothing_is_read_before_it_is_needed(tmp_path, monkeypatch) -> None:
    """Also where a prompt is broken: only a call that needs it fails, before the model runs."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    fill(model).save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["prompt:long"][3, 2] = float("nan")
    with open(tmp_path / FILE, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    metadata = json.loads(header)["__metadata__"]
    save_file(tensors, tmp_path / FILE, metadata)
    read, read_one = Counter(), BankFile.read
    monkeypatch.setattr(BankFile, "read", lambda self, name: (read.update([name]), read_one(self, name))[1])
    bank = PromptBank.from_pretrained(make_model("Llama", "CAUSAL_LM").eval(), tmp_path)
    assert not read
    expected = model(**batch, adapter_names=["network", BASE]).logits
    for _ in range(2):
        torch.testing.assert_close(bank(**batch, adapter_names=["network", BASE]).logits, expected, **CLOSE)
    assert read == {"network": 1}
    with pytest.raises(ValueError, match=r"prompt 'long': 'prompt' holds NaN or infinite values"):
        bank(**batch, adapter_names=["network", "long"])
    torch.testing.assert_close(bank(**batch, adapter_names=["network", BASE]).logits, expected, **CLOSE)


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
def test_the_file_is_whole_or_as_before(tmp_path, monkeypatch) -> None:
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = reopened(fill(model), tmp_path)
    expected = bank(**batch, adapter_names=["long", "deep"]).logits
    before = (tmp_path / FILE).read_bytes()
    bank.delete("network")

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_ptuning_ext.files.bank, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        bank.save(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before
    bank.save(tmp_path)  # over the file that it reads from
    torch.testing.assert_close(bank(**batch, adapter_names=["long", "deep"]).logits, expected, **CLOSE)
    assert sorted(reopened(bank, tmp_path)) == ["deep", "default", "long"]


@torch.no_grad()
def test_copies(tmp_path) -> None:
    """A copied model has a bank of its own; one from a pickle opens the file again, if it is still the same."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = reopened(fill(model), tmp_path)
    expected = bank(**batch, adapter_names=["long", "deep"]).logits
    other = copy.deepcopy(bank)
    other.delete("long")
    torch.testing.assert_close(bank(**batch, adapter_names=["long", "deep"]).logits, expected, **CLOSE)
    written = pickle.dumps(bank)
    torch.testing.assert_close(
        pickle.loads(written)(**batch, adapter_names=["long", "deep"]).logits, expected, **CLOSE
    )
    bank.delete("network")
    bank.save(tmp_path)
    with pytest.raises(ValueError, match="was replaced after the prompt bank was opened"):
        pickle.loads(written)


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


def lora_folder(path: Path) -> Path:
    get_peft_model(make_model("Llama", "CAUSAL_LM"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(path)
    return path


SOURCES = {
    "width": (lambda path: make_adapted(sizes={"hidden_size": 64, "head_dim": 16}), "takes vectors of 32 numbers"),
    "layers": (lambda path: make_adapted(sizes={"num_hidden_layers": 3}, prompt_depth="DEEP"), "for another model"),
    "rows": (
        lambda path: make_adapted(trainable_token_indices=[1, 2]),
        "has `trainable_token_indices`, which is the same for all rows",
    ),
    "no adapter": (lambda path: make_model("Llama", "CAUSAL_LM"), "has no P-tuning adapter"),
    "LoRA": (lora_folder, "an adapter of type LORA, and a bank holds those of PTUNING"),
    "nothing": (lambda path: path, "Can't find 'adapter_config.json'"),
    "too long": (lambda path: make_adapted(length=64), "64 positions for the prompt and the text together"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_do_not_fit(case, tmp_path) -> None:
    make, message = SOURCES[case]
    bank = PromptBank(make_model("GPT-2" if case == "too long" else "Llama", "CAUSAL_LM").eval())
    batch = make_batch("Llama", "CAUSAL_LM")
    before, source = look(bank._base, batch), make(tmp_path)
    with pytest.raises(ValueError, match=message):
        bank.add(source, "new")
    assert "new" not in bank
    check_same(look(bank._base, batch), before)


def test_heads_that_do_not_fit(tmp_path) -> None:
    model = make_adapted("BERT", "SEQ_CLS", sizes={"num_labels": 5})
    bank = PromptBank(make_model("BERT", "SEQ_CLS").eval())
    with pytest.raises(ValueError, match="load the model with the `num_labels`"):
        bank.add(model, "five")
    five = PromptBank(make_model("BERT", "SEQ_CLS", num_labels=5))
    five.add(model, "five")
    five.save(tmp_path)
    base, batch = make_model("BERT", "SEQ_CLS").eval(), make_batch("BERT", "SEQ_CLS")
    before = look(base, batch)
    with pytest.raises(ValueError, match="load the model with the `num_labels`"):
        PromptBank.from_pretrained(base, tmp_path)
    check_same(look(base, batch), before)
    other = make_model("BERT", "FEATURE_EXTRACTION").eval()
    with pytest.raises(ValueError, match="has a module 'classifier', and this BertModel has none"):
        PromptBank.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="has a prompt bank already"):
        PromptBank(bank._base)


@pytest.mark.parametrize("name", ["", BASE, 3])
def test_names_that_are_none(name) -> None:
    bank = PromptBank(make_model("Llama", "CAUSAL_LM"))
    with pytest.raises(ValueError, match="name of a prompt must be a text"):
        bank.add(make_adapted(), name)


@pytest.mark.parametrize("name", ["a:b", "prompt:x", "with space/and\\slash", "名前", "a" * 300, "\n"])
@torch.no_grad()
def test_any_text_is_a_name(name, tmp_path) -> None:
    model, batch = make_many("BERT", "SEQ_CLS", ["default"]), make_batch("BERT", "SEQ_CLS")
    bank = PromptBank(make_model("BERT", "SEQ_CLS").eval())
    bank.add(model, name)
    again = reopened(bank, tmp_path, "BERT", "SEQ_CLS")
    assert list(again) == [name]
    expected = model(**batch, adapter_names=["default", BASE]).logits
    torch.testing.assert_close(again(**batch, adapter_names=[name, BASE]).logits, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_other_dtypes(dtype, tmp_path) -> None:
    """The bank keeps the numbers as they were trained; the model gets them in its own dtype, as from an adapter."""
    model, batch = make_many().to(dtype), make_batch("Llama", "CAUSAL_LM")
    for encoder in model.base_model._layer().ptuning_encoders.values():
        encoder.float()
    bank = PromptBank(make_model("Llama", "CAUSAL_LM").to(dtype).eval())
    for name in ("default", "deep"):
        bank.add(model, name, adapter_name=name)
    expected = model(**batch, adapter_names=["default", "deep"]).logits
    torch.testing.assert_close(bank(**batch, adapter_names=["default", "deep"]).logits, expected, **CLOSE)
    bank.save(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / FILE).values()} == {torch.float32}
    again = PromptBank.from_pretrained(make_model("Llama", "CAUSAL_LM").to(dtype).eval(), tmp_path)
    with torch.inference_mode():
        for _ in range(2):  # and keeps what it has computed of them
            torch.testing.assert_close(again(**batch, adapter_names=["default", "deep"]).logits, expected, **CLOSE)
    assert len(find_stack(again._base).ptuning.states) == 1


def test_a_bank_on_the_hub(tmp_path, monkeypatch) -> None:
    """Pushed and loaded over what huggingface_hub sends and gets."""
    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            sent["repo"] = repo_id, private, exist_ok

        def upload_folder(self, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / "hub")
            return kwargs

    def download(repo_id, filename, subfolder=None, **kwargs):
        sent["download"] = repo_id, subfolder, kwargs
        return str(tmp_path / "hub" / filename)

    monkeypatch.setattr(peft_ptuning_ext.bank, "HfApi", Api)
    monkeypatch.setattr(peft_ptuning_ext.bank, "hf_hub_download", download)
    bank = fill(make_many(names=["default"]))
    assert bank.push_to_hub("me/bank", private=True, token="t", commit_message="m") == {"commit_message": "m"}
    assert sent == {"token": "t", "repo": ("me/bank", True, True)}
    again = PromptBank.from_pretrained(make_model("Llama", "CAUSAL_LM"), "me/bank", revision="v1")
    assert list(again) == ["default"]
    assert sent["download"] == ("me/bank", None, {"revision": "v1"})


def test_no_bank(tmp_path) -> None:
    base, batch = make_model("Llama", "CAUSAL_LM").eval(), make_batch("Llama", "CAUSAL_LM")
    before = look(base, batch)
    with pytest.raises(ValueError, match="it is no prompt bank"):
        PromptBank.from_pretrained(base, tmp_path)
    save_file({"prompt:a": torch.zeros(2, 32)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="its header does not tell what it holds"):
        PromptBank.from_pretrained(base, tmp_path)
    check_same(look(base, batch), before)


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
    with pytest.raises(ValueError, match="stands inside the backbone.*call the model for each"):
        fill(model)(**rows, adapter_names=["default", BASE, BASE])


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


@torch.no_grad()
def test_written_to_while_it_is_open(tmp_path) -> None:
    """Others' numbers are not taken for a prompt; a file that is moved there, or deleted, changes nothing."""
    model, batch = make_many(), make_batch("Llama", "CAUSAL_LM")
    bank = reopened(fill(model), tmp_path / "one")
    other = reopened(fill(model), tmp_path / "other")
    expected = model(**batch, adapter_names=["long", "long"]).logits
    fill(make_many(names=["default"])).save(tmp_path / "one")
    torch.testing.assert_close(bank(**batch, adapter_names="long").logits, expected, **CLOSE)
    shutil.copyfile(tmp_path / "one" / FILE, tmp_path / "other" / FILE)
    with pytest.raises(ValueError, match="was written to after the prompt bank was opened"):
        other(**batch, adapter_names="long")
    (tmp_path / "one" / FILE).unlink()
    bank(**batch, adapter_names="network")


def test_what_is_no_model_or_source(monkeypatch) -> None:
    bank = fill(make_many())
    with pytest.raises(TypeError, match="on a model that is loaded, got a str"):
        PromptBank("gpt2")
    with pytest.raises(TypeError, match="a model with an adapter, or its folder, got a PromptBank"):
        bank.add(bank, "other")
    with pytest.raises(TypeError, match="Of a bank pass `bank.base_model`"), use_adapters(bank, "long"):
        pass
    for ask in (bank.length, bank.vectors):
        with pytest.raises(ValueError, match="There is no prompt 'none' in the bank, only"):
            ask("none")
    with pytest.raises(ValueError, match="'deep' is deep"):
        bank.vectors("deep")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LocalEntryNotFoundError):  # whether there is a bank can't be told
        PromptBank.from_pretrained(make_model("Llama", "CAUSAL_LM"), "somebody/bank")


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([{}, [], "DEEP"])
)


class Target:
    """A bank's file, and a model to open it on that must stay as it was."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        fill(make_many("BERT", "SEQ_CLS"), "BERT", "SEQ_CLS").save(folder)
        self.folder, self.written, self.tensors = folder, (folder / FILE).read_bytes(), load_file(folder / FILE)
        self.entry = BankFile(folder / FILE)._file.metadata()["prompt_bank"]
        self.base, self.batch = make_model("BERT", "SEQ_CLS").eval(), make_batch("BERT", "SEQ_CLS")
        self.before, self.seen = look(self.base, self.batch), Counter()

    def open(self) -> None:
        """Opens the file and uses all of its prompts, or sees why not."""
        try:
            bank = PromptBank.from_pretrained(self.base, self.folder)
        except (ValueError, TypeError) as error:
            self.seen[str(error).replace(str(self.folder), "")[:45]] += 1
        else:
            self.seen["opened"] += 1
            for name in list(bank):
                self.use(bank, name)
            bank.unload()
        check_same(look(self.base, self.batch), self.before)

    def use(self, bank: PromptBank, name: str) -> None:
        try:
            with torch.no_grad():
                logits = bank(**self.batch, adapter_names=name).logits
        except ValueError as error:
            self.seen[str(error).rpartition(":")[-1]] += 1
        else:
            assert logits.shape == self.before[-1].shape


@pytest.fixture(scope="module", name="target")
def _target(tmp_path_factory) -> Target:
    target = Target(tmp_path_factory.mktemp("fuzzed"))
    yield target
    assert len(target.seen) > 2, target.seen  # not one error for all


@FUZZ
@given(data=st.data())
def test_bytes_of_strangers(data, target) -> None:
    """Changed, cut or put in: a bank opens and gives outputs of the right shape, or says why not."""
    at = data.draw(st.integers(0, len(target.written) - 1) | st.integers(0, 700), label="at")
    change = data.draw(st.sampled_from(["flip", "cut", "put in"]), label="change")
    new = data.draw(st.binary(min_size=1, max_size=4), label="bytes")
    front, rest = target.written[:at], target.written[at:]
    changed = {"flip": front + new + rest[len(new) :], "cut": front, "put in": front + new + rest}[change]
    (target.folder / FILE).write_bytes(changed)
    target.open()


@FUZZ
@given(data=st.data())
def test_headers_of_strangers(data, target) -> None:
    entry = json.loads(target.entry)
    part = data.draw(st.sampled_from([entry, entry["settings"], entry["settings"]["deep"], entry["layers"]]))
    key = data.draw(st.sampled_from([*part, "long", "shift_positions", "prompt_stacks"]), label="key")
    part[key] = data.draw(VALUES, label="value")
    tensors = dict(target.tensors)
    if name := data.draw(st.none() | st.sampled_from([*tensors]), label="tensor"):
        own = list(tensors[name].shape)
        shape = data.draw(st.just(own) | st.lists(st.integers(0, 70), max_size=3), label="shape")
        tensors[name] = torch.full(shape, data.draw(st.sampled_from([0.5, float("nan"), 1]), label="number"))
    save_file(tensors, target.folder / FILE, {"prompt_bank": json.dumps(entry)})
    target.open()


def test_configs_of_a_bank_have_no_other_fields() -> None:
    assert stored.config_of((V, 32), {"prompt_depth": "DEEP"}).is_deep
    with pytest.raises(ValueError, match="'modules_to_save' is no setting of a prompt in a bank"):
        stored.config_of((V, 32), {"modules_to_save": ["classifier"]})
    assert set(stored.SETTINGS) < set(PTuningConfig.__dataclass_fields__)
