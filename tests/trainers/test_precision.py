# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Training on bases in half precision, under autocast and quantized."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from by_hand import deep_by_hand
from families import TASKS
from learnable import TASK_OF, add_prompt, frozen, losses, make_base, make_learner, trainable
from peft import PeftModel, prepare_model_for_kbit_training
from peft.utils.other import cast_mixed_precision_params
from reference import concatenated, main_output, make_batch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig


families = pytest.mark.parametrize("family", list(TASK_OF))

# What each is called, the dtype of the base and the arguments of the Trainer.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "autocast": (torch.float32, {"bf16": True}),
    "bfloat16 and autocast": (torch.bfloat16, {"bf16": True}),
}


def train_200_steps(family: str, encoder: str, dtype: torch.dtype, folder, **arguments) -> list[float]:
    """The losses, the prompt being float32 all the way and the base what it was."""
    options = {"prompt_depth": "DEEP"} if encoder == "DEEP" else {"encoder_reparameterization_type": encoder}
    model = add_prompt(make_base(family, dtype), TASK_OF[family], **options)
    base = frozen(model)
    trainer = make_learner(model, folder, max_steps=200, **arguments)
    trainer.train()
    assert {tensor.dtype for name, tensor in model.state_dict().items() if "ptuning_" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in base.items() if "ptuning_" not in name} == {dtype}
    for name, value in frozen(model).items():
        assert torch.equal(value, base[name]), name
    assert len(losses(trainer)) == 200
    return losses(trainer)


def final(values: list[float]) -> float:
    return sum(values[-32:]) / 32


@functools.cache
def float32_losses(family: str, encoder: str, folder: str) -> list[float]:
    return train_200_steps(family, encoder, torch.float32, folder)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("family", "encoder"), [("BERT", "MLP"), ("Llama", "NONE"), ("Llama", "MLP"), ("BERT", "DEEP"), ("Llama", "DEEP")]
)
def test_training_ends_where_float32_does(family, encoder, precision, tmp_path, tmp_path_factory) -> None:
    expected = float32_losses(family, encoder, str(tmp_path_factory.getbasetemp()))
    dtype, arguments = PRECISIONS[precision]
    found = train_200_steps(family, encoder, dtype, tmp_path, **arguments)
    assert all(math.isfinite(loss) for loss in found)
    assert final(found) < 0.9 * sum(found[:4]) / 4  # it has learned
    assert final(found) == pytest.approx(final(expected), rel=0.02)


@families
def test_float16_with_a_scaled_loss(family, tmp_path, tmp_path_factory) -> None:
    """What `fp16=True` of the Trainer does, which does nothing without a GPU."""
    expected = float32_losses(family, "MLP", str(tmp_path_factory.getbasetemp()))
    model = add_prompt(make_base(family), TASK_OF[family], encoder_reparameterization_type="MLP")
    cast_mixed_precision_params(model, torch.float16)
    trainer = make_learner(model, tmp_path, max_steps=200)
    trainer.create_optimizer_and_scheduler(200)
    scaler, found = torch.amp.GradScaler("cpu"), []
    for batch in trainer.get_train_dataloader():
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(trainer.optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        scaler.step(trainer.optimizer)
        scaler.update()
        trainer.lr_scheduler.step()
        model.zero_grad()
        found.append(loss.item())
    assert scaler.get_scale() >= 2.0**12  # every step that overflows is left out and halves it
    assert {value.dtype for value in trainable(model).values()} == {torch.float32}
    assert {value.dtype for value in frozen(model).values()} == {torch.float16}
    assert final(found) == pytest.approx(final(expected), rel=0.02)


# A head that is to be trained must not be quantized.
HEADS = ["classifier", "lm_head"]
QUANTIZATIONS = {
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEADS),
    "torchao int4": TorchAoConfig(IntxWeightOnlyConfig(torch.int4), modules_to_not_convert=HEADS),
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS),
    "bitsandbytes int8 by row": BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=HEADS, llm_int8_threshold=0.0
    ),
    "bitsandbytes nf4": BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=HEADS, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
SIZES_OF = {"BERT": SIZES, "Llama": {**SIZES, "num_key_value_heads": 1, "head_dim": 32}}


def load_quantized(family: str, quantization: str, folder) -> PreTrainedModel:
    return TASKS[TASK_OF[family]].from_pretrained(folder, quantization_config=QUANTIZATIONS[quantization])


