# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A prompt beside adapters of other methods: LoRA, DoRA, IA³, TrainableTokens.

The reference is the base with the other adapters alone, given the explicit concatenation.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft.functional
import pytest
import torch
from families import make_model
from making import make_adapted, make_arguments, make_config
from peft import (
    IA3Config,
    KasaConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.helpers import rescale_adapter_scale
from reference import concatenated, embedding_and_backbone, make_batch, make_labels, textbook_loss, unmasked
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint


pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]

LORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def lora(**options) -> LoraConfig:
    return LoraConfig(**{**LORA, **options})


METHODS: dict[str, Callable[[], list[PeftConfig]]] = {
    "LoRA": lambda: [lora()],
    "DoRA": lambda: [lora(use_dora=True)],
    "IA3": lambda: [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)
    ],
    "LoRA, IA3": lambda: [*METHODS["LoRA"](), *METHODS["IA3"]()],
    "tokens, LoRA": lambda: [TrainableTokensConfig(token_indices=[7, 9], init_weights=False), lora()],
    "LoRA with rows": lambda: [lora(trainable_token_indices=[7, 9])],
}


# PEFT warns of the name "lora", which its own names contain.
NAMES = {"LORA": "style", "IA3": "scale", "TRAINABLE_TOKENS": "rows"}


def add_others(base: nn.Module, method: str = "LoRA") -> None:
    """Puts adapters of other methods into a base model, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for config in METHODS[method]():
            inject_adapter_in_model(config, base, NAMES[config.peft_type.value])
        for name, parameter in base.named_parameters():
            if "trainable_tokens_delta" in name:  # a LoRA's rows start as they are
                parameter.data.normal_()
    base.eval()


def with_others(family: str = "Llama", task: str = "CAUSAL_LM", method: str = "LoRA") -> PreTrainedModel:
    """The reference's model."""
    base = make_model(family, task)
    add_others(base, method)
    return base


def lora_first(config: LoraConfig) -> nn.Module:
    base = make_model("Llama", "CAUSAL_LM")
    get_peft_model(base, config, adapter_name="style")
    return get_peft_model(base, make_config("CAUSAL_LM"), adapter_name="prompt")


def prompt_first(config: LoraConfig) -> nn.Module:
    base = make_model("Llama", "CAUSAL_LM")
    model = get_peft_model(base, make_config("CAUSAL_LM"), adapter_name="prompt")
    get_peft_model(base, config, adapter_name="style")
    return model


def injected(config: LoraConfig) -> nn.Module:
    base = inject_adapter_in_model(config, make_model("Llama", "CAUSAL_LM"), "style")
    return get_peft_model(base, make_config("CAUSAL_LM"), adapter_name="prompt")


def in_a_lora_model(config: LoraConfig) -> nn.Module:
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), config, adapter_name="style")
    inject_adapter_in_model(make_config("CAUSAL_LM"), model.get_base_model(), "prompt")
    return model


def in_a_mixed_model(config: LoraConfig) -> nn.Module:
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), config, adapter_name="style", mixed=True)
    inject_adapter_in_model(make_config("CAUSAL_LM"), model.base_model.model, "prompt")
    return model


def by_transformers(config: LoraConfig) -> nn.Module:
    model = make_model("Llama", "CAUSAL_LM")
    model.add_adapter(config, "style")
    model.add_adapter(make_config("CAUSAL_LM"), "prompt")
    model.set_adapter(["style", "prompt"])
    return model


def by_transformers_prompt_first(config: LoraConfig) -> nn.Module:
    model = make_model("Llama", "CAUSAL_LM")
    model.add_adapter(make_config("CAUSAL_LM"), "prompt")
    model.add_adapter(config, "style")
    model.set_adapter(["style", "prompt"])
    return model


IN_PEFT = [lora_first, prompt_first, injected]
WAYS = [*IN_PEFT, in_a_lora_model, in_a_mixed_model, by_transformers, by_transformers_prompt_first]


