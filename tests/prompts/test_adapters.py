# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The life of an adapter on a model: several of them, switching, deleting, dtypes, copies, loading."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import safetensors.torch
import torch
from families import CELLS, FAMILIES, make_model
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, get_peft_model
from reference import V, concatenated, main_output, make_batch
from torch import nn

from peft_ptuning_ext import PromptEncoderType, PTuningConfig


every_encoder = pytest.mark.parametrize("encoder", list(PromptEncoderType))
networks = pytest.mark.parametrize("encoder", [e for e in PromptEncoderType if e is not PromptEncoderType.NONE])
models = pytest.mark.parametrize(
    ("family", "task"), [("BERT", "SEQ_CLS"), ("Llama", "CAUSAL_LM"), ("T5", "SEQ_2_SEQ_LM")]
)


@pytest.fixture(name="out")
def _out():
    @torch.no_grad()
    def output(model, family: str = "BERT", task: str = "SEQ_CLS") -> torch.Tensor:
        return main_output(model(**make_batch(family, task)))

    return output


@models
def test_several_adapters_of_different_lengths(family, task, out, tmp_path) -> None:
    model = make_adapted(family, task)
    first = out(model, family, task)
    model.add_adapter("longer", make_config(task, V + 4, encoder_reparameterization_type="LSTM"))
    assert torch.equal(out(model, family, task), first)  # a new adapter is not active yet
    model.set_adapter("longer")
    second = out(model, family, task)
    assert not torch.allclose(first, second)
    assert model.prompt_embeddings().shape[0] == V + 4
    assert model.prompt_embeddings("default").shape[0] == V
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".longer" in name for name in trainable)
    model.set_adapter("default")
    assert torch.equal(out(model, family, task), first)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family, task), tmp_path / "longer", adapter_name="a")
    loaded.load_adapter(tmp_path, "b")
    torch.testing.assert_close(out(loaded, family, task), second, rtol=0, atol=1e-6)
    loaded.set_adapter("b")
    torch.testing.assert_close(out(loaded, family, task), first, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Adapter active was active which is now deleted:UserWarning")
@models
def test_deleting_an_adapter(family, task, out) -> None:
    base = out(make_model(family, task), family, task)
    model = make_adapted(family, task, adapter_name="active")
    model.add_adapter("idle", make_config(task, V + 1))
    model.add_adapter("last", make_config(task, V + 2))
    active = out(model, family, task)
    model.delete_adapter("idle")
    assert torch.equal(out(model, family, task), active)
    assert not [name for name in model.state_dict() if "idle" in name]
    with pytest.raises(ValueError, match="idle"):
        model.set_adapter("idle")
    model.delete_adapter("active")
    assert model.active_adapters == ["last"]
    assert len(model.prompt_embeddings()) == V + 2
    base_model = model.get_base_model()
    model.delete_adapter("last")
    assert torch.equal(out(base_model, family, task), base)
    assert not [name for name in model.state_dict() if "ptuning_" in name]


@models
def test_nested_disabling(family, task, out) -> None:
    base = out(make_model(family, task), family, task)
    model = make_adapted(family, task)
    enabled = out(model, family, task)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(out(model, family, task), base)
        assert torch.equal(out(model, family, task), base)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            raise ZeroDivisionError
        assert torch.equal(out(model, family, task), base)
    assert torch.equal(out(model, family, task), enabled)
    assert [p.requires_grad for n, p in model.named_parameters() if "ptuning_" in n] == [True]


@every_encoder
@models
def test_a_prompt_is_resumed_where_it_stopped(family, task, encoder, tmp_path) -> None:
    """Saving, loading as trainable and going on equals going on: the encoder is saved whole."""

    def train(model: PeftModel) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            main_output(model(**make_batch(family, task))).square().mean().backward()
            optimizer.step()

    model = make_adapted(family, task, encoder_reparameterization_type=encoder)
    train(model)
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(make_model(family, task), tmp_path, is_trainable=True).eval()
    for one in (model, resumed):
        train(one)
    torch.testing.assert_close(resumed.prompt_embeddings(), model.prompt_embeddings(), rtol=1e-6, atol=1e-7)


@every_encoder
def test_copying_the_parameters_of_an_adapter_copies_its_prompt(encoder, out) -> None:
    """What trainers with a reference adapter do: `add_adapter("ref", same config)`, then copy all parameters."""
    model = make_adapted("Llama", "CAUSAL_LM", encoder_reparameterization_type=encoder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.add_adapter("ref", model.peft_config["default"])
    assert not torch.equal(model.prompt_embeddings("ref"), model.prompt_embeddings("default"))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert torch.equal(model.prompt_embeddings("ref"), model.prompt_embeddings("default"))
    expected = out(model, "Llama", "CAUSAL_LM")
    model.set_adapter("ref")
    assert torch.equal(out(model, "Llama", "CAUSAL_LM"), expected)


def names_of_trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@networks
def test_the_constant_of_a_network_is_never_trained(encoder, tmp_path) -> None:
    model = make_adapted("Llama", "CAUSAL_LM", encoder_reparameterization_type=encoder)
    expected = names_of_trained(model)
    assert len(expected) > 1
    assert not [name for name in expected if name.endswith("offset")]
    trained, total = model.get_nb_trainable_parameters()
    assert total - trained == make_model("Llama", "CAUSAL_LM").num_parameters() + V * 32
    model.add_adapter("other", make_config("CAUSAL_LM"))
    model.set_adapter("other")
    model.set_adapter("default")
    assert names_of_trained(model) == expected
    model.set_requires_grad("default", False)
    assert not names_of_trained(model)
    model.set_requires_grad("default")
    assert names_of_trained(model) == expected

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**make_batch("Llama", "CAUSAL_LM")).logits.square().mean().backward()
    optimizer.step()
    assert {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    } == expected

    model.save_pretrained(tmp_path, selected_adapters=["default"])
    half = make_model("Llama", "CAUSAL_LM").to(torch.bfloat16)
    kwargs = {"is_trainable": True, "autocast_adapter_dtype": False}
    for loaded in (
        PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path, is_trainable=True),
        PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path, low_cpu_mem_usage=True, **kwargs),
        PeftModel.from_pretrained(half, tmp_path, **kwargs),
    ):
        assert names_of_trained(loaded) == expected
    in_transformers = make_model("Llama", "CAUSAL_LM")
    in_transformers.load_adapter(tmp_path, is_trainable=True)
    prefix = "base_model.model."
    assert names_of_trained(in_transformers) >= {name.removeprefix(prefix) for name in expected}
    assert not [name for name in names_of_trained(in_transformers) if name.endswith("offset")]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert names_of_trained(twin) == expected


