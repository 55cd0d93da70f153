# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The stock Trainer trains, saves, picks the best, and resumes in another process what was ended or killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_resumable
from families import make_model
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from shared.resuming import last_whole_checkpoint
from train_resumable import INTERRUPTED, RUNS, SAVE_STEPS, STEPS, make_classifier, make_data
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint


RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_trainer_learns_and_picks_the_best(family, tmp_path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 8, "save_steps": 8, "load_best_model_at_end": True}
    trainer = make_classifier(tmp_path, family, max_steps=48, metric_for_best_model="accuracy", **arguments)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_accuracy"] == max(log.get("eval_accuracy", 0) for log in trainer.state.log_history)
    for name, parameter in trainer.model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name]), name

    trainer.save_model(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert "model.safetensors" not in files
    loaded = PeftModel.from_pretrained(make_model(family, "SEQ_CLS"), tmp_path / "adapter")
    again = Trainer(
        model=loaded, args=trainer.args, compute_metrics=trainer.compute_metrics, eval_dataset=make_data(64, 2)
    )
    assert again.evaluate()["eval_accuracy"] == after["eval_accuracy"]


@pytest.mark.parametrize("encoder", ["NONE", "LSTM"])
@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_the_best_prompt_and_head_come_back(family, encoder, tmp_path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = make_classifier(tmp_path, family, encoder, max_steps=6, metric_for_best_model="score", **arguments)
    scores = iter([0.2, 0.9, 0.5])  # at steps 2, 4 and 6
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    assert trainer.state.best_global_step == 4
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 6)}
    found = get_peft_model_state_dict(trainer.model)
    assert found.keys() == saved[4].keys()
    assert any("ptuning_encoders" in name for name in found)
    assert any("score" in name or "classifier" in name for name in found)
    for name, value in found.items():
        assert torch.equal(value, saved[4][name]), name
        assert name.endswith("offset") or not torch.equal(value, saved[6][name]), name


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """All runs, interrupted in one process and resumed in another."""
    folder = tmp_path_factory.mktemp("interrupted")
    path = [str(RECIPES), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    for step in ("interrupt", "resume"):
        command = [sys.executable, train_resumable.__file__, step, str(folder)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_resumed_run_equals_an_uninterrupted_one(run, interrupted, tmp_path) -> None:
    straight = run.trainer(tmp_path)
    straight.train()
    expected = train_resumable.result(straight)
    found = torch.load(interrupted / f"{run.name}.pt")
    last = INTERRUPTED if run.killed_in is None else INTERRUPTED - SAVE_STEPS
    assert found["checkpoint"] == f"checkpoint-{last}"
    assert len(expected["losses"]) == STEPS
    assert found["losses"] == expected["losses"]
    assert found["trained"].keys() == expected["trained"].keys()
    for name, value in found["trained"].items():
        assert torch.equal(value, expected["trained"][name]), name


def test_the_last_whole_checkpoint(tmp_path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    make_classifier(tmp_path, max_steps=3, save_steps=1).train()
    first, second, third = (tmp_path / f"checkpoint-{step}" for step in (1, 2, 3))
    assert last_whole_checkpoint(tmp_path) == get_last_checkpoint(tmp_path) == str(third)
    (third / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) == str(second)
    assert get_last_checkpoint(tmp_path) == str(third)
    (second / "rng_state.pth").unlink()
    assert last_whole_checkpoint(tmp_path) == str(first)

    # Each of several processes writes a file of its own, and the main process does not wait for the others.
    (first / "rng_state.pth").rename(first / "rng_state_0.pth")
    assert last_whole_checkpoint(tmp_path, processes=2) is None
    shutil.copy(first / "rng_state_0.pth", first / "rng_state_1.pth")
    assert last_whole_checkpoint(tmp_path, processes=2) == str(first)
    os.truncate(first / "rng_state_1.pth", 1000)
    assert last_whole_checkpoint(tmp_path, processes=2) is None
