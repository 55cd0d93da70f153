# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts in every layer: the contract of prompts at the input, against keys and values put in front by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
from by_hand import OWN_ATTENTION, deep_by_hand
from families import CELLS, ENCODERS, FAMILIES, make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from reference import S, V, main_output, make_batch, make_labels, textbook_loss, unmasked
from releases import CACHE, CHECKPOINTING
from tiny_tokenizers import make_tokenizer
from transformers import AutoModelForCausalLM, GPTNeoConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


DEEP = {"prompt_depth": "DEEP"}
cells = pytest.mark.parametrize(("family", "task"), CELLS, ids=lambda value: value.replace(" ", "-"))
# One task of each family.
families = pytest.mark.parametrize(("family", "task"), {family: (family, task) for family, task in CELLS}.values())

# Families that take the prompt through a cache, which stands in the way of some things.
CACHED = ("Bloom", "Falcon")


def make_deep(family: str, task: str, **options) -> PeftModel:
    return make_adapted(family, task, **DEEP | options)


def states_of(model: PeftModel) -> dict:
    return {layer: (k.detach(), v.detach()) for layer, (k, v) in model.prompt_key_values().items()}


@cells
@pytest.mark.parametrize("shift", [False, True], ids=["own-positions", "shifted"])
@torch.no_grad()
def test_outputs_are_those_of_keys_and_values_in_front(family: str, task: str, shift: bool) -> None:
    if shift and FAMILIES[family].kind != "decoder":
        pytest.skip("by hand, positions are shifted for decoders only")
    model = make_deep(family, task, shift_positions=shift)
    batch = make_batch(family, task)
    expected = deep_by_hand(family, make_model(family, task), states_of(model), batch, shift)
    output, mask = main_output(model(**batch)), batch["attention_mask"]
    torch.testing.assert_close(unmasked(output, mask), unmasked(expected, mask), rtol=0, atol=2e-5)


@families
def test_gradients_are_those_of_keys_and_values_in_front(family: str, task: str) -> None:
    model = make_deep(family, task)
    batch = make_batch(family, task)
    states = {layer: (k.requires_grad_(), v.requires_grad_()) for layer, (k, v) in states_of(model).items()}
    expected = unmasked(deep_by_hand(family, make_model(family, task), states, batch), batch["attention_mask"])
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (unmasked(main_output(model(**batch)), batch["attention_mask"]) * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if "ptuning_" in n}
    assert len(found) == 2 * len(states)
    for layer, pair in states.items():
        for name, state in zip(("keys", "values"), pair, strict=True):
            (gradient,) = (g for n, g in found.items() if n.endswith(f"{name}.{layer}"))
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, state.grad, rtol=1e-4, atol=1e-5 * state.grad.abs().max().item())


def test_packed_rows_are_refused_where_a_cache_holds_the_prompt() -> None:
    model, ids = make_deep("Falcon", "CAUSAL_LM"), torch.arange(5, 13)[None]
    with pytest.raises(ValueError, match="FalconModel got several texts packed into one row"):
        model(input_ids=ids, position_ids=torch.arange(4).repeat(2)[None])


@families
@torch.no_grad()
def test_outputs_have_the_length_of_the_text(family: str, task: str) -> None:
    model = make_deep(family, task, sizes={"attn_implementation": "eager"})
    base = make_model(family, task, attn_implementation="eager")
    batch = make_batch(family, task)
    arguments = {"output_hidden_states": True, "output_attentions": True}
    expected, outputs = base(**batch, **arguments), model(**batch, **arguments)
    assert outputs.keys() == expected.keys()
    for key in expected.keys() - {CACHE}:
        for value, base_value in zip(_tensors(outputs[key]), _tensors(expected[key]), strict=True):
            extra = [(i, a - b) for i, (a, b) in enumerate(zip(value.shape, base_value.shape, strict=True)) if a != b]
            is_map = key in ("attentions", "encoder_attentions") and value.dim() == 4
            assert extra == ([(3, V)] if is_map else []), key


