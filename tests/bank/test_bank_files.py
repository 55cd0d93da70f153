# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts into a bank and its file, and back: what is refused or breaks off changes nothing."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from banks import (
    BASE,
    CLOSE,
    FILE,
    check_same,
    fill,
    look,
    make_many,
    reopened,
)
from families import make_model
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import make_adapted
from peft import LoraConfig, get_peft_model
from reference import V, make_batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_ptuning_ext.bank
import peft_ptuning_ext.files.bank
from peft_ptuning_ext import PromptBank, PTuningConfig, use_adapters
from peft_ptuning_ext.files.bank import BankFile
from peft_ptuning_ext.prompts import stored
from peft_ptuning_ext.prompts.adapter import find_stack


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
        self.folder, self.written = folder, (folder / FILE).read_bytes()
        # Copies: what is loaded lies in the file, which the tests write to.
        self.tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
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
