# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Models that need care: vision-language, mixture of experts, wrapped ones; and those that are refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from families import DECODER_SIZES, ENCODER_SIZES, make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from reference import V, concatenated, main_output, make_batch
from torch import nn
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


IMAGE, VISION_START = 90, 91


def make_llava() -> tf.LlavaForConditionalGeneration:
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = tf.LlamaConfig(**DECODER_SIZES)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(config).eval()


def make_qwen2_vl() -> tf.Qwen2VLForConditionalGeneration:
    config = tf.Qwen2VLConfig(
        text_config={**DECODER_SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=92,
        video_token_id=93,
    )
    torch.manual_seed(0)
    return tf.Qwen2VLForConditionalGeneration(config).eval()


def make_qwen3_vl() -> tf.Qwen3VLForConditionalGeneration:
    """Its text model adds features of the image to the hidden states of the first layers, where a mask says so."""
    config = tf.Qwen3VLConfig(
        text_config={**DECODER_SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            **{"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2},
            **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        },
        image_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=92,
        video_token_id=93,
    )
    torch.manual_seed(0)
    model = tf.Qwen3VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def llava_inputs() -> dict:
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6, 7], [8, 9, IMAGE, IMAGE, IMAGE, IMAGE, 10]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}


def qwen2_vl_inputs() -> dict:
    # One image of 1 × 4 × 4 patches, merged to 2 × 2 = 4 tokens.
    ids = torch.tensor([[5, VISION_START, IMAGE, IMAGE, IMAGE, IMAGE, 92, 6, 7]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def concatenate_in_text_model(base: tf.PreTrainedModel, prompt: torch.Tensor, inputs: dict) -> torch.Tensor:
    """The base model with the prompt put by hand before what its text model gets, positions moved on by V."""
    text = base.model.language_model
    forward = text.forward

    def concatenating(inputs_embeds, attention_mask, position_ids=None, **kwargs):
        embeds = torch.cat([prompt.expand(len(inputs_embeds), -1, -1), inputs_embeds], dim=1)
        mask = torch.cat([attention_mask.new_ones(len(embeds), len(prompt)), attention_mask], dim=1)
        if position_ids is None:
            positions = mask.cumsum(1) - 1
        else:
            first = torch.arange(len(prompt)).expand(*position_ids.shape[:-1], -1)
            positions = torch.cat([first, position_ids + len(prompt)], dim=-1)
        kwargs = {key: value for key, value in kwargs.items() if key != "input_ids"}
        if (seen := kwargs.get("visual_pos_masks")) is not None:
            kwargs["visual_pos_masks"] = torch.cat([seen.new_zeros(len(seen), len(prompt)), seen], dim=1)
        outputs = forward(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, len(prompt) :]
        return outputs

    text.forward = concatenating
    try:
        return base(**inputs, use_cache=False).logits
    finally:
        del text.forward


@pytest.mark.parametrize(
    ("make", "make_inputs"),
    [(make_llava, llava_inputs), (make_qwen2_vl, qwen2_vl_inputs), (make_qwen3_vl, qwen2_vl_inputs)],
    ids=["LLaVA", "Qwen2-VL", "Qwen3-VL"],
)
@torch.no_grad()
def test_vision_language_models(make, make_inputs) -> None:
    inputs = make_inputs()
    base = make()
    plain = base(**inputs).logits
    model = get_peft_model(make(), make_config("CAUSAL_LM")).eval()
    output = model(**inputs).logits
    assert output.shape == plain.shape
    assert not torch.allclose(output, plain)
    expected = concatenate_in_text_model(base, model.prompt_embeddings(), inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    changed = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    assert not torch.allclose(model(**changed).logits, output)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)

    # Generating goes on at the right multimodal positions, step by step as in one call.
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    uncached = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, uncached)


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # its new name is new
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # those of the vision tower
@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("make", [make_qwen2_vl, make_qwen3_vl])
def test_one_row_with_an_image_trains(make, use_reentrant) -> None:
    inputs, base = qwen2_vl_inputs(), make()
    model = get_peft_model(make(), make_config("CAUSAL_LM")).eval()
    prompt = model.prompt_embeddings().detach().requires_grad_()
    expected = concatenate_in_text_model(base, prompt, inputs)
    expected.square().sum().backward()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        for module in model.modules():  # checkpoints are taken in training only, and these models have no dropout
            module.training = hasattr(module, "gradient_checkpointing")
    logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    logits.square().sum().backward()
    found = next(p.grad for n, p in model.named_parameters() if "ptuning_" in n)
    torch.testing.assert_close(found, prompt.grad, rtol=1e-4, atol=1e-5 * prompt.grad.abs().max().item())


def make_gemma3(attn_implementation: str) -> tf.Gemma3ForConditionalGeneration:
    """Tokens of an image see each other, before and after: its masks are 4-D, one for each kind of layer."""
    config = tf.Gemma3Config(
        text_config={**DECODER_SIZES, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 8, "patch_size": 2},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=92,
    )
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attn_implementation).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_masks_of_image_tokens_are_the_models_own(attn_implementation) -> None:
    ids = torch.tensor([[5, 91, IMAGE, IMAGE, IMAGE, IMAGE, 92, 6, 7], [8, 9, 10, 91, IMAGE, IMAGE, IMAGE, IMAGE, 92]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == IMAGE).long()}
    inputs["pixel_values"] = torch.randn(2, 3, 8, 8)
    base = make_gemma3(attn_implementation)
    model = get_peft_model(make_gemma3(attn_implementation), make_config()).eval()
    assert model.prompt_route == "shared"
    text, prompt = base.model.language_model, model.prompt_embeddings()
    forward, total = text.forward, V + ids.shape[1]

    def concatenating(inputs_embeds, attention_mask, position_ids=None, input_ids=None, **kwargs):
        embeds = torch.cat([prompt.expand(2, -1, -1), inputs_embeds], dim=1)
        distance = torch.arange(total)[:, None] - torch.arange(total)
        masks = {}
        for kind, mask in attention_mask.items():
            visible = (distance >= 0) & (distance < (6 if kind == "sliding_attention" else total))
            visible = visible.repeat(2, 1, 1, 1)
            visible[:, :, V:, V:] = mask if mask.dtype == torch.bool else mask == 0
            is_boolean, lowest = mask.dtype == torch.bool, torch.finfo(torch.float32).min
            masks[kind] = visible if is_boolean else torch.zeros(visible.shape).masked_fill(~visible, lowest)
        positions = torch.arange(total)[None]
        outputs = forward(inputs_embeds=embeds, attention_mask=masks, position_ids=positions, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, V:]
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "forward", concatenating)
        expected = base(**inputs, use_cache=False).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    pads = torch.zeros(2, 3, dtype=torch.long)
    padded = inputs | {key: torch.cat([pads, inputs[key]], dim=1) for key in ("input_ids", "token_type_ids")}
    padded["attention_mask"] = torch.cat([pads, inputs["attention_mask"]], dim=1)
    torch.testing.assert_close(model(**padded).logits[:, 3:], expected, rtol=0, atol=1e-5)
    row = {key: value[:1] for key, value in inputs.items()}
    torch.testing.assert_close(model(**row).logits, expected[:1], rtol=0, atol=1e-5)  # one row, with gradients
    tokens = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    uncached = model.generate(**inputs, **tokens, use_cache=False)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(**inputs, **tokens, cache_implementation=cache), uncached)


