# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter: what it is, and the lines that load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .checkpoint import ENCODER_KEY, TOKENS_KEY


# Below this line PEFT lists versions.
VERSIONS = "### Framework versions"

# What a deep prompt has in every layer, by the names that they are saved under.
KINDS = ("keys", "values")

# Pipeline of the Hub and class of PEFT for a task type.
TASKS: dict[str, tuple[Optional[str], str]] = {
    "SEQ_CLS": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoPeftModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoPeftModelForQuestionAnswering"),
    "CAUSAL_LM": ("text-generation", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoPeftModelForSeq2SeqLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoPeftModelForFeatureExtraction"),
}

EXPORTS = (
    "`export_to_peft` of that package writes the prompt of a generating model for PEFT alone, `export_standalone` a",
    "whole model that needs neither.",
)
EXPORTS_DEEP = ("`export_to_peft` of that package writes the prompt as prefix tuning for PEFT, where both agree.",)


def fill_card(
    card: ModelCard,
    name: str,
    config: PeftConfig,
    base_model: str,
    shapes: Mapping[str, tuple[int, ...]],
    size: int,
    metrics: Optional[Mapping[str, float]] = None,
) -> None:
    """Writes the text of a card, and what its data has no value for.

    Args:
        card (`ModelCard`): Of its text, the versions that PEFT lists at the end stay.
        name (`str`): Name under which the adapter is loaded.
        config ([`PTuningConfig`]): The adapter's.
        base_model (`str`): Name of the model that it is for, empty if it has none.
        shapes (`Mapping[str, tuple[int, ...]]`): Of the saved tensors, by key.
        size (`int`): Bytes that are saved.
        metrics (`Mapping[str, float]`, *optional*): What was measured, by name.
    """
    task = str(getattr(config.task_type, "value", config.task_type))
    pipeline, auto_class = TASKS.get(task, (None, None))
    card.data.library_name = "peft"
    card.data.tags = sorted({*(card.data.tags or []), "p-tuning", "peft_ptuning_ext"})
    card.data.license = card.data.license or "unknown"
    card.data.pipeline_tag = card.data.pipeline_tag or pipeline
    card.data.metrics = list(metrics) if metrics else card.data.metrics
    if base_model and not Path(base_model).exists():  # the name of a folder means nothing to others
        card.data.base_model = base_model

    states = {key: shape for key, shape in shapes.items() if any(f"{ENCODER_KEY}{kind}." in key for kind in KINDS)}
    constants = {key for key in shapes if key.endswith(f"{ENCODER_KEY}offset")}
    if config.encoder_reparameterization_type != "NONE":
        constants |= states.keys()
    trained = {key: shape for key, shape in shapes.items() if key not in constants}
    heads = {key: shape for key, shape in trained.items() if ENCODER_KEY not in key}
    if states:
        deployed, layers = _count(states), len(states) // len(KINDS)
        prompt = f"keys and values of {config.num_virtual_tokens} positions in each of {layers} layers"
    else:
        table = next(shape for key, shape in trained.items() if key.endswith(f"{ENCODER_KEY}embedding"))
        deployed, prompt = math.prod(table), f"{table[0]} vectors of {table[1]}"
    rows = {
        "base model": f"`{base_model}`" if base_model else "not named",
        "task": task if auto_class else "none of PEFT's task types",
        "prompt": f"{prompt}, encoder `{config.encoder_reparameterization_type.value}`",
        "trained": f"{_count(trained):,} parameters, of which {_count(heads) + deployed:,} are deployed",
        "saved": f"{size:,} bytes",
        **{metric: f"{value:.4f}" for metric, value in (metrics or {}).items()},
    }
    lines = ["import peft_ptuning_ext"]
    if auto_class and base_model:
        outputs = [shape for key, shape in heads.items() if len(shape) == 2 and not key.endswith(TOKENS_KEY)]
        # A head may have square layers before the one that gives the classes.
        classes = [shape[0] for shape in outputs if shape[0] != shape[1]] or [shape[0] for shape in outputs]
        labels = f", num_labels={min(classes)}" if classes and "Classification" in auto_class else ""
        lines += [f"from peft import {auto_class}", "", f'model = {auto_class}.from_pretrained("{name}"{labels})']
    else:
        lines += ["from peft import PeftModel", "", f'model = PeftModel.from_pretrained(base_model, "{name}")']
    what = "keys and values in every layer" if states else "vectors"
    if config.cloze is not None:
        lines = ["from peft_ptuning_ext import ClozeClassifier", ""]
        lines += [f'model = ClozeClassifier.from_pretrained(language_model, tokenizer, "{name}")']
    if config.prompt_template is not None:
        rows["template"] = f"`{config.prompt_template.text}`".replace("|", r"\|").replace("\n", r"\n")
    _, _, versions = card.text.partition(VERSIONS)
    card.text = "\n".join(
        [
            f"\n# {name}\n",
            f"A prompt of continuous {what} (P-tuning) for a frozen model, trained with `peft_ptuning_ext`.\n",
            *("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())),
            *("\n```python", *lines, "```\n"),
            "The first line is needed: without it, PEFT does not know this kind of adapter.",
            *(EXPORTS_DEEP if states else EXPORTS),
            *([f"\n{VERSIONS}{versions}"] if versions else []),
        ]
    )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def complete_card(folder: Path, config: PeftConfig) -> None:
    """Fills the card of a saved adapter if it is the template as PEFT leaves it, with placeholders only."""
    path, weights = folder / "README.md", folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() or not weights.is_file():
        return
    card = ModelCard.load(path)
    template = ModelCard.from_template(ModelCardData())
    if card.text.partition(VERSIONS)[0].split() != template.text.partition(VERSIONS)[0].split():
        return
    with safe_open(weights, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    if not any(ENCODER_KEY in key for key in shapes):
        return  # the weights are those of another adapter
    name = folder.resolve().name
    fill_card(card, name, config, config.base_model_name_or_path or "", shapes, weights.stat().st_size)
    card.save(path)
