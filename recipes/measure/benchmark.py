# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Measures the time and memory of this package beside stock PEFT's methods and the base model without a prompt.

All methods adapt one frozen model of random weights, in one process, and take turns: every round runs each of them
once, in shuffled order, and what is reported are medians and quartiles of ratios within a round, which the machine's
drift leaves alone. With no arguments: four shapes on a Llama of 6 layers and width 512. Tables and plots go to
`outputs/benchmark`:

    pip install -e ".[recipes]"
    python recipes/measure/benchmark.py

The grid, chosen shapes, an encoder, a GPU:

    python recipes/measure/benchmark.py --batch_sizes 1 4 16 32 --text_lengths 32 128 512 --prompt_lengths 8 20 50 100
    python recipes/measure/benchmark.py --shapes 16,32,100 --methods ptuning peft_ptuning --measures train_step
    python recipes/measure/benchmark.py --architecture bert
    python recipes/measure/benchmark.py --model_size 1b --dtype bfloat16 --device cuda

What is measured:

- `train_step`: forward and backward of the loss, no optimizer. The base has nothing to train; gradients to its input
  embeddings, which pass all layers, are its floor.
- `prefill` (`forward` of an encoder): no gradients; a causal model fills its cache and computes the last logits.
  This package keeps the prompt's keys and values from an earlier call.
- `first_token`, `tokens_per_second`: greedy `generate` of 1 and of 64 tokens, the prefill included.
- `train_memory`, `generate_memory`: the peak during the first such step, beyond what was there before it (model and
  adapter loaded, no prompt kept, no optimizer). On a GPU that is of allocated memory. On a CPU it is of the resident
  set (`VmHWM` after, `VmRSS` before) in a fresh process for each method and shape, whose glibc is told to keep one
  arena and to hand freed blocks back at once (`ALLOCATOR`): else the peak depends on what an allocator happened to
  keep.
