# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The model card says what an adapter is, and its lines load it when they are pasted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_model
from huggingface_hub import ModelCard
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, get_peft_model
from reference import V, main_output, make_batch

from peft_ptuning_ext import PTuningConfig, make_model_card


def make_adapted_in(folder: Path, family: str, task: str, **sizes) -> PeftModel:
    """An adapted model whose base is saved in `folder`."""
    base = make_model(family, task, **sizes)
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    return get_peft_model(base, make_config(task, encoder_hidden_size=8)).eval()


def paste(card: ModelCard, **names) -> PeftModel:
    """What the lines of the card load."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code.startswith("import peft_ptuning_ext\n")
    exec(code, names)
    return names["model"]


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("BERT", "SEQ_CLS", {"num_labels": 4}),
        ("RoBERTa", "SEQ_CLS", {"num_labels": 3}),
        ("RoBERTa", "SEQ_CLS", {"num_labels": 40}),  # more than the width
        ("BERT", "TOKEN_CLS", {"num_labels": 5}),
        ("BERT", "QUESTION_ANS", {}),
        ("Llama", "CAUSAL_LM", {}),
        ("T5", "SEQ_2_SEQ_LM", {}),
        ("BERT", "FEATURE_EXTRACTION", {}),
    ],
)
def test_the_lines_of_a_card_load_the_adapter(family, task, options, tmp_path, monkeypatch) -> None:
    model, batch = make_adapted_in(tmp_path, family, task, **options), make_batch(family, task)
    model.save_pretrained(tmp_path / "my-prompt")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        expected = main_output(model(**batch))
        for card in (ModelCard.load("my-prompt/README.md"), make_model_card(model, "my-prompt")):
            torch.testing.assert_close(main_output(paste(card).eval()(**batch)), expected, rtol=0, atol=1e-6)
            assert card.data.library_name == "peft"
            assert {"p-tuning", "peft_ptuning_ext"} <= set(card.data.tags)
            assert card.data.license == "unknown"
            assert "[More Information Needed]" not in card.text
            size = (tmp_path / "my-prompt" / "adapter_model.safetensors").stat().st_size
            assert f"| saved | {size:,} bytes |" in card.text
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            assert f"| trained | {trained:,} parameters" in card.text
            assert (
                f"| prompt | {V} vectors of {model.base_model.prompt_embeddings().shape[1]}, encoder `MLP` |"
                in card.text
            )
    assert "### Framework versions\n\n- PEFT" in (tmp_path / "my-prompt" / "README.md").read_text()


@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
def test_a_card_counts_the_keys_and_values_of_a_deep_prompt(encoder, tmp_path) -> None:
    model = make_adapted("Llama", prompt_depth="DEEP", encoder_reparameterization_type=encoder)
    model.save_pretrained(tmp_path / "my-prompt")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    deployed = 2 * 2 * 2 * V * 8  # layers, keys and values, heads, V, D
    for card in (ModelCard.load(tmp_path / "my-prompt" / "README.md"), make_model_card(model, "my-prompt")):
        assert f"| prompt | keys and values of {V} positions in each of 2 layers, encoder `{encoder}` |" in card.text
        assert f"| trained | {trained:,} parameters, of which {deployed:,} are deployed |" in card.text


def test_a_model_without_a_task_type_is_loaded_onto_its_base(tmp_path, monkeypatch) -> None:
    model = make_adapted("BERT", "masked LM")
    model.save_pretrained(tmp_path / "my-prompt")
    monkeypatch.chdir(tmp_path)
    batch = make_batch("BERT", "masked LM")
    loaded = paste(ModelCard.load("my-prompt/README.md"), base_model=make_model("BERT", "masked LM"))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_what_a_card_is_told(tmp_path) -> None:
    model = make_adapted(length=20)
    model.peft_config["default"].base_model_name_or_path = "someone/model"
    card = make_model_card(model, "user/prompt", license="apache-2.0", metrics={"rouge_l": 0.51234})
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.license, data.metrics) == ("someone/model", "apache-2.0", ["rouge_l"])
    assert data.pipeline_tag == "text-generation"
    assert "| rouge_l | 0.5123 |" in card.text
    assert 'from_pretrained("user/prompt")' in card.text
    assert "20 vectors of 32, encoder `NONE`" in card.text
    assert "640 parameters, of which 640 are deployed" in card.text


def test_a_card_that_someone_wrote_stays(tmp_path) -> None:
    model = make_adapted(length=20)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWith words of my own.\n")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.text.startswith("# Mine\n\nWith words of my own.\n")
    model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").text == card.text
    (tmp_path / "README.md").write_text("# Mine\n\nTwo pages of mine.\n\n## Risks\n\n[More Information Needed]\n")
    model.save_pretrained(tmp_path)
    assert "Two pages of mine." in (tmp_path / "README.md").read_text()
    model.peft_config["default"].save_pretrained(tmp_path / "config")
    assert [path.name for path in (tmp_path / "config").iterdir()] == ["adapter_config.json"]


def test_a_config_saved_over_another_adapter_leaves_its_card(tmp_path) -> None:
    get_peft_model(make_model("Llama", "CAUSAL_LM"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    PTuningConfig().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before


def test_without_the_package_peft_has_its_own_error(tmp_path) -> None:
    make_adapted_in(tmp_path, "Llama", "CAUSAL_LM").save_pretrained(tmp_path / "my-prompt")
    program = (
        "import sys; sys.modules['peft_ptuning_ext'] = None\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "AutoPeftModelForCausalLM.from_pretrained('my-prompt')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "PTUNING" in done.stderr.splitlines()[-1]
