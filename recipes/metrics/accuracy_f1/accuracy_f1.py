# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Accuracy and macro F1 as a metric for `evaluate.load(folder)`, which then needs no Hub."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score


class AccuracyF1(evaluate.Metric):
    """The share of right predictions, and the mean over the classes of their F1 scores."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy and macro F1 of a classification, computed by scikit-learn.",
            citation="",
            inputs_description="predictions and references: class numbers, one per example.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")},
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro")),
        }
