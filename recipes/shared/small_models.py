# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Toys that a run pre-trains on the spot: the default model of seq2seq.py, and the models of tests.

A decoder (Llama) and an encoder-decoder (T5) of about half a million parameters, pre-trained in a minute or two on the
texts of small_language.py, and cached (cache.py). A folder's name depends on the content of this file and of
small_language.py: after a change, models are trained again.
"""

import hashlib
import itertools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    get_linear_schedule_with_warmup,
)

from shared import small_language
from shared.cache import make_once


PAD, BOS, EOS = "<pad>", "<s>", "</s>"
POSITIONS = 256
SEPARATOR = "\n"  # between the text that a decoder reads and the text that it writes


@dataclass(frozen=True)
class Pretraining:
    """How a small model is built and trained."""

    architecture: Literal["causal_lm", "seq2seq"]
    width: int = 96
    layers: int = 3
    steps: int = 700
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


SEQ2SEQ = Pretraining("seq2seq", layers=2, steps=900)


def find_small_model(settings: Pretraining) -> str:
    """Returns the folder of the small model. The first call pre-trains it, and other processes wait for that."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, small_language.__file__))
    key = hashlib.sha256(sources + repr(settings).encode()).hexdigest()[:12]

    def pretrain(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            _pretrain(settings, folder)

    folder = make_once(f"small_{settings.architecture}_{key}", pretrain)
    print(f"{json.loads((folder / 'pretraining.json').read_text())['description']} It is cached in {folder}.")
    return str(folder)


def _pretrain(settings: Pretraining, folder: Path) -> None:
    start = time.perf_counter()
    print(f"Pre-training a small model for {settings.steps} steps, once; later runs find it.")
    torch.manual_seed(settings.seed)
    texts = small_language.draw_texts(settings.seed)
    tokenizer = make_tokenizer(settings, itertools.islice(texts, 2000))
    model = make_model(settings, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, settings.steps // 20, settings.steps)
    batches = itertools.islice(_draw_batches(settings, texts, tokenizer), settings.steps)
    for batch in (bar := tqdm(batches, total=settings.steps, desc="Pre-training")):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    description = (
        f"A toy, made for trying things: {type(model).__name__} of {model.num_parameters():,} parameters, pre-trained "
        f"for {settings.steps} steps of {settings.batch_size} texts on sentences that small_language.py generates, in "
        f"{time.perf_counter() - start:.0f} s."
    )
    (folder / "pretraining.json").write_text(json.dumps({"description": description}) + "\n")


def make_tokenizer(settings: Pretraining, texts) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer learned from the texts, which can encode any other text as well."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator((part for text in texts for part in text), trainer)
    is_decoder = settings.architecture == "causal_lm"
    pairs.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A" if is_decoder else f"$A {EOS}",
        special_tokens=[(token, pairs.token_to_id(token)) for token in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left" if is_decoder else "right",
        model_max_length=POSITIONS,
    )


def make_model(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if settings.architecture == "causal_lm":
        config = LlamaConfig(
            hidden_size=settings.width,
            intermediate_size=3 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            initializer_range=settings.width**-0.5,  # with the usual 0.02, the model learns to copy ten times later
            tie_word_embeddings=True,
            **tokens,
        )
        return LlamaForCausalLM(config)
    config = T5Config(
        d_model=settings.width,
        d_ff=3 * settings.width,
        d_kv=settings.width // 4,
        num_heads=4,
        num_layers=settings.layers,
        decoder_start_token_id=tokenizer.pad_token_id,
        dropout_rate=0.0,
        **tokens,
    )
    return T5ForConditionalGeneration(config)


def _draw_batches(settings: Pretraining, texts, tokenizer: PreTrainedTokenizerFast):
    """Yields batches of texts of similar lengths."""
    rng = random.Random(settings.seed)
    while True:
        pairs = list(itertools.islice(texts, 16 * settings.batch_size))
        rows = [_as_ids(settings, tokenizer, *pair) for pair in pairs]
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            inputs, labels = zip(*batch)
            inputs = pad_sequence(inputs, batch_first=True, padding_value=tokenizer.pad_token_id)
            yield {
                "input_ids": inputs,
                "attention_mask": (inputs != tokenizer.pad_token_id).long(),
                "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            }


def _as_ids(settings: Pretraining, tokenizer, source: str, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    answer = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if settings.architecture == "seq2seq":
        return torch.tensor(tokenizer(source).input_ids), torch.tensor(answer)
    given = tokenizer(source + SEPARATOR).input_ids
    return torch.tensor(given + answer), torch.tensor([-100] * len(given) + answer)
