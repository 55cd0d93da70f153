# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""No call waits for the device more often than the base model does by itself: nothing asks a tensor for its value."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import make_model
from making import make_adapted
from reference import make_batch
from releases import CACHE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache


# What `.item()`, `bool`, `int`, `torch.equal` and the like become. On a GPU each waits for all that was asked before.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"}
DEPTHS = pytest.mark.parametrize("depth", ["INPUT", "DEEP"])


class Waits(TorchDispatchMode):
    """Counts the operators for whose results the host waits."""

    def __enter__(self) -> Counter:
        self.count: Counter = Counter()
        super().__enter__()
        return self.count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


def test_what_waits_is_counted() -> None:
    tensor = torch.ones(3)
    with Waits() as count:
        bool(tensor.any()), int(tensor.sum()), torch.equal(tensor, tensor), tensor.max().item(), tensor[tensor > 0]
    assert count == {"_local_scalar_dense": 3, "equal": 1, "index": 1}


def step(model: nn.Module, family: str, cache_class: type, **arguments) -> Counter:
    """What waits in one step behind a batch that is padded on the left."""
    batch = make_batch(family, "CAUSAL_LM", (7, 5), pad_left=True)
    cache = cache_class(model.config, max_cache_len=20) if cache_class is StaticCache else cache_class()
    with torch.no_grad():
        model(**batch, **{CACHE: cache})
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        inputs = {"input_ids": torch.full((2, 1), 9), "attention_mask": mask, CACHE: cache}
        with Waits() as count:
            model(**inputs, **arguments)
    return count


@pytest.mark.parametrize("is_told", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT-2", "Bloom"])
@DEPTHS
def test_a_step_waits_for_nothing(depth, family, cache_class, is_told) -> None:
    if family == "Bloom" and (is_told or cache_class is StaticCache):
        pytest.skip("it takes no positions, and no static cache with a prompt")
    arguments = {"position_ids": torch.tensor([[7], [5]])} if is_told else {}
    adapted = make_adapted(family, prompt_depth=depth).get_base_model()
    base = make_model(family, "CAUSAL_LM").eval()
    assert step(adapted, family, cache_class, **arguments) == step(base, family, cache_class, **arguments)


@pytest.mark.parametrize(("family", "task"), [("Llama", "CAUSAL_LM"), ("Mistral", "CAUSAL_LM"), ("BERT", "SEQ_CLS")])
@DEPTHS
def test_training_waits_for_nothing(depth, family, task) -> None:
    batch, counts = make_batch(family, task), []
    for model in (make_adapted(family, task, prompt_depth=depth), make_model(family, task)):
        model.train()
        with Waits() as count:
            model(**batch)[0].square().sum().backward()
        counts.append(count)
    assert counts[0] == counts[1]


@DEPTHS
def test_a_call_again_waits_for_a_comparison_at_most_and_for_that_on_a_cpu_only(depth) -> None:
    batch, counts = make_batch("Llama", "CAUSAL_LM"), []
    for model in (make_adapted("Llama", prompt_depth=depth), make_model("Llama", "CAUSAL_LM").eval()):
        with torch.no_grad():
            model(**batch)
            with Waits() as count:
                model(**batch)
        counts.append(count)
    assert counts[0] - counts[1] == ({"equal": 1} if depth == "INPUT" else {})


@pytest.mark.parametrize("leaves_trace", [True, False], ids=["in place", "through data"])
def test_a_trained_prompt_is_found_out_without_a_comparison(leaves_trace, monkeypatch) -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM")
    with torch.no_grad():
        before = model(**batch).logits
    monkeypatch.setattr(torch, "equal", lambda *_: True)  # as on a device that is not waited for
    parameter = next(p for n, p in model.named_parameters() if "ptuning_" in n)
    model(**batch).logits.sum().backward()
    with torch.no_grad():
        (parameter if leaves_trace else parameter.data).add_(1.0)
        after = model(**batch).logits
        assert (after - before).abs().max() > 1e-3
        model.forget_kept_prompts()
        torch.testing.assert_close(model(**batch).logits, after, rtol=0, atol=0)
        parameter.mul_(0.5)  # outside of any training
        assert (model(**batch).logits - after).abs().max() > 1e-3
