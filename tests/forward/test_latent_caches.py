# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Models whose cache holds something else than the keys and values that their attention gets.

DeepSeek and its kin hold latents, of which keys and values are made at each step. JetMoe holds fewer heads.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from families import WITHOUT_HEAD_DIM
from making import make_config
from peft import PeftModel, get_peft_model
from reference import V
from releases import CACHE
from torch import nn
from transformers import DynamicCache

from peft_ptuning_ext.forward import one_pass


LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6},
    **{"num_key_value_heads": 4},
}
EXPERTS = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
}
CONFIGS = {
    "DeepSeek-V2": lambda: tf.DeepseekV2Config(**{**WITHOUT_HEAD_DIM, **LATENT, **EXPERTS}),
    "DeepSeek-V3": lambda: tf.DeepseekV3Config(**{**WITHOUT_HEAD_DIM, **LATENT, **EXPERTS}),
    "JetMoe": lambda: tf.JetMoeConfig(
        **{**WITHOUT_HEAD_DIM, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_layers": 2}
    ),
}
CLOSE = {"rtol": 0, "atol": 2e-5}
models = pytest.mark.parametrize("name", CONFIGS)
depths = pytest.mark.parametrize("depth", ["INPUT", "DEEP"])


def make(name: str, depth: str) -> PeftModel:
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model = get_peft_model(base, make_config(prompt_depth=depth)).eval()
    model.add_adapter("longer", make_config(length=V + 3, prompt_depth=depth))
    return model


def texts() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 99, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    ids[1, :2] = mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@models
@torch.no_grad()
def test_texts_generated_behind_a_prompt_are_those_of_the_concatenation(name: str) -> None:
    model, batch = make(name, "INPUT"), texts()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    prompt = model.prompt_embeddings()[None].expand(len(embeds), -1, -1)
    mask = torch.cat([torch.ones(3, V, dtype=torch.long), batch["attention_mask"]], dim=1)
    # A row's padding stands between its prompt and its text here, and counts for no position.
    given = {"inputs_embeds": torch.cat([prompt, embeds], dim=1), "attention_mask": mask}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with model.disable_adapter():
        expected = model.get_base_model().generate(**given, **options)
    found = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(found, expected)
    assert model.prompt_route == "shared"


@models
@depths
@pytest.mark.parametrize("way", ["without gradients", "one pass", "in the row"])
@pytest.mark.parametrize("names", [None, ["default", "longer", "default"]], ids=["one prompt", "by row"])
def test_steps_over_a_cache_equal_one_call(name: str, depth: str, way: str, names, monkeypatch) -> None:
    model, batch = make(name, depth), texts()
    monkeypatch.setattr(one_pass, "costs_more", lambda *_: way == "in the row")
    by_row = {} if names is None else {"adapter_names": names}
    seen = batch["attention_mask"].bool()
    with torch.set_grad_enabled(way != "without gradients"):
        whole = model(**batch, **by_row, use_cache=False).logits
        cache = DynamicCache(config=model.get_base_model().config)
        parts = [
            model(
                input_ids=batch["input_ids"][:, begin:end],
                attention_mask=batch["attention_mask"][:, :end],
                **{CACHE: cache},
                **by_row,
            ).logits
            for begin, end in ((0, 5), (5, 6), (6, 7))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[seen], whole[seen], **CLOSE)
    assert cache.get_seq_length() == batch["input_ids"].shape[1]
