# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Measures the time and memory of this package beside stock PEFT's methods and the base model without a prompt.

All methods adapt the same frozen model of random weights in one process. A round runs each method once, in shuffled
order. The tables have medians and quartiles of the ratios within a round, so that a machine which becomes slower or
faster from round to round does not change them. With no arguments, four shapes are measured on a Llama of 6 layers and
width 512, and tables and plots are written to `outputs/benchmark`:

    pip install -e ".[recipes]"
    python recipes/measure/benchmark.py

The grid, chosen shapes, an encoder, a GPU:

    python recipes/measure/benchmark.py --batch_sizes 1 4 16 32 --text_lengths 32 128 512 --prompt_lengths 8 20 50 100
    python recipes/measure/benchmark.py --shapes 16,32,100 --methods ptuning peft_ptuning --measures train_step
    python recipes/measure/benchmark.py --architecture bert
    python recipes/measure/benchmark.py --model_size 1b --dtype bfloat16 --device cuda

What is measured:

- `train_step`: forward and backward of the loss, without an optimizer. The base has nothing to train. For it the
  gradients go back to the input embeddings, through all layers, which is the least that any prompt needs.
- `prefill` (`forward` for an encoder): no gradients. A causal model fills its cache and computes the last logits. This
  package has the prompt's keys and values from an earlier call.
- `first_token`, `tokens_per_second`: greedy `generate` of 1 and of 64 tokens, with the prefill.
- `train_memory`, `generate_memory`: how far memory rises during the first such step. Model and adapter are loaded
  before it, the prompt's keys and values are not yet computed, and there is no optimizer. On a GPU this is allocated
  memory. On a CPU it is the resident set (`VmHWM` after the step, `VmRSS` before it), in a fresh process for each
  method and shape. `ALLOCATOR` has settings of glibc, without which the peak depends on freed memory that it keeps.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from benchmark_cases import MEASURES, BenchmarkArguments, Shape, complete
from benchmark_report import describe_machine, plot, save, summarise
from benchmark_runs import adapt, check, failure, load_base, make_batch, measure_memory, peak_memory, time_methods
from tqdm import tqdm
from transformers import HfArgumentParser


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(args=argv)
    if args.plot_folder:
        folder = Path(args.plot_folder)
        plot(json.loads((folder / "benchmark.json").read_text(encoding="utf-8")), folder)
        return
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
