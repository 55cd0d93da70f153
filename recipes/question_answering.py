# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a prompt and a head that finds answers in a text on a frozen model, and measures how many are right.

With no arguments: questions about short notices, on the all-MiniLM-L6-v2 that comes from PyPI. It takes about three
minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/question_answering.py

Other data, models and methods, from options or a file of them, and more than one process:

    python recipes/question_answering.py --train_file train.jsonl --validation_file test.jsonl
    python recipes/question_answering.py --dataset_name rajpurkar/squad --max_length 256
    python recipes/question_answering.py --method lora
    python recipes/question_answering.py recipes/configs/question_answering.yaml --seed 1
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/question_answering.py

`--method peft_ptuning` is stock PEFT unchanged: its logits begin with those of the prompt. The head then learns to
point to a place before the answer, as many tokens before as the prompt is long.
"""

from dataclasses import dataclass, field

import evaluate
import numpy as np
from datasets import Dataset, DatasetDict
from shared.arguments import (
    DataArguments,
    MethodArguments,
    ModelArguments,
    check_at_least,
    check_evaluation,
    parse_arguments,
)
from shared.methods import choose_learning_rate, make_callbacks, make_trainable, watch_prompt
from shared.models import cut_texts, find_model, find_packaged_encoder, load_tokenizer, load_with_head
from shared.report import Outcome, can_measure_first, finish, in_data_order, make_command
from shared.resuming import find_checkpoint
from shared.sources import DATA, METRICS, check_columns, load_data
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


TRAINING_DEFAULTS = {
    "output_dir": "outputs/question_answering",
    "num_train_epochs": 8,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "metric_for_best_model": "f1",
    "label_names": ["start_positions", "end_positions"],
}
NOTICES = {"train": DATA / "notices" / "train.jsonl", "validation": DATA / "notices" / "test.jsonl"}
COLUMNS = {"id": str, "context": str, "question": str, "answers": dict}


@dataclass
class SpanArguments:
    """The windows into which a long text is cut, and the spans that may be answers."""

    max_length: int = field(
        default=384, metadata={"help": "Tokens of a window, which holds the question and a part of the text."}
    )
    doc_stride: int = field(default=128, metadata={"help": "Tokens of the text that neighbouring windows share."})
    max_answer_length: int = field(default=30, metadata={"help": "No longer answers are predicted, in tokens."})
    n_best: int = field(default=20, metadata={"help": "Best starts and best ends of a window that are combined."})


def check_answers(data: DatasetDict) -> DatasetDict:
    """Checks the columns of SQuAD and drops all others. A question without an answer has two empty lists."""
    check_columns(data, COLUMNS)
    for split, dataset in data.items():
        for row in dataset:
            where = f"Question {row['id']!r} of the {split} data"
            texts, starts = row["answers"].get("text"), row["answers"].get("answer_start")
            if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
                raise ValueError(
                    f"{where} has answers {row['answers']}, not equally long lists text and answer_start."
                )
            for text, start in zip(texts, starts):
                if not isinstance(text, str) or not isinstance(start, int):
                    raise ValueError(f"{where} has the answer {text!r} at {start!r}, not a text at a number.")
                if not text.strip() or start < 0 or not row["context"].startswith(text, start):
                    raise ValueError(f"{where} has the answer {text!r}, and its context has none at {start}.")
    if not any(answers["text"] for answers in data["train"]["answers"]):
        raise ValueError("The train data has no answer at all.")
    return data.select_columns([*COLUMNS])


def load_model(name: str, max_length: int, method: MethodArguments):
    """Returns the frozen backbone with what the method trains and a head, and its tokenizer."""
    config = AutoConfig.from_pretrained(name, num_labels=2)  # start and end
    tokenizer = load_tokenizer(name, config, padding_side="right")  # the labels are positions counted from the left
    cut_texts(tokenizer, max_length, method.prompt_positions, config)
    model = load_with_head(AutoModelForQuestionAnswering, name, config)
    return make_trainable(model, method, "QUESTION_ANS", tokenizer), tokenizer


def make_windows(rows: dict, indices: list[int], tokenizer: PreTrainedTokenizerBase, stride: int) -> dict:
    """Cuts texts into windows, each with its question, and marks where the answer is.

    The labels are the positions of the first answer. In a window that does not hold all of that answer, both labels
    are the position of [CLS], or 0 without a [CLS]. "offsets" are the characters of each token of the text, [0, 0] for
    other tokens. "row" is the number of the row that was cut.
    """
    questions = [question.strip() for question in rows["question"]]
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride
    for id, tokens in zip(rows["id"], tokenizer(questions, add_special_tokens=False).input_ids):
        if len(tokens) >= room:
            raise ValueError(
                f"Question {id!r} has {len(tokens)} tokens, and with `--doc_stride` {stride} leaves no room for the "
                f"text in `--max_length` {tokenizer.model_max_length}."
            )
    windows = tokenizer(
        questions, rows["context"], truncation="only_second", stride=stride, return_overflowing_tokens=True
    )
    sources = windows.pop("overflow_to_sample_mapping")
    columns = {"start_positions": [], "end_positions": [], "offsets": [], "null": [], "row": []}
    for encoding, source in zip(windows.encodings, sources):
        offsets = np.array(encoding.offsets) * [[part == 1] for part in encoding.sequence_ids]  # (S, 2)
        null = encoding.ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in encoding.ids else 0
        start, end = find_span(offsets, rows["answers"][source]) or (null, null)
        values = (start, end, offsets.tolist(), null, indices[source])
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return {**windows, **columns}


def find_span(offsets: np.ndarray, answers: dict) -> tuple[int, int] | None:
    """Returns the first and last token of the first answer, or None if the window does not hold all of an answer."""
    inside = np.flatnonzero(offsets[:, 1])
    if not answers["text"] or len(inside) == 0:
        return None
    first = answers["answer_start"][0]
    last = first + len(answers["text"][0])
    if first < offsets[inside[0], 0] or last > offsets[inside[-1], 1]:
        return None
    span = inside[(offsets[inside, 1] > first) & (offsets[inside, 0] < last)]
    return (int(span[0]), int(span[-1])) if len(span) else None


def read_answers(
    trainer: Trainer, output: EvalPrediction, windows: Dataset, contexts: list[str], spans: SpanArguments
) -> list[tuple[str, float]]:
    """Returns the best span of each text, over all windows, and its score minus the score of "no answer"."""
    starts, ends = (in_data_order(trainer, windows, logits) for logits in output.predictions)  # (windows, S)
    best = [("", -np.inf)] * len(contexts)
    nothing = [np.inf] * len(contexts)  # the score of "no answer": the lowest score of [CLS] over the windows
    columns = (windows[name] for name in ("row", "offsets", "null"))
    for row, offsets, null, start, end in zip(*columns, starts, ends, strict=True):
        offsets = np.array(offsets)
        nothing[row] = min(nothing[row], start[null] + end[null])
        inside = np.flatnonzero(offsets[:, 1])
        first = inside[np.argsort(-start[inside], kind="stable")[: spans.n_best]]
        last = inside[np.argsort(-end[inside], kind="stable")[: spans.n_best]]
        lengths = last - first[:, None] + 1  # (n_best, n_best)
        scores = np.where(
            (lengths >= 1) & (lengths <= spans.max_answer_length), start[first, None] + end[last], -np.inf
        )
        if scores.size and scores.max() > best[row][1]:
            i, j = np.unravel_index(scores.argmax(), scores.shape)
            best[row] = (contexts[row][offsets[first[i], 0] : offsets[last[j], 1]].strip(), float(scores[i, j]))
    return [(text, score - float(null)) for (text, score), null in zip(best, nothing)]


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, SpanArguments, MethodArguments, TrainingArguments]
    model_args, data_args, spans, method, args = parse_arguments(dataclasses, TRAINING_DEFAULTS, argv)
    check_evaluation(args)
    check_at_least(0, spans, "doc_stride")
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)  # decides where head and prompt start

    name = find_model(model_args.model_name_or_path or find_packaged_encoder())
    data = check_answers(load_data(data_args, NOTICES))
    may_be_empty = not all(answers["text"] for answers in data["train"]["answers"])
    model, tokenizer = load_model(name, spans.max_length, method)
    choose_learning_rate(args, method, model)
    windows = data.map(
        make_windows,
        batched=True,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "stride": spans.doc_stride},
        remove_columns=[*COLUMNS],
        load_from_cache_file=False,
        desc="Tokenizing",
    )

    def predict(split: str, output: EvalPrediction) -> list[str]:
        answers = read_answers(trainer, output, windows[split], data[split]["context"][:], spans)
        return [text if score >= 0 or not may_be_empty else "" for text, score in answers]

    def score(split: str):
        """Returns `compute_metrics` of a split. Trainer passes logits only, and each split has texts of its own."""
        references = [answers["text"] for answers in data[split]["answers"]]
        return lambda output: metric.compute(predictions=predict(split, output), references=references)

    metric = evaluate.load(str(METRICS / "squad_f1"), keep_in_memory=True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        preprocess_logits_for_metrics=lambda logits, _: logits[:2],  # T5 and BART have more
        callbacks=make_callbacks(method),
    )
    watch_prompt(trainer, method)
    measured = "test" if "test" in windows else "validation"
    trainer.compute_metrics = score(measured)
    before = trainer.predict(windows[measured], metric_key_prefix="eval").metrics if can_measure_first(trainer) else {}
    trainer.compute_metrics = score("validation")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.compute_metrics = score(measured)
    output = trainer.predict(windows[measured], metric_key_prefix="eval")

    finish(
        trainer,
        Outcome(
            task="question-answering",
            metric="f1",
            before=before,
            after=output.metrics,
            predictions=[
                {"id": row["id"], "question": row["question"], "prediction": text, "answers": row["answers"]["text"]}
                for row, text in zip(data[measured], predict(measured, output), strict=True)
            ],
            command=make_command(__file__, argv),
            data=data_args,
            method=method,
        ),
    )


if __name__ == "__main__":
    main()
