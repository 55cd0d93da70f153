# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`trainable_token_indices`: rows of the vocabulary trained beside the prompt, by PEFT's TrainableTokens."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import safetensors.torch
import torch
from families import make_model
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, get_peft_model
from reference import V, concatenated, main_output, make_batch
from tiny_tokenizers import make_tokenizer
from transformers import PreTrainedModel

from peft_ptuning_ext import (
    PTuningConfig,
    export_standalone,
    export_to_peft,
    fold_prompt,
    make_model_card,
    to_prompt_embeds,
)


ROWS = [7, 60]
TRAINED = {"trainable_token_indices": ROWS}
WEIGHTS = "adapter_model.safetensors"
PLACES = [
    ("Llama", "CAUSAL_LM", {"tie_word_embeddings": False}, "embed_tokens"),
    ("Llama", "CAUSAL_LM", {"tie_word_embeddings": True}, "embed_tokens"),
    ("Gemma 3", "CAUSAL_LM", {"tie_word_embeddings": True}, "model.embed_tokens"),
    ("GPT-2", "CAUSAL_LM", {}, "wte"),
    ("BERT", "TOKEN_CLS", {}, "word_embeddings"),
    ("T5", "SEQ_2_SEQ_LM", {}, "shared"),
    ("BART", "SEQ_2_SEQ_LM", {}, "shared"),
]
places = pytest.mark.parametrize(("family", "task", "options", "name"), PLACES)


def make_batch_with_rows(family: str, task: str) -> dict:
    batch = make_batch(family, task)
    batch["input_ids"][:, 1:3] = torch.tensor(ROWS)
    return batch


