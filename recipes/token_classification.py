# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a prompt and a head that tags words on a frozen model, and measures which entities it finds.

With no arguments: who travels from where to where, when and for how much, in 600 sentences, on the all-MiniLM-L6-v2
that comes from PyPI. It takes a minute or two on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/token_classification.py

Other data, models and methods, from options or a file of them, and more than one process:

    python recipes/token_classification.py --train_file train.jsonl --validation_file test.jsonl --tags_column tags
    python recipes/token_classification.py --method lora
    python recipes/token_classification.py recipes/configs/token_classification.yaml --seed 1
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/token_classification.py
"""

from dataclasses import dataclass, field
from itertools import chain

import evaluate
from datasets import ClassLabel, Dataset, DatasetDict
from shared.arguments import DataArguments, MethodArguments, ModelArguments, check_evaluation, parse_arguments
from shared.methods import choose_learning_rate, make_callbacks, make_trainable, watch_prompt
from shared.models import cut_texts, find_model, find_packaged_encoder, load_tokenizer, load_with_head
from shared.report import Outcome, can_measure_first, finish, in_data_order, make_command
from shared.resuming import find_checkpoint
from shared.sources import DATA, METRICS, check_columns, load_data
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


TRAINING_DEFAULTS = {
    "output_dir": "outputs/token_classification",
    "depth": "DEEP",
    "num_train_epochs": 8,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "metric_for_best_model": "f1",
}
JOURNEYS = {"train": DATA / "journeys" / "train.jsonl", "validation": DATA / "journeys" / "test.jsonl"}


@dataclass
class ColumnArguments:
    """The columns of the data, and the length of a text."""

    tokens_column: str = field(
        default="tokens", metadata={"help": "Column that holds the words of a text, as a list."}
    )
    tags_column: str = field(
        default="ner_tags",
        metadata={"help": "Column that holds the BIO tags of the words: texts, or numbers with names."},
    )
    max_length: int = field(
        default=128,
        metadata={"help": "Longer texts are cut to this many tokens. Entities behind the cut count as missed."},
    )


def number_tags(data: DatasetDict, tokens_column: str, tags_column: str) -> tuple[DatasetDict, list[str]]:
    """Checks the two columns and renames them to "tokens" and "tags". Tags become 0 … N-1.

    Returns the data, and the names of the tags.
    """
    check_columns(data, {tokens_column: list, tags_column: list})
    feature = data["train"].features[tags_column].feature
    is_numbered = isinstance(feature, ClassLabel)
    tags = {split: dataset[tags_column][:] for split, dataset in data.items()}
    for split, dataset in data.items():
        for i, (words, row) in enumerate(zip(dataset[tokens_column], tags[split]), start=1):
            where = f"Row {i} of the {split} data"
            if not words or not all(isinstance(word, str) for word in words):
                raise ValueError(f"{where} has no words in column {tokens_column!r}: {words}.")
            if len(words) != len(row):
                raise ValueError(f"{where} has {len(words)} {tokens_column!r} and {len(row)} {tags_column!r}.")
            if None in row or (is_numbered and -1 in row):  # the Hub marks unlabelled test splits with -1
                raise ValueError(f"{where} has words without a tag in column {tags_column!r}.")
            if is_numbered:
                tags[split][i - 1] = row = feature.int2str(row)
            if wrong := [tag for tag in row if tag != "O" and str(tag)[:2] not in ("B-", "I-")]:
                raise ValueError(f"{where} has {wrong[0]!r} in column {tags_column!r}, not O, B-… or I-….")
    found = {split: {tag for row in rows for tag in row} for split, rows in tags.items()}
    for split, names in found.items():
        if unknown := names - found["train"]:
            raise ValueError(f"The {split} data has tags that the training data lacks: {sorted(unknown)}.")
    if not {"O"} < found["train"]:
        raise ValueError(
            f"Column {tags_column!r} of the train data needs O and an entity, has {sorted(found['train'])}."
        )
    names = feature.names if is_numbered else sorted(found["train"], key=lambda tag: (tag != "O", tag[2:], tag))
    number = {name: i for i, name in enumerate(names)}
    numbered = {
        split: Dataset.from_dict(
            {"tokens": dataset[tokens_column][:], "tags": [[number[tag] for tag in row] for row in tags[split]]}
        )
        for split, dataset in data.items()
    }
    return DatasetDict(numbered), names


def load_model(name: str, labels: list[str], max_length: int, method: MethodArguments):
    """Returns the frozen backbone with what the method trains and a head, and its tokenizer."""
    if method.method == "peft_ptuning":
        raise ValueError("Stock P-tuning can't do token classification: its logits are longer than the labels.")
    config = AutoConfig.from_pretrained(
        name,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    tokenizer = load_tokenizer(name, config, add_prefix_space=True)  # byte-level tokenizers need it for lists
    cut_texts(tokenizer, max_length, method.prompt_positions, config)
    model = load_with_head(AutoModelForTokenClassification, name, config)
    return make_trainable(model, method, "TOKEN_CLS", tokenizer), tokenizer


def tokenize(rows: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Turns words into tokens. The first token of a word has the word's tag as its label, all other tokens have -100.

    "tagged" lists the words that have a label, "cut" counts the words behind `--max_length`.
    """
    tokens = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True)
    columns = {"labels": [], "tagged": [], "cut": []}
    for encoding, tags in zip(tokens.encodings, rows["tags"]):
        words = encoding.word_ids
        is_first = [word is not None and word != before for word, before in zip(words, [None, *words])]
        columns["labels"].append([tags[word] if first else -100 for word, first in zip(words, is_first)])
        columns["tagged"].append([word for word, first in zip(words, is_first) if first])
        columns["cut"].append(len({word for part in encoding.overflowing for word in part.word_ids} - {*words}))
    return {**tokens, **columns}


