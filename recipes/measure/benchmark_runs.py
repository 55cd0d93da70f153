# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The measuring half of the benchmark: makes models and batches, checks outputs, and takes times and memory."""

import ctypes
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from benchmark_cases import MEASURES, METHODS, OURS, STATUS, BenchmarkArguments, Measure, Shape, train_step
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)


# PEFT 0.21 itself reads the old name while it wraps a model, and its generate warns at every token.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning", UserWarning)

# Memory on a CPU is measured in child processes, which run this file.
COMMAND = Path(__file__).resolve().with_name("benchmark.py")
# Environment of these processes: glibc then keeps one arena and returns freed blocks to the system at once.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}
LORA_TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
# How far outputs may be from those of the base model on the concatenation, relative to the largest output.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

# Sizes of the models: layers, width, heads, key-value heads, width of the MLP, vocabulary.
SIZES = {
    "tiny": (2, 64, 4, 4, 176, 512),
    "small": (6, 512, 8, 8, 1376, 8192),
    "medium": (12, 768, 12, 12, 2048, 32000),
    "large": (24, 1024, 16, 16, 2816, 32000),
    "1b": (22, 2048, 32, 4, 5632, 32000),
    "3b": (28, 3072, 24, 8, 8192, 128256),
    "8b": (32, 4096, 32, 8, 14336, 128256),
}


def make_config(args: BenchmarkArguments) -> PreTrainedConfig:
    layers, width, heads, key_value_heads, mlp_width, vocabulary = SIZES[args.model_size]
    config = (LlamaConfig if args.architecture == "llama" else BertConfig)(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=mlp_width,
        vocab_size=vocabulary,
        max_position_embeddings=2048 if args.architecture == "bert" else 4096,
    )
    if args.architecture == "llama":
        config.num_key_value_heads = key_value_heads
    return config


def load_base(args: BenchmarkArguments) -> PreTrainedModel:
    """Returns the frozen base model, with dropout switched off."""
    torch.manual_seed(args.seed)
    auto_class = AutoModelForCausalLM if args.architecture == "llama" else AutoModelForSequenceClassification
    dtype = getattr(torch, args.dtype)
    if args.model_name_or_path is not None:
        base = auto_class.from_pretrained(args.model_name_or_path, dtype=dtype)
    else:
        with torch.device(args.device):  # the weights are drawn there: on a CPU, billions take minutes
            base = auto_class.from_config(make_config(args), dtype=dtype)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if args.architecture == "llama" and base.generation_config.pad_token_id is None:
        base.generation_config.pad_token_id = 0  # without one, generate logs at each call which token it takes
    return base.requires_grad_(False).to(args.device)


def adapt(base: PreTrainedModel, method: str, prompt_length: int, args: BenchmarkArguments) -> nn.Module:
    """Returns a copy of the base model with the method's adapter. The copy shares the weights of the base."""
    case = METHODS[method]
    model = deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    if model.config._attn_implementation != case.attention:
        model.set_attn_implementation(case.attention)
    torch.manual_seed(args.seed)
    config_class, options = case.config_class, {**case.options}
    if config_class is None:
        return model
    if config_class is LoraConfig:
        options["target_modules"] = LORA_TARGETS[args.architecture]
    else:
        options["num_virtual_tokens"] = prompt_length
    if config_class is PromptEncoderConfig:
        options["encoder_hidden_size"] = base.config.hidden_size
    model = get_peft_model(model, config_class(task_type=TASKS[args.architecture], **options))
    if case.is_concatenated:  # the attention of the base takes no prompt
        model.get_base_model().set_attn_implementation(case.attention)
    return model


def make_batch(base: PreTrainedModel, shape: Shape, args: BenchmarkArguments) -> tuple[dict, torch.Tensor]:
    """Returns texts (B, S) of random tokens, and their labels."""
    generator = torch.Generator().manual_seed(args.seed)
    size = shape.batch_size, shape.text_length
    ids = torch.randint(1, base.config.vocab_size, size, generator=generator).to(args.device)
    labels = ids if args.architecture == "llama" else ids[:, 0] % base.config.num_labels
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


@torch.no_grad()
def check(base: PreTrainedModel, model: nn.Module, inputs: dict, args: BenchmarkArguments) -> dict:
    """Compares this package's outputs with those of the base model for [P; E(x)] at the positions of x.

    The outputs are logits, or the last hidden states of an encoder. Returns the largest difference, and the largest
    effect of the prompt.

    Raises:
        RuntimeError: The difference is more than rounding explains.
    """
    batch_size, length = inputs["input_ids"].shape

    def output(model: nn.Module, **inputs) -> torch.Tensor:
        if args.architecture == "llama":  # of 32 positions at most, since the vocabulary is large
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
    """Returns the first line of a method's error for the report. Errors of the base and of this package are raised."""
    if method in OURS:
        raise error
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Returns the kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def time_methods(
    measure: Measure,
    models: dict,
    batch: tuple,
    args: BenchmarkArguments,
    enough: float = math.inf,
    deadline: float = math.inf,
) -> tuple[dict, dict]:
    """Returns the seconds of every round by method, and the errors of those that failed.

    Args:
        measure ([`Measure`]): Whose step is timed.
        models (`dict`): By method.
        batch (`tuple`): Inputs and labels.
        args ([`BenchmarkArguments`]): Rounds, warm-up, seed and device.
        enough (`float`): After so many seconds no further round begins, if there is one.
        deadline (`float`): The reading of `time.monotonic` after which no step begins.

    Raises:
        TimeoutError: The deadline has passed before the first round was complete.
    """
    began = time.monotonic()
    seconds, errors = {method: [] for method in models}, {}
    order = random.Random(args.seed)
    gc.collect()
    gc.freeze()  # the collections between the steps then skip what is there already
    gc.disable()
    try:
        for i in range(args.warmup + args.rounds):
            if i > args.warmup and time.monotonic() > min(began + enough, deadline):
                break
            for method in order.sample(list(seconds), len(seconds)):
                if i <= args.warmup and time.monotonic() > deadline:
                    raise TimeoutError("The time was up before the first round was complete.")
                prepare(models[method], measure)
                try:
                    elapsed = time_step(measure, models[method], batch, args.device)
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


def time_step(measure: Measure, model: nn.Module, batch: tuple, device: str) -> float:
    """Returns the seconds of a step: on a GPU by events, on a device that is idle before."""
    if device == "cpu":
        start = time.perf_counter()
        measure.step(model, *batch)
        return time.perf_counter() - start
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        measure.step(model, *batch)
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_memory(base: PreTrainedModel, measure: Measure, method: str, shape: Shape, args: BenchmarkArguments) -> int:
    """Returns the bytes that a method's first step takes beyond what was there before it."""
    small = Shape(1, 8, 1)  # a first step loads libraries and starts threads, which is not to be measured
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
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
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
            command = [sys.executable, str(COMMAND), "--memory_of", task]
            done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True)
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                raise RuntimeError(f"a process for its memory ended with {done.returncode}: {last}")
            sizes[method] = [int(done.stdout.splitlines()[-1])]
        except Exception as error:
            errors[method] = failure(method, error)
    return sizes, errors
