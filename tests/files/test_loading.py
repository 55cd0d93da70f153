# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a clear error, and the model is as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from accelerate import disk_offload
from families import TASKS, make_model
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from reference import V, main_output, make_batch
from transformers import LlamaForCausalLM

from peft_ptuning_ext import PTuningConfig


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(name="saved")
def _saved(tmp_path: Path) -> Path:
    """A saved MLP adapter of a BERT classifier."""
    config = make_config("SEQ_CLS", encoder_hidden_size=8)
    get_peft_model(make_model("BERT", "SEQ_CLS"), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_weights(folder: Path, change) -> None:
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(change(weights), folder / WEIGHTS)


def _with_nan(weights: dict) -> dict:
    return {k: v.clone().fill_(float("nan")) if k.endswith("encoders.embedding") else v for k, v in weights.items()}


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _as_pickle(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _longer(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": V + 1}))


def _without(weights: dict) -> dict:
    return {key: value for key, value in weights.items() if not key.endswith("offset")}


BROKEN = {
    "missing": (lambda folder: (folder / WEIGHTS).unlink(), "has an adapter config but no adapter_model.safetensors"),
    "truncated": (_truncate, "adapter_model.safetensors is not a readable safetensors file"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is not a readable safetensors file"),
    "NaN": (lambda folder: change_weights(folder, _with_nan), "'embedding' holds NaN"),
    "pickle": (_as_pickle, "only the pickle adapter_model.bin.*use_safetensors=False"),
    "another length": (_longer, r"has shape \(5, 32\), expected \(6, 32\)"),
    "no offset": (lambda folder: change_weights(folder, _without), r"lacks \['offset'\]"),
    "no prompt": (lambda folder: change_weights(folder, lambda _: {"x": torch.ones(1)}), "holds no P-tuning prompt"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_leaves_the_model_as_it_was(case, saved) -> None:
    break_it, message = BROKEN[case]
    break_it(saved)
    batch = make_batch("BERT", "SEQ_CLS")
    for low_cpu_mem_usage in (False, True):
        base = make_model("BERT", "SEQ_CLS")
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=low_cpu_mem_usage)
        untouched = make_model("BERT", "SEQ_CLS")
        assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
        assert not [m for m in base.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert torch.equal(main_output(base(**batch)), main_output(untouched(**batch)))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_further_adapter_leaves_the_others_as_they_were(case, saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "good")
    BROKEN[case][0](saved)
    model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path / "good").eval()
    batch = make_batch("BERT", "SEQ_CLS")
    expected, names = main_output(model(**batch)), set(model.state_dict())
    with pytest.raises(ValueError, match=BROKEN[case][1]):
        model.load_adapter(saved, "broken")
    assert set(model.state_dict()) == names
    assert list(model.peft_config) == ["default"]
    assert torch.equal(main_output(model(**batch)), expected)


def test_an_adapter_for_another_width_names_both(saved) -> None:
    base = make_model("BERT", "SEQ_CLS", hidden_size=16)
    with pytest.raises(ValueError, match=r"has shape \(5, 32\), expected \(5, 16\).*another width"):
        PeftModel.from_pretrained(base, saved)
    assert type(base.bert.embeddings.word_embeddings) is torch.nn.Embedding


def test_bad_values_do_not_reach_an_adapter_that_is_there(saved) -> None:
    model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), saved, is_trainable=True).eval()
    before = model.prompt_embeddings()
    change_weights(saved, _with_nan)
    with pytest.raises(ValueError, match="holds NaN"):
        model.load_adapter(saved, "default", is_trainable=True)  # as Trainer does for the best model
    assert torch.equal(model.prompt_embeddings(), before)


@pytest.mark.parametrize("case", ["other labels", "NaN"])
def test_a_bad_head_does_not_reach_an_adapter_that_is_there(case: str, saved) -> None:
    model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), saved, is_trainable=True).eval()
    batch = make_batch("BERT", "SEQ_CLS")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "ptuning_encoders" in name).add_(1.0)
        expected = main_output(model(**batch))

    def change(tensors: dict) -> dict:
        key = next(key for key in tensors if key.endswith("classifier.weight"))
        bad = torch.zeros(3, tensors[key].shape[1]) if case == "other labels" else tensors[key] * float("nan")
        return tensors | {key: bad}

    change_weights(saved, change)
    message = "another number of labels" if case == "other labels" else "holds NaN or infinite values"
    with pytest.raises(ValueError, match=f"classifier.*{message}"):
        model.load_adapter(saved, "default", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(main_output(model(**batch)), expected)


def test_a_pickle_is_loaded_when_asked_for(saved) -> None:
    expected = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), saved).prompt_embeddings()
    _as_pickle(saved)
    model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), saved, use_safetensors=False)
    assert torch.equal(model.prompt_embeddings(), expected)
    model.add_adapter("further", PTuningConfig.from_pretrained(saved, use_safetensors=False))
    assert not torch.equal(model.prompt_embeddings("further"), expected)
    model.load_adapter(saved, "further")
    assert torch.equal(model.prompt_embeddings("further"), expected)