"""

import argparse
import ctypes
import datetime
import gc
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import peft
import torch
import transformers
from matplotlib.figure import Figure
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
)

from peft_ptuning_ext import PTuningConfig


# PEFT 0.21 itself reads the old name while it wraps a model, and its generate warns at every token.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning", UserWarning)

NEW_TOKENS = 64
SHAPES = ["16,32,100", "16,64,50", "16,128,20", "1,128,20"]
STATUS = Path("/proc/self/status")
GRID = {"batch_sizes": [1, 4, 16, 32], "text_lengths": [32, 128, 512], "prompt_lengths": [8, 20, 50, 100]}
AXES = {"batch_size": "batch size B", "text_length": "text length S", "prompt_length": "prompt length V"}
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}
LORA_TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
# Largest difference to the base model on the concatenation, relative to the largest output.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


# Layers, width, heads, key-value heads, width of the MLP, vocabulary.
SIZES = {
    "tiny": (2, 64, 4, 4, 176, 512),
    "small": (6, 512, 8, 8, 1376, 8192),
    "medium": (12, 768, 12, 12, 2048, 32000),
    "large": (24, 1024, 16, 16, 2816, 32000),
    "1b": (22, 2048, 32, 4, 5632, 32000),
}


class Shape(NamedTuple):
    batch_size: int  # B
    text_length: int  # S
    prompt_length: int  # V

    def __str__(self) -> str:
        return f"B {self.batch_size}, S {self.text_length}, V {self.prompt_length}"


@dataclass(frozen=True)
class Method:
    label: str
    colour: str  # of Okabe and Ito's palette, which the colour-blind can tell apart
    marker: str
    config_class: type[peft.PeftConfig] | None


METHODS = {
    "base": Method("base", "#000000", "", None),
    "ptuning": Method("this package", "#0072B2", "o", PTuningConfig),
    "peft_ptuning": Method("PEFT P-tuning", "#D55E00", "s", PromptEncoderConfig),
    "peft_prompt_tuning": Method("PEFT prompt tuning", "#E69F00", "^", PromptTuningConfig),
    "peft_prefix": Method("PEFT prefix tuning", "#009E73", "v", PrefixTuningConfig),
    "lora": Method("LoRA", "#CC79A7", "D", LoraConfig),
}


def train_step(model: nn.Module, inputs: dict, labels: torch.Tensor) -> None:
    """Forward and backward; where nothing is trained, back to the input embeddings."""
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
    is_rate: bool = False  # more is better; what is kept are seconds


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
    """What is measured, on what."""

    architecture: Literal["llama", "bert"] = field(default="llama", metadata={"help": "Causal model or encoder."})
    model_size: Literal["tiny", "small", "medium", "large", "1b"] = field(
        default="small", metadata={"help": "Of the model of random weights: see SIZES."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder instead of these."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the model."})
    shapes: list[str] | None = field(default=None, metadata={"help": f"B,S,V each. Default: {' '.join(SHAPES)}"})
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "B of a grid instead: 1 4 16 32"})
    text_lengths: list[int] | None = field(default=None, metadata={"help": "S of the grid: 32 128 512"})
    prompt_lengths: list[int] | None = field(default=None, metadata={"help": "V of the grid: 8 20 50 100"})
    methods: list[str] | None = field(default=None, metadata={"help": f"Besides the base; of {', '.join(METHODS)}."})
    measures: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(MEASURES)}."})
    rounds: int = field(default=7, metadata={"help": "How often each method is timed."})
    warmup: int = field(default=2, metadata={"help": "Rounds before that which do not count, at least 1."})
    check: bool = field(default=True, metadata={"help": "First compare outputs with the base's on [P; E(x)]."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; 1 where others work too."})
    seed: int = field(default=42, metadata={"help": "Of weights, texts and the order within a round."})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "For numbers, tables and plots."})
    memory_of: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})  # the task of a child process


def complete(args: BenchmarkArguments) -> list[Shape]:
    """Checks the arguments, fills in the defaults that depend on others, and returns the shapes."""
    apply = [name for name, measure in MEASURES.items() if args.architecture in measure.architectures]
    args.measures = args.measures or apply
    if unknown := [name for name in args.measures if name not in apply]:
        raise ValueError(f"`--measures` of {args.architecture} are {apply}, got {unknown}.")
    args.methods = args.methods or list(METHODS)[: 3 if args.architecture == "bert" else None]
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


def make_config(args: BenchmarkArguments) -> transformers.PreTrainedConfig:
    layers, width, heads, key_value_heads, mlp_width, vocabulary = SIZES[args.model_size]
    config = (LlamaConfig if args.architecture == "llama" else BertConfig)(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=mlp_width,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )
    if args.architecture == "llama":
        config.num_key_value_heads = key_value_heads
    return config


def load_base(args: BenchmarkArguments) -> PreTrainedModel:
    """Returns the frozen model, without dropout."""
    torch.manual_seed(args.seed)
    auto_class = AutoModelForCausalLM if args.architecture == "llama" else AutoModelForSequenceClassification
    dtype = getattr(torch, args.dtype)
    if args.model_name_or_path is not None:
        base = auto_class.from_pretrained(args.model_name_or_path, dtype=dtype)
    else:
        base = auto_class.from_config(make_config(args), dtype=dtype)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if args.architecture == "llama" and base.generation_config.pad_token_id is None:
        base.generation_config.pad_token_id = 0  # else generate says which one it takes
    return base.requires_grad_(False).to(args.device)


def adapt(base: PreTrainedModel, method: str, prompt_length: int, args: BenchmarkArguments) -> nn.Module:
    """Returns a model of its own with the method's adapter; the base's weights are shared, not copied."""
    model = deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    torch.manual_seed(args.seed)
    config_class, task_type = METHODS[method].config_class, TASKS[args.architecture]
    if config_class is None:
        return model
    if config_class is LoraConfig:
        config = LoraConfig(r=8, target_modules=LORA_TARGETS[args.architecture], task_type=task_type)
    else:
        own = {"encoder_hidden_size": base.config.hidden_size} if config_class is PromptEncoderConfig else {}
        config = config_class(num_virtual_tokens=prompt_length, task_type=task_type, **own)
    return get_peft_model(model, config)


def make_batch(base: PreTrainedModel, shape: Shape, args: BenchmarkArguments) -> tuple[dict, torch.Tensor]:
    """Returns texts (B, S) of random tokens, and their labels."""
    generator = torch.Generator().manual_seed(args.seed)
    size = shape.batch_size, shape.text_length
    ids = torch.randint(1, base.config.vocab_size, size, generator=generator).to(args.device)
    labels = ids if args.architecture == "llama" else ids[:, 0] % base.config.num_labels
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


@torch.no_grad()
def check(base: PreTrainedModel, model: nn.Module, inputs: dict, args: BenchmarkArguments) -> dict:
    """Compares this package's outputs with the base's for [P; E(x)], P taken off: logits, or last hidden states."""
    batch_size, length = inputs["input_ids"].shape

    def output(model: nn.Module, **inputs) -> torch.Tensor:
        if args.architecture == "llama":  # of at most 32 positions: the vocabulary is large
            return model(**inputs, use_cache=False, logits_to_keep=min(length, 32)).logits.float()
        return model(**inputs, output_hidden_states=True).hidden_states[-1][:, -length:].float()

    embeds = base.get_input_embeddings()(inputs["input_ids"])  # (B, S, H)
    prompt = model.prompt_embeddings().to(embeds).expand(batch_size, -1, -1)  # (B, V, H)
    embeds = torch.cat([prompt, embeds], dim=1)
    expected = output(base.eval(), inputs_embeds=embeds, attention_mask=embeds.new_ones(embeds.shape[:2]).long())
    difference = (output(model.eval(), **inputs) - expected).abs().max().item()
    if not difference <= TOLERANCE[args.dtype] * expected.abs().max().item():
        raise RuntimeError(f"The outputs differ from the base model's on the concatenation by {difference}.")
    return {"difference": difference, "effect_of_the_prompt": (output(base, **inputs) - expected).abs().max().item()}


def prepare(model: nn.Module, measure: Measure) -> None:
    model.train(measure.step is train_step)
    model.zero_grad(set_to_none=True)
    gc.collect()


def failure(method: str, error: Exception) -> str:
    """What is written down of a failing method; the base and this package must not fail."""
    if method in ("base", "ptuning"):
        raise error
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def time_methods(measure: Measure, models: dict, batch: tuple, args: BenchmarkArguments) -> tuple[dict, dict]:
    """Returns the seconds of every round by method, and the errors of those that failed."""
    seconds, errors = {method: [] for method in models}, {}
    order = random.Random(args.seed)
    gc.collect()
    gc.freeze()  # what is there need not be searched between the steps
    gc.disable()
    try:
        for i in range(args.warmup + args.rounds):
            for method in order.sample(list(seconds), len(seconds)):
                prepare(models[method], measure)
                try:
                    synchronize(args.device)
                    start = time.perf_counter()
                    measure.step(models[method], *batch)
                    synchronize(args.device)
                    elapsed = time.perf_counter() - start
                except Exception as error:
                    errors[method] = failure(method, error)
                    del seconds[method]
                    continue
                if i >= args.warmup:
                    seconds[method].append(elapsed)
    finally:
        gc.enable()
        gc.unfreeze()
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return seconds, errors


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_memory(base: PreTrainedModel, measure: Measure, method: str, shape: Shape, args: BenchmarkArguments) -> int:
    """Returns the bytes that a method's first step takes beyond what was there before it."""
    small = Shape(1, 8, 1)  # loads libraries and starts threads
    model = adapt(base, method, small.prompt_length, args)
    prepare(model, measure)
    measure.step(model, *make_batch(base, small, args))
    model, batch = adapt(base, method, shape.prompt_length, args), make_batch(base, shape, args)
    prepare(model, measure)
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
        measure.step(model, *batch)
        return torch.cuda.max_memory_allocated(args.device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_status("VmRSS")
    measure.step(model, *batch)
    return read_status("VmHWM") - before


def read_status(name: str) -> int:
    """Returns one of the sizes in /proc/self/status, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(name))


def measure_memory(
    name: str, base: PreTrainedModel, models: dict, shape: Shape, args: BenchmarkArguments
) -> tuple[dict, dict]:
    """Returns the bytes by method, one number each, and the errors of those that failed."""
    sizes, errors = {}, {}
    for method in models:
        try:
            if args.device != "cpu":
                sizes[method] = [peak_memory(base, MEASURES[name], method, shape, args)]
                continue
            task = json.dumps({"settings": asdict(args), "measure": name, "method": method, "shape": shape})
            command = [sys.executable, str(Path(__file__).resolve()), "--memory_of", task]
            done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True)
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                raise RuntimeError(f"a process for its memory ended with {done.returncode}: {last}")
            sizes[method] = [int(done.stdout.splitlines()[-1])]
        except Exception as error:
            errors[method] = failure(method, error)
    return sizes, errors


def quartiles(values: np.ndarray | list) -> list[float]:
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist()


def summarise(name: str, shape: Shape, raw: dict[str, list], errors: dict[str, str]) -> list[dict]:
    """Returns a result for each method: what was measured and, from each round, its ratio to the base."""
    common = {"measure": name, **shape._asdict(), "unit": "bytes" if MEASURES[name].is_memory else "seconds"}
    results = [{**common, "method": method, "error": error} for method, error in errors.items()]
    values = {method: np.array(numbers, dtype=float) for method, numbers in raw.items()}
    for method, mine in values.items():
        to_base = values["base"] / mine if MEASURES[name].is_rate else mine / values["base"]
        result = {**common, "method": method, "raw": raw[method]}
        result |= {"quartiles": quartiles(mine), "to_base": quartiles(to_base)}
        if method == "ptuning" and "peft_ptuning" in values:
            result["stock_to_this"] = quartiles(values["peft_ptuning"] / mine)
        results.append(result)
    return results


def describe_machine(base: PreTrainedModel, args: BenchmarkArguments) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    config, threads = base.config, torch.get_num_threads()
    model = f"{config.model_type.capitalize()} {config.num_hidden_layers}×{config.hidden_size}, {args.dtype}"
    device = f"{cpu}, {threads} threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    return {
        "title": f"{model}, {device}".replace(" 1 threads", " 1 thread"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
    }


def select(report: dict, name: str) -> dict[Shape, dict[str, dict]]:
    """The results of one measure by shape and method."""
    selected = {}
    for result in report["results"]:
        if result["measure"] == name:
            shape = Shape(*(result[key] for key in Shape._fields))
            selected.setdefault(shape, {})[result["method"]] = result
    return selected


def write_cell(result: dict, key: str = "to_base", with_absolute: bool = False) -> str:
    """Median and quartiles of a ratio, if wanted behind the median of what was measured."""
    if key not in result:
        return "fails"
    low, median, high = result[key]
    cell = f"{median:.2f}" + (f" ({low:.2f}–{high:.2f})" if low < high else "")
    if not with_absolute:
        return cell
    measure, absolute = MEASURES[result["measure"]], result["quartiles"][1]
    if measure.is_rate:
        return f"{result['batch_size'] * NEW_TOKENS / absolute:.0f}/s, {cell}"
    return f"{absolute / 2**20:.1f} MiB, {cell}" if measure.is_memory else f"{1000 * absolute:.2f} ms, {cell}"


def write_tables(report: dict) -> str:
    """The report in Markdown, a table for each measure."""
    settings, machine = report["settings"], report["machine"]
    is_cpu = settings["device"] == "cpu"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# {machine['title']}\n",
        f"{machine['date']}, {machine['cores']} cores, {versions}. Ratios to the base of the same round: medians of "
        f"{settings['rounds']} rounds, quartiles in brackets; memory, of one run."
        f"{'' if is_cpu else ' In front of each ratio is what was measured itself.'}",
    ]
    if report["checks"]:
        worst = max(entry["difference"] for entry in report["checks"])
        effect = min(entry["effect_of_the_prompt"] for entry in report["checks"])
        lines.append(
            f"Outputs differ from the base model's on the explicit concatenation by {worst:.1e} at most; "
            f"the prompt moves them by {effect:.1e} or more."
        )
    methods = [method for method in settings["methods"] if method != "base" or not is_cpu]
    for name in settings["measures"]:
        measure, rows = MEASURES[name], select(report, name)
        columns = {METHODS[method].label: (method, "to_base") for method in methods}
        if {"ptuning", "peft_ptuning"} <= set(methods):
            title = "this ÷ PEFT P-tuning" if measure.is_rate else "PEFT P-tuning ÷ this"
            columns[title] = ("ptuning", "stock_to_this")
        with_limit = name == "train_step" and "ptuning" in methods
        if with_limit:
            columns["this ÷ base"] = ("ptuning", "to_base")
        header = ["B", "S", "V", *columns, *(["limit of this ÷ base"] if with_limit else [])]
        lines += [f"\n## {measure.title} relative to the base\n"]
        lines += [f"{'More' if measure.is_rate else 'Less'} is better.\n"]
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        failures = {}
        for shape, row in rows.items():
            cells = list(map(str, shape))
            for title, (method, key) in columns.items():
                cells.append(write_cell(row[method], key, not is_cpu and title == METHODS[method].label))
            cells += [f"{limit(shape, settings['architecture']):.3f}"] if with_limit else []
            lines.append(f"| {' | '.join(cells)} |")
            for method, result in row.items():
                if "error" in result:
                    failures.setdefault(f"{METHODS[method].label} fails: {result['error']}", []).append(f"({shape})")
        lines += [f"\n{text} {', '.join(shapes)}" for text, shapes in failures.items()]
    return "\n".join(lines) + "\n"


def limit(shape: Shape, architecture: str) -> float:
    """Positions computed per position of the text: the prompt's once for a batch, in an encoder with every row."""
    rows = shape.batch_size if architecture == "llama" else 1
    return 1 + shape.prompt_length / (rows * shape.text_length)


def plot_lines(axis: str, name: str, report: dict, path: Path) -> None:
    """A measure along one of B, S and V, a panel for each pair of the others; no plot if nothing varies."""
    panels = {}
    for shape, row in select(report, name).items():
        panels.setdefault(shape._replace(**{axis: 0}), {})[getattr(shape, axis)] = row
    panels = {fixed: rows for fixed, rows in sorted(panels.items()) if len(rows) > 1}
    if not panels:
        return
    others = [key for key in AXES if key != axis]
    columns = min(4, len({getattr(fixed, others[1]) for fixed in panels}))  # one line of panels for each others[0]
    rows_of_panels = -(-len(panels) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 6.5), 2.8 * rows_of_panels + 1.3), layout="constrained")
    grid = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    for axes, (fixed, rows) in zip(grid, panels.items()):
        for method in [method for method in report["settings"]["methods"] if method != "base"]:
            points = [(x, *row[method]["to_base"]) for x, row in sorted(rows.items()) if "raw" in row[method]]
            x, low, median, high = np.array(points).reshape(-1, 4).T
            label, colour, marker = METHODS[method].label, METHODS[method].colour, METHODS[method].marker
            spread = [median - low, high - median]
            axes.errorbar(x, median, spread, label=label, color=colour, marker=marker, markersize=5, capsize=2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(rows), map(str, sorted(rows)))
        axes.set(xlabel=AXES[axis], ylabel="ratio to the base")
        axes.set_title(", ".join(f"{AXES[key][-1]} = {getattr(fixed, key)}" for key in others), fontsize=10)
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="base")
        axes.grid(alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.remove()
    finish(figure, name, report, path)


def plot_bars(name: str, report: dict, path: Path) -> None:
    """A measure as bars, a group for each shape."""
    rows, per_line = list(select(report, name).items()), 12
    methods = [method for method in report["settings"]["methods"] if method != "base"]
    lines, width = -(-len(rows) // per_line), 0.8 / max(len(methods), 5)
    figure = Figure(figsize=(max(6.5, 1.1 * min(len(rows), per_line)), 2.8 * lines + 1.3), layout="constrained")
    grid = figure.subplots(lines, 1, squeeze=False, sharey=True).flatten()
    for i, axes in enumerate(grid):
        shown = rows[i * per_line : (i + 1) * per_line]
        for j, method in enumerate(methods):
            x = np.arange(len(shown)) + (j - (len(methods) - 1) / 2) * width
            # What fails has no bar.
            heights = [row[method].get("to_base", [0, 0])[1] for _, row in shown]
            axes.bar(x, heights, 0.92 * width, label=METHODS[method].label, color=METHODS[method].colour)
        axes.set_xticks(range(len(shown)), [str(shape).replace(", ", "\n") for shape, _ in shown])
        axes.set(xlim=(-0.6, min(len(rows), per_line) - 0.4), ylabel="ratio to the base")
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="base")
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    finish(figure, name, report, path)


def finish(figure: Figure, name: str, report: dict, path: Path) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    better = "more" if MEASURES[name].is_rate else "less"
    title = f"{MEASURES[name].title} relative to the base ({better} is better)\n{report['machine']['title']}"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def save(report: dict, folder: Path) -> None:
    """Writes all numbers, the tables and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "benchmark.md").write_text(write_tables(report), encoding="utf-8")
    for name in report["settings"]["measures"]:
        if MEASURES[name].is_memory:
            plot_bars(name, report, folder / f"{name}.png")
        else:
            plot_lines("prompt_length", name, report, folder / f"{name}_by_prompt_length.png")
            plot_lines("batch_size", name, report, folder / f"{name}_by_batch_size.png")


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(args=argv)
    task = json.loads(args.memory_of) if args.memory_of else None
    args = BenchmarkArguments(**task["settings"]) if task else args
    shapes = complete(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    base = load_base(args)
    if task:
        print(peak_memory(base, MEASURES[task["measure"]], task["method"], Shape(*task["shape"]), args))
        return

    report = {"settings": asdict(args), "machine": describe_machine(base, args), "checks": [], "results": []}
    if args.device == "cpu":
        report["note"] = "Seconds and bytes on a CPU: to be compared within this file only."
    for shape in (progress := tqdm(shapes, unit="shape")):
        progress.set_description(str(shape))
        models, unfit = {}, {}
        for method in args.methods:
            try:
                models[method] = adapt(base, method, shape.prompt_length, args)
            except Exception as error:
                unfit[method] = failure(method, error)
        batch = make_batch(base, shape, args)
        if args.check and "ptuning" in models:
            checked = check(models["base"], models["ptuning"], batch[0], args)
            report["checks"].append({**shape._asdict(), **checked})
            progress.write(f"{shape}: differs from the concatenation by {checked['difference']:.1e} at most")
        for name in args.measures:
            if MEASURES[name].is_memory:
                raw, errors = measure_memory(name, base, models, shape, args)
            else:
                raw, errors = time_methods(MEASURES[name], models, batch, args)
            report["results"] += summarise(name, shape, raw, {**unfit, **errors})
        save(report, Path(args.output_dir))  # after every shape: a long run may be cut off
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
