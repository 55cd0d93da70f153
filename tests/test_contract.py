# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The contract, architecture × task: hidden = concatenated, padded = unpadded, disabled = base, and so on."""

from __future__ import annotations

import copy

import pytest
import torch
from families import CELLS, FAMILIES, PEFT_TASKS, make_model
from peft import PeftModel, get_peft_model
from reference import S, V, concatenated, main_output, make_batch, make_labels, unmasked

from peft_ptuning_ext import PTuningConfig


cells = pytest.mark.parametrize(("family", "task"), CELLS, ids=lambda value: value.replace(" ", "-"))


def make_config(task: str, **kwargs) -> PTuningConfig:
    return PTuningConfig(num_virtual_tokens=V, task_type=task if task in PEFT_TASKS else None, **kwargs)


def make_adapted(family: str, task: str, **kwargs) -> PeftModel:
    return get_peft_model(make_model(family, task), make_config(task, **kwargs)).eval()


@cells
@torch.no_grad()
def test_hidden_equals_concatenated(family: str, task: str) -> None:
    model = make_adapted(family, task)
    batch = make_batch(family, task)
    expected = concatenated(make_model(family, task), task, model.prompt_embeddings().detach(), batch)
    output = main_output(model(**batch))
    assert output.shape == expected.shape
    torch.testing.assert_close(
        unmasked(output, batch["attention_mask"]), unmasked(expected, batch["attention_mask"]), rtol=0, atol=0
    )


@cells
def test_prompt_gradient_equals_that_of_concatenation(family: str, task: str) -> None:
    model = make_adapted(family, task)
    batch = make_batch(family, task)
    prompt = model.prompt_embeddings().detach().clone().requires_grad_()
    expected = unmasked(concatenated(make_model(family, task), task, prompt, batch), batch["attention_mask"])
    weights = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), prompt)
    output = unmasked(main_output(model(**batch)), batch["attention_mask"])
    (output * weights).sum().backward()
    (gradient,) = (p.grad for n, p in model.named_parameters() if "ptuning_" in n)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5 * expected_gradient.abs().max().item())
