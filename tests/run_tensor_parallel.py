# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains and runs a tiny model whose weights are spread over processes by tensor parallelism.

test_parallel.py launches this file with `torchrun`, and calls the same functions in one process.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import sys
from pathlib import Path

import torch
from families import TASKS
from making import make_config
from peft import PeftModel, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig


DEADLINE = 150  # seconds
TASK = "CAUSAL_LM"
CASES = {
    "plain": {},
    "network": {"encoder_reparameterization_type": "MLP"},
    "of the vocabulary": {"prompt_tuning_init": "SAMPLE_VOCAB"},
}
REFUSED = {"deep": {"prompt_depth": "DEEP"}, "rows": {"trainable_token_indices": [5, 6]}}
TEXTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
GREEDY = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)


def results_of(model: PeftModel) -> dict:
    """What a model answers before and after it is trained, and how the two routes of a prompt train it."""
    model.train()
    losses, gradients = [], []
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    logits = [model(input_ids=TEXTS).logits.detach()]
    for rows in (TEXTS, TEXTS[:1], TEXTS):  # shared, concatenated, shared
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logits += [model(input_ids=TEXTS).logits, model(input_ids=TEXTS[:1]).logits]
    generated = model.generate(input_ids=TEXTS, attention_mask=torch.ones_like(TEXTS), generation_config=GREEDY)
    return {
        "losses": losses,
        "gradients": gradients,
        "logits": logits,
        "generated": generated,
        "batched": generate_batch(model),
    }


def generate_batch(model: PeftModel) -> list[list[int]]:
    """What continuous batching answers."""
    config = ContinuousBatchingConfig(page_size=4, num_blocks=16, max_batch_tokens=8)
    outputs = model.generate_batch(TEXTS.tolist(), generation_config=GREEDY, continuous_batching_config=config)
    return [output.generated_tokens for output in outputs.values()]


def main(folder: Path) -> None:
    """Writes what comes of each case into `folder`, in files of this process's own."""
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=DEADLINE))
    rank = torch.distributed.get_rank()
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def load() -> torch.nn.Module:
        return TASKS[TASK].from_pretrained(folder / "base", tp_plan="auto", device_mesh=mesh).eval()

    for name, options in CASES.items():
        torch.manual_seed(rank)  # each process would draw another prompt
        model = get_peft_model(load(), make_config(TASK, **options))
        model.save_pretrained(folder / name, is_main_process=rank == 0)  # PEFT puts weights together: all call it
        torch.save(results_of(model), folder / f"{name} {rank}.pt")
    errors = {}
    for name, options in REFUSED.items():
        base = load()
        try:
            get_peft_model(base, make_config(TASK, **options))
        except ValueError as error:
            errors[name] = str(error), hasattr(base, "peft_config")
    torch.save(errors, folder / f"errors {rank}.pt")
    # Process groups that are freed while the interpreter ends may wait for each other: none may outlive this.
    del model, base
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
