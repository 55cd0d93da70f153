# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The prompt computed once: when it is, when it is kept, when it is dropped, and that it is always the right one."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import DECODERS, ENCODERS, FAMILIES
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from reference import V, embedding_and_backbone, make_batch
from releases import CACHE
from torch.nn.attention.bias import CausalBias
from transformers import DynamicCache, StaticCache

from peft_ptuning_ext.forward import attention, back_ends
from peft_ptuning_ext.prompts.prompt import Prompt


S = 7
SHARED = [family for family in DECODERS if family not in ("Bloom", "Falcon")]


def stack_of(model: PeftModel) -> torch.nn.Module:
    return embedding_and_backbone(model.get_base_model())[1]


def concatenating(model: PeftModel) -> PeftModel:
    """A copy of the model on the other route."""
    model = copy.deepcopy(model)
    stack = stack_of(model)
    stack.set_attn_implementation(stack.config._attn_implementation.removeprefix("ptuning_"))
    assert model.prompt_route.startswith("concatenated: its attention implementation was changed")
    return model


def kept(model: PeftModel) -> int:
    return len(stack_of(model).ptuning.states)


def watch(model: PeftModel) -> list[tuple[int, int]]:
    """Records batch size and tokens of every pass through the first layer."""
    shapes: list[tuple[int, int]] = []
    layer = next(m for n, m in stack_of(model).named_modules() if n.endswith((".0", "layers.0", "h.0")))
    layer.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(tuple(args[0].shape[:2])), with_kwargs=True)
    return shapes


def gradient(model: PeftModel, **inputs) -> torch.Tensor:
    model.zero_grad()
    model(**inputs).loss.backward()
    return next(p.grad.clone() for n, p in model.named_parameters() if "ptuning_" in n)


