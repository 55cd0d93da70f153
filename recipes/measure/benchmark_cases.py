# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmark compares: shapes, methods and measures, and the arguments that choose among them."""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import nn

from peft_ptuning_ext import PTuningConfig


NEW_TOKENS = 64
SHAPES = ["16,32,100", "16,64,50", "16,128,20", "1,128,20"]
GRID = {"batch_sizes": [1, 4, 16, 32], "text_lengths": [32, 128, 512], "prompt_lengths": [8, 20, 50, 100]}
STATUS = Path("/proc/self/status")  # where Linux tells a process its memory


class Shape(NamedTuple):
    batch_size: int  # B
    text_length: int  # S
    prompt_length: int  # V

    def __str__(self) -> str:
        return f"B {self.batch_size}, S {self.text_length}, V {self.prompt_length}"


@dataclass(frozen=True)
class Method:
    label: str
    colour: str  # from the palette of Okabe and Ito, made for the colour-blind
    marker: str
    config_class: type[PeftConfig] | None
    options: dict = field(default_factory=dict)  # of the config, the same for every shape
    attention: str = "sdpa"  # what transformers calls the implementation
    is_concatenated: bool = False  # the prompt stands in every row, though it could be shared
    is_default: bool = True  # measured where no methods are named


METHODS = {
    "base": Method("base", "#000000", "", None),
    "ptuning": Method("this package", "#0072B2", "o", PTuningConfig),
    "ptuning_deep": Method("this package, deep", "#56B4E9", "P", PTuningConfig, {"prompt_depth": "DEEP"}),
    "peft_ptuning": Method("PEFT P-tuning", "#D55E00", "s", PromptEncoderConfig),
    "peft_prompt_tuning": Method("PEFT prompt tuning", "#E69F00", "^", PromptTuningConfig),
    "peft_prefix": Method("PEFT prefix tuning", "#009E73", "v", PrefixTuningConfig),
    "lora": Method("LoRA", "#CC79A7", "D", LoraConfig, {"r": 8}),
    "ptuning_concatenated": Method(
        "this package, concatenated", "#999999", "X", PTuningConfig, is_concatenated=True, is_default=False
    ),
}
# The base and this package under other attention implementations.
OTHER_ATTENTION = {"flash_attention_2": "flash 2", "flash_attention_3": "flash 3", "flex_attention": "flex"}
for _attention, _name in OTHER_ATTENTION.items():
    METHODS |= {
        f"base_{_attention}": Method(f"base, {_name}", "#666666", "", None, {}, _attention, is_default=False),
        f"ptuning_{_attention}": Method(
            f"this package, {_name}", "#332288", "*", PTuningConfig, {}, _attention, is_default=False
        ),
    }
DEFAULT_METHODS = [name for name, method in METHODS.items() if method.is_default]
# A failure of these ends a benchmark: there is nothing to compare with, or this package is at fault.
OURS = {name for name in METHODS if name.startswith(("base", "ptuning"))}


def train_step(model: nn.Module, inputs: dict, labels: torch.Tensor) -> None:
    """Runs forward and backward. If nothing is trained, the gradients go back to the input embeddings."""
    inputs = dict(inputs, labels=labels)
    if labels.dim() == 2:
        inputs["use_cache"] = False  # as Trainer does
    if not any(parameter.requires_grad for parameter in model.parameters()):
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
    model(**inputs).loss.backward()


