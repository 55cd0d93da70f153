# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing, accumulation and torch.compile through the stock Trainer change no number."""

from __future__ import annotations

import shutil

import pytest
import torch
from accelerate.utils import compile_regions, is_compiled_module
from learnable import TASK_OF, add_prompt, losses, make_base, make_learner, trainable
from peft import LoraConfig, PeftModel, get_peft_model
from reference import main_output, make_batch
from releases import CHECKPOINTING
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


# Plain gradient descent: Adam makes steps of one size even of gradients that are rounding errors.
DESCENT = {"optim": "sgd", "learning_rate": 0.1}

families = pytest.mark.parametrize("family", list(TASK_OF))
depths = pytest.mark.parametrize("depth", ["INPUT", "DEEP"])


def make_prompted(family: str, depth: str = "INPUT") -> PeftModel:
    return add_prompt(make_base(family), TASK_OF[family], prompt_depth=depth)


def trained(*args, **kwargs) -> Trainer:
    """A Trainer that has trained for 4 steps."""
    trainer = make_learner(*args, **DESCENT, **kwargs)
    before = trainable(trainer.model)
    trainer.train()
    assert len(losses(trainer)) == 4
    for name, value in trainable(trainer.model).items():
        # Of a deep prompt, keys move less than what they are compared with.
        assert (value - before[name]).abs().max() > (1e-6 if "ptuning_" in name else 1e-3), name
    return trainer


def check_equal(found: Trainer, expected: Trainer, atol: float) -> None:
    """The same loss at every step and the same parameters at the end."""
    assert losses(found) == pytest.approx(losses(expected), rel=0, abs=atol)
    wanted = trainable(expected.model)
    for name, value in trainable(found.model).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=atol)


@pytest.mark.parametrize("use_reentrant", [False, True])
@families
@depths
def test_gradient_checkpointing(depth, family, use_reentrant, tmp_path) -> None:
    expected = trained(make_prompted(family, depth), tmp_path)
    model, passes = make_prompted(family, depth), []
    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    next(layer.children()).register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    kwargs = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}}
    check_equal(trained(model, tmp_path, **kwargs), expected, 1e-6)
    assert len(passes) == 4 * 2  # in each of the 4 steps; only reentrant ones begin without gradients
    assert passes.count(False) == (4 if use_reentrant else 0)


@families
@depths
def test_accumulated_batches_are_one_large_batch(depth, family, tmp_path) -> None:
    expected = trained(make_prompted(family, depth), tmp_path)
    model = make_prompted(family, depth)
    if family == "BERT":
        # transformers' classifiers take the number of labels from the Trainer and ignore it, prompt or no prompt.
        model.get_base_model().accepts_loss_kwargs = False
    kwargs = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    check_equal(trained(model, tmp_path, **kwargs), expected, 1e-6)


@families
def test_the_trainer_sees_the_base_models_loss(family, tmp_path) -> None:
    """Whether it hands the number of labels to the model, and which inputs are labels, is read off the base."""
    lora = get_peft_model(make_base(family), LoraConfig(task_type=TASK_OF[family]))
    prompted, other = (make_learner(model, tmp_path) for model in (make_prompted(family), lora))
    assert prompted.model_accepts_loss_kwargs == other.model_accepts_loss_kwargs
    assert prompted.label_names == other.label_names
    assert prompted.can_return_loss == other.can_return_loss


class CountGraphs(TrainerCallback):
    """How many graphs have been compiled after each step."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
@pytest.mark.parametrize(("family", "backend"), [("BERT", "aot_eager"), ("Llama", "aot_eager"), ("Llama", "inductor")])
@depths
def test_compiled_training(depth, family, backend, tmp_path, monkeypatch) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    expected = trained(make_prompted(family, depth), tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # to be put back: TrainingArguments sets it
    torch._dynamo.reset()
    counters.clear()
    count = CountGraphs()
    compiled = trained(
        make_prompted(family, depth), tmp_path, (count,), torch_compile=True, torch_compile_backend=backend
    )
    check_equal(compiled, expected, 1e-5)
    assert len(count.graphs) == 4
    assert count.graphs[0] > 0
    assert count.graphs[1] == count.graphs[-1]  # nothing is compiled again after the second step


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the compiler, too
@families
@depths
def test_modules_compiled_one_by_one(depth, family, tmp_path) -> None:
    """Accelerate's regional compilation puts the input embedding, and the prompt with it, into a compiled module."""
    model, batch = make_prompted(family, depth).eval(), make_batch(family, TASK_OF[family])
    torch._dynamo.reset()
    compiled = compile_regions(model, backend="eager")
    assert any(map(is_compiled_module, compiled.modules()))
    outputs, gradients = [], []
    for each in (model, compiled):
        outputs.append(main_output(each(**batch)))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
        each.zero_grad()
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    compiled.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(family), tmp_path).eval()
    torch.testing.assert_close(main_output(loaded(**batch)), outputs[0], rtol=0, atol=1e-5)
