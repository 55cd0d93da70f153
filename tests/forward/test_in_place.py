# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens in the places of a template: the base model on embeddings that were put together by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from families import CELLS, DECODERS, ENCODER_DECODERS, ENCODERS, FAMILIES, make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from reference import V, embedding_and_backbone, main_output, make_batch, make_labels, textbook_loss, unmasked
from releases import CACHE, CHECKPOINTING
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from peft_ptuning_ext import PromptTemplate, export_standalone, export_to_peft, fold_prompt, to_prompt_embeds


SLOT = 4  # the placeholder's id; no text of `make_batch` has it, nor is it a family's padding
TEMPLATE = PromptTemplate(f"{{a}}{{prompt:{V}}}", placeholder="<slot>", placeholder_id=SLOT)
PLACES = {"prefix": [0] * V, "infix": [1, 1, 2, 3, 3], "suffix": [4] * V}
S = 6
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [SLOT]}
WAYS: dict[str, dict] = {
    "greedy": NEW,
    "beam search": NEW | {"num_beams": 3},
    "sampling with a penalty": NEW | {"do_sample": True, "top_k": 20, "repetition_penalty": 1.8},
    "several sequences": NEW | {"do_sample": True, "num_return_sequences": 2},
    "no cache": NEW | {"use_cache": False},
    "static cache": NEW | {"cache_implementation": "static"},
}
DECODERS_ONLY = {
    "chunked prefill": NEW | {"prefill_chunk_size": 4},
    "static cache, chunked prefill": NEW | {"cache_implementation": "static", "prefill_chunk_size": 3},
    "prompt lookup": NEW | {"prompt_lookup_num_tokens": 3},
}

# What has no meaning where all is computed anew at every step.
OURS = {"use_cache", "cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens"}

cells = pytest.mark.parametrize(("family", "task"), CELLS, ids=lambda value: value.replace(" ", "-"))
places = pytest.mark.parametrize("place", PLACES)


def make_templated(family: str = "Llama", task: str = "CAUSAL_LM", **options) -> PeftModel:
    return make_adapted(family, task, prompt_template=TEMPLATE, **options)


def with_slots(batch: dict, place: str) -> dict:
    """The batch with a slot before each of the columns of `place`, counted from where a text begins."""
    columns = torch.tensor(PLACES[place])
    shape = batch["input_ids"].shape
    ids, mask = batch["input_ids"].reshape(-1, shape[-1]), batch["attention_mask"].reshape(-1, shape[-1])
    rows = []
    for row, seen in zip(ids, mask, strict=True):
        start = int(seen.argmax())  # what stands in front is padding
        order = torch.cat([columns + start, torch.arange(len(row)) + 0.5]).argsort(stable=True)
        slots, ones = torch.full((V,), SLOT), torch.ones(V, dtype=torch.long)
        rows.append((torch.cat([slots, row])[order], torch.cat([ones, seen])[order]))
    ids, mask = (torch.stack(column).view(*shape[:-1], -1) for column in zip(*rows, strict=True))
    return {**batch, "input_ids": ids, "attention_mask": mask}


