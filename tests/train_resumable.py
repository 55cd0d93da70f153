# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Interrupts runs of Trainer at their second checkpoint, each in a process of its own, and resumes them in another.

test_trainer.py starts this file as `python train_resumable.py interrupt FOLDER`, then with `resume`, and with the
recipes on the path.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from making import make_adapted, make_arguments
from peft import PeftModel
from shared.resuming import last_whole_checkpoint
from transformers import Trainer, TrainerCallback, TrainerState

from peft_ptuning_ext.forward import one_pass


STEPS = 8
SAVE_STEPS = 2
INTERRUPTED = 4


def make_data(size: int, seed: int) -> list[dict]:
    """Texts half of whose tokens are 7 (label 1) or 8 (label 0)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in torch.randint(2, (size,), generator=generator).tolist():
        ids = torch.randint(10, 99, (8,), generator=generator)
        ids[::2] = 8 - label
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": label})
    return rows


def make_classifier(
    folder: Path,
    family: str = "BERT",
    encoder: str = "MLP",
    dropout: float = 0.0,
    depth: str = "INPUT",
    **arguments,
) -> Trainer:
    """A Trainer of a classifier, with texts to learn and others to evaluate."""
    options = {"encoder_reparameterization_type": encoder, "encoder_dropout": dropout, "prompt_depth": depth}
    return Trainer(
        model=make_adapted(family, "SEQ_CLS", length=4, **options),
        args=make_arguments(folder, per_device_train_batch_size=16, learning_rate=1e-2, **arguments),
        train_dataset=make_data(80, 1),
        eval_dataset=make_data(64, 2),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


# What writes the files of a checkpoint, in this order.
WRITERS: dict[str, tuple[Any, str]] = {
    "adapter_model.safetensors": (PeftModel, "save_pretrained"),
    "optimizer.pt": (torch, "save"),
    "rng_state.pth": (torch, "save"),
    "trainer_state.json": (TrainerState, "save_to_json"),
}


@dataclass(frozen=True)
class Run:
    """A run and how it is interrupted: in the middle of a file of the checkpoint, or when that is written."""

    family: str
    encoder: str
    dropout: float = 0.0
    killed_in: str | None = None
    depth: str = "INPUT"

    @property
    def name(self) -> str:
        return f"{self.depth}-{self.family}-{self.encoder}-{self.killed_in or 'ended'}"

    def trainer(self, folder: Path) -> Trainer:
        arguments = {"max_steps": STEPS, "save_steps": SAVE_STEPS}
        return make_classifier(folder / self.name, self.family, self.encoder, self.dropout, self.depth, **arguments)


RUNS = [
    Run("BERT", "NONE"),
    Run("BERT", "MLP", 0.3),
    Run("BERT", "LSTM", 0.3),
    Run("Llama", "LSTM", 0.3),
    Run("BERT", "NONE", 0.3, depth="DEEP"),
    Run("Llama", "MLP", 0.3, depth="DEEP"),
    *[Run("BERT", "MLP", 0.3, file) for file in WRITERS],
]


def result(trainer: Trainer) -> dict:
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    trained = {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return {"losses": losses, "trained": trained}


class End(TrainerCallback):
    """Ends the process when the checkpoint is written."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == INTERRUPTED:
            os._exit(0)


def kill_in_the_middle_of(path: Path) -> None:
    """Lets this process be killed when half of `path` is written."""
    owner, name = WRITERS[path.name]
    write = getattr(owner, name)

    def write_half(*args, **kwargs):
        write(*args, **kwargs)
        if path.exists():
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, write_half)


def interrupt(run: Run, folder: Path) -> None:
    """Starts a run in a process that does not come to its end."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == (0 if run.killed_in is None else -signal.SIGKILL), run
        return
    trainer = run.trainer(folder)
    if run.killed_in is None:
        trainer.add_callback(End())
    else:
        kill_in_the_middle_of(folder / run.name / f"checkpoint-{INTERRUPTED}" / run.killed_in)
    trainer.train()
    os._exit(1)


def resume(run: Run, folder: Path) -> None:
    """Finishes a run and writes what came of it."""
    trainer = run.trainer(folder)
    checkpoint = last_whole_checkpoint(folder / run.name)
    trainer.train(resume_from_checkpoint=True if run.killed_in is None else checkpoint)
    torch.save({**result(trainer), "checkpoint": Path(checkpoint).name}, folder / f"{run.name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_pass.OVERHEAD = 0  # as conftest.py has it
    for each in RUNS:
        {"interrupt": interrupt, "resume": resume}[sys.argv[1]](each, Path(sys.argv[2]))
