# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt banks for tests, and what a model gives with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CELLS, make_model
from making import make_adapted, make_config
from peft import PeftModel
from reference import V, main_output

from peft_ptuning_ext import PromptBank


BASE = "__base__"
# A head of a row computes its rows, and the base model's all of them: the last bits may differ.
CLOSE = {"rtol": 0, "atol": 1e-6}
FILE = "prompt_bank.safetensors"
cells = pytest.mark.parametrize(("family", "task"), CELLS, ids=lambda value: value.replace(" ", "-"))
# They have a table of positions and can't be told which to use.
ONE_LENGTH = {"BART"}
# Deep prompts that don't go through transformers' attention interface, and so have one length in a batch.
ONE_DEEP_LENGTH = {"DeBERTa-v2", "MPNet", "Bloom", "Falcon"}
ADAPTERS = {
    "network": {"length": V, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8},
    "long": {"length": V + 4},
    "deep": {"length": V - 1, "prompt_depth": "DEEP"},
}


def names_of(family: str) -> list[str]:
    if family in ONE_LENGTH:
        return ["default", "network"]
    return ["default", "network", "long"] + ([] if family in ONE_DEEP_LENGTH else ["deep"])


def make_many(family: str = "Llama", task: str = "CAUSAL_LM", names: list[str] | None = None) -> PeftModel:
    """A model with adapters whose prompts, and heads, all differ."""
    model = make_adapted(family, task)
    torch.manual_seed(5)
    for name in names_of(family) if names is None else names:
        if name != "default":
            model.add_adapter(name, make_config(task, **ADAPTERS[name]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:  # copies of one head otherwise
            parameter.data.normal_(std=0.3)
    return model.eval()


def fill(model: PeftModel, family: str = "Llama", task: str = "CAUSAL_LM") -> PromptBank:
    """A bank on another copy of the base model, with all adapters of `model`."""
    bank = PromptBank(make_model(family, task).eval())
    for name in model.peft_config:
        bank.add(model, name, adapter_name=name)
    return bank


def reopened(bank: PromptBank, folder: Path, family: str = "Llama", task: str = "CAUSAL_LM") -> PromptBank:
    bank.save(folder)
    return PromptBank.from_pretrained(make_model(family, task).eval(), folder)


def look(model: torch.nn.Module, batch: dict) -> tuple:
    """What of a model a failed call must leave as it was."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        return modules, [p.requires_grad for p in model.parameters()], state, main_output(model(**batch))


def check_same(one: tuple, other: tuple) -> None:
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    assert all(torch.equal(value, other[2][key]) for key, value in one[2].items())
    assert torch.equal(one[3], other[3])
