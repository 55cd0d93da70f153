# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of every kind, trained on a few sentences, with <pad> = 0, <s> = 1 and </s> = 2."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SIZE = 300
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
TEXTS = [
    "A bird sat on the old wall and sang to the morning.",
    "Nobody in the town had ever seen such a large umbrella.",
    "She counts her steps, and the stairs count with her.",
    "What is written on the door is not what is behind it!",
]
CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def _train(tokenizer: Tokenizer, trainer) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _byte_level(post_processor=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.post_processor = post_processor
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _train(tokenizer, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


def _word_piece(post_processor) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=SPECIAL))
    tokenizer.post_processor = post_processor
    return tokenizer


BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "nothing around": _byte_level,
    "GPT-2": lambda: _byte_level(processors.ByteLevel(trim_offsets=False)),
    "Llama 3": lambda: _byte_level(processors.Sequence([processors.ByteLevel(trim_offsets=False), BOS])),
    "Gemma": lambda: _byte_level(BOS),
    "RoBERTa": lambda: _byte_level(processors.RobertaProcessing(("</s>", 2), ("<s>", 1))),
    "T5": _unigram,
    "BERT": lambda: _word_piece(processors.BertProcessing(("</s>", 2), ("<s>", 1))),
}


def make_tokenizer(kind: str, chat_template: str | dict | None = None, **options) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind; its ids are below `SIZE`."""
    options = {"padding_side": "left", "model_max_length": 60, **options}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        **options,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
