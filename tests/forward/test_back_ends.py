# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Every attention implementation gives what concatenation gives under `eager`: outputs, gradients, generation."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import transformers as tf
from by_hand import deep_by_hand
from families import DECODER_SIZES, Family, make_model
from making import make_config
from peft import PeftModel, get_peft_model
from plain_kernels import FLASH, kernels  # noqa: F401
from reference import S, V, concatenated, main_output, make_batch, unmasked
from releases import CACHE
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, integrations, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from peft_ptuning_ext.forward.attention import InFront
from peft_ptuning_ext.prompts.prompt import Prompt


pytestmark = pytest.mark.usefixtures("kernels")

WITH_MASKS = ["flash_attention_2", "flex_attention", "of sdpa", "of eager", "of flash"]
EVERY = [*WITH_MASKS, "of sdpa, no masks", "of eager, no masks", "lower right"]

every = pytest.mark.parametrize("implementation", EVERY)
depths = pytest.mark.parametrize("depth", ["INPUT", "DEEP"])

# Texts of 7 and 5 tokens, and longer than the window of 6.
PADDINGS = {"none": (S, S), "right": (S, S - 2), "left": (S, S - 2), "beyond the window": (S + 4, 3)}


def make_on(implementation: str, family: str | Family = "Llama", task: str = "CAUSAL_LM", **options) -> PeftModel:
    """An adapted model whose base has this attention implementation, in float64."""
    base = make_model(family, task, attn_implementation="eager").double()
    base.config._attn_implementation = implementation
    torch.manual_seed(0)
    return get_peft_model(base, make_config(task, **options)).eval()


def make_double(family: str | Family = "Llama", task: str = "CAUSAL_LM") -> tf.PreTrainedModel:
    return make_model(family, task, attn_implementation="eager").double()


def make_padded(padding: str, family: str = "Llama", task: str = "CAUSAL_LM") -> dict:
    batch = make_batch(family, task, lengths=PADDINGS[padding], pad_left=padding in ("left", "beyond the window"))
    return batch


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def cells() -> list:
    """Implementation, family and padding. Softcaps and functions without masks have their limits in the base, too."""
    found = [(name, "Llama", padding) for name in WITH_MASKS for padding in ("none", "right", "left")]
    found += [(name, "Llama", "none") for name in EVERY if name not in WITH_MASKS]
    found += [(name, "Mistral", padding) for name in WITH_MASKS for padding in ("none", "right", "beyond the window")]
    found += [(name, "Mistral", "none") for name in ("lower right", "of sdpa, no masks")]
    return found + [(name, "Gemma 2", "left") for name in ("flash_attention_2", "flex_attention")]


