# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
r"""Trains every method on the same tasks, steps and batches, and writes a table and a plot of what each has learned.

    python recipes/measure/compare.py --data_folder DATA --tasks sst2 banking77 wnut17 squad
    python recipes/measure/compare.py --data_folder DATA --tasks sst2 banking77 --ablation
    python recipes/measure/compare.py --data_folder DATA --tasks sst2 banking77 --ablation ptuning_deep
    python recipes/measure/compare.py --data_folder DATA --tasks e2e_nlg --model_name_or_path FOLDER \
        --output_dir outputs/compare_e2e_nlg

DATA holds a folder for each task with JSON lines in the columns that its recipe takes by default: sst2/train.jsonl,
sst2/test.jsonl and so on. Without `--data_folder`, the methods are compared on the data of text_classification.py.

For each method, the learning rate is chosen from one grid, on rows of the training file that are held out for it, or
it is the only one that is given. Each seed then trains on all training rows at that rate, and is measured once on the
test file. With `--ablation`, plain vectors (or a plain deep prompt) are compared with one change of their recipe at a
time. Rate and scores then are those of the held-out rows, so that the test file decides nothing.

Every run is a recipe in a process of its own, with one thread, and as many run at the same time as there are cores.
Finished runs are not repeated: the command can be stopped and started again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from compare_cases import CHANGES, METHODS, OF_LANGUAGE_MODELS, SPEECH_ACTS, TASKS, TRAINED, Method, Task
from compare_report import make_ablation_table, make_table, plot


RECIPES = Path(__file__).resolve().parents[1]
DATA = RECIPES / "data"


def make_splits(source: Path, folder: Path, task: Task, args: argparse.Namespace) -> None:
    """Writes the files of a comparison: train and test, and search_train and search_test for the learning rate.

    Raises:
        ValueError: `folder` holds runs with other settings, which do not belong into the same table.
    """
    names = ("model_name_or_path", "num_virtual_tokens", "held_out_rows", "use_cpu")
    settings = {name: getattr(args, name) for name in names}
    test_rows = args.test_rows or task.test_rows
    settings |= {"max_steps": args.max_steps or task.steps, "test_rows": test_rows, **task.options}
    if args.recipe_options:
        settings["recipe_options"] = args.recipe_options
    noted = folder / "settings.json"
    if noted.is_file():
        found = json.loads(noted.read_text(encoding="utf-8"))
        different = [name for name in settings if found.get(name) != settings[name]]
        if different:
            raise ValueError(
                f"{folder} holds runs with "
                f"{', '.join(f'{name}={found.get(name)!r} (now {settings[name]!r})' for name in different)}: "
                "give another `--output_dir`."
            )
        return
    train = _read_lines(source / "train.jsonl")
    test = _read_lines(source / task.test)
    order = random.Random(0).sample(train, len(train))
    held_out_rows = min(args.held_out_rows, len(train) // 4)
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "train.jsonl", train)
    _write_lines(folder / "test.jsonl", test if test_rows is None else _spread(test, test_rows, task.neighbours))
    _write_lines(folder / "search_train.jsonl", order[held_out_rows:])
    _write_lines(folder / "search_test.jsonl", order[:held_out_rows])
    noted.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}: `--data_folder` should hold a folder for each of the tasks.")
    return path.read_text(encoding="utf-8").splitlines()


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _spread(lines: list[str], count: int, size: int) -> list[str]:
    """Returns about `count` lines, in evenly spread groups of `size`."""
    if len(lines) <= count:
        return lines
    size = min(size, count)
    groups = count // size
    starts = [int(i * (len(lines) - size) / max(1, groups - 1)) for i in range(groups)]
    return [line for start in starts for line in lines[start : start + size]]


@dataclass(frozen=True)
class Run:
    """One training of a recipe."""

    task: str
    method: str
    learning_rate: float
    seed: int
    is_search: bool

    def folder(self, output: Path) -> Path:
        kind = "search" if self.is_search else "test"
        return output / self.task / self.method / f"{kind}-lr{self.learning_rate:g}-seed{self.seed}"


def train(run: Run, task: Task, args: argparse.Namespace) -> dict | None:
    """Runs a recipe if that is not done yet. Returns its `metrics.json`, or `None` if the recipe fails."""
    output = Path(args.output_dir)
    folder = run.folder(output)
    error = folder / "error.txt"
    if not (folder / "metrics.json").is_file():
        error.unlink(missing_ok=True)
        reason = _train_in_turn(run, task, args)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        if reason is not None:
            folder.mkdir(parents=True, exist_ok=True)
            error.write_text(reason + "\n", encoding="utf-8")
            print(f"{folder.relative_to(output)}: {reason}\n", end="", flush=True)
            return None
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print(f"{folder.relative_to(output)}: {task.metric} {task.score(metrics):.4f}\n", end="", flush=True)
    return metrics


def _train_in_turn(run: Run, task: Task, args: argparse.Namespace) -> str | None:
    """Trains a method, and before it the one that it starts from. Returns the reason if a recipe fails."""
    folder, steps = run.folder(Path(args.output_dir)), args.max_steps or task.steps
    method = TRAINED[run.method]
    if method.first is None:
        return _run_recipe(run, task, args, method, folder, steps)
    start, half = folder / "first", steps // 2
    reason = _run_recipe(run, task, args, TRAINED[method.first], start, half)
    if reason is not None:
        return reason
    # Other batches than those that the first half began with.
    second = method.options | {"prompt_tuning_init_adapter": start, "data_seed": 1000 + run.seed}
    return _run_recipe(run, task, args, replace(method, options=second), folder, steps - half)


def _run_recipe(
    run: Run, task: Task, args: argparse.Namespace, method: Method, folder: Path, steps: int
) -> str | None:
    """Runs a recipe in a process of its own. Returns the reason if it fails."""
    files, prefix = Path(args.output_dir) / run.task, "search_" if run.is_search else ""
    options = {
        "train_file": files / f"{prefix}train.jsonl",
        "validation_file": files / f"{prefix}test.jsonl",
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "num_virtual_tokens": args.num_virtual_tokens,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "bf16": True,
        "use_cpu": args.use_cpu,
        "disable_tqdm": True,
        **task.options,
        **method.options,
    }
    if args.model_name_or_path:
        options["model_name_or_path"] = args.model_name_or_path
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))] + args.recipe_options
    done = subprocess.run(
        [sys.executable, str(RECIPES / f"{task.recipe}.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    # A process that a signal has killed (a status below 0) has written no reason.
    lines = done.stderr.strip().splitlines() if done.returncode > 0 else []
    return (lines or [f"ended with status {done.returncode}"])[-1]


def train_all(runs: list[Run], tasks: dict[str, Task], args: argparse.Namespace) -> dict[Run, dict | None]:
    """Trains all runs, as many at the same time as there are workers."""
    with ThreadPoolExecutor(args.workers) as pool:
        return dict(zip(runs, pool.map(lambda run: train(run, tasks[run.task], args), runs), strict=True))


def search(
    pairs: list[tuple[str, str]], tasks: dict[str, Task], args: argparse.Namespace
) -> dict[tuple[str, str], dict[float, list[float]]]:
    """Returns the scores on the held-out rows by task and method: a list, one score per seed, for each rate.

    Rates at which a recipe fails are left out. A single rate is not tried, since there is nothing to choose.
    """
    rates = {task: args.learning_rates or tasks[task].learning_rates for task, _ in pairs}
    runs = [
        Run(task, method, rate, seed, True)
        for task, method in pairs
        if len(rates[task]) > 1
        for rate in rates[task]
        for seed in range(args.search_seeds or tasks[task].search_seeds)
    ]
    scores = {(task, name): {} if len(rates[task]) > 1 else {rates[task][0]: []} for task, name in pairs}
    for run, metrics in train_all(runs, tasks, args).items():
        if metrics is not None:
            scores[run.task, run.method].setdefault(run.learning_rate, []).append(tasks[run.task].score(metrics))
    return scores


def compare(tasks: dict[str, Task], args: argparse.Namespace) -> list[dict]:
    """Runs what is missing and returns one row per task and method."""
    searched = search([(task, method) for task in tasks for method in args.methods], tasks, args)
    return _measure(searched, {pair: _best(rates) for pair, rates in searched.items()}, False, tasks, args)


def ablate(tasks: dict[str, Task], args: argparse.Namespace) -> list[dict]:
    """Runs what is missing and returns one row per task and change of `--ablation`, on the held-out rows.

    Raises:
        ValueError: A task can't be trained even without a change.
    """
    changed = args.ablation
    searched = search([(task, changed) for task in tasks], tasks, args)
    refused = next((task for (task, _), rates in searched.items() if not rates), None)
    if refused is not None:
        raise ValueError(f"{refused}: {_read_error(refused, changed, args)}")
    rates = {(task, name): _best(searched[task, changed]) for task in tasks for name in (changed, *CHANGES[changed])}
    return _measure(searched, rates, True, tasks, args)


def _best(scores: dict[float, list[float]]) -> float | None:
    return next(iter(scores)) if len(scores) == 1 else max(scores, key=lambda rate: mean(scores[rate]), default=None)


def _measure(
    searched: dict[tuple[str, str], dict[float, list[float]]],
    rates: dict[tuple[str, str], float | None],
    is_search: bool,
    tasks: dict[str, Task],
    args: argparse.Namespace,
) -> list[dict]:
    """Trains each task and method of `rates` at its rate with all seeds, and returns a row for each."""
    seeds = {task: range(args.seeds or tasks[task].seeds) for task in tasks}
    runs = {
        (task, method): [Run(task, method, rate, seed, is_search) for seed in seeds[task]]
        for (task, method), rate in rates.items()
        if rate is not None
    }
    measured = train_all([run for group in runs.values() for run in group], tasks, args)
    rows = []
    for task, method in rates:
        row = {"task": task, "method": method, "metric": tasks[task].metric}
        found = [measured[run] for run in runs.get((task, method), [])]
        if not found or None in found:
            row["error"] = _read_error(task, method, args)
        else:
            row |= {
                "learning_rate": rates[task, method],
                "search": {str(rate): scores for rate, scores in searched.get((task, method), {}).items()},
                "scores": [tasks[task].score(metrics) for metrics in found],
                "scores_before": [tasks[task].score(metrics, "before") for metrics in found],
                "others": {
                    name: {when: [metrics[when][name] for metrics in found] for when in ("before", "after")}
                    for name in tasks[task].others
                },
                "has_head": tasks[task].recipe != "causal_lm",
                "trained_parameters": found[0]["trained_parameters"],
                "deployed_parameters": found[0]["deployed_parameters"],
            }
        rows.append(row)
    return rows


def _read_error(task: str, method: str, args: argparse.Namespace) -> str:
    errors = sorted((Path(args.output_dir) / task / method).glob("*/error.txt"))
    return errors[0].read_text(encoding="utf-8").strip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", type=Path, help="Folder that holds a folder for each task.")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        help=f"Tasks of the data folder. Default: all except {' and '.join(OF_LANGUAGE_MODELS)}.",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=TRAINED, help="Default: those that start anew and are no change of another."
    )
    parser.add_argument(
        "--ablation",
        nargs="?",
        const="ptuning",
        choices=CHANGES,
        help="Compare changes of the training of plain vectors, or of a plain deep prompt.",
    )
    parser.add_argument("--model_name_or_path", help="Backbone. Default: that of each recipe.")
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, help="Grid of learning rates. Default: that of the task."
    )
    parser.add_argument(
        "--num_virtual_tokens", type=int, default=20, help="V, of the methods and changes that set none themselves."
    )
    parser.add_argument("--seeds", type=int, help="Seeds per method. Default: those of the task, 3 or 5.")
    parser.add_argument("--search_seeds", type=int, help="Seeds per learning rate. Default: those of the task, 3.")
    parser.add_argument("--max_steps", type=int, help="Optimizer steps. Default: those of the task.")
    parser.add_argument("--test_rows", type=int, help="Rows of the test file. Default: those of the task.")
    parser.add_argument(
        "--held_out_rows",
        type=int,
        default=500,
        help="Training rows that are held out to choose the rate, a quarter of all at most.",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Number of runs at the same time.")
    parser.add_argument("--use_cpu", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output_dir", default="outputs/compare")
    parser.add_argument(
        "--recipe_options",
        nargs=argparse.REMAINDER,
        default=[],
        help="All that follows goes to the recipe, behind the options of the task.",
    )
    args = parser.parse_args(argv)
    if (args.tasks is not None) and args.data_folder is None:
        parser.error("--tasks needs --data_folder")
    if args.ablation and args.methods is not None:
        parser.error("--ablation compares changes of one method and takes no --methods")
    args.methods = args.methods or [name for name, method in METHODS.items() if method.first is None]

    output = Path(args.output_dir)
    names = args.tasks or [name for name in TASKS if name not in OF_LANGUAGE_MODELS]
    tasks = {name: TASKS[name] for name in names} if args.data_folder else {"speech_acts": SPEECH_ACTS}
    for name, task in tasks.items():
        make_splits((args.data_folder or DATA) / (task.folder or name), output / name, task, args)
    rows = ablate(tasks, args) if args.ablation else compare(tasks, args)
    table = make_ablation_table(rows) if args.ablation else make_table(rows)
    name = {None: "compare", "ptuning": "ablation"}.get(args.ablation, f"ablation_{args.ablation}")
    (output / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (output / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    plot(rows, output / f"{name}.png")
    print(table)


if __name__ == "__main__":
    main()
