# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Continuous batching answers each text as `generate` answers it alone, whatever is in flight beside it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import DECODERS, make_model
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from releases import CACHE
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache

from peft_ptuning_ext import PromptTemplate, use_adapters
from peft_ptuning_ext.prompts.adapter import find_layer


NEW = 5
TEXTS = [
    [5, 6, 7],
    [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21],
    [22],
    [30, 31, 32, 33, 34, 35],
    [40, 41],
    [50, 51, 52],
]
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)

# Attention of which a step's keys and values get out of reach: it does not go through transformers' interface.
OUT_OF_REACH = {"Bloom", "Falcon"}
FAMILIES = sorted(DECODERS.keys() - OUT_OF_REACH)
PROMPTS = {
    "input": {},
    "deep": {"prompt_depth": "DEEP"},
    "deep, with positions": {"prompt_depth": "DEEP", "shift_positions": True},
}


def settings(**options) -> ContinuousBatchingConfig:
    """A cache of 8 blocks of 4 tokens, which holds some of the texts at a time; 8 tokens a step, less than a text."""
    return ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 8, "max_batch_tokens": 8, **options})


def alone(model: PeftModel | PreTrainedModel, texts: list[list[int]] = TEXTS) -> list[list[int]]:
    """What `generate` answers to each text by itself."""
    ids = [torch.tensor([text]) for text in texts]
    masks = [torch.ones_like(row) for row in ids]
    answers = [
        model.generate(input_ids=row, attention_mask=mask, generation_config=GREEDY)
        for row, mask in zip(ids, masks, strict=True)
    ]
    return [answer[0, len(text) :].tolist() for answer, text in zip(answers, texts, strict=True)]


def together(model: PeftModel | PreTrainedModel, texts: list[list[int]] = TEXTS, **options) -> list[list[int]]:
    """What continuous batching answers to all texts."""
    config = options.pop("config", None) or settings()
    given = {"generation_config": GREEDY, "continuous_batching_config": config, **options}
    outputs = model.generate_batch(texts, **given)
    return [output.generated_tokens for output in outputs.values()]


def make_varied(family: str = "Llama", **options) -> PeftModel:
    """A model whose prompt matters: large, and other than the base's answers."""
    model = make_adapted(family, **options)
    vary(model)
    return model


@torch.no_grad()
def vary(model: PeftModel, adapter_name: str = "default") -> None:
    for parameter in find_layer(model).ptuning_encoders[adapter_name].parameters():
        parameter.add_(torch.randn_like(parameter))


@contextmanager
def serving(model: PeftModel | PreTrainedModel, **options) -> Iterator:
    """A manager whose thread is running."""
    given = {"generation_config": GREEDY, "continuous_batching_config": settings(), **options}
    with model.continuous_batching_context_manager(**given) as manager:
        yield manager


