# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README is run, and its table is the tests'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from families import make_model, support_table
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from peft_ptuning_ext import PromptMonitor, PTuningConfig


README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def make_folder(path: Path, family: str, task: str) -> None:
    """A tiny model with a tokenizer, under the name that the README gives to a model of the Hub."""
    make_model(family, task).save_pretrained(path)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "Once", "good", "bad"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(path)


# Trainer pins memory by default, and torch says that there is no accelerator to do it for.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
def test_the_readmes_code_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_folder(tmp_path / "google-bert/bert-base-uncased", "BERT", "SEQ_CLS")
    make_folder(tmp_path / "openai-community/gpt2", "GPT-2", "CAUSAL_LM")
    rows = [{"text": "good good", "label": 1}, {"text": "bad bad", "label": 0}] * 16
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, load, use, watch, _share, stock, standalone, embed, ask = BLOCKS
    names: dict = {}
    exec(train, names)
    trained = names["model"].eval()
    exec(load, names)
    inputs = names["tokenizer"](["good", "bad bad"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](**inputs).logits, trained(**inputs).logits, rtol=0, atol=1e-6)
    exec(use, names)
    assert [n for n, p in names["model"].named_parameters() if p.requires_grad] == [
        "base_model.model.transformer.wte.ptuning_encoders.default.embedding"
    ]
    exec(watch, names)
    assert any(isinstance(callback, PromptMonitor) for callback in names["trainer"].callback_handler.callbacks)
    make_folder(tmp_path / "base", "GPT-2", "CAUSAL_LM")
    model = get_peft_model(GPT2LMHeadModel.from_pretrained("base"), PTuningConfig(task_type="CAUSAL_LM"))
    names |= {"model": model.eval(), "base": GPT2LMHeadModel.from_pretrained("base")}
    names["tokenizer"] = AutoTokenizer.from_pretrained("base")
    inputs = names["tokenizer"]("Once", return_tensors="pt")
    expected = model(**inputs).logits
    exec(stock, names)
    torch.testing.assert_close(names["model"](**inputs).logits, expected, rtol=0, atol=0)
    exec(standalone, names)
    inputs = AutoTokenizer.from_pretrained("standalone")("Once", return_tensors="pt")
    served = GPT2LMHeadModel.from_pretrained("standalone")(**inputs).logits
    torch.testing.assert_close(served[:, 20:, :99], expected, rtol=1e-5, atol=1e-5)
    exec(embed, names)
    assert names["embeds"].shape == (20 + 1, 32)
    exec(ask, names)
    assert names["model"].prompt_route == "shared"


def test_the_readme_keeps_its_promises_of_brevity() -> None:
    train, load, *_ = BLOCKS
    assert len([line for line in train.splitlines() if line.strip()]) <= 15
    assert len([line for line in load.splitlines() if line.strip()]) == 3
    assert README[: README.index(load)].count("\n") <= 50


def test_the_readmes_table_is_made_from_the_tests() -> None:
    assert support_table() in README


def test_the_readmes_commands_are_targets_of_make() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert commands == ["quickstart", "test"]
    assert all(f"\n{command}:" in makefile for command in commands)


def test_the_readmes_measurements_are_those_in_the_results() -> None:
    root = Path(__file__).parent.parent
    tables = (root / "recipes/results/benchmark/benchmark.md").read_text().split("\n## ")
    training = next(table for table in tables if table.startswith("Training step: time"))
    assert training[training.index("| B |") :].strip() in README
    for title, column in (("Prefill", -2), ("Time to first token", -2), ("Tokens per second", -2)):
        rows = next(table for table in tables if table.startswith(title)).strip().splitlines()[-4:]
        medians = [row.split("|")[column].split()[0] for row in rows]
        assert f"| {' | '.join(medians)} |" in README
    compared = sorted(root.glob("recipes/results/compare*/compare.md"))
    assert len(compared) == 2
    compared.append(root / "recipes/results/compare/ablation.md")
    assert all(path.read_text().strip() in README for path in compared)
    for image in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (root / image).is_file()