@torch.no_grad()
def test_multimodal_positions_are_moved_on_by_the_prompt() -> None:
    model = get_peft_model(make_qwen2_vl(), make_config("CAUSAL_LM")).eval()
    text = model.get_base_model().model.language_model
    seen = []
    text.rotary_emb.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(**qwen2_vl_inputs())
    with model.disable_adapter():
        model(**qwen2_vl_inputs())
    prompt, text, plain = seen
    assert plain.shape[0] == 3
    assert not torch.equal(plain[0], plain[1])  # rows of an image differ from its columns
    assert torch.equal(prompt, torch.arange(V).expand(3, 1, -1))
    assert torch.equal(text, plain + V)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
@torch.no_grad()
def test_router_loss_is_over_the_users_tokens(family) -> None:
    model = make_adapted(family)
    base = model.get_base_model()
    batch = make_batch(family, "CAUSAL_LM")
    outputs = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    rows = batch["input_ids"].numel()
    assert [layer.shape[0] for layer in outputs.router_logits] == [rows, rows]
    expected = load_balancing_loss_func(outputs.router_logits, 4, 2, batch["attention_mask"])
    assert torch.equal(outputs.aux_loss, expected)
    plain = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(outputs.loss, plain.loss + base.router_aux_loss_coef * outputs.aux_loss)