@families
@torch.no_grad()
def test_other_ways_to_call(family: str, task: str) -> None:
    model = make_deep(family, task)
    batch = make_batch(family, task, lengths=(S, S))
    expected = main_output(model(**batch))
    as_tuple = model(**batch, return_dict=False)
    assert any(torch.equal(value, expected) for value in _tensors(as_tuple))
    without_mask = {key: value for key, value in batch.items() if key != "attention_mask"}
    torch.testing.assert_close(main_output(model(**without_mask)), expected, rtol=0, atol=1e-5)


@cells
def test_a_step_moves_the_prompt_and_the_head_only(family: str, task: str) -> None:
    model = make_deep(family, task)
    batch = make_batch(family, task)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = _trainable(model).keys()
    assert {name for name in trainable if ".modules_to_save." not in name} == {n for n in before if ".ptuning_" in n}
    labels = make_labels(task, batch)
    outputs = model(**batch, **labels)
    if labels:
        torch.testing.assert_close(outputs.loss, textbook_loss(task, outputs, labels), rtol=1e-5, atol=1e-6)
    ((outputs.loss if labels else 0.0) + main_output(outputs).square().mean()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name


@families
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family: str, task: str, use_reentrant: bool) -> None:
    model = make_deep(family, task)
    base, batch = model.get_base_model(), make_batch(family, task)
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        pytest.skip("the base model has no gradient checkpointing")
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
    for layer in layers:
        layer.training = True
        for rate in ("dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(layer, rate, None), float):
                setattr(layer, rate, 0.0)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        main_output(model(**batch)).square().sum().backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "ptuning_" in n]

    expected = gradients()
    getattr(base, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    if family in (*CACHED, *OWN_ATTENTION):
        with pytest.raises(ValueError, match="gradient checkpointing"):
            model(**batch)
        return
    for found, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_reentrant_checkpointing_leaves_positions_alone_that_are_counted_from_ids() -> None:
    model, batch = make_deep("RoBERTa", "SEQ_CLS"), make_batch("RoBERTa", "SEQ_CLS", pad_left=True)
    expected = main_output(model(**batch))
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
    getattr(model.get_base_model(), f"{CHECKPOINTING}_enable")({"use_reentrant": True})
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=1e-6)


@families
@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
@torch.no_grad()
def test_saved_and_reloaded_is_the_same(family: str, task: str, encoder: str, tmp_path) -> None:
    model = make_deep(family, task, encoder_reparameterization_type=encoder, encoder_dropout=0.1)
    batch = make_batch(family, task)
    for parameter in _trainable(model).values():
        parameter.add_(0.1)
    expected = main_output(model(**batch))
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    named = {n.replace(".default", "").replace(".modules_to_save", "") for n in _trainable(model)}
    constants = {key for key in saved if ".keys." in key or ".values." in key} if encoder == "MLP" else set()
    assert saved.keys() - constants == named

    reloaded = PeftModel.from_pretrained(make_model(family, task), tmp_path, adapter_name="other").eval()
    torch.testing.assert_close(main_output(reloaded(**batch)), expected, rtol=0, atol=1e-6)
    assert not _trainable(reloaded)
    resumed = PeftModel.from_pretrained(make_model(family, task), tmp_path, is_trainable=True).eval()
    assert _trainable(resumed).keys() == _trainable(model).keys()
    for (name, value), other in zip(_trainable(resumed).items(), _trainable(model).values(), strict=True):
        assert torch.equal(value, other), name