def test_a_loaded_config_can_start_a_new_adapter(saved) -> None:
    (saved / WEIGHTS).unlink()
    config = PTuningConfig.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"pass `dataclasses.replace\(config\)`"):
        get_peft_model(make_model("BERT", "SEQ_CLS"), config)
    model = get_peft_model(make_model("BERT", "SEQ_CLS"), dataclasses.replace(config))
    assert len(model.prompt_embeddings()) == V


def test_loading_never_runs_a_tokenizer(saved, monkeypatch) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    hostile = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x",
        "tokenizer_name_or_path": "some/where",
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    (saved / "adapter_config.json").write_text(json.dumps(config | hostile))

    def refuse(*args, **kwargs):
        raise AssertionError("a tokenizer was asked for")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    for is_trainable in (False, True):
        with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
            model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), saved, is_trainable=is_trainable)
        assert len(model.prompt_embeddings()) == V


@pytest.mark.parametrize("encoder", ["NONE", "LSTM"])
@pytest.mark.parametrize("compress", [torch.float32, torch.bfloat16])
def test_a_prompt_starts_at_that_of_another_task(encoder, compress, tmp_path) -> None:
    """A causal LM's prompt on a classifier and on the bare backbone, and a classifier's on one with more labels."""
    config = make_config("CAUSAL_LM", encoder_hidden_size=8, encoder_dropout=0.5)
    trained = get_peft_model(make_model("Llama", "CAUSAL_LM"), config).eval()
    trained.save_pretrained(tmp_path / "generates")
    change_weights(tmp_path / "generates", lambda weights: {k: v.to(compress) for k, v in weights.items()})
    expected = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path / "generates").prompt_embeddings()

    def start(task: str, folder: str, **options) -> PeftModel:
        config = make_config(
            task,
            encoder_reparameterization_type=encoder,
            prompt_tuning_init="ADAPTER",
            prompt_tuning_init_adapter=tmp_path / folder,
        )
        return get_peft_model(make_model("Llama", task, **options), config).eval()

    for task in ("SEQ_CLS", "FEATURE_EXTRACTION"):
        started = start(task, "generates")
        torch.testing.assert_close(started.prompt_embeddings(), expected, rtol=0, atol=1e-6)
        assert [n for n, p in started.named_parameters() if p.requires_grad and "ptuning_" in n]
    started = start("SEQ_CLS", "generates", num_labels=3)
    started.add_adapter("second", started.peft_config["default"])
    torch.testing.assert_close(started.prompt_embeddings("second"), expected, rtol=0, atol=1e-6)
    started.save_pretrained(tmp_path / "classifies")
    shutil.copytree(tmp_path / "classifies", tmp_path / "with a bad head")
    change_weights(
        tmp_path / "with a bad head",
        lambda weights: {k: v if "ptuning_" in k else v.fill_(float("nan")) for k, v in weights.items()},
    )
    again = start("SEQ_CLS", "with a bad head", num_labels=5)
    torch.testing.assert_close(again.prompt_embeddings(), expected, rtol=0, atol=1e-6)
    head = again.get_base_model().score
    assert torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)

    # What was saved loads without the adapter that it started at, which is not looked for.
    shutil.rmtree(tmp_path / "generates")
    loaded = PeftModel.from_pretrained(make_model("Llama", "SEQ_CLS", num_labels=3), tmp_path / "classifies")
    assert torch.equal(loaded.prompt_embeddings(), started.prompt_embeddings())


