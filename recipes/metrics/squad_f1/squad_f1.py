# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 of SQuAD (Rajpurkar et al., 2016) as a metric for `evaluate.load(folder)`, which needs no Hub."""

import re
import string
from collections import Counter

import datasets
import evaluate


class SquadF1(evaluate.Metric):
    """The share of answers that are right, and the mean F1 of their words. Of several references the best one counts.

    Case, punctuation, articles and spaces are ignored. If a question has no answer, only "" is right.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Exact match and F1 of words, as defined for SQuAD 1.1 and 2.0; between 0 and 1.",
            citation="",
            inputs_description="predictions: an answer per question. references: a list of right answers, or none.",
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = [
            (_words(prediction), [_words(answer) for answer in answers or [""]])
            for prediction, answers in zip(predictions, references)
        ]
        return {
            "exact_match": sum(prediction in answers for prediction, answers in pairs) / len(pairs),
            "f1": sum(max(_f1(prediction, answer) for answer in answers) for prediction, answers in pairs)
            / len(pairs),
        }


def _words(text: str) -> list[str]:
    without_punctuation = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split()


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    return 2 * (Counter(prediction) & Counter(answer)).total() / (len(prediction) + len(answer))
