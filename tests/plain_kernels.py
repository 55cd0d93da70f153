# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Attention kernels in plain torch, where those of flash and flex attention do not run or have no gradient.

They take and return what the real ones do, and stand where transformers looks for these. So its own code around the
kernels runs as it does on a GPU.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils, modeling_flash_attention_utils
from transformers.integrations import flex_attention
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    s_aux=None,
) -> torch.Tensor:
    """(B, S, heads, D), (B, N, key-value heads, D) → (B, S, heads, D): the last query sees the last key."""
    assert dropout_p == 0.0
    groups = q.shape[2] // k.shape[2]
    k, v = (each.repeat_interleave(groups, dim=2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window_size[0] >= 0:
        seen = seen & (distance <= window_size[0]) & (distance >= -window_size[1])
    scores = scores.masked_fill(~seen, float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1).nan_to_num()[..., : k.shape[1]]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    s_aux=None,
) -> torch.Tensor:
    """(tokens, heads, D), several texts one behind the other."""
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    assert (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_seqlen_q, max_seqlen_k)
    ranges = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    texts = [(q[i:j][None], k[m:n][None], v[m:n][None]) for (i, j), (m, n) in ranges]
    return torch.cat([flash_attn_func(*text, dropout_p, **options, s_aux=s_aux)[0] for text in texts])


def flex(query, key, value, training, score_mod, block_mask, enable_gqa, scale, **_) -> torch.Tensor:
    """What `flex_attention` does, with a mask that is written out."""
    rows, heads, queries, width = query.shape
    if enable_gqa:
        key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
    index = torch.meshgrid(*(torch.arange(n) for n in (rows, heads, queries, key.shape[2])), indexing="ij")
    scores = score_mod(query @ key.mT * (width**-0.5 if scale is None else scale), *index)
    if block_mask is not None:
        assert block_mask.shape[-2:] == scores.shape[-2:]
        seen = create_mask(block_mask.mask_mod, rows, heads, *scores.shape[-2:], device="cpu")
        in_blocks = block_mask.to_dense().bool()  # what the real kernel never looks into
        size = block_mask.BLOCK_SIZE
        in_blocks = in_blocks.repeat_interleave(size[0], dim=-2).repeat_interleave(size[1], dim=-1)
        scores = scores.masked_fill(~(seen & in_blocks[..., :queries, : key.shape[2]]), float("-inf"))
    return scores.softmax(-1).nan_to_num() @ value


# Names of flash attention, as transformers has them. Any other is not to be looked up.
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "kernels-community/some-flash", "an/other")


def _lazy_imports(implementation, attention_wrapper=None, allow_all_kernels=False) -> tuple:
    assert implementation in FLASH, f"transformers looks for kernels of {implementation!r}"
    module = modeling_flash_attention_utils
    return flash_attn_func, flash_attn_varlen_func, None, module._pad_input, module._unpad_input


def lower_right(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **_) -> tuple:
    """Somebody's own: the last query sees the last key, and there is no padding."""
    assert attention_mask is None
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    states = (each.transpose(1, 2) for each in (query, key, value))
    is_causal = module.is_causal
    return flash_attn_func(*states, softmax_scale=scaling, causal=is_causal, window_size=window), None


def upper_left(module, query, key, value, attention_mask, scaling=None, **_) -> tuple:
    """Somebody's own that looks at no mask, and lets the first query see the first key alone."""
    is_causal = module.is_causal and query.shape[2] > 1
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=is_causal)


def causal_eager(module, query, key, value, attention_mask, **kwargs) -> tuple:
    """Somebody's own: the first query sees the first key alone, unless an additive mask says otherwise."""
    if attention_mask is None and module.is_causal and query.shape[2] > 1:
        ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        attention_mask = query.new_zeros(ahead.shape).masked_fill(ahead, float("-inf"))[None, None]
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


def in_flash(module, query, key, value, attention_mask, **kwargs) -> tuple:
    """Somebody's own, in front of flash attention."""
    kwargs["attn_implementation"] = "flash_attention_2"
    states = (each.transpose(1, 2) for each in (query, key, value))
    kwargs["softmax_scale"] = kwargs.pop("scaling", None)
    forward = modeling_flash_attention_utils._flash_attention_forward
    return forward(*states, attention_mask, query.shape[2], module.is_causal, **kwargs), None


def with_a_mask(function):
    """Somebody's own in front of another function, of which nothing tells which."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        return function(module, query, key, value, attention_mask, **kwargs)

    return attend


# Functions of somebody's own, and what makes their masks.
OWN = {
    "of sdpa": (with_a_mask(sdpa_attention_forward), sdpa_mask),
    "of eager": (with_a_mask(eager_attention_forward), eager_mask),
    "of sdpa, no masks": (with_a_mask(sdpa_attention_forward), None),
    "of eager, no masks": (causal_eager, None),
    "ahead": (with_a_mask(eager_attention_forward), None),
    "of flash": (in_flash, flash_attention_mask),
    "lower right": (lower_right, None),
    "upper left": (upper_left, None),
}


@pytest.fixture
def kernels(monkeypatch) -> None:
    """Kernels that run here, and functions of somebody's own."""
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", _lazy_imports)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", flex)
    monkeypatch.setattr(masking_utils, "create_block_mask", _create_block_mask)
    for name in FLASH[3:]:  # as transformers does when it has loaded a kernel
        AttentionInterface.register(name, flash_attention_forward)
        AttentionMaskInterface.register(name, flash_attention_mask)
    for name, (function, mask_function) in OWN.items():
        AttentionInterface.register(name, function)
        if mask_function is not None:
            AttentionMaskInterface.register(name, mask_function)


def _create_block_mask(*args, _compile, **kwargs) -> BlockMask:
    return create_block_mask(*args, **kwargs)
