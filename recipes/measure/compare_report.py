# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The reporting half of the comparison: tables and a plot."""

from pathlib import Path
from statistics import mean, stdev

from compare_cases import CHANGES, METHODS, TRAINED
from matplotlib.figure import Figure


def make_table(rows: list[dict]) -> str:
    """Writes the rows as Markdown: mean ± standard deviation of the seeds, and the worst.

    "head → LoRA" says how much of the way from the score of the head alone to that of LoRA a method goes. Metrics that
    are shown besides are means of the seeds.
    """
    others = list(dict.fromkeys(name for row in rows for name in row.get("others", ())))
    titles = ["task", "method", "mean ± std (worst) of seeds", "head → LoRA", *others, "learning rate", "trained"]
    lines = [f"| {' | '.join([*titles, 'deployed'])} |", f"|{'---|' * (len(titles) + 1)}"]
    by_key = {(row["task"], row["method"]): row for row in rows}
    for row in rows:
        name = _full_name(row["method"])
        if "error" in row:
            lines.append(f"| {row['task']}, {row['metric']} | {name} | {row['error']} |{' |' * (len(titles) - 2)}")
            continue
        scores = row["scores"]
        head, lora = (by_key.get((row["task"], method), {}) for method in ("head", "lora"))
        # If the task has no head to train, the way begins at the score of the untrained model: LoRA's before training.
        has_no_head = "error" in head or not lora.get("has_head", True)
        start = head.get("scores") or (has_no_head and lora.get("scores_before"))
        way = ""
        if start and "scores" in lora and mean(lora["scores"]) != mean(start):
            way = f"{(mean(scores) - mean(start)) / (mean(lora['scores']) - mean(start)):.0%}"
        beside = [_mean_of(row, other, "after") for other in others]
        cells = [f"{row['task']}, {row['metric']}", name, f"{_describe(scores)} of {len(scores)}", way, *beside]
        cells += [f"{row['learning_rate']:g}", f"{row['trained_parameters']:,}", f"{row['deployed_parameters']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
        if row["method"] == "lora" and not row.get("has_head", True):  # before training, LoRA changes nothing
            beside = [_mean_of(row, other, "before") for other in others]
            cells = [f"{row['task']}, {row['metric']}", "without training", f"{mean(row['scores_before']):.1%}", ""]
            lines.append(f"| {' | '.join([*cells, *beside, '', '', ''])} |")
    return "\n".join(lines)


def _mean_of(row: dict, name: str, when: str) -> str:
    """The mean of one of a row's other metrics, `""` if it has none of this name."""
    values = row.get("others", {}).get(name, {}).get(when)
    return f"{mean(values):.1f}" if values else ""


def make_ablation_table(rows: list[dict]) -> str:
    """Writes the rows as Markdown, with a column per task: mean ± standard deviation of the seeds, and the worst."""
    plain = [row for row in rows if row["method"] in METHODS]
    columns = {row["task"]: f"{row['task']}, {row['metric']}, rate {row['learning_rate']:g}" for row in plain}
    cells = {(row["task"], row["method"]): row.get("error") or _describe(row["scores"]) for row in rows}
    lines = [["change", *columns.values()], ["---"] * (1 + len(columns))]
    for method in dict.fromkeys(row["method"] for row in rows):
        name = "none" if method in METHODS else TRAINED[method].name
        lines.append([name, *(cells[task, method] for task in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _full_name(method: str) -> str:
    """The name of a method, also where no other row says what a change changes."""
    changed = next((name for name, changes in CHANGES.items() if method in changes), None)
    return TRAINED[method].name if changed is None else f"{METHODS[changed].name}, {TRAINED[method].name}"


def _describe(scores: list[float]) -> str:
    spread = f" ± {stdev(scores):.1%}" if len(scores) > 1 else ""
    return f"{mean(scores):.1%}{spread} ({min(scores):.1%})"


def plot(rows: list[dict], path: Path) -> None:
    """Draws a panel per task, with a point for each seed and a bar at their mean."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(1 + 3 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        measured = [row for row in rows if row["task"] == task and "scores" in row]
        for x, row in enumerate(measured):
            axes.plot([x] * len(row["scores"]), row["scores"], "o", markersize=4, alpha=0.6, color="C0")
            axes.plot([x - 0.3, x + 0.3], [mean(row["scores"])] * 2, color="C0")
        names = [TRAINED[row["method"]].name for row in measured]
        axes.set_xticks(range(len(measured)), names, rotation=60, ha="right")
        axes.set(title=task, ylabel=measured[0]["metric"] if measured else "")
    figure.savefig(path, dpi=150)
