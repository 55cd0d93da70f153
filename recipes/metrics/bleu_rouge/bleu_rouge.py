# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""BLEU, ROUGE-L and exact match as a metric for `evaluate.load(folder)`, which then needs no Hub."""

import datasets
import evaluate
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer


class BleuRouge(evaluate.Metric):
    """Compares each generated text with one or more references. The three scores go from 0 to 100."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU by sacrebleu. ROUGE-L (F1) by rouge-score and exact match: means over the texts, "
            "for each of which its best reference counts.",
            citation="",
            inputs_description="predictions: texts. references: a list of one or more texts for each prediction.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                },
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        most = max(map(len, references))
        streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
        rouge = RougeScorer(["rougeL"])
        pairs = list(zip(predictions, references, strict=True))
        return {
            "bleu": sacrebleu.corpus_bleu(predictions, streams).score,
            "rouge_l": 100 * sum(rouge.score_multi(own, text)["rougeL"].fmeasure for text, own in pairs) / len(pairs),
            "exact_match": 100 * sum(text in own for text, own in pairs) / len(pairs),
        }