def by_hand(base: PreTrainedModel, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The embeddings of ids (B, S) in which the prompt's vectors stand at the slots of each row: (B, S, H)."""
    embedding, _ = embedding_and_backbone(base)
    embeds = embedding(ids)
    rows = []
    for row, values in zip(ids.tolist(), embeds, strict=True):
        vectors = iter(prompt)
        rows.append(torch.stack([next(vectors) if i == SLOT else value for i, value in zip(row, values, strict=True)]))
    return torch.stack(rows)


@contextmanager
def replacing_embeddings(base: PreTrainedModel, prompt: torch.Tensor) -> Iterator[None]:
    """Lets the base model read the prompt's vectors where the ids have slots; nothing but the embedding knows."""
    table, stack = embedding_and_backbone(base)

    def replace(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        slots = args[0] == SLOT
        return torch.where(slots[..., None], prompt[(slots.long().cumsum(-1) - 1).clamp(0, V - 1)], output)

    with ExitStack() as hooks:
        for module in stack.modules():  # T5 has the table in several modules
            if getattr(module, "weight", None) is table.weight and isinstance(module, nn.Embedding):
                hooks.enter_context(module.register_forward_hook(replace))
        yield


def expected_output(base: PreTrainedModel, prompt: torch.Tensor, batch: dict) -> torch.Tensor:
    with replacing_embeddings(base, prompt):
        return main_output(base(**batch))


@cells
@places
@torch.no_grad()
def test_equals_the_base_with_other_embeddings_at_the_slots(family: str, task: str, place: str) -> None:
    model = make_templated(family, task)
    batch = with_slots(make_batch(family, task), place)
    expected = expected_output(make_model(family, task), model.prompt_embeddings(), batch)
    assert model.prompt_route == "in place"
    output, mask = main_output(model(**batch)), batch["attention_mask"]
    assert output.shape == expected.shape
    # Decoders count what is no padding: padding itself has other positions than by itself.
    torch.testing.assert_close(unmasked(output, mask), unmasked(expected, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@places
@torch.no_grad()
def test_equals_the_base_on_inputs_embeds(family: str, place: str) -> None:
    """The other definition, for the backbone alone and texts without padding."""
    model, base = make_templated(family, "FEATURE_EXTRACTION"), make_model(family, "FEATURE_EXTRACTION")
    batch = with_slots(make_batch(family, "FEATURE_EXTRACTION", lengths=(S, S)), place)
    ids = batch.pop("input_ids")
    embeds = by_hand(base, model.prompt_embeddings(), ids)
    expected = main_output(base(inputs_embeds=embeds, **batch))
    torch.testing.assert_close(main_output(model(input_ids=ids, **batch)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ENCODERS | DECODERS)
@torch.no_grad()
def test_all_slots_in_front_are_todays_prompt(family: str) -> None:
    model, in_front = make_templated(family, "FEATURE_EXTRACTION"), make_adapted(family, "FEATURE_EXTRACTION")
    batch = make_batch(family, "FEATURE_EXTRACTION")
    output = main_output(model(**with_slots(batch, "prefix")))[:, V:]
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(output[mask], main_output(in_front(**batch))[mask], rtol=0, atol=1e-5)


@cells
@torch.no_grad()
def test_padding_changes_nothing(family: str, task: str) -> None:
    """On the left it changes nothing where it changes nothing for the base model, whose positions these are."""
    model = make_templated(family, task)
    alone = with_slots(make_batch(family, task, lengths=(4,)), "infix")
    for pad_left in (False, True) if FAMILIES[family].kind == "decoder" else (False,):
        batch = with_slots(make_batch(family, task, lengths=(4, S + 3), pad_left=pad_left), "infix")
        alone |= {key: value[:1] for key, value in batch.items() if key.startswith("decoder")}
        if pad_left and task in ("CAUSAL_LM", "FEATURE_EXTRACTION", "TOKEN_CLS") and family not in ("Bloom", "OPT"):
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        elif pad_left:
            continue
        output, expected = main_output(model(**batch))[0], main_output(model(**alone))[0]
        if output.shape[0] == S + 3 + V:
            output = output[batch["attention_mask"][0].bool()]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["RoBERTa", "XLM-R", "MPNet"])
@torch.no_grad()
def test_positions_are_counted_from_the_ids_without_a_mask_too(family: str) -> None:
    model = make_templated(family, "TOKEN_CLS")
    batch = with_slots(make_batch(family, "TOKEN_CLS", pad_left=True), "infix")
    del batch["attention_mask"]
    expected = expected_output(make_model(family, "TOKEN_CLS"), model.prompt_embeddings(), batch)
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=1e-6)


@cells
@torch.no_grad()
def test_disabled_is_the_base_on_the_same_ids(family: str, task: str) -> None:
    model = make_templated(family, task)
    batch = with_slots(make_batch(family, task), "infix")
    with model.disable_adapter():
        assert torch.equal(main_output(model(**batch)), main_output(make_model(family, task)(**batch)))
    assert torch.equal(main_output(model.unload()(**batch)), main_output(make_model(family, task)(**batch)))


@cells
def test_the_gradient_reaches_every_vector(family: str, task: str) -> None:
    model = make_templated(family, task)
    batch = with_slots(make_batch(family, task), "infix")
    prompt = model.prompt_embeddings().detach().requires_grad_()
    expected = unmasked(expected_output(make_model(family, task), prompt, batch), batch["attention_mask"])
    weights = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), prompt)
    output = unmasked(main_output(model(**batch)), batch["attention_mask"])
    (output * weights).sum().backward()
    (gradient,) = (p.grad for n, p in model.named_parameters() if "ptuning_" in n)
    assert gradient.norm(dim=1).min() > 0
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"])
def test_labels_are_those_of_the_ids(task: str) -> None:
    model = make_templated("Llama", task)
    batch = with_slots(make_batch("Llama", task), "infix")
    labels = make_labels(task, batch)
    output = model(**batch, **labels)
    torch.testing.assert_close(output.loss, textbook_loss(task, output, labels))


@pytest.mark.parametrize("way", WAYS | DECODERS_ONLY)
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_generating(family: str, way: str) -> None:
    """As the base whose embedding alone is replaced: processors, caches and masks are its own."""
    if family == "Falcon" and way == "static cache, chunked prefill":
        return  # transformers' own Falcon can't do that
    arguments = (WAYS | DECODERS_ONLY)[way]
    model, base = make_templated(family), make_model(family, "CAUSAL_LM")
    lengths = (S,) if "prompt_lookup_num_tokens" in arguments else (S, S - 2)
    batch = with_slots(make_batch(family, "CAUSAL_LM", lengths=lengths, pad_left=True), "infix")
    torch.manual_seed(1)
    generated = model.generate(**batch, **arguments)
    torch.manual_seed(1)
    arguments = {key: value for key, value in arguments.items() if key not in OURS}
    with replacing_embeddings(base, model.prompt_embeddings()):
        expected = base.generate(**batch, **arguments, use_cache=False)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_generating_from_an_encoder(family: str, way: str) -> None:
    model, base = make_templated(family, "SEQ_2_SEQ_LM"), make_model(family, "SEQ_2_SEQ_LM")
    batch = with_slots(make_batch(family, "SEQ_2_SEQ_LM"), "infix")
    del batch["decoder_input_ids"]
    torch.manual_seed(1)
    generated = model.generate(**batch, **WAYS[way])
    embeds = by_hand(base, model.prompt_embeddings(), batch.pop("input_ids"))
    torch.manual_seed(1)
    assert torch.equal(generated, base.generate(inputs_embeds=embeds, **batch, **WAYS[way]))


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Bloom"])
@torch.no_grad()
def test_assisted_generation(family: str) -> None:
    model = make_templated(family)
    batch = with_slots(make_batch(family, "CAUSAL_LM", lengths=(S,)), "infix")
    expected = model.generate(**batch, **NEW)
    assert torch.equal(model.generate(**batch, **NEW, assistant_model=make_model(family, "CAUSAL_LM")), expected)
    assert torch.equal(model.generate(**batch, **NEW, assistant_model=model), expected)


@torch.no_grad()
def test_a_cache_goes_on() -> None:
    model = make_templated()
    batch = with_slots(make_batch("Llama", "CAUSAL_LM", lengths=(S, S)), "infix")
    ids, whole = batch["input_ids"], model(**batch).logits
    cache = DynamicCache()
    parts = [model(input_ids=part, **{CACHE: cache}).logits for part in ids.split([3, 4, 2, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == ids.shape[1]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    token = torch.tensor([[7], [8]])
    expected = model(input_ids=torch.cat([ids, token], dim=1)).logits[:, -1:]
    torch.testing.assert_close(model(input_ids=token, **{CACHE: copied}).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_static_cache_is_used_again_after_reset() -> None:
    model = make_templated()
    batch = with_slots(make_batch("Llama", "CAUSAL_LM", lengths=(S, S)), "infix")
    cache = StaticCache(model.config, max_cache_len=32)
    first = model.generate(**batch, **NEW, **{CACHE: cache})
    cache.reset()
    assert torch.equal(model.generate(**batch, **NEW, **{CACHE: cache}), first)


@torch.no_grad()
def test_what_is_refused_in_a_call() -> None:
    model, plain = make_templated(), make_batch("Llama", "CAUSAL_LM", lengths=(S, S))
    batch = with_slots(plain, "infix")
    with pytest.raises(ValueError, match="Row 0 of `input_ids` has 0 tokens.*template has 5"):
        model(**plain)
    ids = batch["input_ids"].clone()
    ids[1, 1] = 9
    with pytest.raises(ValueError, match="Row 1 of `input_ids` has 4 tokens.*template has 5"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="Row 1 of `input_ids` has 4 tokens.*with those in the cache.*has 5"):
        model.generate(input_ids=ids, **NEW)
    ids[1, :2] = SLOT
    ids[1, -1] = SLOT
    with pytest.raises(ValueError, match="Row 1 of `input_ids` has 7 tokens"):
        model.generate(input_ids=ids, **NEW)
    embeds = embedding_and_backbone(model.get_base_model())[0](ids)
    with pytest.raises(ValueError, match="got `inputs_embeds`, and.*by their token id"):
        model(inputs_embeds=embeds)
    cache = DynamicCache()
    model(**batch, **{CACHE: cache})
    with pytest.raises(ValueError, match="Row 0 of `input_ids` has 5 more tokens"):
        model(input_ids=batch["input_ids"], **{CACHE: cache})
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="filled under adapter 'default', and now no adapter"),
    ):
        model(input_ids=plain["input_ids"], **{CACHE: cache})


@torch.no_grad()
def test_a_placeholder_that_was_generated_is_a_token() -> None:
    """The device is not asked at every step whether there is one."""
    model, base = make_templated(), make_model("Llama", "CAUSAL_LM")
    batch = with_slots(make_batch("Llama", "CAUSAL_LM", lengths=(S, S)), "infix")
    prompt, cache = model.prompt_embeddings(), DynamicCache()
    model(**batch, **{CACHE: cache})
    found = model(input_ids=torch.full((2, 1), SLOT), **{CACHE: cache}).logits
    table, _ = embedding_and_backbone(base)
    embeds = torch.cat([by_hand(base, prompt, batch["input_ids"]), table(torch.full((2, 1), SLOT))], dim=1)
    torch.testing.assert_close(found, base(inputs_embeds=embeds).logits[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["NONE", "MLP", "LSTM", "RESIDUAL"])
@torch.no_grad()
def test_saved_and_loaded(encoder: str, tmp_path) -> None:
    model = make_templated("BERT", "SEQ_CLS", encoder_reparameterization_type=encoder)
    batch = with_slots(make_batch("BERT", "SEQ_CLS"), "infix")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path).eval()
    assert loaded.peft_config["default"].prompt_template == TEMPLATE
    assert torch.equal(loaded(**batch).logits, expected)
    fold_prompt(loaded)
    assert torch.equal(loaded(**batch).logits, expected)
    assert torch.equal(copy.deepcopy(loaded)(**batch).logits, expected)


@torch.no_grad()
def test_beside_an_adapter_in_front_and_one_with_another_placeholder() -> None:
    model = make_templated()
    other = PromptTemplate("{a}{prompt:3}", placeholder="<other>", placeholder_id=3)
    model.add_adapter("front", make_config("CAUSAL_LM"))
    model.add_adapter("other", make_config("CAUSAL_LM", length=3, prompt_template=other))
    batch = with_slots(make_batch("Llama", "CAUSAL_LM"), "infix")
    before = model(**batch).logits
    model.set_adapter("front")
    assert model.prompt_route == "shared"
    assert not torch.allclose(model(**batch).logits, before)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="has 0 tokens"):
        model(**batch)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, before)


def test_rows_of_the_vocabulary_train_beside_it(tmp_path) -> None:
    model = make_templated(trainable_token_indices=[7, 8])
    batch = with_slots(make_batch("Llama", "CAUSAL_LM"), "infix")
    batch["input_ids"][:, 0] = 7
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 2
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data += 0.1
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make_templated().train()
    batch = with_slots(make_batch("Llama", "CAUSAL_LM"), "infix")
    gradients = []
    for reentrant in (None, True, False):
        if reentrant is not None:
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(next(p.grad.clone() for p in model.parameters() if p.grad is not None))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@torch.no_grad()
def test_compiled() -> None:
    model = make_templated("Llama")
    batch = with_slots(make_batch("Llama", "CAUSAL_LM"), "infix")
    expected = model(**batch).logits
    compiled = torch.compile(model, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_exports(tmp_path) -> None:
    model = make_templated()
    batch = with_slots(make_batch("Llama", "CAUSAL_LM", lengths=(S,)), "infix")
    embeds = to_prompt_embeds(model, batch["input_ids"])
    expected = by_hand(make_model("Llama", "CAUSAL_LM"), model.prompt_embeddings(), batch["input_ids"])[0]
    assert torch.equal(embeds, expected)
    with pytest.raises(ValueError, match="has 4 tokens with the placeholder's id.*template has 5"):
        to_prompt_embeds(model, batch["input_ids"][:, 2:])
    with pytest.raises(ValueError, match="has a prompt template, and stock PEFT"):
        export_to_peft(model, str(tmp_path))
    with pytest.raises(ValueError, match="has a prompt template, and in a standalone folder"):
        export_standalone(model, None, str(tmp_path))


def test_a_placeholder_without_a_row_is_refused() -> None:
    base = make_model("BERT", "SEQ_CLS")
    template = PromptTemplate("{a}{prompt}", placeholder="<new>", placeholder_id=99)
    with pytest.raises(ValueError, match="'<new>' of `prompt_template` has id 99.*has 99 embeddings"):
        get_peft_model(base, make_config("SEQ_CLS", length=1, prompt_template=template))
    assert not any("ptuning" in name for name, _ in base.named_modules())
