# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A prompt at the input of a causal decoder becomes the deep prompt that computes the same."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
import transformers as tf
from families import DECODERS, make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from reference import V, make_batch, unmasked
from torch import nn

from peft_ptuning_ext import (
    PromptTemplate,
    PTuningConfig,
    export_standalone,
    fold_prompt,
    to_prompt_embeds,
    unfold_prompt,
)


ROUNDS = {"rtol": 1e-5, "atol": 1e-5}  # a prompt at the input may be concatenated
PADDED = {"none": {"lengths": (6, 6)}, "right": {}, "left": {"pad_left": True}}


def move_prompt(model: nn.Module) -> None:
    """Moves the prompt far from where it started."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ptuning_encoders" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def make_moved(family: str = "Llama", task: str = "CAUSAL_LM", **options) -> PeftModel:
    model = make_adapted(family, task, **options)
    move_prompt(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return unmasked(model(**batch).logits, batch["attention_mask"])


def encoder_of(model: nn.Module, name: str = "default") -> nn.Module:
    return next(module for path, module in model.named_modules() if path.endswith(f"ptuning_encoders.{name}"))


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("family", DECODERS)
def test_an_unfolded_prompt_computes_the_same(family, padding) -> None:
    model, batch = make_moved(family), make_batch(family, "CAUSAL_LM", **PADDED[padding])
    expected, new = logits(model, batch), model.generate(**batch, max_new_tokens=5, do_sample=False)
    unfold_prompt(model)
    torch.testing.assert_close(logits(model, batch), expected, **ROUNDS)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), new)
    with model.disable_adapter():
        assert logits(model, batch).sub(expected).abs().max() > 1e-2


@pytest.mark.parametrize("encoder", ["MLP", "LSTM", "RESIDUAL"])
def test_an_unfolded_network_is_saved_as_keys_and_values(encoder, tmp_path) -> None:
    model, batch = make_moved(encoder_reparameterization_type=encoder, encoder_dropout=0.5), make_batch("Llama", "")
    expected = logits(model, batch)
    model.train()  # the dropout of the network must not get into the keys and values
    unfold_prompt(model)
    assert all(module.training for module in model.modules())
    model.eval()
    torch.testing.assert_close(logits(model, batch), expected, **ROUNDS)

    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    found = {key.rpartition("ptuning_encoders.")[2]: tuple(value.shape) for key, value in saved.items()}
    assert found == {f"{kind}.{layer}": (2, V, 8) for kind in ("keys", "values") for layer in (0, 1)}
    loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    config = loaded.peft_config["default"]
    assert (config.prompt_depth, config.encoder_reparameterization_type) == ("DEEP", "NONE")
    assert config.shift_positions
    assert (config.encoder_hidden_size, config.encoder_num_layers, config.encoder_dropout) == (None, None, 0)


def test_training_goes_on_in_every_layer() -> None:
    model, batch = make_moved(encoder_reparameterization_type="MLP"), make_batch("Llama", "CAUSAL_LM")
    model.train()
    unfold_prompt(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4
    assert all(".ptuning_encoders.default." in name for name in trained)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(dict(model.named_parameters())[name].grad.abs().sum() > 0 for name in trained)


def test_where_the_prompt_started_is_no_longer_in_the_config() -> None:
    config = make_config("CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), config)
    unfold_prompt(model)
    assert model.peft_config["default"].prompt_tuning_init == "RANDOM"
    assert (config.prompt_depth, config.prompt_tuning_init) == ("INPUT", "SAMPLE_VOCAB")


def test_other_adapters_stay_and_a_frozen_one_stays_frozen() -> None:
    config, batch = make_config("CAUSAL_LM", encoder_hidden_size=8), make_batch("Llama", "CAUSAL_LM")
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), config).eval()
    model.add_adapter("other", config)
    move_prompt(model)
    first = logits(model, batch)
    model.set_adapter("other")
    expected = logits(model, batch)
    model.set_adapter("default")

    unfold_prompt(model, "other")
    assert not any(parameter.requires_grad for parameter in encoder_of(model, "other").parameters())
    assert not encoder_of(model, "other").training
    assert model.peft_config["default"] is config
    assert config.prompt_depth == "INPUT"
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model, batch), expected, **ROUNDS)
    with pytest.raises(ValueError, match="adapter 'other' is deep already"):
        unfold_prompt(model)
    with pytest.raises(ValueError, match=r"no adapter 'third', only \['default', 'other'\]"):
        unfold_prompt(model, "third")

    base = model.unload()
    assert base.config._attn_implementation == "sdpa"
    assert torch.equal(logits(base, batch), logits(make_model("Llama", "CAUSAL_LM"), batch))


@pytest.mark.parametrize("upcast", [True, False])
def test_the_dtype_of_the_parameters_stays(upcast) -> None:
    base, batch = make_model("Llama", "CAUSAL_LM").bfloat16(), make_batch("Llama", "CAUSAL_LM")
    model = get_peft_model(base, make_config("CAUSAL_LM"), autocast_adapter_dtype=upcast).eval()
    expected = logits(model, batch)
    unfold_prompt(model)
    dtype = torch.float32 if upcast else torch.bfloat16
    assert {parameter.dtype for parameter in encoder_of(model).parameters()} == {dtype}
    assert torch.equal(logits(model, batch), expected)


def test_a_prompt_of_a_transformers_model_is_unfolded() -> None:
    model, batch = make_model("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM")
    model.add_adapter(make_config(None))
    model.eval()
    expected = logits(model, batch)
    unfold_prompt(model)
    torch.testing.assert_close(logits(model, batch), expected, **ROUNDS)
    assert model.peft_config["default"].prompt_depth == "DEEP"


LONG_ROPE = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
NOT_APART = {
    ("BERT", "SEQ_CLS"): ({}, "its attention is not causal"),
    ("MPNet", "SEQ_CLS"): ({}, "its attention is not causal"),
    ("T5", "SEQ_2_SEQ_LM"): ({}, "its attention is not causal"),
    ("Llama", "CAUSAL_LM"): (LONG_ROPE, "its rotary embedding depends on the length of the whole text"),
}


@pytest.mark.parametrize(("family", "task"), NOT_APART)
def test_keys_and_values_that_depend_on_the_text_are_refused(family, task) -> None:
    sizes, reason = NOT_APART[family, task]
    model, batch = make_adapted(family, task, sizes), make_batch(family, task)
    encoder, config = encoder_of(model), copy.copy(model.peft_config["default"])
    implementation = model.get_base_model().config._attn_implementation
    with torch.no_grad():
        expected = model(**batch).logits
    with pytest.raises(ValueError, match=f"can't be computed apart from the text: {reason}"):
        unfold_prompt(model)
    assert encoder_of(model) is encoder
    assert model.peft_config["default"] == config
    assert model.get_base_model().config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_vectors_among_the_text_are_refused() -> None:
    template = PromptTemplate("{prompt:2} {text}", placeholder="<p>", placeholder_id=98)
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), PTuningConfig("CAUSAL_LM", prompt_template=template))
    with pytest.raises(ValueError, match="stand where its `prompt_template` says"):
        unfold_prompt(model)
    assert model.peft_config["default"].prompt_depth == "INPUT"


def test_what_only_a_pass_of_the_prompt_finds_out_is_refused() -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    base = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(vocab_size=99, hidden_size=32, **sizes))
    model = get_peft_model(base, make_config("CAUSAL_LM"))
    with pytest.raises(ValueError, match="can't be computed apart from the text: its layers attend more than once"):
        unfold_prompt(model)
    assert model.peft_config["default"].prompt_depth == "INPUT"


def make_mpt(**options) -> PeftModel:
    config = tf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=99, max_seq_len=64)
    return get_peft_model(tf.MptForCausalLM(config), make_config("FEATURE_EXTRACTION", **options)).eval()


def test_padding_between_a_prompt_in_the_cache_and_the_text_is_refused() -> None:
    """Where distance is counted in columns, it would depend on the padding."""
    with pytest.raises(ValueError, match="it measures distance in columns"):
        unfold_prompt(make_mpt())
    model, batch = make_mpt(prompt_depth="DEEP"), make_batch("Falcon", "CAUSAL_LM", pad_left=True)
    with pytest.raises(ValueError, match=r"padding on the left would stand between both\. Pad on the right"):
        model(**batch)
    model(**make_batch("Falcon", "CAUSAL_LM"))


@pytest.mark.parametrize("family", ["Bloom", "Falcon"])
def test_padding_on_the_left_changes_nothing_behind_a_prompt_in_the_cache(family) -> None:
    model, batch = make_moved(family, prompt_depth="DEEP"), make_batch(family, "CAUSAL_LM", pad_left=True)
    alone = {key: value[1:, 2:] for key, value in batch.items()}
    with torch.no_grad():
        padded, expected = model(**batch).logits[1:, 2:], model(**alone).logits
    torch.testing.assert_close(padded, expected, **ROUNDS)
    new = [model.generate(**inputs, max_new_tokens=5, num_beams=3)[-1, -5:] for inputs in (batch, alone)]
    assert torch.equal(*new)


def test_a_folded_deep_prompt_gives_the_same_bits(tmp_path) -> None:
    model = make_moved(prompt_depth="DEEP", encoder_reparameterization_type="MLP", encoder_dropout=0.2)
    batch = make_batch("Llama", "CAUSAL_LM")
    expected = logits(model, batch)
    model.train()  # the dropout must not get into the keys and values
    fold_prompt(model)
    fold_prompt(model)  # has nothing left to do
    assert all(module.training for module in model.modules())
    assert encoder_of(model).dropout.p == 0.2  # it acts on the keys and values
    trained = {name.rpartition("default.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"keys.0", "keys.1", "values.0", "values.1"}
    model.eval()
    assert torch.equal(logits(model, batch), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    config = loaded.peft_config["default"]
    assert (config.prompt_depth, config.encoder_reparameterization_type) == ("DEEP", "NONE")
    assert (config.encoder_hidden_size, config.encoder_dropout) == (None, 0.2)


def test_what_takes_vectors_refuses_a_deep_prompt(tmp_path) -> None:
    model = make_adapted(prompt_depth="DEEP")
    with pytest.raises(ValueError, match="gives them to the first layer only"):
        to_prompt_embeds(model, torch.arange(3))
    with pytest.raises(ValueError, match="entries of a vocabulary reach the first layer only"):
        export_standalone(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attention_that_had_no_prompt_before_takes_the_unfolded_one() -> None:
    """A config that asks for attention maps has the prompt concatenated, and attention left alone."""
    sizes = {"output_attentions": True, "attn_implementation": "eager"}
    model, batch = make_moved("Llama", sizes=sizes), make_batch("Llama", "CAUSAL_LM")
    assert model.base_model.prompt_route.startswith("concatenated")
    expected = logits(model, batch)
    unfold_prompt(model)
    torch.testing.assert_close(logits(model, batch), expected, **ROUNDS)


def test_token_types_reach_no_deep_prompt() -> None:
    model, batch = make_moved("GPT-2"), make_batch("GPT-2", "CAUSAL_LM")
    typed = {**batch, "token_type_ids": torch.full_like(batch["input_ids"], 7)}
    expected = logits(model, typed)
    unfold_prompt(model)
    assert (logits(model, typed) - expected).abs().max() > 1e-2
