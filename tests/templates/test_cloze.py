# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The cloze head: scores worked out word by word, and everything around a classifier running on it as it is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from families import ENCODERS, make_model
from making import make_arguments
from peft import LoraConfig, PeftModel, get_peft_model
from releases import CHECKPOINTING
from tiny_tokenizers import make_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AddedToken, DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, pipeline

from peft_ptuning_ext import ClozeClassifier, PromptTemplate, PTuningConfig


VOCABULARY = 400
SLOT = "<|reserved_special_token_0|>"
# In the byte-level tokenizer "the" and "on" are one token, "sang" and "such" three and "never" six.
WORDS = {"yes": ["sang", "the"], "no": ["never"], "maybe": ["on", "such"]}
ONE_TOKEN = {"yes": ["the"], "no": ["on"]}
TEXTS = ["A bird sat on the old wall.", "She counts her steps", "Nobody in the town had seen it before."]


def with_slot(kind: str, has_mask: bool = True, **options) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(kind, **options)
    tokenizer.add_tokens([AddedToken(SLOT, special=True)], special_tokens=True)
    if not has_mask:
        tokenizer.mask_token = None
    return tokenizer


def make_cloze(family: str, words: dict = WORDS, **options) -> tuple[ClozeClassifier, PromptTemplate]:
    """A classifier on a tiny model, and a template for it."""
    is_masked = family in ENCODERS
    tokenizer = with_slot("GPT-2", is_masked, padding_side="right" if is_masked else "left")
    model = make_model(family, "masked LM" if is_masked else "CAUSAL_LM", vocab_size=VOCABULARY)
    template = PromptTemplate("{text} {prompt:2} It was {prompt} {mask}", shortenable=["text"])
    return ClozeClassifier(model, tokenizer, words, **options), template.for_tokenizer(tokenizer)


def make_batch(cloze: ClozeClassifier, template: PromptTemplate, texts: list[str] = TEXTS) -> dict:
    encode = template.map_function(cloze.tokenizer, num_masks=cloze.num_masks)
    return dict(cloze.tokenizer.pad(encode({"text": texts}), return_tensors="pt"))


