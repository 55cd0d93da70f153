# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The end of a recipe: writes adapter, metrics, predictions, curves and a model card, and pushes them to the Hub."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, upload_folder
from matplotlib.figure import Figure
from peft import PeftModel
from sklearn.metrics import ConfusionMatrixDisplay
from transformers import PreTrainedModel, Trainer

from peft_ptuning_ext import make_model_card
from shared.arguments import DataArguments, MethodArguments
from shared.language_model import public_name
from shared.methods import count_parameters


TIMES = ("runtime", "per_second", "preparation_time")


@dataclass(frozen=True)
class Outcome:
    """What a recipe has measured, and how it was run.

    Args:
        task (`str`): Name that the Hub has for the task.
        metric (`str`): Name of the metric that is printed.
        before (`dict`): Metrics before training, empty if they were not measured. All names start with "eval_".
        after (`dict`): Metrics after training.
        predictions (`list[dict]`): One entry for each row that was measured.
        command (`list[str]`): The words of the command line, see `make_command`.
        data ([`DataArguments`]): The data.
        method ([`MethodArguments`]): What was trained.
        confusion (`tuple`, *optional*): True classes, predicted classes and the names of the classes.
        is_share (`bool`, defaults to `True`): Whether the printed metric goes from 0 to 1 and is shown in percent.
    """

    task: str
    metric: str
    before: dict
    after: dict
    predictions: list[dict]
    command: list[str]
    data: DataArguments
    method: MethodArguments
    confusion: tuple[list[int], list[int], list[str]] | None = None
    is_share: bool = True


@dataclass(frozen=True)
class Repository:
    """Where the output folder is pushed."""

    id: str
    token: str | None = None
    revision: str | None = None


def finish(trainer: Trainer, outcome: Outcome) -> None:
    """Ends a recipe, in every process: Trainer saves what was trained, and the main process writes the rest."""
    args = trainer.args
    trainer.save_model(_internal_call=True)  # without `_internal_call`, save_model would push an unfinished folder
    if not trainer.is_world_process_zero():
        return
    # Trainer ends its history with a summary of the last call of `train`, which differs after resuming.
    history = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    repository = Repository(trainer.hub_model_id, args.hub_token, args.hub_revision) if args.push_to_hub else None
    write_run(Path(args.output_dir), trainer.accelerator.unwrap_model(trainer.model), history, outcome, repository)


def write_run(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    history: list[dict],
    outcome: Outcome,
    repository: Repository | None = None,
) -> None:
    """Writes all that describes a run beside the saved model, pushes the folder if asked to, and prints one metric."""
    name_base_model(folder, model)
    results = write_metrics(folder, model, history, outcome)
    plot_curves(results["history"], folder)
    if outcome.confusion is not None:
        plot_confusion(*outcome.confusion, folder)
    model.config.save_pretrained(folder)  # labels and their names
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.predictions)
    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    name = folder.resolve().name if repository is None else repository.id
    make_card(model, name, results, outcome).save(folder / "README.md")
    if repository is not None:
        upload_folder(
            repo_id=repository.id,
            folder_path=folder,
            revision=repository.revision,
            token=repository.token,
            ignore_patterns=["checkpoint-*", "runs/*", "training_args.bin"],  # training_args.bin holds the token
            commit_message="End of training",
        )
    before, after = (results[when].get(outcome.metric) for when in ("before", "after"))
    form = ".1%" if outcome.is_share else ".1f"
    before = "not measured" if before is None else format(before, form)
    print(f"{outcome.metric} before training {before}, after {after:{form}}\nwritten to {folder}")


def name_base_model(folder: Path, model: PreTrainedModel | PeftModel) -> None:
    """Makes a saved adapter name its base model as the Hub does, where the model was converted on this machine.

    This is done last. PEFT asks the Hub about the name whenever it saves an adapter, and recipes need no network.
    """
    model.config._name_or_path = name = public_name(model.config._name_or_path)
    for config in getattr(model, "peft_config", {}).values():
        if name != config.base_model_name_or_path:
            config.base_model_name_or_path = name
            file = folder / "adapter_config.json"
            saved = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
            file.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")