def test_which_route_is_taken() -> None:
    routes = {name: make_adapted(name).prompt_route for name in DECODERS}
    assert [name for name, route in routes.items() if route == "shared"] == SHARED
    assert routes["Bloom"] == "concatenated: its attention does not go through transformers' attention interface"
    for name in ENCODERS:
        model = make_adapted(name, "SEQ_CLS")
        assert model.prompt_route.startswith("concatenated: its attention ")


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary embedding"),
        ("GPT-2", {"add_cross_attention": True}, "cross-attention"),
        ("Gemma 3", {"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_why_a_prompt_is_not_shared(family, overrides, reason) -> None:
    model = make_adapted(family, sizes=overrides)
    assert model.prompt_route.startswith("concatenated: ")
    assert reason in model.prompt_route


@pytest.mark.parametrize("family", SHARED)
def test_the_prompt_passes_once(family) -> None:
    model = make_adapted(family)
    shapes = watch(model)
    ids = make_batch(family, "CAUSAL_LM", lengths=(S, S, S))["input_ids"]
    model(input_ids=ids).logits.sum().backward()
    assert shapes == [(1, V + 3 * S)]  # one pass for the prompt and three rows
    assert kept(model) == 0
    shapes.clear()
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=ids)
    assert shapes == [(1, V), (3, S), (3, S), (3, S)]  # kept
    shapes.clear()
    model.generate(ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert shapes == [(1, S), (1, 1), (1, 1)]
    shapes.clear()
    model.forget_kept_prompts()
    model.generate(ids[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert shapes == [(1, V), (1, S), (1, 1)]


def change_prompt(model: PeftModel) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "ptuning_" in n).add_(1.0)


def change_prompt_data(model: PeftModel) -> None:
    next(p for n, p in model.named_parameters() if "ptuning_" in n).data.add_(1.0)


def change_weight(model: PeftModel) -> None:
    with torch.no_grad():
        stack_of(model).layers[1].self_attn.k_proj.weight.mul_(0.5)


def replace_weight(model: PeftModel) -> None:
    projection = stack_of(model).layers[0].self_attn.v_proj
    projection.weight = torch.nn.Parameter(projection.weight * 0.5, requires_grad=False)


def replace_weight_data(model: PeftModel) -> None:
    projection = stack_of(model).layers[0].self_attn.v_proj
    projection.weight.data = projection.weight.data * 0.5


def replace_module(model: PeftModel) -> None:
    attention = stack_of(model).layers[0].self_attn
    attention.v_proj = torch.nn.Linear(attention.v_proj.in_features, attention.v_proj.out_features)


def load_weights(model: PeftModel) -> None:
    base = model.get_base_model()
    base.load_state_dict({key: value * 0.9 for key, value in base.state_dict().items()})


def train(model: PeftModel) -> None:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=100.0)
    ids = make_batch("Llama", "CAUSAL_LM")["input_ids"]
    with torch.enable_grad():
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def to_double(model: PeftModel) -> None:
    model.double()


def add_lora(model: PeftModel) -> None:
    inject_adapter_in_model(
        LoraConfig(target_modules=["v_proj"], init_lora_weights=False), stack_of(model), adapter_name="lora"
    )


def write_data_and_forget(model: PeftModel) -> None:
    stack_of(model).layers[0].self_attn.v_proj.weight.data.mul_(0.5)
    model.forget_kept_prompts()


CHANGES = [
    *(change_prompt, change_prompt_data, change_weight, replace_weight, replace_weight_data, replace_module),
    *(load_weights, train, to_double, add_lora, write_data_and_forget),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_is_kept_is_dropped_when_anything_changes(change) -> None:
    model = make_adapted()
    batch = make_batch("Llama", "CAUSAL_LM")
    before = model(**batch).logits
    assert kept(model) == 1
    change(model)
    after = model(**batch).logits
    assert not torch.allclose(after, before.to(after.dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(after, concatenating(model)(**batch).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_autocast_and_plain_calls_do_not_share_what_is_kept() -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM")
    plain = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**batch).logits
        torch.testing.assert_close(low, model(**batch).logits, rtol=0, atol=0)
    assert not torch.equal(low.float(), plain)
    assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_adapters_have_their_own_and_take_it_with_them() -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM")
    model.add_adapter("other", make_config("CAUSAL_LM", V + 2))
    outputs = {}
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        logits = model(**batch).logits
        assert torch.equal(outputs.setdefault(name, logits), logits)
        torch.testing.assert_close(logits, concatenating(model)(**batch).logits, rtol=0, atol=1e-5)
    assert kept(model) == 2
    assert not torch.allclose(outputs["default"], outputs["other"])
    model.delete_adapter("default")
    assert kept(model) == 1
    # A new adapter of the old name begins anew.
    model.add_adapter("default", make_config("CAUSAL_LM"))
    model.set_adapter("default")
    assert not torch.allclose(model(**batch).logits, outputs["default"])


@torch.no_grad()
def test_what_was_used_longest_ago_goes_first() -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM", (S,))
    for name in ("second", "third"):
        model.add_adapter(name, make_config("CAUSAL_LM"))
    stored = stack_of(model).ptuning.states

    def use(*names: str) -> list:
        for name in names:
            model(**batch, adapter_names=[name])
        return [name for (name,) in stored._entries]

    assert use("default", "second", "third", "default") == ["second", "third", "default"]
    (_, _, states), *_ = stored._entries.values()
    size = sum(state.nbytes for pair in states.values() for state in pair)
    model.limit_kept_prompts(2 * size)
    assert [name for (name,) in stored._entries] == ["third", "default"]
    assert use("second") == ["default", "second"]
    assert copy.deepcopy(stored).max_bytes == 2 * size
    model.limit_kept_prompts(2 * size - 1)
    assert use("third") == ["third"]
    model.limit_kept_prompts(0)
    assert use("third") == []
    with pytest.raises(ValueError, match="at least 0, got -1"):
        model.limit_kept_prompts(-1)


@torch.no_grad()
def test_the_prompts_of_a_batch_are_computed_in_one_pass_for_each_length() -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM", (S,) * 4)
    for name, length in (("second", V), ("third", V + 1)):
        model.add_adapter(name, make_config("CAUSAL_LM", length))
    rows, shapes = ["default", "second", "third", "second"], []
    layer = stack_of(model).layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    expected = model(**batch, adapter_names=rows).logits
    assert shapes == [(2, V), (1, V + 1), (4, S)]
    shapes.clear()
    assert torch.equal(model(**batch, adapter_names=rows).logits, expected)
    assert shapes == [(4, S)]
    handle.remove()


def test_inference_mode_leaves_nothing_that_training_could_trip_over() -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM")
    expected = gradient(make_adapted(), **batch, labels=batch["input_ids"])
    with torch.inference_mode():
        first = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, first)
    assert torch.equal(gradient(model, **batch, labels=batch["input_ids"]), expected)
    with torch.inference_mode():
        cache = model(**batch, **{CACHE: DynamicCache()}).past_key_values
    assert cache.get_seq_length() == S


@torch.no_grad()
def test_threads_on_one_model() -> None:
    model = make_adapted()
    batches = [make_batch("Llama", "CAUSAL_LM", lengths=(length, 3)) for length in range(4, 12)]
    expected = [make_adapted()(**batch).logits for batch in batches]

    def run(batch: dict) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            model.forget_kept_prompts()
            for found, wanted in zip(pool.map(run, batches), expected, strict=True):
                assert torch.equal(found, wanted)


@torch.no_grad()
def test_copies_keep_their_own() -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM")
    expected = model(**batch).logits
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(clone) == 0
        assert torch.equal(clone(**batch).logits, expected)
        change_prompt(clone)
        assert not torch.allclose(clone(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, expected)


def test_training_mode_keeps_nothing_and_draws_dropout_anew() -> None:
    model = make_adapted("GPT-2", sizes={"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}).train()
    batch = make_batch("GPT-2", "CAUSAL_LM")
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, model(**batch).logits)
    assert kept(model) == 0
    gradients = [gradient(model, **batch, labels=batch["input_ids"]) for _ in range(2)]
    assert all(each.isfinite().all() for each in gradients)
    assert not torch.allclose(*gradients)


def test_a_step_draws_one_dropout_mask_of_the_prompt_for_all_rows() -> None:
    model = make_adapted("GPT-2", sizes={"resid_pdrop": 0.0, "embd_pdrop": 0.5, "attn_pdrop": 0.0}).train()
    seen = []
    stack_of(model).h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.full((3, S), 7)
    model(input_ids=ids)
    (packed,) = seen
    prompt, text = packed[0, :V], packed[0, V:].unflatten(0, ids.shape)
    assert (prompt == 0).any()
    assert not torch.equal(text[0] == 0, text[1] == 0)  # rows of the text draw their own


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["bfloat16-base", "autocast"])
def test_low_precision_gradients_are_those_of_the_other_route(dtype) -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM")
    if dtype is None:
        model.get_base_model().bfloat16()
        next(p for n, p in model.named_parameters() if "ptuning_" in n).data = (
            model.prompt_embeddings().detach().float()
        )
    other = concatenating(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        found, wanted = (gradient(each, **batch, labels=batch["input_ids"]) for each in (model, other))
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("grad", [True, False])
def test_attention_behind_a_causal_bias_is_in_the_dtype_of_autocast(grad, monkeypatch) -> None:
    # Torch calls the kernels behind such a mask past autocast, so they have to be given its dtype.
    model, ids, seen = make_adapted(), make_batch("Llama", "CAUSAL_LM", lengths=(S, S))["input_ids"], []
    run = back_ends.Inputs.run

    def watched(inputs, mask, *args):
        if isinstance(mask, CausalBias):
            seen.extend((inputs.query.dtype, inputs.key.dtype, inputs.value.dtype))
        return run(inputs, mask, *args)

    monkeypatch.setattr(back_ends.Inputs, "run", watched)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
    assert set(seen) == {torch.bfloat16}


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model = make_adapted()
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(S,) * 4)["input_ids"]
    expected = gradient(model, input_ids=ids, labels=ids)
    model.zero_grad()
    for half in ids.split(2):
        (model(input_ids=half, labels=half).loss / 2).backward()
    found = next(p.grad for n, p in model.named_parameters() if "ptuning_" in n)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself, and on a graph break:
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mistral"])
def test_compiled_is_the_same(family) -> None:
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM")
    expected = gradient(model, **batch, labels=batch["input_ids"])
    with torch.no_grad():
        logits = model(**batch).logits
    torch._dynamo.reset()
    # GPT-2 itself warns about its loss, which breaks the graph.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=family != "GPT-2")
    compiled(**batch, labels=batch["input_ids"]).loss.backward()
    found = next(p.grad for n, p in model.named_parameters() if "ptuning_" in n)
    torch.testing.assert_close(found, 2 * expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT-2"])
@torch.no_grad()
def test_every_text_packed_in_a_row_sees_the_prompt(family) -> None:
    model = make_adapted(family)
    first, second = (make_batch(family, "CAUSAL_LM", lengths=(length,))["input_ids"] for length in (4, 7))
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(input_ids=ids).logits for ids in (first, second)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_a_mask_of_the_callers_own_is_the_texts(family, additive) -> None:
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM")
    own = batch["attention_mask"].bool()[:, None, None] & torch.ones(S, S, dtype=torch.bool).tril()
    if additive:
        own = torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
    expected = model(**batch).logits[batch["attention_mask"].bool()]
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            output = model(input_ids=batch["input_ids"], attention_mask=own).logits
        torch.testing.assert_close(output[batch["attention_mask"].bool()], expected, rtol=0, atol=1e-5)
    one = {"input_ids": batch["input_ids"][:1], "attention_mask": own[:1]}
    torch.testing.assert_close(model(**one).logits[0], output[0], rtol=0, atol=1e-5)  # one row, with gradients


@torch.no_grad()
def test_attention_maps_have_the_prompts_columns() -> None:
    model, batch = make_adapted(sizes={"attn_implementation": "eager"}), make_batch("Llama", "CAUSAL_LM")
    maps = model(**batch, output_attentions=True).attentions
    assert [each.shape for each in maps] == [(2, 4, S, V + S)] * 2
    for each, wanted in zip(maps, concatenating(model)(**batch, output_attentions=True).attentions, strict=True):
        torch.testing.assert_close(each[0], wanted[0], rtol=0, atol=1e-5)


def test_unloading_gives_the_attention_back() -> None:
    for implementation in ("sdpa", "eager"):
        model = make_adapted(sizes={"attn_implementation": implementation})
        config = model.get_base_model().config
        assert config._attn_implementation == f"ptuning_{implementation}"
        assert "ptuning" not in config.to_json_string()
        assert model.unload().config._attn_implementation == implementation


@pytest.mark.parametrize("family", sorted({"Llama", "GPT-2", "Mistral", "Gemma 2"} & set(FAMILIES)))
def test_the_shared_prompts_gradient_through_every_encoder(family) -> None:
    for kind in ("NONE", "MLP", "LSTM", "RESIDUAL"):
        options = {} if kind == "NONE" else {"encoder_hidden_size": 8}
        model = make_adapted(family, encoder_reparameterization_type=kind, **options)
        other, batch = concatenating(model), make_batch(family, "CAUSAL_LM")
        for each in (model, other):
            each(**batch, labels=batch["input_ids"]).loss.backward()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5 * two.grad.abs().max().item())


@pytest.mark.parametrize("kernel", ["merged", "joined"])
@pytest.mark.parametrize("family", SHARED)
def test_both_kernels_are_right_with_every_mask(family, kernel, monkeypatch) -> None:
    if kernel == "joined":
        monkeypatch.setattr(back_ends, "can_merge", lambda *args: False)
    model = make_adapted(family)
    other = concatenating(model)
    for lengths in ((S, S), (S, S - 2)):
        batch = make_batch(family, "CAUSAL_LM", lengths=lengths)
        seen = batch["attention_mask"].bool()
        for each in (batch, {"input_ids": batch["input_ids"]} if lengths == (S, S) else batch):
            torch.testing.assert_close(model(**each).logits[seen], other(**each).logits[seen], rtol=0, atol=1e-5)
            found, wanted = (
                gradient(m, **each, labels=batch["input_ids"].masked_fill(~seen, -100)) for m in (model, other)
            )
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("window", [V + S - 2, V + S - 1, V + S, V + S + 1])
@torch.no_grad()
def test_a_window_that_just_reaches_the_prompt(window) -> None:
    model = make_adapted("Mistral", sizes={"sliding_window": window})
    ids = make_batch("Mistral", "CAUSAL_LM", lengths=(S, S))["input_ids"]
    torch.testing.assert_close(
        model(input_ids=ids).logits, concatenating(model)(input_ids=ids).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("window", [V + 1, V + 4, V + S])
@torch.no_grad()
def test_a_static_cache_counts_the_step_once_for_the_layers_with_a_window(window) -> None:
    kinds = ["full_attention", "sliding_attention"]  # the first layer's cache is the one that is asked for its length
    model = make_adapted("Gemma 3", sizes={"sliding_window": window, "layer_types": kinds})
    batch = make_batch("Gemma 3", "CAUSAL_LM", (S, S - 2), pad_left=True)
    ids = torch.cat([batch["input_ids"], torch.tensor([[9, 8], [7, 6]])], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache = StaticCache(model.get_base_model().config, max_cache_len=20)
    model(**batch, **{CACHE: cache})
    for end in (S + 1, S + 2):
        found = model(input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], **{CACHE: cache}).logits
        torch.testing.assert_close(found[:, 0], expected[:, end - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["merged", "joined"])
@pytest.mark.parametrize("window", [None, 8])
@torch.no_grad()
def test_queries_of_the_last_tokens_only(kernel, window, monkeypatch) -> None:
    """Gemma 4 has layers that attend to the keys of others, for the tokens whose logits are asked for."""
    if kernel == "joined":
        monkeypatch.setattr(back_ends, "can_merge", lambda *args: False)
    module = stack_of(make_adapted()).layers[0].self_attn
    query, key, value = torch.randn(2, 4, S, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
    prompt = Prompt(("default",), V, states={0: (torch.randn(1, 2, V, 8), torch.randn(1, 2, V, 8))})
    in_front = attention.InFront(prompt, S, 0, None, torch.arange(V, V + S)[None])

    def attend(query: torch.Tensor) -> torch.Tensor:
        return in_front.attend(
            attention.sdpa_attention_forward, module, query, key, value, None, {"sliding_window": window}
        )[0]

    for tokens in (1, 3):
        torch.testing.assert_close(attend(query[:, :, -tokens:]), attend(query)[:, -tokens:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_hooks_and_dropout_are_seen_by_what_is_stored() -> None:
    model, batch = make_adapted(), make_batch("Llama", "CAUSAL_LM")
    before = model(**batch).logits
    handle = stack_of(model).layers[0].register_forward_hook(lambda module, args, output: output + 1.0)
    steered = model(**batch).logits
    model.forget_kept_prompts()
    assert torch.equal(model(**batch).logits, steered)
    handle.remove()
    assert torch.equal(model(**batch).logits, before)
    stack_of(model).layers[0].train()
    model.forget_kept_prompts()
    model(**batch)
    assert kept(model) == 0


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_layers_share_a_widened_mask(padded, monkeypatch) -> None:
    model = make_adapted(sizes={"attn_implementation": "eager", "num_hidden_layers": 4})
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(S, S - 2 if padded else S))
    expected = model(**batch).logits
    calls, widen = [], back_ends._widen

    def count(*args):
        calls.append(args)
        return widen(*args)

    monkeypatch.setattr(back_ends, "_widen", count)
    assert torch.equal(model(**batch).logits, expected)
    assert len(calls) == 1


def test_token_types_of_a_decoder_reach_the_prompt_whatever_the_batch() -> None:
    model, batch = make_adapted("GPT-2"), make_batch("GPT-2", "CAUSAL_LM", lengths=(S, S))
    batch["token_type_ids"] = batch["input_ids"] % 3
    together = model(**batch).logits
    alone = torch.cat([model(**{key: value[i : i + 1] for key, value in batch.items()}).logits for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, together, rtol=0, atol=1e-5)
        cache = StaticCache(model.get_base_model().config, max_cache_len=20)
        torch.testing.assert_close(model(**batch, **{CACHE: cache}).logits, together, rtol=0, atol=1e-5)
