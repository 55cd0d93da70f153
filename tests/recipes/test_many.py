# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The measuring of an adapter for each row, from end to end on a tiny model. No test asks how fast."""

import json

import many
import numpy as np
import torch


def test_every_ratio_is_that_of_the_same_round(tmp_path) -> None:
    arguments = [
        "--model_size",
        "tiny",
        "--rows",
        "4",
        "--shared",
        "2",
        "--lora_rows",
        "2",
        "--rounds",
        "3",
        "--new_tokens",
        "2",
    ]
    many.main([*arguments, "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "many.json").read_text())
    assert report["settings"]["rows"] == 4
    _, _, *rows = (tmp_path / "many.md").read_text().splitlines()
    assert len(rows) == len(many.RATIOS) == 6
    seconds = report["seconds"]
    assert {len(values) for case in seconds.values() for values in case.values()} == {3}
    above, below = seconds["a prompt for each row"]["train_step"], seconds["one prompt"]["train_step"]
    low, median, high = np.quantile(np.divide(above, below), [0.25, 0.5, 0.75])
    assert rows[0].endswith(f"| {median:.2f} ({low:.2f}–{high:.2f}) |")
    assert rows[2].startswith("| 2 prompts ÷ 2 prompts, concatenated | 4 |")
    assert rows[4].startswith("| a LoRA for each row ÷ one LoRA | 2 |")


def test_adapters_differ() -> None:
    settings = many.BenchmarkArguments(model_size="tiny", device="cpu")
    base = many.load_base(settings)
    for config in (many.PTuningConfig, lambda: many.LoraConfig(target_modules=["q_proj"])):
        model = many.add_adapters(base, config, 2)
        ids = torch.randint(100, (2, 5))
        both = [model(input_ids=ids, adapter_names=[name] * 2).logits for name in ("0", "1")]
        assert (both[0] - both[1]).abs().max() > 1e-4
