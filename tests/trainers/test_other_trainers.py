# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trainers other than the stock one: Seq2SeqTrainer, TRL's SFT and DPO trainers, SentenceTransformerTrainer."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from families import make_model
from learnable import SETTINGS, V, add_prompt, frozen, losses, trainable
from making import make_config
from peft import PeftModel
from reference import concatenated, concatenated_inputs, embedding_and_backbone, make_batch
from releases import CHECKPOINTING
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_ptuning_ext import PromptEncoderType, PTuningLayer


def train(trainer: Trainer) -> None:
    """The loss falls, what is trained moves, and nothing else does."""
    before, base = trainable(trainer.model), frozen(trainer.model)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
    for name, value in trainable(trainer.model).items():
        assert "ptuning_" in name
        assert (value - before[name]).abs().max() > 1e-3, name
    for name, value in frozen(trainer.model).items():
        assert torch.equal(value, base[name]), name


@pytest.mark.parametrize("family", ["T5", "BART"])
def test_seq2seq_trainer_predicts_with_generate(family, tmp_path) -> None:
    batch = make_batch(family, "SEQ_2_SEQ_LM", lengths=(7, 5, 6, 3))
    batch["labels"] = batch.pop("decoder_input_ids")
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    base = make_model(family, "SEQ_2_SEQ_LM")
    base.generation_config.max_length = 9
    model = add_prompt(base, "SEQ_2_SEQ_LM")
    arguments = Seq2SeqTrainingArguments(tmp_path, predict_with_generate=True, max_steps=8, **SETTINGS)
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    train(trainer)
    predicted = trainer.predict(rows)

    base = make_model(family, "SEQ_2_SEQ_LM")
    inputs = concatenated_inputs(base, embedding_and_backbone(base)[1], model.prompt_embeddings(), batch)
    with torch.no_grad():
        memory = base.get_encoder()(**inputs)
        mask = inputs["attention_mask"]
        generated = base.generate(encoder_outputs=memory, attention_mask=mask, max_length=9, do_sample=False)
        loss = base(encoder_outputs=memory, attention_mask=mask, labels=batch["labels"]).loss
    assert generated.shape == (4, 9)
    assert predicted.predictions.tolist() == generated.tolist()
    assert predicted.label_ids[:, :4].tolist() == batch["labels"].tolist()
    assert predicted.metrics["test_loss"] == pytest.approx(loss.item(), abs=1e-5)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *(f"w{i}" for i in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="</s>",
        chat_template=(
            "{% for message in messages %}{% if message.role == 'user' %}{{ message.content + ' ' }}{% else %}"
            "{% generation %}{{ message.content + ' </s>' }}{% endgeneration %}{% endif %}{% endfor %}"
        ),
    )


def make_texts(kind: str) -> Dataset:
    """16 texts of different lengths: plain ones, prompts with completions, or conversations."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for lengths in torch.randint(3, 7, (16, 2), generator=generator).tolist():
        words = [torch.randint(60, (length,), generator=generator).tolist() for length in lengths]
        pairs.append([" ".join(f"w{i}" for i in part) for part in words])
    if kind == "plain":
        return Dataset.from_list([{"text": f"{one} {two}"} for one, two in pairs])
    if kind == "completion":
        return Dataset.from_list([{"prompt": one + " ", "completion": two} for one, two in pairs])
    roles = ("user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": role, "content": text} for role, text in zip(roles, pair)]} for pair in pairs]
    )


def separate(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The ids and labels of each text of a batch, packed or padded."""
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()[1:]
        return list(zip(*(batch[name][0].tensor_split(starts) for name in ("input_ids", "labels"))))
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool())
    return [(ids[seen], labels[seen]) for ids, labels, seen in rows]


@torch.no_grad()
def by_hand(base: PreTrainedModel, prompt: torch.Tensor, batch: dict) -> dict[str, float]:
    """What TRL logs, from the base model on the prompt and each text alone, concatenated."""
    found = []
    for ids, labels in separate(batch):
        embeds = torch.cat([prompt, base.get_input_embeddings()(ids)])
        logits = base(inputs_embeds=embeds[None]).logits[0, len(prompt) : -1]
        targets = labels[1:]
        for row in (targets != -100).nonzero().flatten():
            log_probs = logits[row].log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum()
            found.append([-log_probs[targets[row]], entropy, log_probs.argmax() == targets[row]])
    loss, entropy, accuracy = torch.tensor(found).mean(0).tolist()
    return {"loss": loss, "entropy": entropy, "mean_token_accuracy": accuracy}


