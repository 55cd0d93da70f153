# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Attention to a prompt that all rows share and to each row's own text, without a copy of the prompt for each row.

Forward: attention to the keys of two parts is the mean of the attention to each part, weighted by the part's share of
the softmax's denominator. The queries of all rows attend to the prompt as one long row. The queries of each row attend
to its text as without a prompt. The log-sum-exps of both give the weights (Hydragen, Juravsky et al., 2024, arXiv
2402.05099, section 3.1).

Backward: each part's kernel is called with the output and the log-sum-exp of the whole attention. The kernels use
these two only to rebuild the softmax's weights, so each call returns exactly its part of the gradient.

The kernels are those of `scaled_dot_product_attention` on the CPU, which do not return a log-sum-exp under any public
name: `flex_attention` does so elsewhere, and `varlen_attn` on GPUs. Where torch has them no longer, [`can_merge`] says
no, and the prompt's keys and values are concatenated, which gives the same numbers and takes more time.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import repeat_kv


# Arguments that change what the softmax is taken of. The model's own function is to say what it does with them.
OTHER_SOFTMAX = ("position_bias", "softcap", "s_aux", "cache")

# Private operators, which a release of torch may rename: `None` where they are gone.
_attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_attention_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def can_merge(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict) -> bool:
    """Whether [`merged_attention`] does what an attention function does with these inputs and arguments."""
    return (
        _attention is not None
        and _attention_backward is not None
        and query.device.type == "cpu"
        and type(query) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in OTHER_SOFTMAX)
    )


def merged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_key: torch.Tensor,
    prompt_value: torch.Tensor,
    mask: Optional[torch.Tensor] = None,
    is_causal: bool = True,
    scale: Optional[float] = None,
) -> torch.Tensor:
    """Attention to [prompt; text], the prompt visible to every query.

    Args:
        query (`torch.Tensor`): (B, heads, S, D).
        key (`torch.Tensor`): The text's, (B, key-value heads, N, D).
        value (`torch.Tensor`): The text's, of the same shape.
        prompt_key (`torch.Tensor`): (1, key-value heads, V, D).
        prompt_value (`torch.Tensor`): Of the same shape.
        mask (`torch.Tensor`, *optional*):
            The text's, (B or 1, heads or 1, S, N), boolean or additive.
        is_causal (`bool`):
            Without a mask: whether query s sees the first s + 1 keys, rather than all of them. A single query always
            sees all.
        scale (`float`, *optional*): Of the scores; by default 1/√D.

    Returns:
        `torch.Tensor`: (B, S, heads, D).
    """
    batch_size, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    is_causal = is_causal and mask is None and queries > 1
    if groups > 1 and queries == 1 and (mask is None or mask.shape[1] == 1):
        query = query.reshape(batch_size, heads // groups, groups, width)  # one query per head: heads as queries
    elif groups > 1:
        key, value, prompt_key, prompt_value = (repeat_kv(t, groups) for t in (key, value, prompt_key, prompt_value))
    unseeing = None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        mask = mask.to(query.dtype).expand(batch_size, -1, query.shape[2], -1)
        unseeing = (mask <= torch.finfo(mask.dtype).min).all(-1)
    scale = width**-0.5 if scale is None else scale
    inputs = (query, key, value, prompt_key, prompt_value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        output = _Merged.apply(*inputs, mask, unseeing, is_causal, scale)
    else:
        output, _, _ = _merge(*inputs, mask, unseeing, is_causal, scale)
    return output.reshape(batch_size, heads, queries, width).transpose(1, 2)


def _merge(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_key: torch.Tensor,
    prompt_value: torch.Tensor,
    mask: Optional[torch.Tensor],
    unseeing: Optional[torch.Tensor],
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, (B, heads, S, D), and the log-sum-exps of text and prompt, (B, heads, S)."""
    of_text, text_lse = _attention(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
    of_prompt, prompt_lse = _attention(_as_one_row(query), prompt_key, prompt_value, 0.0, False, scale=scale)
    of_prompt, prompt_lse = _as_rows(of_prompt, len(query)), _as_rows(prompt_lse, len(query))
    if unseeing is not None:  # the kernel gives a query that sees nothing the output 0 and an arbitrary sum
        text_lse = text_lse.masked_fill(unseeing, float("-inf"))
    share = torch.sigmoid(prompt_lse - text_lse).unsqueeze(-1)
    output = torch.lerp(of_text.to(share.dtype), of_prompt.to(share.dtype), share).to(query.dtype)
    return output, text_lse, prompt_lse


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        """The output of [`_merge`]."""
        output, text_lse, prompt_lse = _merge(*arguments)
        *tensors, _, ctx.is_causal, ctx.scale = arguments
        ctx.save_for_backward(*tensors, output, torch.logaddexp(text_lse, prompt_lse))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        query, key, value, prompt_key, prompt_value, mask, output, lse = ctx.saved_tensors
        row = [_as_one_row(tensor) for tensor in (gradient, query, output, lse)]
        for_row, for_prompt_key, for_prompt_value = _attention_backward(
            *row[:2], prompt_key, prompt_value, row[2], row[3].contiguous(), 0.0, False, scale=ctx.scale
        )
        if not any(ctx.needs_input_grad[:3]):  # the first layer: the text's embeddings are frozen
            return None, None, None, for_prompt_key, for_prompt_value, None, None, None, None
        for_query, for_key, for_value = _attention_backward(
            gradient, query, key, value, output, lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale
        )
        for_query = for_query + _as_rows(for_row, len(query))
        return for_query, for_key, for_value, for_prompt_key, for_prompt_value, None, None, None, None


def _as_one_row(tensor: torch.Tensor) -> torch.Tensor:
    """(B, heads, S, …) → (1, heads, B·S, …)."""
    return tensor if len(tensor) == 1 else tensor.transpose(0, 1).flatten(1, 2)[None]


def _as_rows(tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(1, heads, B·S, …) → (B, heads, S, …)."""
    return tensor if batch_size == 1 else tensor[0].unflatten(1, (batch_size, -1)).transpose(0, 1)
