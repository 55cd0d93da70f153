# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the README says of stock PEFT's P-tuning, on the PEFT that is pinned, beside what this package does."""

from __future__ import annotations

import pytest
import torch
from families import make_model
from peft import PeftConfig, PeftModel, PromptEncoderConfig, get_peft_model
from reference import S, V, make_batch

from peft_ptuning_ext import PTuningConfig


STOCK, OURS = PromptEncoderConfig, PTuningConfig


def adapt_with(config_class: type[PeftConfig], family: str, task: str) -> PeftModel:
    """A model with PEFT's own method or with this package's, the same size of network in both."""
    config = config_class(num_virtual_tokens=V, encoder_hidden_size=32, task_type=task)
    return get_peft_model(make_model(family, task), config).eval()


@pytest.mark.parametrize("family", ["BERT", "Llama", "T5"])
def test_token_classification_with_labels(family) -> None:
    batch = make_batch(family, "TOKEN_CLS")
    with pytest.raises(ValueError, match="Expected input batch_size"):
        adapt_with(STOCK, family, "TOKEN_CLS")(**batch, labels=batch["input_ids"] % 2)
    adapt_with(OURS, family, "TOKEN_CLS")(**batch, labels=batch["input_ids"] % 2).loss.backward()


def test_question_answering_spans() -> None:
    batch = make_batch("BERT", "QUESTION_ANS")
    assert adapt_with(STOCK, "BERT", "QUESTION_ANS")(**batch).start_logits.shape == (2, V + S)
    assert adapt_with(OURS, "BERT", "QUESTION_ANS")(**batch).start_logits.shape == (2, S)


def test_what_is_pooled() -> None:
    batch = make_batch("BERT", "SEQ_CLS")
    for config_class, length in ((STOCK, V + S), (OURS, S)):
        model = adapt_with(config_class, "BERT", "SEQ_CLS")
        seen = []
        model.get_base_model().bert.pooler.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(**batch)
        assert seen[-1].shape[1] == length  # of which it takes the first


@pytest.mark.parametrize("family", ["DistilBERT", "ALBERT", "ELECTRA"])
def test_families_that_stock_cannot_take(family) -> None:
    batch = make_batch(family, "SEQ_CLS")
    with pytest.raises((ValueError, RuntimeError)):
        adapt_with(STOCK, family, "SEQ_CLS")(**batch)
    assert adapt_with(OURS, family, "SEQ_CLS")(**batch).logits.shape == (2, 2)


def test_resuming_a_saved_prompt(tmp_path) -> None:
    for config_class in (STOCK, OURS):
        adapt_with(config_class, "Llama", "CAUSAL_LM").save_pretrained(tmp_path / config_class.__name__)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path / STOCK.__name__, is_trainable=True)
    PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path / OURS.__name__, is_trainable=True)


def test_add_adapter_of_transformers() -> None:
    with pytest.raises(ValueError, match="does not support prompt learning"):
        make_model("Llama", "CAUSAL_LM").add_adapter(STOCK(num_virtual_tokens=V, encoder_hidden_size=32))
    make_model("Llama", "CAUSAL_LM").add_adapter(OURS(num_virtual_tokens=V))


@torch.no_grad()
def test_logits_of_prompt_positions() -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    assert adapt_with(STOCK, "Llama", "CAUSAL_LM")(**batch).logits.shape[1] == V + S
    assert adapt_with(OURS, "Llama", "CAUSAL_LM")(**batch).logits.shape[1] == S


@torch.no_grad()
def test_where_the_prompt_starts() -> None:
    """How far the vectors lie apart, measured by how far the model's own embeddings do."""
    stock = adapt_with(STOCK, "Llama", "CAUSAL_LM")
    ours = adapt_with(OURS, "Llama", "CAUSAL_LM")
    spread = ours.get_input_embeddings().weight.std(dim=0).mean()
    assert stock.get_prompt(1)[0].std(dim=0).mean() < 0.5 * spread
    assert ours.prompt_embeddings().std(dim=0).mean() > 0.7 * spread


def test_the_size_of_the_network_by_default() -> None:
    base = make_model("Llama", "CAUSAL_LM")
    stock = get_peft_model(base, STOCK(num_virtual_tokens=V, task_type="CAUSAL_LM"))
    assert stock.peft_config["default"].encoder_hidden_size == base.config.hidden_size
    sizes = {encoder: OURS(encoder_reparameterization_type=encoder).encoder_hidden_size for encoder in ("MLP", "LSTM")}
    assert sizes == {"MLP": 128, "LSTM": 64}
