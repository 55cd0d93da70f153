# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the comparison compares: its tasks with their data, and its methods with their changes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """A recipe and its data. `options` are options of the recipe, the same for every method."""

    recipe: str
    metric: str  # decides
    test: str
    steps: int
    options: dict = field(default_factory=dict)
    test_rows: int | None = None
    seeds: int = 3
    search_seeds: int = 3
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    best: float = 1  # the highest value of the metric
    others: tuple[str, ...] = ()  # further metrics of the recipe, shown as they are
    folder: str | None = None  # of the data, where it is not named as the task
    neighbours: int = 20  # test rows that stay together if not all are taken: often rows of one input or article

    def score(self, metrics: dict, when: str = "after") -> float:
        """The metric "before" or "after" training, from 0 to 1."""
        return metrics[when][self.metric] / self.best


@dataclass(frozen=True)
class Method:
    """What is trained. `options` are options of the recipe, most of them those of `MethodArguments`.

    With `first`, the method of this name trains for the first half of the steps, and this one starts from its prompt.
    """

    name: str
    options: dict
    first: str | None = None


METHODS = {
    "ptuning": Method("this package, NONE", {"method": "ptuning", "depth": "INPUT", "encoder": "NONE"}),
    "ptuning_mlp": Method("this package, MLP", {"method": "ptuning", "depth": "INPUT", "encoder": "MLP"}),
    "ptuning_deep": Method(
        "this package, deep", {"method": "ptuning", "depth": "DEEP", "encoder": "NONE", "num_virtual_tokens": 32}
    ),
    "ptuning_unfolded": Method(
        "this package, at the input, then deep",
        {
            "method": "ptuning",
            "depth": "DEEP",
            "encoder": "NONE",
            "shift_positions": True,
            "prompt_tuning_init": "ADAPTER",
        },
        first="ptuning",
    ),
    "peft_ptuning": Method("PEFT P-tuning", {"method": "peft_ptuning"}),
    "peft_prefix": Method("PEFT prefix tuning", {"method": "peft_prefix", "num_virtual_tokens": 32}),
    "lora": Method("LoRA, r = 8", {"method": "lora"}),
    "head": Method("head only", {"method": "head"}),
}
# What `--ablation` changes, one at a time, and what besides in a deep prompt.
COMMON_CHANGES = (
    ("length5", "V = 5", {"num_virtual_tokens": 5}),
    ("length50", "V = 50", {"num_virtual_tokens": 50}),
    ("sample_vocab", "start SAMPLE_VOCAB", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    ("constant", "constant rate", {"lr_scheduler_type": "constant_with_warmup"}),
    ("no_warmup", "no warm-up", {"warmup_steps": 0}),
    ("clip0.1", "clipping at 0.1", {"max_grad_norm": 0.1}),
    ("no_clip", "no clipping", {"max_grad_norm": 0}),
)
DEEP_CHANGES = (
    ("zero_values", "start ZERO_VALUES", {"prompt_tuning_init": "ZERO_VALUES"}),
    ("dropout0.1", "dropout 0.1", {"encoder_dropout": 0.1}),
    ("mlp", "encoder MLP", {"encoder": "MLP"}),
)
# By what is changed, and the name of the change's folder.
CHANGES = {
    changed: {f"{prefix}{name}": Method(text, METHODS[changed].options | change) for name, text, change in changes}
    for changed, prefix, changes in (
        ("ptuning", "", COMMON_CHANGES),
        ("ptuning_deep", "deep_", COMMON_CHANGES + DEEP_CHANGES),
    )
}
TRAINED = METHODS | CHANGES["ptuning"] | CHANGES["ptuning_deep"]
BATCH = {"per_device_train_batch_size": 32, "train_sampling_strategy": "group_by_length"}
TASKS = {
    "sst2": Task(
        "text_classification",
        "accuracy",
        "test.jsonl",
        200,
        {**BATCH, "max_length": 64},
        seeds=5,
    ),
    "banking77": Task("text_classification", "accuracy", "test.jsonl", 300, {**BATCH, "max_length": 64}),
    "wnut17": Task("token_classification", "f1", "test.jsonl", 200, {**BATCH, "max_length": 96}),
    "squad": Task(
        "question_answering",
        "f1",
        "validation.jsonl",
        600,
        {**BATCH, "per_device_train_batch_size": 16, "max_length": 256, "doc_stride": 64},
        test_rows=400,
        learning_rates=(1e-2, 1e-1),
    ),
    "e2e_nlg": Task(
        "causal_lm",
        "rouge_l",
        "test.jsonl",
        300,
        {**BATCH, "per_device_train_batch_size": 16, "max_length": 200, "max_new_tokens": 64},
        test_rows=800,
        learning_rates=(1e-2, 1e-1),
        best=100,
        others=("bleu", "perplexity"),
    ),
    # The model writes the name of the class.
    "banking77_text": Task(
        "causal_lm",
        "exact_match",
        "test.jsonl",
        100,
        {
            **BATCH,
            "per_device_train_batch_size": 16,
            "max_length": 160,
            "max_new_tokens": 24,
            "prompt_column": "text",
            "response_column": "label_name",
        },
        test_rows=400,
        learning_rates=(3e-3, 5e-2),
        best=100,
        others=("perplexity",),
        folder="banking77",
        neighbours=1,  # they are in the order of their classes
    ),
}
# Those of a language model take hours, and are measured if they are named.
OF_LANGUAGE_MODELS = [name for name, task in TASKS.items() if task.recipe == "causal_lm"]
SPEECH_ACTS = Task("text_classification", "accuracy", "test.jsonl", 300, {"per_device_train_batch_size": 16})
