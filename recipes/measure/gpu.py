# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Measures this package on a GPU within a given time, the most important figures first.

Llamas of three sizes with random weights in bfloat16, adapted by this package in each of its ways, by stock PEFT and
by LoRA. Every figure is absolute (CUDA events, medians of interleaved rounds), relative to the base, and beside the
least time that the card's own speed at a large product and a large copy allows. Files are written after every cell of
the plan, so that a run which is cut off leaves what it has. matplotlib is needed for the plots only:

    python recipes/measure/gpu.py                          # six minutes, to outputs/gpu
    python recipes/measure/gpu.py --minutes 30 --model_sizes 8b
    python recipes/measure/gpu.py --draw outputs/gpu/nvidia_h200.json
    python recipes/measure/gpu.py --device cpu --tiny      # tries the script, and measures nothing

The plan, in this order:

1. which way is cheaper for the smallest model: the prompt in one packed pass (training) or stored (prefill), or
   concatenated in every row, at every shape. The packed pass is taken even where the package would not take it;
2. all methods at two usual shapes, for every size: training step with its memory, prefill, first token; and some of
   them generating, at one shape;
3. the first question for the other sizes;
4. other attention implementations, where they are installed;
5. all that is left.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark_cases import MEASURES, OTHER_ATTENTION, BenchmarkArguments, Measure, Shape
from benchmark_report import describe_machine, summarise
from benchmark_runs import SIZES, adapt, check, first_line, load_base, make_batch, prepare, time_methods
from gpu_report import device_name, draw, file_of, save
from roofline import Speed, least_seconds, measure_speed
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel

from peft_ptuning_ext.forward import one_pass


WAYS = ("base", "ptuning", "ptuning_concatenated")
EVERY = (*WAYS, "ptuning_deep", "peft_ptuning", "peft_prefix", "lora")
GENERATING = (*WAYS, "ptuning_deep", "peft_ptuning")
MEASURED = ("train_step", "prefill", "first_token", "tokens_per_second")
MEMORY_OF = {"train_step": "train_memory", "tokens_per_second": "generate_memory"}
USUAL = (Shape(4, 512, 20), Shape(16, 128, 100))
# No further round of a cell begins after so many seconds.
ENOUGH = 4.0


@dataclass
class GpuArguments:
    """What is measured, and for how long."""

    minutes: float = field(default=6.0, metadata={"help": "After so many minutes no step begins."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    tiny: bool = field(default=False, metadata={"help": "A tiny model and tiny shapes, to try the script."})
    model_sizes: list[str] | None = field(default=None, metadata={"help": "See SIZES. Default: 1b 8b 3b"})
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "B. Default: 1 4 16"})
    text_lengths: list[int] | None = field(default=None, metadata={"help": "S. Default: 128 512 2048"})
    prompt_lengths: list[int] | None = field(default=None, metadata={"help": "V. Default: 20 100"})
    rounds: int = field(default=5, metadata={"help": "How often each method is timed, at most."})
    seed: int = field(default=42, metadata={"help": "Seed of weights, texts and the order within a round."})
    output_dir: str = field(default="outputs/gpu", metadata={"help": "Folder for numbers, tables and plots."})
    draw: str | None = field(default=None, metadata={"help": "Draw the plots of this file of numbers, and stop."})


class Cell(NamedTuple):
    """A part of the plan: what is measured at once, its methods taking turns."""

    model_size: str
    shape: Shape
    measure: str
    methods: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model_size}, {self.shape}, {self.measure}"


