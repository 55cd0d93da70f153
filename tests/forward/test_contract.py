# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The contract, architecture × task: hidden = concatenated, padded = unpadded, disabled = base, and so on."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from families import CELLS, FAMILIES, make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from reference import (
    POOLED,
    S,
    V,
    concatenated,
    embedding_and_backbone,
    main_output,
    make_batch,
    make_labels,
    textbook_loss,
    unmasked,
)
from releases import CACHE, CHECKPOINTING
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


cells = pytest.mark.parametrize(("family", "task"), CELLS, ids=lambda value: value.replace(" ", "-"))


depths = pytest.mark.parametrize("depth", ["INPUT", "DEEP"])

# Encoders whose base model does not mind padding on the left either, as far as it does not pool a padded position.
LEFT_PADDED = frozenset({"RoBERTa", "XLM-R", "MPNet", "ModernBERT", "DeBERTa-v2"})


@cells
@torch.no_grad()
def test_hidden_equals_concatenated(family: str, task: str) -> None:
    model = make_adapted(family, task)
    batch = make_batch(family, task)
    expected = concatenated(make_model(family, task), task, model.prompt_embeddings().detach(), batch)
    routes = {"concatenated": 0.0}
    if model.prompt_route == "shared":
        routes = {"shared": 1e-5} | routes  # matrices of another shape are summed in another order
    for route, tolerance in routes.items():
        if model.prompt_route != route:
            _, stack = embedding_and_backbone(model.get_base_model())
            stack.set_attn_implementation("sdpa" if stack._supports_sdpa else "eager")
        assert model.prompt_route.startswith(route)
        output = main_output(model(**batch))
        assert output.shape == expected.shape
        torch.testing.assert_close(
            unmasked(output, batch["attention_mask"]),
            unmasked(expected, batch["attention_mask"]),
            rtol=0,
            atol=tolerance,
        )


@cells
def test_prompt_gradient_equals_that_of_concatenation(family: str, task: str) -> None:
    model = make_adapted(family, task)
    batch = make_batch(family, task)
    prompt = model.prompt_embeddings().detach().clone().requires_grad_()
    expected = unmasked(concatenated(make_model(family, task), task, prompt, batch), batch["attention_mask"])
    weights = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), prompt)
    output = unmasked(main_output(model(**batch)), batch["attention_mask"])
    (output * weights).sum().backward()
    (gradient,) = (p.grad for n, p in model.named_parameters() if "ptuning_" in n)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-5, atol=1e-5 * expected_gradient.abs().max().item()
    )


@cells
@depths
@torch.no_grad()
def test_padding_changes_nothing(family: str, task: str, depth: str) -> None:
    model = make_adapted(family, task, prompt_depth=depth)
    alone = make_batch(family, task, lengths=(4,))
    on_the_left = FAMILIES[family].kind == "decoder" or (family in LEFT_PADDED and task not in POOLED)
    for pad_left in (False, True) if on_the_left else (False,):
        batch = make_batch(family, task, lengths=(4, S + 3), pad_left=pad_left)
        alone |= {key: value[:1] for key, value in batch.items() if key.startswith("decoder")}
        expected = main_output(model(**alone))[0]
        output = main_output(model(**batch))[0]
        if output.shape[0] == S + 3:
            output = output[batch["attention_mask"][0].bool()]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@cells
@depths
@torch.no_grad()
def test_disabled_is_the_base_and_enabled_is_not(family: str, task: str, depth: str) -> None:
    model = make_adapted(family, task, prompt_depth=depth)
    batch = make_batch(family, task)
    expected = main_output(make_model(family, task)(**batch))
    enabled = main_output(model(**batch))
    with model.disable_adapter():
        assert torch.equal(main_output(model(**batch)), expected)
    assert not torch.allclose(enabled, expected)
    assert torch.equal(main_output(model(**batch)), enabled)