@pytest.mark.parametrize("prompt", ["input", "deep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_texts_are_answered_as_each_alone(family, prompt) -> None:
    if CACHE == "cache" and family in ("OPT", "GPT-NeoX"):
        pytest.skip(
            "transformers 5.24 gives them a paged cache that lacks what they ask it for, without a prompt, too"
        )
    model = make_varied(family, **PROMPTS[prompt])
    assert together(model) == alone(model)
    assert model.prompt_route == ("deep" if prompt == "deep" else "shared")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_without_the_adapter_the_base_answers(prompt) -> None:
    model = make_varied(**PROMPTS[prompt])
    of_base = alone(make_model("Llama", "CAUSAL_LM"))
    with model.disable_adapter():
        assert together(model) == of_base
    assert together(model) == alone(model) != of_base


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", ["GPT-2", "Gemma 3"])
def test_eager_attention(family, prompt) -> None:
    model = make_varied(family, sizes={"attn_implementation": "eager"}, **PROMPTS[prompt])
    expected = alone(model)
    assert together(model) == expected
    assert alone(model) == expected


def test_windows_that_end_within_the_prompt_and_behind_it() -> None:
    for window in (3, 8, 40):
        model = make_varied("Mistral", sizes={"sliding_window": window})
        assert together(model) == alone(model)


def test_the_blocks_of_a_common_beginning_are_shared(monkeypatch) -> None:
    found, search = [], PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(
        PagedAttentionCache, "search_prefix_match", lambda *args: found.append(search(*args)) or found[-1]
    )
    model, begin = make_varied(), list(range(5, 17))
    texts = [[*begin, 20], [*begin, 21, 22], [*begin, 23], begin, [*begin, 24]]
    assert together(model, texts) == alone(model, texts)
    assert max(found) >= 8
    found.clear()
    assert together(model, texts, config=settings(allow_block_sharing=False)) == alone(model, texts)
    assert not any(found)


def test_answers_can_be_streamed() -> None:
    model = make_varied()
    expected = alone(model)
    with serving(model) as manager:
        names = [manager.add_request(text, max_new_tokens=NEW, streaming=True) for text in TEXTS]
        streamed = {name: [] for name in names}
        while any(not outputs or not outputs[-1].is_finished() for outputs in streamed.values()):
            output = manager.get_result(timeout=60)
            streamed[output.request_id].append(output)
    for outputs, answer in zip(streamed.values(), expected, strict=True):
        assert outputs[-1].generated_tokens == answer
        assert len(outputs) == NEW


def test_several_answers_to_a_text() -> None:
    model = make_varied()
    several = copy.deepcopy(GREEDY)
    several.num_return_sequences = 2  # greedy: the same twice
    answers = together(model, generation_config=several, config=settings(num_blocks=16))
    expected = alone(model)
    assert answers[::2] == answers[1::2] == expected


def test_two_adapters_one_after_the_other() -> None:
    model = make_varied()
    model.add_adapter("other", make_config("CAUSAL_LM", prompt_depth="DEEP"))
    vary(model, "other")
    answers = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        answers[name] = together(model)
        assert answers[name] == alone(model)
    assert answers["default"] != answers["other"]


def test_a_prompt_on_a_model_of_transformers() -> None:
    model = make_model("Llama", "CAUSAL_LM")
    of_base = together(model)
    model.add_adapter(make_config("CAUSAL_LM"))
    vary(model)
    assert together(model) == alone(model) != of_base
    model.disable_adapters()
    assert together(model) == of_base
    model.enable_adapters()
    model.delete_adapter("default")
    assert together(model) == of_base


def test_a_manager_that_is_kept_serves_the_prompt_that_it_was_made_for() -> None:
    model = make_varied()
    model.add_adapter("other", make_config("CAUSAL_LM"))
    vary(model, "other")

    def answer() -> tuple[int, list[list[int]]]:
        answers = together(model, persistent_manager=True)
        assert answers == alone(model)
        return id(model.get_base_model()._cached_continuous_batching_manager), answers

    first, answers = answer()
    assert answer() == (first, answers)
    model.set_adapter("other")
    second, of_other = answer()
    assert second != first
    assert of_other != answers
    vary(model, "other")  # trained on
    third, trained = answer()
    assert third != second
    assert trained != of_other
    with model.disable_adapter():
        fourth, of_base = answer()
        assert fourth != third
        assert of_base != trained
    assert answer()[1] == trained
    model.get_base_model().destroy_cached_continuous_batching_manager()


def beside_lora() -> PeftModel:
    config, base = LoraConfig(target_modules=["v_proj"], init_lora_weights=False), make_model("Llama", "CAUSAL_LM")
    inject_adapter_in_model(config, base, "style")
    model = get_peft_model(base, make_config("CAUSAL_LM")).eval()
    vary(model)
    return model


def disable_lora(model: PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)


def train_lora(model: PeftModel) -> None:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(3)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("change", [disable_lora, train_lora, lambda model: model.merge_adapter()])
def test_a_manager_serves_a_prompt_beside_the_lora_that_it_was_made_for(change) -> None:
    model = beside_lora()
    before = together(model, persistent_manager=True)
    manager = model.get_base_model()._cached_continuous_batching_manager
    assert before == alone(model) == together(model, persistent_manager=True)
    assert model.get_base_model()._cached_continuous_batching_manager is manager
    change(model)
    assert together(model, persistent_manager=True) == alone(model)
    assert model.get_base_model()._cached_continuous_batching_manager is not manager
    model.get_base_model().destroy_cached_continuous_batching_manager()

    model = beside_lora()
    with serving(model) as manager:
        change(model)
        with pytest.raises(ValueError, match="beside adapters of other methods which have changed since"):
            manager.add_request(TEXTS[0])


CHANGES = {
    "another adapter": lambda model: model.set_adapter("other"),
    "no adapter": lambda model: model.base_model.disable_adapter_layers(),
    "trained on": vary,
    "unloaded": lambda model: model.unload(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manager_refuses_requests_once_the_prompt_is_another(change) -> None:
    model = make_varied()
    model.add_adapter("other", make_config("CAUSAL_LM"))
    with serving(model) as manager:
        CHANGES[change](model)
        with pytest.raises(ValueError, match="made under adapter 'default', and the prompt is another one now"):
            manager.add_request(TEXTS[0])


@pytest.mark.parametrize("change", ["another adapter", "no adapter", "trained on"])
def test_a_request_that_waits_fails_once_the_prompt_is_another(change) -> None:
    model = make_varied()
    model.add_adapter("other", make_config("CAUSAL_LM"))
    base = model.get_base_model()
    manager = base.init_continuous_batching(generation_config=GREEDY, continuous_batching_config=settings())
    manager.add_request(TEXTS[0])
    CHANGES[change](model)
    manager.start()
    while (output := manager.get_result(timeout=1)) is None:
        pass
    manager.stop()
    assert "the prompt is another one now" in output.error
    model.base_model.enable_adapter_layers()
    assert together(model) == alone(model)


def test_a_manager_of_the_base_model_refuses_requests_behind_a_prompt() -> None:
    model = make_varied()
    with model.disable_adapter(), serving(model) as manager:
        model.base_model.enable_adapter_layers()
        with pytest.raises(ValueError, match="made under no adapter"):
            manager.add_request(TEXTS[0])


@pytest.mark.parametrize("prompt", ["input", "deep"])
def test_other_calls_find_the_attention_as_it_was(prompt) -> None:
    model = make_varied(**PROMPTS[prompt])
    base = model.get_base_model()
    with serving(model):
        assert base.config._attn_implementation == "sdpa"
    assert base.config._attn_implementation == "ptuning_sdpa"
    with pytest.raises(ValueError, match="can't be compiled"):
        together(model, config=settings(default_compile_level=1))
    with pytest.raises(ZeroDivisionError):  # an error of transformers' own
        together(model, generation_config=GREEDY, config=settings(page_size=0))
    assert base.config._attn_implementation == "ptuning_sdpa"
    base = model.unload()
    assert base.config._attn_implementation == "sdpa"
    assert "init_continuous_batching" not in vars(base)


def test_generate_while_a_manager_is_running() -> None:
    model = make_varied()
    expected = alone(model)
    with serving(model) as manager:
        assert alone(model) == expected
        assert model.prompt_route.startswith("concatenated: its attention implementation was changed to 'sdpa'")
        manager.add_request(TEXTS[0], max_new_tokens=NEW)
        assert manager.get_result(timeout=60).generated_tokens == expected[0]


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_serves_its_own_prompt(make_copy) -> None:
    model = make_varied()
    copied = make_copy(model)
    vary(copied)
    assert together(copied) == alone(copied)
    assert together(model) == alone(model) != alone(copied)


def test_what_has_no_place_for_a_prompt_is_refused_before_anything_runs() -> None:
    for family in sorted(OUT_OF_REACH):
        for options in ({}, {"prompt_depth": "DEEP"}):
            with pytest.raises(ValueError, match="its attention does not go through.*Call `generate`"):
                together(make_adapted(family, **options))
    with pytest.raises(ValueError, match="it is no decoder"):
        together(make_adapted("T5", "SEQ_2_SEQ_LM"))
    model = make_adapted(
        "Llama", sizes={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    )
    with pytest.raises(ValueError, match="its rotary embedding depends on the length"):
        together(model)
    model = make_adapted(
        "Llama", length=2, prompt_template=PromptTemplate("{prompt:2} {text}", placeholder="x", placeholder_id=9)
    )
    with pytest.raises(ValueError, match="its slots are in the texts"):
        together(model)


def test_adapters_by_row_are_refused() -> None:
    model = make_adapted()
    for rows in ("default", ["default", "__base__"]):
        with use_adapters(model, rows), pytest.raises(ValueError, match="of adapters by row .* Call `generate`"):
            together(model)


def test_flash_attention_is_refused() -> None:
    model = make_varied()
    config = model.get_base_model().config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="its attention implementation is 'flash_attention_2', not one of"):
        together(model)
    config._attn_implementation = "ptuning_sdpa"
    with serving(model) as manager:
        config._attn_implementation = "flash_attention_2"
        manager.add_request(TEXTS[0])
        while (output := manager.get_result(timeout=1)) is None:
            pass
        config._attn_implementation = "sdpa"
    assert "was changed to 'flash_attention_2' while continuous batching" in output.error


def test_a_text_that_has_no_positions_left_is_refused() -> None:
    model = make_varied("GPT-2")
    with pytest.raises(ValueError, match="Truncate the text to"):
        together(model, [[5] * 62])
    with serving(model) as manager, pytest.raises(ValueError, match="Truncate the text to"):
        manager.add_request([5] * 62)
