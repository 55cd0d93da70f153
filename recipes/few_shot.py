# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Compares what a few examples per class teach: a template on a language model, prompts, LoRA, or a head alone.

With no arguments: 8 examples per class of five speech acts, two draws of the examples, on two models that come from
PyPI: all-MiniLM-L6-v2 and, for the template, SmolLM2-135M-Instruct. It takes some minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/few_shot.py

Other data, language models and words for the classes, from options or a file of them:

    python recipes/few_shot.py --language_model FOLDER --train_file train.jsonl --validation_file test.jsonl
    python recipes/few_shot.py recipes/configs/few_shot.yaml --shots 16

A method is trained on the same rows of each draw for the same number of steps. What is written is the accuracy on all
rows of the validation (or test) data: the mean over the draws, and the worst, since few examples differ a lot.
"""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import evaluate
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from shared.arguments import DataArguments, ModelArguments, check_at_least, check_evaluation, parse_arguments
from shared.language_model import find_language_model
from shared.methods import prompt_rate
from shared.models import find_model, find_packaged_encoder, load_tokenizer
from shared.sources import DATA, METRICS, load_data
from text_classification import number_labels
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_ptuning_ext import ClozeClassifier, PromptTemplate, PTuningConfig


TRAINING_DEFAULTS = {
    "output_dir": "outputs/few_shot",
    "max_steps": 60,
    "learning_rate": None,  # in units of where the prompt starts
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "no",
    "save_strategy": "no",
}
SPEECH_ACTS = {"train": DATA / "speech_acts" / "train.jsonl", "validation": DATA / "speech_acts" / "test.jsonl"}
LABELS = ["apology", "congratulation", "question", "thanks", "warning"]  # of the ten, without arguments


@dataclass
class FewShotArguments:
    """The examples, and what is compared on them."""

    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the labels, words or numbers."})
    max_length: int = field(default=96, metadata={"help": "Longer texts are cut to this many tokens."})
    shots: int = field(default=8, metadata={"help": "Examples per class."})
    draws: int = field(default=2, metadata={"help": "How often the examples are drawn anew."})
    methods: list[str] | None = field(
        default=None,
        metadata={
            "help": "Some of template_cloze, zero_shot, prompt_head, deep_prompt_head, lora_head, head. Default: all."
        },
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": "Causal language model for the template. Default: SmolLM2-135M-Instruct of PyPI."},
    )
    template: str = field(
        default="{prompt:5} {text} {prompt:5} This is a {mask}",
        metadata={"help": "Prompt template with the column `text`, and `{mask}` at the end."},
    )
    placeholder: str | None = field(
        default=None, metadata={"help": "Token for the template's slots. Default: one that no text has."}
    )
    label_words: str | None = field(
        default=None, metadata={"help": "JSON: a list of words for each label. Default: the labels' own names."}
    )
    num_virtual_tokens: int = field(default=10, metadata={"help": "Number of trained vectors of a prompt in front."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of LoRA."})
    head_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of a head alone."})


@dataclass
class Task:
    """What all methods share: the models' names, the data and its labels, the arguments."""

    encoder: str
    language_model: str | None  # for the methods that read words
    labels: list[str]
    few: FewShotArguments
    training: TrainingArguments


@dataclass
class Learner:
    """A model that a method has made trainable, what encodes rows for it, and the rate at which it is trained."""

    model: nn.Module
    tokenizer: object
    encode: Callable[[dict], dict]
    learning_rate: float


def read_words(label_words: str | None, labels: list[str]) -> dict[str, list[str]]:
    """Returns the words of each label, which are their own names where none are given.

    Raises:
        ValueError: `label_words` is no JSON object, or has other labels.
    """
    if label_words is None:
        return {label: [label] for label in labels}
    try:
        words = json.loads(label_words)
    except json.JSONDecodeError as error:
        raise ValueError(f"`--label_words` should be a JSON object, got {label_words!r}: {error}.") from None
    if not isinstance(words, dict):
        raise ValueError(f"`--label_words` should be a JSON object, got {label_words!r}.")
    if set(words) != set(labels):
        raise ValueError(f"`--label_words` has {sorted(words)}, and the labels are {sorted(labels)}.")
    return words


