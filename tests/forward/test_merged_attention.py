# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Attention in two parts equals attention to the concatenation."""

from __future__ import annotations

import importlib

import pytest
import torch
from families import make_model
from peft import get_peft_model
from reference import make_batch
from torch.nn.functional import scaled_dot_product_attention

from peft_ptuning_ext import PTuningConfig
from peft_ptuning_ext.forward import merged_attention as module
from peft_ptuning_ext.forward.merged_attention import can_merge, merged_attention


B, HEADS, S, V, D = 3, 4, 6, 5, 8

MASKS = {
    "causal": None,
    "right-padded": torch.tensor([6, 4, 1]),
    "left-padded": torch.tensor([0, -2, -6]),
}


def make_inputs(key_heads: int, queries: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [
        (B, HEADS, queries),
        (B, key_heads, tokens),
        (B, key_heads, tokens),
        (1, key_heads, V),
        (1, key_heads, V),
    ]
    return [torch.randn(*shape, D, dtype=dtype).requires_grad_() for shape in shapes]


def make_mask(lengths: torch.Tensor | None, queries: int, tokens: int) -> torch.Tensor | None:
    """(B, 1, S, N), boolean and causal; negative lengths are padded on the left, and some rows see nothing."""
    if lengths is None:
        return None
    column = torch.arange(tokens)
    seen = torch.where((lengths > 0)[:, None], column < lengths[:, None], column >= -lengths[:, None])
    causal = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    return (seen[:, None, None] & causal).contiguous()


def on_the_concatenation(query, key, value, prompt_key, prompt_value, mask, scale=None) -> torch.Tensor:
    groups = HEADS // key.shape[1]
    key, value = (
        torch.cat([prompt.expand(B, -1, -1, -1), text], dim=2).repeat_interleave(groups, dim=1)
        for prompt, text in ((prompt_key, key), (prompt_value, value))
    )
    queries, tokens = query.shape[2], key.shape[2] - V
    if mask is None:
        mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool).tril(0 if queries > 1 else tokens)
    mask = torch.cat([mask.new_ones(*mask.shape[:-1], V), mask], dim=-1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("queries", "tokens"), [(S, S), (1, S), (S, S + 3)], ids=["prefill", "step", "static"])
@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
def test_outputs_and_gradients_are_those_of_the_concatenation(key_heads, queries, tokens, padding, additive) -> None:
    inputs = make_inputs(key_heads, queries, tokens, torch.float64)
    mask = make_mask(MASKS[padding], queries, tokens)
    expected = on_the_concatenation(*inputs, mask)
    if additive and mask is not None:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    output = merged_attention(*inputs, mask)
    assert output.shape == (B, queries, HEADS, D)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for found, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions_and_scales(dtype) -> None:
    inputs = make_inputs(2, S, S, dtype)
    exact = on_the_concatenation(*(tensor.detach().double() for tensor in inputs), None, scale=0.3)
    output = merged_attention(*inputs, scale=0.3)
    assert output.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_text_that_needs_no_gradient_costs_none() -> None:
    inputs = make_inputs(HEADS, S, S, torch.float64)
    expected = torch.autograd.grad(merged_attention(*inputs).square().sum(), inputs[3:])
    for tensor in inputs[:3]:
        tensor.requires_grad_(False)
    output = merged_attention(*inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        found = torch.autograd.grad(output.square().sum(), inputs[3:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    kernels = {event.key: event.count for event in profile.key_averages()}
    assert kernels["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == 1


def test_what_the_kernels_do_not_do_is_left_to_others() -> None:
    query, key, value, *_ = make_inputs(HEADS, S, S, torch.float32)
    assert can_merge(query, key, value, {"dropout": 0.0, "scaling": 0.3, "sliding_window": None})
    assert not can_merge(query, key, value, {"dropout": 0.1})
    assert not can_merge(query, key, value, {"position_bias": torch.zeros(1)})
    assert not can_merge(query, key, value[..., :4], {})
    assert not can_merge(query, key, value.bfloat16(), {})
    assert not can_merge(query.to("meta"), key, value, {})
    with torch.autocast("cpu"):
        assert not can_merge(query, key, value, {})


class _WithoutOperators:
    """`torch.ops.aten` of a release that has the named operators no longer."""

    def __init__(self, *gone: str):
        self.gone, self.aten = gone, torch.ops.aten

    def __getattr__(self, name: str):
        if name in self.gone:
            raise AttributeError(f"'_OpNamespace' 'aten' object has no attribute {name!r}")
        return getattr(self.aten, name)


@pytest.mark.parametrize("end", ["", "_backward"], ids=["forward", "backward"])
def test_without_the_private_operators_keys_are_concatenated(end, monkeypatch) -> None:
    """Either operator may be gone: the module imports, and outputs and gradients are the same."""
    base = make_model("Llama", "CAUSAL_LM", attn_implementation="sdpa").double()
    model = get_peft_model(base, PTuningConfig(num_virtual_tokens=V, task_type="CAUSAL_LM")).eval()
    batch = make_batch("Llama", "CAUSAL_LM")
    prompt = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            logits = model(**batch).logits
            logits.square().sum().backward()
        kernels = {event.key: event.count for event in profile.key_averages()}
        return logits.detach(), prompt.grad, kernels[kernel]

    logits, gradient, merged_kernels = run()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "aten", _WithoutOperators(kernel.removeprefix("aten::") + end))
            importlib.reload(module)
        inputs = make_inputs(HEADS, S, S, torch.float32)[:3]
        assert not can_merge(*inputs, {})
        found_logits, found_gradient, kernels = run()
    finally:
        importlib.reload(module)
    assert can_merge(*inputs, {})
    assert merged_kernels > kernels  # an attention to the text and one to the prompt, against one to both
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-6, atol=1e-6)