# TRL's own arguments have gradient checkpointing on, by its old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "kind", "arguments"),
    [
        ("Llama", "plain", {}),
        ("Qwen3", "plain", {"packing": True, "max_length": 30}),
        ("Llama", "plain", {"padding_free": True, "max_length": None}),
        ("Qwen3", "completion", {}),
        ("Llama", "conversation", {"assistant_only_loss": True}),
        ("Qwen3", "plain", {"bf16": True}),
    ],
    ids=["padded", "packed", "padding-free", "completion-only", "assistant-only", "bf16"],
)
def test_sft_trainer(family, kind, arguments, tmp_path) -> None:
    texts = make_texts(kind)
    settings = {**SETTINGS, "bf16": False, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    torch.manual_seed(0)
    trainer = SFTTrainer(
        make_model(family, "CAUSAL_LM"),
        SFTConfig(tmp_path, max_steps=8, **{**settings, **arguments}),
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=make_tokenizer(),
        peft_config=make_config("CAUSAL_LM", V),
    )
    (batch,) = trainer.get_eval_dataloader()
    assert len(separate(batch)) == 16
    is_label = batch["labels"][:, 1:] != -100
    assert (kind == "plain") == (is_label.sum() == sum(len(ids) - 1 for ids, _ in separate(batch)))

    tolerance = {"abs": 2e-2 if arguments.get("bf16") else 1e-5}
    start = by_hand(make_model(family, "CAUSAL_LM"), trainer.model.prompt_embeddings(), batch)
    train(trainer)
    assert {name: trainer.state.log_history[0][name] for name in start} == pytest.approx(start, **tolerance)
    assert getattr(trainer.model.train(), f"is_{CHECKPOINTING}")
    assert trainer.model.prompt_route == "shared"
    end = by_hand(make_model(family, "CAUSAL_LM"), trainer.model.prompt_embeddings(), batch)
    logged = trainer.evaluate()
    assert {name: logged[f"eval_{name}"] for name in end} == pytest.approx(end, **tolerance)

    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(family, "CAUSAL_LM"), tmp_path / "adapter").eval()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # out of autocast
    ids = make_batch(family, "CAUSAL_LM", lengths=(7, 7))["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_sft_trainer_with_a_chat_template_that_adds_tokens(tied, tmp_path) -> None:
    """TRL resizes the model and sets `trainable_token_indices` and `modules_to_save` of the config."""
    source = make_tokenizer()
    source.add_tokens(["<|user|>", "<|end|>"], special_tokens=True)
    source.chat_template = "{% for m in messages %}{{ '<|user|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    source.save_pretrained(tmp_path / "template")
    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer)
    trainer = SFTTrainer(
        make_model("Llama", "CAUSAL_LM", vocab_size=vocabulary, tie_word_embeddings=tied),
        SFTConfig(tmp_path, max_steps=8, bf16=False, chat_template_path=str(tmp_path / "template"), **SETTINGS),
        train_dataset=make_texts("conversation"),
        processing_class=tokenizer,
        peft_config=make_config("CAUSAL_LM", V),
    )
    before = trainable(trainer.model)
    kinds = ["ptuning_encoders", "trainable_tokens_delta", "modules_to_save"]
    assert all(any(kind in name for name in before) for kind in kinds)
    assert len(before) == 3
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    for name, value in trainable(trainer.model).items():
        assert (value - before[name]).abs().amax() > 1e-3, name

    trainer.save_model(tmp_path / "adapter")
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    ids = torch.tensor([[5, 6, vocabulary, 7, vocabulary + 1]])
    expected = model(ids).logits.detach()
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)
    small = make_model("Llama", "CAUSAL_LM", vocab_size=vocabulary, tie_word_embeddings=tied)
    with pytest.raises(ValueError, match=f"has {vocabulary} rows. Call `resize_token_embeddings` first"):
        PeftModel.from_pretrained(small, tmp_path / "adapter")


def test_packed_texts_need_positions() -> None:
    model = add_prompt(make_model("Llama", "CAUSAL_LM"), "CAUSAL_LM")
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(7,))["input_ids"]
    with pytest.raises(ValueError, match="several texts packed into one row.*`position_ids` that begin anew"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 7]))


# TRL turns gradient checkpointing off and on by methods with old names.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("encoder", list(PromptEncoderType))
def test_dpo_trainer_begins_at_its_reference(encoder, tmp_path) -> None:
    """A prompt that is trained on is compared with a copy that TRL makes, so that the first loss is log 2."""
    base = make_model("Llama", "CAUSAL_LM")
    model = add_prompt(base, "CAUSAL_LM", encoder_reparameterization_type=encoder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    texts = make_texts("completion")
    rows = texts.rename_column("completion", "chosen").add_column("rejected", texts["completion"][::-1])
    trainer = DPOTrainer(
        model,
        args=DPOConfig(tmp_path, max_steps=6, **{**SETTINGS, "bf16": False, "per_device_train_batch_size": 16}),
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )
    reference = model.prompt_embeddings("ref").detach().clone()
    assert torch.equal(model.prompt_embeddings("default"), reference)
    train(trainer)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(model.prompt_embeddings("ref"), reference)
    assert not [name for name in trainable(model) if ".ref." in name]


@torch.no_grad()
def pooled_by_hand(base: PreTrainedModel, prompt: torch.Tensor, batch: dict) -> torch.Tensor:
    """The mean over the tokens of each text, of the base model on the concatenation."""
    hidden = concatenated(base, "FEATURE_EXTRACTION", prompt, batch)
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("family", ["BERT", "MPNet", "Qwen3"])
def test_sentence_transformer_trainer(family, tmp_path) -> None:
    make_model(family, "FEATURE_EXTRACTION").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    model.add_adapter(make_config("FEATURE_EXTRACTION", V))
    pairs = [tuple(row["text"].split(" ", 4)[i] for i in (0, -1)) for row in make_texts("plain")]
    rows = [{"sentence1": one, "sentence2": two, "score": float(i % 2)} for i, (one, two) in enumerate(pairs)]
    arguments = SentenceTransformerTrainingArguments(tmp_path, max_steps=8, per_device_train_batch_size=16, **SETTINGS)
    loss = CosineSimilarityLoss(model)
    train(SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_list(rows), loss=loss))

    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9"]
    found = model.eval().encode(texts, convert_to_tensor=True)
    prompt = next(module for module in model.modules() if isinstance(module, PTuningLayer)).prompt("default")
    batch = make_tokenizer()(texts, padding=True, return_tensors="pt")
    expected = pooled_by_hand(make_model(family, "FEATURE_EXTRACTION"), prompt, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    alone = model.encode(texts[:1], convert_to_tensor=True)  # without padding
    torch.testing.assert_close(found[:1], alone, rtol=0, atol=1e-5)

    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert torch.equal(loaded.encode(texts, convert_to_tensor=True), found)
