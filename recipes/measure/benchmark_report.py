# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The reporting half of the benchmark: summarises what was measured, and writes numbers, tables and plots."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import peft
import torch
import transformers
from benchmark_cases import MEASURES, METHODS, NEW_TOKENS, BenchmarkArguments, Shape
from transformers import PreTrainedModel


try:
    from matplotlib.figure import Figure
except ImportError:  # a bare machine with a GPU: numbers and tables are written all the same
    Figure = None
if TYPE_CHECKING:
    from matplotlib.axes import Axes


AXES = {"batch_size": "batch size B", "text_length": "text length S", "prompt_length": "prompt length V"}
# What the picture of a whole run shows side by side.
OVERVIEW = ("train_step", "first_token", "train_memory")


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
    """Returns the results of one measure, by shape and method."""
    selected = {}
    for result in report["results"]:
        if result["measure"] == name:
            shape = Shape(*(result[key] for key in Shape._fields))
            selected.setdefault(shape, {})[result["method"]] = result
    return selected


def write_cell(result: dict, key: str = "to_base", with_absolute: bool = False) -> str:
    """Writes median and quartiles of a ratio, and with `with_absolute`, in front of them the measured median."""
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
    for name in settings["measures"]:
        lines += write_table(report, name)
    return "\n".join(lines) + "\n"


def write_table(report: dict, name: str) -> list[str]:
    """Returns the lines of a measure's table, and of the errors of the methods that fail."""
    settings, measure = report["settings"], MEASURES[name]
    is_cpu = settings["device"] == "cpu"
    methods = [method for method in settings["methods"] if method != "base" or not is_cpu]
    columns = {METHODS[method].label: (method, "to_base") for method in methods}
    if {"ptuning", "peft_ptuning"} <= set(methods):
        columns["this ÷ PEFT P-tuning" if measure.is_rate else "PEFT P-tuning ÷ this"] = ("ptuning", "stock_to_this")
    with_limit = name == "train_step" and "ptuning" in methods
    if with_limit:
        columns["this ÷ base"] = ("ptuning", "to_base")
    header = ["B", "S", "V", *columns, *(["limit of this ÷ base"] if with_limit else [])]
    lines = [f"\n## {measure.title} relative to the base\n"]
    lines += [f"{'More' if measure.is_rate else 'Less'} is better.\n"]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    failures = {}
    for shape, row in select(report, name).items():
        cells = list(map(str, shape))
        for title, (method, key) in columns.items():
            with_absolute = not is_cpu and title == METHODS[method].label
            compared = {method, "peft_ptuning"} if key == "stock_to_this" else {method}
            cells.append(write_cell(row[method], key, with_absolute) if compared <= row.keys() else "")
        cells += [f"{limit(shape, settings['architecture']):.3f}"] if with_limit else []
        lines.append(f"| {' | '.join(cells)} |")
        for method, result in row.items():
            if "error" in result:
                failures.setdefault(f"{METHODS[method].label} fails: {result['error']}", []).append(f"({shape})")
    return lines + [f"\n{text} {', '.join(shapes)}" for text, shapes in failures.items()]


def limit(shape: Shape, architecture: str) -> float:
    """Returns (text positions + prompt positions) / text positions: the least cost beside the base.

    A causal model computes the prompt once for a batch, an encoder computes it in every row.
    """
    rows = shape.batch_size if architecture == "llama" else 1
    return 1 + shape.prompt_length / (rows * shape.text_length)


def plot_lines(axis: str, name: str, report: dict, path: Path) -> None:
    """Plots a measure against one of B, S and V, with a panel for each pair of the two others.

    There is no plot if the shapes have one value only.
    """
    panels = {}
    for shape, row in select(report, name).items():
        panels.setdefault(shape._replace(**{axis: 0}), {})[getattr(shape, axis)] = row
    panels = {fixed: rows for fixed, rows in sorted(panels.items()) if len(rows) > 1}
    if not panels:
        return
    others = [key for key in AXES if key != axis]
    # A row of panels for each value of others[0].
    columns = min(4, len({getattr(fixed, others[1]) for fixed in panels}))
    rows_of_panels = -(-len(panels) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 6.5), 2.8 * rows_of_panels + 1.3), layout="constrained")
    grid = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    for axes, (fixed, rows) in zip(grid, panels.items()):
        for method in [method for method in report["settings"]["methods"] if method != "base"]:
            measured = {x: row[method] for x, row in sorted(rows.items()) if "raw" in row.get(method, {})}
            points = [(x, *result["to_base"]) for x, result in measured.items()]
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


def draw_bars(axes: Axes, rows: list[tuple[Shape, dict[str, dict]]], methods: list[str]) -> None:
    """Draws ratios to the base as bars, with a group for each shape and a colour for each method."""
    width = 0.8 / max(len(methods), 5)
    for j, method in enumerate(methods):
        x = np.arange(len(rows)) + (j - (len(methods) - 1) / 2) * width
        # A method that fails has no bar.
        heights = [row.get(method, {}).get("to_base", [0, 0])[1] for _, row in rows]
        axes.bar(x, heights, 0.92 * width, label=METHODS[method].label, color=METHODS[method].colour)
    axes.set_xticks(range(len(rows)), [str(shape).replace(", ", "\n") for shape, _ in rows])
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="base")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def plot_bars(name: str, report: dict, path: Path) -> None:
    """Plots a measure as bars, with a group for each shape, at most twelve in a line."""
    rows, per_line = list(select(report, name).items()), 12
    methods = [method for method in report["settings"]["methods"] if method != "base"]
    lines = -(-len(rows) // per_line)
    figure = Figure(figsize=(max(6.5, 1.1 * min(len(rows), per_line)), 2.8 * lines + 1.3), layout="constrained")
    grid = figure.subplots(lines, 1, squeeze=False, sharey=True).flatten()
    for i, axes in enumerate(grid):
        draw_bars(axes, rows[i * per_line : (i + 1) * per_line], methods)
        axes.set(xlim=(-0.6, min(len(rows), per_line) - 0.4), ylabel="ratio to the base")
    finish(figure, name, report, path)


def plot_overview(report: dict, path: Path) -> None:
    """Plots the measures of `OVERVIEW` side by side; there is no plot if one is missing or there are many shapes."""
    measured = [list(select(report, name).items()) for name in OVERVIEW]
    if not all(0 < len(rows) <= 6 for rows in measured):
        return
    methods = [method for method in report["settings"]["methods"] if method != "base"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    grid = figure.subplots(1, len(OVERVIEW), sharey=True)
    for axes, name, rows in zip(grid, OVERVIEW, measured):
        draw_bars(axes, rows, methods)
        axes.set_title(MEASURES[name].title, fontsize=11)
    grid[0].set_ylabel("ratio to the base")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(
        f"Relative to the base without a prompt (less is better)\n{report['machine']['title']}", fontsize=11
    )
    figure.savefig(path, dpi=150)


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
    plot(report, folder)


def plot(report: dict, folder: Path) -> None:
    """Writes the plots of a report, from its numbers alone; none where matplotlib is not installed."""
    if Figure is None:
        print("No plots: matplotlib is not installed. `--plot_folder` draws them later, from the numbers.")
        return
    plot_overview(report, folder / "overview.png")
    for name in report["settings"]["measures"]:
        if MEASURES[name].is_memory:
            plot_bars(name, report, folder / f"{name}.png")
        else:
            plot_lines("prompt_length", name, report, folder / f"{name}_by_prompt_length.png")
            plot_lines("batch_size", name, report, folder / f"{name}_by_batch_size.png")
