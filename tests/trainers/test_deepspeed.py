# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes train under DeepSpeed what one does without it; gloo on the loopback interface.

DeepSpeed is no requirement of the tests: `pip install deepspeed`, and the tests here run. They need a C++ compiler,
with which DeepSpeed builds its communication between processes on CPUs once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_classification
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_distributed import launch
from tiny_recipes import as_words, read_rows, save_backbone, write_rows
from train_deepspeed import AUTO_CLASS, save_bases, train
from train_distributed import PROMPTED, collate, make_prompted, make_rows, prompt_of


pytest.importorskip("deepspeed", exc_type=ImportError)

HERE = Path(__file__).resolve().parents[1]
CONFIGS = ["deepspeed_zero2.yaml", "deepspeed_zero3.yaml"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    save_bases(folder)
    return folder


@pytest.fixture(scope="module")
def alone(bases, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """What comes of each prompt in one process: the folder, and what was seen."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: (folder / name, train(name, bases, folder / name)) for name in PROMPTED}


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_train_save_and_resume_as_one(config, bases, alone, tmp_path) -> None:
    launch(config, str(HERE / "train_deepspeed.py"), str(bases), str(tmp_path))
    for name, (folder, expected) in alone.items():
        assert (expected["prompt"] - prompt_of(make_prompted(name)).flatten()).abs().max() > 1e-3
        # AdamW divides small gradients by their own size, and with them what rounding makes of another order.
        # An encoder's parameters differ more than the prompt that they make.
        files = [load_file(path / "saved" / "adapter_model.safetensors") for path in (folder, tmp_path / name)]
        heads = [{key: value for key, value in file.items() if "ptuning_encoders" not in key} for file in files]
        torch.testing.assert_close(heads[1], heads[0], rtol=1e-5, atol=1e-5)
        # A model can make much of the last bit of a prompt, so logits are compared where the prompt is the same.
        family, _ = PROMPTED[name]
        base = AUTO_CLASS[family].from_pretrained(bases / family)
        loaded = PeftModel.from_pretrained(base, tmp_path / name / "saved")
        with torch.no_grad():
            logits = loaded(input_ids=collate(make_rows(name, 5, seed=99))["input_ids"]).logits
        for process in range(2):
            result = torch.load(tmp_path / f"{name} {process}.pt")
            assert result.keys() == expected.keys()
            assert result.pop("is_spread") == (config == "deepspeed_zero3.yaml")
            for key in ("prompt", "logits"):
                assert torch.equal(result[f"resumed {key}"], result[key])
            torch.testing.assert_close(result["logits"], logits, rtol=0, atol=1e-5)
            for key in result.keys() - {"logits", "resumed logits"}:
                torch.testing.assert_close(result[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_recipe_under_deepspeed_is_the_recipe_in_one_process(config, tmp_path) -> None:
    rows = [{"text": f"a {word} day, number {i}", "label": word} for i in range(24) for word in ("bright", "dark")]
    arguments = {
        "model_name_or_path": save_backbone(tmp_path / "model", [row["text"] for row in rows]),
        "train_file": write_rows(tmp_path / "train.jsonl", rows[:32]),
        "validation_file": write_rows(tmp_path / "validation.jsonl", rows[33:]),
        "max_length": 40,
        "num_virtual_tokens": 4,
        "encoder": "MLP",
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
    }
    text_classification.main(as_words({**arguments, "per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}))
    two = {**arguments, "per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    launch(config, str(HERE.parent / "recipes" / "text_classification.py"), *as_words(two))
    runs = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for key in ("loss", "prompt_shift", "prompt_effect"):
        values = [[entry[key] for entry in run["history"]] for run in runs]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key
    predictions = [read_rows(tmp_path / name / "predictions.jsonl") for name in ("one", "two")]
    for row, other in zip(*predictions, strict=True):
        assert row["text"] == other["text"]
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-4)
