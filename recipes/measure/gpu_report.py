# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What gpu.py writes: all numbers, tables, and plots, under names that begin with the card's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import benchmark_report
import numpy as np
import torch
from benchmark_cases import MEASURES, METHODS, Shape
from benchmark_report import plot_bars, plot_lines, quartiles, select, write_table


# Of each measure, what this package's own way is called where the alternative is concatenation.
OWN_WAY = {"train_step": "one pass", "prefill": "stored"}


def name_of(report: dict) -> str:
    """The card's name for files: letters, digits and underscores."""
    device = report["settings"]["device"]
    name = "cpu" if device == "cpu" else report["machine"]["device"]
    return re.sub(r"\W+", "_", name).strip("_").lower()


def file_of(report: dict, folder: Path) -> Path:
    return folder / f"{name_of(report)}.json"


def save(report: dict, folder: Path) -> None:
    """Writes numbers and tables."""
    folder.mkdir(parents=True, exist_ok=True)
    file = file_of(report, folder)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(write_tables(report), encoding="utf-8")


def of_size(report: dict, size: str) -> dict:
    """The report of one model, of the form that the benchmark's tables and plots read.

    Of a shape that was measured twice, the cell with more methods counts, whose results come last.
    """
    results = [result for result in report["results"] if result["model_size"] == size]
    results.sort(key=lambda result: (*(result[key] for key in Shape._fields), result["beside"]))
    measured = {key: {result[key] for result in results} for key in ("method", "measure")}
    settings = {**report["settings"], "architecture": "llama"}
    settings["methods"] = [name for name in METHODS if name in measured["method"]]
    settings["measures"] = [name for name in MEASURES if name in measured["measure"]]
    title = f"{size}, {report['machine']['device']}"
    return {**report, "settings": settings, "results": results, "machine": {**report["machine"], "title": title}}


def write_tables(report: dict) -> str:
    """The report in Markdown."""
    settings, machine, speed = report["settings"], report["machine"], report["speed"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"# {machine['device']}\n"]
    if settings["device"] == "cpu":
        lines.append("**Tried on a CPU with tiny shapes. The figures say that the script runs, and nothing else.**\n")
    lines.append(
        f"{machine['date']}, {versions}. {report['done']} of {report['planned']} cells of the plan in "
        f"{settings['minutes']:g} minutes. Medians of at most {settings['rounds']} interleaved rounds, quartiles in "
        f"brackets. A large product runs at {speed['flops'] / 1e12:.1f} TFLOP/s, a large copy at "
        f"{speed['bandwidth'] / 1e9:.0f} GB/s."
    )
    for entry in report["checks"]:
        lines.append(
            f"\n{entry['model_size']}: outputs differ from the base model's on the explicit concatenation by "
            f"{entry['difference']:.1e} at most; the prompt moves them by {entry['effect_of_the_prompt']:.1e}."
        )
    lines += [f"\nNo result: {entry['where']}: {entry['error']}" for entry in report["errors"]]
    sizes = list(dict.fromkeys(result["model_size"] for result in report["results"]))
    lines += ["\n## Which way is cheaper\n"]
    lines.append(
        "How many times as long as this package's own way concatenation takes, measured and by arithmetic. In "
        "training the own way is the packed pass, here at every shape. The package takes it where the share of "
        f"positions that it saves, times the width H, is at least {report['overhead']}.\n"
    )
    lines += write_ways(report, sizes)
    for size in sizes:
        part = of_size(report, size)
        for name in part["settings"]["measures"]:
            title, *table = write_table(part, name)
            lines += [title.replace("## ", f"## {size}: ", 1), *table]
            if not MEASURES[name].is_memory:
                lines += write_distances(part, name)
    return "\n".join([*lines, *write_routes(report)]) + "\n"


def write_ways(report: dict, sizes: list[str]) -> list[str]:
    """Lines of the table that sets this package's own way against concatenation."""
    lines = ["| model | step | B | S | V | own way, ms | concatenated, ms | ratio | by arithmetic | "]
    lines[0] += "share saved × H | cheaper |"
    lines += ["|---" * 11 + "|"]
    for size in sizes:
        for name, own_way in OWN_WAY.items():
            for shape, row in select(of_size(report, size), name).items():
                found = compare_ways(row)
                if found is None:
                    continue
                (low, median, high), least = found
                cheaper = own_way if low > 1 else "concatenated" if high < 1 else "within the noise"
                own, other = (1000 * row[key]["quartiles"][1] for key in ("ptuning", "ptuning_concatenated"))
                cells = [size, MEASURES[name].title.partition(":")[0], *map(str, shape), f"{own:.2f}", f"{other:.2f}"]
                cells += [f"{median:.2f} ({low:.2f}–{high:.2f})", f"{least:.2f}"]
                cells += [f"{share_saved(shape) * report['widths'][size]:.0f}", cheaper]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def share_saved(shape: Shape) -> float:
    """The share of the B·(V + S) positions of concatenation that one prompt for all rows saves."""
    rows, text, length = shape
    return (rows - 1) * length / (rows * (text + length))