@families
@torch.no_grad()
def test_unloading_gives_back_the_base(family: str, task: str) -> None:
    base, untouched, batch = make_model(family, task), make_model(family, task), make_batch(family, task)
    model = get_peft_model(base, make_config(task, **DEEP))
    model(**batch)
    assert model.unload() is base
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
    for (name, module), other in zip(base.named_modules(), untouched.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys(), name
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
    assert {m.config._attn_implementation for m in base.modules() if isinstance(m, PreTrainedModel)} == {
        m.config._attn_implementation for m in untouched.modules() if isinstance(m, PreTrainedModel)
    }
    assert torch.equal(main_output(base.eval()(**batch)), main_output(untouched(**batch)))


@families
@torch.no_grad()
def test_copies_and_pickles_are_independent(family: str, task: str) -> None:
    model, batch = make_deep(family, task), make_batch(family, task)
    expected = main_output(model(**batch))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in _trainable(model).values():
            parameter.add_(0.5)
        assert torch.equal(main_output(twin(**batch)), expected)
        for parameter in _trainable(model).values():
            parameter.sub_(0.5)
        for parameter in _trainable(twin).values():
            parameter.add_(0.5)
        assert not torch.allclose(main_output(twin(**batch)), expected)


@pytest.mark.parametrize(("family", "task"), [("BERT", "SEQ_CLS"), ("Llama", "CAUSAL_LM"), ("MPNet", "TOKEN_CLS")])
@torch.no_grad()
def test_adapters_of_both_depths_on_one_model(family: str, task: str) -> None:
    batch = make_batch(family, task)
    model = make_adapted(family, task, adapter_name="input")
    of_input = main_output(model(**batch))
    model.add_adapter("deep", make_config(task, **DEEP))
    assert torch.equal(main_output(model.eval()(**batch)), of_input)
    model.set_adapter("deep")
    assert model.base_model.prompt_route == "deep"
    of_deep = main_output(model(**batch))
    assert not torch.allclose(of_deep, of_input)
    model.set_adapter("input")
    assert torch.equal(main_output(model(**batch)), of_input)
    model.set_adapter("deep")
    model.delete_adapter("input")
    assert torch.equal(main_output(model(**batch)), of_deep)


@pytest.mark.parametrize("family", [family for family in FAMILIES if (family, "CAUSAL_LM") in CELLS])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "repetition_penalty": 1.3}, {"use_cache": False}],
    ids=["greedy", "beams", "sampled", "without-cache"],
)
@torch.no_grad()
def test_generated_tokens_do_not_depend_on_padding_or_the_cache(family: str, options: dict) -> None:
    model = make_deep(family, "CAUSAL_LM", shift_positions=family == "GPT-2")
    batch = make_batch(family, "CAUSAL_LM", (S - 2, S), pad_left=True)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0} | options
    torch.manual_seed(0)
    tokens = model.generate(**batch, **arguments)
    torch.manual_seed(0)
    if options.get("do_sample"):
        assert torch.equal(model.generate(**batch, **arguments, use_cache=False), tokens)
        return
    alone = {key: value[:1, 2:] for key, value in batch.items()}
    assert torch.equal(model.generate(**alone, **arguments)[0], tokens[0, 2:])
    if not options:
        ids = alone["input_ids"]
        for _ in range(5):
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            shift = family == "GPT-2"
            logits = deep_by_hand(family, make_model(family, "CAUSAL_LM"), states_of(model), text, shift)
            logits[:, -1, 2] = -1e9  # `min_new_tokens` lets no text end
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(ids[0], tokens[0, 2:])


@pytest.mark.parametrize("family", ["Llama", "Gemma 3", "GPT-2"])
@pytest.mark.parametrize("cache", ["static", "quantized"])
@torch.no_grad()
def test_other_caches(family: str, cache: str) -> None:
    if cache == "quantized":
        pytest.importorskip("optimum.quanto")
    model = make_deep(family, "CAUSAL_LM")
    batch = make_batch(family, "CAUSAL_LM", (S - 2, S), pad_left=True)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "disable_compile": True}
    expected = model.generate(**batch, **arguments)
    if cache == "quantized":
        arguments["cache_config"] = {"backend": "quanto", "nbits": 4, "residual_length": 64}
    assert torch.equal(model.generate(**batch, **arguments, cache_implementation=cache), expected)


@pytest.mark.parametrize("family", CACHED)
def test_a_static_cache_has_no_room(family: str) -> None:
    model, batch = make_deep(family, "CAUSAL_LM"), make_batch(family, "CAUSAL_LM")
    with pytest.raises(ValueError, match="static cache, which has no room for a prompt in every layer"):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("family", ["T5", "BART"])
