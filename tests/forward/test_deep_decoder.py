# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts in every layer of encoder, decoder or both, against attention written out by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
import transformers as tf
from by_hand import attending_by_hand
from families import ENCODER_DECODERS, Family, make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from reference import S, V, main_output, make_batch
from releases import CACHE, CHECKPOINTING
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


TASK = "SEQ_2_SEQ_LM"
# More layers in the decoder than in the encoder: a number could be mistaken for that of the other stack.
ENCODER_LAYERS, DECODER_LAYERS = 2, 3
LAYERS = {"ENCODER": range(2), "DECODER": range(2, 5), "BOTH": range(5)}

T5_SIZES = {**ENCODER_DECODERS["T5"].sizes, "num_decoder_layers": DECODER_LAYERS}
BART_SIZES = {**ENCODER_DECODERS["BART"].sizes, "decoder_layers": DECODER_LAYERS}
MODELS = {
    "T5": Family("encoder-decoder", tf.T5Config, T5_SIZES),
    "BART": Family("encoder-decoder", tf.BartConfig, BART_SIZES),
}
KIN = {
    "mT5": Family("encoder-decoder", tf.MT5Config, T5_SIZES),
    "Marian": Family("encoder-decoder", tf.MarianConfig, BART_SIZES),
    "Pegasus": Family("encoder-decoder", tf.PegasusConfig, BART_SIZES),
    "mBART": Family("encoder-decoder", tf.MBartConfig, BART_SIZES),
    "M2M-100": Family("encoder-decoder", tf.M2M100Config, BART_SIZES),
}
# `generate` makes T5 a cache of as many layers as the encoder has.
GENERATING = {name: {"num_decoder_layers": ENCODER_LAYERS} for name in ("T5", "mT5")}

models = pytest.mark.parametrize("model_name", MODELS)
all_models = pytest.mark.parametrize("model_name", MODELS | KIN)
stacks = pytest.mark.parametrize("stacks", ["DECODER", "BOTH"])


def make_base(model_name: str, **options) -> PreTrainedModel:
    return make_model((MODELS | KIN)[model_name], TASK, **options)


def make_deep(model_name: str, stacks: str | None = "BOTH", **options) -> PeftModel:
    return make_adapted((MODELS | KIN)[model_name], TASK, prompt_depth="DEEP", prompt_stacks=stacks, **options)


def states_of(model: PeftModel) -> dict:
    return {layer: (k.detach(), v.detach()) for layer, (k, v) in model.prompt_key_values().items()}


def text(lengths: tuple[int, ...] = (S, S - 2), **decoder) -> dict:
    return make_batch("T5", TASK, lengths) | decoder


def by_hand(model_name: str, states: dict, batch: dict, **sizes) -> torch.Tensor:
    base = make_base(model_name, **sizes)
    with attending_by_hand(model_name, base, states):
        return main_output(base(**batch))


@all_models
@pytest.mark.parametrize("stacks", LAYERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_outputs_are_those_of_keys_and_values_in_front(model_name: str, stacks: str, implementation: str) -> None:
    model = make_deep(model_name, stacks, sizes={"attn_implementation": implementation})
    states = states_of(model)
    assert list(states) == [*LAYERS[stacks]]
    batch = text()
    expected = by_hand(model_name, states, batch)
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=2e-5)
    assert not torch.allclose(expected, main_output(make_base(model_name)(**batch)), atol=1e-3)


@all_models
@stacks
def test_gradients_are_those_of_keys_and_values_in_front(model_name: str, stacks: str) -> None:
    model, batch = make_deep(model_name, stacks), text()
    states = {layer: (k.requires_grad_(), v.requires_grad_()) for layer, (k, v) in states_of(model).items()}
    expected = by_hand(model_name, states, batch)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (main_output(model(**batch)) * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 2 * len(LAYERS[stacks])
    for layer, pair in states.items():
        for name, state in zip(("keys", "values"), pair, strict=True):
            (gradient,) = (g for n, g in found.items() if n.endswith(f"{name}.{layer}"))
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, state.grad, rtol=1e-4, atol=1e-5 * state.grad.abs().max().item())