@pytest.mark.parametrize("submodules", [1, 2])
def test_a_prompt_starts_at_that_of_stock_peft(submodules, tmp_path) -> None:
    stock = get_peft_model(
        make_model("Llama", "CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=V, task_type="CAUSAL_LM", num_transformer_submodules=submodules),
    )
    expected = stock.get_prompt_embedding_to_save("default")[:V]
    stock.save_pretrained(tmp_path)
    config = make_config(prompt_tuning_init="ADAPTER", prompt_tuning_init_adapter=str(tmp_path))
    assert torch.equal(get_peft_model(make_model("Llama", "SEQ_CLS"), config).prompt_embeddings(), expected)


def _as_lora(folder: Path) -> None:
    get_peft_model(make_model("BERT", "SEQ_CLS"), LoraConfig()).save_pretrained(folder)


STARTS = {
    **{case: BROKEN[case] for case in ("truncated", "empty", "NaN", "no offset", "no prompt")},
    "missing": (BROKEN["missing"][0], "has no adapter_model.safetensors. Load that adapter and save it again"),
    "pickle": (BROKEN["pickle"][0], "has no adapter_model.safetensors. Load that adapter and save it again"),
    "another length": (_longer, f"`num_virtual_tokens` is {V}, and the prompt of .* has {V + 1} virtual tokens"),
    "LoRA": (_as_lora, "an adapter of type LORA. Prompts can start at those of PTUNING, PROMPT_TUNING, P_TUNING"),
    "no folder": (shutil.rmtree, "Can't find 'adapter_config.json'"),
    "another width": (lambda folder: None, r"'embedding' .* has shape \(5, 32\), expected \(5, 16\)"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_that_can_not_be_read_leaves_the_model_as_it_was(case, saved) -> None:
    break_it, message = STARTS[case]
    break_it(saved)
    base = make_model("BERT", "SEQ_CLS", **({"hidden_size": 16} if case == "another width" else {}))
    before = [(name, type(module)) for name, module in base.named_modules()]
    config = make_config(prompt_tuning_init="ADAPTER", prompt_tuning_init_adapter=str(saved))
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config)
    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert not hasattr(base, "peft_config")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_get_peft_model_twice() -> None:
    base = make_model("BERT", "SEQ_CLS")
    model = get_peft_model(base, make_config()).eval()
    batch = make_batch("BERT", "SEQ_CLS")
    expected = main_output(model(**batch))
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        get_peft_model(base, make_config(length=V + 1))
    with pytest.raises(ValueError, match="is a PeftModel already"):
        get_peft_model(model, make_config(length=V + 1), adapter_name="other")
    assert model.peft_config["default"].num_virtual_tokens == V
    assert torch.equal(main_output(model(**batch)), expected)


def test_an_unknown_adapter_name() -> None:
    model = get_peft_model(make_model("BERT", "SEQ_CLS"), make_config())
    with pytest.raises(ValueError, match="there not found"):
        model.set_adapter("there")
    with pytest.raises(ValueError, match=r"no adapter 'there', only \['default'\]"):
        model.base_model.set_adapter("there")
    with pytest.raises(ValueError, match="there does not exist"):
        model.delete_adapter("there")
    with pytest.raises(ValueError, match="An adapter can be active once"):
        model.base_model.set_adapter(["default", "default"])


def test_no_memory_is_taken_for_a_length_that_the_weights_do_not_have(saved) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 2**24}))
    with pytest.raises(ValueError, match="has 64 positions"):
        PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), saved)
    change_weights(
        saved, lambda weights: {key.replace(".bert.", ".deberta."): value for key, value in weights.items()}
    )
    with pytest.raises(ValueError, match=r"expected \(16777216, 32\)"):  # a model without a limit
        PeftModel.from_pretrained(make_model("DeBERTa-v2", "SEQ_CLS"), saved)
    (saved / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 10**9}))
    with pytest.raises(ValueError, match="`num_virtual_tokens` must be from 1 to 16777216, got 1000000000"):
        PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), saved)