SIZES = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNUSUAL_DECODERS = {
    "MPT (ALiBi)": tf.MptConfig(**SIZES, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "CodeGen (rotary, positions optional)": tf.CodeGenConfig(
        **SIZES, n_embd=32, n_head=4, n_layer=2, n_positions=64, n_ctx=64, rotary_dim=4
    ),
    "XGLM (sinusoids, says nowhere that it is causal)": tf.XGLMConfig(
        **SIZES, d_model=32, ffn_dim=48, attention_heads=4, num_layers=2, max_position_embeddings=64
    ),
    "GPT-Neo (local attention)": tf.GPTNeoConfig(
        **SIZES, hidden_size=32, num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=6
    ),
    "RoBERTa (positions from 2)": tf.RobertaConfig(**{**ENCODER_SIZES, **SIZES, "pad_token_id": 1}, is_decoder=True),
    "Jamba (hybrid)": tf.JambaConfig(
        **{**DECODER_SIZES, **SIZES}, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_d_conv=2,
        mamba_expand=1, mamba_dt_rank=4, num_experts=2, use_mamba_kernels=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL_DECODERS)
@torch.no_grad()
def test_decoders_that_count_in_their_own_way(name) -> None:
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(UNUSUAL_DECODERS[name]).eval()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model = get_peft_model(base, make_config("CAUSAL_LM")).eval()
    ids = torch.randint(5, 99, (1, 4))
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    padded_ids = torch.cat([torch.full((1, 5), base.config.pad_token_id), ids], dim=1)
    mask = (torch.arange(9) >= 5).long()[None]
    padded = model.generate(input_ids=padded_ids, attention_mask=mask, **arguments)
    assert torch.equal(alone[:, 4:], padded[:, 9:])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model(input_ids=padded_ids, attention_mask=mask).logits[:, 5:], logits, rtol=0, atol=1e-5
    )

    with model.disable_adapter():
        embeds = base.get_input_embeddings()(ids)
    prompt = model.prompt_embeddings()
    base = model.unload()
    embeds = torch.cat([prompt[None], embeds], dim=1)
    torch.testing.assert_close(logits, base(inputs_embeds=embeds).logits[:, V:], rtol=0, atol=1e-5)
    generated = base.generate(inputs_embeds=embeds, attention_mask=torch.ones(1, V + 4).long(), **arguments)
    assert torch.equal(alone[:, 4:], generated)


WITHOUT_HEAD_DIM = {key: value for key, value in {**DECODER_SIZES, **SIZES}.items() if key != "head_dim"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NOT_WHAT_THEY_SAY = {
    "attend more than once": tf.DiffLlamaConfig(**WITHOUT_HEAD_DIM),
    "not all of its layers": tf.NemotronConfig(**{**DECODER_SIZES, **SIZES}),
    "does not tell its sliding window": tf.Qwen2MoeConfig(
        **WITHOUT_HEAD_DIM, **EXPERTS, sliding_window=6, use_sliding_window=True, max_window_layers=1,
        shared_expert_intermediate_size=24,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", NOT_WHAT_THEY_SAY)
def test_what_only_a_pass_finds_out_is_concatenated_from_then_on(reason) -> None:
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(NOT_WHAT_THEY_SAY[reason]).eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(5, 99, (2, 8))
    embeds = base.get_input_embeddings()(ids)
    model = get_peft_model(base, make_config("CAUSAL_LM")).eval()
    assert model.prompt_route == "shared"
    logits, again = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert model.prompt_route.startswith("concatenated: ")
    assert reason in model.prompt_route
    uncached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), uncached)
    prompt = model.prompt_embeddings()
    expected = model.unload()(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), embeds], dim=1)).logits[:, V:]
    for found in (logits, again):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_model_that_scales_embeddings_in_place_leaves_the_prompt_alone() -> None:
    config = tf.CTRLConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64)
    model = get_peft_model(tf.CTRLLMHeadModel(config), make_config()).eval()
    prompt, ids = model.prompt_embeddings().clone(), torch.randint(5, 99, (2, 8))
    model(input_ids=ids).logits.sum().backward()
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(model.prompt_embeddings(), prompt)