def make_cloze(task: Task) -> Learner:
    """A template on a language model, which reads the labels' words behind the text."""
    few = task.few
    config = AutoConfig.from_pretrained(task.language_model)
    tokenizer = load_tokenizer(task.language_model, config, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(task.language_model, dtype="float32")
    words = read_words(few.label_words, task.labels)
    template = PromptTemplate(few.template, ["text"], few.placeholder).for_tokenizer(tokenizer)
    cloze = ClozeClassifier(model, tokenizer, {label: words[label] for label in task.labels}, calibration="contextual")
    adapted = get_peft_model(
        cloze,
        PTuningConfig(task_type="SEQ_CLS", prompt_template=template, prompt_tuning_init="SAMPLE_VOCAB"),
    )
    cloze.calibrate(template)
    encode = template.map_function(tokenizer, few.max_length)
    return Learner(adapted, tokenizer, encode, task.training.learning_rate or prompt_rate(adapted))


def make_zero_shot(task: Task) -> Learner:
    """The same language model and words without a prompt and without training."""
    learner = make_cloze(task)
    template = learner.model.peft_config["default"].prompt_template
    cloze = learner.model.unload()
    cloze.calibrate(template, keep_slots=False)
    encode = template.map_function(learner.tokenizer, task.few.max_length, keep_slots=False)
    return Learner(cloze, learner.tokenizer, encode, 0.0)


def _load_encoder(task: Task, learning_rate: float) -> Learner:
    config = AutoConfig.from_pretrained(task.encoder, num_labels=len(task.labels))
    config.problem_type = "single_label_classification"
    tokenizer = load_tokenizer(task.encoder, config)
    model = AutoModelForSequenceClassification.from_pretrained(task.encoder, config=config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # in frozen layers, dropout only adds noise
    model.accepts_loss_kwargs = False  # see shared/methods.py

    def encode(rows: dict) -> dict:
        return tokenizer(rows["text"], truncation=True, max_length=task.few.max_length)

    return Learner(model, tokenizer, encode, learning_rate)


def make_prompt(task: Task, depth: str = "INPUT") -> Learner:
    """A prompt in front of the encoder's texts, and a head."""
    learner = _load_encoder(task, 0.0)
    config = PTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=task.few.num_virtual_tokens, prompt_depth=depth)
    learner.model = get_peft_model(learner.model, config)
    learner.learning_rate = task.training.learning_rate or prompt_rate(learner.model)
    return learner


def make_deep_prompt(task: Task) -> Learner:
    """A prompt in every layer of the encoder, and a head."""
    return make_prompt(task, "DEEP")


def make_lora(task: Task) -> Learner:
    """LoRA and a head."""
    learner = _load_encoder(task, task.few.lora_learning_rate)
    learner.model = get_peft_model(learner.model, LoraConfig(task_type="SEQ_CLS", r=task.few.lora_r))
    return learner


def make_head(task: Task) -> Learner:
    """The head alone."""
    learner = _load_encoder(task, task.few.head_learning_rate)
    learner.model.base_model.requires_grad_(False)
    return learner


# By name, what makes a model trainable. What has the learning rate 0 is measured as it is.
METHODS: dict[str, Callable[[Task], Learner]] = {
    "template_cloze": make_cloze,
    "zero_shot": make_zero_shot,
    "prompt_head": make_prompt,
    "deep_prompt_head": make_deep_prompt,
    "lora_head": make_lora,
    "head": make_head,
}


def draw_examples(rows: Dataset, shots: int, seed: int) -> Dataset:
    """Returns `shots` rows of each label, drawn at random.

    Raises:
        ValueError: A label has fewer rows.
    """
    by_label: dict[int, list[int]] = {}
    for i, label in enumerate(rows["label"]):
        by_label.setdefault(label, []).append(i)
    if short := [label for label, found in by_label.items() if len(found) < shots]:
        raise ValueError(f"`--shots` is {shots}, and label number {short[0]} has {len(by_label[short[0]])} rows.")
    rng = random.Random(seed)
    return rows.select([i for label in sorted(by_label) for i in rng.sample(by_label[label], shots)])


def run_method(make: Callable[[Task], Learner], task: Task, examples: Dataset, measured: Dataset, seed: int) -> float:
    """Trains one method on the examples of one draw, and returns its accuracy on the measured rows."""
    set_seed(seed)
    learner = make(task)
    args = copy.copy(task.training)
    args.seed, args.learning_rate = seed, learner.learning_rate
    metric = evaluate.load(str(METRICS / "accuracy_f1"), keep_in_memory=True)
    trainer = Trainer(
        model=learner.model,
        args=args,
        train_dataset=examples.map(learner.encode, batched=True, remove_columns=["text"]),
        eval_dataset=measured.map(learner.encode, batched=True, remove_columns=["text"]),
        processing_class=learner.tokenizer,
        data_collator=DataCollatorWithPadding(learner.tokenizer),
        compute_metrics=lambda output: metric.compute(
            predictions=output.predictions.argmax(-1), references=output.label_ids
        ),
    )
    if learner.learning_rate:
        trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def write_results(scores: dict[str, list[float]], task: Task) -> str:
    """Writes metrics.json and few_shot.md, and returns the table."""
    few, folder = task.few, Path(task.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: {"mean": mean(values), "worst": min(values), "draws": values} for name, values in scores.items()}
    settings = {"shots": few.shots, "steps": task.training.max_steps, "labels": task.labels}
    (folder / "metrics.json").write_text(json.dumps({"accuracy": rows, **settings}, indent=2) + "\n")
    lines = [f"Accuracy, {few.shots} examples per class, {few.draws} draws", "", "| method | mean | worst |"]
    lines += ["|---|---:|---:|"]
    lines += [f"| {name} | {row['mean']:.1%} | {row['worst']:.1%} |" for name, row in rows.items()]
    (folder / "few_shot.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, FewShotArguments, TrainingArguments]
    model_args, data_args, few, training = parse_arguments(dataclasses, TRAINING_DEFAULTS, argv)
    check_evaluation(training)
    check_at_least(1, few, "draws", "shots", "max_length")
    if "{text}" not in few.template:
        raise ValueError(f"`--template` should have {{text}} where the text goes, got {few.template!r}.")
    names = list(METHODS) if few.methods is None else few.methods
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"`--methods` has {unknown[0]!r}, and there are {', '.join(METHODS)}.")
    if training.resume_from_checkpoint is not None:
        raise ValueError("`--resume_from_checkpoint`: few_shot.py trains many short runs, and continues none of them.")
    is_default = data_args.train_file is None and data_args.dataset_name is None
    data = load_data(data_args, SPEECH_ACTS)
    if is_default:
        data = DatasetDict({split: rows.filter(lambda row: row["label"] in LABELS) for split, rows in data.items()})
    data, labels = number_labels(data, few.text_column, few.label_column)
    reads_words = {"template_cloze", "zero_shot"} & {*names}
    language_model = find_model(few.language_model or find_language_model()) if reads_words else None
    task = Task(
        encoder=find_model(model_args.model_name_or_path or find_packaged_encoder()),
        language_model=language_model,
        labels=labels,
        few=few,
        training=training,
    )
    if reads_words:  # template and words are checked before another method is trained
        make_cloze(task).encode(data["train"][:1])
    measured = data["test" if "test" in data else "validation"]
    scores: dict[str, list[float]] = {name: [] for name in names}
    for draw in range(few.draws):
        examples = draw_examples(data["train"], few.shots, training.seed + draw)
        for name in names:
            scores[name].append(run_method(METHODS[name], task, examples, measured, training.seed + draw))
            print(f"draw {draw + 1}, {name}: accuracy {scores[name][-1]:.1%}", flush=True)
    print(write_results(scores, task))


if __name__ == "__main__":
    main()