def adapted(way: Callable = lora_first, method: str | None = None) -> nn.Module:
    """A Llama with both adapters, `"style"` and `"prompt"`, in evaluation mode; the same weights in every way."""
    torch.manual_seed(0)
    model = way(lora() if method is None else METHODS[method]()[0]).eval()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _, parameter in sorted(trained(model).items()):
            parameter.data.normal_(std=0.3)
    return model


def beside(method: str, family: str = "Llama", task: str = "CAUSAL_LM", **options) -> PeftModel:
    """A model with the adapters of `method` and a prompt."""
    torch.manual_seed(0)
    return get_peft_model(with_others(family, task, method), make_config(task, **options), "prompt").eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by their names in the base model."""
    found = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".embed_tokens.base_layer.", ".embed_tokens."): p for name, p in found.items()}


def of_prompt(model: nn.Module) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if "ptuning_encoders.prompt" in name)


def reference_of(model: nn.Module, method: str = "LoRA", family: str = "Llama", task: str = "CAUSAL_LM") -> nn.Module:
    """The base with the other adapters that `model` has, without its prompt."""
    reference, own = with_others(family, task, method), trained(model)
    for name, parameter in reference.named_parameters():
        if name in own:
            parameter.data.copy_(own[name].data)
    return reference


def concatenate(reference: nn.Module, model: nn.Module, batch: dict, task: str = "CAUSAL_LM") -> torch.Tensor:
    return concatenated(reference, task, of_prompt(model).detach(), batch)


def assert_same(found: torch.Tensor, expected: torch.Tensor, batch: dict) -> None:
    mask = batch["attention_mask"]
    torch.testing.assert_close(unmasked(found, mask), unmasked(expected, mask), rtol=1e-4, atol=1e-5)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.allclose(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_equals_the_base_with_lora_on_the_concatenation(way) -> None:
    model, batch = adapted(way), make_batch("Llama", "CAUSAL_LM")
    assert {"style" if "lora_" in name else "prompt" for name in trained(model)} == {"style", "prompt"}
    expected = concatenate(reference_of(model), model, batch)
    with torch.no_grad():
        assert_same(model(**batch).logits, expected, batch)
    assert_same(model(**batch).logits, expected, batch)  # with gradients, the prompt takes another way
    assert differ(expected, concatenate(make_model("Llama", "CAUSAL_LM"), model, batch))


@pytest.mark.parametrize("overhead", [0, 10**6], ids=["packed", "in the row"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_all_gradients_are_those_of_the_reference(method, overhead, monkeypatch) -> None:
    monkeypatch.setattr("peft_ptuning_ext.forward.one_pass.OVERHEAD", overhead)
    model, batch = beside(method), make_batch("Llama", "CAUSAL_LM", lengths=(7, 5, 7))
    batch["input_ids"][0, 1] = 7  # a token whose row is trained
    labels = make_labels("CAUSAL_LM", batch)
    reference = reference_of(model, method)
    prompt = of_prompt(model).detach().clone().requires_grad_()
    logits = concatenated(reference, "CAUSAL_LM", prompt, batch)
    textbook_loss("CAUSAL_LM", SimpleNamespace(logits=logits), labels).backward()
    output = model(**batch, **labels)
    assert_same(output.logits, logits, batch)
    output.loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in trained(model).items()}
    torch.testing.assert_close(found.pop("model.embed_tokens.ptuning_encoders.prompt.embedding"), prompt.grad)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "task", "targets"),
    [
        ("BERT", "TOKEN_CLS", ["query", "value"]),
        ("Mistral", "CAUSAL_LM", ["q_proj", "v_proj"]),
        ("T5", "SEQ_2_SEQ_LM", ["q", "v"]),
        ("Bloom", "CAUSAL_LM", ["query_key_value"]),
    ],
)
def test_other_families(family, task, targets, monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "LoRA", lambda: [lora(target_modules=targets)])
    model, batch = beside("LoRA", family, task), make_batch(family, task)
    with torch.no_grad():
        expected = concatenate(reference_of(model, "LoRA", family, task), model, batch, task)
        assert_same(model(**batch).logits, expected, batch)


@torch.no_grad()
def test_a_deep_prompt_stands_in_front_of_what_lora_makes() -> None:
    options, batch = {"prompt_depth": "DEEP"}, make_batch("Llama", "CAUSAL_LM")
    model = beside("LoRA", **options)
    merged = get_peft_model(make_model("Llama", "CAUSAL_LM"), lora(), "style")
    merged.load_state_dict({f"base_model.model.{n}": p for n, p in trained(model).items()}, strict=False)
    merged = get_peft_model(merged.merge_and_unload(), make_config("CAUSAL_LM", **options), "prompt").eval()
    merged.load_state_dict({n: p for n, p in model.named_parameters() if "ptuning_" in n}, strict=False)
    assert_same(model(**batch).logits, merged(**batch).logits, batch)
    assert differ(model(**batch).logits, merged.unload()(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_generation_finds_the_tokens_of_the_reference(method) -> None:
    model, batch = beside(method), make_batch("Llama", "CAUSAL_LM", lengths=(7, 7))
    reference = reference_of(model, method)
    prompt, ids = of_prompt(model), batch["input_ids"]
    embeds = torch.cat([prompt.expand(2, -1, -1), reference.get_input_embeddings()(ids)], dim=1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = reference.generate(inputs_embeds=embeds, **options)
    for _ in range(2):  # behind keys and values that were made, and that are stored
        assert model.generate(**batch, **options)[:, ids.shape[1] :].equal(expected)
    assert stored(model) == 1


# What is switched on and off.


def states_of(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """What each of both, one, and none of the adapters make, from references that have nothing of the package."""
    plain, reference = make_model("Llama", "CAUSAL_LM"), reference_of(model)
    return {
        "both": concatenate(reference, model, batch),
        "prompt": concatenate(plain, model, batch),
        "style": reference(**batch).logits,
        "none": plain(**batch).logits,
    }


@torch.no_grad()
@pytest.mark.parametrize("way", IN_PEFT, ids=lambda way: way.__name__)
def test_switched_apart_and_together_on_a_peft_model(way) -> None:
    model, batch = adapted(way), make_batch("Llama", "CAUSAL_LM")
    expected, both = states_of(model, batch), list(trained(model))
    peft.functional.set_adapter(model, "prompt")
    assert_same(model(**batch).logits, expected["prompt"], batch)
    model.set_adapter("style")
    assert_same(model(**batch).logits, expected["style"], batch)
    assert list(trained(model)) == [name for name in both if "lora_" in name]
    model.base_model.set_adapter(["style", "prompt"])
    assert_same(model(**batch).logits, expected["both"], batch)
    assert list(trained(model)) == both
    model.set_adapter("prompt")  # of a prompt alone: the LoRA stays as it is
    assert_same(model(**batch).logits, expected["both"], batch)
    with model.disable_adapter():
        assert model(**batch).logits.equal(expected["none"])
    assert_same(model(**batch).logits, expected["both"], batch)
    assert list(trained(model)) == both
    with pytest.raises(ValueError, match="There is no adapter 'other'"):
        model.base_model.set_adapter(["style", "other"])
    assert_same(model(**batch).logits, expected["both"], batch)


@torch.no_grad()
@pytest.mark.parametrize("way", [by_transformers, by_transformers_prompt_first], ids=lambda way: way.__name__)
def test_switched_apart_and_together_on_a_transformers_model(way) -> None:
    model, batch = adapted(way), make_batch("Llama", "CAUSAL_LM")
    expected = states_of(model, batch)
    for names in (["style"], ["prompt"], ["style", "prompt"]):
        model.set_adapter(names)
        assert model.active_adapters() == names
        assert_same(model(**batch).logits, expected[names[0] if len(names) == 1 else "both"], batch)
    model.disable_adapters()
    assert model(**batch).logits.equal(expected["none"])
    model.enable_adapters()
    assert_same(model(**batch).logits, expected["both"], batch)


@torch.no_grad()
def test_rows_and_heads_of_others_are_switched_with_them() -> None:
    model, batch = beside("tokens, LoRA"), make_batch("Llama", "CAUSAL_LM")
    batch["input_ids"][0, 1] = 7
    both = model(**batch).logits
    model.base_model.set_adapter(["rows", "style", "prompt"])
    assert model(**batch).logits.equal(both)
    model.base_model.set_adapter(["style", "prompt"])
    assert differ(model(**batch).logits[0, 1:], both[0, 1:])
    assert_same(model(**batch).logits, concatenate(reference_of(model, "LoRA"), model, batch), batch)


def test_one_of_two_adapters_trains_the_head() -> None:
    batch = make_batch("BERT", "SEQ_CLS")
    base = make_model("BERT", "SEQ_CLS")
    with_head = lora(target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(base, with_head, adapter_name="style")
    with pytest.raises(ValueError, match="Adapter 'style' has a copy of 'classifier', and the prompt another"):
        get_peft_model(base, make_config("SEQ_CLS"), adapter_name="prompt")
    model = get_peft_model(base, make_config(), adapter_name="prompt").eval()
    heads = {name: p for name, p in trained(model).items() if "classifier" in name}
    assert {name.rpartition(".")[2] for name in heads} == {"weight", "bias"}
    before = model(**batch).logits
    heads["classifier.modules_to_save.style.bias"].data += 1
    assert differ(model(**batch).logits, before)
    model.set_adapter("prompt")
    assert differ(model(**batch).logits, before)
    assert {name: p for name, p in trained(model).items() if "classifier" in name}.keys() == heads.keys()
    assert {name for name in trained(model.unload()) if "classifier" in name} == heads.keys()

    base = make_model("BERT", "SEQ_CLS")
    model = get_peft_model(base, make_config("SEQ_CLS"), adapter_name="prompt")
    get_peft_model(base, with_head, adapter_name="style")
    with pytest.raises(ValueError, match=r"Adapters \['style', 'prompt'\] each have a copy of the same Linear"):
        model.base_model.set_adapter(["style", "prompt"])


@torch.no_grad()
def test_deleted_apart() -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    for name in ("style", "prompt"):
        model = adapted()
        expected = states_of(model, batch)
        model.delete_adapter(name)
        (other,) = model.peft_config
        assert other != name
        assert not any(name in key.split(".") for key in model.state_dict())
        assert_same(model(**batch).logits, expected[other], batch)


def test_a_prompt_that_is_refused_leaves_both_active() -> None:
    model, batch = adapted(by_transformers), make_batch("Llama", "CAUSAL_LM")
    expected, both = model(**batch).logits, list(trained(model))
    with pytest.raises(ValueError, match="`trainable_token_indices` has id 1000"):
        model.add_adapter(make_config("CAUSAL_LM", trainable_token_indices=[1000]), "bad")
    assert model.active_adapters() == ["style", "prompt"]
    assert list(trained(model)) == both
    assert model(**batch).logits.equal(expected)


def test_transformers_deletes_them_apart(tmp_path) -> None:
    for name, other in (("style", "prompt"), ("prompt", "style")):
        model = adapted(by_transformers)
        model.delete_adapter(name)
        assert model.active_adapters() == [other]
        model.save_pretrained(tmp_path / other)
        assert keys_of(tmp_path / other) == (LORA_KEYS if other == "style" else PROMPT_KEYS)


@torch.no_grad()
@pytest.mark.parametrize("way", IN_PEFT, ids=lambda way: way.__name__)
def test_unload_takes_the_prompts_and_leaves_the_lora(way) -> None:
    model, batch = adapted(way), make_batch("Llama", "CAUSAL_LM")
    expected = states_of(model, batch)
    base = model.unload()
    assert base(**batch).logits.equal(expected["style"])
    assert {"lora_" in name for name in trained(base)} == {True}
    assert list(base.peft_config) == ["style"]
    again = get_peft_model(base, make_config("CAUSAL_LM"), adapter_name="prompt").eval()
    assert list(again.peft_config) == ["style", "prompt"]


# Merging.


@torch.no_grad()
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_lora_is_merged_underneath_and_the_prompt_unchanged(method) -> None:
    model, batch = adapted(method=method), make_batch("Llama", "CAUSAL_LM")
    unmerged, vectors = model(**batch).logits, model.prompt_embeddings()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
    before = weight.clone()
    for arguments in ((), (["style"],)):
        model.merge_adapter(*arguments)
        assert differ(weight, before)
        assert_same(model(**batch).logits, unmerged, batch)
        assert model.prompt_embeddings().equal(vectors)
        model.unmerge_adapter()
        torch.testing.assert_close(weight, before)
        assert_same(model(**batch).logits, unmerged, batch)
    with pytest.raises(ValueError, match="A prompt can't be merged"):
        model.merge_adapter(["prompt"])
    with pytest.raises(
        ValueError, match="can't be merged.*`merge_adapter\\(\\)` merges the adapters of other methods"
    ):
        model.merge_and_unload()
    assert_same(model(**batch).logits, unmerged, batch)


@torch.no_grad()
@pytest.mark.parametrize("way", [in_a_lora_model, prompt_first], ids=lambda way: way.__name__)
def test_a_lora_model_is_merged_or_unloaded_and_the_prompt_stays(way) -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    for action, state in (("merge_and_unload", "both"), ("unload", "prompt")):
        model = adapted(way)
        expected = states_of(model, batch)[state]
        lora_model = model
        if way is prompt_first:
            lora_model = PeftModel(model.get_base_model(), lora(), "another")
            lora_model.base_model.set_adapter(["style"])
            lora_model.delete_adapter("another")
        base = getattr(lora_model, action)()
        assert not any("lora_" in name for name, _ in base.named_modules())
        assert_same(base(**batch).logits, expected, batch)


@torch.no_grad()
def test_a_lora_that_was_merged_away_can_be_forgotten(tmp_path) -> None:
    base, batch = make_model("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM")
    of_lora = get_peft_model(base, lora(), adapter_name="style")
    model = get_peft_model(base, make_config("CAUSAL_LM"), adapter_name="prompt").eval()
    expected = model(**batch).logits
    of_lora.merge_and_unload()
    assert_same(model(**batch).logits, expected, batch)
    model.delete_adapter("style")
    model.save_pretrained(tmp_path)
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["prompt"]
    assert_same(model(**batch).logits, expected, batch)


@torch.no_grad()
@pytest.mark.parametrize(("action", "state"), [("merge_and_unload", "both"), ("unload", "prompt")])
def test_a_lora_on_the_embedding_goes_from_inside_the_prompts_layer(action, state) -> None:
    base, batch = make_model("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM")
    config = lora(target_modules=["embed_tokens", "q_proj"])
    of_lora = get_peft_model(base, config, adapter_name="style")
    alone = copy.deepcopy(base).eval()
    model = get_peft_model(base, make_config("CAUSAL_LM"), adapter_name="prompt").eval()
    plain = make_model("Llama", "CAUSAL_LM")
    expected = {"both": concatenate(alone, model, batch), "prompt": concatenate(plain, model, batch)}
    assert_same(model(**batch).logits, expected["both"], batch)
    getattr(of_lora, action)()
    assert not any("lora_" in name for name, _ in base.named_modules())
    assert_same(model(**batch).logits, expected[state], batch)


@torch.no_grad()
def test_a_merged_lora_stays_merged_until_another_is_made_active() -> None:
    model, batch = adapted(), make_batch("Llama", "CAUSAL_LM")
    add_another(model)
    expected = states_of(model, batch)
    model.base_model.set_adapter(["style", "prompt"])
    model.merge_adapter()
    model.set_adapter("style")
    assert all(module.merged for module in loras(model))
    assert_same(model(**batch).logits, expected["style"], batch)
    with pytest.warns(UserWarning, match=r"Adapters \['style'\] are merged. They are unmerged"):
        model.base_model.set_adapter(["another", "prompt"])
    assert not any(module.merged for module in loras(model))
    for module in loras(model):
        module.lora_B["another"].weight.zero_()
    assert_same(model(**batch).logits, expected["prompt"], batch)


# What is stored between calls.


def stored(model: nn.Module) -> int:
    return len(embedding_and_backbone(base_of(model))[1].ptuning.states)


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def loras(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def fresh(model: nn.Module, batch: dict) -> torch.Tensor:
    """What a copy makes of the batch, with which nothing is stored."""
    clone = copy.deepcopy(model)
    assert stored(clone) == 0
    return clone(**batch).logits


def set_scale(model: nn.Module) -> None:
    for module in loras(model):
        module.set_scale("style", 3.0)


def scale_layer(model: nn.Module) -> None:
    loras(model)[0].scale_layer(0.5)


def change_weight(model: nn.Module) -> None:
    loras(model)[0].lora_B["style"].weight.mul_(2)


def activate_prompt_alone(model: nn.Module) -> None:
    peft.functional.set_adapter(model, "prompt")


def disable_lora_alone(model: nn.Module) -> None:
    for module in loras(model):
        module.enable_adapters(False)


def delete_lora(model: nn.Module) -> None:
    model.delete_adapter("style")


def add_another(model: nn.Module) -> None:
    inject_adapter_in_model(lora(), base_of(model), "another")
    model.eval()


def replace_weight(model: nn.Module) -> None:
    module = loras(model)[0].lora_A["style"]
    module.weight = nn.Parameter(module.weight * 3)


CHANGES = [
    *(set_scale, scale_layer, change_weight, activate_prompt_alone, disable_lora_alone, delete_lora, add_another),
    replace_weight,
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_stored_is_dropped_when_another_adapter_changes(change) -> None:
    model, batch = adapted(), make_batch("Llama", "CAUSAL_LM")
    before = model(**batch).logits
    assert stored(model) == 1
    change(model)
    expected = fresh(model, batch)
    assert differ(expected, before)
    assert model(**batch).logits.equal(expected)
    assert model(**batch).logits.equal(expected)
    assert stored(model) == 1


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_prompts_are_stored_beside_each_known_method(method) -> None:
    model, batch = beside(method), make_batch("Llama", "CAUSAL_LM")
    shapes: list[int] = []
    layer = base_of(model).model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[0]))
    for _ in range(3):
        model(**batch)
    assert stored(model) == 1
    assert shapes == [1, 2, 2, 2]  # the prompt passes once
    assert model.prompt_route == "shared"


@torch.no_grad()
def test_merged_and_unmerged_are_told_apart() -> None:
    model, batch = adapted(), make_batch("Llama", "CAUSAL_LM")
    base_of(model).bfloat16()  # merging rounds the weights
    before = model(**batch).logits
    # Merged and taken back between two calls: the weights are others, and PEFT wrote them without a trace.
    model.merge_adapter()
    model.unmerge_adapter()
    expected = fresh(model, batch)
    assert not expected.equal(before)
    assert model(**batch).logits.equal(expected)
    for action in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        getattr(model, action)()
        expected = fresh(model, batch)
        assert model(**batch).logits.equal(expected)


@torch.no_grad()
def test_a_scale_for_a_while() -> None:
    model, batch = adapted(), make_batch("Llama", "CAUSAL_LM")
    before = model(**batch).logits
    with rescale_adapter_scale(model, 0.5):
        halved = model(**batch).logits
        assert halved.equal(fresh(model, batch))
    assert differ(halved, before)
    assert model(**batch).logits.equal(before)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(target_modules=["q_proj"], init_weights=False),
        lora(kasa_config=KasaConfig()),
    ],
    ids=["another method", "another variant"],
)
def test_nothing_is_stored_beside_what_is_not_known(config) -> None:
    base = inject_adapter_in_model(config, make_model("Llama", "CAUSAL_LM"), "other")
    model = get_peft_model(base, make_config("CAUSAL_LM"), adapter_name="prompt").eval()
    batch = make_batch("Llama", "CAUSAL_LM")
    first = model(**batch).logits
    assert stored(model) == 0
    assert model(**batch).logits.equal(first)


def test_a_lora_that_trains_is_not_behind_a_stored_prompt() -> None:
    model, batch = adapted(), make_batch("Llama", "CAUSAL_LM")
    with torch.no_grad():
        before = model(**batch).logits
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=1.0)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    with torch.no_grad():
        expected = fresh(model, batch)
        assert differ(expected, before)
        assert model(**batch).logits.equal(expected)


# Files.


PROMPT_KEYS = {"base_model.model.model.embed_tokens.ptuning_encoders.embedding"}
LORA_KEYS = {
    f"base_model.model.model.layers.{layer}.self_attn.{projection}.lora_{side}.weight"
    for layer in range(2)
    for projection in ("q_proj", "v_proj")
    for side in "AB"
}


def keys_of(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def save_by_peft(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


def save_by_transformers(model: nn.Module, folder: Path) -> None:
    with pytest.raises(ValueError, match="Multiple active adapters"):  # rather than only one of them, silently
        model.save_pretrained(folder / "both")
    for name in ("style", "prompt"):
        model.set_adapter(name)
        model.save_pretrained(folder / name)
    model.set_adapter(["style", "prompt"])


SAVING = [(way, save_by_peft) for way in [*IN_PEFT, in_a_lora_model]]
SAVING += [(by_transformers, save_by_transformers), (by_transformers_prompt_first, save_by_transformers)]


@torch.no_grad()
@pytest.mark.parametrize(("way", "save"), SAVING, ids=lambda part: part.__name__)
def test_two_folders_each_with_its_own_keys_and_loadable_alone(way, save, tmp_path) -> None:
    model, batch = adapted(way), make_batch("Llama", "CAUSAL_LM")
    expected = states_of(model, batch)
    save(model, tmp_path)
    assert keys_of(tmp_path / "style") == LORA_KEYS
    assert keys_of(tmp_path / "prompt") == PROMPT_KEYS
    for name in ("style", "prompt"):
        alone = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path / name).eval()
        assert_same(alone(**batch).logits, expected[name], batch)
        base = make_model("Llama", "CAUSAL_LM")
        base.load_adapter(str(tmp_path / name))
        assert_same(base(**batch).logits, expected[name], batch)


@torch.no_grad()
@pytest.mark.parametrize("order", [("style", "prompt"), ("prompt", "style")], ids="-".join)
@pytest.mark.parametrize("by", ["PEFT", "transformers", "both"])
def test_loaded_in_either_order(by, order, tmp_path) -> None:
    model, batch = adapted(), make_batch("Llama", "CAUSAL_LM")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    base = make_model("Llama", "CAUSAL_LM")
    for number, name in enumerate(order):
        if by == "PEFT" or (by == "both" and number == 1):
            loaded = PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name)
        else:
            base.load_adapter(str(tmp_path / name), adapter_name=name)
    base.eval()
    assert not trained(base)
    assert_same(base(**batch).logits, expected, batch)
    if by == "PEFT":
        assert set(loaded.peft_config) == {"style", "prompt"}


@pytest.mark.parametrize("order", [("style", "prompt"), ("prompt", "style")], ids="-".join)
def test_what_is_loaded_to_be_trained_further_trains(order, tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    for further in (order, order[:1], order[1:]):
        base = make_model("Llama", "CAUSAL_LM")
        for name in order:
            PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name, is_trainable=name in further)
        assert {"prompt" if "ptuning_" in name else "style" for name in trained(base)} == set(further)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tokens, LoRA", "LoRA with rows"])
def test_adapters_of_the_embedding_have_their_own_keys_too(method, tmp_path) -> None:
    model, batch = beside(method), make_batch("Llama", "CAUSAL_LM")
    batch["input_ids"][0, 1] = 7
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    reference = reference_of(model, method)
    for name in set(model.peft_config) - {"prompt"}:
        alone = get_peft_model(make_model("Llama", "CAUSAL_LM"), copy.deepcopy(model.peft_config[name]), name)
        alone.save_pretrained(tmp_path / "alone")
        assert keys_of(tmp_path / name) == keys_of(tmp_path / "alone" / name)
    base = make_model("Llama", "CAUSAL_LM")
    for name in [name for name in ("rows", "style") if name in model.peft_config]:
        base.load_adapter(str(tmp_path / name), adapter_name=name)
    assert_same(base.eval()(**batch).logits, reference(**batch).logits, batch)
    again = PeftModel.from_pretrained(base, tmp_path / "prompt", adapter_name="prompt").eval()
    assert_same(again(**batch).logits, expected, batch)
    for name, parameter in again.named_parameters():
        if "tokens_delta" in name or "lora_" in name:
            parameter.data.zero_()
    for name in set(model.peft_config) - {"prompt"}:  # into adapters that are there, as a training does that resumes
        again.load_adapter(str(tmp_path / name), name)
    assert_same(again.eval()(**batch).logits, expected, batch)
    full = again.state_dict()
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(full)


# Ways that don't work, each with an error.


def test_refusals(tmp_path) -> None:
    config = make_config("CAUSAL_LM")
    both = get_peft_model(make_model("Llama", "CAUSAL_LM"), lora(), adapter_name="style")
    with pytest.raises(ValueError, match=r"PeftModel already.*get_peft_model\(model.get_base_model\(\)"):
        get_peft_model(both, config, adapter_name="prompt")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        both.add_adapter("prompt", config)
    with pytest.raises(ValueError, match="has an adapter named 'style' already"):
        get_peft_model(both.get_base_model(), config, adapter_name="style")
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(make_model("Llama", "CAUSAL_LM"), config, mixed=True)
    assert not any("ptuning" in name for name, _ in both.named_modules())
    model = make_adapted()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("style", lora())
    inject_adapter_in_model(METHODS["tokens, LoRA"]()[0], model.get_base_model(), "tokens")
    with pytest.raises(ValueError, match="by a TrainableTokensLayer. .* Add the prompt then"):
        model(**make_batch("Llama", "CAUSAL_LM"))


# Training.


def make_trainer(model: nn.Module, folder: Path, **options) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 99, (8, 6), generator=generator)]
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 0.05, **options}
    return Trainer(model, make_arguments(folder, **options), train_dataset=rows)


def test_the_stock_trainer_trains_both_and_resumes(tmp_path) -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    straight = adapted()
    before = {name: p.detach().clone() for name, p in straight.named_parameters()}
    make_trainer(straight, tmp_path / "straight", save_steps=4).train()
    moved = {name for name, p in straight.named_parameters() if not p.equal(before[name])}
    assert moved == {f"base_model.model.{name}" for name in trained(straight)}
    assert any("lora_" in name for name in moved)
    assert any("ptuning_" in name for name in moved)

    make_trainer(adapted(), tmp_path / "resumed", save_steps=2, lr_scheduler_type="constant").train()
    checkpoint = tmp_path / "resumed" / "checkpoint-2"
    assert {path.parent.name for path in checkpoint.rglob("adapter_model.safetensors")} == {"style", "prompt"}
    resumed = adapted()
    resumed.base_model.set_adapter(["style", "prompt"])  # Trainer makes the first active adapter active again, alone
    trainer = make_trainer(resumed, tmp_path / "resumed", save_steps=2, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trained(resumed).keys() == trained(straight).keys()
    last = get_last_checkpoint(tmp_path / "resumed")
    base = make_model("Llama", "CAUSAL_LM")
    for name in ("prompt", "style"):
        loaded = PeftModel.from_pretrained(base, Path(last) / name, adapter_name=name)
    expected = make_trainer(adapted(), tmp_path / "whole", lr_scheduler_type="constant")
    expected.train()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, resumed.eval()(**batch).logits)
        assert resumed(**batch).logits.equal(expected.model.eval()(**batch).logits)


def test_the_stock_trainer_trains_a_transformers_model(tmp_path) -> None:
    model = adapted(by_transformers)
    names, before = set(trained(model)), {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(model, tmp_path, save_strategy="no").train()
    assert {name for name, p in model.named_parameters() if not p.equal(before[name])} == names
    assert {"style" if "lora_" in name else "prompt" for name in names} == {"style", "prompt"}


def test_a_lora_trains_behind_a_frozen_prompt(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    base = make_model("Llama", "CAUSAL_LM")
    get_peft_model(base, lora(), adapter_name="style")
    model = PeftModel.from_pretrained(base, tmp_path / "prompt", adapter_name="prompt")
    assert {"lora_" in name for name in trained(model)} == {True}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        make_trainer(model, tmp_path / "run", save_strategy="no").train()
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert moved == {f"base_model.model.{name}" for name in trained(model)}