@torch.no_grad()
def test_encoder_decoders_generate(family: str) -> None:
    model = make_deep(family, "SEQ_2_SEQ_LM")
    batch = make_batch(family, "FEATURE_EXTRACTION")
    del batch["decoder_input_ids"]
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5}
    tokens = model.generate(**batch, **arguments)
    assert torch.equal(model.generate(**batch, **arguments, use_cache=False), tokens)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**batch, **arguments), tokens)


@torch.no_grad()
def test_what_is_no_cache_is_not_left_out() -> None:
    model, states = make_deep("Bloom", "CAUSAL_LM"), torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="BloomModel got a tuple as .* Pass a cache of transformers"):
        model(input_ids=torch.tensor([[7]]), **{CACHE: ((states, states),) * 2})


@pytest.mark.parametrize("family", ["BERT", "ALBERT", "DistilBERT", "ModernBERT", "Llama", "Gemma 2", "T5"])
def test_compiled_is_the_same(family: str) -> None:
    task = dict(CELLS)[family]
    model, batch = make_deep(family, task), make_batch(family, task)
    expected = main_output(model(**batch))
    expected.square().sum().backward()
    gradients = [p.grad.clone() for n, p in model.named_parameters() if "ptuning_" in n]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    output = main_output(compiled(**batch))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    output.square().sum().backward()
    for gradient, (_, found) in zip(
        gradients, ((n, p.grad) for n, p in model.named_parameters() if "ptuning_" in n), strict=True
    ):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of Bloom's own GELU
@pytest.mark.parametrize("family", ["Bloom", "Falcon", "Llama"])
@torch.no_grad()
def test_compiled_with_padding_on_the_left(family: str) -> None:
    """Where a cache holds the prompt, the mask's columns of the prompt are in front of the padding."""
    model, batch = make_deep(family, "CAUSAL_LM"), make_batch(family, "CAUSAL_LM", pad_left=True)
    expected = model(**batch).logits
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(**batch).logits
    mask = batch["attention_mask"]
    torch.testing.assert_close(unmasked(found, mask), unmasked(expected, mask), rtol=0, atol=1e-5)


def test_padding_on_the_left_is_refused_compiled_too() -> None:
    config = GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), make_config("CAUSAL_LM", **DEEP)).eval()
    torch._dynamo.reset()
    for each in (model, torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match="measures distance in columns.*Pad on the right"):
            each(**make_batch("GPT-2", "CAUSAL_LM", pad_left=True))


