# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where the recipes' models come from, and what is asked of their tokenizers."""

from types import SimpleNamespace

import pytest
from shared import models
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast


def save_tokenizer(folder, **special):
    """A tokenizer with the special tokens that are given, and no others."""
    words = {word: i for i, word in enumerate(["so", "it", "is", *special.values()])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="so"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


def test_default_backbone_is_checked(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: package)
    with pytest.raises(ValueError, match=f"has SHA-256 [0-9a-f]{{64}}, expected {models.MINILM_SHA256}"):
        models.find_packaged_encoder()
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        models.find_packaged_encoder()


@pytest.mark.parametrize("length", [0, -5])
def test_a_text_has_at_least_one_token(length):
    tokenizer = SimpleNamespace(model_max_length=64)
    with pytest.raises(ValueError, match=f"`--max_length` should be 1 or more, got {length}"):
        models.cut_texts(tokenizer, length, 4, BertConfig())
    models.cut_texts(tokenizer, 1, 4, BertConfig())
    assert tokenizer.model_max_length == 1


def test_the_end_token_pads_where_there_is_no_other(tmp_path):
    config = GPT2Config()
    tokenizer = models.load_tokenizer(save_tokenizer(tmp_path, eos_token="</s>"), config)
    assert tokenizer.pad_token == "</s>"
    assert config.pad_token_id == tokenizer.pad_token_id == 3


def test_a_padding_token_stays_in_tokenizer_and_config(tmp_path):
    config = BertConfig(pad_token_id=1)
    tokenizer = models.load_tokenizer(save_tokenizer(tmp_path, eos_token="</s>", pad_token="<pad>"), config)
    assert tokenizer.pad_token == "<pad>"
    assert config.pad_token_id == 1


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a padding or an end token to fill up short texts"):
        models.load_tokenizer(save_tokenizer(tmp_path), GPT2Config())
