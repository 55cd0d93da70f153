# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The measuring of banks from end to end on tiny models. No test asks how fast."""

import json

import bank


def test_everything_is_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bank, "in_a_process", lambda function, *arguments: function(*arguments))
    sizes = ["--model_size", "tiny", "--prompts", "1", "3", "--repeats", "2"]
    bank.main([*sizes, "--peft_adapters", "5", "--peft_loras", "4", "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "bank.json").read_text(encoding="utf-8"))
    assert list(report["banks"]) == ["1", "3"]
    for found in report["banks"].values():
        assert len(found) == 7
        assert all(value > 0 for name, value in found.items() if not name.startswith("bytes"))
    assert {name: found["count"] for name, found in report["peft"].items()} == {"prompt": 5, "LoRA": 4}
    rows = [line for line in (tmp_path / "bank.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 7 + 2 + 2