@cells
@torch.no_grad()
def test_outputs_have_the_user_length(family: str, task: str) -> None:
    model = make_adapted(family, task, sizes={"attn_implementation": "eager"})
    base = make_model(family, task, attn_implementation="eager")
    batch = make_batch(family, task)
    arguments = {"output_hidden_states": True, "output_attentions": True}
    expected, outputs = base(**batch, **arguments), model(**batch, **arguments)
    assert outputs.keys() == expected.keys()
    for key in expected:
        for value, base_value in zip(_tensors(outputs[key]), _tensors(expected[key]), strict=True):
            extra = [(i, a - b) for i, (a, b) in enumerate(zip(value.shape, base_value.shape, strict=True)) if a != b]
            if key in ("attentions", "encoder_attentions"):
                rows = [] if key == "attentions" else [(2, V)]
                assert extra == ([*rows, (3, V)] if value.dim() == 4 else [])
            elif key in ("cross_attentions", "encoder_last_hidden_state", "encoder_hidden_states"):
                assert extra == [(3 if key == "cross_attentions" else 1, V)]  # what the decoder attends to
            elif key != CACHE:
                assert not extra, key


@cells
@torch.no_grad()
def test_other_ways_to_call(family: str, task: str) -> None:
    model = make_adapted(family, task)
    batch = make_batch(family, task, lengths=(S, S))  # without ids, a head over decoders can't see padding
    expected = model(**batch, output_hidden_states=True)

    as_tuple = model(**batch, output_hidden_states=True, return_dict=False)
    for value, expected_value in zip(as_tuple, expected.to_tuple(), strict=True):
        for a, b in zip(_tensors(value), _tensors(expected_value), strict=True):
            assert torch.equal(a, b)

    positional = model.get_base_model()(batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"})
    assert torch.equal(main_output(positional), main_output(expected))

    if FAMILIES[family].kind == "encoder-decoder" and task in ("SEQ_CLS", "QUESTION_ANS"):
        return  # their decoder is fed with the token ids
    embedding, _ = embedding_and_backbone(model.get_base_model())
    embeds = {key: value for key, value in batch.items() if key != "input_ids"}
    embeds["inputs_embeds"] = embedding(batch["input_ids"])
    assert torch.equal(main_output(model(**embeds)), main_output(expected))


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "MPNet", "ModernBERT", "GPT-2", "OPT", "Llama", "Gemma 3"])
@torch.no_grad()
def test_positions_that_are_passed_are_the_users(family: str) -> None:
    model = make_adapted(family, "FEATURE_EXTRACTION")
    batch = make_batch(family, "FEATURE_EXTRACTION", lengths=(S, S))
    expected = main_output(model(**batch))
    first = 2 if family in ("RoBERTa", "MPNet") else 0  # where the base model itself begins
    positions = torch.arange(first, first + S)
    for position_ids in (positions.expand(2, -1), positions[None]):
        torch.testing.assert_close(main_output(model(**batch, position_ids=position_ids)), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(main_output(model(**batch, position_ids=positions.expand(2, -1) * 2)), expected)


@pytest.mark.parametrize("family", ["BERT", "ELECTRA", "ALBERT"])
@torch.no_grad()
def test_token_types_are_the_users_and_zero_for_the_prompt(family: str) -> None:
    model, base = make_adapted(family, "FEATURE_EXTRACTION"), make_model(family, "FEATURE_EXTRACTION")
    batch = make_batch(family, "FEATURE_EXTRACTION")
    types = (torch.arange(S) > 3).long().expand(2, -1)
    embeds = [model.prompt_embeddings().expand(2, -1, -1), embedding_and_backbone(base)[0](batch["input_ids"])]
    expected = base(
        inputs_embeds=torch.cat(embeds, dim=1),
        attention_mask=torch.cat([torch.ones(2, V, dtype=torch.long), batch["attention_mask"]], dim=1),
        token_type_ids=torch.cat([torch.zeros(2, V, dtype=torch.long), types], dim=1),
    ).last_hidden_state[:, V:]
    assert torch.equal(model(**batch, token_type_ids=types).last_hidden_state, expected)
    assert not torch.allclose(model(**batch).last_hidden_state, expected)


@cells
def test_a_step_moves_the_prompt_and_the_head_only(family: str, task: str) -> None:
    model = make_adapted(family, task)
    batch = make_batch(family, task)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trainable if ".modules_to_save." in name}
    assert trainable - heads == {n for n in before if ".ptuning_encoders." in n}
    assert bool(heads) == any(".modules_to_save." in name for name in before)

    outputs = model(**batch, **make_labels(task, batch))
    # The square because no bias of a softmax over positions gets a gradient from its loss.
    ((outputs.loss if make_labels(task, batch) else 0.0) + main_output(outputs).square().mean()).backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in trainable:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None, name


