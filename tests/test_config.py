# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
from peft import (
    PeftConfig,
    PeftType,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningInit,
    TaskType,
)

from peft_ptuning_ext import PromptEncoderType, PTuningConfig


@pytest.mark.parametrize(
    ("arguments", "encoder", "hidden_size", "num_layers"),
    [
        ({}, "NONE", None, None),
        ({"encoder_hidden_size": 32}, "MLP", 32, 2),  # PEFT's default, as its users write it
        ({"encoder_dropout": 0.1}, "MLP", 128, 2),
        ({"encoder_reparameterization_type": "LSTM"}, "LSTM", 64, 2),
        ({"encoder_reparameterization_type": "RESIDUAL", "encoder_num_layers": 3}, "RESIDUAL", 128, 3),
        ({"encoder_reparameterization_type": PromptEncoderReparameterizationType.MLP}, "MLP", 128, 2),
    ],
)
def test_encoder_fields_are_resolved(arguments, encoder, hidden_size, num_layers) -> None:
    config = PTuningConfig(**arguments)
    assert config.encoder_reparameterization_type is PromptEncoderType(encoder)
    assert (config.encoder_hidden_size, config.encoder_num_layers) == (hidden_size, num_layers)


def test_changing_the_class_name_is_the_whole_migration() -> None:
    arguments = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20, "encoder_hidden_size": 128}
    stock, ours = PromptEncoderConfig(**arguments), PTuningConfig(**arguments)
    for name in (*arguments, "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"):
        assert getattr(stock, name) == getattr(ours, name), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_virtual_tokens": 0}, ValueError, "`num_virtual_tokens` must be from 1 to 16777216, got 0"),
        ({"num_virtual_tokens": -3}, ValueError, "from 1 to 16777216, got -3"),
        ({"num_virtual_tokens": 2.0}, TypeError, "must be an int, got 2.0 of type float"),
        ({"num_virtual_tokens": True}, TypeError, "must be an int, got True"),
        ({"num_virtual_tokens": "20"}, TypeError, "must be an int, got '20'"),
        (
            {"encoder_reparameterization_type": "GRU"},
            ValueError,
            "'NONE', 'MLP', 'LSTM', 'RESIDUAL', got 'GRU'",
        ),
        (
            {"prompt_tuning_init": "ZERO"},
            ValueError,
            "`prompt_tuning_init` must be one of 'TEXT', 'SAMPLE_VOCAB', 'RANDOM', 'ADAPTER', 'ZERO_VALUES', got 'Z",
        ),
        (
            {"encoder_reparameterization_type": "NONE", "encoder_hidden_size": 8},
            ValueError,
            "`encoder_hidden_size` has no meaning with encoder_reparameterization_type='NONE'",
        ),
        (
            {"encoder_reparameterization_type": "NONE", "encoder_dropout": 0.1, "encoder_num_layers": 2},
            ValueError,
            "`encoder_num_layers`, `encoder_dropout` has no meaning",
        ),
        ({"encoder_hidden_size": 0}, ValueError, "`encoder_hidden_size` must be from 1 to 16777216, got 0"),
        ({"encoder_num_layers": 1.5}, TypeError, "`encoder_num_layers` must be an int"),
        ({"encoder_dropout": 1.0}, ValueError, "`encoder_dropout` must be at least 0 and below 1, got 1.0"),
        ({"encoder_dropout": "0.1"}, TypeError, "`encoder_dropout` must be a float, got '0.1'"),
        (
            {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_dropout": 0.5},
            ValueError,
            "at least 2 layers or no dropout",
        ),
        (
            {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"},
            ValueError,
            "needs a non-empty",
        ),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}, ValueError, "needs `tokenizer_name_or_path`"),
        ({"prompt_tuning_init_text": "x"}, ValueError, "`prompt_tuning_init_text` is only used with .*'TEXT'"),
        ({"prompt_tuning_init": "ADAPTER"}, ValueError, "needs `prompt_tuning_init_adapter`, the folder or Hub name"),
        (
            {"prompt_tuning_init_adapter": "x"},
            ValueError,
            "`prompt_tuning_init_adapter` is only used with .*'ADAPTER'",
        ),
        (
            {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": ["x"]},
            TypeError,
            "`prompt_tuning_init_adapter` must be a string, got list",
        ),
        ({"tokenizer_name_or_path": 3}, TypeError, "`tokenizer_name_or_path` must be a string, got int"),
        ({"modules_to_save": "score"}, TypeError, "`modules_to_save` must be a list of module names, got 'score'"),
        ({"task_type": "POETRY"}, ValueError, "Invalid task type: 'POETRY'"),
        ({"encoder_num_layers": 65}, ValueError, "`encoder_num_layers` must be from 1 to 64, got 65"),
        ({"base_model_name_or_path": 3}, TypeError, "`base_model_name_or_path` must be a string, got 3"),
        ({"revision": ["main"]}, TypeError, "`revision` must be a string"),
        ({"auto_mapping": "x"}, TypeError, "`auto_mapping` must be a dict"),
        ({"inference_mode": "yes"}, TypeError, "`inference_mode` must be a bool"),
        ({"peft_type": "LORA"}, ValueError, "`peft_type` of a PTuningConfig is 'PTUNING', got 'LORA'"),
    ],
)
def test_bad_values_are_refused_with_the_allowed_ones(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        PTuningConfig(**arguments)


@pytest.mark.parametrize("encoder", list(PromptEncoderType))
def test_saved_and_loaded_config_is_the_same(encoder, tmp_path) -> None:
    config = PTuningConfig(
        num_virtual_tokens=7,
        encoder_reparameterization_type=encoder,
        prompt_tuning_init="SAMPLE_VOCAB",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        base_model_name_or_path="some/model",
    )
    config.save_pretrained(tmp_path)
    for load in (PTuningConfig.from_pretrained, PeftConfig.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is PTuningConfig
        assert loaded == config
        assert loaded.peft_type is PeftType("PTUNING")
        assert loaded.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB
        assert loaded.task_type == TaskType.SEQ_CLS


def test_the_adapter_that_a_prompt_started_at_is_kept(tmp_path) -> None:
    config = PTuningConfig(prompt_tuning_init="ADAPTER", prompt_tuning_init_adapter=tmp_path / "other")
    assert config.prompt_tuning_init == "ADAPTER"
    assert config.prompt_tuning_init_adapter == str(tmp_path / "other")
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_unknown_fields_of_a_newer_version_warn_and_are_ignored(tmp_path) -> None:
    PTuningConfig(num_virtual_tokens=7).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\]"):
        assert PTuningConfig.from_pretrained(tmp_path).num_virtual_tokens == 7


def test_fields_are_documented_once_each() -> None:
    documented = PTuningConfig.__doc__.partition("Args:")[2].partition("Raises:")[0]
    inherited = set(PeftConfig.__dataclass_fields__) - {"task_type", "inference_mode"}
    for name in set(PTuningConfig.__dataclass_fields__) - inherited:
        assert documented.count(f"{name} (`") == 1, name
