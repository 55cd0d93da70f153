# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The life of deep prompts: made, saved, loaded, beside others; and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from by_hand import deep_by_hand
from families import DECODERS, FAMILIES, TASKS, make_model
from making import make_adapted, make_config
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from reference import V, main_output, make_batch, unmasked
from transformers import (
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaModel,
    DogeConfig,
    DogeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextModel,
)

from peft_ptuning_ext import PromptTemplate, PTuningConfig, PTuningLayer
from peft_ptuning_ext.prompts.deep import random_states


DEEP = {"prompt_depth": "DEEP"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

models = pytest.mark.parametrize(
    ("family", "task"), [("BERT", "SEQ_CLS"), ("Llama", "CAUSAL_LM"), ("MPNet", "SEQ_CLS")]
)


def make_deep(family: str = "BERT", task: str = "SEQ_CLS", **options) -> PeftModel:
    return make_adapted(family, task, **DEEP | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_depth": "EVERY"}, "`prompt_depth` must be one of 'INPUT', 'DEEP', got 'EVERY'"),
        ({"prompt_depth": None}, "`prompt_depth` must be one of"),
        ({"shift_positions": True}, "`shift_positions` is only used with prompt_depth='DEEP'"),
        ({"prompt_tuning_init": "ZERO_VALUES"}, "only used with prompt_depth='DEEP'"),
        (DEEP | {"encoder_reparameterization_type": "LSTM"}, "'LSTM' makes vectors for the input.*'NONE' or 'MLP'"),
        (DEEP | {"encoder_reparameterization_type": "RESIDUAL"}, "'RESIDUAL' makes vectors for the input"),
        (
            DEEP | {"encoder_reparameterization_type": "NONE", "encoder_hidden_size": 8},
            "`encoder_hidden_size` has no meaning.*Leave it out or choose 'MLP'",
        ),
    ],
)
def test_fields_that_have_no_meaning_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PTuningConfig(**options)


def test_a_template_is_for_prompts_at_the_input() -> None:
    template = PromptTemplate("{text} {prompt:5}", placeholder="<slot>", placeholder_id=4)
    with pytest.raises(ValueError, match="prompt_depth='DEEP' has none.* Leave one of the two out"):
        PTuningConfig(**DEEP, prompt_template=template)


def test_a_flag_is_a_flag() -> None:
    with pytest.raises(TypeError, match="`shift_positions` must be a bool, got 'yes'"):
        PTuningConfig(**DEEP, shift_positions="yes")


def test_dropout_alone_asks_for_no_network() -> None:
    config = PTuningConfig(**DEEP, encoder_dropout=0.1)
    assert config.encoder_reparameterization_type == "NONE"
    assert PTuningConfig(**DEEP, encoder_num_layers=1).encoder_reparameterization_type == "MLP"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: BertModel(
                BertConfig(
                    hidden_size=32,
                    num_attention_heads=4,
                    num_hidden_layers=2,
                    is_decoder=True,
                    add_cross_attention=True,
                )
            ),
            "BertModel: it has cross-attention",
        ),
        (
            lambda: DebertaModel(
                DebertaConfig(vocab_size=99, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
            ),
            "DebertaModel: its attention does not go through transformers' attention interface",
        ),
        (
            lambda: Qwen3NextModel(
                Qwen3NextConfig(
                    vocab_size=99,
                    hidden_size=32,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=8,
                    intermediate_size=48,
                    num_experts=2,
                    num_experts_per_tok=1,
                    moe_intermediate_size=8,
                    shared_expert_intermediate_size=8,
                    linear_num_key_heads=2,
                    linear_num_value_heads=2,
                    linear_key_head_dim=8,
                    linear_value_head_dim=8,
                )
            ),
            "Qwen3NextModel: it has layers of another kind than attention",
        ),
        (
            lambda: DogeForCausalLM(
                DogeConfig(
                    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
                )
            ),
            "DogeModel: its attention makes a mask of the values in its cache",
        ),
    ],
)
def test_models_that_are_refused_stay_as_they_were(model, reason: str) -> None:
    base = model()
    names = [(name, type(module)) for name, module in base.named_modules()]
    attention = base.config._attn_implementation
    with pytest.raises(ValueError, match=f"prompt_depth='DEEP'.*{reason}.*Choose prompt_depth='INPUT'"):
        get_peft_model(base, PTuningConfig(**DEEP))
    assert [(name, type(module)) for name, module in base.named_modules()] == names
    assert base.config._attn_implementation == attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_a_random_start_is_made_where_the_model_is() -> None:
    # The meta device stands for any that is not the CPU: it refuses to add numbers of both.
    sample = torch.empty(1, 2, 7, 4, device="meta")
    key, value = random_states({0: (sample, sample)}, V)[0]
    assert key.device == value.device == sample.device