@pytest.mark.parametrize(("implementation", "family", "padding"), cells())
def test_outputs_and_gradients_are_those_of_concatenation(implementation, family, padding) -> None:
    model, batch = make_on(implementation, family), make_padded(padding, family)
    assert model.prompt_route == "shared"
    assert model.get_base_model().config._attn_implementation == f"ptuning_{implementation}"
    prompt = model.prompt_embeddings().detach().clone().requires_grad_()
    mask = batch["attention_mask"]
    rows = zip(batch["input_ids"], mask.bool(), strict=True)  # alone, without padding
    texts = [{"input_ids": ids[seen][None], "attention_mask": mask.new_ones(1, int(seen.sum()))} for ids, seen in rows]
    base = make_double(family)
    expected = torch.cat([concatenated(base, "CAUSAL_LM", prompt.double(), text)[0] for text in texts])
    output = unmasked(model(**batch).logits, mask)
    close(output, expected)
    weights = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), prompt)
    (found,) = torch.autograd.grad((output * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    assert wanted.abs().max() > 0
    close(found.double(), wanted.double(), 1e-5 * wanted.abs().max().item())


@torch.no_grad()
def test_kernels_of_every_name_are_found() -> None:
    """Transformers looks for a kernel by the name in the config, which is another on an adapted model."""
    batch = make_padded("left")
    expected = make_on(FLASH[0])(**batch).logits
    for name in FLASH[1:]:
        model = make_on(name)
        assert is_flash_attention_requested(model.get_base_model().config) == ("flash" in name)
        assert torch.equal(model(**batch).logits, expected)
        with model.disable_adapter():
            model(**batch)


@pytest.mark.parametrize(("implementation", "family", "padding"), cells())
def test_deep_prompts_are_those_of_eager_attention(implementation, family, padding) -> None:
    """Those of eager attention are compared with keys and values that are put in front by hand, in test_deep.py."""
    if (implementation, family) == ("of sdpa, no masks", "Mistral"):
        pytest.skip("the prompt starts at what the model itself makes of tokens, which is here without windows")
    batch, found, weights = make_padded(padding, family), [], None
    for name in ("eager", implementation):
        model = make_on(name, family, prompt_depth="DEEP")
        assert model.prompt_route == "deep"
        output = unmasked(model(**batch).logits, batch["attention_mask"])
        weights = torch.randn_like(output) if weights is None else weights
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([output, *torch.autograd.grad((output * weights).sum(), trained)])
    for expected, each in zip(*found, strict=True):
        assert expected.abs().max() > 0
        close(each, expected, 1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "of sdpa", "of flash"])
@torch.no_grad()
def test_deep_prompts_of_encoders(implementation, padding) -> None:
    model, batch = make_on(implementation, "BERT", "TOKEN_CLS", prompt_depth="DEEP"), make_padded(padding, "BERT")
    states = {i: (k.detach().double(), v.detach().double()) for i, (k, v) in model.prompt_key_values().items()}
    expected = deep_by_hand("BERT", make_double("BERT", "TOKEN_CLS"), states, batch)
    mask = batch["attention_mask"]
    close(unmasked(main_output(model(**batch)), mask), unmasked(expected, mask))


@depths
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    ("implementation", "family"),
    [(name, "Llama") for name in EVERY]
    + [(name, "Mistral") for name in (*WITH_MASKS, "lower right")]
    + [("flash_attention_2", "Gemma 3"), ("flex_attention", "Gemma 3")],
)
@torch.no_grad()
def test_step_by_step(implementation, family, cache, depth) -> None:
    if cache is not None and implementation not in WITH_MASKS:
        pytest.skip("without masks, a function can't tell the room that is left in a static cache")
    if cache is not None and implementation == "flex_attention":
        pytest.skip("transformers makes no block masks for static caches")
    batch = make_padded("left" if implementation in WITH_MASKS else "none", family)
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    arguments |= {"min_new_tokens": 4, "disable_compile": True, "cache_implementation": cache}
    expected = make_on("eager", family, prompt_depth=depth).generate(**batch, **arguments)
    found = make_on(implementation, family, prompt_depth=depth).generate(**batch, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    close(torch.stack(found.logits), torch.stack(expected.logits))


@depths
@every
@torch.no_grad()
def test_a_text_in_parts(implementation, depth) -> None:
    model, ids = make_on(implementation, prompt_depth=depth), make_padded("none")["input_ids"]
    cache = tf.DynamicCache(config=model.get_base_model().config)
    parts = [model(input_ids=part, **{CACHE: cache}).logits for part in ids.split(3, dim=1)]
    close(torch.cat(parts, dim=1), model(input_ids=ids).logits)


@depths
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("told", ["positions", "lengths"])
@pytest.mark.parametrize("implementation", WITH_MASKS)
def test_each_text_packed_in_a_row_sees_the_prompt(implementation, told, family, depth) -> None:
    model = make_on(implementation, family, prompt_depth=depth)
    first, second = torch.arange(5, 15)[None], torch.arange(40, 47)[None]
    row = {"input_ids": torch.cat([first, second], dim=1), "use_cache": False}
    row["position_ids"] = torch.cat([torch.arange(10), torch.arange(7)])[None]
    if told == "lengths":
        lengths = torch.tensor([0, 10, 17], dtype=torch.int32)
        row |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 10, "max_length_k": 10}
    packed = model(**row).logits
    apart = torch.cat([model(input_ids=text, use_cache=False).logits for text in (first, second)], dim=1)
    close(packed, apart)
    trained, weights = [p for p in model.parameters() if p.requires_grad], torch.randn_like(apart)
    wanted = torch.autograd.grad((apart * weights).sum(), trained)
    for one, other in zip(torch.autograd.grad((packed * weights).sum(), trained), wanted, strict=True):
        close(one, other, 1e-5 * other.abs().max().item())


@pytest.mark.parametrize("implementation", ["lower right", "of sdpa, no masks"])
def test_packed_texts_are_refused_where_a_function_does_not_keep_them_apart(implementation) -> None:
    model = make_on(implementation)
    row = {"input_ids": torch.arange(5, 12)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
    with pytest.raises(ValueError, match=f"{implementation!r} got several texts packed into one row, and does not"):
        model(**row, use_cache=False)


@torch.no_grad()
def test_sinks() -> None:
    sizes = DECODER_SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6, "head_dim": 8}
    family = Family("decoder", tf.GptOssConfig, sizes)
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(S + 4, S), pad_left=True)
    expected, found = (make_on(name, family).float()(**batch).logits for name in ("eager", "flash_attention_2"))
    mask = batch["attention_mask"].bool()
    close(found[mask], expected[mask])


