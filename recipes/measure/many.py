# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Measures what an adapter for each row of a batch costs, beside one adapter for all rows, for prompts and for LoRA.

All models have the same random weights. A round runs each case once, in shuffled order, and the table has the medians
and quartiles of the ratios within a round. With no arguments, a Llama of 6 layers and width 512 is measured, which
takes about two minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/measure/many.py

What is measured: `prefill` (a text read, its cache filled; keys and values of the prompts are stored before), `token`
(one generated token behind that cache, the mean of some) and, of prompts, `train_step` (forward and backward of the
loss, without an optimizer).
"""

import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from benchmark_cases import BenchmarkArguments
from benchmark_report import describe_machine, quartiles
from benchmark_runs import LORA_TARGETS, load_base
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import HfArgumentParser

from peft_ptuning_ext import PTuningConfig
from peft_ptuning_ext.forward import one_pass


@dataclass
class ManyArguments:
    """What is measured."""

    model_size: str = field(default="small", metadata={"help": "See SIZES in benchmark_runs.py."})
    rows: int = field(default=64, metadata={"help": "Texts in a batch of prompts, each with one of its own."})
    shared: int = field(default=4, metadata={"help": "Prompts of a batch in which several rows have the same."})
    lora_rows: int = field(default=16, metadata={"help": "Texts in a batch beside LoRA."})
    text_length: int = field(default=32, metadata={"help": "Tokens of a text, S."})
    prompt_length: int = field(default=20, metadata={"help": "Virtual tokens of a prompt, V."})
    new_tokens: int = field(default=8, metadata={"help": "Generated tokens, of which the mean is taken."})
    rounds: int = field(default=9, metadata={"help": "How often each case runs."})
    seed: int = field(default=42, metadata={"help": "Seed of weights, texts and the order within a round."})
    output_dir: str = field(default="outputs/many", metadata={"help": "Folder for many.json and many.md."})


def add_adapters(base: torch.nn.Module, config: Callable[[], PeftConfig], count: int) -> PeftModel:
    """A copy of the base with `count` adapters, which differ."""
    model = get_peft_model(copy.deepcopy(base), config(), adapter_name="0")
    for i in range(1, count):
        model.add_adapter(str(i), config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero where a LoRA begins, and trained ones are not
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def read(model: PeftModel, ids: torch.Tensor, names: list[str] | None) -> dict[str, object]:
    """Reads texts without gradients, and returns the cache by its name."""
    mask = torch.ones_like(ids)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, adapter_names=names)
    name = "cache" if "cache" in output else "past_key_values"  # its name before transformers 5.24
    return {name: output[name]}


def time_reading(model: PeftModel, ids: torch.Tensor, names: list[str] | None, new_tokens: int) -> dict[str, float]:
    """Seconds of the prefill, and of a generated token behind it."""
    read(model, ids[:, :1], names)  # a training step before it leaves no keys and values of its prompts
    start = time.perf_counter()
    cache = read(model, ids, names)
    prefill, (rows, text) = time.perf_counter() - start, ids.shape
    mask = torch.ones(rows, text + new_tokens, dtype=torch.long)
    start = time.perf_counter()
    for i in range(new_tokens):
        inputs = {"input_ids": ids[:, :1], "attention_mask": mask[:, : text + i + 1], **cache}
        inputs["position_ids"] = torch.full((rows, 1), text + i)
        with torch.no_grad():
            model(**inputs, use_cache=True, adapter_names=names)
    return {"prefill": prefill, "token": (time.perf_counter() - start) / new_tokens}


def time_training(model: PeftModel, ids: torch.Tensor, names: list[str] | None) -> dict[str, float]:
    """Seconds of a training step."""
    model.zero_grad()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False, adapter_names=names).loss.backward()
    return {"train_step": time.perf_counter() - start}


def time_concatenated(model: PeftModel, ids: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Seconds of a training step whose rows have their prompts in front, rather than each prompt once."""
    overhead, one_pass.OVERHEAD = one_pass.OVERHEAD, float("inf")
    try:
        return time_training(model, ids, names)
    finally:
        one_pass.OVERHEAD = overhead


