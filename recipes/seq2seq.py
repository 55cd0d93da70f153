# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a prompt that makes a frozen encoder-decoder turn its inputs into texts as the data do.

With no arguments: questions about the future written from facts, by a toy T5 that the first run pre-trains itself
(small_models.py), so nothing is fetched from the Hub. It takes a few minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/seq2seq.py

Other data, models and methods, from options or a file of them, and more than one process:

    python recipes/seq2seq.py --train_file train.csv --validation_file test.csv --source_column article
    python recipes/seq2seq.py --model_name_or_path google-t5/t5-small --method lora
    python recipes/seq2seq.py recipes/configs/seq2seq.yaml --seed 1
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/seq2seq.py
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import evaluate
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from shared.arguments import DataArguments, MethodArguments, ModelArguments, check_evaluation, parse_arguments
from shared.methods import choose_learning_rate, make_callbacks, make_trainable, watch_prompt
from shared.models import check_length, find_model, load_tokenizer
from shared.report import Outcome, can_measure_first, finish, make_command
from shared.resuming import find_checkpoint
from shared.small_models import SEQ2SEQ, find_small_model
from shared.sources import DATA, METRICS, drop_long_rows, load_data, take_text_columns
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


TRAINING_DEFAULTS = {
    "output_dir": "outputs/seq2seq",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "predict_with_generate": True,
    "metric_for_best_model": "bleu",
}
STALLS = {split: DATA / "stalls" / f"{split}.jsonl" for split in ("train", "validation", "test")}


@dataclass
class TextArguments:
    """The columns of the data, what the model reads, and how much it writes."""

    source_column: str = field(default="input", metadata={"help": "Column of the texts that the model reads."})
    target_column: str = field(default="target", metadata={"help": "Column of the texts that it should write."})
    source_prefix: str = field(default="", metadata={"help": "Put in front of every text that the model reads."})
    max_source_length: int = field(
        default=96, metadata={"help": "Rows with more tokens in the source are left out, never cut."}
    )
    max_target_length: int = field(
        default=48,
        metadata={"help": "Rows with more tokens in the target are left out. Generated texts end at this length."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Number format of the frozen weights."}
    )


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: TextArguments) -> DatasetDict:
    """Adds "input_ids" and "labels" to the rows."""

    def add_ids(rows: dict) -> dict:
        sources = tokenizer([args.source_prefix + text for text in rows["input"]])
        return {**sources, "labels": tokenizer(text_target=rows["target"]).input_ids}

    tokens = data.map(add_ids, batched=True, desc="Tokenizing")
    tokens = drop_long_rows(tokens, "input_ids", "--max_source_length", args.max_source_length)
    return drop_long_rows(tokens, "labels", "--max_target_length", args.max_target_length)


def make_key(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of an input without padding, by which it is known. Different texts may have the same tokens."""
    return tuple(token for token in ids if token not in (-100, tokenizer.pad_token_id))


def one_row_per_input(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Returns the first row of each input, which is generated for once, with the "references" of all its rows."""
    first, references = {}, {}
    for i, (ids, target) in enumerate(zip(rows["input_ids"], rows["target"])):
        key = make_key(ids, tokenizer)
        first.setdefault(key, i)
        references.setdefault(key, []).append(target)
    return rows.select([*first.values()]).add_column("references", [*references.values()])


def load_model(name: str, args: TextArguments, method: MethodArguments):
    """Returns the frozen model with what the method trains, and its tokenizer."""
    config = AutoConfig.from_pretrained(name)
    tokenizer = load_tokenizer(name, config)
    check_length(method.prompt_positions, args.max_source_length, config, tokenizer, "`--max_source_length`")
    check_length(0, args.max_target_length, config, tokenizer, "`--max_target_length`")  # the decoder has no prompt
    model = AutoModelForSeq2SeqLM.from_pretrained(name, config=config, dtype=getattr(torch, args.dtype))
    return make_trainable(model, method, "SEQ_2_SEQ_LM", tokenizer), tokenizer


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, TextArguments, MethodArguments, Seq2SeqTrainingArguments]
    model_args, data_args, text_args, method, args = parse_arguments(dataclasses, TRAINING_DEFAULTS, argv)
    check_evaluation(args)
    args.include_for_metrics = ["inputs"]  # compute_metrics finds the references by the inputs
    if args.generation_max_length is None:
        args.generation_max_length = text_args.max_target_length + 1  # with the token that the decoder starts from
    data = load_data(data_args, STALLS)
    data = take_text_columns(data, input=text_args.source_column, target=text_args.target_column)
    name = find_model(model_args.model_name_or_path or find_small_model(SEQ2SEQ))
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)  # decides where the prompt starts
    model, tokenizer = load_model(name, text_args, method)
    choose_learning_rate(args, method, model)
    tokens = tokenize(data, tokenizer, text_args)

    held_out = {split: one_row_per_input(rows, tokenizer) for split, rows in tokens.items() if split != "train"}
    metric = evaluate.load(str(METRICS / "bleu_rouge"), keep_in_memory=True)
    generated = {}  # the text for each input, of the last evaluation

    def score(split: str):
        """Returns `compute_metrics` of a split. Trainer passes tokens only, and each split has its own references."""
        references = {make_key(row["input_ids"], tokenizer): row["references"] for row in held_out[split]}

        def compute_metrics(output: EvalPrediction) -> dict[str, float]:
            generated.clear()
            ids = np.where(output.predictions < 0, tokenizer.pad_token_id, output.predictions)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            for source, text in zip(output.inputs.tolist(), texts, strict=True):  # several processes repeat some
                generated[make_key(source, tokenizer)] = text.strip()
            targets = [references[key] for key in generated]
            return metric.compute(predictions=list(generated.values()), references=targets)

        return compute_metrics

    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=held_out["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=make_callbacks(method),
    )
    watch_prompt(trainer, method)
    measured = "test" if "test" in held_out else "validation"
    trainer.compute_metrics = score(measured)
    before = (
        trainer.predict(held_out[measured], metric_key_prefix="eval").metrics if can_measure_first(trainer) else {}
    )
    trainer.compute_metrics = score("validation")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.compute_metrics = score(measured)
    after = trainer.predict(held_out[measured], metric_key_prefix="eval").metrics

    finish(
        trainer,
        Outcome(
            task="text2text-generation",
            metric="bleu",
            before=before,
            after=after,
            predictions=[
                {
                    "input": row["input"],
                    "prediction": generated[make_key(row["input_ids"], tokenizer)],
                    "references": row["references"],
                }
                for row in held_out[measured]
            ],
            command=make_command(__file__, argv),
            data=data_args,
            method=method,
            is_share=False,
        ),
    )


if __name__ == "__main__":
    main()