def complete(args: GpuArguments) -> list[Shape]:
    """Checks the arguments, fills in the defaults that depend on others, and returns the shapes."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device != "cpu" and not args.device.startswith("cuda"):
        raise ValueError(f"`--device` is cpu or cuda, got {args.device!r}.")
    if args.minutes <= 0 or args.rounds < 1:
        raise ValueError(f"`--minutes` must be above 0 and `--rounds` at least 1, got {args.minutes}, {args.rounds}.")
    args.model_sizes = args.model_sizes or (["tiny"] if args.tiny else ["1b", "8b", "3b"])
    args.batch_sizes = args.batch_sizes or ([1, 2] if args.tiny else [1, 4, 16])
    args.text_lengths = args.text_lengths or ([8] if args.tiny else [128, 512, 2048])
    args.prompt_lengths = args.prompt_lengths or ([3] if args.tiny else [20, 100])
    shapes = [Shape(b, s, v) for v in args.prompt_lengths for b in args.batch_sizes for s in args.text_lengths]
    if wrong := [tuple(shape) for shape in shapes if min(shape) < 1]:
        raise ValueError(f"B, S and V must be at least 1, got {wrong}.")
    return shapes


def plan(model_sizes: list[str], shapes: list[Shape], others: tuple[str, ...] = ()) -> list[Cell]:
    """All cells, in the order of their importance.

    Args:
        model_sizes (`list[str]`): The most important one first.
        shapes (`list[Shape]`): All of them.
        others (`tuple[str, ...]`): Methods under other attention implementations.
    """
    first, *further = model_sizes
    usual = [shape for shape in USUAL if shape in shapes] or shapes[:1]
    ways = ("train_step", "prefill")
    cells = [Cell(first, shape, name, WAYS) for name in ways for shape in shapes]
    for size in model_sizes:
        cells += [Cell(size, shape, name, EVERY) for name in MEASURED[:3] for shape in usual]
        cells += [Cell(size, usual[0], "tokens_per_second", GENERATING)]
    cells += [Cell(size, shape, name, WAYS) for size in further for name in ways for shape in shapes]
    if others:
        cells += [Cell(size, shape, name, EVERY + others) for size in model_sizes for name in ways for shape in usual]
    cells += [Cell(size, shape, name, EVERY) for size in model_sizes for name in MEASURED for shape in shapes]
    return list(dict.fromkeys(cells))


def available(device: str) -> tuple[str, ...]:
    """The methods of the attention implementations that run on a GPU here, tried on a tiny model."""
    if device == "cpu":
        return ()
    found = []
    for name in OTHER_ATTENTION:
        try:
            args = BenchmarkArguments(model_size="tiny", device=device, dtype="bfloat16")
            model = adapt(base := load_base(args), f"base_{name}", 1, args)
            with torch.no_grad():
                model(**make_batch(base, Shape(1, 16, 1), args)[0])
            found += [f"base_{name}", f"ptuning_{name}"]
        except Exception as error:  # whatever an implementation that is not installed raises
            print(f"{name} does not run here: {first_line(error)}")
    return tuple(found)


class Models:
    """The models of a cell. Bases stay; adapted ones are kept as long as size and prompt length do."""

    def __init__(self, args: GpuArguments):
        self._bases: dict[str, tuple[PreTrainedModel, BenchmarkArguments] | None] = {}
        self._adapted: dict[str, nn.Module] = {}
        self._of: tuple | None = None
        self._args = args

    def base(self, size: str) -> tuple[PreTrainedModel, BenchmarkArguments]:
        """A base model, and the arguments that it was made by.

        Raises:
            RuntimeError: It could not be made before, for want of memory.
        """
        if size not in self._bases:
            self._bases[size] = None
            dtype = "float32" if self._args.device == "cpu" else "bfloat16"
            of = BenchmarkArguments(model_size=size, device=self._args.device, dtype=dtype, rounds=self._args.rounds)
            of.warmup, of.seed = 0, self._args.seed  # a first step has warmed up
            self._bases[size] = load_base(of), of
        if (found := self._bases[size]) is None:
            raise RuntimeError(f"the model {size} can't be made")
        return found

    def find(self, size: str, prompt_length: int, method: str) -> nn.Module:
        """A model with an adapter."""
        if self._of != (size, prompt_length):
            self._of, self._adapted = (size, prompt_length), {}
            gc.collect()
        if method not in self._adapted:
            base, of = self.base(size)
            self._adapted[method] = adapt(base, method, prompt_length, of)
        return self._adapted[method]


def first_step(measure: Measure, model: nn.Module, batch: tuple, device: str) -> int | None:
    """Runs a step, which also warms up. Returns how far allocated memory rose, in bytes; on a CPU it is not known."""
    prepare(model, measure)
    if device == "cpu":
        measure.step(model, *batch)
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    measure.step(model, *batch)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def try_methods(cell: Cell, models: Models, batch: tuple, device: str, deadline: float) -> tuple[dict, dict, dict]:
    """Makes the models of a cell and runs each once. Returns models, bytes and errors by method."""
    fit, sizes, errors = {}, {}, {}
    for method in cell.methods:
        if time.monotonic() > deadline:
            raise TimeoutError("The time was up before each method had run once.")
        try:
            model = models.find(cell.model_size, cell.shape.prompt_length, method)
            sizes[method] = first_step(MEASURES[cell.measure], model, batch, device)
            fit[method] = model
        except Exception as error:
            errors[method] = first_line(error)
            if not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exc()
    return fit, sizes, errors


def run_cell(cell: Cell, models: Models, speed: Speed, device: str, deadline: float) -> list[dict]:
    """Measures a cell.

    Raises:
        TimeoutError: The time was up before it was done.
    """
    base, of = models.base(cell.model_size)
    batch = make_batch(base, cell.shape, of)
    fit, sizes, errors = try_methods(cell, models, batch, device, deadline)
    if "base" not in fit:
        raise RuntimeError(f"the base fails: {errors['base']}")
    routes = {method: getattr(model, "prompt_route", None) for method, model in fit.items()}
    seconds, failed = time_methods(MEASURES[cell.measure], fit, batch, of, ENOUGH, deadline)
    results = summarise(cell.measure, cell.shape, seconds, {**errors, **failed})
    for result in results:
        if "raw" in result:
            least = least_seconds(base.config, cell.measure, cell.shape, result["method"], speed)
            result |= {"least_seconds": least, "route": routes[result["method"]]}
    peaks = {method: [size] for method, size in sizes.items() if size is not None}
    if cell.measure in MEMORY_OF and peaks:
        results += summarise(MEMORY_OF[cell.measure], cell.shape, peaks, errors)
    return [{"model_size": cell.model_size, "beside": len(cell.methods), **result} for result in results]


def check_size(size: str, models: Models) -> dict:
    """Compares this package's outputs with those of the base model on the concatenation."""
    base, of = models.base(size)
    batch = make_batch(base, shape := Shape(2, 64, 20), of)
    found = check(adapt(base, "base", 1, of), adapt(base, "ptuning", shape.prompt_length, of), batch[0], of)
    return {"model_size": size, **shape._asdict(), **found}