@models
def test_it_is_added_to_a_model_without_weights(family: str, task: str) -> None:
    with torch.device("meta"):
        base = TASKS[task].from_config(FAMILIES[family].config())
    model = get_peft_model(base, make_config(task, **DEEP))
    found = {tuple(t.shape) for pair in model.prompt_key_values().values() for t in pair}
    assert found == {tuple(t.shape) for pair in make_deep(family, task).prompt_key_values().values() for t in pair}


@torch.no_grad()
def test_it_is_added_to_a_model_whose_weights_are_offloaded(tmp_path) -> None:
    model, batch = make_deep("Llama", "CAUSAL_LM"), make_batch("Llama", "CAUSAL_LM")
    model.save_pretrained(tmp_path)
    base = cpu_offload(make_model("Llama", "CAUSAL_LM"), execution_device="cpu")
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


def test_an_attention_that_no_prompt_reaches() -> None:
    base = make_model("BERT", "SEQ_CLS")
    base.config._attn_implementation = "of_nobody"
    with pytest.raises(ValueError, match="implementation is 'of_nobody', which is not registered with `AttentionInt"):
        get_peft_model(base, make_config("SEQ_CLS", **DEEP))
    model = make_deep()
    model.get_base_model().set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="was changed to 'sdpa', which does not see a prompt in every layer"):
        model(**make_batch("BERT", "SEQ_CLS"))


def _change(folder, change) -> None:
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file({k: v.contiguous() for k, v in change(weights).items()}, folder / WEIGHTS)


def _nan_in_one(weights: dict) -> dict:
    return {k: v.clone().fill_(float("nan")) if k.endswith("values.1") else v for k, v in weights.items()}


def _fewer_layers(weights: dict) -> dict:
    return {k: v for k, v in weights.items() if not k.endswith(".1")}


def _other_heads(weights: dict) -> dict:
    return {k: v.reshape(2, V, 16) if ".keys." in k or ".values." in k else v for k, v in weights.items()}


def _other_width(weights: dict) -> dict:
    return {k: v[..., :4] if ".keys." in k else v for k, v in weights.items()}


def _as_input(weights: dict) -> dict:
    kept = {k: v for k, v in weights.items() if "ptuning_" not in k}
    key = next(k for k in weights if k.endswith("keys.0")).replace("keys.0", "embedding")
    return kept | {key: torch.zeros(V, 32)}


BROKEN = {
    "NaN in one layer": (_nan_in_one, "'values.1' holds NaN"),
    "fewer layers": (_fewer_layers, "keys and values for 1 layers, and the model has 2"),
    "other heads": (_other_heads, r"has shape \(2, 5, 16\), expected \(4, 5, 8\)"),
    "another width": (_other_width, r"has shape \(4, 5, 4\), expected \(4, 5, 8\)"),
    "another depth": (_as_input, "holds a prompt of prompt_depth='INPUT'.*its config asks for prompt_depth='DEEP'"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_broken_adapter_leaves_the_model_as_it_was(case: str, low_cpu_mem_usage: bool, tmp_path) -> None:
    make_deep().save_pretrained(tmp_path)
    change, message = BROKEN[case]
    _change(tmp_path, change)
    base, untouched = make_model("BERT", "SEQ_CLS"), make_model("BERT", "SEQ_CLS")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
    assert base.config._attn_implementation == untouched.config._attn_implementation
    model = make_adapted("BERT", "SEQ_CLS")
    expected, batch = model.prompt_embeddings(), make_batch("BERT", "SEQ_CLS")
    output = main_output(model(**batch))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "deep")
    assert torch.equal(model.prompt_embeddings(), expected)
    assert torch.equal(main_output(model(**batch)), output)
    assert list(model.peft_config) == ["default"]


def test_the_config_of_one_depth_beside_the_weights_of_the_other(tmp_path) -> None:
    for depth, other in (("INPUT", "DEEP"), ("DEEP", "INPUT")):
        folder = tmp_path / depth
        make_adapted("BERT", "SEQ_CLS", prompt_depth=depth).save_pretrained(folder)
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"prompt_depth": other}))
        with pytest.raises(ValueError, match=f"prompt_depth='{depth}'.* asks for prompt_depth='{other}'"):
            PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), folder)


