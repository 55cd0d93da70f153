# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Exported folders: the same numbers without this package, and a tokenizer that no text can deceive."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_config
from peft import LoraConfig, PeftModel, get_peft_model
from reference import V, main_output
from safetensors.torch import load_file
from tiny_tokenizers import BOS, CHAT, KINDS, SIZE, TEXTS, make_tokenizer
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    MobileBertConfig,
    MobileBertForMaskedLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    pipeline,
)
from transformers.integrations.neftune import activate_neftune

from peft_ptuning_ext import PTuningConfig, export_standalone


NEW = 6
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "masked LM": "AutoModelForMaskedLM",
}


@dataclass(frozen=True)
class Case:
    family: str
    task: str = "CAUSAL_LM"
    tokenizer: str = "Gemma"
    dtype: torch.dtype = torch.float32
    is_tied: bool = True
    rows: int = SIZE

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.family} {self.task} {dtype} {'tied' if self.is_tied else 'untied'}".replace(" ", "_")

    def make(self) -> PeftModel:
        options = {"tie_word_embeddings": self.is_tied} if self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else {}
        # Eager attention concatenates the prompt as the folder does, so that bfloat16 rounds in the same places.
        options |= {"vocab_size": self.rows, "pad_token_id": 0}
        base = make_model(self.family, self.task, attn_implementation="eager", **options)
        for parameter in base.parameters():  # as `from_pretrained(dtype=...)` does it: rotary buffers stay float32
            parameter.data = parameter.data.to(self.dtype)
        base.config.dtype = self.dtype
        task_type = self.task if self.task.isupper() else None
        if self.family == "Gemma 3" and self.dtype == torch.bfloat16:
            # Its embedding multiplies rows, and not all bfloat16 vectors are the product of one. These are.
            start = {"prompt_tuning_init": "SAMPLE_VOCAB"}
            return get_peft_model(base, PTuningConfig(task_type=task_type, num_virtual_tokens=V, **start)).eval()
        config = make_config(task_type, encoder_hidden_size=8)
        model = get_peft_model(base, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ptuning_encoders" in name or "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model


CASES = [
    *(
        Case(family, "CAUSAL_LM", tokenizer, dtype, is_tied)
        for family, tokenizer in [
            ("GPT-2", "GPT-2"),
            ("Llama", "Llama 3"),
            ("Qwen3", "nothing around"),
            ("Mistral", "Gemma"),
            ("Gemma 3", "Gemma"),
            ("OPT", "RoBERTa"),
        ]
        for dtype in (torch.float32, torch.bfloat16)
        for is_tied in (True, False)
    ),
    *(
        Case("T5", "SEQ_2_SEQ_LM", "T5", dtype, is_tied)
        for dtype in (torch.float32, torch.bfloat16)
        for is_tied in (True, False)
    ),
    Case("BART", "SEQ_2_SEQ_LM", "RoBERTa"),
    Case("Mixtral"),
    Case("Bloom"),
    Case("GPT-NeoX", is_tied=False),
    Case("BERT", "TOKEN_CLS", "BERT"),
    Case("RoBERTa", "TOKEN_CLS", "RoBERTa"),
    Case("ELECTRA", "TOKEN_CLS", "BERT"),
    Case("T5", "TOKEN_CLS", "T5"),
    Case("BERT", "masked LM", "BERT"),
    Case("ModernBERT", "masked LM", "BERT"),
    Case("BERT", "QUESTION_ANS", "BERT"),
    Case("Llama", "SEQ_CLS", "Llama 3"),
    Case("GPT-2", "SEQ_CLS", "GPT-2"),
    Case("Bloom", "SEQ_CLS", "GPT-2"),
]
GENERATING = [case for case in CASES if case.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")]


@pytest.fixture(scope="module", name="computed")
def _computed(tmp_path_factory) -> dict:
    """Of each case: what the model computes, and what a process without this package does from its folder."""
    root = tmp_path_factory.mktemp("standalone")
    expected, cases = {}, {}
    for case in CASES:
        torch.manual_seed(0)
        model = case.make()
        tokenizer = make_tokenizer(case.tokenizer, padding_side="left" if case.task == "CAUSAL_LM" else "right")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        export_standalone(model, tokenizer, root / case.name)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        expected[case.name] = compute(model, tokenizer, case)
        cases[case.name] = {"auto_class": AUTO[case.task], "texts": TEXTS[:2], "new_tokens": NEW}
    (root / "cases.json").write_text(json.dumps(cases))
    program = Path(__file__).with_name("load_standalone.py")
    done = subprocess.run([sys.executable, str(program), str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(root / "computed.pt", weights_only=False)
    return {name: (expected[name], found[name]) for name in expected}


@torch.no_grad()
def compute(model: PeftModel, tokenizer, case: Case) -> dict:
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    single = tokenizer(TEXTS[:1], return_tensors="pt")
    if case.task == "SEQ_2_SEQ_LM":
        single["decoder_input_ids"] = torch.tensor([[0, 7, 8, 9]])
    result = {"batch": dict(batch), "logits": main_output(model(**single))}
    if case in GENERATING:
        options = {"max_new_tokens": NEW, "do_sample": False}
        result["greedy"] = model.generate(**batch, **options)
        result["beam"] = model.generate(**batch, **options, num_beams=3)
        scored = model.generate(**single, **options, output_scores=True, return_dict_in_generate=True)
        result["probabilities"] = scored.scores[0].float().softmax(-1)
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_at_the_users_tokens(case, computed) -> None:
    expected, found = (result["logits"] for result in computed[case.name])
    if case.task != "SEQ_CLS" and case.task != "SEQ_2_SEQ_LM":
        found = found[:, V:]
    if case.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "masked LM"):
        found = found[..., :SIZE]
    assert found.dtype == case.dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("case", GENERATING, ids=lambda case: case.name)
def test_generated_ids(case, computed) -> None:
    expected, found = computed[case.name]
    for search in ("greedy", "beam"):
        assert torch.equal(found[search][:, -NEW:], expected[search][:, -NEW:])
    assert found["probabilities"].shape[-1] == SIZE + V
    assert found["probabilities"][:, SIZE:].max() == 0
    tolerance = 1e-6 if case.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found["probabilities"][:, :SIZE], expected["probabilities"], rtol=0, atol=tolerance)


def test_noise_on_the_embedding_is_not_written(tmp_path) -> None:
    model, tokenizer = Case("Gemma 3").make(), make_tokenizer("Gemma")
    export_standalone(model, tokenizer, tmp_path / "quiet")
    activate_neftune(model.train(), 50.0)
    export_standalone(model, tokenizer, tmp_path / "noisy")
    quiet, noisy = (load_file(tmp_path / name / "model.safetensors") for name in ("quiet", "noisy"))
    assert quiet.keys() == noisy.keys()
    assert all(torch.equal(noisy[key], value) for key, value in quiet.items())


@pytest.mark.parametrize("compiled", ["base", "backbone", "adapted model"])
def test_a_compiled_model_is_exported_like_a_plain_one(compiled, tmp_path) -> None:
    tokenizer = make_tokenizer("Llama 3")
    plain = Case("Llama", "SEQ_CLS").make()
    plain.save_pretrained(tmp_path / "adapter")
    export_standalone(plain, tokenizer, tmp_path / "plain")
    base = plain.unload()
    if compiled == "backbone":
        base.model = torch.compile(base.model, backend="eager")
    model = torch.compile(base, backend="eager") if compiled == "base" else base
    model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    model = torch.compile(model, backend="eager") if compiled == "adapted model" else model
    export_standalone(model, tokenizer, tmp_path / "compiled")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def export(tmp_path: Path, tokenizer, family: str = "Llama", task: str = "CAUSAL_LM", rows: int = SIZE):
    """Exports a model, and returns the tokenizer of the folder and the new ids."""
    export_standalone(Case(family, task, rows=rows).make(), tokenizer, tmp_path / "out")
    return AutoTokenizer.from_pretrained(tmp_path / "out"), list(range(rows, rows + V))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_puts_the_prompt_in_front(kind, tmp_path) -> None:
    tokenizer = make_tokenizer(kind)
    exported, new = export(tmp_path, tokenizer)
    for text in [*TEXTS, "", "<s>\ufdd0virtual 0\ufdd1</s>", "\ufdd0prompt\ufdd1"]:
        assert exported(text).input_ids == new + tokenizer(text).input_ids
        assert (
            exported(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
        )
        assert exported.decode(exported(text).input_ids, skip_special_tokens=True) == tokenizer.decode(
            tokenizer(text).input_ids, skip_special_tokens=True
        )
    pair, expected = exported(*TEXTS[:2]), tokenizer(*TEXTS[:2])
    assert pair.input_ids == new + expected.input_ids
    assert pair.get("token_type_ids") == ([0] * V + expected.token_type_ids if "token_type_ids" in expected else None)
    encoded = exported(TEXTS[0], return_special_tokens_mask=True, return_offsets_mapping=True)
    assert encoded.special_tokens_mask[:V] == [1] * V
    assert encoded.offset_mapping[V:] == tokenizer(TEXTS[0], return_offsets_mapping=True).offset_mapping

    cut, expected = (
        exported(TEXTS[0], truncation=True, max_length=V + 8),
        tokenizer(TEXTS[0], truncation=True, max_length=8),
    )
    assert cut.input_ids == new + expected.input_ids
    padded = exported(TEXTS, padding=True)
    assert [ids[len(ids) - sum(mask) :] for ids, mask in zip(padded.input_ids, padded.attention_mask)] == [
        new + tokenizer(text).input_ids for text in TEXTS
    ]
    assert exported.model_max_length == tokenizer.model_max_length
    assert exported.num_special_tokens_to_add() == V + tokenizer.num_special_tokens_to_add()


def test_other_settings_of_the_tokenizer_stay(tmp_path) -> None:
    tokenizer = make_tokenizer("BERT", padding_side="right", truncation_side="left", model_input_names=["input_ids"])
    tokenizer.add_tokens(["zebra"])
    exported, _ = export(tmp_path, tokenizer)
    for name in ("padding_side", "truncation_side", "model_input_names", "all_special_tokens", "pad_token_id"):
        assert getattr(exported, name) == getattr(tokenizer, name)
    assert exported.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == len(make_tokenizer("BERT")) + 1  # and the caller's is as it was
    assert tokenizer("a zebra").input_ids == exported("a zebra").input_ids[V:]


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet="\ufdd0\ufdd1virtualprompt 0123456789<s>", max_size=40))
def test_no_text_gives_the_new_ids(exported, text) -> None:
    assert max(exported(text, add_special_tokens=False).input_ids, default=0) < SIZE


@pytest.fixture(scope="module", name="exported")
def _exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("plain"), make_tokenizer("Llama 3"))[0]