@torch.no_grad()
def prefill(model: nn.Module, inputs: dict, labels: torch.Tensor) -> None:
    model(**inputs, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def forward(model: nn.Module, inputs: dict, labels: torch.Tensor) -> None:
    model(**inputs)


def generate(model: nn.Module, inputs: dict, labels: torch.Tensor, new_tokens: int = NEW_TOKENS) -> None:
    output = model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    generated = output.shape[1] - inputs["input_ids"].shape[1]
    if generated != new_tokens:
        raise RuntimeError(f"{generated} tokens were generated, not {new_tokens}.")


def first_token(model: nn.Module, inputs: dict, labels: torch.Tensor) -> None:
    generate(model, inputs, labels, new_tokens=1)


@dataclass(frozen=True)
class Measure:
    title: str
    step: Callable[[nn.Module, dict, torch.Tensor], None]
    architectures: tuple[str, ...] = ("llama",)
    is_memory: bool = False
    is_rate: bool = False  # shown as a rate, of which more is better; the seconds are saved


MEASURES = {
    "train_step": Measure("Training step: time", train_step, ("llama", "bert")),
    "forward": Measure("Forward: time", forward, ("bert",)),
    "prefill": Measure("Prefill: time", prefill),
    "first_token": Measure("Time to first token", first_token),
    "tokens_per_second": Measure(f"Tokens per second, {NEW_TOKENS} new tokens", generate, is_rate=True),
    "train_memory": Measure("Training step: peak memory", train_step, ("llama", "bert"), is_memory=True),
    "generate_memory": Measure(f"Generating {NEW_TOKENS} tokens: peak memory", generate, is_memory=True),
}


@dataclass
class BenchmarkArguments:
    """The cases that are measured, and how."""

    architecture: Literal["llama", "bert"] = field(default="llama", metadata={"help": "Causal model or encoder."})
    model_size: Literal["tiny", "small", "medium", "large", "1b", "3b", "8b"] = field(
        default="small", metadata={"help": "Size of the model of random weights: see SIZES."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a model to take instead."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Number format."})
    shapes: list[str] | None = field(
        default=None, metadata={"help": f"B,S,V of each shape. Default: {' '.join(SHAPES)}"}
    )
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "B of a grid of shapes. Default: 1 4 16 32"})
    text_lengths: list[int] | None = field(default=None, metadata={"help": "S of the grid. Default: 32 128 512"})
    prompt_lengths: list[int] | None = field(default=None, metadata={"help": "V of the grid. Default: 8 20 50 100"})
    methods: list[str] | None = field(
        default=None, metadata={"help": f"Some of {', '.join(METHODS)}. Default: those of one way."}
    )
    measures: list[str] | None = field(
        default=None, metadata={"help": f"Some of {', '.join(MEASURES)}. Default: all that the architecture has."}
    )
    rounds: int = field(default=7, metadata={"help": "How often each method is timed."})
    warmup: int = field(default=2, metadata={"help": "Rounds before the timed ones, at least 1."})
    check: bool = field(
        default=True, metadata={"help": "First compare the outputs with the base model's for [P; E(x)]."}
    )
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    threads: int | None = field(
        default=None, metadata={"help": "Threads on a CPU. Take 1 on a machine that is shared."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of weights, texts and the order within a round."})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Folder for numbers, tables and plots."})
    # Set in a child process only: what that process measures.
    plot_folder: str | None = field(default=None, metadata={"help": "Plot the run in this folder again, and stop."})
    memory_of: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})


def complete(args: BenchmarkArguments) -> list[Shape]:
    """Checks the arguments, fills in the defaults that depend on others, and returns the shapes."""
    apply = [name for name, measure in MEASURES.items() if args.architecture in measure.architectures]
    args.measures = args.measures or apply
    if unknown := [name for name in args.measures if name not in apply]:
        raise ValueError(f"`--measures` of {args.architecture} are {apply}, got {unknown}.")
    args.methods = args.methods or DEFAULT_METHODS
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise ValueError(f"`--methods` are {list(METHODS)}, got {unknown}.")
    args.methods = [name for name in METHODS if name == "base" or name in args.methods]
    for name in ("rounds", "warmup"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device != "cpu" and not args.device.startswith("cuda"):
        raise ValueError(f"`--device` is cpu or cuda, got {args.device!r}.")
    if args.device == "cpu" and any(MEASURES[name].is_memory for name in args.measures) and not STATUS.exists():
        raise ValueError(f"Memory on a CPU is read from {STATUS}, of Linux. Leave it out of `--measures`.")
    lengths = {name: getattr(args, name) for name in GRID}
    if any(lengths.values()):
        if args.shapes:
            raise ValueError("Pass either `--shapes` or lists of sizes, not both.")
        shapes = [Shape(*sizes) for sizes in itertools.product(*(lengths[name] or GRID[name] for name in GRID))]
    else:
        try:
            shapes = [Shape(*map(int, text.split(","))) for text in args.shapes or SHAPES]
        except (ValueError, TypeError):
            raise ValueError(f"`--shapes` are three numbers each, B,S,V as in 16,32,100, got {args.shapes}.") from None
    if wrong := [tuple(shape) for shape in shapes if min(shape) < 1]:
        raise ValueError(f"B, S and V must be at least 1, got {wrong}.")
    return list(dict.fromkeys(shapes))
