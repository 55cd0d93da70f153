# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What a recipe leaves behind: adapter, metrics, predictions, curves and a model card, in its output folder."""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData, upload_folder
from matplotlib.figure import Figure
from peft import PeftModel
from sklearn.metrics import ConfusionMatrixDisplay
from transformers import PreTrainedModel, Trainer

from shared.arguments import DataArguments, MethodArguments
from shared.methods import count_parameters


TASKS = {  # of PEFT: the Hub's name for it, and the class that loads it
    "SEQ_CLS": ("text-classification", "ModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "ModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "ModelForQuestionAnswering"),
    "CAUSAL_LM": ("text-generation", "ModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "ModelForSeq2SeqLM"),
}
TIMES = ("runtime", "per_second", "preparation_time")


def can_measure_first(trainer: Trainer) -> bool:
    """Whether Trainer can evaluate before it trains: in one process.

    In several, Trainer of transformers 5.23 would then train without DDP, each process for itself, and with FSDP fail.
    """
    return trainer.args.world_size == 1


def save_run(trainer: Trainer, before: dict, after: dict) -> dict:
    """Has Trainer write the adapter, and the main process the rest: see `write_results`. Every process calls this."""
    trainer.save_model(_internal_call=True)  # else it would push the folder before the rest is in it
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Trainer's summary of its last call is another one after resuming.
    history = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    if not trainer.is_world_process_zero():
        return {}
    return write_results(Path(trainer.args.output_dir), model, before, after, history)


def write_results(folder: Path, model: PreTrainedModel | PeftModel, before: dict, after: dict, history: list) -> dict:
    """Writes the model's config, `metrics.json` and the curves; returns what is in `metrics.json`.

    The keys of `before` and `after` start with "eval_", those of `metrics.json` do not. Times are left out, so that
    the same seed writes the same file.
    """
    trained, deployed = count_parameters(model)
    results = {
        "before": _metrics(before),
        "after": _metrics(after),
        "trained_parameters": trained,
        "deployed_parameters": deployed,
        "history": [_without_times(entry) for entry in history],
    }
    model.config.save_pretrained(folder)  # labels and their names
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_curves(results["history"], folder)
    return results


def describe(results: dict, name: str, is_share: bool = True) -> str:
    """One line with a metric before and after training; `is_share` if it is to be read as a percentage."""
    before, after = (results[when].get(name) for when in ("before", "after"))
    form = ".1%" if is_share else ".1f"
    return f"{name} before training {'not measured' if before is None else format(before, form)}, after {after:{form}}"


def _metrics(output: dict) -> dict:
    return {key.removeprefix("eval_"): value for key, value in _without_times(output).items() if key != "epoch"}


def _without_times(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}


def in_data_order(trainer: Trainer, dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Returns what `predict` gave per row, in the order of the data: `group_by_length` shuffles evaluation, too."""
    sampler = trainer._get_eval_sampler(dataset)
    return values if sampler is None else values[np.argsort(list(sampler))]


def write_predictions(folder: Path, rows: Iterable[dict]) -> None:
    """Writes one JSON line per row."""
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def plot_curves(history: list[dict], folder: Path) -> None:
    """Draws the losses into loss_curve.png and the other metrics of the evaluations into metric_curves.png."""
    figure, axes = _plot("epoch", "loss")
    _draw(axes, history, "loss", "training", markersize=0)
    _draw(axes, history, "eval_loss", "validation")
    axes.legend()
    figure.savefig(folder / "loss_curve.png", dpi=150)

    figure, axes = _plot("epoch", "validation")
    names = {key for entry in history for key in entry if key.startswith("eval_")} - {"eval_loss"}
    for name in sorted(names):
        _draw(axes, history, name, name.removeprefix("eval_"))
    if names:
        axes.legend()
    figure.savefig(folder / "metric_curves.png", dpi=150)


def _plot(xlabel: str, ylabel: str):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _draw(axes, history: list[dict], key: str, label: str, markersize: int = 3) -> None:
    points = [(entry.get("epoch", 0), entry[key]) for entry in history if key in entry]
    axes.plot([x for x, _ in points], [y for _, y in points], label=label, marker="o", markersize=markersize)


def plot_confusion(truth: list[int], predicted: list[int], labels: list[str], folder: Path) -> None:
    """Draws how many texts of each label were given which into confusion_matrix.png."""
    size = 3 + 0.4 * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        truth,
        predicted,
        labels=range(len(labels)),
        display_labels=labels,
        xticks_rotation="vertical",
        cmap="Blues",
        ax=figure.subplots(),
        include_values=len(labels) <= 30,
    )
    figure.savefig(folder / "confusion_matrix.png", dpi=min(150, 6000 / size))


def write_card(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    results: dict,
    task_type: str,
    data: DataArguments,
    method: MethodArguments,
    command: list[str],
    repo_id: str | None = None,
) -> None:
    """Writes the model card, README.md: base model, data, metrics, sizes, the command that made it, how to load it."""
    model_name = repo_id or folder.resolve().name
    task, model_class = TASKS[task_type]
    data_name = data.dataset_name or (Path(data.train_file).stem if data.train_file else "the recipe's own data")
    metrics = {name: value for name, value in results["after"].items() if isinstance(value, (int, float))}
    path = Path(model.config._name_or_path)
    is_on_hub = not path.is_dir()
    base = model.config._name_or_path if is_on_hub else (path.parent if path.name == "model" else path).name
    card = ModelCardData(
        base_model=base if is_on_hub else None,
        library_name="peft" if method.method != "head" else "transformers",
        pipeline_tag=task,
        tags=[method.method.replace("_", "-")],
        datasets=[data.dataset_name] if data.dataset_name else None,
        metrics=list(metrics),
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=data.dataset_name or "other",
                dataset_name=data_name,
                metric_type=name,
                metric_value=round(value, 6),
            )
            for name, value in metrics.items()
        ],
    )
    before = {name: f"{value:.4f}" for name, value in results["before"].items()}
    rows = [f"| {name} | {before.get(name, '')} | {value:.4f} |" for name, value in metrics.items()]
    sizes = (
        f"{results['trained_parameters']:,} parameters were trained, {results['deployed_parameters']:,} are deployed."
    )
    body = [
        f"# {model_name}",
        f"`{method.method}` for {task} on a frozen `{base}`, trained on {data_name}. {sizes}",
        "| | before | after |\n|---|---|---|\n" + "\n".join(rows),
        f"```bash\n{_without_token(command)}\n```",
        f"```python\n{_snippet(model, model_name, model_class, method)}\n```",
    ]
    ModelCard(f"---\n{card.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n").save(folder / "README.md")


def make_command(recipe: str, argv: list[str] | None) -> list[str]:
    """Returns the words of the command that ran the file `recipe`."""
    return ["python", f"recipes/{Path(recipe).name}", *(sys.argv[1:] if argv is None else argv)]


def _without_token(command: list[str]) -> str:
    """The command as one line, without a token for the Hub."""
    shown, hide = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        is_token = name.replace("-", "_") == "__hub_token"
        shown.append("..." if hide else f"{name}=..." if is_token and equals else word)
        hide = is_token and not equals
    return shlex.join(shown)


def _snippet(model: PreTrainedModel | PeftModel, model_name: str, model_class: str, method: MethodArguments) -> str:
    plugin = "import peft_ptuning_ext\n" if method.method == "ptuning" else ""
    if isinstance(model, PeftModel):
        labels = f", num_labels={model.config.num_labels}" if "Classification" in model_class else ""
        library, auto = "peft", f"AutoPeft{model_class}"
    else:  # saved whole, with its config
        library, auto, labels = "transformers", f"Auto{model_class}", ""
    return f'{plugin}from {library} import {auto}\n\nmodel = {auto}.from_pretrained("{model_name}"{labels})'


def push(folder: Path, repo_id: str, token: str | None, revision: str | None = None) -> None:
    """Uploads the output folder, without checkpoints."""
    upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        token=token,
        ignore_patterns=["checkpoint-*", "runs/*", "training_args.bin"],  # the last holds the token
        commit_message="End of training",
    )