@every_encoder
def test_the_exact_set_of_saved_keys(encoder, tmp_path) -> None:
    make_adapted("BERT", "SEQ_CLS", encoder_reparameterization_type=encoder).save_pretrained(tmp_path)
    saved = {
        key.removeprefix("base_model.model.")
        for key in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    }
    embedding = "bert.embeddings.word_embeddings.ptuning_encoders."
    inside = {key.removeprefix(embedding) for key in saved if key.startswith(embedding)}
    assert saved - {embedding + key for key in inside} == {"classifier.weight", "classifier.bias"}
    assert {key.partition(".")[0] for key in inside} == {
        "NONE": {"embedding"},
        "MLP": {"embedding", "offset", "mlp"},
        "LSTM": {"embedding", "offset", "lstm", "mlp"},
        "RESIDUAL": {"embedding", "offset", "mlp", "norm"},
    }[encoder.value]


@every_encoder
def test_low_cpu_mem_usage(encoder, out, tmp_path) -> None:
    model = make_adapted("BERT", "SEQ_CLS", encoder_reparameterization_type=encoder)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path, low_cpu_mem_usage=True)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    torch.testing.assert_close(out(loaded), out(model), rtol=0, atol=1e-6)
    assert torch.equal(loaded.prompt_embeddings(), model.prompt_embeddings())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_encoder
