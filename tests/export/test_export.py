# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A folded network, stock PEFT's format in both directions, and plain embeddings: the same numbers everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import make_model
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from reference import V, main_output, make_batch
from releases import CACHE

from peft_ptuning_ext import export_to_peft, fold_prompt, import_from_peft, to_prompt_embeds


NETWORKS = {
    "MLP": {"encoder_dropout": 0.5},
    "LSTM": {"encoder_dropout": 0.5},
    "RESIDUAL": {},
}
GENERATING = {
    "CAUSAL_LM": ["GPT-2", "OPT", "Llama", "Mistral", "Qwen3", "Gemma 2", "Gemma 3", "GPT-NeoX", "Bloom", "Falcon"],
    "SEQ_2_SEQ_LM": ["T5", "BART"],
}
CELLS = [(family, task) for task, families in GENERATING.items() for family in families]
WEIGHTS = "adapter_model.safetensors"
ROUNDS = {"rtol": 1e-5, "atol": 1e-5}  # stock PEFT concatenates, this package shares the prompt


def make_moved(family: str, task: str, encoder: str = "MLP") -> PeftModel:
    """A model whose prompt is far from where it started."""
    model = make_adapted(family, task, encoder_reparameterization_type=encoder, **NETWORKS[encoder])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ptuning_encoders" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def unpadded(family: str, task: str) -> dict:
    return make_batch(family, task, lengths=(6, 6))


def generate(model: PeftModel, batch: dict, **options) -> torch.Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)


@pytest.mark.parametrize("encoder", NETWORKS)
def test_a_folded_prompt_gives_the_same_bits(encoder, tmp_path) -> None:
    model = make_moved("Llama", "CAUSAL_LM", encoder)
    batch = make_batch("Llama", "CAUSAL_LM")
    with torch.no_grad():
        expected = model(**batch).logits
        model.train()  # the dropout of the network must not get into the table
        fold_prompt(model)
        assert all(module.training for module in model.modules())
        model.eval()
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert [(key.rpartition(".")[2], tuple(value.shape)) for key, value in saved.items()] == [("embedding", (V, 32))]
    loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path)
    assert loaded.peft_config["default"].encoder_reparameterization_type == "NONE"
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 1
    assert trained[0].endswith("ptuning_encoders.default.embedding")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert dict(model.named_parameters())[trained[0]].grad.abs().sum() > 0


def test_a_config_that_two_adapters_share_is_not_changed_for_both(tmp_path) -> None:
    config = make_config("SEQ_CLS", encoder_hidden_size=8)
    model = get_peft_model(make_model("BERT", "SEQ_CLS"), config)
    model.add_adapter("other", config)
    fold_prompt(model)
    assert model.peft_config["other"].encoder_reparameterization_type == "MLP"
    fold_prompt(model, "other")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path / "other")
    assert torch.equal(loaded.base_model.prompt_embeddings(), model.base_model.prompt_embeddings("other"))


def test_only_the_named_adapter_is_folded_and_a_frozen_one_stays_frozen() -> None:
    model = make_moved("BERT", "SEQ_CLS")
    model.add_adapter("other", make_config("SEQ_CLS", 3, encoder_hidden_size=8))
    before = model.base_model.prompt_embeddings("other").clone()
    fold_prompt(model, "other")
    assert not model.base_model.prompt_embeddings("other").requires_grad  # "default" is the active one
    assert torch.equal(model.base_model.prompt_embeddings("other"), before)
    assert model.peft_config["default"].encoder_reparameterization_type == "MLP"
    table = model.base_model.prompt_embeddings("default")
    fold_prompt(model)
    fold_prompt(model)  # has nothing left to do
    assert torch.equal(model.base_model.prompt_embeddings("default"), table)
    with pytest.raises(ValueError, match=r"no adapter 'third', only \['default', 'other'\]"):
        fold_prompt(model, "third")
    with pytest.raises(ValueError, match="has no P-tuning adapter of this package"):
        fold_prompt(make_model("BERT", "SEQ_CLS"))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(("family", "task"), CELLS)
def test_stock_peft_computes_the_same_from_an_export(family, task, tmp_path) -> None:
    model, batch = make_moved(family, task), unpadded(family, task)
    export_to_peft(model, tmp_path)
    stock = PeftModel.from_pretrained(make_model(family, task), tmp_path).eval()
    assert type(stock.peft_config["default"]) is PromptTuningConfig
    with torch.no_grad():
        expected, logits = model(**batch).logits, stock(**batch).logits
    torch.testing.assert_close(logits[:, -expected.shape[1] :], expected, **ROUNDS)
    # PEFT 0.21 looks for the old name of the cache, and puts a stock prompt in front again at every step.
    cached = {"use_cache": CACHE == "past_key_values"}
    for options in ({}, {"num_beams": 3}):
        new = [ids[:, -5:] for ids in (generate(stock, batch, **options, **cached), generate(model, batch, **options))]
        assert torch.equal(*new)

    again = import_from_peft(make_model(family, task), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected, rtol=0, atol=0)