def test_an_injection_that_fails_late_leaves_the_model_as_it_was() -> None:
    base = make_model("BERT", "SEQ_CLS")
    model = get_peft_model(base, make_config())
    untrainable = make_config(modules_to_save=["classifier", "encoder.layer"])
    with pytest.raises(TypeError, match="ModuleList"):
        model.add_adapter("other", untrainable)
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if ".other." in name]
    model.unload()
    with pytest.raises(TypeError, match="ModuleList"):
        get_peft_model(base, untrainable)
    untouched = make_model("BERT", "SEQ_CLS")
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
    assert not [m for m in base.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_further_adapter_that_fails_in_transformers_leaves_no_name_behind() -> None:
    model = make_model("BERT", "SEQ_CLS")
    model.add_adapter(make_config())
    with pytest.raises(TypeError, match="ModuleList"):
        model.add_adapter(make_config(modules_to_save=["encoder.layer"]), "other")
    assert list(model.peft_config) == ["default"]
    model.add_adapter(make_config(), "other")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_unloading_a_model_that_had_an_injected_adapter() -> None:
    base = make_model("BERT", "SEQ_CLS")
    base.add_adapter(make_config())
    model = get_peft_model(base, make_config(length=V + 1), adapter_name="second")
    assert len(model.prompt_embeddings("default")) == V
    untouched = make_model("BERT", "SEQ_CLS")
    unloaded = [(n, type(m)) for n, m in model.unload().named_modules()]
    assert unloaded == [(n, type(m)) for n, m in untouched.named_modules()]


def state_of(model: torch.nn.Module) -> tuple:
    """What adding an adapter changes of a model: its modules, their hooks and modes, and what is trained."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    hooks = [name for name, module in model.named_modules() if module._forward_pre_hooks or module._forward_hooks]
    trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return modules, hooks, trained, hasattr(model, "peft_config"), model.config.to_dict()


@pytest.mark.parametrize(
    ("family", "task", "task_type"),
    [
        ("BERT", "TOKEN_CLS", "CAUSAL_LM"),
        ("BERT", "SEQ_CLS", "SEQ_2_SEQ_LM"),
        ("GPT-2", "SEQ_CLS", "CAUSAL_LM"),
        ("Llama", "FEATURE_EXTRACTION", "CAUSAL_LM"),
        ("T5", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"),
    ],
)
def test_the_task_type_of_another_kind_of_model_is_refused(family, task, task_type) -> None:
    base, batch = make_model(family, task), make_batch(family, task)
    before, expected = state_of(base), main_output(base(**batch))
    message = f"`task_type` is '{task_type}', and {type(base).__name__} lacks `prepare_inputs_for_generation`"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, make_config(task_type))
    assert state_of(base) == before
    assert torch.equal(main_output(base(**batch)), expected)

    model = get_peft_model(base, make_config(task)).eval()
    adapted = main_output(model(**batch))
    assert not torch.equal(adapted, expected)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", make_config(task_type))
    assert (set(model.state_dict()), list(model.peft_config)) == (names, ["default"])
    assert torch.equal(main_output(model(**batch)), adapted)


class Rewarding(torch.nn.Module):
    """A module that holds a transformers model and is none."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.score = torch.nn.Linear(32, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.score(self.model(input_ids, attention_mask).last_hidden_state[:, 0])


class Delegating(Rewarding):
    """The same with what PEFT's classes for a task type ask for."""

    @property
    def config(self) -> transformers.PretrainedConfig:
        return self.model.config

    def forward(self, **kwargs) -> torch.Tensor:
        return super().forward(kwargs["input_ids"], kwargs["attention_mask"])


@torch.no_grad()
def test_a_module_around_a_model_has_no_task_type() -> None:
    for task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        base = Rewarding(make_model("BERT", "FEATURE_EXTRACTION"))
        before = [(name, type(module)) for name, module in base.named_modules()]
        message = f"`task_type` is '{task_type}', and Rewarding lacks .*`return_dict`.* leave `task_type` out"
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, make_config(task_type))
        assert [(name, type(module)) for name, module in base.named_modules()] == before
        assert all(parameter.requires_grad for parameter in base.parameters())

    batch = make_batch("BERT", "FEATURE_EXTRACTION")
    expected = base(**batch)
    model = get_peft_model(base, make_config(modules_to_save=["score"])).eval()
    assert not torch.equal(model(**batch), expected)
    delegating = Delegating(make_model("BERT", "FEATURE_EXTRACTION"))
    model = get_peft_model(delegating, make_config("SEQ_CLS")).eval()
    assert model(**batch).shape == expected.shape
    with pytest.raises(ValueError, match="Delegating lacks `prepare_inputs_for_generation`"):
        get_peft_model(Delegating(make_model("BERT", "FEATURE_EXTRACTION")), PTuningConfig(task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_refused_adapter_leaves_transformers_methods_as_they_were() -> None:
    model, batch = make_model("BERT", "SEQ_CLS"), make_batch("BERT", "SEQ_CLS")
    before = state_of(model)
    with pytest.raises(ValueError, match="has 64 positions"):
        model.add_adapter(make_config(length=64))
    assert state_of(model) == before
    model.add_adapter(make_config(modules_to_save=["classifier"]))
    expected, before = main_output(model.eval()(**batch)), state_of(model)
    for bad in (make_config(length=64), PTuningConfig(modules_to_save=["encoder.layer"])):
        with pytest.raises((TypeError, ValueError)):
            model.add_adapter(bad, "other")
        assert state_of(model) == before
        assert model.active_adapters() == ["default"]
        assert torch.equal(main_output(model(**batch)), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_refused_prompt_leaves_the_head_of_a_lora() -> None:
    model, batch = make_model("BERT", "SEQ_CLS"), make_batch("BERT", "SEQ_CLS")
    model.add_adapter(LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), "low_rank")
    with torch.no_grad():
        model.classifier.modules_to_save["low_rank"].weight.add_(1.0)
    expected, before = main_output(model.eval()(**batch)), state_of(model)
    for bad in (make_config(length=64), PTuningConfig(modules_to_save=["encoder.layer"])):
        with pytest.raises((TypeError, ValueError)):
            model.add_adapter(bad, "prompt")
        assert state_of(model) == before
        assert torch.equal(main_output(model(**batch)), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_a_name_that_another_model_around_the_backbone_has_is_refused() -> None:
    policy, reward = make_model("Llama", "CAUSAL_LM"), make_model("Llama", "SEQ_CLS")
    reward.model = policy.model
    batch = make_batch("Llama", "CAUSAL_LM")
    model = get_peft_model(policy, make_config("CAUSAL_LM")).eval()
    expected, before = main_output(model(**batch)), state_of(reward)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has an adapter named 'default' already"):
        get_peft_model(reward, make_config("SEQ_CLS", V + 1))
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has an adapter named 'default' already"):
        reward.add_adapter(make_config(length=V + 1))
    assert state_of(reward) == before
    assert torch.equal(main_output(model(**batch)), expected)
    reward.add_adapter(make_config(length=V + 1), "reward")
    assert main_output(reward.eval()(**batch)).isfinite().all()


@pytest.mark.parametrize("name", ["bert", "embeddings", "word_embeddings", "bert.embeddings"])
def test_the_embedding_cannot_be_saved_beside_its_prompt(name) -> None:
    base = make_model("BERT", "SEQ_CLS")
    with pytest.raises(ValueError, match=f"`modules_to_save` names '{name}', which holds the input embedding"):
        get_peft_model(base, make_config(modules_to_save=[name]))
    assert type(base.bert.embeddings.word_embeddings) is torch.nn.Embedding


def test_an_adapter_named_like_its_container() -> None:
    with pytest.raises(ValueError, match="can't be named 'ptuning_encoders'"):
        get_peft_model(make_model("BERT", "SEQ_CLS"), PTuningConfig(), adapter_name="ptuning_encoders")


@pytest.mark.parametrize("name", ["keys", "v1.0"])
def test_an_adapter_named_as_no_module_can_be(name) -> None:
    base = make_model("BERT", "SEQ_CLS")
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=f"can't be named '{name}': in torch"):
        get_peft_model(base, make_config(), adapter_name=name)
    assert [name for name, _ in base.named_modules()] == before


NAMED_ALIKE = {
    "a deep prompt's layer": ("0", {"prompt_depth": "DEEP"}),
    "a network's layer": ("mlp", {"encoder_reparameterization_type": "MLP"}),
    "a part of the backbone": ("embeddings", {}),
}


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("case", NAMED_ALIKE)
def test_an_adapter_named_like_a_part_of_another_one(case, is_second, tmp_path) -> None:
    """PEFT would not save that part."""
    name, options = NAMED_ALIKE[case]
    adapters = [("one", make_config(**options)), (name, make_config())]
    (first, config), (second, other) = adapters if is_second else reversed(adapters)
    model = get_peft_model(make_model("BERT", "SEQ_CLS"), config, adapter_name=first).eval()
    batch = make_batch("BERT", "SEQ_CLS")
    expected = main_output(model(**batch))
    with pytest.raises(ValueError, match=f"can't be named 'one' and '{name}' on one model.*PEFT would not save it"):
        model.add_adapter(second, other)
    assert list(model.peft_config) == [first]
    assert torch.equal(main_output(model(**batch)), expected)
    if first != "one":
        return
    model.add_adapter("two", make_config())
    model.save_pretrained(tmp_path)
    for each in ("one", "two"):
        PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path / each)


def test_padding_takes_no_position() -> None:
    model = get_peft_model(make_model("GPT-2", "CAUSAL_LM", n_positions=10), make_config()).eval()
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    padded = model(input_ids=torch.full((1, 7), 7), attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(padded, model(input_ids=torch.full((1, 3), 7)).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="5 virtual tokens and 6 text tokens are 11 positions.* has 10"):
        model(input_ids=torch.full((1, 7), 7), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))


@pytest.mark.parametrize(("family", "task"), [("BERT", "SEQ_CLS"), ("RoBERTa", "SEQ_CLS"), ("OPT", "CAUSAL_LM")])
def test_a_text_too_long_for_the_positions_names_both_numbers(family, task) -> None:
    positions = 62 if family == "RoBERTa" else 64  # RoBERTa's first two are taken
    model = make_adapted(family, task)
    fits = torch.full((1, positions - V), 7)
    assert main_output(model(input_ids=fits)).shape[0] == 1
    text = positions - V + 1
    with pytest.raises(ValueError, match=f"{V} virtual tokens and {text} text tokens are .* has {positions}"):
        model(input_ids=torch.full((1, text), 7))
    if task == "CAUSAL_LM":
        with pytest.raises(ValueError, match=f"has {positions}"):
            model.generate(fits, max_new_tokens=5, do_sample=False)
    with pytest.raises(ValueError, match=f"`num_virtual_tokens` is {positions}, and .* has {positions} positions"):
        get_peft_model(make_model(family, task), make_config(task, positions))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, "4-D mask"),
        ({"attention_mask": {"full_attention": None}}, "dict"),
        ({"extra": torch.ones(2, 7, 3)}, r"per-token input `extra` of shape \(2, 7, 3\)"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), "attention_mask": None}, "several texts packed"),
        ({"lengths": torch.tensor([7, 7])}, "`lengths`, for which P-tuning has no rule"),
        ({"input_ids": torch.ones(2, 3, 7).long(), "attention_mask": None}, r"shape \(2, 3, 7\), not \(B, S\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 7])}, "several texts packed"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(arguments, message) -> None:
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), make_config()).eval()
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(7, 7)) | arguments
    model.get_base_model().set_attn_implementation("sdpa")  # the prompt is concatenated then
    assert "changed to 'sdpa'" in model.prompt_route
    with pytest.raises(ValueError, match=message):
        model.get_base_model().model(**batch, use_cache=False)


