# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: its kernels, streams, graphs, memory and waiting. Skipped where there is none.

    python -m pytest tests/test_cuda.py
    PTUNING_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py   # tries the tests themselves, without a GPU

Exactness is a relation of errors. The truth is the base model in float64 on the concatenation. The base model itself,
in the precision of the test, is off the truth by rounding. This package does the same sums in another order, so it may
be off by as much: twice that, for chance, and one rounding of the output.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read when CUDA starts

import pytest
import torch
from by_hand import deep_by_hand
from families import DECODERS, PAD, make_model
from making import make_config
from peft import PeftModel, get_peft_model
from reference import V, concatenated, concatenating, embedding_and_backbone, make_batch
from releases import CACHE
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)


DEVICE = os.environ.get("PTUNING_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

# Warnings that a CPU never gives are not known yet, and shall not hide a result.
pytestmark = pytest.mark.filterwarnings("default")
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA only")

# Wide enough for the kernels that real models have.
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
WIDE |= {"intermediate_size": 512, "max_position_embeddings": 1024}
PADDINGS = {"none": (40, 40), "right": (40, 23), "left": (40, 23)}
PRECISIONS = ["float32", "bfloat16", "autocast"]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

# Flash kernels have half precision only. Each shape under flex is compiled, so it has one.
CELLS = [(name, each, padding) for name in ("sdpa", "eager") for each in PRECISIONS for padding in PADDINGS]
CELLS += [(name, "bfloat16", padding) for name in ("flash_attention_2", "flash_attention_3") for padding in PADDINGS]
CELLS += [("flex_attention", "bfloat16", "left")]

cells = pytest.mark.parametrize(("implementation", "precision", "padding"), CELLS)
precisions = pytest.mark.parametrize("precision", PRECISIONS)
paddings = pytest.mark.parametrize("padding", PADDINGS)
depths = pytest.mark.parametrize("depth", ["INPUT", "DEEP"])


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Without TF32, whose products have 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_base(
    precision: str = "float32", implementation: str = "sdpa", family: str = "Llama", **sizes
) -> PreTrainedModel:
    """A base on the device; a wide Llama unless told otherwise, whose outputs are as large as a narrow one's.

    Skips where the implementation does not run.
    """
    if implementation not in ("sdpa", "eager") and DEVICE != "cuda":
        pytest.skip(f"{implementation} needs a GPU")
    is_wide = family == "Llama" and not sizes
    base = make_model(family, "CAUSAL_LM", **(WIDE if is_wide else sizes))
    if is_wide:
        for parameter in base.parameters():
            parameter.data *= (32 / 256) ** 0.5 if parameter.dim() > 1 else 1
    base = base.to(DEVICE, torch.bfloat16 if precision == "bfloat16" else torch.float32).requires_grad_(False)
    try:
        base.set_attn_implementation(implementation)
    except (ImportError, ValueError, OSError) as error:
        pytest.skip(f"{implementation} is not installed: {str(error).splitlines()[0]}")
    return base


def adapt(base: PreTrainedModel, **options) -> PeftModel:
    """The base with a prompt that matters."""
    torch.manual_seed(0)
    model = get_peft_model(base, make_config("CAUSAL_LM", **options)).eval()
    vary(model)
    return model


@torch.no_grad()
def vary(model: PeftModel) -> None:
    for parameter in prompt_parameters(model):
        parameter += parameter.std() * torch.randn(parameter.shape).to(parameter)


def prompt_parameters(model: PeftModel) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "ptuning_" in name]


def send(model: PeftModel, route: str) -> PeftModel:
    """The model on a route; skips where its attention implementation takes no prompt."""
    if route == "concatenated":
        implementation = model.get_base_model().config._attn_implementation
        embedding_and_backbone(model.get_base_model())[1].set_attn_implementation(
            implementation.removeprefix("ptuning_")
        )
    if model.prompt_route.partition(":")[0] != {"one pass": "shared", "stored": "shared"}.get(route, route):
        pytest.skip(f"another route: {model.prompt_route}")
    return model


