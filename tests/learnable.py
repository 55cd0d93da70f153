# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Tasks that a prompt can learn on the tiny models, and a stock Trainer for them."""

from __future__ import annotations

import torch
from families import make_model
from making import ON_CPU, make_arguments, make_config
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback


S = 8
V = 4
TASK_OF = {"BERT": "SEQ_CLS", "Llama": "CAUSAL_LM"}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = ON_CPU | {"learning_rate": 1e-2, "save_strategy": "no"}
SETTINGS["logging_nan_inf_filter"] = False  # it would log a loss that is not a number as 0


def make_rows(task: str, size: int) -> list[dict]:
    """Texts with 7 (label 1) or 8 (label 0) at every other place; a fifth of the labels is wrong.

    Of a causal LM each row has another number of labels.
    """
    generator = torch.Generator().manual_seed(1)
    rows = []
    for label in torch.randint(2, (size,), generator=generator).tolist():
        ids = torch.randint(10, 99, (S,), generator=generator)
        ids[::2] = 8 - label
        draw = int(torch.randint(5, (1,), generator=generator))
        labels = ids.clone().index_fill(0, torch.arange(draw), -100) if task == "CAUSAL_LM" else label ^ (draw == 0)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def make_base(family: str, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A tiny model without dropout."""
    overrides |= WITHOUT_DROPOUT if family == "BERT" else {}
    return make_model(family, TASK_OF[family], **overrides).to(dtype)


def add_prompt(base: PreTrainedModel, task: str, length: int = V, **options) -> PeftModel:
    """The model with a new prompt, the same at every call."""
    torch.manual_seed(0)
    return get_peft_model(base, make_config(task, length, **options))


def make_learner(model: PeftModel, folder, callbacks: tuple[TrainerCallback, ...] = (), **arguments) -> Trainer:
    """A Trainer on the CPU that logs the loss of every step and sees no text twice."""
    defaults = {"per_device_train_batch_size": 16, "max_steps": 4}
    arguments = make_arguments(folder, **{**SETTINGS, **defaults, **arguments})
    size = arguments.max_steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=make_rows(model.peft_config["default"].task_type, size),
        callbacks=[*callbacks],
    )


def losses(trainer: Trainer) -> list[float]:
    """The loss of every step."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
