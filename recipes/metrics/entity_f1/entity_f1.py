# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Precision, recall and F1 of entities as a metric for `evaluate.load(folder)`, which then needs no Hub."""

import datasets
import evaluate
from seqeval.metrics.sequence_labeling import accuracy_score, precision_recall_fscore_support


class EntityF1(evaluate.Metric):
    """An entity is found if its first word, its last word and its kind are right. Accuracy is that of the words."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Precision, recall and F1 of entities over all kinds, computed by seqeval.",
            citation="",
            inputs_description="predictions and references: the BIO tags of the words, one list per text.",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, average="micro", zero_division=0
        )
        return {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "accuracy": float(accuracy_score(references, predictions)),
        }