def write_metrics(folder: Path, model: PreTrainedModel | PeftModel, history: list[dict], outcome: Outcome) -> dict:
    """Writes `metrics.json`, and returns what it holds.

    The names of metrics lose their "eval_". Times are left out, so that the same seed writes the same file.
    """
    trained, deployed = count_parameters(model)
    results = {
        "before": _metrics(outcome.before),
        "after": _metrics(outcome.after),
        "trained_parameters": trained,
        "deployed_parameters": deployed,
        "history": [_without_times(entry) for entry in history],
    }
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _metrics(output: dict) -> dict:
    return {key.removeprefix("eval_"): value for key, value in _without_times(output).items() if key != "epoch"}


def _without_times(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}


def can_measure_first(trainer: Trainer) -> bool:
    """Whether Trainer can evaluate before it trains, which it can in a single process.

    In several processes, Trainer of transformers 5.23 would then train without DDP, each process for itself, and FSDP
    would fail. DeepSpeed ZeRO-2 refuses to evaluate first.
    """
    return trainer.args.world_size == 1 and not trainer.is_deepspeed_enabled


def in_data_order(trainer: Trainer, dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Returns the rows of `values` in the order of the data, which `predict` changes with `group_by_length`."""
    sampler = trainer._get_eval_sampler(dataset)
    return values if sampler is None else values[np.argsort(list(sampler))]


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
    """Draws into confusion_matrix.png how often each true label was given each predicted label."""
    size = 3 + 0.4 * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        truth,
        predicted,
        labels=range(len(labels)),
        display_labels=[label.replace("$", r"\$") for label in labels],  # else matplotlib may read it as a formula
        xticks_rotation="vertical",
        cmap="Blues",
        ax=figure.subplots(),
        include_values=len(labels) <= 30,
    )
    figure.savefig(folder / "confusion_matrix.png", dpi=min(150, 6000 / size))


def make_card(model: PreTrainedModel | PeftModel, name: str, results: dict, outcome: Outcome) -> ModelCard:
    """Makes the model card: the package's card of a prompt, or a short one for another method, and the training."""
    if outcome.method.method == "ptuning":
        card = make_model_card(model, name)
    else:
        card = _make_short_card(model, name, results, outcome.task)
    data = outcome.data
    data_name = data.dataset_name or (Path(data.train_file).stem if data.train_file else "the recipe's own data")
    metrics = {key: value for key, value in results["after"].items() if isinstance(value, (int, float))}
    card.data.datasets = [data.dataset_name] if data.dataset_name else None
    card.data.metrics = list(metrics)
    card.data.model_name = name
    card.data.eval_results = [
        EvalResult(
            task_type=outcome.task,
            dataset_type=data.dataset_name or "other",
            dataset_name=data_name,
            metric_type=key,
            metric_value=round(value, 6),
        )
        for key, value in metrics.items()
    ]
    before = {key: f"{value:.4f}" for key, value in results["before"].items()}
    rows = [f"| {key} | {before.get(key, '')} | {value:.4f} |" for key, value in metrics.items()]
    card.text = card.text.rstrip() + "\n".join(
        [
            "\n\n## Training\n",
            f"`--method {outcome.method.method}` on a frozen model, data: {data_name}.\n",
            *("```bash", _without_token(outcome.command), "```\n"),
            *("| | before training | after |", "|---|---|---|", *rows, ""),
        ]
    )
    return card


def _make_short_card(model: PreTrainedModel | PeftModel, name: str, results: dict, task: str) -> ModelCard:
    """The card of a method that prompts are compared with."""
    card = ModelCard("---\n{}\n---\n")
    card.data.library_name = "peft" if isinstance(model, PeftModel) else "transformers"
    card.data.pipeline_tag = task
    base_model = model.config._name_or_path
    if not Path(base_model).exists():  # the name of a folder means nothing to others
        card.data.base_model = base_model
    trained, deployed = (f"{results[f'{kind}_parameters']:,}" for kind in ("trained", "deployed"))
    card.text = f"\n# {name}\n\n{trained} parameters were trained, {deployed} are deployed.\n"
    return card


def make_command(recipe: str, argv: list[str] | None) -> list[str]:
    """Returns the words of the command that ran the file `recipe`."""
    return ["python", f"recipes/{Path(recipe).name}", *(sys.argv[1:] if argv is None else argv)]


def _without_token(command: list[str]) -> str:
    """The command as one line, with "..." in the place of a token for the Hub."""
    shown, hide = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        is_token = name.replace("-", "_") == "__hub_token"
        shown.append("..." if hide else f"{name}=..." if is_token and equals else word)
        hide = is_token and not equals
    return shlex.join(shown)