def test_a_prompt_for_another_place_is_refused(saved) -> None:
    change_weights(saved, lambda weights: {key.replace(".bert.", ".bart."): value for key, value in weights.items()})
    base = make_model("BERT", "SEQ_CLS")
    message = (
        "a prompt for 'bart.embeddings.word_embeddings', and the input embedding of this model is 'bert.embeddings"
    )
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert not hasattr(base, "peft_config")


def test_a_file_can_not_bring_weights_of_the_base_along(saved) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    base = make_model("BERT", "SEQ_CLS")
    before = base.get_parameter(name).clone()
    change_weights(saved, lambda weights: {**weights, f"base_model.model.{name}": torch.zeros(32, 48)})
    with pytest.raises(ValueError, match=f"holds '{name}', which is no part of the prompt"):
        PeftModel.from_pretrained(base, saved)
    assert torch.equal(base.get_parameter(name), before)
    assert not hasattr(base, "peft_config")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    ("family", "task", "saved_too"),
    [("Llama", "CAUSAL_LM", 2), ("Llama", "SEQ_CLS", 2), ("BERT", "TOKEN_CLS", 3), ("T5", "SEQ_2_SEQ_LM", 2)],
)
def test_a_vocabulary_resized_in_memory_is_told_when_saving(family, task, saved_too, tmp_path) -> None:
    auto_class, batch = TASKS[task], make_batch(family, task)
    make_model(family, task).save_pretrained(tmp_path / "base")
    base = auto_class.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(110, mean_resizing=False)
    model = get_peft_model(base, make_config(task)).eval()
    with pytest.warns(UserWarning, match=r"resized from 99 to 110 rows in memory only.*resize_token_embeddings\(110"):
        model.save_pretrained(tmp_path / "adapter")
    weights = safetensors.torch.load_file(tmp_path / "adapter" / WEIGHTS)
    assert len(weights) == 1 + saved_too  # with the embeddings, or the embedding and a head
    small, large = (auto_class.from_pretrained(tmp_path / "base") for _ in range(2))
    with pytest.raises(ValueError, match=r"shape \(110, 32\), and the model's has \(99, 32\).*resize its vocabulary"):
        PeftModel.from_pretrained(small, tmp_path / "adapter")
    assert not hasattr(small, "peft_config")
    # Both ways that the warning names.
    large.resize_token_embeddings(110, mean_resizing=False)
    loaded = PeftModel.from_pretrained(large, tmp_path / "adapter").eval()
    torch.testing.assert_close(main_output(loaded(**batch)), main_output(model(**batch)), rtol=0, atol=1e-6)
    base = model.unload()
    base.save_pretrained(tmp_path / "resized")
    again = get_peft_model(auto_class.from_pretrained(tmp_path / "resized"), make_config(task))
    again.save_pretrained(tmp_path / "again")  # a warning would be an error
    PeftModel.from_pretrained(auto_class.from_pretrained(tmp_path / "resized"), tmp_path / "again")


