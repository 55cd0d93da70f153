# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Deep prompts to and from stock PEFT's prefix tuning: the same numbers, compared with stock PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as tf
from families import FAMILIES, make_model
from making import make_adapted, make_config
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from reference import V, main_output, make_batch, unmasked
from releases import CACHE
from torch import nn

from peft_ptuning_ext import PTuningConfig, export_to_peft, import_from_peft


# Stock PEFT 0.21 uses the cache's name from before transformers 5.24.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
ROUNDS = {"rtol": 1e-5, "atol": 1e-5}  # stock PEFT has the prefix in a cache, this package in attention
WEIGHTS = "adapter_model.safetensors"
CELLS = [
    *[("BERT", task) for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")],
    *[("Llama", task) for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM")],
    *[(family, "CAUSAL_LM") for family in ("GPT-2", "OPT", "Mistral", "Gemma 3", "GPT-NeoX", "Bloom", "Falcon")],
    ("RoBERTa", "TOKEN_CLS"),
    ("ELECTRA", "SEQ_CLS"),
]
# Models with a head take no cache under that name, and stock PEFT then refuses them.
STOCK_REFUSES = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"} if CACHE == "cache" else set()
# Where distance is counted in columns, stock PEFT counts the padding between the prompt and the text, too.
LOCAL = frozenset({"Mistral", "Gemma 3"})
# Of Falcon's single key-value head, stock PEFT has to be told.
SIZES = {"Falcon": {"token_dim": 8, "num_attention_heads": 1}}


def make_stock(
    family: str, task: str, length: int = V, config_class: type = PrefixTuningConfig, **options
) -> PeftModel:
    """A model with random keys and values of stock PEFT; the same at every call."""
    if task in STOCK_REFUSES:
        pytest.skip("stock PEFT 0.21 has no prefix for such models in this release of transformers")
    torch.manual_seed(3)
    config = config_class(task_type=task, num_virtual_tokens=length, **SIZES.get(family, {}), **options)
    return get_peft_model(make_model(family, task), config).eval()


def make_deep(family: str, task: str, **options) -> PeftModel:
    return make_adapted(family, task, prompt_depth="DEEP", shift_positions=True, **options)


def load_stock(family: str, task: str, folder: Path) -> PeftModel:
    if task in STOCK_REFUSES:
        pytest.skip("stock PEFT 0.21 has no prefix for such models in this release of transformers")
    return PeftModel.from_pretrained(make_model(family, task), folder).eval()


@torch.no_grad()
def out(model: nn.Module, batch: dict) -> torch.Tensor:
    """The output at the text's tokens."""
    return unmasked(main_output(model(**batch)), batch["attention_mask"])


def states_of(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    encoder = next(m for path, m in model.named_modules() if path.endswith(f"ptuning_encoders.{name}"))
    return encoder.state_dict()


def assert_generates_the_same(one: PeftModel, other: PeftModel, batch: dict) -> None:
    if CACHE == "cache":
        return  # stock PEFT 0.21 then loses its prefix in `generate`
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        assert torch.equal(one.generate(**batch, **options), other.generate(**batch, **options))


@pytest.mark.parametrize("length", [V, 9])  # a window is 6
@pytest.mark.parametrize(("family", "task"), CELLS)
def test_a_stock_prefix_is_taken_over_and_given_back(family, task, length, tmp_path) -> None:
    stock = make_stock(family, task, length)
    stock.save_pretrained(tmp_path / "stock")
    model = import_from_peft(make_model(family, task), str(tmp_path / "stock"))
    config = model.peft_config["default"]
    assert (config.prompt_depth, config.num_virtual_tokens, config.shift_positions) == ("DEEP", length, True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    batches = [make_batch(family, task, lengths=(6, 6)), make_batch(family, task)]
    for batch in batches:
        torch.testing.assert_close(out(model, batch), out(stock, batch), **ROUNDS)
    if task == "CAUSAL_LM":
        padded = make_batch(family, task, pad_left=family not in LOCAL)
        assert_generates_the_same(model, stock, padded)

    export_to_peft(model, tmp_path / "again")
    tables = [safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("stock", "again")]
    assert tables[0].keys() == tables[1].keys()
    assert all(torch.equal(tables[0][key], tables[1][key]) for key in tables[0])
    again = load_stock(family, task, tmp_path / "again")
    assert torch.equal(out(again, batches[1]), out(stock, batches[1]))


@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
@pytest.mark.parametrize(("family", "task"), [("Llama", "CAUSAL_LM"), ("Gemma 3", "CAUSAL_LM"), ("BERT", "SEQ_CLS")])
def test_stock_peft_computes_the_same_from_a_deep_prompt(family, task, encoder, tmp_path) -> None:
    model, batch = make_deep(family, task, encoder_reparameterization_type=encoder), make_batch(family, task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ptuning_encoders" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    export_to_peft(model, tmp_path)
    stock = load_stock(family, task, tmp_path)
    assert type(stock.peft_config["default"]) is PrefixTuningConfig
    torch.testing.assert_close(out(stock, batch), out(model, batch), **ROUNDS)
    if task == "CAUSAL_LM":
        assert_generates_the_same(stock, model, batch)
    again = import_from_peft(make_model(family, task), str(tmp_path))
    assert torch.equal(out(again, batch), out(model, batch))


@pytest.mark.parametrize("options", [{"prefix_projection": True, "encoder_hidden_size": 6}, {"init_weights": "zero"}])
def test_what_made_a_stock_prefix_does_not_matter(options, tmp_path) -> None:
    stock, batch = make_stock("Llama", "CAUSAL_LM", **options), make_batch("Llama", "CAUSAL_LM")
    stock.save_pretrained(tmp_path)
    model = import_from_peft(make_model("Llama", "CAUSAL_LM"), str(tmp_path))
    torch.testing.assert_close(out(model, batch), out(stock, batch), **ROUNDS)


@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_model_takes_a_stock_prefix_and_gives_it_back(inside, tmp_path) -> None:
    stock, batch = make_stock("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM")
    stock.save_pretrained(tmp_path)
    base = make_model("Llama", "CAUSAL_LM")
    model = import_from_peft(torch.compile(base, backend="eager") if inside else base, str(tmp_path))
    torch.testing.assert_close(out(model, batch), out(stock, batch), **ROUNDS)
    export_to_peft(model if inside else torch.compile(model, backend="eager"), tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_a_cartridge_is_taken_over_and_trained_whole(tmp_path) -> None:
    stock = make_stock("Llama", "CAUSAL_LM", config_class=CartridgeConfig, num_frozen_tokens=2)
    stock.save_pretrained(tmp_path)
    batch = make_batch("Llama", "CAUSAL_LM")
    model = import_from_peft(make_model("Llama", "CAUSAL_LM"), str(tmp_path))
    torch.testing.assert_close(out(model, batch), out(stock, batch), **ROUNDS)

    before = states_of(model)
    assert import_from_peft(model, str(tmp_path), "second", is_trainable=True) is model
    model.set_adapter("second")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all((parameter.grad.abs().sum((0, 2)) > 0).all() for parameter in trained)  # at each of V positions
    assert all(torch.equal(before[name], value) for name, value in states_of(model, "second").items())
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        import_from_peft(model, str(tmp_path))


@pytest.mark.parametrize("modules", [None, ["pooler"]])
def test_trained_modules_go_to_stock_peft_and_back(modules, tmp_path) -> None:
    model, batch = make_deep("BERT", "SEQ_CLS", modules_to_save=modules), make_batch("BERT", "SEQ_CLS")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    export_to_peft(model, tmp_path)
    torch.testing.assert_close(out(load_stock("BERT", "SEQ_CLS", tmp_path), batch), out(model, batch), **ROUNDS)
    assert torch.equal(out(import_from_peft(make_model("BERT", "SEQ_CLS"), str(tmp_path)), batch), out(model, batch))


NO_PREFIX = {
    ("T5", "SEQ_2_SEQ_LM"): "it puts keys and values in the decoder's cache, where they take positions",
    ("BART", "SEQ_CLS"): "it puts keys and values in the decoder's cache, where they take positions",
    ("ALBERT", "SEQ_CLS"): "in a cache, which this model does not take",
    ("ModernBERT", "TOKEN_CLS"): "in a cache, which this model does not take",
    ("MPNet", "FEATURE_EXTRACTION"): "in a cache, which this model does not take",
    ("T5", "TOKEN_CLS"): "in a cache, which this model does not take",
}


@pytest.mark.parametrize(("family", "task"), NO_PREFIX)
def test_models_without_the_same_prefix_tuning_are_refused(family, task, tmp_path) -> None:
    options = {} if family in ("T5", "BART") else {"shift_positions": True}
    model = make_adapted(family, task, prompt_depth="DEEP", **options)
    for force in (None, task):
        with pytest.raises(ValueError, match=NO_PREFIX[family, task]):
            export_to_peft(model, tmp_path / "adapter", force=force)
    assert not (tmp_path / "adapter").exists()

    config = PrefixTuningConfig(
        task_type=task, num_virtual_tokens=V, token_dim=32, num_attention_heads=4, num_layers=2
    )
    config.save_pretrained(tmp_path)
    base = make_model(family, task)
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=NO_PREFIX[family, task]):
        import_from_peft(base, str(tmp_path))
    assert list(base.state_dict()) == names


def test_positions_that_were_left_alone_are_refused_unless_forced(tmp_path) -> None:
    model, batch = make_adapted(prompt_depth="DEEP"), make_batch("Llama", "CAUSAL_LM")
    with pytest.raises(ValueError, match="Train with shift_positions=True to export.*force='CAUSAL_LM'"):
        export_to_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    export_to_peft(model, tmp_path / "adapter", force="CAUSAL_LM")
    stock = load_stock("Llama", "CAUSAL_LM", tmp_path / "adapter")
    assert (out(stock, batch) - out(model, batch)).abs().max() > 1e-3


def test_a_model_without_positions_needs_no_shift(tmp_path) -> None:
    model, batch = make_adapted("Bloom", prompt_depth="DEEP"), make_batch("Bloom", "CAUSAL_LM")
    export_to_peft(model, tmp_path)
    torch.testing.assert_close(out(load_stock("Bloom", "CAUSAL_LM", tmp_path), batch), out(model, batch), **ROUNDS)


def test_text_that_stock_peft_alone_can_move_is_refused(tmp_path) -> None:
    """Its decoder takes no positions and counts them from what is in the cache, where this package has no prompt."""
    config = FAMILIES["BART"].config(is_decoder=True, is_encoder_decoder=False)
    model = get_peft_model(tf.BartForCausalLM(config), make_config("CAUSAL_LM", prompt_depth="DEEP"))
    with pytest.raises(ValueError, match="the text can't be told positions here"):
        export_to_peft(model, tmp_path / "adapter", force="CAUSAL_LM")
    assert not (tmp_path / "adapter").exists()


def test_what_stock_peft_has_no_place_for_is_refused(tmp_path) -> None:
    with_head = make_deep("Llama", "CAUSAL_LM", modules_to_save=["lm_head"])
    with_norm = make_deep("BERT", "FEATURE_EXTRACTION", modules_to_save=["pooler"])
    for model, name in ((with_head, "lm_head"), (with_norm, "pooler")):
        with pytest.raises(ValueError, match=rf"trained modules beside the prompt \({name}\)"):
            export_to_peft(model, tmp_path / "adapter")
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1}
    config = tf.DeepseekV3Config(
        **sizes, vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, topk_group=1
    )
    options = {"prompt_depth": "DEEP", "shift_positions": True}
    latent = get_peft_model(tf.DeepseekV3ForCausalLM(config), make_config("CAUSAL_LM", **options))
    with pytest.raises(ValueError, match=r"takes 4 × 12 and 4 × 8 in layers \[0, 1\]"):
        export_to_peft(latent, tmp_path / "adapter")
    config = tf.PersimmonConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.num_key_value_heads = 2  # which this architecture has no use for
    ungrouped = get_peft_model(tf.PersimmonForCausalLM(config), make_config("CAUSAL_LM", **options))
    with pytest.raises(ValueError, match="says 2 key-value heads of 8, which stock PEFT goes by"):
        export_to_peft(ungrouped, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def _change_table(folder: Path, change) -> None:
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(change(weights["prompt_embeddings"]), folder / WEIGHTS)


def _change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


BROKEN_TABLES = {
    "length": (lambda table: {"prompt_embeddings": table[1:].clone()}, r"has shape \(4, 64\), expected \(5, 64\)"),
    "width": (lambda table: {"prompt_embeddings": table[:, 1:].clone()}, r"has shape \(5, 63\), expected \(5, 64\)"),
    "rank": (lambda table: {"prompt_embeddings": table.flatten()}, r"has shape \(320,\), expected \(5, 64\)"),
    "before projection": (lambda table: {"prompt_embeddings": table[:, :16].clone()}, r"has shape \(5, 16\)"),
    "NaN": (lambda table: {"prompt_embeddings": table * torch.nan}, "NaN or infinite"),
    "integers": (lambda table: {"prompt_embeddings": table.long()}, "no floating point"),
    "name": (lambda table: {"prompts": table}, "has no 'prompt_embeddings'"),
    "projection": (
        lambda table: {"prompt_embeddings": table, "transform.0.weight": table.clone()},
        "holds 'transform.0.weight', which is no part of the prompt",
    ),
}
BROKEN_CONFIGS = {
    "layers": (
        {"num_layers": 3},
        "`num_layers` of .* is 3, and this model has 2: 2 layers with 2 key-value heads of 8",
    ),
    "heads": ({"num_attention_heads": 4}, "`num_attention_heads` of .* is 4, and this model has 2"),
    "size": ({"token_dim": 32}, "`token_dim` of .* is 32, and this model has 16"),
    "kind of size": ({"token_dim": "16"}, "`token_dim` of .* is '16', and this model has 16"),
    "decoder": ({"num_transformer_submodules": 2}, "stand in the decoder of an encoder-decoder"),
    "length of another kind": ({"num_virtual_tokens": "5"}, "`num_virtual_tokens` must be an int"),
    "no task": ({"task_type": None}, "has no task type"),
}


@pytest.mark.parametrize("case", [*BROKEN_TABLES, *BROKEN_CONFIGS, "truncated"])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_broken_stock_prefix_leaves_the_model_as_it_was(case, has_adapter, tmp_path) -> None:
    make_stock("Llama", "CAUSAL_LM").save_pretrained(tmp_path)
    if case in BROKEN_TABLES:
        change, message = BROKEN_TABLES[case]
        _change_table(tmp_path, change)
    elif case in BROKEN_CONFIGS:
        changes, message = BROKEN_CONFIGS[case]
        _change_config(tmp_path, **changes)
    else:
        message = "not a readable safetensors file"
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-50])
    model = make_adapted() if has_adapter else make_model("Llama", "CAUSAL_LM")
    names, batch = list(model.state_dict()), make_batch("Llama", "CAUSAL_LM")
    implementation = model.config._attn_implementation
    expected = out(model, batch)
    with pytest.raises((ValueError, TypeError), match=message):
        import_from_peft(model, str(tmp_path), "second")
    assert list(model.state_dict()) == names
    assert "second" not in getattr(model, "peft_config", {})
    assert model.config._attn_implementation == implementation
    assert torch.equal(out(model, batch), expected)


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, CartridgeConfig])
@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
def test_a_deep_prompt_starts_at_a_stock_prefix(config_class, encoder, tmp_path) -> None:
    stock, batch = make_stock("Llama", "CAUSAL_LM", config_class=config_class), make_batch("Llama", "CAUSAL_LM")
    stock.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path)}
    model = make_deep("Llama", "CAUSAL_LM", encoder_reparameterization_type=encoder, **start)
    torch.testing.assert_close(out(model, batch), out(stock, batch), **ROUNDS)
    with pytest.raises(ValueError, match="`prompt_depth` is 'INPUT', and the prompt of .* is 'DEEP'"):
        make_adapted(**start)
    with pytest.raises(ValueError, match=f"`num_virtual_tokens` is 4, and the prompt of .* has {V}"):
        get_peft_model(
            make_model("Llama", "CAUSAL_LM"), PTuningConfig(num_virtual_tokens=4, prompt_depth="DEEP", **start)
        )
    _change_config(tmp_path, num_layers=3)
    with pytest.raises(ValueError, match="`num_layers` of .* is 3, and this model has 2"):
        make_deep("Llama", "CAUSAL_LM", **start)