@models
@stacks
@torch.no_grad()
def test_padding_changes_nothing(model_name: str, stacks: str) -> None:
    model = make_deep(model_name, stacks)
    written = torch.tensor([[7, 8, 9, 10]])
    alone = text((4,), decoder_input_ids=written)
    expected = main_output(model(**alone))[0]
    for pad_left in (False, True) if model_name == "T5" else (False,):
        fill = torch.zeros(1, 2, dtype=torch.long)
        rows = [
            torch.cat([torch.cat([fill, row] if pad_left else [row, fill], dim=1), other])
            for row, other in ((written, torch.full((1, 6), 11)), (torch.ones_like(written), torch.ones(1, 6)))
        ]
        ids, mask = (row.long() for row in rows)
        batch = text((4, S), decoder_input_ids=ids, decoder_attention_mask=mask)
        output = main_output(model(**batch))[0]
        torch.testing.assert_close(output[mask[0].bool()], expected, rtol=0, atol=1e-5)


@models
@stacks
@torch.no_grad()
def test_other_ways_to_call(model_name: str, stacks: str) -> None:
    model, batch = make_deep(model_name, stacks), text((S, S))
    expected = main_output(model(**batch))
    assert torch.equal(model(**batch, return_dict=False)[0], expected)
    del batch["attention_mask"]
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=1e-5)
    base = model.get_base_model()
    encoded = base.get_encoder()(batch["input_ids"])
    ids = batch["decoder_input_ids"]
    hidden = base.get_decoder()(ids, encoder_hidden_states=encoded[0])[0]
    by_name = base.get_decoder()(input_ids=ids, encoder_hidden_states=encoded[0])[0]
    assert torch.equal(hidden, by_name)
    with model.disable_adapter():
        assert not torch.allclose(base.get_decoder()(ids, encoder_hidden_states=encoded[0])[0], hidden)