def guarded(report: dict, what: object, function: Callable, *args) -> object:
    """What a function returns; an error is noted in the report and printed, and the run goes on."""
    try:
        return function(*args)
    except TimeoutError:
        return None
    except Exception as error:
        report["errors"].append({"where": str(what), "error": first_line(error)})
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        return None


@contextlib.contextmanager
def always_packed() -> Iterator[None]:
    """The packed pass in training, however little it saves: where it pays is the question."""
    before, one_pass.OVERHEAD = one_pass.OVERHEAD, 0
    try:
        yield
    finally:
        one_pass.OVERHEAD = before


def until(deadline: float, cells: list[Cell]) -> Iterator[Cell]:
    for cell in cells:
        if time.monotonic() > deadline:
            return
        yield cell


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    (args,) = HfArgumentParser(GpuArguments).parse_args_into_dataclasses(args=argv)
    if args.draw:
        draw(json.loads(Path(args.draw).read_text(encoding="utf-8")), Path(args.draw).parent)
        return
    shapes, deadline = complete(args), began + 60 * args.minutes
    models = Models(args)
    base, of = models.base(args.model_sizes[0])
    others = available(args.device)
    speed = measure_speed(args.device, base.dtype)
    cells = plan(args.model_sizes, shapes, others)
    machine = describe_machine(base, of)
    machine["device"] = device_name(args.device, machine["cpu"])
    report = {"settings": asdict(args), "machine": machine, "speed": asdict(speed), "overhead": one_pass.OVERHEAD}
    report["widths"] = {size: SIZES[size][1] for size in args.model_sizes}
    report |= {"planned": len(cells), "done": 0, "checks": [], "errors": [], "results": []}
    folder = Path(args.output_dir)
    with always_packed():
        run_plan(cells, models, report, speed, args, deadline)
    draw(report, folder)
    print(f"{report['done']} of {report['planned']} cells are in {file_of(report, folder)}")


def run_plan(
    cells: list[Cell], models: Models, report: dict, speed: Speed, args: GpuArguments, deadline: float
) -> None:
    """Measures cells until the time is up, and writes the report after each."""
    folder, checked = Path(args.output_dir), set()
    for cell in until(deadline, cells):
        if cell.model_size not in checked:
            checked.add(cell.model_size)
            if found := guarded(report, f"check of {cell.model_size}", check_size, cell.model_size, models):
                report["checks"].append(found)
        results = guarded(report, cell, run_cell, cell, models, speed, args.device, deadline)
        if results is not None:
            report["results"] += results
            report["done"] += 1
        save(report, folder)  # after every cell: a run may be cut off
        left = max(0, math.ceil(deadline - time.monotonic()))
        print(f"{'measured' if results is not None else 'no result'}: {cell} ({left} s left)", flush=True)
    save(report, folder)


if __name__ == "__main__":
    main()