MESSAGES = [{"role": "user", "content": "What sings?"}]
TEMPLATES = {
    "one": CHAT,
    "begins with a line break": "\n" + CHAT + "  \n",
    "begins with a space before a block": "   " + CHAT,
    "generation": CHAT.replace("{{ '<s>'", "{%- generation -%}  {{ '<s>'").replace(
        "</s>' }}", "</s>' }}{% endgeneration %}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3", "BERT"])
def test_a_chat_begins_with_the_prompt(kind, template, tmp_path) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES[template])
    # As of most models of chats: outside of the vocabulary, and ids right below and above them unused.
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.add_tokens(["zebra"])
    special = "<|user|> a zebra <|end|>"
    rows = len(tokenizer) if template == "one" else SIZE + 20
    exported, new = export(tmp_path, tokenizer, rows=rows)
    options = {"tokenize": True, "return_dict": False}
    for extra in ({}, {"add_generation_prompt": True}):
        plain = tokenizer.apply_chat_template(MESSAGES, **options, **extra)
        assert exported.apply_chat_template(MESSAGES, **options, **extra) == new + plain
    for text in (TEXTS[0], special):
        assert exported(text).input_ids == new + tokenizer(text).input_ids
    chat = [{"role": "user", "content": special}]
    assert exported.apply_chat_template(chat, **options) == new + tokenizer.apply_chat_template(chat, **options)
    assert exported.convert_ids_to_tokens(new) == [f"\ufdd0virtual {i}\ufdd1" for i in range(V)]
    assert exported.decode(new + tokenizer(TEXTS[0]).input_ids, skip_special_tokens=True) == tokenizer.decode(
        tokenizer(TEXTS[0]).input_ids, skip_special_tokens=True
    )

    names = "".join(exported.convert_ids_to_tokens(new))
    for content in (names, names[0] + names, "\ufdd0\ufdd0virtual 0\ufdd1\ufdd1", "\ufdd0" * 3 + "virtual 1\ufdd1"):
        ids = exported.apply_chat_template([{"role": names, "content": content}], **options)
        assert ids[:V] == new
        assert max(ids[V:]) < rows
    assert tokenizer.chat_template == TEMPLATES[template]