def test_a_float32_prompt_on_a_half_precision_base(encoder, dtype, tmp_path) -> None:
    base = make_model("Llama", "CAUSAL_LM").to(dtype)
    config = make_config("CAUSAL_LM", encoder_reparameterization_type=encoder)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-4 * torch.randn_like(parameter))  # what half precision can't hold
    encoder_state = {name: value for name, value in model.state_dict().items() if "ptuning_" in name}
    assert {value.dtype for value in encoder_state.values()} == {torch.float32}
    assert model.prompt_embeddings().dtype == dtype
    outputs = model(**make_batch("Llama", "CAUSAL_LM"))
    assert outputs.logits.dtype == dtype
    outputs.logits.float().square().mean().backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}

    # What is saved is what is loaded, with no rounding to the base's dtype on the way.
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        base = make_model("Llama", "CAUSAL_LM").to(dtype)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        for name, value in encoder_state.items():
            assert torch.equal(loaded.state_dict()[name], value), name

    config = make_config("CAUSAL_LM", encoder_reparameterization_type=encoder)
    base = make_model("Llama", "CAUSAL_LM").to(dtype)
    half = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert {value.dtype for name, value in half.state_dict().items() if "ptuning_" in name} == {dtype}
    half.save_pretrained(tmp_path / "half")
    base = make_model("Llama", "CAUSAL_LM").to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path / "half", low_cpu_mem_usage=True)
    assert {value.dtype for name, value in loaded.state_dict().items() if "ptuning_" in name} == {torch.float32}


@models
@torch.no_grad()
def test_autocast(family, task) -> None:
    model = make_adapted(family, task, encoder_reparameterization_type="MLP")
    batch = make_batch(family, task)
    expected = main_output(model(**batch))
    with torch.autocast("cpu", torch.bfloat16):
        output = main_output(model(**batch))
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.3)


@models
def test_copies_are_independent(family, task, out) -> None:
    model = make_adapted(family, task, encoder_reparameterization_type="RESIDUAL")
    expected = out(model, family, task)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin, family, task), expected)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name.endswith("default.embedding"):
                    parameter.add_(1.0)
        assert not torch.allclose(out(twin, family, task), expected)
        assert torch.equal(out(model, family, task), expected)
        base = twin.unload()
        assert not [m for m in base.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert torch.equal(out(model, family, task), expected)


@models
def test_state_dict_round_trip(family, task, out) -> None:
    model = make_adapted(family, task, encoder_reparameterization_type="MLP")
    other = get_peft_model(make_model(family, task), make_config(task, encoder_reparameterization_type="MLP")).eval()
    assert not torch.equal(out(other, family, task), out(model, family, task))
    other.load_state_dict(model.state_dict())
    assert torch.equal(out(other, family, task), out(model, family, task))


@pytest.mark.parametrize("size", [120, 80])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("Llama", "CAUSAL_LM", {"tie_word_embeddings": False}),
        ("Llama", "CAUSAL_LM", {"tie_word_embeddings": True}),
        ("Gemma 3", "CAUSAL_LM", {"tie_word_embeddings": True}),
        ("BERT", "SEQ_CLS", {}),
        ("BERT", "masked LM", {}),
        ("T5", "SEQ_2_SEQ_LM", {}),
        ("BART", "SEQ_2_SEQ_LM", {}),
        ("Llama", "FEATURE_EXTRACTION", {}),
    ],
)
def test_resizing_the_vocabulary_keeps_the_prompt(family, task, options, inside, size) -> None:
    config = make_config(task, encoder_reparameterization_type="MLP")
    base = make_model(family, task, **options)
    model = get_peft_model(base, config).eval()
    batch = {name: ids % 80 if "ids" in name else ids for name, ids in make_batch(family, task).items()}

    @torch.no_grad()
    def of_old_ids(model: nn.Module) -> torch.Tensor:
        output = main_output(model(**batch))
        return output[..., :80] if output.shape[-1] in (size, 99) else output

    expected, prompt = of_old_ids(model), model.prompt_embeddings()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = base.get_output_embeddings()
    was_tied = head is not None and head.weight is base.get_input_embeddings().weight
    model = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    base = model.get_base_model()
    resized = (base if inside else model).resize_token_embeddings(size, mean_resizing=False)
    assert resized.num_embeddings == size
    assert base.config.vocab_size == size
    torch.testing.assert_close(of_old_ids(model), expected, rtol=0, atol=1e-6)
    assert torch.equal(model.prompt_embeddings(), prompt)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    batch["input_ids"] = batch["input_ids"].clone().fill_(size - 1)
    assert torch.isfinite(of_old_ids(model)).all()
    model.add_adapter("second", config)
    with model.disable_adapter():
        expected = of_old_ids(model)

    base = model.unload()
    assert not {"resize_token_embeddings", "tie_weights"} & {
        name for module in base.modules() for name in vars(module)
    }
    torch.testing.assert_close(of_old_ids(base), expected, rtol=0, atol=1e-6)
    head = base.get_output_embeddings()
    assert was_tied == (head is not None and head.weight is base.get_input_embeddings().weight)
    assert base.resize_token_embeddings(size + 1, mean_resizing=False).num_embeddings == size + 1


