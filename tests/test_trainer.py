# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The stock Trainer trains, saves, picks the best and resumes."""

from __future__ import annotations

import pytest
import torch
from families import make_model
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_ptuning_ext import PTuningConfig


def make_data(size: int, seed: int) -> list[dict]:
    """Texts half of whose tokens are 7 (label 1) or 8 (label 0)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in torch.randint(2, (size,), generator=generator).tolist():
        ids = torch.randint(10, 99, (8,), generator=generator)
        ids[::2] = 8 - label
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": label})
    return rows


def make_trainer(folder, family: str = "BERT", **kwargs) -> Trainer:
    torch.manual_seed(0)
    config = PTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS", encoder_reparameterization_type="MLP")
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **kwargs,
    )
    return Trainer(
        model=get_peft_model(make_model(family, "SEQ_CLS"), config),
        args=arguments,
        train_dataset=make_data(256, 1),
        eval_dataset=make_data(64, 2),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_trainer_learns_and_picks_the_best(family, tmp_path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 8, "save_steps": 8, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, family, max_steps=48, metric_for_best_model="accuracy", **arguments)
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


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path) -> None:
    straight = make_trainer(tmp_path / "straight", max_steps=8)
    straight.train()
    make_trainer(tmp_path / "halves", max_steps=8, save_steps=4).train()
    resumed = make_trainer(tmp_path / "halves", max_steps=8, save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-4"))
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (straight, resumed)]
    assert losses[0] == losses[1]
    parameters = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