def test_several_chat_templates(tmp_path) -> None:
    tokenizer = make_tokenizer("GPT-2", {"default": CHAT, "tool_use": "{{ 'tools ' }}" + CHAT})
    exported, new = export(tmp_path, tokenizer)
    for name in ("default", "tool_use"):
        options = {"chat_template": name, "return_dict": False}
        assert exported.apply_chat_template(MESSAGES, **options) == new + tokenizer.apply_chat_template(
            MESSAGES, **options
        )


def test_a_vocabulary_shorter_than_the_embedding(tmp_path) -> None:
    """Embeddings are often padded to a round number of rows; the new ones come behind all of them."""
    tokenizer = make_tokenizer("BERT", CHAT)
    assert len(tokenizer) < SIZE
    exported, new = export(tmp_path, tokenizer)
    assert exported(TEXTS[0]).input_ids[:V] == new


REFUSED = {
    ("BERT", "SEQ_CLS"): "off the first token or the mean of all",
    ("ModernBERT", "SEQ_CLS"): "off the first token or the mean of all",
    ("T5", "SEQ_CLS"): "off the first token or the mean of all",
    ("BERT", "FEATURE_EXTRACTION"): "AutoPeftModelFor",
    ("BERT", "multiple choice"): "Known to be exact are token classification",
}