def names_of_weights(model: nn.Module) -> list[set[str]]:
    """The names under which each weight is in a model."""
    names: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name)
    return [*names.values()]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        *((family, task, {}) for family, task in CELLS),
        ("Llama", "CAUSAL_LM", {"trainable_token_indices": [7]}),
        ("T5", "SEQ_2_SEQ_LM", {"trainable_token_indices": [7]}),
        ("BART", "SEQ_2_SEQ_LM", {"modules_to_save": ["lm_head"]}),
        ("T5", "SEQ_2_SEQ_LM", {"prompt_depth": "DEEP"}),
    ],
)
@torch.no_grad()
def test_weights_are_tied_again(family, task, options, out) -> None:
    """As the base model's are: accelerate, Trainer and evaluation harnesses call `tie_weights`."""
    sizes = {"tie_word_embeddings": True} if FAMILIES[family].kind == "decoder" else {}
    model = make_adapted(family, task, sizes, **options)
    expected, tied = out(model, family, task), names_of_weights(model)
    for name in [name for names in tied for name in sorted(names)[1:]]:
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, attribute, nn.Parameter(getattr(module, attribute).clone()))
    model.tie_weights()
    assert sorted(map(sorted, names_of_weights(model))) == sorted(map(sorted, tied))
    assert torch.equal(out(model, family, task), expected)
    assert "tie_weights" not in {name for module in model.unload().modules() for name in vars(module)}


@pytest.mark.parametrize("family", ["T5", "BART"])
def test_an_encoder_decoder_that_was_resized_before(family, out, tmp_path) -> None:
    """Its embedding is then one module with several paths."""

    def make() -> nn.Module:
        base = make_model(family, "SEQ_2_SEQ_LM")
        base.resize_token_embeddings(120, mean_resizing=False)
        return base

    base = make()
    modules = [name for name, _ in base.named_modules(remove_duplicate=False)]
    model = get_peft_model(base, make_config("SEQ_2_SEQ_LM")).eval()
    batch = make_batch(family, "SEQ_2_SEQ_LM")
    expected = concatenated(copy.deepcopy(model).unload(), "SEQ_2_SEQ_LM", model.prompt_embeddings(), batch)
    found = out(model, family, "SEQ_2_SEQ_LM")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    torch.testing.assert_close(out(loaded, family, "SEQ_2_SEQ_LM"), found, rtol=0, atol=1e-6)
    assert [name for name, _ in loaded.unload().named_modules(remove_duplicate=False)] == modules


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("trained", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7]}])
def test_a_vocabulary_that_is_trained_is_not_resized(inside, trained, out) -> None:
    model = make_adapted("Llama", "CAUSAL_LM", **trained)
    expected = out(model, "Llama", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"keep their size. Get the base model back with `unload\(\)`, resize it"):
        (model.get_base_model() if inside else model).resize_token_embeddings(120)
    assert torch.equal(out(model, "Llama", "CAUSAL_LM"), expected)


