# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The server of a bank, asked by OpenAI's client: many at once, and with what it refuses."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from families import make_model
from making import make_adapted
from openai import OpenAI
from openai_client import serving
from reference import V
from tiny_tokenizers import CHAT, SIZE, TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM

from peft_ptuning_ext import PromptBank
from peft_ptuning_ext.export.tokenizer import BEGIN, END


pytest.importorskip("transformers.cli.serving.systemone", reason="the server of transformers is another before 5.23")

NEW = 8
SERVE = Path(__file__).parents[2] / "recipes" / "serve.py"
NAMES = ["orders", "invoices", "letters"]
MESSAGES = [{"role": "user", "content": "What sings?"}]
TOKENIZER = make_tokenizer("Llama 3", CHAT)
# A stream keeps back bytes that are not a whole character yet. The end of the text would end it.
PARTS = [id for id in range(SIZE) if not TOKENIZER.decode([id]).isprintable() or "\ufffd" in TOKENIZER.decode([id])]


@pytest.fixture(scope="module", name="bank")
def _bank() -> PromptBank:
    torch.manual_seed(0)
    base = make_model("Llama", "CAUSAL_LM", vocab_size=SIZE).eval()
    base.generation_config.suppress_tokens = PARTS
    bank, model = PromptBank(base), make_adapted(sizes={"vocab_size": SIZE})
    for name in NAMES:
        with torch.no_grad():
            encoder = model.base_model._layer().ptuning_encoders["default"]
            encoder.embedding.add_(2 * torch.randn_like(encoder.embedding))
        bank.add(model, name)
    return bank


@pytest.fixture(scope="module", name="base")
def _base(bank, tmp_path_factory) -> str:
    """Folder of the base model, beside the bank."""
    folder = tmp_path_factory.mktemp("served") / "base"
    bank.base_model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    bank.save(folder.parent / "bank")
    return str(folder)


@pytest.fixture(scope="module", name="client")
def _client(base, tmp_path_factory) -> Iterator[OpenAI]:
    command = [sys.executable, str(SERVE), "--model_name_or_path", base, "--bank", f"{base}/../bank"]
    command += ["--num_blocks", "64", "--device", "cpu"]
    with serving(command, tmp_path_factory.mktemp("log") / "log.txt") as client:
        yield client


def write(bank: PromptBank, ids: list[int], name: str, number: int = NEW) -> str:
    """What the model writes behind a text with a prompt of the bank, one text at a time."""
    with torch.no_grad():
        found = bank.generate(torch.tensor([ids]), max_new_tokens=number, do_sample=False, adapter_names=[name])
    return TOKENIZER.decode(found[0, len(ids) :], skip_special_tokens=True)


def complete(client: OpenAI, name: str, text: str, stream: bool = False) -> str:
    found = client.completions.create(model=name, prompt=text, max_tokens=NEW, temperature=0, stream=stream)
    if not stream:
        assert found.model == name
        assert found.usage.prompt_tokens == len(TOKENIZER(text).input_ids)
        return found.choices[0].text
    return "".join(piece.choices[0].text for piece in found if piece.choices)


def chat(client: OpenAI, name: str, stream: bool = False) -> str:
    found = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=NEW, stream=stream)
    if not stream:
        assert found.model == name
        return found.choices[0].message.content
    return "".join(piece.choices[0].delta.content or "" for piece in found if piece.choices)


def test_all_at_once(client, bank, base) -> None:
    """Texts and chats, streamed and not, of all prompts and of none: each answer is that of its adapter alone."""
    chat_ids = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True).input_ids
    calls, expected = [], []
    for name in [*NAMES, base]:
        own = "__base__" if name == base else name
        for stream in (False, True):
            for text in TEXTS[:2]:
                calls.append(lambda name=name, text=text, stream=stream: complete(client, name, text, stream))
                expected.append(write(bank, TOKENIZER(text).input_ids, own))
            calls.append(lambda name=name, stream=stream: chat(client, name, stream))
            expected.append(write(bank, chat_ids, own))
    with ThreadPoolExecutor(len(calls)) as threads:
        found = list(threads.map(lambda call: call(), calls))
    assert found == expected
    assert len(set(found)) == 3 * (len(NAMES) + 1)


def test_models_are_the_prompts(client, base) -> None:
    models = {model.id: model for model in client.models.list()}
    assert sorted(models) == sorted([base, *NAMES])
    for name, model in models.items():
        assert client.models.retrieve(name) == model
    with pytest.raises(openai.NotFoundError, match="The model 'unknown' does not exist") as error:
        client.models.retrieve("unknown")
    assert error.value.code == "model_not_found"


