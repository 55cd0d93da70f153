# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Measures how a bank of prompts, and PEFT's own way, get on with their number.

The model has random weights. Banks of 1, 100 and 10,000 prompts are each measured in a process of their own, and the
medians compared: a bank opened, a prompt added, a row chosen that was not in use, one that was, a prompt deleted, and
the memory that a prompt needs (on Linux). Beside it the time in which PEFT loads its first adapters and later ones,
prompts and LoRAs. With no arguments it takes about three minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/measure/bank.py
"""

import ctypes
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_cases import BenchmarkArguments
from benchmark_report import describe_machine
from benchmark_runs import LORA_TARGETS, load_base
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import HfArgumentParser

from peft_ptuning_ext import PromptBank, PTuningConfig


@dataclass
class BankArguments:
    """What is measured."""

    model_size: str = field(default="small", metadata={"help": "See SIZES in benchmark_runs.py."})
    prompts: list[int] = field(default_factory=lambda: [1, 100, 10_000], metadata={"help": "Prompts in a bank."})
    prompt_length: int = field(default=20, metadata={"help": "Virtual tokens of a prompt, V."})
    text_length: int = field(default=16, metadata={"help": "Tokens of the text that is read."})
    repeats: int = field(default=20, metadata={"help": "How often each thing is done; the median is taken."})
    peft_adapters: int = field(default=400, metadata={"help": "Prompts that PEFT loads one after the other."})
    peft_loras: int = field(default=100, metadata={"help": "LoRAs that PEFT loads one after the other."})
    seed: int = field(default=42, metadata={"help": "Seed of weights, prompts and texts."})
    output_dir: str = field(default="outputs/bank", metadata={"help": "Folder for bank.json and bank.md."})


def memory() -> int:
    """Bytes of this process that are in no file, after what the allocator keeps for later was given back."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def seconds(calls: Iterable[Callable[[], object]]) -> float:
    """The median time of some calls."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_model(args: BankArguments) -> tuple[PeftModel, PromptBank]:
    """A model with an adapter, and an empty bank on another copy of the model."""
    settings = BenchmarkArguments(model_size=args.model_size, device="cpu", seed=args.seed)
    config = PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.prompt_length)
    return get_peft_model(load_base(settings), config), PromptBank(load_base(settings))


def make_first(args: BankArguments, folder: str) -> None:
    """Writes an adapter, and a bank of one prompt."""
    model, bank = make_model(args)
    model.save_pretrained(f"{folder}/adapter")
    bank.add(model, "first")
    bank.save(f"{folder}/one")


def make_bank(args: BankArguments, folder: str, count: int) -> float:
    """Writes a bank of `count` prompts, and returns the bytes that each needed in memory."""
    model, bank = make_model(args)
    encoder = model.base_model._layer().ptuning_encoders["default"]
    bank.add(model, "first")  # a first time reads code
    bank.delete("first")
    before = memory()
    for i in range(count):
        torch.nn.init.normal_(encoder.embedding)
        bank.add(model, f"task {i}")
    grown = (memory() - before) / count
    bank.save(folder)
    return grown


def measure_bank(args: BankArguments, folder: str, count: int) -> dict[str, float]:
    """Seconds of what is done with a bank of `count` prompts, and bytes that each needs."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    base = load_base(BenchmarkArguments(model_size=args.model_size, device="cpu", seed=args.seed))
    ids = torch.randint(base.config.vocab_size, (1, args.text_length))
    some = [f"task {i * max(1, count // args.repeats)}" for i in range(min(count, args.repeats))]

    def read(bank: PromptBank, name: str) -> None:
        with torch.no_grad():
            bank(input_ids=ids, adapter_names=[name])

    PromptBank.from_pretrained(base, f"{folder}/one").unload()
    before = memory()
    start = time.perf_counter()
    bank = PromptBank.from_pretrained(base, folder)
    found = {"opened": time.perf_counter() - start, "bytes of each, opened": (memory() - before) / count}
    read(bank, some[0])
    found["chosen for the first time"] = seconds(lambda name=name: read(bank, name) for name in some[1:] or some)
    found["chosen again"] = seconds(lambda name=name: read(bank, name) for name in some)
    adapter, new = f"{folder}/adapter", [f"new {i}" for i in range(args.repeats)]
    bank.add(adapter, "first")
    found["added"] = seconds(lambda name=name: bank.add(adapter, name) for name in new)
    found["deleted"] = seconds(lambda name=name: bank.delete(name) for name in new)
    return found


def measure_peft(args: BankArguments, folder: str, config: PeftConfig, count: int) -> dict[str, float]:
    """Seconds in which PEFT loads an adapter beside few others, and beside `count`."""
    base = load_base(BenchmarkArguments(model_size=args.model_size, device="cpu", seed=args.seed))
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    loads = [lambda i=i: model.load_adapter(folder, f"adapter {i}") for i in range(count)]
    few = min(10, count // 3)
    loads[0]()
    first = seconds(loads[1 : 1 + few])
    for load in loads[1 + few : -few]:
        load()
    return {"first": first, "last": seconds(loads[-few:]), "count": count}


def in_a_process(function: Callable, *arguments: object) -> Any:
    """Calls a function in a process of its own, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(args: BankArguments) -> dict[str, dict[str, dict[str, float]]]:
    banks = {}
    for count in args.prompts:
        with tempfile.TemporaryDirectory() as folder:
            in_a_process(make_first, args, folder)  # what writes a file leaves holes in memory
            grown = in_a_process(make_bank, args, folder, count)
            banks[str(count)] = {**in_a_process(measure_bank, args, folder, count), "bytes of each, added": grown}
    configs = {
        "prompt": (
            PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.prompt_length),
            args.peft_adapters,
        ),
        "LoRA": (LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=LORA_TARGETS["llama"]), args.peft_loras),
    }
    peft = {}
    for name, (config, count) in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            peft[name] = in_a_process(measure_peft, args, folder, config, count)
    return {"banks": banks, "peft": peft}


def write_tables(found: dict[str, dict], args: BankArguments, width: int) -> str:
    """The tables as Markdown."""
    counts = [str(count) for count in args.prompts]
    lines = [f"| time ÷ that of {counts[0]} | {' | '.join(counts)} |", "|---|" + "---|" * len(counts)]
    for what in found["banks"][counts[0]]:
        values = [found["banks"][count][what] for count in counts]
        if what.startswith("bytes"):
            numbers = 4 * args.prompt_length * width if what.endswith("added") else 0
            cells = [
                f"{value - numbers:,.0f}" if int(n) > 100 else "" for value, n in zip(values, counts, strict=True)
            ]
            what = what.replace("bytes", f"bytes beside its {numbers:,}" if numbers else "bytes")
        else:
            cells = [f"{value / values[0]:.2f}" for value in values]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    lines += ["", "| PEFT's `load_adapter` | beside N others ÷ beside few | N |", "|---|---|---|"]
    for name, values in found["peft"].items():
        lines.append(f"| a {name} | {values['last'] / values['first']:.1f} | {values['count']} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(BankArguments).parse_args_into_dataclasses(args=argv)
    settings = BenchmarkArguments(model_size=args.model_size, device="cpu", dtype="float32", seed=args.seed)
    base = load_base(settings)
    found = measure(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe_machine(base, settings), "settings": asdict(args), **found}
    (folder / "bank.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = write_tables(found, args, base.config.hidden_size)
    (folder / "bank.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
