# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Folders written by version 0.1.0 load, with the same prompt and the same head.

`expected.safetensors` beside them holds the prompt that 0.1.0 computed. The base models are random and made anew, so
nothing else of a model's output can be compared.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import make_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_ptuning_ext import PTuningConfig


SAVED = Path(__file__).with_name("saved_by_0_1_0")
CASES = {
    "none": ("Llama", "CAUSAL_LM"),
    "mlp": ("BERT", "SEQ_CLS"),
    "lstm": ("T5", "SEQ_2_SEQ_LM"),
    "residual": ("BERT", "TOKEN_CLS"),
}


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_0_1_0_loads(name, is_trainable, tmp_path) -> None:
    expected = load_file(SAVED / name / "expected.safetensors")["prompt"]
    saved = load_file(SAVED / name / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(make_model(*CASES[name]), SAVED / name, is_trainable=is_trainable).eval()
    torch.testing.assert_close(model.prompt_embeddings().detach(), expected, rtol=0, atol=1e-6)
    state = get_peft_model_state_dict(model)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(again[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_of_0_1_0_is_set(name) -> None:
    config = PTuningConfig.from_pretrained(SAVED / name)
    config._source = None  # as a caller's config: nothing is read for it
    model = get_peft_model(make_model(*CASES[name]), config).eval()
    outcome = set_peft_model_state_dict(model, load_file(SAVED / name / "adapter_model.safetensors"))
    assert not [key for key in outcome.missing_keys if "ptuning" in key]
    assert not outcome.unexpected_keys
    expected = load_file(SAVED / name / "expected.safetensors")["prompt"]
    torch.testing.assert_close(model.prompt_embeddings().detach(), expected, rtol=0, atol=1e-6)
