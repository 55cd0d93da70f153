# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny backbone on disk for the recipes, and how a test runs one of them."""

import json
import re
import string
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RUN = {
    "max_steps": 40,
    "eval_strategy": "steps",
    "eval_steps": 20,
    "save_strategy": "steps",
    "save_steps": 20,
    "num_virtual_tokens": 4,
    "learning_rate": 0.1,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "use_cpu": True,
}


PLOTS = {"loss_curve.png", "metric_curves.png"}
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "metrics.json",
    "predictions.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",
    *PLOTS,
}


def read_rows(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_backbone(folder: Path, texts: list[str]) -> str:
    """A BERT of two layers whose tokenizer knows the commonest words of the texts, and letters for all others."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *string.digits]
    pieces += [*string.punctuation, *("##" + letter for letter in string.ascii_lowercase + string.digits)]
    words = Counter(word for text in texts for word in re.findall("[a-z]{2,}", text.lower()))
    pieces += [word for word, _ in words.most_common(100)]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that different texts come out visibly different
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def as_words(arguments: dict) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def run(recipe: ModuleType, arguments: dict) -> None:
    recipe.main(as_words(arguments))


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def losses(metrics: dict) -> list[float]:
    """The training losses that were logged."""
    return [entry["loss"] for entry in metrics["history"] if "loss" in entry]


def outcome(folder: Path) -> tuple:
    """What a run writes, without the prompt's way since the process began, which is another one after resuming."""
    metrics = read_metrics(folder)
    for entry in metrics["history"]:
        entry.pop("prompt_shift", None)
    files = ("predictions.jsonl", "adapter_model.safetensors")
    return metrics, *((folder / name).read_bytes() for name in files)


def train(recipe: ModuleType, arguments: dict, output: Path) -> SimpleNamespace:
    """Runs a recipe. Returns folder, model, parameters before, names of those that moved, metrics and predictions."""
    seen = {}
    load_model = recipe.load_model

    def load_and_remember(*args):
        model, tokenizer = load_model(*args)
        seen.update(model=model, before={name: p.detach().clone() for name, p in model.named_parameters()})
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "load_model", load_and_remember)
        run(recipe, {**arguments, "output_dir": output})
    before = seen["before"]
    moved = {name for name, p in seen["model"].named_parameters() if not torch.equal(p.detach(), before[name])}
    rows = read_rows(output / "predictions.jsonl")
    return SimpleNamespace(output=output, metrics=read_metrics(output), rows=rows, moved=moved, **seen)


def assert_deep_prompt_is_saved(run: SimpleNamespace, length: int, layers: int, start: str) -> None:
    """The adapter has moved keys and values of every layer, and what its config says of them."""
    config = json.loads((run.output / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["prompt_depth"], config["prompt_tuning_init"]) == ("DEEP", start)
    saved = load_file(run.output / "adapter_model.safetensors")
    prompt = {name: tensor for name, tensor in saved.items() if "ptuning_encoders" in name}
    assert len(prompt) == 2 * layers
    assert {tensor.shape[1] for tensor in prompt.values()} == {length}
    moved = {name for name in run.moved if "ptuning_encoders" in name}
    assert len(moved) == 2 * layers
    heads = sum(tensor.numel() for name, tensor in saved.items() if name not in prompt)
    deployed = heads + sum(tensor.numel() for tensor in prompt.values())
    assert run.metrics["trained_parameters"] == run.metrics["deployed_parameters"] == deployed
    assert run.metrics["before"]["loss"] != run.metrics["after"]["loss"]
