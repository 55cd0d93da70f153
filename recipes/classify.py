# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Labels sentences with an adapter that text_classification.py has saved.

python recipes/classify.py outputs/text_classification "Could you open the window?" "What a great score!"
"""

import argparse
import warnings

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import peft_ptuning_ext  # noqa: F401  the import tells PEFT what a PTUNING adapter is


# PEFT 0.21 itself reads the old name while it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

SENTENCES = [
    "Sorry, the last slice of pie was yours and I ate it.",
    "Would you hold the ladder for me while I climb up?",
    "Hats off to you for finishing the marathon!",
    "Careful, the paint on that bench is still wet.",
    "How long does the ferry take?",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="Folder of the adapter.")
    parser.add_argument("sentences", nargs="*", help="Default: a few sentences of this file.")
    parser.add_argument(
        "--model_name_or_path", help="Folder or Hub id of the backbone, if it has changed since training."
    )
    args = parser.parse_args(argv)
    sentences = args.sentences or SENTENCES

    # The recipe saves the model's config beside the adapter, with the number and the names of the labels.
    config = AutoConfig.from_pretrained(args.adapter)
    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    backbone = args.model_name_or_path or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    model = AutoModelForSequenceClassification.from_pretrained(backbone, config=config)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    print("If the report above calls the head's weights MISSING: the backbone has none, the head is in the adapter.")

    with torch.inference_mode():
        logits = model(**tokenizer(sentences, truncation=True, padding=True, return_tensors="pt")).logits  # (B, N)
    for sentence, row in zip(sentences, logits.softmax(-1), strict=True):
        print(f"{config.id2label[int(row.argmax())]:>16} {row.max():7.1%}  {sentence}")


if __name__ == "__main__":
    main()
