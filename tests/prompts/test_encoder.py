# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from families import make_model
from peft import PromptEncoder as StockPromptEncoder
from peft import PromptEncoderConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import layer_norm
from transformers import PreTrainedTokenizerFast

from peft_ptuning_ext import PromptEncoderType, PTuningConfig
from peft_ptuning_ext.prompts.build import build_encoder


V, H = 6, 16
every_encoder = pytest.mark.parametrize("encoder", list(PromptEncoderType))
networks = pytest.mark.parametrize("encoder", [e for e in PromptEncoderType if e is not PromptEncoderType.NONE])


def make_encoder(encoder: PromptEncoderType, **kwargs):
    return build_encoder(PTuningConfig(num_virtual_tokens=V, encoder_reparameterization_type=encoder, **kwargs), H)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[UNK]", "classify", "the", "sentence"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@every_encoder
def test_the_prompt_starts_where_it_is_told_and_moves(encoder) -> None:
    module = make_encoder(encoder, **({"encoder_dropout": 0.5} if encoder is not PromptEncoderType.NONE else {}))
    start = torch.randn(V, H)
    module.train()
    module.start_at(start)
    assert module.training
    module.eval()
    torch.testing.assert_close(module(), start, rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module().sum().backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is None} <= {"offset"}
    optimizer.step()
    assert not torch.allclose(module(), start)


@networks
def test_hidden_size_layers_and_dropout_are_honoured(encoder) -> None:
    def size(**kwargs) -> int:
        return sum(parameter.numel() for parameter in make_encoder(encoder, **kwargs).parameters())

    assert size(encoder_hidden_size=8) < size(encoder_hidden_size=9)
    assert size(encoder_num_layers=2) < size(encoder_num_layers=3)
    noisy = make_encoder(encoder, encoder_dropout=0.5, encoder_num_layers=2).train()
    assert not torch.equal(noisy(), noisy())
    noisy.eval()
    assert torch.equal(noisy(), noisy())


@pytest.mark.parametrize("width", [384, 768, 4096])
@networks
def test_the_default_network_is_no_hundred_prompts(encoder, width) -> None:
    config = PTuningConfig(num_virtual_tokens=20, encoder_reparameterization_type=encoder)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build_encoder(config, width).parameters())
    assert size < 60 * 20 * width


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_the_networks_are_those_of_stock_peft(encoder) -> None:
    stock = StockPromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=V,
            token_dim=H,
            num_transformer_submodules=1,
            encoder_reparameterization_type=encoder,
            encoder_hidden_size=8,
        )
    )
    ours = make_encoder(encoder, encoder_hidden_size=8)
    names = {"embedding.weight": "embedding"}
    state = stock.state_dict()
    renamed = {names.get(k, k.replace("mlp_head", "mlp").replace("lstm_head", "lstm")): v for k, v in state.items()}
    ours.load_state_dict(renamed | {"offset": torch.zeros(V, H)})
    torch.testing.assert_close(ours(), stock(torch.arange(V)[None])[0], rtol=1e-6, atol=1e-6)


def test_the_residual_network_is_the_papers() -> None:
    module = make_encoder("RESIDUAL", encoder_hidden_size=8)
    module.start_at(torch.randn(V, H))
    down, _, up = module.mlp
    p = module.embedding
    bottleneck = up(torch.relu(down(p)))
    expected = p + layer_norm(bottleneck, (H,), module.norm.weight, module.norm.bias) + module.offset
    torch.testing.assert_close(module(), expected)


@every_encoder
def test_random_vectors_have_the_scale_of_the_models_own_embeddings(encoder) -> None:
    base = make_model("Gemma 2", "CAUSAL_LM")  # its embeddings are scaled by the embedding's own forward
    model = get_peft_model(base, PTuningConfig(num_virtual_tokens=64, encoder_reparameterization_type=encoder)).eval()
    embedded = base.get_input_embeddings()(torch.arange(99))
    prompt = model.prompt_embeddings()
    torch.testing.assert_close(prompt.std(), embedded.std(), rtol=0.1, atol=0)
    assert prompt.std(dim=0).min() > 0.3 * embedded.std()  # and no two vectors are the same


@every_encoder
def test_sample_vocab_starts_at_embeddings_of_the_model(encoder) -> None:
    base = make_model("BERT", "SEQ_CLS")
    config = PTuningConfig(
        num_virtual_tokens=V, encoder_reparameterization_type=encoder, prompt_tuning_init="SAMPLE_VOCAB"
    )
    prompt = get_peft_model(base, config).eval().prompt_embeddings()
    distances = torch.cdist(prompt, base.get_input_embeddings().weight, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1).values.max() < 1e-5
    assert distances.argmin(dim=1).unique().numel() > 1


@every_encoder
@pytest.mark.parametrize("by_name", [False, True])
def test_text_starts_at_the_texts_embeddings(encoder, by_name, tmp_path) -> None:
    base = make_model("BERT", "SEQ_CLS")
    tokenizer = make_tokenizer()
    if by_name:
        tokenizer.save_pretrained(tmp_path)
    config = PTuningConfig(
        num_virtual_tokens=V,
        encoder_reparameterization_type=encoder,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="classify the sentence the",
        tokenizer_name_or_path=str(tmp_path) if by_name else tokenizer,
    )
    assert isinstance(config.tokenizer_name_or_path, str)
    prompt = get_peft_model(base, config).eval().prompt_embeddings()
    expected = base.get_input_embeddings().weight[[1, 2, 3, 2, 1, 2]]  # repeated to V tokens
    torch.testing.assert_close(prompt, expected, rtol=1e-5, atol=1e-6)


def test_a_text_of_another_models_tokenizer_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(200)])
    config = PTuningConfig(
        prompt_tuning_init="TEXT", prompt_tuning_init_text="word150", tokenizer_name_or_path=tokenizer
    )
    with pytest.raises(ValueError, match="the model has 99 embeddings.*not this model's tokenizer"):
        get_peft_model(make_model("BERT", "SEQ_CLS"), config)
