# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The arguments that the recipes share, and how they are read from a command line and a YAML or JSON file."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser


# Where every recipe differs from the defaults of TrainingArguments.
SHARED_DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "dataloader_pin_memory": torch.cuda.is_available(),  # torch warns where there is nothing to pin for
}


@dataclass
class ModelArguments:
    """Which backbone."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the backbone. Default: a small one that needs no Hub."}
    )


@dataclass
class DataArguments:
    """Which data. What is measured at the end is the test split if there is one, else the validation split."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines or CSV. Default: data of the recipe."})
    validation_file: str | None = field(default=None, metadata={"help": "JSON lines or CSV, as the training file."})
    test_file: str | None = field(default=None, metadata={"help": "Measured at the end, chosen on never."})


@dataclass
class MethodArguments:
    """What is trained: see `PTuningConfig`, and PEFT's `PromptEncoderConfig` and `LoraConfig`."""

    method: Literal["ptuning", "peft_ptuning", "lora", "head"] = field(
        default="ptuning",
        metadata={"help": "This package, stock PEFT's P-tuning, LoRA, or the head of the task alone."},
    )
    num_virtual_tokens: int = field(default=10, metadata={"help": "Number of trained vectors in front of the text."})
    encoder: Literal["NONE", "MLP", "LSTM", "RESIDUAL"] | None = field(
        default=None,
        metadata={"help": "Network that produces the prompt. Default: NONE, the vectors themselves; stock PEFT: MLP."},
    )
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = field(
        default="RANDOM", metadata={"help": "Where the prompt starts: random vectors, random tokens, or a text."}
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "The text of TEXT."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    frozen_dropout: bool = field(
        default=False, metadata={"help": "Leave the frozen layers' dropout on; by default it is switched off."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without gain; needs `--load_best_model_at_end`."},
    )


def parse_arguments(dataclasses: list, defaults: dict, argv: list[str] | None) -> tuple:
    """Returns one object per dataclass, from a YAML or JSON file if that comes first, and from options, which win.

    Raises:
        ValueError: The file is not there, holds no table of options, or has one that no dataclass knows.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(dataclasses)
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: value for name, value in SHARED_DEFAULTS.items() if name in known}, **defaults)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        file, argv = Path(argv[0]), argv[1:]
        if not file.is_file():
            raise ValueError(f"There is no file {file}.")
        text = file.read_text(encoding="utf-8")
        options = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(options, dict):
            raise ValueError(f"{file} should hold options by name, such as `learning_rate: 0.03`.")
        if unknown := sorted(options.keys() - known):
            raise ValueError(f"{file} has options that this recipe does not know: {', '.join(unknown)}.")
        argv = [word for name, value in options.items() for word in _as_words(name, value)] + argv
    return parser.parse_args_into_dataclasses(args=argv)


def _as_words(name: str, value) -> list[str]:
    """An option of a file as on a command line, where its type and choices are checked; null leaves the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
