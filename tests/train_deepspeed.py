# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains tiny models with Trainer, saves, resumes, evaluates and generates, alone or in processes under DeepSpeed.

test_deepspeed.py launches this file with `accelerate launch`, and calls the same function in one process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

import torch
from learnable import add_prompt, make_base
from making import make_arguments
from train_distributed import BATCH, DEADLINE, PROMPTED, TASK_OF, collate, make_rows, prompt_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from peft_ptuning_ext import PromptMonitor
from peft_ptuning_ext.forward import one_pass


one_pass.OVERHEAD = 0  # as on a wide model, where the prompt is not put in each row


STEPS = 4
WATCHED = ["prompt_shift", "prompt_effect"]  # DeepSpeed keeps gradients to itself
AUTO_CLASS = {"Llama": AutoModelForCausalLM, "BERT": AutoModelForSequenceClassification}


def save_bases(folder: Path) -> None:
    for family in AUTO_CLASS:
        make_base(family).save_pretrained(folder / family)


def make_trainer(name: str, bases: Path, folder: Path) -> Trainer:
    """A Trainer of a model that was loaded as DeepSpeed wants it, behind the arguments."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = make_arguments(
        folder,
        per_device_train_batch_size=BATCH // processes,
        per_device_eval_batch_size=4,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=STEPS // 2,
        learning_rate=0.01,
        label_names=["labels"],
        average_tokens_across_devices=PROMPTED[name][0] == "Llama",  # as in train_distributed.py
    )
    family, options = PROMPTED[name]
    adapted = add_prompt(AUTO_CLASS[family].from_pretrained(bases / family), TASK_OF[family], length=5, **options)
    rows = make_rows(name, 2 * BATCH, seed=0)
    trainer = Trainer(model=adapted, args=arguments, train_dataset=rows, data_collator=collate)
    if trainer.is_deepspeed_enabled:
        zero = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0  # by default, parameters as small as these are not spread
    return trainer


@torch.no_grad()
def look_at(trainer: Trainer, name: str) -> dict[str, torch.Tensor]:
    """What a trained model has learned, and answers."""
    model, rows = trainer.model, make_rows(name, 5, seed=99)
    seen = {
        "prompt": prompt_of(model).flatten(),
        "logits": torch.from_numpy(trainer.predict(rows).predictions),
    }
    if PROMPTED[name][0] == "Llama":
        ids = collate(rows)["input_ids"]
        seen["ids"] = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    return seen


def train(name: str, bases: Path, folder: Path) -> dict:
    """Trains, saves the adapter, and trains the second half again from the checkpoint between."""
    trainer = make_trainer(name, bases, folder)
    PromptMonitor.watch(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result = {key: torch.tensor([log[key] for log in logs]) for key in ("loss", *WATCHED)}
    result |= {"is_spread": any(p.numel() == 0 for p in trainer.model.parameters()), **look_at(trainer, name)}
    trainer.save_model(str(folder / "saved"))

    resumed = make_trainer(name, bases, folder)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
    return result | {f"resumed {key}": value for key, value in look_at(resumed, name).items()}


def main(bases: Path, folder: Path) -> None:
    """Writes what comes of each prompt into `folder`, in a file of this process's own."""
    faulthandler.dump_traceback_later(2 * DEADLINE, exit=True)
    for name in PROMPTED:
        result = train(name, bases, folder / name)
        torch.save(result, folder / f"{name} {os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
