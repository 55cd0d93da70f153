# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The method's textbook program, written out, equals this package."""

from __future__ import annotations

import torch
from families import ENCODER_SIZES
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForTokenClassification, BertModel, PreTrainedModel

from peft_ptuning_ext import PTuningConfig


class TextbookPTuning(nn.Module):
    """Liu et al., 2021: trainable vectors in front of a frozen BERT's word embeddings, a linear head on `[CLS]`."""

    def __init__(self, bert: BertModel, length: int, classes: int) -> None:
        super().__init__()
        self.bert = bert.requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(length, bert.config.hidden_size))
        self.head = nn.Linear(bert.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask, labels):
        words = self.bert.embeddings.word_embeddings(input_ids)
        prompt = self.prompt.expand(len(words), -1, -1)
        ones = attention_mask.new_ones(prompt.shape[:2])
        hidden = self.bert(
            inputs_embeds=torch.cat([prompt, words], dim=1), attention_mask=torch.cat([ones, attention_mask], dim=1)
        ).last_hidden_state
        logits = self.head(hidden[:, len(self.prompt)])  # [CLS] stands behind the prompt
        return cross_entropy(logits, labels), logits


class ClassifierOnCLS(PreTrainedModel):
    """The user's own model: a backbone and a linear head, with nothing of P-tuning in it."""

    config_class = BertConfig

    def __init__(self, config: BertConfig, classes: int = 3) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.head = nn.Linear(config.hidden_size, classes)
        self.post_init()

    def get_input_embeddings(self):
        return self.bert.get_input_embeddings()

    def forward(self, input_ids, attention_mask, labels):
        logits = self.head(self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])
        return cross_entropy(logits, labels), logits


def test_the_textbook_program_and_this_package_agree() -> None:
    config = BertConfig(**ENCODER_SIZES)
    ids = torch.randint(5, 99, (4, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7, [1] * 3 + [0] * 4])
    labels = torch.tensor([0, 1, 2, 1])
    user_model = ClassifierOnCLS(config).eval()
    textbook = TextbookPTuning(BertModel(config), length=6, classes=3).eval()
    textbook.bert.load_state_dict(user_model.bert.state_dict())
    textbook.head.load_state_dict(user_model.head.state_dict())

    model = get_peft_model(user_model, PTuningConfig(num_virtual_tokens=6, modules_to_save=["head"])).eval()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "ptuning_" in n).copy_(textbook.prompt)

    loss, logits = model(ids, mask, labels)
    textbook_loss, textbook_logits = textbook(ids, mask, labels)
    assert torch.equal(logits, textbook_logits)
    assert torch.equal(loss, textbook_loss)
    loss.backward()
    textbook_loss.backward()
    gradients = {n.rpartition(".")[2]: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == {"embedding", "weight", "bias"}
    torch.testing.assert_close(gradients["embedding"], textbook.prompt.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients["weight"], textbook.head.weight.grad, rtol=1e-6, atol=1e-8)


def test_where_stock_pooling_reads_the_prompt_this_package_reads_the_text() -> None:
    """A token-level head on a BERT: one label per token of the text, which stock P-tuning can't compute."""
    model = BertForTokenClassification(BertConfig(**ENCODER_SIZES)).eval()
    adapted = get_peft_model(model, PTuningConfig(num_virtual_tokens=6, task_type="TOKEN_CLS")).eval()
    ids = torch.randint(5, 99, (2, 7))
    outputs = adapted(input_ids=ids, labels=ids % 2)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits.flatten(0, 1), (ids % 2).flatten()))