@pytest.mark.parametrize(("family", "task"), [cell for cell in CELLS if cell[1] != "FEATURE_EXTRACTION"])
@torch.no_grad()
def test_labels_mean_what_they_mean_on_the_base(family: str, task: str) -> None:
    batch = make_batch(family, task)
    labels = make_labels(task, batch)
    for model in (make_model(family, task), make_adapted(family, task)):
        outputs = model(**batch, **labels)
        torch.testing.assert_close(outputs.loss, textbook_loss(task, outputs, labels), rtol=1e-5, atol=1e-6)


@cells
def test_gradient_checkpointing_changes_nothing(family: str, task: str) -> None:
    model = make_adapted(family, task)
    base = model.get_base_model()
    batch = make_batch(family, task)
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        pytest.skip("the base model has no gradient checkpointing")
    for module in base.modules():
        if isinstance(module, PreTrainedModel):  # a model in training mode would do this by itself
            module.config.use_cache = False
    calls = []
    for layer in layers:
        # Training mode turns checkpointing on; of the layers only, so that there is no dropout below them.
        layer.training = True
        for rate in ("dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(layer, rate, None), float):
                setattr(layer, rate, 0.0)
        next(layer.children()).register_forward_hook(lambda *_: calls.append(1))

    def gradient() -> tuple[torch.Tensor, int]:
        model.zero_grad()
        calls.clear()
        main_output(model(**batch)).square().sum().backward()
        return next(p.grad.clone() for n, p in model.named_parameters() if "ptuning_" in n), len(calls)

    expected, once = gradient()
    route = model.prompt_route
    assert route != "shared" or once == len(layers)  # the prompt has no pass of its own
    for use_reentrant in (False, True):
        getattr(base, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
        assert model.prompt_route == route
        found, recomputed = gradient()
        assert recomputed == 2 * once
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@cells
@torch.no_grad()
def test_saved_and_reloaded_is_the_same(family: str, task: str, tmp_path) -> None:
    model = make_adapted(family, task, encoder_reparameterization_type="MLP", encoder_hidden_size=8)
    batch = make_batch(family, task)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    expected = main_output(model(**batch))
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    named = {n.replace(".default", "").replace(".modules_to_save", "") for n in _trainable(model)}
    assert {key for key in saved if not key.endswith("offset")} == named

    reloaded = PeftModel.from_pretrained(make_model(family, task), tmp_path, adapter_name="other").eval()
    torch.testing.assert_close(main_output(reloaded(**batch)), expected, rtol=0, atol=1e-6)
    assert not _trainable(reloaded)
    resumed = PeftModel.from_pretrained(make_model(family, task), tmp_path, is_trainable=True).eval()
    assert _trainable(resumed).keys() == _trainable(model).keys()
    for (name, value), other in zip(_trainable(resumed).items(), _trainable(model).values(), strict=True):
        assert torch.equal(value, other), name
    assert torch.equal(resumed.prompt_embeddings(), model.prompt_embeddings())


@cells
@torch.no_grad()
def test_unload_gives_back_the_base(family: str, task: str) -> None:
    base = make_model(family, task)
    untouched = make_model(family, task)
    model = get_peft_model(base, make_config(task))
    batch = make_batch(family, task)
    model(**batch)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(1.0)
    returned = model.unload()
    assert returned is base
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
    assert vars(base).keys() == vars(untouched).keys()
    for module in base.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    for (name, a), (_, b) in zip(base.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name
    assert torch.equal(main_output(base.eval()(**batch)), main_output(untouched(**batch)))


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []
