# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A backbone's forward is wrapped whole or not at all, and comes back as it was."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState, GradientState
from families import make_model
from peft import PeftModel, get_peft_model
from reference import S, V, embedding_and_backbone, main_output, make_batch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel

from peft_ptuning_ext import PTuningConfig, PTuningLayer
from peft_ptuning_ext.forward import wrap


CELLS = pytest.mark.parametrize(
    ("family", "task"), [("BERT", "SEQ_CLS"), ("Llama", "CAUSAL_LM"), ("GPT-2", "SEQ_CLS")]
)


def adapt(base: torch.nn.Module) -> PeftModel:
    return get_peft_model(base, PTuningConfig(num_virtual_tokens=V)).eval()


def state_of(model: torch.nn.Module) -> list[tuple]:
    """What of a model an adapter may leave behind: classes, attributes, hooks, the attention's name."""
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ] + [model.config._attn_implementation]


@CELLS
@torch.no_grad()
def test_two_models_made_from_one_config(family, task) -> None:
    batch = make_batch(family, task)
    one = make_model(family, task)
    two = type(one)(one.config).eval()
    assert two.config is one.config
    before, plain = state_of(one), main_output(two(**batch))
    first, second = adapt(one), adapt(two)
    routes = first.prompt_route, second.prompt_route
    assert routes[0] == routes[1]
    outputs = main_output(first(**batch)), main_output(second(**batch))
    third = type(one)(one.config).eval()  # made while the others are adapted
    third.load_state_dict(second.unload().state_dict())
    assert torch.equal(main_output(third(**batch)), plain)
    assert first.prompt_route == routes[0]
    assert torch.equal(main_output(first(**batch)), outputs[0])
    second = adapt(two)
    assert not torch.allclose(main_output(second(**batch)), plain)
    assert state_of(first.unload())[:-1] == before[:-1]  # the config is still that of an adapted model, too
    assert second.prompt_route == routes[1]
    second.unload()
    assert two.config._attn_implementation == "sdpa"


@CELLS
@torch.no_grad()
def test_forward_of_a_backbone_below_a_head_is_a_call(family, task) -> None:
    batch = make_batch(family, task)
    model = adapt(make_model(family, task))
    backbone = model.get_base_model().base_model
    expected = backbone(**batch).last_hidden_state
    assert torch.equal(backbone.forward(**batch).last_hidden_state, expected)
    with model.disable_adapter():
        assert not torch.allclose(backbone.forward(**batch).last_hidden_state, expected)


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_unloading_what_fsdp_has_sharded(family) -> None:
    model = adapt(make_model(family, "FEATURE_EXTRACTION"))
    base = model.get_base_model()
    original = type(make_model(family, "FEATURE_EXTRACTION"))
    fully_shard(base, mesh=dist.init_device_mesh("cpu", (1,)))
    assert model.unload() is base
    assert isinstance(base, original)
    assert not hasattr(base, "ptuning")
    assert [c.__name__ for c in type(base).__mro__[:3]] == [
        f"FSDP{original.__name__}",
        "FSDPModule",
        original.__name__,
    ]
    batch = make_batch(family, "FEATURE_EXTRACTION")
    expected = main_output(make_model(family, "FEATURE_EXTRACTION")(**batch))
    torch.testing.assert_close(main_output(base(**batch)), expected, rtol=0, atol=1e-6)


@CELLS
@torch.no_grad()
def test_a_forward_of_the_modules_own_is_called_and_comes_back(family, task) -> None:
    batch = make_batch(family, task)
    base = make_model(family, task)
    _, stack = embedding_and_backbone(base)
    seen = []

    def forward(self, *args, **kwargs):
        seen.append(kwargs)
        return type(self).__mro__[1 if hasattr(self, "ptuning") else 0].forward(self, *args, **kwargs)

    stack.forward = types.MethodType(forward, stack)
    plain = main_output(base(**batch))
    model = adapt(base)
    seen.clear()
    assert not torch.allclose(main_output(model(**batch)), plain)
    assert seen
    model.unload()
    assert stack.forward.__func__ is forward
    assert torch.equal(main_output(base(**batch)), plain)


@pytest.mark.parametrize("family", ["BERT", "Llama"])
@torch.no_grad()
def test_hooks_of_accelerate_come_and_go_before_and_after(family) -> None:
    batch = make_batch(family, "FEATURE_EXTRACTION")
    base = make_model(family, "FEATURE_EXTRACTION")
    plain, before = main_output(base(**batch)), state_of(base)
    add_hook_to_module(base, ModelHook())
    model = adapt(base)
    prompted = main_output(model(**batch))
    assert not torch.allclose(prompted, plain)
    remove_hook_from_module(base)  # puts a `forward` on the instance
    assert torch.equal(main_output(model(**batch)), prompted)
    add_hook_to_module(base, ModelHook())
    assert torch.equal(main_output(model(**batch)), prompted)
    assert torch.equal(main_output(copy.deepcopy(model)(**batch)), prompted)
    assert torch.equal(main_output(model.unload()(**batch)), plain)
    remove_hook_from_module(base)
    vars(base).pop("forward")  # accelerate leaves it
    assert state_of(base) == before


@pytest.mark.parametrize("family", ["BERT", "Llama", "Falcon"])
@torch.no_grad()
def test_hooks_of_others_see_the_users_tokens(family) -> None:
    model, shapes = adapt(make_model(family, "FEATURE_EXTRACTION")), []

    def note(module, args, kwargs, output) -> None:
        shapes.append((kwargs["input_ids"].shape, output[0].shape[:2]))

    model.get_base_model().register_forward_hook(note, with_kwargs=True)
    model(**make_batch(family, "FEATURE_EXTRACTION"))
    assert shapes == [((2, S), (2, S))]


@pytest.mark.parametrize("family", ["BERT", "Llama", "T5"])
def test_an_attachment_that_fails_leaves_nothing(family, monkeypatch) -> None:
    base = make_model(family, "FEATURE_EXTRACTION")
    before = state_of(base)

    def fail(*args, **kwargs) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(wrap, "adapt_attention", fail)
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", fail)
    if family == "BERT":
        monkeypatch.setattr(wrap, "MethodType", fail)
        base.forward = types.MethodType(type(base).forward, base)
        before = state_of(base)
    with pytest.raises(RuntimeError, match="no"):
        adapt(base)
    assert state_of(base) == before
    monkeypatch.undo()
    adapt(base)


def test_a_model_built_from_the_config_of_an_adapted_one() -> None:
    model = adapt(make_model("Llama", "CAUSAL_LM"))
    for config in (model.get_base_model().config, copy.deepcopy(model.get_base_model().config)):
        fresh = AutoModel.from_config(config).eval()
        ids = make_batch("Llama", "CAUSAL_LM")["input_ids"]
        torch.testing.assert_close(main_output(fresh(ids)), main_output(make_like(fresh, "sdpa")(ids)), rtol=0, atol=0)


def make_like(model: torch.nn.Module, attn_implementation: str) -> torch.nn.Module:
    """A model of the same class and weights whose config was never another model's."""
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if not k.startswith("_")})
    same = type(model)._from_config(config, attn_implementation=attn_implementation).eval()
    same.load_state_dict(model.state_dict())
    return same


@pytest.fixture
def _accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # else later tests train in its precision
    GradientState._reset_state()


@pytest.mark.usefixtures("_accelerator_state")
@torch.no_grad()
def test_a_forward_that_is_put_back_is_the_prompted_one() -> None:
    base = make_model("Llama", "CAUSAL_LM")
    batch = make_batch("Llama", "CAUSAL_LM")
    stack = base.model
    original = stack.forward
    stack.forward = lambda *args, **kwargs: original(*args, **kwargs)  # a patch of somebody else's
    model = adapt(base)
    expected = main_output(model(**batch))
    stack.forward = original
    assert torch.equal(main_output(model(**batch)), expected)
    bare = make_model("Llama", "FEATURE_EXTRACTION")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(bare)
    model = adapt(prepared)
    with model.disable_adapter():
        plain = main_output(model(**batch)).float()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert not torch.allclose(main_output(model(**batch)).float(), plain, atol=0.1)


@torch.no_grad()
def test_a_forward_kept_since_before_unloading_is_the_base_models() -> None:
    base = make_model("Llama", "FEATURE_EXTRACTION")
    batch = make_batch("Llama", "FEATURE_EXTRACTION")
    plain = main_output(base(**batch))
    model = adapt(base)
    kept = base.forward
    assert not torch.allclose(main_output(kept(**batch)), plain)
    model.unload()
    assert torch.equal(main_output(kept(**batch)), plain)


@torch.no_grad()
def test_a_forward_of_the_modules_own_may_call_that_of_its_class() -> None:
    base = make_model("Llama", "CAUSAL_LM")
    batch = make_batch("Llama", "CAUSAL_LM")
    base.model.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), base.model)
    models = []
    for each in (base, make_model("Llama", "CAUSAL_LM")):
        torch.manual_seed(0)  # both prompts are the same
        models.append(adapt(each))
    assert torch.equal(*(main_output(model(**batch)) for model in models))


@pytest.mark.parametrize("is_enabled_before", [False, True])
def test_unloading_leaves_inputs_with_gradients(is_enabled_before) -> None:
    """PEFT enables them where gradient checkpointing is on, by a hook on what is the input embedding then."""
    base = make_model("Llama", "CAUSAL_LM").requires_grad_(False)
    if is_enabled_before:
        base.enable_input_require_grads()
    model = adapt(base)
    model.enable_input_require_grads()
    base = copy.deepcopy(model.unload())
    embedding, ids = base.get_input_embeddings(), torch.tensor([[7]])
    assert embedding(ids).requires_grad
    if not is_enabled_before:  # else transformers has lost the first hook
        base.disable_input_require_grads()
        assert not embedding(ids).requires_grad


def test_unloading_after_the_embedding_was_replaced() -> None:
    model = adapt(make_model("Llama", "CAUSAL_LM"))
    base = model.get_base_model()
    base.set_input_embeddings(torch.nn.Embedding(99, 32))
    batch = make_batch("Llama", "CAUSAL_LM")
    with pytest.raises(ValueError, match="was replaced after"):
        model(**batch)
    assert main_output(model.unload()(**batch)).isfinite().all()
    assert not hasattr(base.model, "ptuning")


@pytest.mark.parametrize("family", ["BERT", "Llama"])
def test_an_interrupt_while_the_prompt_starts_leaves_nothing(family, monkeypatch) -> None:
    base = make_model(family, "FEATURE_EXTRACTION")
    before = state_of(base)

    def interrupt(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PTuningLayer, "update_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapt(base)
    assert state_of(base) == before
