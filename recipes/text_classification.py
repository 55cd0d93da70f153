# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a prompt and a classification head on a frozen model, and measures what they have learned.

With no arguments: what 720 short messages do (thank, warn, ask, ...), on the all-MiniLM-L6-v2 that comes from PyPI,
so nothing is fetched from the Hub. It takes a minute or two on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/text_classification.py
    python recipes/classify.py outputs/text_classification "Could you open the window?"

Other data, models and methods, from options or a file of them, and more than one process:

    python recipes/text_classification.py --train_file train.csv --validation_file test.csv --text_column message
    python recipes/text_classification.py --method lora
    python recipes/text_classification.py recipes/configs/text_classification.yaml --seed 1
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/text_classification.py
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import evaluate
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from shared.arguments import DataArguments, MethodArguments, ModelArguments, check_evaluation, parse_arguments
from shared.methods import choose_learning_rate, make_callbacks, make_trainable, watch_prompt
from shared.models import cut_texts, find_model, find_packaged_encoder, load_tokenizer, load_with_head
from shared.report import Outcome, can_measure_first, finish, in_data_order, make_command
from shared.resuming import find_checkpoint
from shared.sources import DATA, METRICS, check_columns, load_data
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


# These values were chosen on a fifth of the training rows, held out for that.
TRAINING_DEFAULTS = {
    "output_dir": "outputs/text_classification",
    "depth": "DEEP",
    "num_train_epochs": 12,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "metric_for_best_model": "accuracy",
}
SPEECH_ACTS = {"train": DATA / "speech_acts" / "train.jsonl", "validation": DATA / "speech_acts" / "test.jsonl"}


@dataclass
class ColumnArguments:
    """The columns of the data, and the length of a text."""

    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the labels, words or numbers."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


def number_labels(data: DatasetDict, text_column: str, label_column: str) -> tuple[DatasetDict, list[str]]:
    """Checks the two columns and renames them to "text" and "label". Labels become 0 … N-1.

    Returns the data, and the names of the labels.
    """
    check_columns(data, {text_column: str, label_column: Hashable})
    feature = data["train"].features[label_column]
    is_numbered = isinstance(feature, ClassLabel)
    labels = {split: set(dataset[label_column]) for split, dataset in data.items()}
    if is_numbered and labels.get("test") == {-1}:  # GLUE keeps the labels of its test splits secret
        data = DatasetDict({split: dataset for split, dataset in data.items() if split != "test"})
        del labels["test"]
    for split, found in labels.items():
        if None in found or (is_numbered and -1 in found):
            raise ValueError(f"Column {label_column!r} of the {split} data has rows without a label.")
        if unknown := found - labels["train"]:
            raise ValueError(f"The {split} data has labels that the training data lacks: {sorted(unknown)}.")
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


def load_model(name: str, labels: list[str], max_length: int, method: MethodArguments):
    """Returns the frozen backbone with what the method trains and a head, and its tokenizer."""
    config = AutoConfig.from_pretrained(
        name,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification",
    )
    tokenizer = load_tokenizer(name, config)
    cut_texts(tokenizer, max_length, method.prompt_positions, config)
    model = load_with_head(AutoModelForSequenceClassification, name, config)
    return make_trainable(model, method, "SEQ_CLS", tokenizer), tokenizer


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    return data.map(
        lambda rows: tokenizer(rows["text"], truncation=True),
        batched=True,
        remove_columns=["text"],
        desc="Tokenizing",
    )


def list_predictions(rows: Dataset, logits: np.ndarray, labels: list[str]) -> tuple[list[dict], tuple]:
    """Returns the prediction for each row, and true and predicted label numbers with the names of the labels."""
    probabilities = torch.tensor(logits).float().softmax(-1)  # (rows, labels)
    guesses, truth = probabilities.argmax(-1).tolist(), rows["label"][:]
    predictions = [
        {"text": text, "label": labels[label], "prediction": labels[guess], "probability": row[guess]}
        for text, label, guess, row in zip(rows["text"], truth, guesses, probabilities.tolist(), strict=True)
    ]
    return predictions, (truth, guesses, labels)


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, ColumnArguments, MethodArguments, TrainingArguments]
    model_args, data_args, columns, method, args = parse_arguments(dataclasses, TRAINING_DEFAULTS, argv)
    check_evaluation(args)
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)  # decides where head and prompt start

    name = find_model(model_args.model_name_or_path or find_packaged_encoder())
    data = load_data(data_args, SPEECH_ACTS)
    data, labels = number_labels(data, columns.text_column, columns.label_column)
    model, tokenizer = load_model(name, labels, columns.max_length, method)
    choose_learning_rate(args, method, model)
    tokens = tokenize(data, tokenizer)

    metric = evaluate.load(str(METRICS / "accuracy_f1"), keep_in_memory=True)
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
        callbacks=make_callbacks(method),
    )
    watch_prompt(trainer, method)
    measured = "test" if "test" in tokens else "validation"
    before = trainer.predict(tokens[measured], metric_key_prefix="eval").metrics if can_measure_first(trainer) else {}
    trainer.train(resume_from_checkpoint=checkpoint)
    output = trainer.predict(tokens[measured], metric_key_prefix="eval")

    logits = in_data_order(trainer, tokens[measured], output.predictions)
    predictions, confusion = list_predictions(data[measured], logits, labels)
    finish(
        trainer,
        Outcome(
            task="text-classification",
            metric="accuracy",
            before=before,
            after=output.metrics,
            predictions=predictions,
            command=make_command(__file__, argv),
            data=data_args,
            method=method,
            confusion=confusion,
        ),
    )


if __name__ == "__main__":
    main()