def test_threads_share_a_model(out) -> None:
    model = make_adapted("BERT", "SEQ_CLS")
    expected = out(model)
    found: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(20):
            found.append(out(model))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_disabling_leaves_what_is_trained_as_it_was(is_trainable, tmp_path) -> None:
    make_adapted("BERT", "SEQ_CLS", encoder_reparameterization_type="MLP").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path, is_trainable=is_trainable)
    before = names_of_trained(model)
    assert bool(before) == is_trainable
    with model.disable_adapter():
        assert names_of_trained(model) == before
    assert names_of_trained(model) == before
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert names_of_trained(model) == before
    model.set_adapter("default")  # which PEFT documents to train what it activates
    assert names_of_trained(model)
    with model.disable_adapter():
        model.set_adapter("default", inference_mode=True)
    assert not names_of_trained(model)

    in_transformers = make_model("BERT", "SEQ_CLS")
    in_transformers.load_adapter(tmp_path, is_trainable=is_trainable)
    before = names_of_trained(in_transformers)
    in_transformers.disable_adapters()
    in_transformers.enable_adapters()
    prompt = {name for name in before if "ptuning_" in name}
    assert {name for name in names_of_trained(in_transformers) if "ptuning_" in name} == prompt
    assert bool(prompt) == is_trainable


def test_merging_is_refused_with_the_reason(out) -> None:
    model = make_adapted("BERT", "SEQ_CLS")
    expected = out(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="A prompt can't be merged: it is .*`unload\\(\\)`.*export_standalone"):
            merge()
    assert torch.equal(out(model), expected)


def test_prompt_embeddings_is_what_enters_the_model() -> None:
    model = make_adapted("BERT", "SEQ_CLS", encoder_reparameterization_type="LSTM")
    seen = []
    backbone = model.get_base_model().bert
    hook = backbone.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**make_batch("BERT", "SEQ_CLS"))
    hook.remove()
    assert torch.equal(seen[0][0, :V], model.prompt_embeddings())
    assert model.prompt_embeddings().requires_grad
    with pytest.raises(ValueError, match=r"no adapter 'x', only \['default'\]"):
        model.prompt_embeddings("x")


def test_trainable_parameters_are_the_prompt_and_the_head(capsys) -> None:
    model = make_adapted("BERT", "SEQ_CLS")
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == V * 32 + 2 * 32 + 2
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d} || all params: {total:,d}" in capsys.readouterr().out
    assert model.get_model_status().enabled is True
    assert [(status.name, status.active_adapters) for status in model.get_layer_status()] == [
        ("model.bert.embeddings.word_embeddings", ["default"]),
        ("model.classifier", ["default"]),
    ]


def test_inference_mode_freezes_the_prompt() -> None:
    model = make_adapted("BERT", "SEQ_CLS", inference_mode=True)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_requires_grad_can_be_set_by_adapter() -> None:
    model = make_adapted("BERT", "FEATURE_EXTRACTION")
    model.add_adapter("other", make_config("FEATURE_EXTRACTION"))
    model.set_requires_grad("other")
    model.set_requires_grad("default", requires_grad=False)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name.rpartition("ptuning_encoders.")[2] for name in trainable] == ["other.embedding"]


def test_train_and_eval_reach_the_encoder() -> None:
    model = make_adapted("BERT", "SEQ_CLS", encoder_dropout=0.5)
    assert torch.equal(model.prompt_embeddings(), model.prompt_embeddings())
    model.train()
    assert not torch.equal(model.prompt_embeddings(), model.prompt_embeddings())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@pytest.mark.parametrize("is_training", [False, True])