def test_an_export_loads_where_this_package_can_not_be_imported(tmp_path) -> None:
    model, batch = make_moved("Llama", "CAUSAL_LM"), unpadded("Llama", "CAUSAL_LM")
    export_to_peft(model, tmp_path / "adapter")
    make_model("Llama", "CAUSAL_LM").save_pretrained(tmp_path / "base")
    (tmp_path / "peft_ptuning_ext.py").write_text("raise ImportError")
    program = (
        "import sys, torch; from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + '/adapter')\n"
        "torch.save(model(input_ids=torch.load(sys.argv[1] + '/ids.pt')).logits, sys.argv[1] + '/logits.pt')"
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    torch.save(batch["input_ids"], tmp_path / "ids.pt")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": path})
    with torch.no_grad():
        expected = model(**batch).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt")[:, V:], expected, **ROUNDS)


REFUSED = {
    ("BERT", "SEQ_CLS"): r"first prompt vector instead of \[CLS\]",
    ("Llama", "SEQ_CLS"): "pools by position",
    ("BERT", "TOKEN_CLS"): "fails on labels",
    ("BERT", "QUESTION_ANS"): "shifted by V",
    ("BERT", "FEATURE_EXTRACTION"): "belong to no token",
}


@pytest.mark.parametrize(("family", "task"), REFUSED)
def test_an_export_that_would_differ_is_refused(family, task, tmp_path) -> None:
    model = make_moved(family, task)
    with pytest.raises(ValueError, match=f"{REFUSED[family, task]}.*force={task!r}"):
        export_to_peft(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="`force` must name the adapter's task type"):
        export_to_peft(model, tmp_path / "adapter", force="CAUSAL_LM")
    assert not (tmp_path / "adapter").exists()


def test_a_forced_export_takes_the_head_along_and_back(tmp_path) -> None:
    model, batch = make_moved("BERT", "SEQ_CLS"), make_batch("BERT", "SEQ_CLS")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1)
    export_to_peft(model, tmp_path, force="SEQ_CLS")
    stock = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path)
    heads = [m.get_base_model().classifier.modules_to_save["default"].weight for m in (stock, model)]
    assert torch.equal(*heads)
    with pytest.raises(ValueError, match=r"instead of \[CLS\]"):
        import_from_peft(make_model("BERT", "SEQ_CLS"), str(tmp_path))
    again = import_from_peft(make_model("BERT", "SEQ_CLS"), str(tmp_path), force="SEQ_CLS")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_other_exports_that_are_refused(tmp_path) -> None:
    with_head = make_adapted("Mistral", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"trained modules beside the prompt \(lm_head\)"):
        export_to_peft(with_head, tmp_path / "a")
    without_task = make_adapted("BERT", "masked LM")
    with pytest.raises(ValueError, match="BertForMaskedLM has no task type"):
        export_to_peft(without_task, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    export_to_peft(get_peft_model(make_model("T5", "SEQ_2_SEQ_LM"), make_config()), tmp_path / "t5")
    assert json.loads((tmp_path / "t5" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("config_class", [PromptEncoderConfig, PromptTuningConfig])
@pytest.mark.parametrize(("family", "task"), [("Llama", "CAUSAL_LM"), ("T5", "SEQ_2_SEQ_LM")])
def test_a_stock_adapter_is_taken_over(family, task, config_class, tmp_path) -> None:
    stock = get_peft_model(make_model(family, task), config_class(task_type=task, num_virtual_tokens=V)).eval()
    stock.save_pretrained(tmp_path)
    batch = unpadded(family, task)
    with torch.no_grad():
        expected = stock(**batch).logits
    model = import_from_peft(make_model(family, task), str(tmp_path))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        logits = model(**batch).logits
    torch.testing.assert_close(logits, expected[:, -logits.shape[1] :], **ROUNDS)

    assert import_from_peft(model, str(tmp_path), "second", is_trainable=True) is model
    before = model.base_model.prompt_embeddings("default").clone()
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        import_from_peft(model, str(tmp_path))
    assert torch.equal(model.base_model.prompt_embeddings("default"), before)
    model.set_adapter("second")
    labels = {"labels": batch.get("decoder_input_ids", batch["input_ids"])}
    model(**{**batch, **labels}).loss.backward()
    assert model.base_model.prompt_embeddings("second").grad is not None
    model.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "second" / "adapter_model.safetensors").is_file()


def _rewrite(folder: Path, change) -> None:
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    safetensors.torch.save_file(change(weights["prompt_embeddings"]), folder / "adapter_model.safetensors")


BROKEN = {
    "width": (lambda table: {"prompt_embeddings": table[:, :-1].clone()}, r"has shape \(5, 31\), expected \(5, 32\)"),
    "length": (lambda table: {"prompt_embeddings": table[1:].clone()}, r"has shape \(4, 32\), expected \(5, 32\)"),
    "NaN": (lambda table: {"prompt_embeddings": table * torch.nan}, "NaN or infinite"),
    "name": (lambda table: {"prompts": table}, "has no 'prompt_embeddings'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_stock_adapter_leaves_the_model_as_it_was(case, tmp_path) -> None:
    change, message = BROKEN[case]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V)
    get_peft_model(make_model("Llama", "CAUSAL_LM"), config).save_pretrained(tmp_path)
    _rewrite(tmp_path, change)
    base = make_model("Llama", "CAUSAL_LM")
    names, batch = list(base.state_dict()), make_batch("Llama", "CAUSAL_LM")
    expected = base(**batch).logits
    with pytest.raises(ValueError, match=message):
        import_from_peft(base, str(tmp_path))
    assert list(base.state_dict()) == names
    assert not hasattr(base, "peft_config")
    assert torch.equal(base(**batch).logits, expected)


def test_a_stock_pickle_is_not_read(tmp_path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V)
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), config)
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="only the pickle adapter_model.bin.*with stock PEFT and save it again"):
        import_from_peft(make_model("Llama", "CAUSAL_LM"), str(tmp_path))