@pytest.mark.parametrize(("family", "task"), REFUSED)
def test_a_model_that_would_read_the_prompt_is_refused(family, task, tmp_path) -> None:
    with pytest.raises(ValueError, match=REFUSED[family, task]):
        export(tmp_path, make_tokenizer("BERT"), family, task)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_what_can_not_be_exported_is_refused_and_leaves_no_file(tmp_path) -> None:
    model, tokenizer = Case("Llama").make(), make_tokenizer("T5", CHAT)
    with pytest.raises(ValueError, match="the model Unigram, whose vocabulary has no places"):
        export_standalone(model, tokenizer, tmp_path / "out")
    odd = make_tokenizer("GPT-2")
    odd._tokenizer.post_processor = processors.Sequence([BOS, BOS])
    with pytest.raises(ValueError, match="TemplateProcessing and TemplateProcessing is not one that"):
        export_standalone(model, odd, tmp_path / "out")
    holder = get_peft_model(torch.nn.ModuleDict({"model": make_model("Llama", "CAUSAL_LM")}), PTuningConfig())
    with pytest.raises(ValueError, match="no transformers model"):
        export_standalone(holder, tokenizer, tmp_path / "out")
    both = make_model("Llama", "CAUSAL_LM", vocab_size=SIZE)
    both.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    both.add_adapter(PTuningConfig(), "prompt")
    with pytest.raises(ValueError, match="Has it other adapters beside this one"):
        export_standalone(both, make_tokenizer("GPT-2"), tmp_path / "out", "prompt")
    quantized = Case("Llama").make()
    quantized.get_base_model().hf_quantizer = object()
    with pytest.raises(ValueError, match="weights of this LlamaForCausalLM are quantized"):
        export_standalone(quantized, make_tokenizer("GPT-2"), tmp_path / "out")
    with pytest.raises(ValueError, match="Weights of this LlamaForCausalLM are offloaded"):
        export_standalone(Case("Llama").make().to("meta"), make_tokenizer("GPT-2"), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, and a folder is needed"):
        export_standalone(model, make_tokenizer("GPT-2"), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_trained_modules_go_along_and_another_adapter_stays_out(tmp_path) -> None:
    config = make_config("CAUSAL_LM", modules_to_save=["lm_head"])
    model = get_peft_model(make_model("Mistral", "CAUSAL_LM", vocab_size=SIZE), config).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
    model.add_adapter("other", make_config("CAUSAL_LM", 3))
    tokenizer = make_tokenizer("Gemma")
    with torch.no_grad():
        expected = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits
    export_standalone(model, tokenizer, tmp_path, adapter_name="default")
    exported = AutoTokenizer.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = loaded(**exported(TEXTS[0], return_tensors="pt")).logits
    torch.testing.assert_close(logits[:, V:, :SIZE], expected, rtol=1e-5, atol=1e-5)
    assert len(exported(TEXTS[0]).input_ids) == V + len(tokenizer(TEXTS[0]).input_ids)


def test_a_folder_that_would_be_mixed(tmp_path) -> None:
    """An adapter is not exported over; what an earlier export has left is not read with the new one."""
    model = Case("Llama").make()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, which transformers would load on top"):
        export_standalone(model, make_tokenizer("GPT-2"), tmp_path / "adapter")
    export_standalone(model, make_tokenizer("GPT-2", CHAT), tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("old")
    export_standalone(model, make_tokenizer("GPT-2"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


@torch.no_grad()
def test_heads_with_parts_that_are_no_bias(tmp_path) -> None:
    """MobileBERT's output has more columns than its embedding, for which a row of the vocabulary lies across."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "intra_bottleneck_size": 16, "num_hidden_layers": 2}
    sizes |= {"vocab_size": SIZE, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0}
    base = MobileBertForMaskedLM(MobileBertConfig(**sizes)).eval()
    model = get_peft_model(base, make_config()).eval()
    tokenizer = make_tokenizer("BERT")
    export_standalone(model, tokenizer, tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    logits = loaded(**AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0], return_tensors="pt")).logits[:, V:]
    expected = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits
    torch.testing.assert_close(logits[..., :SIZE], expected, rtol=1e-4, atol=1e-4)
    assert logits.softmax(-1)[..., SIZE:].max() == 0


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.parametrize(
    ("family", "task", "modules"), [("BERT", "masked LM", ["cls"]), ("RoBERTa", "masked LM", ["lm_head"])]
)
@torch.no_grad()
def test_trained_modules_of_this_and_of_another_adapter(family, task, modules, tmp_path) -> None:
    base = make_model(family, task, vocab_size=SIZE, pad_token_id=0)
    model = get_peft_model(base, make_config()).eval()
    model.add_adapter("trained", make_config(modules_to_save=modules))
    for name, parameter in model.named_parameters():
        if "modules_to_save.trained" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = make_tokenizer("BERT", padding_side="right")
    for adapter in ("default", "trained"):
        model.set_adapter(adapter)
        expected = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits
        export_standalone(model, tokenizer, tmp_path / adapter, adapter)
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / adapter)
        exported = AutoTokenizer.from_pretrained(tmp_path / adapter)
        logits = loaded(**exported(TEXTS[0], return_tensors="pt")).logits
        torch.testing.assert_close(logits[:, V:, :SIZE], expected, rtol=1e-4, atol=1e-4)


def test_a_vocabulary_that_is_not_the_embeddings_is_refused(tmp_path) -> None:
    sizes = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
    stacks = {"encoder": T5GemmaModuleConfig(**sizes), "decoder": T5GemmaModuleConfig(**sizes)}
    base = T5GemmaForConditionalGeneration(T5GemmaConfig(**stacks, vocab_size=SIZE))
    model = get_peft_model(base, make_config())
    with pytest.raises(ValueError, match="the vocabulary of its config is not that of the embedding"):
        export_standalone(model, make_tokenizer("GPT-2"), tmp_path / "out")
    with pytest.raises(ValueError, match="gives ids up to 299, and the model has 99 embeddings"):
        export_standalone(Case("Llama", rows=99).make(), make_tokenizer("GPT-2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_many_languages_is_refused(tmp_path) -> None:
    tokenizer = make_tokenizer("GPT-2")
    tokenizer.set_src_lang_special_tokens = lambda language: None
    with pytest.raises(ValueError, match="anew for each language"):
        export_standalone(Case("Llama").make(), tokenizer, tmp_path / "out")


def test_an_export_replaces_files_and_leaves_others(tmp_path) -> None:
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    export_standalone(Case("Llama").make(), make_tokenizer("GPT-2"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == SIZE + V
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_pipelines_read_the_users_tokens(tmp_path) -> None:
    """What a pipeline returns of a text: the words and scores of the adapted model, and nothing of the prompt."""
    tokenizer = make_tokenizer("BERT", padding_side="right")
    text = "a bird sat on the <mask> wall"
    inputs = tokenizer(text, return_tensors="pt")
    model = Case("BERT", "masked LM").make()
    export_standalone(model, tokenizer, tmp_path / "fill")
    with torch.no_grad():
        logits = model(**inputs).logits[0, inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)]
    found = pipeline("fill-mask", model=str(tmp_path / "fill"), device="cpu")(text, top_k=5)
    scores, ids = logits.softmax(-1).topk(5)
    assert [answer["token"] for answer in found] == ids.tolist()
    assert [answer["score"] for answer in found] == pytest.approx(scores.tolist(), abs=1e-6)

    text = text.replace("<mask>", "old")
    inputs = tokenizer(text, return_tensors="pt")
    model = Case("BERT", "TOKEN_CLS").make()
    export_standalone(model, tokenizer, tmp_path / "tag")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0].softmax(-1)
    found = pipeline("token-classification", model=str(tmp_path / "tag"), device="cpu", ignore_labels=[])(text)
    tagged = [i for i, id in enumerate(inputs.input_ids[0].tolist()) if id not in tokenizer.all_special_ids]
    assert [answer["word"] for answer in found] == tokenizer.convert_ids_to_tokens(inputs.input_ids[0][tagged])
    assert [answer["score"] for answer in found] == pytest.approx(
        probabilities[tagged].max(-1).values.tolist(), abs=1e-6
    )
    assert [(answer["start"], answer["end"]) for answer in found] == [inputs.token_to_chars(i)[:] for i in tagged]