def test_a_new_adapter_takes_the_mode_of_the_model(is_training, tmp_path) -> None:
    def make_noisy() -> PTuningConfig:
        return make_config("SEQ_CLS", encoder_dropout=0.5, encoder_reparameterization_type="MLP")

    def make_base() -> torch.nn.Module:
        return make_model("RoBERTa", "SEQ_CLS").train(is_training)  # with dropout in the head

    batch = make_batch("RoBERTa", "SEQ_CLS")
    model = get_peft_model(make_base(), make_noisy())
    model.save_pretrained(tmp_path)
    model.add_adapter("added", make_noisy())
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    injected = make_base()
    injected.add_adapter(PTuningConfig(encoder_dropout=0.5, modules_to_save=["classifier"]))
    injected.add_adapter(PTuningConfig(encoder_dropout=0.5, modules_to_save=["classifier"]), "second")
    for one in (model, injected):
        for name, module in one.named_modules():
            if "ptuning_encoders." in name or "modules_to_save." in name:
                assert module.training == is_training, name
        for name in one.peft_config:
            one.set_adapter(name)
            assert torch.equal(one(**batch).logits, one(**batch).logits) != is_training


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.parametrize("is_active", [False, True])
@pytest.mark.parametrize("first", ["policy", "reward"])
@torch.no_grad()
def test_two_models_around_one_backbone(first, is_active, out) -> None:
    """Prompts of both are at the backbone, one of them in front; unloading one model leaves the other's."""
    bases = {"policy": make_model("Llama", "CAUSAL_LM"), "reward": make_model("Llama", "SEQ_CLS")}
    bases["reward"].model = bases["policy"].model
    plain = {name: out(base, "Llama", "CAUSAL_LM") for name, base in bases.items()}
    tasks = {"policy": "CAUSAL_LM", "reward": "SEQ_CLS"}
    models = {name: get_peft_model(bases[name], make_config(tasks[name]), name).eval() for name in bases}
    found = {}
    for name, model in models.items():
        model.set_adapter(name)
        found[name] = out(model, "Llama", "CAUSAL_LM")
    for name, model in models.items():
        model.set_adapter(name)
        assert torch.equal(out(model, "Llama", "CAUSAL_LM"), found[name])

    other = next(name for name in models if name != first)
    models[other].set_adapter(other)
    trained = names_of_trained(models[other])
    assert [name for name in trained if f".{other}." in name]
    if is_active:
        models[first].set_adapter(first)
    assert torch.equal(out(models[first].unload(), "Llama", "CAUSAL_LM"), out(bases[first], "Llama", "CAUSAL_LM"))
    assert torch.equal(out(models[other], "Llama", "CAUSAL_LM"), found[other])
    assert names_of_trained(models[other]) == trained
    assert models[other].unload() is bases[other]
    for name, base in bases.items():
        assert torch.equal(out(base, "Llama", "CAUSAL_LM"), plain[name])
        untouched = make_model("Llama", tasks[name])
        modules = [(name, type(module)) for name, module in untouched.named_modules()]
        assert [(name, type(module)) for name, module in base.named_modules()] == modules


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_prompt_on_a_model_with_lora_layers(out) -> None:
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    base = get_peft_model(make_model("BERT", "SEQ_CLS"), lora, adapter_name="low_rank").base_model.model
    alone = out(base)
    model = get_peft_model(base, make_config("FEATURE_EXTRACTION")).eval()
    assert not torch.allclose(out(model), alone)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@torch.no_grad()
def test_beside_lora_in_transformers_each_is_switched_by_its_name() -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    model = make_model("Llama", "CAUSAL_LM")
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "low_rank")
    low_rank = main_output(model.eval()(**batch))
    model.add_adapter(PTuningConfig(num_virtual_tokens=V), "prompt")
    prompt = main_output(model.eval()(**batch))
    model.set_adapter("low_rank")
    assert torch.equal(main_output(model(**batch)), low_rank)
    model.set_adapter(["low_rank", "prompt"])
    both = main_output(model(**batch))
    assert not torch.allclose(both, low_rank)
    assert not torch.allclose(both, prompt)
    model.set_adapter("prompt")
    assert torch.equal(main_output(model(**batch)), prompt)


def test_selected_adapters_are_saved(tmp_path) -> None:
    model = make_adapted("BERT", "SEQ_CLS", adapter_name="first")
    model.add_adapter("second", make_config("SEQ_CLS", V + 1))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"second"}
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


