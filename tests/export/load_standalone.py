# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What a stranger computes from exported folders, in a process that has neither PEFT nor this package.

    python tests/load_standalone.py FOLDER

FOLDER holds an exported folder for each case and `cases.json`, which names their classes and texts.
"""

import json
import sys
from pathlib import Path


sys.modules["peft"] = sys.modules["peft_ptuning_ext"] = None  # to import them is an ImportError now

# After that line, as transformers looks for PEFT when it is imported.
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


torch.set_num_threads(1)


@torch.no_grad()
def compute(folder: Path, auto_class: str, texts: list[str], new_tokens: int) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto_class).from_pretrained(folder, attn_implementation="eager")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    single = tokenizer(texts[:1], return_tensors="pt")
    if auto_class == "AutoModelForSeq2SeqLM":
        single["decoder_input_ids"] = torch.tensor([[0, 7, 8, 9]])
    outputs = model(**single)
    result = {"batch": dict(batch), "dtype": model.dtype, "logits": getattr(outputs, "logits", None)}
    if "QuestionAnswering" in auto_class:
        result["logits"] = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    if model.can_generate() and "MaskedLM" not in auto_class:
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        result["greedy"] = model.generate(**batch, **options)
        result["beam"] = model.generate(**batch, **options, num_beams=3)
        scored = model.generate(**single, **options, output_scores=True, return_dict_in_generate=True)
        result["probabilities"] = scored.scores[0].float().softmax(-1)
    return result


if __name__ == "__main__":
    root = Path(sys.argv[1])
    cases = json.loads((root / "cases.json").read_text(encoding="utf-8"))
    torch.save({name: compute(root / name, **case) for name, case in cases.items()}, root / "computed.pt")