def test_a_vocabulary_that_is_saved_as_it_was_is_no_reason_to_warn(tmp_path) -> None:
    make_model("Llama", "CAUSAL_LM").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, make_config("CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert len(safetensors.torch.load_file(tmp_path / "adapter" / WEIGHTS)) == 3
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_head_that_counts_batches_is_loaded(tmp_path) -> None:
    def make() -> torch.nn.Module:
        base = make_model("BERT", "SEQ_CLS")
        base.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 2))
        return base

    config = make_config("SEQ_CLS")
    model = get_peft_model(make(), config)
    model(**make_batch("BERT", "SEQ_CLS"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    counts = [m.get_base_model().classifier.modules_to_save["default"][0].num_batches_tracked for m in (model, loaded)]
    assert counts == [1, 1]


SAVE_AND_KILL = """
import os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from accelerate import disk_offload
from families import TASKS, make_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft_ptuning_ext import PTuningConfig

folder = sys.argv[1]
config = PTuningConfig(num_virtual_tokens=5, encoder_hidden_size=8, task_type="SEQ_CLS")
model = get_peft_model(make_model("BERT", "SEQ_CLS"), config)
embedding = model.base_model._layer().ptuning_encoders["default"].embedding
model.save_pretrained(folder)
saves = 0
for _ in range(40):
    if (child := os.fork()) == 0:
        while True:
            with torch.no_grad():
                embedding.fill_(round(time.time() % 100))
            model.save_pretrained(folder)
    time.sleep(0.05 + random.random() / 20)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), folder)
    values = loaded.base_model._layer().ptuning_encoders["default"].embedding.unique()
    saves += len(values) == 1
print(saves)
"""


def test_a_save_that_is_killed_leaves_a_whole_adapter(tmp_path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    program = [sys.executable, "-c", SAVE_AND_KILL, str(tmp_path / "adapter")]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 20  # the others were killed before their first save
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", WEIGHTS}


def test_a_config_that_can_not_be_written_leaves_the_old_one(saved, monkeypatch) -> None:
    before = (saved / "adapter_config.json").read_bytes()
    config = make_config(length=9)
    monkeypatch.setattr(PTuningConfig, "to_dict", lambda self: {"a": 1, "b": object()})
    with pytest.raises(TypeError):
        config.save_pretrained(saved)
    assert (saved / "adapter_config.json").read_bytes() == before
    with pytest.raises(TypeError):
        config.save_pretrained(saved / "new" / "folder")
    assert not [path for path in saved.iterdir() if path.is_dir()]


ON_DISK = {"model": "disk", "lm_head": "cpu"}


@pytest.fixture(name="offloaded")
def _offloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads a saved model with parts of it on disk."""
    monkeypatch.chdir(tmp_path)  # PEFT writes weights on disk anew, and to a path that begins in the current folder

    def load(family: str, task: str, device_map: dict[str, str]) -> torch.nn.Module:
        make_model(family, task).save_pretrained(tmp_path / "base")
        return (
            type(make_model(family, task))
            .from_pretrained(tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offloaded")
            .eval()
        )

    return load


def save_prompt(folder: Path, family: str, task: str, **kwargs) -> torch.Tensor:
    """Saves an adapter whose head is no copy of the base's; returns the output with it."""
    config = PTuningConfig(num_virtual_tokens=V, task_type=task, **kwargs)
    model = get_peft_model(make_model(family, task), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(folder)
    return main_output(model(**make_batch(family, task)))


networks = pytest.mark.parametrize("encoder", ["NONE", "MLP", "LSTM", "RESIDUAL"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")  # PEFT reads it from disk
@networks
@torch.no_grad()
def test_a_prompt_is_loaded_beside_an_embedding_on_disk(encoder, offloaded, tmp_path) -> None:
    folder, batch = tmp_path / "adapter", make_batch("Llama", "CAUSAL_LM")
    expected = save_prompt(folder, "Llama", "CAUSAL_LM", encoder_reparameterization_type=encoder)
    model = offloaded("Llama", "CAUSAL_LM", ON_DISK)
    assert model.model.embed_tokens.weight.is_meta
    model.load_adapter(folder)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)

    # As PEFT has it, whose networks find no place on disk.
    model = offloaded("Llama", "CAUSAL_LM", ON_DISK)
    device_map = {f"base_model.model.{name}": device for name, device in ON_DISK.items()}
    options = {"device_map": device_map, "offload_folder": tmp_path / "again"}
    if encoder == "NONE":
        model = PeftModel.from_pretrained(model, folder, **options)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="is on disk, where PEFT has no place for the network"):
            PeftModel.from_pretrained(model, folder, **options)
        assert not hasattr(model, "peft_config")


def test_unloading_a_prompt_leaves_the_device_map_as_it_was(offloaded) -> None:
    base = offloaded("Llama", "CAUSAL_LM", ON_DISK)
    before = dict(base.hf_device_map)
    model = get_peft_model(base, make_config())
    assert base.hf_device_map != before
    assert model.unload().hf_device_map == before


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")  # PEFT reads it from disk
def test_peft_is_told_where_weights_on_disk_belong(offloaded, tmp_path) -> None:
    """PEFT lays a model out anew when it loads an adapter, and does not find where the weights on disk are."""
    save_prompt(tmp_path / "adapter", "Llama", "CAUSAL_LM")
    base = offloaded("Llama", "CAUSAL_LM", ON_DISK)
    with pytest.raises(ValueError, match="are on disk and can't be moved.*pass its `device_map`.*load_adapter"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


@torch.no_grad()
def test_a_prompt_for_a_model_offloaded_without_a_map(tmp_path) -> None:
    """transformers would load the prompt to where the first weight is, which is on no device."""
    expected = save_prompt(tmp_path / "adapter", "Llama", "CAUSAL_LM", encoder_reparameterization_type="MLP")
    model, batch = disk_offload(make_model("Llama", "CAUSAL_LM"), tmp_path / "off"), make_batch("Llama", "CAUSAL_LM")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="`load_adapter` of transformers would lose the prompt. Call `PeftModel.from"):
        model.load_adapter(tmp_path / "adapter")
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_head_on_disk_is_refused(offloaded, tmp_path) -> None:
    """The head beside a prompt would be the base's, silently."""
    expected = save_prompt(tmp_path / "adapter", "BERT", "SEQ_CLS")
    base, batch = offloaded("BERT", "SEQ_CLS", {"bert": "cpu", "classifier": "disk"}), make_batch("BERT", "SEQ_CLS")
    before, plain = state_of(base), main_output(base(**batch))
    with pytest.raises(ValueError, match="`modules_to_save` names 'classifier', whose weights are offloaded"):
        base.load_adapter(tmp_path / "adapter")
    assert state_of(base) == before
    assert torch.equal(main_output(base(**batch)), plain)
    model = offloaded("BERT", "SEQ_CLS", {"bert": "disk", "classifier": "cpu"})
    model.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=1e-6)