def stored(model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """By name, the plain tensors of the frozen weights: quantized values, scales and all."""
    found = {}
    for name, tensor in model.state_dict().items():
        if "ptuning_" not in name and "modules_to_save" not in name:
            parts = tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else []
            found[name] = [getattr(tensor, part).clone() for part in parts] or [tensor.clone()]
    return found


PREPARE = functools.partial(prepare_model_for_kbit_training, gradient_checkpointing_kwargs={"use_reentrant": False})


# PEFT calls transformers' method by its old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("prepare", [lambda base: base, PREPARE], ids=["plain", "prepared"])
# Not torchao's int4, which the Trainer refuses.
@pytest.mark.parametrize("quantization", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
@families
@pytest.mark.parametrize("depth", ["INPUT", "DEEP"])
def test_training_on_a_quantized_base(depth, family, quantization, prepare, tmp_path) -> None:
    task = TASK_OF[family]
    make_base(family, torch.bfloat16, **SIZES_OF[family]).save_pretrained(tmp_path / "base")
    model = add_prompt(prepare(load_quantized(family, quantization, tmp_path / "base")), task, prompt_depth=depth)
    before, start = stored(model), trainable(model)
    assert any(part.dtype in (torch.int8, torch.uint8) for parts in before.values() for part in parts)

    trainer = make_learner(model, tmp_path, max_steps=40, learning_rate=1e-2 if depth == "INPUT" else 5e-2)
    trainer.train()
    values = losses(trainer)
    assert sum(values[-8:]) < 0.95 * sum(values[:8])
    for name, parts in stored(model).items():
        assert all(torch.equal(one, two) for one, two in zip(parts, before[name], strict=True)), name
    for name, value in trainable(model).items():
        assert "ptuning_" not in name or value.dtype == torch.float32
        assert (value - start[name]).abs().max() > 1e-3, name

    trainer.save_model(tmp_path / "adapter")
    size = sum(value.numel() * value.element_size() for value in start.values())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < size + 2048
    base = prepare(load_quantized(family, quantization, tmp_path / "base"))
    loaded, batch = PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), make_batch(family, task)
    with torch.no_grad():
        assert torch.equal(main_output(loaded(**batch)), main_output(model.eval()(**batch)))


# Not bitsandbytes' int8 as it comes: what it leaves out as outliers depends on all that is in a call.
@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name != "bitsandbytes int8"])
@families
def test_a_quantized_base_sees_keys_and_values_in_front(family, quantization, tmp_path) -> None:
    make_base(family, **SIZES_OF[family]).save_pretrained(tmp_path)
    base, batch = load_quantized(family, quantization, tmp_path).train(), make_batch(family, TASK_OF[family])
    model = add_prompt(load_quantized(family, quantization, tmp_path), TASK_OF[family], prompt_depth="DEEP").train()
    states = {n: (k.detach().requires_grad_(), v.detach()) for n, (k, v) in model.prompt_key_values().items()}
    found, expected = main_output(model(**batch)), deep_by_hand(family, base, states, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.square().mean().backward()
    expected.square().mean().backward()
    gradient = next(p.grad for name, p in model.named_parameters() if name.endswith("keys.0"))
    torch.testing.assert_close(gradient, states[0][0].grad, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


# Not bitsandbytes' int8 as it comes: what it leaves out as outliers depends on all that is in a call.
@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name != "bitsandbytes int8"])
@families
def test_a_quantized_base_sees_the_concatenation(family, quantization, tmp_path) -> None:
    make_base(family, **SIZES_OF[family]).save_pretrained(tmp_path)
    # In training mode: bitsandbytes on a CPU repacks its 4-bit weights in evaluation mode, and has no gradients then.
    base, batch = load_quantized(family, quantization, tmp_path).train(), make_batch(family, TASK_OF[family])
    model = add_prompt(load_quantized(family, quantization, tmp_path), TASK_OF[family]).train()
    prompt = model.prompt_embeddings().detach().requires_grad_()
    found = main_output(model(**batch))
    expected = concatenated(base, TASK_OF[family], prompt, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.square().mean().backward()
    expected.square().mean().backward()
    gradient = next(p.grad for name, p in model.named_parameters() if "ptuning_" in name)
    torch.testing.assert_close(gradient, prompt.grad, rtol=1e-4, atol=1e-5 * prompt.grad.abs().max().item())