def word_ids(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    return tokenizer(f" {word}", add_special_tokens=False)["input_ids"]


@torch.no_grad()
def score_by_hand(cloze: ClozeClassifier, model: nn.Module, template: PromptTemplate, text: str) -> torch.Tensor:
    """log Σ p(word) by class, for one text without padding and one word at a time: (C,)."""
    classes = []
    for _, words in cloze.cloze_settings["label_words"]:
        scores = []
        for word in words:
            ids = word_ids(cloze.tokenizer, word)
            encode = template.map_function(cloze.tokenizer, num_masks=len(ids))
            row = encode({"text": [text]})["input_ids"][0]
            if cloze.is_masked:
                logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
                masks = [i for i, token in enumerate(row) if token == cloze.tokenizer.mask_token_id]
                scores.append(sum(logits[i, token] for i, token in zip(masks, ids, strict=True)) / len(ids))
            else:
                logits = model(input_ids=torch.tensor([row + ids])).logits[0].log_softmax(-1)
                scores.append(sum(logits[len(row) - 1 + i, token] for i, token in enumerate(ids)))
        classes.append(torch.stack(scores).logsumexp(0))
    return torch.stack(classes)


@pytest.mark.parametrize("family", ["GPT-NeoX", "Mixtral", "Qwen3-MoE"])
@torch.no_grad()
def test_models_whose_weights_had_other_names(family: str, tmp_path) -> None:
    cloze, template = make_cloze(family, calibration="trained")
    model = get_peft_model(cloze, PTuningConfig("SEQ_CLS", prompt_template=template)).eval()
    batch = make_batch(cloze, template)
    model.save_pretrained(tmp_path)
    loaded = ClozeClassifier.from_pretrained(make_cloze(family)[0].lm, cloze.tokenizer, str(tmp_path)).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


FAMILIES = ["BERT", "RoBERTa", "DeBERTa-v2", "ModernBERT", "Llama", "GPT-2", "OPT", "Bloom", "Gemma 2"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_those_worked_out_word_by_word(family: str) -> None:
    cloze, template = make_cloze(family)
    assert {len(word_ids(cloze.tokenizer, word)) for words in WORDS.values() for word in words} >= {1, 3}
    batch = make_batch(cloze, template)
    logits = cloze(**batch).logits
    for text, row in zip(TEXTS, logits, strict=True):
        expected = score_by_hand(cloze, cloze.lm, template, text)
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-5)
    assert cloze(**batch, return_dict=False)[0].equal(logits)


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing_for_a_causal_model(family: str) -> None:
    cloze, template = make_cloze(family)
    on_the_left = cloze(**make_batch(cloze, template)).logits
    cloze.tokenizer.padding_side = "right"
    torch.testing.assert_close(cloze(**make_batch(cloze, template)).logits, on_the_left, rtol=0, atol=1e-5)
    alone = cloze(**make_batch(cloze, template, TEXTS[1:2])).logits
    torch.testing.assert_close(on_the_left[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["BERT", "Llama", "GPT-2", "RoBERTa"])
def test_an_adapter_is_trained_saved_and_loaded_in_one_line(family: str, tmp_path) -> None:
    cloze, template = make_cloze(family, calibration="trained")
    tokenizer, batch, labels = cloze.tokenizer, make_batch(cloze, template), torch.tensor([0, 1, 2])
    model = get_peft_model(cloze, PTuningConfig("SEQ_CLS", prompt_template=template))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name.rpartition(".")[2] for name in trained] == ["embedding", "weight", "bias"]
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    output.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    optimizer.step()
    expected = model.eval()(**batch).logits
    assert not torch.allclose(expected, output.logits)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["cloze"]
    assert dict(saved["label_words"]) == WORDS
    assert "ClozeClassifier.from_pretrained(language_model, tokenizer" in (tmp_path / "README.md").read_text()
    base = make_model(family, "masked LM" if family in ENCODERS else "CAUSAL_LM", vocab_size=VOCABULARY)
    loaded = ClozeClassifier.from_pretrained(base, tokenizer, str(tmp_path)).eval()
    assert isinstance(loaded, PeftModel)
    assert torch.equal(loaded(**batch).logits, expected)
    again = loaded.peft_config["default"].prompt_template
    assert again == template
    with loaded.disable_adapter():
        assert torch.equal(loaded(**batch).logits, cloze_logits(family, batch))


@torch.no_grad()
def cloze_logits(family: str, batch: dict) -> torch.Tensor:
    return make_cloze(family)[0].eval()(**batch).logits


@pytest.mark.parametrize("calibration", [None, "contextual", "trained"])
@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_trainer_and_pipeline(family: str, calibration: str | None, tmp_path) -> None:
    cloze, template = make_cloze(family, ONE_TOKEN, calibration=calibration)
    tokenizer = cloze.tokenizer
    model = get_peft_model(cloze, PTuningConfig("SEQ_CLS", prompt_template=template))
    rows = {"text": ["A bird sang", "the old wall"] * 6, "label": [0, 1] * 6}
    data = Dataset.from_dict(rows).map(template.map_function(tokenizer), batched=True, remove_columns=["text"])
    options = {"max_steps": 15, "learning_rate": 0.3, "label_names": ["labels"], "save_strategy": "no"}
    trainer = Trainer(
        model,
        make_arguments(tmp_path, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before
    assert after["eval_accuracy"] == 1
    classify = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, device="cpu")
    found = classify([template.render(tokenizer, {"text": text}) for text in rows["text"][:2]])
    assert [row["label"] for row in found] == ["yes", "no"]
    trainer.save_model(str(tmp_path / "saved"))
    base = make_model(family, "masked LM" if family in ENCODERS else "CAUSAL_LM", vocab_size=VOCABULARY)
    loaded = ClozeClassifier.from_pretrained(base, tokenizer, str(tmp_path / "saved")).eval()
    batch = make_batch(cloze, template)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_a_pipeline_reads_words_of_several_tokens() -> None:
    cloze, template = make_cloze("BERT")
    tokenizer = cloze.tokenizer
    model = get_peft_model(cloze, PTuningConfig("SEQ_CLS", prompt_template=template)).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    assert "text" in repr(classify)
    assert cloze.num_masks > 1
    text = template.render(tokenizer, {"text": "A bird sang"}, num_masks=cloze.num_masks)
    row = template.map_function(tokenizer, num_masks=cloze.num_masks)({"text": ["A bird sang"]})
    expected = model(**{name: torch.tensor(values) for name, values in row.items()}).logits.softmax(-1).max()
    assert classify(text)[0]["score"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("depth", ["INPUT", "DEEP"])
@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_gradient_checkpointing_changes_nothing(family: str, depth: str, use_reentrant: bool, tmp_path) -> None:
    found = []
    for is_on in (False, True):
        cloze, template = make_cloze(family)
        batch = make_batch(cloze, template)
        config = {"prompt_template": template} if depth == "INPUT" else {"prompt_depth": "DEEP"}
        torch.manual_seed(0)
        model = get_peft_model(cloze, PTuningConfig("SEQ_CLS", **config))
        options = {CHECKPOINTING: is_on, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
        arguments = make_arguments(tmp_path, max_steps=2, save_strategy="no", learning_rate=0.1, **options)
        rows = [{name: value[i] for name, value in batch.items()} | {"labels": i} for i in range(3)]
        Trainer(model, arguments, train_dataset=rows).train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in cloze.modules()) == is_on
        found.append([parameter.detach() for parameter in model.parameters() if parameter.requires_grad])
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["BERT", "Llama"])
@torch.no_grad()
def test_each_row_is_its_adapter_alone(family: str) -> None:
    cloze, template = make_cloze(family)
    model = get_peft_model(cloze, PTuningConfig(num_virtual_tokens=5)).eval()
    model.add_adapter("deep", PTuningConfig(num_virtual_tokens=4, prompt_depth="DEEP"))
    encode = template.map_function(cloze.tokenizer, num_masks=cloze.num_masks, keep_slots=False)
    batch = dict(cloze.tokenizer.pad(encode({"text": TEXTS}), return_tensors="pt"))
    names = ["default", "deep", "__base__"]
    found = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        whole = model(**batch, adapter_names=[name] * len(names)).logits
        torch.testing.assert_close(found[row], whole[row], rtol=0, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(found[2], model(**batch).logits[2], rtol=0, atol=1e-4)
    model.base_model.set_adapter("deep")
    torch.testing.assert_close(found[1], model(**batch).logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["BERT", "Llama"])
@torch.no_grad()
def test_contextual_calibration(family: str, tmp_path) -> None:
    cloze, template = make_cloze(family, calibration="contextual")
    batch = make_batch(cloze, template)
    model = get_peft_model(cloze, PTuningConfig("SEQ_CLS", prompt_template=template)).eval()
    before = model(**batch).logits
    of_nothing = model(**make_batch(cloze, template, ["N/A", "", "[MASK]"])).logits
    bias = model.get_base_model().calibrate(template)
    torch.testing.assert_close(bias, -of_nothing.softmax(-1).mean(0).log(), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**batch).logits, before + bias, rtol=0, atol=1e-5)
    only = model.get_base_model().calibrate(template, ["N/A"])
    torch.testing.assert_close(
        model(**make_batch(cloze, template, ["N/A"])).logits.softmax(-1), torch.full((1, 3), 1 / 3), rtol=0, atol=1e-5
    )
    with model.disable_adapter():  # the adapter's own calibration
        assert model.get_base_model().score.original_module.bias.abs().max() == 0
    model.save_pretrained(tmp_path)
    base = make_model(family, "masked LM" if family == "BERT" else "CAUSAL_LM", vocab_size=VOCABULARY)
    loaded = ClozeClassifier.from_pretrained(base, cloze.tokenizer, str(tmp_path)).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(copy.deepcopy(loaded)(**batch).logits, model(**batch).logits)
    assert only.shape == (3,)


@torch.no_grad()
def test_calibration_of_the_model_without_a_prompt() -> None:
    cloze, template = make_cloze("BERT", calibration="contextual")
    cloze.eval()
    bias = cloze.calibrate(template, ["N/A", "a bird"], keep_slots=False)
    encode = template.map_function(cloze.tokenizer, num_masks=cloze.num_masks)
    rows = encode({"text": ["N/A", "a bird"]})["input_ids"]
    rows = {"input_ids": [[i for i in ids if i != template.placeholder_id] for ids in rows]}
    batch = cloze.tokenizer.pad(rows, return_tensors="pt")
    expected = -cloze.class_scores(batch["input_ids"], batch["attention_mask"]).softmax(-1).mean(0).log()
    torch.testing.assert_close(bias, expected)


@torch.no_grad()
def test_calibration_without_an_adapter() -> None:
    cloze, template = make_cloze("Llama", calibration="contextual")
    batch = make_batch(cloze, template)
    before = cloze(**batch).logits
    bias = cloze.calibrate(template)
    torch.testing.assert_close(cloze(**batch).logits, before + bias)
    with pytest.raises(ValueError, match="is for calibration='contextual', and this one is None"):
        make_cloze("Llama")[0].calibrate(template)


def test_lora_on_it() -> None:
    cloze, template = make_cloze("Llama")
    model = get_peft_model(cloze, LoraConfig(task_type="SEQ_CLS"))
    model(**make_batch(cloze, template), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("words", "options", "error", "message"),
    [
        ({"a": ["sang"]}, {}, ValueError, "two different classes at least"),
        ({"a": ["sang"], "b": []}, {}, ValueError, "Class 'b' of `label_words` must have words"),
        ({"a": ["sang"], "b": [" "]}, {}, ValueError, "none of them empty"),
        ({"a": ["sang"], "b": ["the", 3]}, {}, ValueError, "must have words"),
        ({"a": "sang", "b": "the"}, {}, TypeError, "must have a list of words for each class"),
        (["sang", "the"], {}, TypeError, "must have a list of words for each class"),
        ({"a": ["sang", "the"], "b": ["the"]}, {}, ValueError, "'the' of class 'b' is.* a word of class 'a' already"),
        ({"a": ["sang", "sang"], "b": ["the"]}, {}, ValueError, "'sang' of class 'a' is.* a word of class 'a'"),
        (ONE_TOKEN, {"calibration": "other"}, ValueError, "`calibration` must be one of .* got 'other'"),
        (ONE_TOKEN, {"word_prefix": None}, TypeError, "`word_prefix` must be a string, got None"),
    ],
)
def test_what_is_refused(words, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_cloze("Llama", words, **options)


def test_unknown_words_and_models() -> None:
    word_piece = make_tokenizer("BERT")
    masked = make_model("BERT", "masked LM", vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="The word '鳥' of class 'b' is unknown"):
        ClozeClassifier(masked, word_piece, {"a": ["bird"], "b": ["鳥"]})
    with pytest.raises(ValueError, match="reads words at masks.*has no mask token"):
        ClozeClassifier(masked, with_slot("GPT-2", has_mask=False), ONE_TOKEN)
    with pytest.raises(ValueError, match="BertModel is no masked or causal language model"):
        ClozeClassifier(make_model("BERT", "FEATURE_EXTRACTION"), word_piece, ONE_TOKEN)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no masked or causal language model"):
        ClozeClassifier(make_model("T5", "SEQ_2_SEQ_LM"), word_piece, ONE_TOKEN)


def test_rows_that_are_refused() -> None:
    cloze, template = make_cloze("BERT")
    batch = make_batch(cloze, template)
    batch["input_ids"][1, 0] = cloze.tokenizer.mask_token_id
    longest = cloze.num_masks
    with pytest.raises(ValueError, match=rf"Row 1 .* has {longest + 1} masks, and the longest word has {longest} tok"):
        cloze(**batch)
    with pytest.raises(ValueError, match="takes `input_ids`"):
        cloze(inputs_embeds=torch.zeros(1, 2, 32))
    causal, _ = make_cloze("Llama")
    causal.tokenizer.mask_token = "<mask>"
    ids = torch.tensor([[5, 6], [7, causal.tokenizer.mask_token_id]])
    with pytest.raises(ValueError, match="Row 1 of `input_ids` ends in '<mask>'.*Leave {mask} out"):
        causal(ids)
    ids[1, 1] = causal.tokenizer.eos_token_id
    with pytest.raises(ValueError, match="Row 1 of `input_ids` ends in '</s>'.*add_eos_token = False"):
        causal(ids)
    assert causal(ids[1:, 1:]).logits.isfinite().all()  # all of the text


def test_adapters_that_do_not_fit(tmp_path) -> None:
    cloze, template = make_cloze("Llama", ONE_TOKEN)
    tokenizer = cloze.tokenizer
    get_peft_model(cloze, PTuningConfig("SEQ_CLS", prompt_template=template)).save_pretrained(tmp_path / "cloze")
    other, _ = make_cloze("Llama", WORDS)
    with pytest.raises(
        ValueError, match="was trained on a ClozeClassifier with.*ClozeClassifier has.*from_pretrained"
    ):
        PeftModel.from_pretrained(other, tmp_path / "cloze")
    assert not any("ptuning" in name for name, _ in other.named_modules())
    base = make_model("Llama", "CAUSAL_LM", vocab_size=VOCABULARY)
    base = get_peft_model(base, PTuningConfig("CAUSAL_LM"))
    base.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="was not trained on a ClozeClassifier"):
        ClozeClassifier.from_pretrained(
            make_model("Llama", "CAUSAL_LM", vocab_size=VOCABULARY), tokenizer, str(tmp_path / "plain")
        )
    with pytest.raises(ValueError, match="`placeholder` must be one token of the vocabulary"):
        ClozeClassifier.from_pretrained(base.unload(), make_tokenizer("GPT-2"), str(tmp_path / "cloze"))
    for calibration in ("contextual", "trained"):
        cloze, template = make_cloze("Llama", calibration=calibration)
        with pytest.raises(ValueError, match=f"calibration .{calibration}.*trained and saved.*Pass this task type"):
            get_peft_model(cloze, PTuningConfig(prompt_template=template))
        assert not any("ptuning" in name for name, _ in cloze.named_modules())
        get_peft_model(cloze, PTuningConfig(prompt_template=template, modules_to_save=["score"]))
