# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Experiments for PEFT's own comparison, in a folder like that of a checkout of PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import metamath
import pytest
import torch
from families import make_model
from peft import PeftConfig
from tiny_tokenizers import SIZE, make_tokenizer


# Stands for PEFT's program: it loads the config as that does, and notes where the prompt starts.
PROGRAM = """
import sys, torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM
assert sys.argv[1:] == ["-v", "experiments/ptuning_ext/{name}"], sys.argv
config = PeftConfig.from_pretrained(sys.argv[2])
torch.manual_seed(0)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("{model}"), config)
states = model.base_model._layer().encode("default")
torch.save(states, "states.pt")
"""


@pytest.fixture(name="checkout")
def _checkout(tmp_path) -> Path:
    folder = tmp_path / "peft" / metamath.FOLDER
    folder.mkdir(parents=True)
    (folder / "default_training_params.json").write_text(json.dumps({"model_id": "none"}))
    model = make_model("Llama", "CAUSAL_LM", vocab_size=SIZE, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer("Llama 3").save_pretrained(tmp_path / "model")
    return folder


@pytest.mark.parametrize("name", list(metamath.EXPERIMENTS))
def test_pefts_program_runs_prompts_that_start_at_the_text(name, checkout, tmp_path) -> None:
    (checkout / "run.py").write_text(PROGRAM.format(name=name, model=tmp_path / "model"))
    words = [name, "--peft", str(tmp_path / "peft"), "--model_id", str(tmp_path / "model"), "--max_steps", "10"]
    with pytest.raises(SystemExit, match="0"):
        metamath.main(words)
    settings = json.loads((checkout / "experiments/ptuning_ext" / name / "training_params.json").read_text())
    assert settings["max_steps"] == 10
    assert settings["optimizer_kwargs"]["weight_decay"] == 0
    states = torch.load(checkout / "states.pt")
    ids = make_tokenizer("Llama 3")(metamath.TEXT, add_special_tokens=False).input_ids[:50]
    model = make_model("Llama", "CAUSAL_LM", vocab_size=SIZE, max_position_embeddings=256)
    if name == "input":
        torch.testing.assert_close(states, model.get_input_embeddings().weight[ids])
        return
    with torch.no_grad():
        positions = torch.arange(-50, 0)[None]
        cache = model(torch.tensor([ids]), position_ids=positions, use_cache=True).past_key_values
    for layer, (key, value) in states.items():
        torch.testing.assert_close(key, cache.layers[layer].keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(value, cache.layers[layer].values, rtol=0, atol=1e-5)


def test_a_folder_that_is_no_checkout(tmp_path) -> None:
    with pytest.raises(ValueError, match="`--peft` should be the folder of a checkout of PEFT"):
        metamath.main(["input", "--peft", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_an_experiment_is_a_valid_config(checkout, tmp_path) -> None:
    metamath.write_experiment(checkout, "deep", {"model_id": str(tmp_path / "model")})
    config = PeftConfig.from_pretrained(str(checkout / "experiments/ptuning_ext/deep"))
    assert config.is_deep
    assert config.num_virtual_tokens == 50