def move(model: PeftModel) -> None:
    """Moves everything that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def rows_of(model: PeftModel, adapter_name: str = "default") -> torch.Tensor:
    return next(p for n, p in model.named_parameters() if n.endswith(f"trainable_tokens_delta.{adapter_name}"))


@torch.no_grad()
def out(model, family: str, task: str) -> torch.Tensor:
    return main_output(model(**make_batch_with_rows(family, task)))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # memory from a file is aligned otherwise


def with_rows(base: PreTrainedModel, rows: torch.Tensor) -> PreTrainedModel:
    """A plain model whose table has `rows` in place of its own, and with it whatever is tied to the table."""
    with torch.no_grad():
        base.get_input_embeddings().weight[ROWS] = rows
    return base


@places
@pytest.mark.parametrize("by_name", [False, True])
def test_trained_rows_are_those_of_a_model_that_has_them(family, task, options, name, by_name) -> None:
    model = make_adapted(family, task, options, trainable_token_indices={name: ROWS} if by_name else ROWS)
    plain = make_adapted(family, task, options)
    assert torch.equal(out(model, family, task), out(plain, family, task))  # rows start as they are
    base = {name: value.clone() for name, value in model.get_base_model().state_dict().items()}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = rows_of(model).clone()
    main_output(model(**make_batch_with_rows(family, task))).square().mean().backward()
    optimizer.step()
    assert (rows_of(model) - before).abs().amax(dim=1).min() > 0
    for name, value in model.get_base_model().state_dict().items():
        is_trained = any(part in name for part in ("trainable_tokens_delta", "ptuning_", "modules_to_save"))
        assert is_trained or torch.equal(value, base[name]), name

    move(model)
    expected = with_rows(make_model(family, task, **options), rows_of(model))
    if task == "TOKEN_CLS":
        expected.classifier.load_state_dict(model.get_base_model().classifier.modules_to_save["default"].state_dict())
    expected = concatenated(expected, task, model.prompt_embeddings(), make_batch_with_rows(family, task))
    mask = make_batch_with_rows(family, task)["attention_mask"].bool()
    found = out(model, family, task)
    if task != "SEQ_2_SEQ_LM":
        expected, found = expected[mask], found[mask]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@places
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_trained_rows_are_saved_and_loaded(family, task, options, name, low_cpu_mem_usage, tmp_path) -> None:
    def make() -> PreTrainedModel:
        return make_model(family, task, **options)

    model = make_adapted(family, task, options, **TRAINED)
    move(model)
    expected = out(model, family, task)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / WEIGHTS)
    rows = [value for key, value in weights.items() if key.endswith(".token_adapter.trainable_tokens_delta")]
    assert [tuple(value.shape) for value in rows] == [tuple(rows_of(model).shape)]
    assert not [key for key in weights if "ptuning_" not in key and "token_" not in key and "classifier" not in key]

    loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same(out(loaded, family, task), expected)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    resumed = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert rows_of(resumed).requires_grad
    model.save_pretrained(tmp_path / "vocabulary", save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "vocabulary").eval()
    assert_same(out(loaded, family, task), expected)
    in_transformers = make()
    if task != "TOKEN_CLS":  # transformers leaves heads out of the adapter
        in_transformers.load_adapter(tmp_path)
        assert_same(out(in_transformers.eval(), family, task), expected)


@places
def test_several_adapters_with_and_without_trained_rows(family, task, options, name, tmp_path) -> None:
    base = make_model(family, task, **options)
    modules = [(name, type(module)) for name, module in base.named_modules()]
    plain = out(base, family, task)
    model = get_peft_model(base, make_config(task)).eval()
    first = out(model, family, task)
    model.add_adapter("rows", make_config(task, **TRAINED))
    model.add_adapter("others", make_config(task, trainable_token_indices=[8, 7, 9]))
    assert torch.equal(out(model.eval(), family, task), first)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "ptuning_" in name} == {
        "default"
    }
    model.set_adapter("rows")
    move(model)
    moved = out(model, family, task)
    assert rows_of(model, "rows").requires_grad
    assert not rows_of(model, "others").requires_grad
    model.set_adapter("default")
    assert torch.equal(out(model, family, task), first)
    model.set_adapter("rows")
    assert torch.equal(out(model, family, task), moved)
    with model.disable_adapter():
        assert torch.equal(out(model, family, task), plain)
    assert torch.equal(out(copy.deepcopy(model), family, task), moved)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family, task, **options), tmp_path / "rows").eval()
    assert_same(out(loaded, family, task), moved)
    loaded.load_adapter(tmp_path, "without")
    loaded.set_adapter("without")
    assert_same(out(loaded, family, task), first)
    model.delete_adapter("others")
    assert torch.equal(out(model, family, task), moved)
    base = model.unload()
    assert [(name, type(module)) for name, module in base.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(out(base, family, task), plain)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_trained_in_full_is_not_tied(tied, tmp_path) -> None:
    """As trainers set it for a chat template with new tokens; the head is then a copy of its own."""
    trained = {"trainable_token_indices": {"embed_tokens": ROWS}, "modules_to_save": ["lm_head"]}
    model = make_adapted(sizes={"tie_word_embeddings": tied}, **trained)
    move(model)
    expected = out(model, "Llama", "CAUSAL_LM")
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    by_hand = with_rows(make_model("Llama", "CAUSAL_LM", tie_word_embeddings=False), rows_of(model))
    if tied:
        by_hand.model.load_state_dict(make_model("Llama", "CAUSAL_LM", tie_word_embeddings=True).model.state_dict())
        with_rows(by_hand, rows_of(model))
    by_hand.lm_head.weight = torch.nn.Parameter(head.detach().clone())
    batch = make_batch_with_rows("Llama", "CAUSAL_LM")
    mask = batch["attention_mask"].bool()
    reference = concatenated(by_hand, "CAUSAL_LM", model.prompt_embeddings(), batch)
    torch.testing.assert_close(expected[mask], reference[mask], rtol=0, atol=2e-5)
    for save_embedding_layers in (False, True):
        model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
        loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM", tie_word_embeddings=tied), tmp_path).eval()
        assert_same(out(loaded, "Llama", "CAUSAL_LM"), expected)


def test_what_is_kept_between_calls_sees_the_rows() -> None:
    model = make_adapted(**TRAINED)
    first = out(model, "Llama", "CAUSAL_LM")
    assert torch.equal(out(model, "Llama", "CAUSAL_LM"), first)
    rows_of(model).data += 1
    assert not torch.allclose(out(model, "Llama", "CAUSAL_LM"), first)


def test_rows_of_a_half_precision_model_are_trained_in_single() -> None:
    model = get_peft_model(make_model("Llama", "CAUSAL_LM").bfloat16(), make_config("CAUSAL_LM", **TRAINED))
    assert rows_of(model).dtype == torch.float32
    assert out(model, "Llama", "CAUSAL_LM").dtype == torch.bfloat16


BAD = {
    "behind the table": ([98, 99], {}, "has id 99, and 'model.embed_tokens' has 99 rows. Call `resize_token"),
    "no such module": ({"wte": ROWS}, {}, "names 'wte', and LlamaForCausalLM has no such module"),
    "no table": ({"model": ROWS}, {}, "names 'model', a LlamaModel and no table of tokens"),
    "named twice": ({"lm_head": ROWS}, {"modules_to_save": ["lm_head"]}, "'lm_head' is named by `trainable_token_in"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("beside", [False, True])
def test_rows_that_are_not_there_leave_the_model_as_it_was(case, beside) -> None:
    indices, options, message = BAD[case]
    base = make_model("Llama", "CAUSAL_LM")
    model = get_peft_model(base, make_config("CAUSAL_LM")) if beside else base
    before = [(name, type(module)) for name, module in base.named_modules()]
    expected = out(model, "Llama", "CAUSAL_LM")
    config = make_config("CAUSAL_LM", trainable_token_indices=indices, **options)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("bad", config) if beside else get_peft_model(base, config)
    assert config.trainable_token_indices == indices
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert torch.equal(out(model, "Llama", "CAUSAL_LM"), expected)


@pytest.mark.parametrize("beside", [False, True])
def test_a_tied_head_with_a_bias_is_refused(beside) -> None:
    """PEFT's TrainableTokens would leave the bias out. The check comes after the wrapping, which is undone."""
    base = make_model("BERT", "masked LM")
    model = get_peft_model(base, make_config()) if beside else base
    before = [(name, type(module)) for name, module in base.named_modules()]
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="'cls.predictions.decoder', which has a bias"):
        model.add_adapter("bad", make_config(**TRAINED)) if beside else get_peft_model(base, make_config(**TRAINED))
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert [name for name, parameter in base.named_parameters() if parameter.requires_grad] == trained


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *[("7", TypeError), ([1.0], TypeError), ({"wte": 7}, TypeError), ([True], TypeError)],
        *[([], ValueError), ([-1], ValueError), ([7, 7], ValueError), ({}, ValueError), ({"": [7]}, ValueError)],
    ],
)
def test_the_field_takes_what_loras_takes(value, error) -> None:
    with pytest.raises(error, match="`trainable_token_indices` must"):
        make_config("CAUSAL_LM", trainable_token_indices=value)
    config = make_config("CAUSAL_LM", **TRAINED)
    config.trainable_token_indices = value  # as trainers do
    with pytest.raises(error, match="`trainable_token_indices` must"):
        get_peft_model(make_model("Llama", "CAUSAL_LM"), config)