@pytest.mark.parametrize("implementation", ["upper left", "ahead"])
def test_a_function_that_sees_no_keys_in_front(implementation) -> None:
    reason = f"its attention implementation {implementation!r} does not see keys in front of the text's"
    model, batch, base = make_on(implementation), make_padded("none"), make_double()
    base.config._attn_implementation = implementation
    with torch.no_grad():
        output = model(**batch).logits
    assert model.prompt_route == f"concatenated: {reason}"
    close(output, concatenated(base, "CAUSAL_LM", model.prompt_embeddings().detach().double(), batch))
    with pytest.raises(ValueError, match=f"can't be given to LlamaModel: {reason}. Choose prompt_depth='INPUT'"):
        make_on(implementation, prompt_depth="DEEP")


@torch.no_grad()
def test_layers_share_a_block_mask(monkeypatch) -> None:
    made, create = [], masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *args, **kw: made.append(1) or create(*args, **kw))
    model, batch = make_on("flex_attention", "Mistral"), make_padded("left", "Mistral")
    model(**batch)  # the prompt's pass, and the texts'
    made.clear()
    model(**batch)
    assert len(made) == 2  # the text's by the model, and with the prompt


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_itself(monkeypatch) -> None:
    """Torch's own kernel, not compiled."""

    def uncompiled(*args, training, **kwargs):
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(integrations.flex_attention, "compile_friendly_flex_attention", uncompiled)
    batch = make_padded("left", "Mistral")
    expected, found = (make_on(name, "Mistral").float()(**batch).logits for name in ("eager", "flex_attention"))
    mask = batch["attention_mask"].bool()
    close(found[mask], expected[mask])


@every
@depths
def test_copies_pickles_and_the_way_back(implementation, depth) -> None:
    model, batch = make_on(implementation, prompt_depth=depth), make_padded("none")
    with torch.no_grad():
        expected = model(**batch).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**batch).logits, expected)
    base = model.get_base_model()
    stack = base.model
    assert "ptuning_attention" in vars(stack)
    assert model.unload().config._attn_implementation == implementation
    assert "ptuning_attention" not in vars(stack)


def test_a_pickle_is_loaded_where_nothing_was_adapted(tmp_path) -> None:
    AttentionInterface.register("of_somebody", sdpa_attention_forward)
    model = make_on("of_somebody", prompt_depth="DEEP")
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    program = (
        "import pickle, sys, torch; from pathlib import Path; from transformers import AttentionInterface\n"
        "from transformers.integrations.sdpa_attention import sdpa_attention_forward\n"
        "import peft_ptuning_ext\n"
        "AttentionInterface.register('of_somebody', sdpa_attention_forward)\n"
        f"model = pickle.loads(Path({str(tmp_path / 'model')!r}).read_bytes())\n"
        "print(model(torch.arange(5, 12)[None]).logits.sum().item())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(model(torch.arange(5, 12)[None]).logits.sum().item(), abs=1e-6)


def test_another_implementation_afterwards_is_seen() -> None:
    shared, deep = make_on("flex_attention"), make_on("flex_attention", prompt_depth="DEEP")
    for model in (shared, deep):
        model.get_base_model().set_attn_implementation("sdpa")
    assert shared.prompt_route == "concatenated: its attention implementation was changed to 'sdpa'"
    with pytest.raises(ValueError, match="was changed to 'sdpa', which does not see a prompt in every layer"):
        deep(**make_padded("none"))


@pytest.mark.parametrize("argument", ["softcap", "s_aux"])
def test_sdpa_is_asked_where_an_argument_changes_the_softmax(argument, monkeypatch) -> None:
    """Merging would leave the argument out. What attention itself does with it is its own affair."""
    query, (key, value) = torch.randn(2, 4, S, 8), torch.randn(2, 2, 4, S, 8)
    states = (torch.randn(1, 4, V, 8), torch.randn(1, 4, V, 8))
    module = nn.Module()
    module.layer_idx, asked = 0, []
    in_front = InFront(Prompt(("default",), V, states={0: states}), S, 0, None)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args, **_: asked.append(1) or args[0])

    def attend(kwargs: dict) -> None:
        in_front.attend(sdpa_attention_forward, module, query, key, value, None, kwargs)

    attend({})
    assert not asked  # merged
    # Since transformers 5.23, `sdpa` says that it knows no softcap.
    with suppress(ValueError):
        attend({argument: torch.ones(4)})
        assert asked