@models
@stacks
@torch.no_grad()
def test_outputs_have_the_length_of_the_text(model_name: str, stacks: str) -> None:
    eager = {"attn_implementation": "eager"}
    model, base, batch = make_deep(model_name, stacks, sizes=eager), make_base(model_name, **eager), text()
    arguments = {"output_hidden_states": True, "output_attentions": True}
    expected, outputs = base(**batch, **arguments), model(**batch, **arguments)
    widened = {"decoder_attentions", "encoder_attentions"} if stacks == "BOTH" else {"decoder_attentions"}
    assert outputs.keys() == expected.keys()
    assert outputs[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
    for key in expected.keys() - {CACHE, "logits", "encoder_last_hidden_state"}:
        for value, other in zip(outputs[key], expected[key], strict=True):
            assert value.shape[:-1] == other.shape[:-1]
            assert value.shape[-1] - other.shape[-1] == (V if key in widened else 0), key


@models
@stacks
@torch.no_grad()
def test_disabled_is_the_base(model_name: str, stacks: str) -> None:
    model, batch = make_deep(model_name, stacks), text()
    expected, enabled = main_output(make_base(model_name)(**batch)), main_output(model(**batch))
    with model.disable_adapter():
        assert torch.equal(main_output(model(**batch)), expected)
    assert torch.equal(main_output(model(**batch)), enabled)


def generate(model: PeftModel, **options):
    batch = text()
    del batch["decoder_input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "forced_eos_token_id": None} | options
    return model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)


def assert_same(outputs, logits: list[torch.Tensor]) -> None:
    assert len(outputs.logits) == 5
    for found, expected in zip(outputs.logits, logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@all_models
@stacks
@torch.no_grad()
def test_generated_tokens_are_those_written_by_hand(model_name: str, stacks: str) -> None:
    sizes = GENERATING.get(model_name, {})
    model = make_deep(model_name, stacks, sizes=sizes)
    outputs, states = generate(model), states_of(model)
    expected = [
        by_hand(model_name, states, text() | {"decoder_input_ids": outputs.sequences[:, :length]}, **sizes)[:, -1]
        for length in range(1, 6)
    ]
    assert_same(outputs, expected)
    assert_same(generate(model, use_cache=False), expected)
    with model.disable_adapter():
        assert not torch.allclose(generate(model).logits[0], expected[0], atol=1e-3)


@models
@stacks
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
@torch.no_grad()
def test_beams_and_caches_change_nothing(model_name: str, stacks: str, options: dict) -> None:
    model = make_deep(model_name, stacks, sizes=GENERATING.get(model_name, {}))
    outputs = generate(model, **options)
    others = generate(model, num_beams=options.get("num_beams", 1), use_cache=False)
    assert torch.equal(outputs.sequences, others.sequences)
    assert_same(outputs, others.logits)


@models
@torch.no_grad()
def test_steps_with_a_cache_are_the_whole(model_name: str) -> None:
    model, batch = make_deep(model_name), text()
    ids, expected = batch.pop("decoder_input_ids"), main_output(model(**text()))
    first = model(**batch, decoder_input_ids=ids[:, :1], use_cache=True)
    rest = model(**batch, decoder_input_ids=ids[:, 1:], **{CACHE: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), expected, rtol=0, atol=2e-5)


@models
@torch.no_grad()
def test_a_cache_goes_on_under_its_own_adapter(model_name: str) -> None:
    model, batch = make_deep(model_name), text()
    model.add_adapter("other", make_config(TASK, prompt_depth="DEEP", prompt_stacks="DECODER"))
    model.add_adapter("in_encoder", make_config(TASK, prompt_depth="DEEP"))
    given = model(**batch, use_cache=True)
    step = {**batch, "decoder_input_ids": torch.tensor([[5], [6]])}
    for name in ("other", "in_encoder"):
        model.set_adapter(name)
        with pytest.raises(ValueError, match="was filled behind the prompt of adapter 'default'"):
            model(**step, **{CACHE: copy.deepcopy(given[CACHE])})
    without = model(**batch, use_cache=True)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="was filled behind no prompt .* now the prompt of adapter 'default'"):
        model(**step, **{CACHE: without[CACHE]})
    with model.disable_adapter(), pytest.raises(ValueError, match="now no prompt is active"):
        model(**step, **{CACHE: given[CACHE]})
    model(**step, **{CACHE: given[CACHE]})


@models
@stacks
@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(model_name: str, stacks: str, encoder: str, use_reentrant: bool) -> None:
    model, batch = make_deep(model_name, stacks, encoder_reparameterization_type=encoder), text()
    base = model.get_base_model()
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
        if isinstance(module, GradientCheckpointingLayer):
            module.training, module.dropout, module.activation_dropout = True, 0.0, 0.0

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        main_output(model(**batch)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    getattr(base, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    if use_reentrant:
        with pytest.raises(ValueError, match="Turn gradient checkpointing on with `use_reentrant=False`"):
            model(**batch)
        return
    for found, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@models
@stacks
@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
@torch.no_grad()
def test_saved_and_reloaded_is_the_same(model_name: str, stacks: str, encoder: str, tmp_path) -> None:
    model, batch = make_deep(model_name, stacks, encoder_reparameterization_type=encoder), text()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    keys = [int(key.rpartition(".")[2]) for key in saved if ".keys." in key]
    assert sorted(keys) == [*LAYERS[stacks]]
    reloaded = PeftModel.from_pretrained(make_base(model_name), tmp_path).eval()
    assert reloaded.peft_config["default"].prompt_stacks == stacks
    torch.testing.assert_close(main_output(reloaded(**batch)), main_output(model(**batch)), rtol=0, atol=1e-6)


@models
@torch.no_grad()
def test_a_prompt_of_other_stacks_does_not_fit(model_name: str, tmp_path) -> None:
    model = make_deep(model_name, "DECODER")
    model.save_pretrained(tmp_path)
    base = make_base(model_name)
    config = make_config(TASK, prompt_depth="DEEP", prompt_tuning_init="ADAPTER", prompt_tuning_init_adapter=tmp_path)
    with pytest.raises(ValueError, match="layers"):
        get_peft_model(base, config)
    _check_untouched(base, make_base(model_name))
    config.prompt_stacks = "DECODER"
    started = get_peft_model(make_base(model_name), make_config(TASK, **_start(tmp_path), prompt_stacks="DECODER"))
    assert torch.equal(main_output(started.eval()(**text())), main_output(model(**text())))


def _start(folder) -> dict:
    return {"prompt_depth": "DEEP", "prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": folder}


@models
@stacks
@torch.no_grad()
def test_copies_and_pickles_are_independent(model_name: str, stacks: str) -> None:
    model, batch = make_deep(model_name, stacks), text()
    expected = main_output(model(**batch))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _move(model, 0.5)
        assert torch.equal(main_output(twin(**batch)), expected)
        _move(model, -0.5)
        _move(twin, 0.5)
        assert not torch.allclose(main_output(twin(**batch)), expected)
        _check_untouched(twin.unload(), make_base(model_name))
        torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=1e-5)


def _move(model: nn.Module, by: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(by)


@models
@torch.no_grad()
def test_adapters_of_both_depths_on_one_model(model_name: str) -> None:
    batch = text()
    model = make_adapted(MODELS[model_name], TASK, adapter_name="input")
    of_input = main_output(model(**batch))
    model.add_adapter("in_decoder", make_config(TASK, prompt_depth="DEEP", prompt_stacks="DECODER"))
    model.add_adapter("in_encoder", make_config(TASK, prompt_depth="DEEP"))
    assert torch.equal(main_output(model.eval()(**batch)), of_input)
    for name in ("in_decoder", "in_encoder"):
        model.set_adapter(name)
        expected = by_hand(model_name, states_of(model), batch)
        torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=2e-5)
    model.delete_adapter("in_decoder")
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=2e-5)
    model.set_adapter("input")
    assert torch.equal(main_output(model(**batch)), of_input)


@models
@stacks
@torch.no_grad()
def test_unloading_gives_back_the_base(model_name: str, stacks: str) -> None:
    base = make_base(model_name)
    model = get_peft_model(base, make_config(TASK, prompt_depth="DEEP", prompt_stacks=stacks))
    model(**text())
    assert model.unload() is base
    _check_untouched(base, make_base(model_name))
    assert torch.equal(main_output(base.eval()(**text())), main_output(make_base(model_name)(**text())))


def _check_untouched(base: PreTrainedModel, untouched: PreTrainedModel) -> None:
    for (name, module), other in zip(base.named_modules(), untouched.modules(), strict=True):
        assert type(module) is type(other), name
        assert vars(module).keys() == vars(other).keys(), name
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        if isinstance(module, PreTrainedModel):
            assert module.config._attn_implementation == other.config._attn_implementation, name


@pytest.mark.parametrize("stacks", [None, "ENCODER"])
def test_by_default_the_encoder_has_the_prompt(stacks: str | None) -> None:
    model = make_deep("T5", stacks)
    assert [*model.prompt_key_values()] == [*LAYERS["ENCODER"]]
    assert not model.get_base_model().get_decoder()._forward_hooks


@pytest.mark.parametrize("init", ["SAMPLE_VOCAB", "ZERO_VALUES"])
def test_where_it_starts(init: str) -> None:
    states = states_of(make_deep("BART", prompt_tuning_init=init))
    assert {tuple(t.shape) for pair in states.values() for t in pair} == {(4, V, 8)}
    for key, value in states.values():
        assert key.any()
        assert value.any() == (init != "ZERO_VALUES")


@pytest.mark.parametrize(
    ("family", "task", "options", "message"),
    [
        ("Llama", "CAUSAL_LM", {"prompt_stacks": "BOTH"}, "LlamaForCausalLM has no decoder beside"),
        ("BERT", "SEQ_CLS", {"prompt_stacks": "ENCODER"}, "BertForSequenceClassification has no decoder beside"),
        ("T5", "TOKEN_CLS", {"prompt_stacks": "DECODER"}, "T5ForTokenClassification has no decoder beside"),
        (
            "BART",
            TASK,
            {"prompt_stacks": "BOTH", "prompt_tuning_init": "SAMPLE_VOCAB", "length": 65},
            "is 65 of them here, and BartEncoder can read 64",
        ),
    ],
)
def test_models_that_it_does_not_fit_are_left_alone(family: str, task: str, options: dict, message: str) -> None:
    base = make_model(family, task)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, make_config(task, prompt_depth="DEEP", **options))
    _check_untouched(base, make_model(family, task))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_stacks": "DECODER"}, "only used with prompt_depth='DEEP'"),
        ({"prompt_depth": "DEEP", "prompt_stacks": "ALL"}, "must be one of 'ENCODER', 'DECODER', 'BOTH', got 'ALL'"),
        (
            {"prompt_depth": "DEEP", "prompt_stacks": "BOTH", "shift_positions": True},
            "`shift_positions` has no meaning",
        ),
    ],
)
def test_bad_configs(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(TASK, **options)


def test_decoders_that_can_not_be_reached_are_refused(monkeypatch) -> None:
    base = make_base("BART")
    decoder = base.get_decoder()
    decoder.config._attn_implementation = "paged|sdpa"
    config = make_config(TASK, prompt_depth="DEEP", prompt_stacks="DECODER")
    with pytest.raises(ValueError, match="can't be given to BartDecoder: its attention implementation is 'paged"):
        get_peft_model(base, config)
    decoder.config._attn_implementation = "sdpa"
    for module in decoder.modules():
        if getattr(module, "is_causal", False):
            module.is_causal = False
    with pytest.raises(ValueError, match="to BartDecoder: its self-attention .* can't be told from its cross-att"):
        get_peft_model(base, config)
    decoder.layers[0].self_attn.is_causal = decoder.layers[0].encoder_attn.is_causal = True
    with pytest.raises(ValueError, match="to BartDecoder: .*Choose prompt_stacks='ENCODER'"):
        get_peft_model(base, config)
    monkeypatch.delattr(tf.models.bart.modeling_bart, "ALL_ATTENTION_FUNCTIONS")
    with pytest.raises(ValueError, match="to BartDecoder: its attention does not go through"):
        get_peft_model(base, config)
    _check_untouched(base, make_base("BART"))


@torch.no_grad()
def test_an_implementation_that_does_not_see_it_is_refused() -> None:
    model = make_deep("T5")
    model.get_base_model().get_decoder().set_attn_implementation("eager")
    with pytest.raises(ValueError, match="of this T5Stack was changed to 'eager', which does not see a prompt"):
        model(**text())


# What is compiled in parts reads `grad` of the tensors that it hands on from part to part.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@models
def test_compiled_is_the_same(model_name: str) -> None:
    model, batch = make_deep(model_name), text()
    weights = torch.randn(2, 4, 99)

    def outputs(called: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        output = main_output(called(**batch))
        (output * weights).sum().backward()
        return [output, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = outputs(model)
    torch._dynamo.reset()
    for found, value in zip(outputs(torch.compile(model, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_prompt_on_a_half_precision_base(model_name: str, dtype: torch.dtype) -> None:
    config = make_config(TASK, prompt_depth="DEEP", prompt_stacks="BOTH")
    model = get_peft_model(make_base(model_name).to(dtype), config).eval()
    output = main_output(model(**text()))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in trained)
