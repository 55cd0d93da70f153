# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Measures how far prompts of several lengths and both depths take the place of one context.

With no arguments: the front desk's context and SmolLM2-135M-Instruct. Other words go to the recipe as they are:

    pip install -e ".[recipes]"
    python recipes/measure/distill.py
    python recipes/measure/distill.py --lengths 16 32 --context_file manual.txt --inputs_file questions.jsonl

Every run is distill_context.py in a process of its own. The teacher answers in the first one, and the others find its
answers in the cache of `datasets`. Finished runs are not repeated: the command can be stopped and started again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmark_cases import BenchmarkArguments
from benchmark_report import describe_machine
from transformers import AutoConfig


RECIPE = Path(__file__).resolve().parents[1] / "distill_context.py"
WHERE = {"INPUT": "at the input", "DEEP": "in every layer"}
LEARNING_RATES = {"INPUT": 3e-2, "DEEP": 1e-2}


def run_recipe(depth: str, length: int, folder: Path, words: list[str]) -> dict:
    """The report of one prompt, from a run that is finished or from a new one."""
    output = folder / f"{depth.lower()}_{length}"
    file = output / "distillation.json"
    if not file.is_file():
        options = ["--prompt_depth", depth, "--num_virtual_tokens", str(length), "--output_dir", str(output)]
        options += ["--learning_rate", str(LEARNING_RATES[depth])]
        subprocess.run([sys.executable, str(RECIPE), "--report_to", "none", *options, *words], check=True)
    return json.loads(file.read_text(encoding="utf-8"))


def write_table(reports: list[dict]) -> str:
    """The reports as a Markdown table. What is untrained is the same in all of them, and taken from the first."""
    metrics, first = list(reports[0]["metrics"]["context"]), reports[0]
    shares = [name for name in metrics if first["recovered"][name] is not None]
    titles = ["in front of the input", "tokens", *metrics, *(f"of the way, {name}" for name in shares)]
    titles.append("prefill: context ÷ this")
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]

    def add(title: str, tokens: int, report: dict, case: str, ratio: str) -> None:
        found = report["metrics"][case]
        cells = [f"{found[name]:.3f}" if name == "kl" else f"{found[name]:.0%}" for name in metrics]
        cells += [f"{report['recovered'][name]:.1%}" if case == "prompt" else "" for name in shares]
        lines.append(f"| {title} | {tokens} | {' | '.join(cells)} | {ratio} |")

    add("nothing", 0, first, "nothing", "")
    for report in reports:
        ratio = f"{report['prefill_context_to_prompt']:.1f}"
        add(f"prompt {WHERE[report['prompt_depth']]}", report["num_virtual_tokens"], report, "prompt", ratio)
    add("the context", first["context_tokens"], first, "context", "1")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 20, 50], help="Lengths of the prompt, V.")
    parser.add_argument("--depths", nargs="+", default=list(WHERE), choices=list(WHERE), help="Depths of the prompt.")
    parser.add_argument("--output_dir", default="outputs/measure_distill", help="Folder for the runs and the table.")
    args, words = parser.parse_known_args(argv)
    folder = Path(args.output_dir)
    reports = [run_recipe(depth, length, folder, words) for depth in args.depths for length in args.lengths]
    config = AutoConfig.from_pretrained(folder / f"{args.depths[0].lower()}_{args.lengths[0]}")
    dtype = reports[0]["dtype"]
    machine = describe_machine(SimpleNamespace(config=config), BenchmarkArguments(device="cpu", dtype=dtype))
    (folder / "distill.json").write_text(json.dumps({"machine": machine, "results": reports}, indent=1) + "\n")
    table = write_table(reports)
    (folder / "distill.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
