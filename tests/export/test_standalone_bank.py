# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""All prompts of a bank in one ordinary folder: each text says which is in front of it."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import make_model
from making import make_adapted, make_config
from openai_client import serving
from peft import PeftModel
from reference import V
from tiny_tokenizers import CHAT, KINDS, SIZE, TEXTS, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peft_ptuning_ext import PromptBank, export_standalone
from peft_ptuning_ext.export.tokenizer import BEGIN, END


NEW = 8
NAMES = ["orders", 'it\'s a \\ "name"', "名前 {{ x }}", "long"]
MESSAGES = [{"role": "user", "content": "What sings?"}]


@dataclass
class Exported:
    folder: Path
    bank: PromptBank
    tokenizer: PreTrainedTokenizerBase

    def generate(self, ids: torch.Tensor, name: str) -> list[int]:
        """The ids that the model writes behind `ids`, which hold no prompt, with a prompt of the bank."""
        with torch.no_grad():
            found = self.bank.generate(ids, max_new_tokens=NEW, do_sample=False, adapter_names=[name])
        return found[0, ids.shape[1] :].tolist()


def make_prompts(family: str = "Llama", **sizes) -> PeftModel:
    """A model with one adapter of each name, whose prompts are far from each other."""
    torch.manual_seed(0)
    model = make_adapted(family, "CAUSAL_LM", {"vocab_size": SIZE, **sizes}, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, make_config("CAUSAL_LM", V + 3 if name == "long" else V))
    with torch.no_grad():
        for encoder in model.base_model._layer().ptuning_encoders.values():
            encoder.embedding.add_(torch.randn_like(encoder.embedding))
    return model.eval()


def export(folder: Path, tokenizer: PreTrainedTokenizerBase, family: str = "Llama", **sizes) -> Exported:
    base = make_model(family, "CAUSAL_LM", vocab_size=SIZE, **sizes).eval()
    bank, model = PromptBank(base), make_prompts(family, **sizes)
    for name in NAMES:
        bank.add(model, name, adapter_name=name)
    # A stream keeps back bytes that are not a whole character yet.
    parts = [
        id for id in range(SIZE) if not tokenizer.decode([id]).isprintable() or "\ufffd" in tokenizer.decode([id])
    ]
    base.generation_config.suppress_tokens = parts
    export_standalone(bank, tokenizer, folder)
    return Exported(folder, bank, tokenizer)


@pytest.fixture(scope="module", name="exported")
def _exported(tmp_path_factory) -> Exported:
    return export(tmp_path_factory.mktemp("exported"), make_tokenizer("Llama 3", CHAT))


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_template_is_told_the_prompt(tied, tmp_path) -> None:
    exported = export(tmp_path, make_tokenizer("Llama 3", CHAT), tie_word_embeddings=tied)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    plain = exported.tokenizer.apply_chat_template(MESSAGES, **options).input_ids
    assert torch.equal(tokenizer.apply_chat_template(MESSAGES, **options).input_ids, plain)
    written = set()
    for name in NAMES:
        ids = tokenizer.apply_chat_template(MESSAGES, prompt=name, **options).input_ids
        length = exported.bank.length(name)
        assert torch.equal(ids[:, length:], plain)
        first, number = json.loads((tmp_path / "prompt_ids.json").read_text())[name]
        assert ids[0, :length].tolist() == [*range(first, first + number)]
        expected = exported.bank(plain, adapter_names=[name]).logits
        torch.testing.assert_close(model(ids).logits[:, length:, :SIZE], expected, rtol=0, atol=1e-5)
        found = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
        assert found == exported.generate(plain, name)
        written.add(tuple(found))
    assert len(written) == len(NAMES)
    with pytest.raises(Exception, match="There is no prompt invoices"):
        tokenizer.apply_chat_template(MESSAGES, prompt="invoices", **options)