def read_tags(trainer: Trainer, output: EvalPrediction, tokens: Dataset) -> list[list[int]]:
    """Returns the predicted tag of every word. A word that was cut, or that the tokenizer drops, counts as O."""
    outside = trainer.model.config.label2id["O"]
    predictions, labels = (in_data_order(trainer, tokens, rows) for rows in (output.predictions, output.label_ids))
    tags = [[outside] * len(row) for row in tokens["tags"]]
    for row, tagged, guesses, truth in zip(tags, tokens["tagged"], predictions, labels):
        for word, guess in zip(tagged, guesses[truth != -100].tolist(), strict=True):
            row[word] = guess
    return tags


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, ColumnArguments, MethodArguments, TrainingArguments]
    model_args, data_args, columns, method, args = parse_arguments(dataclasses, TRAINING_DEFAULTS, argv)
    check_evaluation(args)
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)  # decides where head and prompt start

    name = find_model(model_args.model_name_or_path or find_packaged_encoder())
    data = load_data(data_args, JOURNEYS)
    data, labels = number_tags(data, columns.tokens_column, columns.tags_column)
    model, tokenizer = load_model(name, labels, columns.max_length, method)
    choose_learning_rate(args, method, model)
    tokens = data.map(
        tokenize,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=["tokens"],
        desc="Tokenizing",
    )
    measured = "test" if "test" in tokens else "validation"
    cut, words = sum(tokens[measured]["cut"]), sum(map(len, tokens[measured]["tags"]))
    print(f"{cut} of the {words} words of the {measured} data are beyond `--max_length` and will count as O.")

    def score(split: str):
        """Returns `compute_metrics` of a split. Trainer passes logits and labels, which lack the words cut off."""
        names = [[labels[tag] for tag in row] for row in tokens[split]["tags"]]
        return lambda output: metric.compute(
            predictions=[[labels[tag] for tag in row] for row in read_tags(trainer, output, tokens[split])],
            references=names,
        )

    metric = evaluate.load(str(METRICS / "entity_f1"), keep_in_memory=True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        callbacks=make_callbacks(method),
    )
    watch_prompt(trainer, method)
    trainer.compute_metrics = score(measured)
    before = trainer.predict(tokens[measured], metric_key_prefix="eval").metrics if can_measure_first(trainer) else {}
    trainer.compute_metrics = score("validation")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.compute_metrics = score(measured)
    output = trainer.predict(tokens[measured], metric_key_prefix="eval")

    truth, predicted = tokens[measured]["tags"][:], read_tags(trainer, output, tokens[measured])
    finish(
        trainer,
        Outcome(
            task="token-classification",
            metric="f1",
            before=before,
            after=output.metrics,
            predictions=[
                {"tokens": words, "tags": [labels[tag] for tag in tags], "prediction": [labels[tag] for tag in guess]}
                for words, tags, guess in zip(data[measured]["tokens"], truth, predicted, strict=True)
            ],
            command=make_command(__file__, argv),
            data=data_args,
            method=method,
            confusion=([*chain(*truth)], [*chain(*predicted)], labels),
        ),
    )


if __name__ == "__main__":
    main()