def test_a_length_that_the_weights_do_not_have_takes_no_memory(tmp_path) -> None:
    make_deep(prompt_tuning_init="SAMPLE_VOCAB").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"num_virtual_tokens": 2**24}))
    with pytest.raises(ValueError, match=r"expected \(4, 16777216, 8\)"):
        PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path)


@models
@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
def test_low_cpu_mem_usage(family: str, task: str, encoder: str, tmp_path) -> None:
    model, batch = make_deep(family, task, encoder_reparameterization_type=encoder), make_batch(family, task)
    expected = main_output(model(**batch))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family, task), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(main_output(loaded(**batch)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
def test_adapters_of_transformers_itself(encoder: str, tmp_path) -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    model = make_model("Llama", "CAUSAL_LM")
    plain = main_output(model(**batch))
    model.add_adapter(make_config(**DEEP, encoder_reparameterization_type=encoder), "deep")
    expected = main_output(model.eval()(**batch))
    assert not torch.allclose(expected, plain)
    model.disable_adapters()
    assert torch.equal(main_output(model(**batch)), plain)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    other = make_model("Llama", "CAUSAL_LM")
    other.load_adapter(tmp_path, "loaded", is_trainable=True)
    torch.testing.assert_close(main_output(other.eval()(**batch)), expected, rtol=0, atol=1e-6)
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trained == {
        name.replace(".deep.", ".loaded.") for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert any(".keys." in name for name in trained) == (encoder == "NONE")


@models
def test_autocast(family: str, task: str) -> None:
    model, batch = make_deep(family, task), make_batch(family, task)
    expected = main_output(model(**batch))
    with torch.autocast("cpu", torch.bfloat16):
        output = main_output(model(**batch))
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "ptuning_" in name]
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


@models
@torch.no_grad()
def test_threads_share_a_model(family: str, task: str) -> None:
    model = make_deep(family, task)
    batches = [make_batch(family, task, lengths=(length, 4)) for length in range(4, 20)]
    expected = [main_output(model(**batch)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(torch.no_grad()(lambda batch: main_output(model(**batch))), batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
@torch.no_grad()
def test_beside_a_lora_below() -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    lora = inject_adapter_in_model(config, make_model("Llama", "CAUSAL_LM"))
    model = get_peft_model(lora, make_config("CAUSAL_LM", **DEEP), adapter_name="prompt").eval()
    states = model.prompt_key_values()
    output = main_output(model(**batch))
    torch.manual_seed(0)
    merged = get_peft_model(make_model("Llama", "CAUSAL_LM"), config).merge_and_unload()
    expected = deep_by_hand("Llama", merged.eval(), states, batch)
    mask = batch["attention_mask"]
    torch.testing.assert_close(unmasked(output, mask), unmasked(expected, mask), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_prompt_starts_at_that_of_another_task(tmp_path) -> None:
    source = make_deep("BERT", "SEQ_CLS", encoder_reparameterization_type="MLP")
    source.save_pretrained(tmp_path / "source")
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": tmp_path / "source"}
    model = make_deep("BERT", "TOKEN_CLS", **start)
    for pair, other in zip(model.prompt_key_values().values(), source.prompt_key_values().values(), strict=True):
        torch.testing.assert_close(pair, other, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="`prompt_depth` is 'INPUT', and the prompt of .* is 'DEEP': no vectors"):
        make_adapted("BERT", "SEQ_CLS", **start)
    with pytest.raises(ValueError, match="keys and values for 2 layers, and the model has 3"):
        make_adapted("BERT", "SEQ_CLS", sizes={"num_hidden_layers": 3}, **DEEP, **start)


def _started_at(source: PeftModel, folder, family: str, task: str, **options) -> PeftModel:
    source.save_pretrained(folder)
    return make_deep(family, task, prompt_tuning_init="ADAPTER", prompt_tuning_init_adapter=folder, **options)


@pytest.mark.parametrize("shift_positions", [False, True])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_start_at_vectors_computes_what_they_did(family: str, shift_positions: bool, tmp_path) -> None:
    source = make_adapted(family, "CAUSAL_LM", encoder_reparameterization_type="MLP")
    for name, parameter in source.named_parameters():
        if "ptuning_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    batch = make_batch(family, "CAUSAL_LM", pad_left=family != "Falcon")
    expected = unmasked(source(**batch).logits, batch["attention_mask"])
    model = _started_at(source, tmp_path, family, "CAUSAL_LM", shift_positions=shift_positions)
    difference = (unmasked(model(**batch).logits, batch["attention_mask"]) - expected).abs().max()
    # The text of a model that has learned a vector for each position is at its own positions unless it is shifted.
    assert (difference < 1e-4) == (shift_positions or family not in ("GPT-2", "OPT"))
    model.save_pretrained(tmp_path / "deep")
    loaded = PeftModel.from_pretrained(make_model(family, "CAUSAL_LM"), tmp_path / "deep")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_start_at_the_vectors_of_tokens_is_a_start_at_the_tokens(family: str, tmp_path) -> None:
    task = FAMILIES[family].tasks[0]
    source = make_adapted(family, task, prompt_tuning_init="SAMPLE_VOCAB")
    model = _started_at(source, tmp_path, family, task)
    expected = make_deep(family, task, prompt_tuning_init="SAMPLE_VOCAB").prompt_key_values()
    for layer, pair in model.prompt_key_values().items():
        torch.testing.assert_close(pair, expected[layer], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_deep_prompt_starts_at_a_prompt_of_stock_peft(tmp_path) -> None:
    stock = get_peft_model(
        make_model("Llama", "CAUSAL_LM"), PromptTuningConfig(num_virtual_tokens=V, task_type="CAUSAL_LM")
    )
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))
    expected = stock.eval()(**batch).logits[:, V:]
    model = _started_at(stock, tmp_path, "Llama", "CAUSAL_LM")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stacks", ["DECODER", "BOTH"])
def test_vectors_at_the_input_are_no_start_for_a_decoder(stacks: str, tmp_path) -> None:
    source = make_adapted("T5", "SEQ_2_SEQ_LM")
    with pytest.raises(
        ValueError, match=f"`prompt_stacks` is '{stacks}', and the prompt of .* nothing for the decoder"
    ):
        _started_at(source, tmp_path, "T5", "SEQ_2_SEQ_LM", prompt_stacks=stacks)
    assert _started_at(source, tmp_path, "T5", "SEQ_2_SEQ_LM").peft_config["default"].is_deep


def test_vectors_that_depend_on_the_text_are_no_start(tmp_path) -> None:
    template = PromptTemplate("{text} {prompt:5}", placeholder="<slot>", placeholder_id=4)
    source = make_adapted("Llama", "CAUSAL_LM", length=V, prompt_template=template)
    with pytest.raises(ValueError, match="stand where its template says. .*no deep prompt can start there"):
        _started_at(source, tmp_path, "Llama", "CAUSAL_LM")


def test_a_start_that_half_precision_can_not_hold(tmp_path) -> None:
    source = make_adapted("Llama", "CAUSAL_LM")
    with torch.no_grad():
        next(p for name, p in source.named_parameters() if "ptuning_" in name).fill_(1e5)
    source.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": tmp_path}
    base = make_model("Llama", "CAUSAL_LM").half()
    message = "LlamaModel in torch.float16 gives the deep prompt keys and values .* NaN or infinite"
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, make_config("CAUSAL_LM", **DEEP, **start))
    assert not any(isinstance(module, PTuningLayer) for module in base.modules())
    get_peft_model(base.float(), make_config("CAUSAL_LM", **DEEP, **start))


@pytest.mark.parametrize("start", ["RANDOM", "SAMPLE_VOCAB"])
def test_a_model_that_is_not_finite_gives_no_start(start: str, tmp_path) -> None:
    base = make_model("BERT", "SEQ_CLS")
    with torch.no_grad():
        base.bert.encoder.layer[1].attention.self.key.weight.fill_(float("nan"))
    config = make_config("SEQ_CLS", **DEEP, prompt_tuning_init=start)
    with pytest.raises(ValueError, match="BertModel in torch.float32 gives the deep prompt .* NaN or infinite"):
        get_peft_model(base, config)
    # The values of these come from a file, and not from the model.
    make_deep().save_pretrained(tmp_path)
    saved = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": tmp_path}
    model = get_peft_model(base, make_config("SEQ_CLS", **DEEP, **saved))
    assert all(state.isfinite().all() for pair in model.prompt_key_values().values() for state in pair)
    PeftModel.from_pretrained(model.unload(), tmp_path)


def test_a_start_at_more_vectors_than_the_model_reads(tmp_path) -> None:
    source, sizes = make_adapted("BERT", "SEQ_CLS", length=40), {"max_position_embeddings": 39}
    with pytest.raises(
        ValueError, match="starts has 40 vectors, and BertModel can read 39. Start at a shorter prompt"
    ):
        _started_at(source, tmp_path, "BERT", "SEQ_CLS", length=40, sizes=sizes)


def test_a_start_at_more_tokens_than_the_model_reads() -> None:
    with pytest.raises(ValueError, match="starts at tokens is 65 of them here, and BertModel can read 64"):
        make_deep("BERT", "SEQ_CLS", length=65, prompt_tuning_init="SAMPLE_VOCAB")
    assert make_deep("BERT", "SEQ_CLS", length=65)(**make_batch("BERT", "SEQ_CLS")).logits.isfinite().all()


def test_a_prompt_that_takes_positions_leaves_one_for_the_text() -> None:
    with pytest.raises(ValueError, match="`num_virtual_tokens` is 64, and BertForSequenceClassification has 64"):
        make_deep("BERT", "SEQ_CLS", length=64, shift_positions=True)
    model = make_deep("GPT-2", "CAUSAL_LM", length=60, shift_positions=True)
    with pytest.raises(ValueError, match="60 virtual tokens and 7 text tokens are 67 positions"):
        model(**make_batch("GPT-2", "CAUSAL_LM"))
    make_deep("GPT-2", "CAUSAL_LM", length=60)(**make_batch("GPT-2", "CAUSAL_LM"))


def test_positions_that_a_model_is_not_told() -> None:
    with pytest.raises(ValueError, match="`shift_positions` is True, and T5ForConditionalGeneration can't be told"):
        make_deep("T5", "SEQ_2_SEQ_LM", shift_positions=True)
    # Distances are what Bloom measures: no shift changes them.
    batch = make_batch("Bloom", "CAUSAL_LM")
    outputs = [main_output(make_deep("Bloom", "CAUSAL_LM", shift_positions=s)(**batch)) for s in (False, True)]
    assert torch.equal(*outputs)


def test_measuring_leaves_the_model_as_it_was() -> None:
    base = make_model("BERT", "SEQ_CLS").train()
    base.bert.encoder.layer[0].eval()
    before = [module.training for module in base.modules()]
    state = torch.get_rng_state()
    model = get_peft_model(base, make_config("SEQ_CLS", **DEEP, prompt_tuning_init="SAMPLE_VOCAB"))
    names = {n for n, m in model.named_modules() if isinstance(m, PTuningLayer)}
    assert len(names) == 1
    assert [m.training for m in model.unload().modules()] == before
    assert not torch.equal(torch.get_rng_state(), state)  # of the start itself


def test_what_a_card_says(tmp_path) -> None:
    model = make_deep("Llama", "CAUSAL_LM")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"keys and values of {V} positions in each of 2 layers, encoder `NONE`" in text
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{count:,} parameters, of which {count:,} are deployed" in text
    assert "export_standalone" not in text
