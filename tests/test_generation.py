# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`generate` gives the tokens that it gives for the prompt concatenated by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import DECODERS, ENCODER_DECODERS, make_model
from peft import PeftModel, get_peft_model
from reference import V, embedding_and_backbone, make_batch
from transformers import DynamicCache

from peft_ptuning_ext import PTuningConfig


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
WAYS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "no-cache": {"use_cache": False},
    "three-sequences": {"do_sample": True, "num_return_sequences": 3},
}


def make_adapted(family: str, task: str) -> PeftModel:
    return get_peft_model(make_model(family, task), PTuningConfig(num_virtual_tokens=V, task_type=task)).eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_decoders_generate_as_behind_the_concatenated_prompt(family: str, way: str) -> None:
    model, base = make_adapted(family, "CAUSAL_LM"), make_model(family, "CAUSAL_LM")
    arguments = GREEDY | WAYS[way]
    # Rows of one length: [P; pads; x] is another text to a sliding window than [P; x].
    batch = make_batch(family, "CAUSAL_LM", lengths=(6, 6))
    prompt = model.prompt_embeddings()
    torch.manual_seed(1)
    generated = model.generate(**batch, **arguments)
    embeds = torch.cat([prompt.expand(2, -1, -1), embedding_and_backbone(base)[0](batch["input_ids"])], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    torch.manual_seed(1)
    expected = base.generate(inputs_embeds=embeds, attention_mask=mask, **arguments)
    assert torch.equal(generated[:, 6:], expected)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_left_padding_changes_no_generated_token(family: str) -> None:
    model = make_adapted(family, "CAUSAL_LM")
    batch = make_batch(family, "CAUSAL_LM", lengths=(3, 9), pad_left=True)
    together = model.generate(**batch, **GREEDY)
    alone = model.generate(**make_batch(family, "CAUSAL_LM", lengths=(3,)), **GREEDY)
    assert torch.equal(together[0, 9:], alone[0, 3:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_encoder_decoders_generate_as_behind_the_concatenated_prompt(family: str, way: str) -> None:
    model, base = make_adapted(family, "SEQ_2_SEQ_LM"), make_model(family, "SEQ_2_SEQ_LM")
    arguments = GREEDY | WAYS[way]
    batch = make_batch(family, "SEQ_2_SEQ_LM")
    del batch["decoder_input_ids"]
    embedding, _ = embedding_and_backbone(base)
    embeds = torch.cat([model.prompt_embeddings().expand(2, -1, -1), embedding(batch["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, V, dtype=torch.long), batch["attention_mask"]], dim=1)
    torch.manual_seed(1)
    generated = model.generate(**batch, **arguments)
    torch.manual_seed(1)
    assert torch.equal(generated, base.generate(inputs_embeds=embeds, attention_mask=mask, **arguments))


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_steps_by_hand_equal_one_call(family: str) -> None:
    model = make_adapted(family, "CAUSAL_LM")
    ids = make_batch(family, "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    expected = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :3], use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for column in range(3, 6):
        logits.append(model(input_ids=ids[:, column : column + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_generate_with_the_adapter_disabled_is_the_base() -> None:
    model, base = make_adapted("Llama", "CAUSAL_LM"), make_model("Llama", "CAUSAL_LM")
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))
    with model.disable_adapter():
        assert torch.equal(model.generate(**batch, **GREEDY), base.generate(**batch, **GREEDY))


@torch.no_grad()
def test_a_cache_belongs_to_the_adapter_that_filled_it() -> None:
    model = make_adapted("Llama", "CAUSAL_LM")
    model.add_adapter("other", PTuningConfig(num_virtual_tokens=V, task_type="CAUSAL_LM"))
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with model.disable_adapter(), pytest.raises(ValueError, match="filled under adapter 'default'.*no adapter"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="filled under adapter 'default'.*'other' is active"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with model.disable_adapter():
        unprompted = model(input_ids=ids, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="filled under no adapter.*'other' is active"):
        model(input_ids=ids[:, :1], past_key_values=unprompted)


@torch.no_grad()
def test_static_caches_are_refused_where_the_prompt_is_concatenated() -> None:
    model = make_adapted("Llama", "CAUSAL_LM")
    model.get_base_model().set_attn_implementation("sdpa")
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))
    with pytest.raises(ValueError, match="static caches.*changed to 'sdpa'"):
        model.generate(**batch, **GREEDY, cache_implementation="static")


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Bloom", "Falcon"])
@torch.no_grad()
def test_a_conversation_goes_on_from_a_returned_cache(family: str) -> None:
    model = make_adapted(family, "CAUSAL_LM")
    batch = make_batch(family, "CAUSAL_LM", lengths=(6, 6))
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 6 + 8 - 1  # the user's tokens but the last
    longer = torch.cat([first.sequences, batch["input_ids"]], dim=1)
    everything = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    expected = model.generate(**everything, **GREEDY)
    assert torch.equal(model.generate(**everything, **GREEDY, past_key_values=first.past_key_values), expected)


@torch.no_grad()
def test_what_a_cache_shows_of_itself_is_the_user_s() -> None:
    model = make_adapted("Llama", "CAUSAL_LM")
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    mine = DynamicCache()
    returned = model(input_ids=ids, past_key_values=mine).past_key_values
    expected = model(input_ids=ids[:, :5]).logits[:, -1]
    for cache in (mine, returned, copy.deepcopy(mine), pickle.loads(pickle.dumps(returned))):
        assert isinstance(cache, DynamicCache)
        assert cache.get_seq_length() == 6
    mine.crop(-2)  # the same state as `returned`
    assert returned.get_seq_length() == 4
    logits = model(input_ids=ids[:, 4:5], past_key_values=returned, attention_mask=torch.ones(2, 5)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="covers 3 tokens, but the cache holds 5 and 1 are new"):
        model(input_ids=ids[:, :1], past_key_values=mine, attention_mask=torch.ones(2, 3))
    mine.reset()
    with model.disable_adapter():
        base = make_model("Llama", "CAUSAL_LM")(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, past_key_values=mine).logits, base)
    assert type(mine) is DynamicCache
    assert mine.get_seq_length() == 6