def compare_ways(row: dict[str, dict]) -> tuple[list[float], float] | None:
    """Quartiles of concatenation ÷ own way, and what arithmetic says; `None` if one of them was not measured."""
    own, other = (row.get(name, {}) for name in ("ptuning", "ptuning_concatenated"))
    if "raw" not in own or "raw" not in other or len(own["raw"]) != len(other["raw"]):
        return None
    ratios = np.array(other["raw"]) / np.array(own["raw"])
    return quartiles(ratios), other["least_seconds"] / own["least_seconds"]


def write_distances(part: dict, name: str) -> list[str]:
    """Lines of a table of the distance to the least time."""
    methods = part["settings"]["methods"]
    lines = ["\nTimes the least that the device's own speed allows:\n"]
    lines += [f"| B | S | V | {' | '.join(METHODS[method].label for method in methods)} |"]
    lines += ["|---" * (3 + len(methods)) + "|"]
    for shape, row in select(part, name).items():
        cells = [write_distance(row.get(method, {})) for method in methods]
        lines.append(f"| {' | '.join(map(str, shape))} | {' | '.join(cells)} |")
    return lines


def write_distance(result: dict) -> str:
    return f"{result['quartiles'][1] / result['least_seconds']:.2f}" if "least_seconds" in result else ""


def write_routes(report: dict) -> list[str]:
    """Lines that say which way each method's prompt went."""
    routes: dict[str, set[str]] = {}
    for result in report["results"]:
        if result.get("route") is not None:
            routes.setdefault(result["route"], set()).add(METHODS[result["method"]].label)
    return ["\n## Routes\n", *(f"- {route}: {', '.join(sorted(labels))}" for route, labels in routes.items())]


def draw(report: dict, folder: Path) -> None:
    """Writes the plots of a report, from its numbers alone; none where matplotlib is not installed."""
    if benchmark_report.Figure is None:
        print("No plots: matplotlib is not installed. `--draw FILE` draws them later, from the numbers.")
        return
    for size in dict.fromkeys(result["model_size"] for result in report["results"]):
        part, begin = of_size(report, size), folder / f"{name_of(report)}_{size}"
        for name in part["settings"]["measures"]:
            if MEASURES[name].is_memory:
                plot_bars(name, part, Path(f"{begin}_{name}.png"))
                continue
            plot_lines("batch_size", name, part, Path(f"{begin}_{name}_by_batch_size.png"))
            plot_lines("text_length", name, part, Path(f"{begin}_{name}_by_text_length.png"))
        draw_ways(part, Path(f"{begin}_ways.png"))


def draw_ways(part: dict, path: Path) -> None:
    """Draws concatenation ÷ own way against what arithmetic says, a point for each shape."""
    points = {}
    for name in OWN_WAY:
        found = {shape: compare_ways(row) for shape, row in select(part, name).items()}
        points[name] = {shape: compared for shape, compared in found.items() if compared is not None}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return
    figure = benchmark_report.Figure(figsize=(5.5 * len(points), 4.5), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items()):
        for shape, ((low, median, high), least) in found.items():
            axes.errorbar(least, median, [[median - low], [high - median]], marker="o", color="#0072B2", capsize=2)
            axes.annotate(label(shape), (least, median), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.axline((1, 1), slope=1, color="grey", linewidth=1)
        axes.set(xlabel="by arithmetic", ylabel=f"concatenated ÷ {OWN_WAY[name]}", title=MEASURES[name].title)
        axes.grid(alpha=0.25)
    figure.suptitle(f"Concatenation beside this package's own way (B,S,V)\n{part['machine']['title']}", fontsize=11)
    figure.savefig(path, dpi=150)


def label(shape: Shape) -> str:
    return ",".join(map(str, shape))


def device_name(device: str, cpu: str) -> str:
    return cpu if device == "cpu" else torch.cuda.get_device_name(device)