@pytest.mark.parametrize(("family", "task"), [("BERT", "SEQ_CLS"), ("Llama", "CAUSAL_LM")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_prompt_on_a_half_precision_base(family: str, task: str, dtype: torch.dtype) -> None:
    model = get_peft_model(make_model(family, task).to(dtype), make_config(task, **DEEP)).eval()
    assert {p.dtype for n, p in model.named_parameters() if "ptuning_" in n} == {torch.float32}
    assert {t.dtype for pair in model.prompt_key_values().values() for t in pair} == {dtype}
    output = main_output(model(**make_batch(family, task)))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for n, p in model.named_parameters() if "ptuning_" in n)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 3", "Phi-3", "ModernBERT"])
@torch.no_grad()
def test_a_start_at_tokens_is_the_text_in_front_where_positions_are_rotations(family: str, tmp_path) -> None:
    task = "FEATURE_EXTRACTION"
    tokenizer = make_tokenizer("BERT")
    words = " ".join(tokenizer.convert_ids_to_tokens(range(20, 20 + V)))
    model = make_deep(
        family, task, prompt_tuning_init="TEXT", prompt_tuning_init_text=words, tokenizer_name_or_path=tokenizer
    )
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    batch = make_batch(family, task)
    both = torch.cat([torch.tensor(ids).expand(2, -1), batch["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(2, len(ids), dtype=torch.long), batch["attention_mask"]], dim=1)
    expected = make_model(family, task)(input_ids=both, attention_mask=mask).last_hidden_state[:, len(ids) :]
    output = model(**batch).last_hidden_state
    is_equal = torch.allclose(
        unmasked(output, batch["attention_mask"]), unmasked(expected, batch["attention_mask"]), atol=1e-4
    )
    assert is_equal == (family not in ENCODERS)  # an encoder's prompt would have to see the text


@pytest.mark.parametrize("init", ["RANDOM", "ZERO_VALUES", "SAMPLE_VOCAB"])
@pytest.mark.parametrize("family", ["BERT", "Llama", "Bloom", "MPNet"])
def test_where_it_starts(family: str, init: str) -> None:
    model = make_deep(family, "FEATURE_EXTRACTION", length=400, prompt_tuning_init=init, sizes=_long(family))
    own = make_deep(family, "FEATURE_EXTRACTION", length=400, prompt_tuning_init="SAMPLE_VOCAB", sizes=_long(family))
    for layer, pair in states_of(model).items():
        for kind, state, of_tokens in zip(("key", "value"), pair, states_of(own)[layer], strict=True):
            if init == "ZERO_VALUES" and kind == "value":
                assert not state.any()
                continue
            assert state.std(1).mean() == pytest.approx(of_tokens.std(1).mean(), rel=0.25)
            assert (state.mean(1) - of_tokens.mean(1)).abs().max() < 1.5 * of_tokens.std(1).max()


def _long(family: str) -> dict:
    return {} if family == "Bloom" else {"max_position_embeddings": 512}


def test_dropout_acts_on_the_keys_and_values_in_training_only() -> None:
    model, batch = (
        make_deep("BERT", "FEATURE_EXTRACTION", encoder_dropout=0.5),
        make_batch("BERT", "FEATURE_EXTRACTION"),
    )
    with torch.no_grad():
        assert torch.equal(main_output(model(**batch)), main_output(model(**batch)))
        encoder = next(m for n, m in model.named_modules() if n.endswith("ptuning_encoders.default"))
        plain = dict(encoder())
        encoder.train()
        dropped = dict(encoder())
        assert not torch.equal(main_output(model(**batch)), main_output(model(**batch)))
    zeros = torch.cat([(a[0] == 0).flatten() for a in dropped.values()]).float().mean()
    assert 0.3 < zeros < 0.7
    key, kept = plain[0][0], dropped[0][0] != 0
    torch.testing.assert_close(dropped[0][0][kept], 2 * key[kept])


@torch.no_grad()
def test_keys_and_values_of_a_prompt_at_the_input() -> None:
    model, batch = make_adapted("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM")
    found = model.prompt_key_values()
    assert {tuple(t.shape) for pair in found.values() for t in pair} == {(2, V, 8)}
    expected = deep_by_hand("Llama", make_model("Llama", "CAUSAL_LM"), found, batch, shift=True)
    torch.testing.assert_close(
        unmasked(main_output(model(**batch)), batch["attention_mask"]),
        unmasked(expected, batch["attention_mask"]),
        rtol=0,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="In BertModel, the keys and values of a prompt at .* not causal"):
        make_adapted("BERT", "SEQ_CLS").prompt_key_values()
    with pytest.raises(ValueError, match="is deep: it consists of keys and values"):
        make_deep("BERT", "SEQ_CLS").prompt_embeddings()


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


@pytest.mark.parametrize("family", ["RoBERTa", "XLM-R", "GPT-2"])
def test_reentrant_checkpointing_keeps_the_positions_of_the_ids(family: str) -> None:
    model, batch = make_deep(family, "FEATURE_EXTRACTION"), make_batch(family, "FEATURE_EXTRACTION")
    del batch["attention_mask"]  # padding is then known by its id only
    expected = main_output(model(**batch)).detach()
    getattr(model.get_base_model(), f"{CHECKPOINTING}_enable")({"use_reentrant": True})
    for module in model.get_base_model().modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
    for module in model.modules():
        for rate in ("dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=1e-5)