def test_errors_are_those_of_the_api(client, bank) -> None:
    def create(model=NAMES[0], prompt="A bird", **options):
        return client.completions.create(model=model, prompt=prompt, **options)

    with pytest.raises(openai.NotFoundError, match="The model 'unknown' does not exist") as error:
        create("unknown")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=f"and the prompt {V}, and the model has 64 positions"):
        create(prompt=TEXTS[0] * 5)
    with pytest.raises(openai.BadRequestError, match="model has 64 positions"):
        list(create(prompt=TEXTS[0] * 5, stream=True))
    with pytest.raises(openai.BadRequestError, match="`temperature` is 0.7. This server samples all requests alike"):
        create(temperature=0.7)
    with pytest.raises(openai.BadRequestError, match="`messages` is missing or empty"):
        client.chat.completions.create(model=NAMES[0], messages=[])
    request = urllib.request.Request(f"{client.base_url}completions", b"{", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    for options, reason in {
        ("n", 2): "`n` is 2. This server can't do so",
        ("logprobs", 1): "`logprobs` is 1. This server can't do so",
        ("stop", "."): "`stop` is '.'. This server can't do so",
        ("max_tokens", 0): "`max_tokens` must be a positive number of tokens, got 0",
        ("max_tokens", "x"): "`max_tokens` must be a positive number of tokens, got 'x'",
        ("suffix", 5): "A field of the request is not what the API has there: TypeError",
        ("prompt", f"{BEGIN}1 0{END}A bird"): "The text has entries of a prompt",
    }.items():
        with pytest.raises(openai.BadRequestError, match=reason):
            create(**dict([options]))
    for messages in ("text", [{"role": "user", "content": 5}]):
        with pytest.raises(openai.BadRequestError, match="A field of the request is not what the API has there"):
            client.chat.completions.create(model=NAMES[0], messages=messages)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    parts = [{"role": "user", "content": [{"type": "text", "text": "A bird"}, image]}]
    with pytest.raises(openai.BadRequestError, match="A message has a part of type 'image_url'. This model reads"):
        client.chat.completions.create(model=NAMES[0], messages=parts)
    parts = [{"role": "user", "content": [{"type": "input_image", "image_url": image["image_url"]["url"]}]}]
    with pytest.raises(openai.BadRequestError, match="A message has a part of type 'input_image'"):
        client.responses.create(model=NAMES[0], input=parts)
    flat = [{"type": "input_text", "text": "A bird"}, parts[0]["content"][0]]
    result = {"type": "function_call_output", "call_id": "1", "output": parts[0]["content"]}
    for given in (flat, flat[1:], [{"role": "user", "content": "A bird"}, result]):
        with pytest.raises(openai.BadRequestError, match="A message has a part of type 'input_image'"):
            client.responses.create(model=NAMES[0], input=given)
    with pytest.raises(openai.APIStatusError, match="Method Not Allowed") as error:
        client.post("/models", cast_to=dict)
    assert error.value.body["type"] == "invalid_request_error"
    parts = [{"role": "user", "content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]
    answers = [
        client.chat.completions.create(model=NAMES[0], messages=messages).choices[0].message.content
        for messages in (MESSAGES, parts)
    ]
    assert answers[0] == answers[1]
    other = {"chat_template_kwargs": {"prompt": NAMES[1]}}
    with pytest.raises(openai.BadRequestError, match="The text has entries of a prompt"):
        client.chat.completions.create(model=NAMES[0], messages=MESSAGES, extra_body=other)
    assert create(n=1, stop=[], presence_penalty=0, frequency_penalty=0, max_tokens=1).choices  # clients send these
    for path in ("load_model", "reset"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(f"{client.base_url}../{path}", b"{}"))
    assert complete(client, NAMES[0], TEXTS[0]) == write(bank, TOKENIZER(TEXTS[0]).input_ids, NAMES[0])


def test_requests_of_one_id(client, bank) -> None:
    """Whoever sends a request may choose its id."""
    ids = TOKENIZER(TEXTS[0]).input_ids

    def ask(name: str) -> str:
        own = {"X-Request-ID": "the same"}
        found = client.completions.create(model=name, prompt=TEXTS[0], max_tokens=30, extra_headers=own)
        return found.choices[0].text

    with ThreadPoolExecutor(6) as threads:
        found = [*threads.map(ask, NAMES * 2)]
    assert found == [write(bank, ids, name, 30) for name in NAMES] * 2


def test_responses(client, bank) -> None:
    """One answer, or a stream if that is asked for."""
    ids = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True).input_ids
    options = {"model": NAMES[1], "input": MESSAGES[0]["content"], "max_output_tokens": NEW}
    expected = write(bank, ids, NAMES[1])
    assert client.responses.create(**options).output_text == expected
    parts = client.responses.create(**options, stream=True)
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == expected


def test_answers_end_where_positions_do(client, bank) -> None:
    ids = TOKENIZER(TEXTS[0]).input_ids
    found = client.completions.create(model=NAMES[0], prompt=TEXTS[0], max_tokens=1000).choices[0]
    assert found.text == write(bank, ids, NAMES[0], 64 - V - len(ids))
    assert found.finish_reason == "length"


def test_clients_that_go_away(client, bank) -> None:
    """In the middle of an answer: the others get theirs, and the server goes on."""
    ids = TOKENIZER(TEXTS[1]).input_ids

    def leave(name: str) -> None:
        with client.completions.create(model=name, prompt=TEXTS[0], stream=True) as stream:
            next(iter(stream))

    with ThreadPoolExecutor(8) as threads:
        gone = [threads.submit(leave, name) for name in NAMES for _ in range(2)]
        stay = [threads.submit(complete, client, name, TEXTS[1]) for name in NAMES]
        for future in gone:
            future.result()
        for name, future in zip(NAMES, stay):
            assert future.result() == write(bank, ids, name)
    for name in NAMES:
        assert complete(client, name, TEXTS[1]) == write(bank, ids, name)


def test_adapters_and_nothing(base, tmp_path) -> None:
    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, str(SERVE), *words], capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        return done.stderr

    assert "There is nothing to serve" in run("--model_name_or_path", base)
    model = make_adapted(sizes={"vocab_size": SIZE})
    model.save_pretrained(tmp_path)
    assert "takes name=folder for each prompt" in run("--model_name_or_path", base, "--adapters", str(tmp_path))
    words = ["--model_name_or_path", base, "--adapters", f"{base}={tmp_path}"]
    assert "as the base model is. Give it another name" in run(*words)
    bank = PromptBank(AutoModelForCausalLM.from_pretrained(base))
    bank.add(model, base)
    bank.save(tmp_path / "bank")
    assert "as the base model is. Give it another name" in run("--bank", str(tmp_path / "bank"))
