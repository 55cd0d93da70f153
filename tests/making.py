# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Configs, adapted models and training arguments as most tests want them."""

from __future__ import annotations

from os import PathLike

import torch
from families import PEFT_TASKS, TASKS, Family, make_model
from peft import PeftModel, get_peft_model
from reference import V
from transformers import TrainingArguments

from peft_ptuning_ext import PTuningConfig


# Arguments of every training: on the CPU, reported nowhere, with the loss of every step in the trainer's history.
ON_CPU = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1}


def make_config(task: str | None = None, length: int = V, **options) -> PTuningConfig:
    """A config of `length` virtual tokens. For a task that PEFT has no type for, the task type is None."""
    task_type = None if task in TASKS.keys() - PEFT_TASKS else task
    return PTuningConfig(task_type=task_type, num_virtual_tokens=length, **options)


def make_adapted(
    family: str | Family = "Llama",
    task: str = "CAUSAL_LM",
    sizes: dict | None = None,
    adapter_name: str = "default",
    **options,
) -> PeftModel:
    """A tiny model with a prompt, in evaluation mode. `sizes` go to the model's config, `options` to the adapter's.

    The prompt is the same at every call. Its seed is that of conftest.py, and the generator is not put back behind it:
    an adapter that a test adds or loads next would start with the very same prompt.
    """
    base, config = make_model(family, task, **(sizes or {})), make_config(task, **options)
    torch.manual_seed(0)
    return get_peft_model(base, config, adapter_name=adapter_name).eval()


def make_arguments(folder: str | PathLike, **options) -> TrainingArguments:
    """Arguments of a training on the CPU; `options` come before what all trainings have in common."""
    return TrainingArguments(folder, **{**ON_CPU, **options})
