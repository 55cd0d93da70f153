# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The arguments that the recipes share, and how they are read from a command line and a YAML or JSON file."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments


# What the recipes change in the defaults of TrainingArguments.
SHARED_DEFAULTS = {
    "warmup_steps": 0.1,  # a number below 1 is a share of all steps
    "label_names": ["labels"],  # Trainer can't read the names from the forward of a PeftModel, and would warn
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "dataloader_pin_memory": torch.cuda.is_available(),  # without a GPU, torch warns that pinning is useless
}

# What Trainer has to be told so that an evaluation returns predictions, all of them at once, and why.
EVALUATION = {
    "dataloader_drop_last": (False, "with it, Trainer leaves out rows of evaluations too"),
    "prediction_loss_only": (False, "the metrics are computed from predictions"),
    "eval_do_concat_batches": (True, "the metrics are computed from the predictions of all batches"),
    "batch_eval_metrics": (False, "the metrics are computed from the predictions of all batches"),
    "predict_with_generate": (True, "the metrics are computed from generated texts"),
}


@dataclass
class ModelArguments:
    """The backbone."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the backbone. Default: a small model that needs no Hub."}
    )


@dataclass
class DataArguments:
    """The data. The final metrics are those of the test split if there is one, otherwise of the validation split."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines or CSV. Default: the recipe's own data."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "JSON lines or CSV, in the format of the training file."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Measured after training. Nothing is chosen by it."})


@dataclass
class MethodArguments:
    """The method. For its options see `PTuningConfig`, and the configs of PEFT that `_make_config` makes."""

    method: Literal["ptuning", "peft_ptuning", "peft_prefix", "lora", "head"] = field(
        default="ptuning",
        metadata={
            "help": "What is trained: this package's prompt, stock P-tuning or prefix tuning, LoRA, or the head alone."
        },
    )
    num_virtual_tokens: int = field(default=10, metadata={"help": "Length of the prompt: its number of vectors."})
    depth: Literal["INPUT", "DEEP"] | None = field(
        default=None,
        metadata={
            "help": "Where the prompt enters: vectors in front of the text, or keys and values in front of the text's "
            "in every layer. Default: that of the recipe."
        },
    )
    shift_positions: bool = field(
        default=False,
        metadata={"help": "With DEEP, the text's positions begin behind the prompt, as those behind vectors do."},
    )
    encoder: Literal["NONE", "MLP", "LSTM", "RESIDUAL"] | None = field(
        default=None,
        metadata={"help": "Network that produces the prompt. Default: NONE (no network); for peft_ptuning: MLP."},
    )
    encoder_dropout: float = field(
        default=0.0, metadata={"help": "Dropout in the network; with DEEP, on the keys and values."}
    )
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT", "ADAPTER", "ZERO_VALUES"] = field(
        default="RANDOM",
        metadata={
            "help": "Where the prompt starts: at random, at random tokens, at a text, at a trained prompt, or (only "
            "DEEP) at random keys and values of 0."
        },
    )
    prompt_tuning_init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the adapter that ADAPTER starts from. With DEEP, its prompt may be one at "
            "the input: on a causal decoder, training goes on from there in every layer."
        },
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "The text that TEXT starts from."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    frozen_dropout: bool = field(
        default=False, metadata={"help": "Keep the dropout of the frozen layers, which is off by default."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better one; needs `--load_best_model_at_end`."},
    )

    @property
    def prompt_positions(self) -> int:
        """How many of the model's positions are kept for the prompt. The keys and values of a deep one take none."""
        return 0 if self.depth == "DEEP" else self.num_virtual_tokens


def parse_arguments(dataclasses: list, defaults: dict, argv: list[str] | None) -> tuple:
    """Returns one object per dataclass, filled from the command line.

    The first word may be a YAML or JSON file of options. Options behind it override those of the file. The `depth` of
    `defaults` is that of this package's prompts. Other methods have none, and refuse one that is given. Where the
    method is an argument, a learning rate that is not given is `None`.

    Raises:
        ValueError: The file does not exist, holds no table of options, or has an option that no dataclass knows.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(dataclasses)
    known = {action.dest for action in parser._actions}
    defaults = {**defaults}
    depth = defaults.pop("depth", "INPUT")
    if MethodArguments in dataclasses:
        parser.set_defaults(learning_rate=None)  # `choose_learning_rate` of shared/methods.py
    parser.set_defaults(**{name: value for name, value in SHARED_DEFAULTS.items() if name in known} | defaults)
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
    parsed = parser.parse_args_into_dataclasses(args=argv)
    for part in parsed:
        if getattr(part, "deepspeed", None) and part.learning_rate is None:
            raise ValueError("DeepSpeed is told the learning rate before there is a model: pass `--learning_rate`.")
        if isinstance(part, MethodArguments) and part.method == "ptuning" and part.depth is None:
            part.depth = depth
    return parsed


def check_evaluation(args: TrainingArguments, free: Sequence[str] = ()) -> None:
    """Checks that Trainer's evaluations return a prediction for each row, which a recipe measures.

    Args:
        args (`TrainingArguments`): The arguments.
        free (`Sequence[str]`, *optional*): Options that the recipe leaves free.

    Raises:
        ValueError: An option makes Trainer leave out predictions.
    """
    for option, (needed, why) in EVALUATION.items():
        value = getattr(args, option, needed)
        if value != needed and option not in free:
            raise ValueError(f"`--{option}` is {value}, and this recipe needs {needed}: {why}.")


def check_at_least(least: int, args, *options: str) -> None:
    """Checks that options are not too small.

    Raises:
        ValueError: One of them is.
    """
    for option in options:
        if getattr(args, option) < least:
            raise ValueError(f"`--{option}` is {getattr(args, option)}, and should be {least} or more.")


def _as_words(name: str, value) -> list[str]:
    """An option of a file in the words of a command line, whose parser checks type and choices. null: the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