def test_a_message_can_not_write_a_prompt(exported) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    messages = [{"role": "user", "content": f"a{BEGIN}0 1{END}b"}]
    found = tokenizer.apply_chat_template(messages, prompt=NAMES[0], return_dict=True).input_ids
    assert [id for id in found if id >= SIZE] == [*range(SIZE, SIZE + V)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_without_a_template(kind, tmp_path) -> None:
    """The ids are put in front of what the tokenizer writes, which is what the base model's does."""
    exported = export(tmp_path, make_tokenizer(kind))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    table = json.loads((tmp_path / "prompt_ids.json").read_text())
    for text, name in zip(TEXTS, NAMES):
        ids = exported.tokenizer(text).input_ids
        assert tokenizer(text).input_ids == ids
        first, number = table[name]
        found = model(torch.tensor([[*range(first, first + number), *ids]])).logits[:, number:, :SIZE]
        expected = exported.bank(torch.tensor([ids]), adapter_names=[name]).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batching", ["continuous", "one by one"])
def test_transformers_serve_answers_for_all(batching, exported, tmp_path) -> None:
    """Requests of all prompts at once, and of none, streamed and not: each answer is that of its adapter."""
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(exported.folder), "--device", "cpu"]
    command += ["--continuous-batching", "--cb-num-blocks", "64"] if batching == "continuous" else []
    ids = exported.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt").input_ids
    with serving(command, tmp_path / "log.txt") as client:

        def ask(name: str, stream: bool) -> str:
            kwargs = {} if name == "__base__" else {"chat_template_kwargs": {"prompt": name}}
            options = {"model": str(exported.folder), "messages": MESSAGES, "max_tokens": NEW, "temperature": 0}
            answer = client.chat.completions.create(**options, stream=stream, extra_body=kwargs)
            if not stream:
                return answer.choices[0].message.content
            return "".join(piece.choices[0].delta.content or "" for piece in answer if piece.choices)

        asked = [(name, stream) for name in [*NAMES, "__base__"] for stream in (False, True)]
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = list(threads.map(lambda one: ask(*one), asked))
    for (name, _), answer in zip(asked, answers):
        assert answer == exported.tokenizer.decode(exported.generate(ids, name), skip_special_tokens=True)
    assert len(set(answers)) == len(NAMES) + 1


def test_what_is_refused(exported, tmp_path) -> None:
    tokenizer = make_tokenizer("Llama 3", CHAT)
    empty = PromptBank(make_model("Llama", "CAUSAL_LM", vocab_size=SIZE))
    with pytest.raises(ValueError, match="The bank has no prompts"):
        export_standalone(empty, tokenizer, tmp_path / "new")
    empty.add(make_adapted(sizes={"vocab_size": SIZE}, prompt_depth="DEEP"), "deep")
    with pytest.raises(ValueError, match="The prompt 'deep' of the bank is deep"):
        export_standalone(empty, tokenizer, tmp_path / "new")
    head = PromptBank(make_model("Llama", "SEQ_CLS", vocab_size=SIZE))
    head.add(make_adapted("Llama", "SEQ_CLS", {"vocab_size": SIZE}), "head")
    with pytest.raises(ValueError, match="came with a module of its own, 'score'"):
        export_standalone(head, tokenizer, tmp_path / "new")
    with pytest.raises(ValueError, match="`adapter_name` is 'orders'. Leave it out"):
        export_standalone(exported.bank, tokenizer, tmp_path / "new", "orders")
    assert not (tmp_path / "new").exists()


@torch.no_grad()
def test_a_first_word_that_is_written_otherwise(tmp_path) -> None:
    """Behind a prompt it would be one of the later words, with other ids, unless a special token is in front of it."""
    own = Tokenizer(models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    own.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    text = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for model, name in (
        (export(tmp_path / "other", make_tokenizer("Llama 3")).bank, None),
        (make_prompts(), NAMES[0]),
    ):
        tokenizer.chat_template = {"default": "<s>" + text, "tools": text}
        with pytest.raises(ValueError, match="gives a chat other ids behind a prompt than without it"):
            export_standalone(model, tokenizer, tmp_path / "new", name)
        assert not (tmp_path / "new").exists()
        tokenizer.chat_template = "<s>" + text
        export_standalone(model, tokenizer, tmp_path / str(name), name)
    with_bank = AutoTokenizer.from_pretrained(tmp_path / "None")
    found = with_bank.apply_chat_template(MESSAGES, prompt=NAMES[0]).input_ids
    assert found[V:] == tokenizer.apply_chat_template(MESSAGES).input_ids


def test_a_single_prompt_in_the_place_of_many(tmp_path) -> None:
    tokenizer = make_tokenizer("Llama 3", CHAT)
    export(tmp_path, tokenizer)
    export_standalone(make_prompts(), tokenizer, tmp_path, NAMES[0])
    assert not (tmp_path / "prompt_ids.json").exists()
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, return_dict=True).input_ids
    assert [id for id in ids if id >= SIZE] == [*range(SIZE, SIZE + V)]
