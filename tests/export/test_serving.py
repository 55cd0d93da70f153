# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""An exported folder in servers and engines that know nothing of this package, as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import make_model
from making import make_config
from openai import OpenAI
from openai_client import serving
from peft import PeftModel, get_peft_model
from tiny_tokenizers import CHAT, SIZE, TEXTS, make_tokenizer
from transformers import PreTrainedTokenizerBase

from peft_ptuning_ext import export_standalone


NEW = 8
MESSAGES = [{"role": "user", "content": "What sings?"}]


@dataclass
class Exported:
    folder: Path
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase

    def generate(self, ids: torch.Tensor) -> list[int]:
        """The ids that the adapted model writes behind `ids`, which hold no prompt."""
        with torch.no_grad():
            return self.model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()

    def write(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(self.generate(ids), skip_special_tokens=True)


@pytest.fixture(scope="module", name="exported")
def _exported(tmp_path_factory) -> Exported:
    torch.manual_seed(0)
    config = make_config("CAUSAL_LM", encoder_hidden_size=8)
    # The kernels of ONNX Runtime take heads of 16.
    model = get_peft_model(make_model("Llama", "CAUSAL_LM", vocab_size=SIZE, head_dim=16), config).eval()
    with torch.no_grad():
        model.base_model._layer().ptuning_encoders["default"].embedding.add_(1)
    tokenizer = make_tokenizer("Llama 3", CHAT)
    # A stream keeps back bytes that are not a whole character yet.
    parts = [
        id for id in range(SIZE) if not tokenizer.decode([id]).isprintable() or "\ufffd" in tokenizer.decode([id])
    ]
    model.generation_config.suppress_tokens = parts
    folder = tmp_path_factory.mktemp("exported")
    export_standalone(model, tokenizer, folder)
    return Exported(folder, model, tokenizer)


@pytest.fixture(scope="module", name="client")
def _client(exported, tmp_path_factory) -> Iterator[OpenAI]:
    """A client of `transformers serve`, started from a command."""
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(exported.folder), "--device", "cpu"]
    with serving(command, tmp_path_factory.mktemp("server") / "log.txt") as client:
        yield client


def test_transformers_serve_completes_texts(client, exported) -> None:
    for text in TEXTS[:2]:
        options = {"model": str(exported.folder), "prompt": text, "max_tokens": NEW, "temperature": 0}
        expected = exported.write(exported.tokenizer(text, return_tensors="pt").input_ids)
        completion = client.completions.create(**options)
        assert completion.choices[0].text == expected
        pieces = list(client.completions.create(**options, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected
        assert len(pieces) > 1


def test_transformers_serve_chats(client, exported) -> None:
    ids = exported.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt").input_ids
    expected = exported.write(ids)
    options = {"model": str(exported.folder), "messages": MESSAGES, "max_tokens": NEW, "temperature": 0}
    assert client.chat.completions.create(**options).choices[0].message.content == expected
    pieces = list(client.chat.completions.create(**options, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
    assert len(pieces) > 1


RUN_GENAI = """
import json, sys
sys.modules["torch"] = None
import onnxruntime_genai as engine
from tokenizers import Tokenizer

source, converted, text, new = *sys.argv[1:4], int(sys.argv[4])
ids = Tokenizer.from_file(f"{source}/tokenizer.json").encode(text).ids
model = engine.Model(converted)
params = engine.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + new, min_length=len(ids) + new, do_sample=False)
generator = engine.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(id) for id in generator.get_sequence(0)[len(ids) :]]))
"""


def test_onnx_runtime_generates_the_same_tokens(exported, tmp_path, monkeypatch) -> None:
    """By its own converter and search, which do not read what `generation_config.json` suppresses."""
    monkeypatch.setattr(exported.model.generation_config, "suppress_tokens", None)
    convert = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(exported.folder), "-p", "fp32"]
    done = subprocess.run(
        [*convert, "-e", "cpu", "-o", str(tmp_path / "onnx"), "-c", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for text in TEXTS:
        ran = subprocess.run(
            [sys.executable, "-c", RUN_GENAI, str(exported.folder), str(tmp_path / "onnx"), text, str(NEW)],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        ids = exported.tokenizer(text, return_tensors="pt").input_ids
        expected = exported.generate(ids)
        assert json.loads(ran.stdout)[: len(expected)] == expected