def test_the_field_is_that_of_lora() -> None:
    ours, loras = (dataclasses.fields(config) for config in (PTuningConfig, LoraConfig))
    (ours,), (loras,) = ([f for f in fields if f.name == "trainable_token_indices"] for fields in (ours, loras))
    assert (ours.type, ours.default) == (loras.type, loras.default)


def test_exports_say_what_they_have_no_place_for(tmp_path) -> None:
    model = make_adapted(encoder_hidden_size=8, **TRAINED)
    move(model)
    expected = out(model, "Llama", "CAUSAL_LM")
    with pytest.raises(ValueError, match="`trainable_token_indices`"):
        export_standalone(model, make_tokenizer("Llama 3"), tmp_path / "out")
    with pytest.raises(ValueError, match="`trainable_token_indices`"):
        export_to_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    embeds = to_prompt_embeds(model, torch.tensor(ROWS))
    torch.testing.assert_close(embeds[V:], rows_of(model).detach())
    model.add_adapter("second", make_config("CAUSAL_LM", **TRAINED))
    with pytest.raises(ValueError, match="Activate 'second' with `set_adapter` first"):
        to_prompt_embeds(model, torch.tensor(ROWS), "second")
    fold_prompt(model)
    assert torch.equal(out(model, "Llama", "CAUSAL_LM"), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path).eval()
    assert_same(out(loaded, "Llama", "CAUSAL_LM"), expected)


def test_a_card_does_not_take_rows_for_a_head() -> None:
    model = make_adapted("BERT", "SEQ_CLS", {"num_labels": 3}, **TRAINED)
    model.peft_config["default"].base_model_name_or_path = "some/model"
    assert "num_labels=3" in make_model_card(model, "me/mine").text