def test_an_adapter_of_another_kind_is_not_taken_over(tmp_path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(make_model("Llama", "CAUSAL_LM"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter of type LORA.*PROMPT_TUNING, P_TUNING, PREFIX_TUNING, CARTRIDGE"):
        import_from_peft(make_model("Llama", "CAUSAL_LM"), str(tmp_path))


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Gemma 3", "OPT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_embeds_are_what_enters_the_model(family, dtype) -> None:
    config = make_config("CAUSAL_LM", encoder_hidden_size=8)
    model = get_peft_model(make_model(family, "CAUSAL_LM").to(dtype), config).eval()
    ids = unpadded(family, "CAUSAL_LM")["input_ids"][:1]
    embeds = to_prompt_embeds(model, ids)
    assert embeds.shape[0] == V + 6
    assert embeds.dtype == dtype
    assert torch.equal(embeds, to_prompt_embeds(model, ids[0]))
    stack = model.get_base_model().base_model
    stack = stack.decoder if family == "OPT" else stack
    stack.config._attn_implementation = "eager"  # which concatenates
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    with torch.no_grad():
        base_logits = make_base_logits(family, dtype, embeds)
    torch.testing.assert_close(base_logits[:, V:], logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must be one text, shape \(S,\) or \(1, S\), got \(2, 6\)"):
        to_prompt_embeds(model, unpadded(family, "CAUSAL_LM")["input_ids"])


def make_base_logits(family: str, dtype: torch.dtype, embeds: torch.Tensor) -> torch.Tensor:
    base = make_model(family, "CAUSAL_LM", attn_implementation="eager").to(dtype)
    return main_output(base(inputs_embeds=embeds[None]))


@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_model_is_exported_like_a_plain_one(inside, tmp_path) -> None:
    plain = make_moved("Llama", "CAUSAL_LM")
    plain.save_pretrained(tmp_path / "adapter")
    base = make_model("Llama", "CAUSAL_LM")
    base = torch.compile(base, backend="eager") if inside else base
    compiled = PeftModel.from_pretrained(base, tmp_path / "adapter")
    compiled = compiled if inside else torch.compile(compiled, backend="eager")
    for name, model in {"plain": plain, "compiled": compiled}.items():
        export_to_peft(model, tmp_path / name)
    one, other = (
        safetensors.torch.load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "compiled")
    )
    assert one.keys() == other.keys()
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])
    ids = torch.arange(5)
    assert torch.equal(to_prompt_embeds(compiled, ids), to_prompt_embeds(plain, ids))

    base = torch.compile(make_model("Llama", "CAUSAL_LM"), backend="eager")
    imported = import_from_peft(base, str(tmp_path / "plain"))
    assert torch.equal(imported.prompt_embeddings(), plain.prompt_embeddings())
