# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny model on a fixed sequence of batches, alone or as one of several processes.

test_distributed.py launches this file with `accelerate launch`, and calls the same functions in one process.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from learnable import TASK_OF, add_prompt, make_base
from making import make_arguments
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import Trainer

from peft_ptuning_ext import PromptMonitor, make_model_card
from peft_ptuning_ext.forward import one_pass


one_pass.OVERHEAD = 0  # as on a wide model, where the prompt is not put in each row


STEPS = 4
BATCH = 8  # of all processes together
WATCHED = ["prompt_grad_norm", "prompt_shift", "prompt_effect"]
DEADLINE = 150  # seconds

# What is trained: a family, and the options of its prompt.
PROMPTED = {
    "Llama": ("Llama", {}),
    "BERT": ("BERT", {"encoder_reparameterization_type": "LSTM"}),
    "deep Llama": ("Llama", {"prompt_depth": "DEEP"}),
    "deep BERT": ("BERT", {"prompt_depth": "DEEP", "encoder_reparameterization_type": "MLP"}),
}


def make_prompted(name: str) -> PeftModel:
    family, options = PROMPTED[name]
    return add_prompt(make_base(family), TASK_OF[family], length=5, **options)


def prompt_of(model: PeftModel) -> torch.Tensor:
    """All numbers of a prompt, put together from the processes' parts."""
    if model.peft_config["default"].is_deep:
        return torch.cat([gather(state).flatten() for pair in model.prompt_key_values().values() for state in pair])
    return gather(model.prompt_embeddings())


def make_rows(name: str, size: int, seed: int) -> list[dict]:
    """Texts of 6 tokens; a causal LM learns them, a classifier whether the first id is odd."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(5, 99, (size, 6), generator=generator)
    labels = texts if PROMPTED[name][0] == "Llama" else texts[:, 0] % 2
    return [{"input_ids": ids, "labels": label} for ids, label in zip(texts, labels)]


def collate(rows: list[dict]) -> dict:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, put together from the processes' parts."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def train_by_hand(name: str, folder: Path) -> dict:
    """Trains with Accelerator alone, each process on its part of every batch, and saves the adapter."""
    accelerator = Accelerator(cpu=True)
    adapted = make_prompted(name)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.1)
    model, optimizer = accelerator.prepare(adapted.train(), optimizer)
    route, gradients = adapted.prompt_route, []
    for step in range(STEPS):
        batch = collate(make_rows(name, BATCH, seed=step))
        part = {k: v.chunk(accelerator.num_processes)[accelerator.process_index] for k, v in batch.items()}
        accelerator.backward(model(**part).loss)
        gradients.append({n: gather(p.grad) for n, p in adapted.named_parameters() if p.requires_grad})
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=collate(make_rows(name, 3, seed=99))["input_ids"]).logits
    prompt = prompt_of(adapted)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        adapted.save_pretrained(folder, state_dict=state)
    return {
        "prompt": prompt,
        "logits": logits,
        "gradients": gradients,
        "route": route,
        "card": make_model_card(adapted, "adapter").text,
        "is_sharded": is_sharded(adapted),
    }


def train_with_trainer(name: str, folder: Path) -> dict:
    """Trains with Trainer, which shuffles the rows and deals every batch out, and saves the adapter."""
    adapted = make_prompted(name)
    arguments = make_arguments(
        folder,
        per_device_train_batch_size=BATCH // PartialState().num_processes,
        per_device_eval_batch_size=4,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=0.1,
        save_strategy="no",
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        # Trainer multiplies a loss by the number of processes where it takes it for one that it has told the number of
        # all processes' tokens, which a classifier's is not.
        average_tokens_across_devices=PROMPTED[name][0] == "Llama",
        accelerator_config={"use_configured_state": PartialState().num_processes > 1},
    )
    rows = make_rows(name, 2 * BATCH, seed=0)
    trainer = Trainer(model=adapted, args=arguments, train_dataset=rows, data_collator=collate)
    PromptMonitor.watch(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    losses, watched = ([[log[key] for log in logs] for key in keys] for keys in (["loss"], WATCHED))
    logits = torch.from_numpy(trainer.predict(make_rows(name, 5, seed=99)).predictions)
    prompt = prompt_of(adapted)
    trainer.save_model()
    logged = {"losses": torch.tensor(losses), "watched": torch.tensor(watched)}
    return {"prompt": prompt, "logits": logits, "is_sharded": is_sharded(adapted), **logged}


TRAINED = {"by hand": train_by_hand, "Trainer": train_with_trainer}


def main(prompted: str, folder: Path) -> None:
    """Writes what comes of each kind of training into `folder`, in files and folders of this process's own."""
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=DEADLINE))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate does not shard on CPUs, where torch can
    for name, train in TRAINED.items():
        result = train(prompted, folder / f"{name} {state.process_index}")
        torch.save(result, folder / f"{name} {state.process_index}.pt")
    # DDP's reducer frees a process group while it holds the interpreter's lock, for which the group's threads may be
    # waiting: nothing of DDP may outlive the reference that is dropped here.
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