def time_cases(cases: dict[str, Callable[[], dict[str, float]]], args: ManyArguments) -> dict[str, dict[str, list]]:
    """By case and measure, the seconds of each round; a first round is left out."""
    order, found = random.Random(args.seed), {name: {} for name in cases}
    for number in range(args.rounds + 1):
        for name in order.sample(sorted(cases), len(cases)):
            for measure, seconds in cases[name]().items():
                if number:
                    found[name].setdefault(measure, []).append(seconds)
    return found


def measure(args: ManyArguments) -> dict[str, dict[str, list]]:
    settings = BenchmarkArguments(model_size=args.model_size, device="cpu", seed=args.seed)
    base = load_base(settings)
    torch.manual_seed(args.seed)
    ids = torch.randint(base.config.vocab_size, (args.rows, args.text_length))
    few = ids[: args.lora_rows]

    def prompt() -> PTuningConfig:
        return PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.prompt_length)

    def lora() -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=LORA_TARGETS["llama"])

    prompts, loras = add_adapters(base, prompt, args.rows), add_adapters(base, lora, args.lora_rows)
    prompts.set_requires_grad(list(prompts.peft_config), True)
    own, few_own = [str(i) for i in range(args.rows)], [str(i) for i in range(args.lora_rows)]
    some, tokens = own[: args.shared] * -(-args.rows // args.shared), args.new_tokens
    some = some[: args.rows]
    return time_cases(
        {
            "one prompt": lambda: time_reading(prompts, ids, None, tokens) | time_training(prompts, ids, None),
            "a prompt for each row": lambda: (
                time_reading(prompts, ids, own, tokens) | time_training(prompts, ids, own)
            ),
            "some prompts": lambda: time_reading(prompts, ids, some, tokens) | time_training(prompts, ids, some),
            "some prompts, concatenated": lambda: time_concatenated(prompts, ids, some),
            "one prompt, few rows": lambda: time_reading(prompts, few, None, tokens),
            "a prompt for each of few rows": lambda: time_reading(prompts, few, few_own, tokens),
            "one LoRA, few rows": lambda: time_reading(loras, few, None, tokens),
            "a LoRA for each of few rows": lambda: time_reading(loras, few, few_own, tokens),
        },
        args,
    )


# What is divided by what.
RATIOS = [
    ("a prompt for each row", "one prompt"),
    ("some prompts", "one prompt"),
    ("some prompts", "some prompts, concatenated"),
    ("a prompt for each of few rows", "one prompt, few rows"),
    ("a LoRA for each of few rows", "one LoRA, few rows"),
    ("a LoRA for each of few rows", "a prompt for each of few rows"),
]


def write_table(found: dict[str, dict[str, list]], args: ManyArguments) -> str:
    """The ratios as a Markdown table."""
    lines = ["| | B | prefill | one token | training step |", "|---|---|---|---|---|"]
    for above, below in RATIOS:
        cells = []
        for name in ("prefill", "token", "train_step"):
            if name not in found[above] or name not in found[below]:
                cells.append("")
                continue
            low, median, high = quartiles([a / b for a, b in zip(found[above][name], found[below][name], strict=True)])
            cells.append(f"{median:.2f} ({low:.2f}–{high:.2f})")
        rows = args.lora_rows if "few" in above else args.rows
        title = f"{above} ÷ {below}".replace(", few rows", "").replace("each of few rows", "each row")
        title = title.replace("some", str(args.shared))
        lines.append(f"| {title} | {rows} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(ManyArguments).parse_args_into_dataclasses(args=argv)
    settings = BenchmarkArguments(model_size=args.model_size, device="cpu", dtype="float32", seed=args.seed)
    found = measure(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe_machine(load_base(settings), settings), "settings": asdict(args), "seconds": found}
    (folder / "many.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = write_table(found, args)
    (folder / "many.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