@pytest.mark.parametrize("family", ["BERT", "Llama", "T5"])
def test_input_gradients_for_a_base_in_checkpointed_training(family) -> None:
    """`enable_input_require_grads`, which PEFT turns on for quantized bases, meets the wrapped embedding."""
    task = {"BERT": "SEQ_CLS", "Llama": "CAUSAL_LM", "T5": "SEQ_2_SEQ_LM"}[family]
    model = make_adapted(family, task)
    expected = main_output(model(**make_batch(family, task))).detach()
    model.enable_input_require_grads()
    output = main_output(model(**make_batch(family, task)))
    assert torch.equal(output, expected)
    output.sum().backward()
    model.disable_input_require_grads()
    base = model.unload()
    assert not [m for m in base.modules() if m._forward_pre_hooks or m._forward_hooks]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generating_in_half_precision_with_positional_ids(dtype) -> None:
    model = get_peft_model(make_model("Llama", "CAUSAL_LM").to(dtype), make_config("CAUSAL_LM")).eval()
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 10)
    assert torch.equal(generated, model.generate(inputs=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False))


def compiled_whole(base: nn.Module) -> nn.Module:
    return torch.compile(base, backend="eager")


def compiled_backbone(base: nn.Module) -> nn.Module:
    setattr(base, base.base_model_prefix, torch.compile(base.base_model, backend="eager"))
    return base


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_backbone])
@pytest.mark.parametrize(("family", "task"), [("BERT", "SEQ_CLS"), ("Llama", "CAUSAL_LM")])
def test_an_adapter_of_a_compiled_model_is_that_of_a_plain_one(family, task, compiled, out, tmp_path) -> None:
    def make(name: str) -> nn.Module:
        return compiled(make_model(family, task)) if name == "compiled" else make_model(family, task)

    models, keys = {}, {}
    for name in ("compiled", "plain"):
        config = make_config(task, encoder_reparameterization_type="MLP")
        models[name] = get_peft_model(make(name), config).eval()
        models[name].save_pretrained(tmp_path / name)
        keys[name] = list(safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors"))
    assert sorted(keys["compiled"]) == sorted(keys["plain"])
    assert [n for n in models["compiled"].state_dict() if "_orig_mod" in n] == []

    for saved, base in (("compiled", "plain"), ("plain", "compiled"), ("compiled", "compiled")):
        expected = out(models[saved], family, task)
        loaded = PeftModel.from_pretrained(make(base), tmp_path / saved).eval()
        torch.testing.assert_close(out(loaded, family, task), expected, rtol=0, atol=1e-5)
        loaded.load_adapter(tmp_path / saved, "second")
        loaded.set_adapter("second")
        torch.testing.assert_close(out(loaded, family, task), expected, rtol=0, atol=1e-5)
    models["plain"].load_state_dict(models["compiled"].state_dict())
    assert torch.equal(models["plain"].prompt_embeddings(), models["compiled"].prompt_embeddings())
    models["compiled"].load_state_dict(loaded.state_dict(), strict=False)
    assert torch.equal(loaded.prompt_embeddings("default"), models["compiled"].prompt_embeddings())

    base = models["compiled"].unload()
    assert [name for name, _ in base.named_parameters()] == [name for name, _ in make("compiled").named_parameters()]


@pytest.mark.parametrize("way", ["torch.compile", "compile"])
def test_a_compiled_adapted_model_is_saved_like_a_plain_one(way, out, tmp_path) -> None:
    model = make_adapted("BERT", "SEQ_CLS")
    expected, before = out(model), dict(model.state_dict())
    if way == "compile":
        compiled = model
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(out(compiled), expected, rtol=0, atol=1e-5)
    assert torch.equal(compiled.prompt_embeddings(), model.prompt_embeddings())
    assert list(compiled.state_dict()) == [("" if way == "compile" else "_orig_mod.") + name for name in before]
    compiled.load_state_dict(compiled.state_dict())
    compiled.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path)
    torch.testing.assert_close(out(loaded), expected, rtol=0, atol=1e-5)