def on_device(batch: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def make_padded(padding: str, family: str = "Llama") -> dict:
    return on_device(make_batch(family, "CAUSAL_LM", PADDINGS[padding], pad_left=padding == "left"))


def rounding(precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(DEVICE, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


def by_hand(base: PreTrainedModel, model: PeftModel, batch: dict, dtype: torch.dtype, family: str = "Llama") -> tuple:
    """The base's logits behind the adapter's prompt, and the parts of the prompt, of which gradients can be asked."""
    prompt_dtype = base.dtype
    if model.prompt_route == "deep":
        pairs = model.prompt_key_values()
        keys, values = (
            [part.detach().to(prompt_dtype).to(dtype).requires_grad_() for part in parts]
            for parts in zip(*pairs.values(), strict=True)
        )
        states, parts = dict(zip(pairs, zip(keys, values))), [*keys, *values]  # in the order of the parameters
        return deep_by_hand(family, base.to(dtype), states, batch), parts
    prompt = model.prompt_embeddings().detach().to(prompt_dtype).to(dtype).requires_grad_()
    return concatenated(base.to(dtype), "CAUSAL_LM", prompt, batch), [prompt]


def truth_and_rounded(
    model: PeftModel, batch: dict, precision: str, implementation: str = "sdpa", family: str = "Llama", **sizes
) -> tuple[tuple, tuple]:
    """What the base gives by hand in float64, and in the precision of a test."""
    base = make_base(precision, "eager", family, **sizes)
    if family in ("Mixtral", "Qwen3-MoE"):
        base.set_experts_implementation("eager")  # the grouped product takes no float64
    truth = by_hand(base, model, batch, torch.float64, family)
    base = make_base(precision, implementation, family, **sizes)
    with rounding(precision):
        return truth, by_hand(base, model, batch, base.dtype, family)


def assert_as_exact(found, rounded, truth, precision: str) -> None:
    """The error of `found` is at most twice that of `rounded`, and one rounding."""
    unit = torch.finfo(torch.float32 if precision == "float32" else torch.bfloat16).eps
    error, of_base = ((each.double() - truth).norm().item() for each in (found, rounded))
    size = truth.norm().item()
    assert size > 0
    assert error <= 2 * of_base + unit * size, f"{error / size:.1e} of the truth, the base {of_base / size:.1e}"


ROUTES = {"one pass": {}, "stored": {}, "concatenated": {}, "deep": {"prompt_depth": "DEEP"}}


@cells
@pytest.mark.parametrize("route", ROUTES)
def test_outputs_are_as_exact_as_the_bases(route, implementation, precision, padding) -> None:
    model = send(adapt(make_base(precision, implementation), **ROUTES[route]), route)
    batch = make_padded(padding)
    seen = batch["attention_mask"].bool()
    (truth, _), (rounded, _) = truth_and_rounded(model, batch, precision, implementation)
    with torch.set_grad_enabled(route == "one pass"), rounding(precision):
        for _ in range(2 if route == "stored" else 1):  # the first call records
            found = model(**batch).logits
    assert_as_exact(found[seen], rounded[seen], truth[seen], precision)
    with model.disable_adapter(), torch.no_grad():
        of_base = model(**batch).logits[seen]
    assert (of_base - found[seen]).norm() > 0.05 * truth[seen].norm()  # the prompt matters


@cells
@pytest.mark.parametrize("route", ["one pass", "concatenated", "deep"])
def test_gradients_are_as_exact_as_the_bases(route, implementation, precision, padding) -> None:
    model = send(adapt(make_base(precision, implementation), **ROUTES[route]), route)
    batch = make_padded(padding)
    seen = batch["attention_mask"].bool()
    weights = torch.randn(int(seen.sum()), model.config.vocab_size, dtype=torch.float64).to(DEVICE)
    truth, rounded = truth_and_rounded(model, batch, precision, implementation)
    gradients = [torch.autograd.grad((out[seen].double() * weights).sum(), parts) for out, parts in (truth, rounded)]
    with rounding(precision):
        found = model(**batch).logits
    (found[seen].double() * weights).sum().backward()
    found = torch.cat([parameter.grad.flatten() for parameter in prompt_parameters(model)])
    truth, rounded = (torch.cat([part.flatten() for part in parts]) for parts in gradients)
    assert_as_exact(found, rounded, truth, precision)


def test_float32_is_not_tf32() -> None:
    """Off the truth by no more than the rounding of float32 in sums as long as the model's."""
    model, batch = adapt(make_base()), make_padded("none")
    (truth, _), _ = truth_and_rounded(model, batch, "float32")
    summed = 2 * (3 * WIDE["hidden_size"] + WIDE["intermediate_size"] + V + 40)  # in two layers
    error = (model(**batch).logits.double() - truth).norm() / truth.norm()
    assert error < torch.finfo(torch.float32).eps * summed < 2**-11


@pytest.mark.parametrize("route", ["one pass", "stored"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_family(family, route) -> None:
    implementation = "eager" if family == "Gemma 2" else "sdpa"  # its softcap
    model = adapt(make_base(implementation=implementation, family=family, attention_dropout=0.0))
    batch = on_device(make_batch(family, "CAUSAL_LM", (9, 6)))  # by hand, a window would count padding on the left
    seen = batch["attention_mask"].bool()
    (truth, _), (rounded, _) = truth_and_rounded(
        model, batch, "float32", implementation, family, attention_dropout=0.0
    )
    with torch.set_grad_enabled(route == "one pass"):
        for _ in range(2):
            found = model(**batch).logits
    assert_as_exact(found[seen], rounded[seen], truth[seen], "float32")


@pytest.mark.parametrize("route", ["one pass", "stored"])
@pytest.mark.parametrize(("implementation", "precision"), [cell[:2] for cell in CELLS if cell[2] == "none"])
def test_every_text_packed_in_a_row_sees_the_prompt(implementation, precision, route) -> None:
    model = send(adapt(make_base(precision, implementation)), route)
    texts = [on_device(make_batch("Llama", "CAUSAL_LM", (length,))) for length in (17, 40)]
    pairs = [truth_and_rounded(model, text, precision, implementation) for text in texts]
    truth, rounded = (torch.cat([pair[i][0] for pair in pairs], dim=1) for i in range(2))
    packed = {"input_ids": torch.cat([text["input_ids"] for text in texts], dim=1)}
    packed["position_ids"] = torch.cat([torch.arange(17), torch.arange(40)])[None].to(DEVICE)
    with torch.set_grad_enabled(route == "one pass"), rounding(precision):
        found = model(**packed, use_cache=False).logits
    assert_as_exact(found, rounded, truth, precision)


def generated_by_hand(model: PeftModel, batch: dict) -> torch.Tensor:
    """What the base generates when its backbone sees the concatenation, anew at every step."""
    base = make_base()
    with concatenating(base, model.prompt_embeddings()), torch.no_grad():
        return base.generate(**batch, **GREEDY, use_cache=False)


def has_quantizer() -> bool:
    try:
        QuantizedCache("quanto", make_base().config)
    except ImportError:
        return False
    return True


CACHES = ["dynamic", pytest.param("static", id="static, compiled"), "offloaded", "offloaded_static", "quantized"]


@pytest.mark.parametrize("implementation", CACHES)
def test_generation_with_every_cache_follows_a_prompt_that_is_changed(implementation) -> None:
    """A graph that CUDA has recorded must not hold the keys and values of the prompt before."""
    if "offloaded" in implementation and DEVICE != "cuda":
        pytest.skip("its streams are CUDA's")
    if implementation == "quantized" and not has_quantizer():
        pytest.skip("no library that quantizes a cache is installed")
    model = adapt(make_base())
    for batch in (make_padded("none"), make_padded("left")):
        expected = generated_by_hand(model, batch)
        for _ in range(2):
            with torch.no_grad():
                found = model.generate(**batch, **GREEDY, cache_implementation=implementation)
            assert torch.equal(found, expected)
        vary(model)
        assert not torch.equal(generated_by_hand(model, batch), expected)


@on_cuda
def test_a_static_cache_is_compiled(monkeypatch) -> None:
    """Otherwise the test above has not tried graphs."""
    model, batch, compiled = adapt(make_base()), make_padded("none"), []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    model.generate(**batch, **GREEDY, cache_implementation="static")
    assert compiled


@depths
def test_deep_and_input_prompts_generate_alike_with_every_cache(depth) -> None:
    model, batch = adapt(make_base(), prompt_depth=depth), make_padded("left")
    kinds = ["dynamic", "static", *(["offloaded"] if DEVICE == "cuda" else [])]
    found = [model.generate(**batch, **GREEDY, cache_implementation=kind, disable_compile=True) for kind in kinds]
    assert all(torch.equal(each, found[0]) for each in found[1:])


@depths
def test_continuous_batching_answers_each_text_as_alone(depth) -> None:
    model = adapt(make_base(), prompt_depth=depth)
    texts = [list(range(5, 5 + length)) for length in (3, 21, 1, 9)]
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    alone = []
    for text in texts:
        ids = torch.tensor([text], device=DEVICE)
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        alone.append(answer[0, len(text) :].tolist())
    settings = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=16)
    outputs = model.generate_batch(texts, generation_config=greedy, continuous_batching_config=settings)
    assert [output.generated_tokens for output in outputs.values()] == alone


# Parts of the names of attention's kernels.
KINDS = {"flash_attention": "fast", "cudnn_attention": "fast", "efficient_attention": "efficient"}
KINDS |= {"attention_math": "by itself"}


def kinds_of_kernels(function: Callable) -> set[str]:
    """Of which kind the kernels of attention are."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = {event.key for event in profile.key_averages()}
    return {kind for part, kind in KINDS.items() if any(part in name for name in names)}


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("route", ["one pass", "stored", "deep"])
def test_attention_has_no_slower_kernels_than_the_bases(route, precision) -> None:
    batch, kinds = make_padded("none"), []
    for model in (send(adapt(make_base(precision), **ROUTES[route]), route), make_base(precision)):
        inputs = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).requires_grad_(route != "stored")}
        with torch.set_grad_enabled(route != "stored"), rounding(precision):
            model(**inputs)
            kinds.append(kinds_of_kernels(lambda model=model, inputs=inputs: model(**inputs)))
    assert kinds[1]
    assert kinds[0] <= kinds[1]


def count_waits(function: Callable) -> int:
    """How often the host waits for the device; on a CPU it is always 0."""
    if DEVICE != "cuda":
        function()
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@on_cuda
def test_what_waits_is_counted() -> None:
    tensor = torch.ones(3, device=DEVICE)
    assert count_waits(lambda: [tensor.sum().item() for _ in range(3)]) >= 3
    assert count_waits(lambda: tensor + tensor) == 0


@paddings
@depths
def test_training_waits_no_more_than_the_base(depth, padding) -> None:
    batch, counts = make_padded(padding), []
    for model in (adapt(make_base(), prompt_depth=depth), make_base()):
        inputs = dict(batch, labels=batch["input_ids"], use_cache=False)
        if not isinstance(model, PeftModel):
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
        model.train()
        step = lambda model=model, inputs=inputs: model(**inputs).loss.backward(retain_graph=True)  # noqa: E731
        step()
        counts.append(count_waits(step))
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@depths
def test_a_decode_step_waits_no_more_than_the_base(depth, cache_class) -> None:
    batch, counts = make_padded("left"), []
    mask = nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    for model in (adapt(make_base(), prompt_depth=depth).get_base_model(), make_base()):
        cache = cache_class(model.config, max_cache_len=64) if cache_class is StaticCache else cache_class()
        inputs = {"input_ids": torch.full((2, 1), 9, device=DEVICE), "attention_mask": mask, CACHE: cache}
        with torch.no_grad():
            model(**batch, **{CACHE: cache})
            counts.append(count_waits(lambda model=model, inputs=inputs: model(**inputs)))
    assert counts[0] <= counts[1]


def peak_of_a_step(model: PeftModel, batch: dict, precision: str) -> int:
    """How far allocated memory rises in a training step, the second."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with rounding(precision):
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        rise = torch.cuda.max_memory_allocated() - before
        model.zero_grad(set_to_none=True)
    return rise


@on_cuda
@precisions
def test_a_training_step_needs_less_memory_than_concatenation(precision) -> None:
    """At least half of what arithmetic promises: activations of V + B·S positions, not of B·(V + S)."""
    rows, text, length = 16, 64, 128
    batch = on_device(make_batch("Llama", "CAUSAL_LM", (text,) * rows))
    one, other = (
        peak_of_a_step(send(adapt(make_base(precision), length=length), route).train(), batch, precision)
        for route in ("one pass", "concatenated")
    )
    share = (length + rows * text) / (rows * (length + text))
    assert one < (1 + share) / 2 * other


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def train(depth: str, precision: str) -> tuple[list[torch.Tensor], list[float]]:
    """The prompt that a short training ends with, and its losses."""
    model = adapt(make_base(precision), prompt_depth=depth).train()
    optimizer = torch.optim.AdamW(prompt_parameters(model), lr=0.03)
    losses = []
    for padding in ("none", "left", "right", "none", "left"):
        batch = make_padded(padding)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with rounding(precision):
            loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [parameter.detach().clone() for parameter in prompt_parameters(model)], losses


@precisions
@depths
def test_a_training_repeats_itself_bitwise(depth, precision) -> None:
    with deterministic():
        (one, losses), (other, again) = train(depth, precision), train(depth, precision)
    assert losses == again
    assert len(set(losses)) == len(losses)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