SCALED = {
    **{"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    **{"forced_eos_token_id": None, "scale_embedding": True},
}
SCALING_MODELS = {
    "Marian": (tf.MarianMTModel, tf.MarianConfig),
    "Pegasus": (tf.PegasusForConditionalGeneration, tf.PegasusConfig),
    "BlenderbotSmall": (tf.BlenderbotSmallForConditionalGeneration, tf.BlenderbotSmallConfig),
    "MVP": (tf.MvpForConditionalGeneration, tf.MvpConfig),
    "PLBart": (tf.PLBartForConditionalGeneration, tf.PLBartConfig),  # scales within its embedding
    "BART": (tf.BartForConditionalGeneration, tf.BartConfig),
}


UNUSUAL_CAUSAL_MODELS = {
    "MVP decoder": (tf.MvpForCausalLM, tf.MvpConfig(**SCALED, is_decoder=True, is_encoder_decoder=False)),
    "Falcon-H1": (
        tf.FalconH1ForCausalLM,
        tf.FalconH1Config(
            **{**DECODER_SIZES, **SIZES}, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
            mamba_n_groups=1, mamba_chunk_size=4, embedding_multiplier=3.0,
        ),
    ),
    "Gemma 4": (tf.Gemma4ForCausalLM, tf.Gemma4TextConfig(**DECODER_SIZES, hidden_size_per_layer_input=0)),
    "Kosmos-2": (
        Kosmos2TextForCausalLM,
        tf.Kosmos2TextConfig(
            vocab_size=99, embed_dim=32, layers=2, attention_heads=4, ffn_dim=48, max_position_embeddings=64,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALING_MODELS | UNUSUAL_CAUSAL_MODELS)
@torch.no_grad()
def test_a_prompt_that_starts_at_tokens_is_those_tokens_in_front(name) -> None:
    """Of models that scale the embeddings of ids only, or count positions in a way of their own."""
    torch.manual_seed(0)
    if name in SCALING_MODELS:
        make, config_class = SCALING_MODELS[name]
        base, others = make(config_class(**SCALED)).eval(), {"decoder_input_ids": torch.randint(5, 99, (2, 4))}
    else:
        make, config = UNUSUAL_CAUSAL_MODELS[name]
        base, others = make(config).eval(), {}
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    front, ids = torch.randint(5, 99, (V,)), torch.randint(5, 99, (2, 7))
    expected = base(input_ids=torch.cat([front.expand(2, -1), ids], dim=1), **others).logits
    expected = expected if others else expected[:, V:]
    model = get_peft_model(base, make_config()).eval()
    layer = model.base_model._layer()
    layer.ptuning_encoders["default"].start_at(layer.embed_ids(front))
    torch.testing.assert_close(model(input_ids=ids, **others).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_left_padding_in_an_encoder_with_relative_positions() -> None:
    model = get_peft_model(make_model("T5", "SEQ_2_SEQ_LM"), make_config()).eval()
    ids = torch.randint(5, 99, (1, 4))
    padded_ids, mask = torch.cat([torch.zeros(1, 5).long(), ids], dim=1), (torch.arange(9) >= 5).long()[None]
    arguments = {"decoder_input_ids": ids}
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments).logits
    output = model(input_ids=padded_ids, attention_mask=mask, **arguments).logits
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_encoder_decoder_inside_a_vision_language_model() -> None:
    """BLIP-2 on T5: padding in the memory that the inner decoder attends to."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    queries = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    config = tf.Blip2Config(
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        qformer_config=queries | {"encoder_hidden_size": 16, "vocab_size": 20},
        text_config={"model_type": "t5", **text, "decoder_start_token_id": 0},
        num_query_tokens=2,
        image_token_index=IMAGE,
    )
    model = get_peft_model(tf.Blip2ForConditionalGeneration(config), make_config()).eval()
    pixels = torch.randn(1, 3, 8, 8)
    ids = torch.tensor([[IMAGE, IMAGE, 5, 6, 7]])
    padded, decoder_ids = torch.cat([ids, torch.zeros(1, 3).long()], dim=1), torch.tensor([[0, 8, 9]])
    arguments = {"pixel_values": pixels, "decoder_input_ids": decoder_ids}
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments).logits
    output = model(input_ids=padded, attention_mask=(padded != 0).long(), **arguments).logits
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        plain = model(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments).logits
    assert not torch.allclose(plain, expected)


@torch.no_grad()
def test_a_model_whose_embedding_is_offloaded(tmp_path) -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    adapted = get_peft_model(make_model("Llama", "CAUSAL_LM"), make_config()).eval()
    expected = main_output(adapted(**batch))
    adapted.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(cpu_offload(make_model("Llama", "CAUSAL_LM"), "cpu"), tmp_path)
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=0, atol=1e-6)
    fresh = get_peft_model(cpu_offload(make_model("Llama", "CAUSAL_LM"), "cpu"), make_config())
    assert not fresh.prompt_embeddings().is_meta
    assert fresh(**batch).logits.isfinite().all()


@torch.no_grad()
def test_a_backbone_that_adds_positions_of_its_own_is_refused_when_it_does() -> None:
    config = tf.GitConfig(
        **{**ENCODER_SIZES, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 8, "patch_size": 4},
    )
    model = get_peft_model(tf.GitForCausalLM(config), make_config()).eval()
    ids = torch.randint(5, 99, (2, 6))
    assert model(input_ids=ids).logits.shape == (2, 6, 99)
    with pytest.raises(ValueError, match="adds or merges positions"):
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 8, 8))


@torch.no_grad()
def test_task_types_are_per_token_and_a_prompt_has_the_default_one() -> None:
    torch.manual_seed(0)
    base = tf.ErnieModel(tf.ErnieConfig(**ENCODER_SIZES, use_task_id=True)).eval()
    model = get_peft_model(base, make_config()).eval()
    batch = make_batch("BERT", "FEATURE_EXTRACTION")
    types = torch.zeros_like(batch["input_ids"])
    assert torch.equal(main_output(model(**batch, task_type_ids=types)), main_output(model(**batch)))
    assert not torch.allclose(main_output(model(**batch, task_type_ids=types + 1)), main_output(model(**batch)))


@torch.no_grad()
def test_a_model_inside_another_module() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model("BERT", "TOKEN_CLS")

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    model = get_peft_model(Wrapper(), make_config()).eval()
    batch = make_batch("BERT", "TOKEN_CLS")
    base = make_model("BERT", "TOKEN_CLS").requires_grad_(False)  # torch multiplies by frozen weights in another way
    expected = concatenated(base, "TOKEN_CLS", model.prompt_embeddings(), batch)
    assert torch.equal(main_output(model(**batch)), expected)


class WithoutEmbeds(tf.BertPreTrainedModel):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(10, 8)

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


class SharedTwice(WithoutEmbeds):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.second = self.embed_tokens


class ReadsIds(WithoutEmbeds):
    class Router(nn.Module):
        def forward(self, hidden_states, input_ids):
            return hidden_states[input_ids]

    def __init__(self, config) -> None:
        super().__init__(config)
        self.router = self.Router()

    def forward(self, input_ids=None, inputs_embeds=None):
        return self.router(inputs_embeds, input_ids)


def _two_models() -> nn.Module:
    return nn.ModuleDict({"a": make_model("BERT", "TOKEN_CLS"), "b": make_model("BERT", "TOKEN_CLS")})


TINY = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
REFUSED = {
    "no transformers model": (lambda: nn.Linear(2, 2), "Linear: it holds no transformers model"),
    "two transformers models": (_two_models, "ModuleDict: it holds 2 transformers models"),
    "no inputs_embeds": (lambda: WithoutEmbeds(tf.BertConfig(**TINY)), "WithoutEmbeds: its forward takes no `inputs_"),
    "shared embedding": (lambda: SharedTwice(tf.BertConfig(**TINY)), "SharedTwice: its input embedding is registered"),
    "n-gram streams": (
        lambda: tf.ProphetNetForCausalLM(
            tf.ProphetNetConfig(
                vocab_size=20, hidden_size=8, num_decoder_layers=1, num_decoder_attention_heads=2, is_decoder=True,
                is_encoder_decoder=False, add_cross_attention=False,
            )
        ),
        "ProphetNetDecoder: its n-gram streams are laid out for token ids",
    ),
    "ids": (lambda: ReadsIds(tf.BertConfig(**TINY)), "ReadsIds: its Router reads the token ids again"),
    "vision": (
        lambda: tf.ViTModel(tf.ViTConfig(**{k: v for k, v in TINY.items() if k != "vocab_size"})),
        "ViTModel: its input embedding is a ViTPatchEmbeddings, not a table of token embeddings",
    ),
    "state-space": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)),
        "MambaModel: it keeps a recurrent state",
    ),
    "recurrent": (
        lambda: tf.xLSTMForCausalLM(tf.xLSTMConfig(vocab_size=20, hidden_size=64, num_hidden_layers=1, num_heads=4)),
        "xLSTMModel: it keeps a recurrent state",
    ),
    "per-layer inputs": (
        lambda: tf.Gemma3nForCausalLM(
            tf.Gemma3nTextConfig(
                **{**TINY, "num_key_value_heads": 1, "head_dim": 4, "vocab_size_per_layer_input": 20},
                hidden_size_per_layer_input=4,
                num_kv_shared_layers=0,
                activation_sparsity_pattern=[0.0],
            )
        ),
        "Gemma3nTextModel: its layers read more embeddings of the token ids",
    ),
    "pooled positions": (
        lambda: tf.FunnelBaseModel(tf.FunnelConfig(vocab_size=20, d_model=8, n_head=2, d_head=4, d_inner=8)),
        "it pools neighbouring positions",
    ),
    "images in cross-attention (Mllama)": (
        lambda: tf.MllamaForConditionalGeneration(
            tf.MllamaConfig(
                text_config={
                    **{**TINY, "num_hidden_layers": 2, "cross_attention_layers": [1], "num_key_value_heads": 1},
                    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                },
                vision_config={
                    **{"hidden_size": 8, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2},
                    **{"intermediate_size": 8, "vision_output_dim": 16, "image_size": 8, "patch_size": 4},
                    "intermediate_layers_indices": [0],
                },
            )
        ),
        "MllamaTextModel: its layers attend to images",
    ),
    "images in cross-attention (IDEFICS)": (
        lambda: tf.IdeficsForVisionText2Text(
            tf.IdeficsConfig(**TINY, vision_config={"embed_dim": 8, "num_attention_heads": 2})
        ),
        "IdeficsModel: its layers attend to images",
    ),
    "token dropout": (
        lambda: tf.EsmModel(tf.EsmConfig(**TINY, pad_token_id=0, mask_token_id=1, token_dropout=True)),
        "EsmModel: `token_dropout` of its config rescales",
    ),
    "positions of token ids only": (
        lambda: tf.EsmModel(tf.EsmConfig(**TINY, pad_token_id=0, position_embedding_type="absolute")),
        "EsmModel: it gives positions and a layer norm to the embeddings of token ids only",
    ),
    "a layer norm of token ids only": (
        lambda: tf.EsmModel(
            tf.EsmConfig(**TINY, pad_token_id=0, position_embedding_type="rotary", emb_layer_norm_before=True)
        ),
        "EsmModel: it gives positions and a layer norm to the embeddings of token ids only",
    ),
    "speech": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, decoder_start_token_id=3,
            )
        ),
        "WhisperEncoder: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_and_left_untouched(case) -> None:
    make, message = REFUSED[case]
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="P-tuning can't be applied to.*" + message):
        get_peft_model(model, make_config(length=2))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
    assert not hasattr(model, "peft_config")
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_padded_vocabularies_and_replaced_embeddings() -> None:
    base = make_model("Llama", "CAUSAL_LM")
    base.resize_token_embeddings(120)
    model = get_peft_model(base, make_config("CAUSAL_LM")).eval()
    assert model(input_ids=torch.tensor([[110, 111]])).logits.shape == (1, 2, 120)
    base.set_input_embeddings(nn.Embedding(130, ENCODER_SIZES["hidden_size"]))
    with pytest.raises(ValueError, match="LlamaModel was replaced after the P-tuning adapter was added"):
        model(input_ids=torch.tensor([[1, 2]]))
