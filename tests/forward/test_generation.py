# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Every way of generating gives the tokens that it gives for the prompt concatenated by hand, for every family.

The other side of each comparison is the base model whose backbone alone is given the concatenation, anew at every step
(`reference.concatenating`): its logits processors and stopping criteria see the user's token ids, as they should.
"""

from __future__ import annotations

import copy
import pickle
import string
from contextlib import nullcontext

import pytest
import torch
from families import DECODERS, ENCODER_DECODERS, VOCABULARY, make_model
from making import make_adapted, make_config
from peft import PeftModel
from reference import V, concatenating, embedding_and_backbone, make_batch
from releases import CACHE
from tokenizers import Tokenizer, decoders, models, processors
from transformers import (
    CompileConfig,
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    cache_utils,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer


S = 6
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
E_SHORT = list(range(5, 30))  # a third of the words end a text

# What is generated, by what is asked for. Every one is tried on every family.
WAYS: dict[str, dict] = {
    "greedy": NEW,
    "sampling": NEW | {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "beam search": NEW | {"num_beams": 3, "length_penalty": 0.7},
    "beam sampling": NEW | {"num_beams": 3, "do_sample": True, "top_k": 20},
    "several sequences": NEW | {"do_sample": True, "num_return_sequences": 3},
    "several beams": NEW | {"num_beams": 3, "num_return_sequences": 2},
    "repetition penalty": NEW | {"repetition_penalty": 1.8},
    "no repeated n-grams": NEW | {"no_repeat_ngram_size": 2},
    "banned and biased words": NEW | {"bad_words_ids": [[7], [2, 9]], "sequence_bias": [[[8], 2.0], [[2, 11], 3.0]]},
    "max_length": {"max_length": S + 5, "do_sample": False, "eos_token_id": 98},
    "min_length": {"min_length": S + 4, "max_length": S + 8, "do_sample": False, "eos_token_id": list(range(5, 60))},
    "end of sequence": {"max_new_tokens": 8, "do_sample": False, "eos_token_id": E_SHORT},
    "no cache": NEW | {"use_cache": False},
    "static cache": NEW | {"cache_implementation": "static"},
    "static cache, beams": NEW | {"cache_implementation": "static", "num_beams": 3},
}
DECODERS_ONLY: dict[str, dict] = {
    "penalties of the text": NEW | {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "guidance": NEW | {"guidance_scale": 1.5},
    "prompt lookup": NEW | {"prompt_lookup_num_tokens": 3},
    "chunked prefill": NEW | {"prefill_chunk_size": 4},
    "static cache, chunked prefill": NEW | {"cache_implementation": "static", "prefill_chunk_size": 4},
    "static cache, longer": NEW | {"cache_implementation": "static", "max_cache_len": 40},
}
# What has no meaning for a model that is given the concatenation at every step.
OURS = {"use_cache", "cache_implementation", "prefill_chunk_size", "max_cache_len", "prompt_lookup_num_tokens"}
OURS |= {CACHE, "streamer", "assistant_model", "compile_config", "cache_config"}

CONCATENATED = {"Bloom", "Falcon"}
# Windows long enough for everything; those of the families are shorter than prompt and text.
LONG_WINDOWS = {f"{family}, long window": family for family in ("Mistral", "Gemma 2", "Gemma 3")}
CELLS = [(name, name, {}) for name in DECODERS] + [(f, n, {"sliding_window": 40}) for n, f in LONG_WINDOWS.items()]


def by_hand(model: PeftModel, family: str, batch: dict, overrides: dict | None = None, **arguments):
    """What the base generates when its backbone sees the concatenation."""
    base = make_model(family, "CAUSAL_LM", **(overrides or {}))
    arguments = {key: value for key, value in arguments.items() if key not in OURS}
    torch.manual_seed(1)
    with concatenating(base, model.prompt_embeddings()):
        return base.generate(**batch, **arguments, use_cache=False)


@pytest.mark.parametrize("way", WAYS | DECODERS_ONLY)
@pytest.mark.parametrize(("family", "overrides"), [c[::2] for c in CELLS], ids=[c[1] for c in CELLS])
@torch.no_grad()
def test_decoders(family: str, overrides: dict, way: str) -> None:
    model, arguments = make_adapted(family, sizes=overrides), (WAYS | DECODERS_ONLY)[way]
    one_row = "prompt_lookup_num_tokens" in arguments
    batch = make_batch(family, "CAUSAL_LM", lengths=(S,) if one_row else (S, S))
    if family in CONCATENATED and "static" in way:
        with pytest.raises(ValueError, match="static cache.*does not go through transformers' attention interface"):
            model.generate(**batch, **arguments)
        return
    expected = by_hand(model, family, batch, overrides, **arguments)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**batch, **arguments), expected)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_concatenating_the_embeddings_is_the_same(family: str) -> None:
    """The other definition, which has no token ids for processors to read."""
    model, base = make_adapted(family), make_model(family, "CAUSAL_LM")
    batch = make_batch(family, "CAUSAL_LM", lengths=(S, S))
    prompt = model.prompt_embeddings()
    embeds = torch.cat([prompt.expand(2, -1, -1), embedding_and_backbone(base)[0](batch["input_ids"])], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    expected = base.generate(inputs_embeds=embeds, attention_mask=mask, **NEW)
    assert torch.equal(model.generate(**batch, **NEW)[:, S:], expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_encoder_decoders(family: str, way: str) -> None:
    model, base = make_adapted(family, "SEQ_2_SEQ_LM"), make_model(family, "SEQ_2_SEQ_LM")
    batch = make_batch(family, "SEQ_2_SEQ_LM")
    del batch["decoder_input_ids"]
    embedding, _ = embedding_and_backbone(base)
    embeds = torch.cat([model.prompt_embeddings().expand(2, -1, -1), embedding(batch["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, V, dtype=torch.long), batch["attention_mask"]], dim=1)
    torch.manual_seed(1)
    generated = model.generate(**batch, **WAYS[way])
    torch.manual_seed(1)
    assert torch.equal(generated, base.generate(inputs_embeds=embeds, attention_mask=mask, **WAYS[way]))


RAGGED = ("greedy", "beam search", "no cache", "chunked prefill", "static cache", "static cache, chunked prefill")


@pytest.mark.parametrize("way", RAGGED)
@pytest.mark.parametrize(("family", "overrides"), [c[::2] for c in CELLS], ids=[c[1] for c in CELLS])
@torch.no_grad()
def test_left_padding_changes_no_generated_token(family: str, overrides: dict, way: str) -> None:
    if family in CONCATENATED and "static" in way:
        return  # refused, see above
    model, arguments = make_adapted(family, sizes=overrides), (WAYS | DECODERS_ONLY)[way]
    together = model.generate(**make_batch(family, "CAUSAL_LM", lengths=(3, 9), pad_left=True), **arguments)
    alone = by_hand(model, family, make_batch(family, "CAUSAL_LM", lengths=(3,)), overrides, **arguments)
    assert torch.equal(together[0, 9:], alone[0, 3:])
    alone = {key: value[1:] for key, value in make_batch(family, "CAUSAL_LM", lengths=(3, 9)).items()}
    assert torch.equal(together[1:], by_hand(model, family, alone, overrides, **arguments))


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_inputs_embeds_and_no_input(family: str) -> None:
    model = make_adapted(family)
    batch = make_batch(family, "CAUSAL_LM", lengths=(S, S))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    expected = by_hand(model, family, batch, **NEW)
    assert torch.equal(model.generate(inputs_embeds=embeds, **NEW), expected[:, S:])
    assert torch.equal(model.generate(inputs_embeds=embeds, input_ids=batch["input_ids"], **NEW), expected)
    expected = by_hand(model, family, {"input_ids": torch.ones(1, 1, dtype=torch.long)}, **NEW)
    assert torch.equal(model.generate(**NEW), expected)  # an empty text: the token that begins one


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_what_generate_returns_beside_tokens_is_of_the_text(family: str) -> None:
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM", lengths=(S, S))
    asked = NEW | {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    asked |= {"return_dict_in_generate": True, "repetition_penalty": 1.8}
    expected, found = by_hand(model, family, batch, **asked), model.generate(**batch, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    for key in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(found[key]), torch.stack(expected[key]), rtol=0, atol=1e-4)
    assert {layer.shape[1] for layer in found.hidden_states[0]} == {S}
    assert found.past_key_values.get_seq_length() == S + 8 - 1  # all but the last token


class Collects(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.chunks.append(value.flatten())

    def end(self) -> None:
        self.ended = True


class StopsAtSum(StoppingCriteria):
    """Ends a text by its ids, the user's too."""

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return (input_ids.sum(-1) % 4 == 0) & (input_ids.shape[1] > S + 1)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_streamers_and_stopping_criteria(family: str) -> None:
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM", lengths=(S,))
    streamer = Collects()
    generated = model.generate(**batch, **NEW, streamer=streamer)
    assert torch.equal(torch.cat(streamer.chunks), generated[0])
    assert streamer.ended
    batch = make_batch(family, "CAUSAL_LM", lengths=(S, S))
    arguments = {"max_new_tokens": 20, "do_sample": False, "stopping_criteria": [StopsAtSum()], "eos_token_id": 98}
    expected = by_hand(model, family, batch, **arguments)
    assert S + 2 <= expected.shape[1] < S + 20
    assert torch.equal(model.generate(**batch, **arguments), expected)


@pytest.mark.parametrize("drafter", ["base", "adapted", "another"])
@pytest.mark.parametrize(("family", "overrides"), [c[::2] for c in CELLS], ids=[c[1] for c in CELLS])
@torch.no_grad()
def test_assisted_decoding(family: str, overrides: dict, drafter: str) -> None:
    model = make_adapted(family, sizes=overrides)
    draft = make_adapted(family, sizes=overrides) if drafter == "adapted" else make_model("GPT-2", "CAUSAL_LM")
    draft = make_model(family, "CAUSAL_LM", **overrides) if drafter == "base" else draft
    draft.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="constant")
    batch = make_batch(family, "CAUSAL_LM", lengths=(S,))
    assert torch.equal(
        model.generate(**batch, **NEW, assistant_model=draft), by_hand(model, family, batch, overrides, **NEW)
    )


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="The one quantized cache without a further package is newer."
)
@pytest.mark.parametrize("family", sorted({*DECODERS} - {"Mistral", "Gemma 2", "Gemma 3"}))
@torch.no_grad()
def test_quantized_caches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM", lengths=(S, S))
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    asked = NEW | {"output_logits": True, "return_dict_in_generate": True}
    exact, rough = model.generate(**batch, **asked), model.generate(**batch, **asked, **quantized)
    torch.testing.assert_close(rough.logits[0], exact.logits[0], rtol=0, atol=1e-5)  # nothing was quantized yet
    error = (rough.logits[1] - exact.logits[1])[exact.sequences[:, S] == rough.sequences[:, S]].abs().max()
    assert 1e-5 < error < 0.1 * exact.logits[1].abs().max()
    # Without loss, all is as without quantization, the beams' order too.
    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    for way in ("greedy", "beam search"):
        assert torch.equal(
            model.generate(**batch, **WAYS[way], **quantized), by_hand(model, family, batch, **WAYS[way])
        )


class NoStream(nullcontext):
    """In place of the streams by which a GPU copies keys and values to and from the CPU."""

    def wait_stream(self, stream) -> None:
        pass


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_offloaded_caches(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family in {*CONCATENATED, "Mistral"} and "static" in kind:
        return  # refused, see above; transformers can't offload static caches if every layer has a window
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM", lengths=(S, S))
    for way in ("greedy", "beam search"):
        found = model.generate(**batch, **WAYS[way], cache_implementation=kind)
        assert torch.equal(found, by_hand(model, family, batch, **WAYS[way]))


def make_cache(kind: str, model: PeftModel) -> DynamicCache | StaticCache | None:
    config = model.get_base_model().config
    return {"dynamic": DynamicCache(config=config), "static": StaticCache(config=config, max_cache_len=60)}.get(kind)


@pytest.mark.parametrize("kind", ["dynamic", "static", "returned"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_conversation_goes_on_from_a_cache(family: str, kind: str) -> None:
    if family in CONCATENATED and kind == "static":
        return  # refused, see above
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM", lengths=(S, S))
    arguments = NEW | {"return_dict_in_generate": True}
    cache = make_cache(kind, model)
    first = model.generate(**batch, **arguments, **({} if cache is None else {CACHE: cache}))
    assert torch.equal(first.sequences, by_hand(model, family, batch, **NEW))
    assert int(first.past_key_values.get_seq_length()) == S + 8 - 1
    longer = torch.cat([first.sequences, batch["input_ids"]], dim=1)
    second = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    found = model.generate(**second, **NEW, **{CACHE: first.past_key_values})
    assert torch.equal(found, by_hand(model, family, second, **NEW))


@torch.no_grad()
def test_a_prefix_computed_once_serves_many_texts() -> None:
    model = make_adapted("Llama")
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(9, 9))["input_ids"]
    prefix = ids[:1, :4]
    kept = model(input_ids=prefix, **{CACHE: DynamicCache()}).past_key_values
    for row in ids:
        text = torch.cat([prefix, row[None, 4:]], dim=1)
        batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        found = model.generate(**batch, **NEW, **{CACHE: copy.deepcopy(kept)})
        assert torch.equal(found, by_hand(model, "Llama", batch, **NEW))


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token for each printable character, and the special tokens of the families."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<user>", *string.printable[: VOCABULARY - 5]]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names, **options)


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mistral", "Bloom"])
@torch.no_grad()
def test_pipelines_chat_templates_and_stop_strings(family: str) -> None:
    template = "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template, extra_special_tokens=["<user>"])
    model = make_adapted(family)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["ab", "cdefg"]
    outputs = generate(texts, **NEW, batch_size=2, return_full_text=False)
    for text, output in zip(texts, outputs, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = by_hand(model, family, {"input_ids": ids}, **NEW)[0, ids.shape[1] :]
        assert output[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    reply = generate([{"role": "user", "content": "ab"}], **NEW)[0]["generated_text"][-1]["content"]
    ids = tokenizer("<user>ab", add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = by_hand(model, family, {"input_ids": ids}, **NEW)[0, ids.shape[1] :]
    assert reply == tokenizer.decode(expected, skip_special_tokens=True)
    word = tokenizer.decode(expected[2:4])
    stopped = model.generate(ids, **NEW | {"min_new_tokens": 1}, stop_strings=[word], tokenizer=tokenizer)
    found = stopped[0, ids.shape[1] :]
    assert len(found) <= 4
    assert torch.equal(found, expected[: len(found)])
    assert tokenizer.decode(found).endswith(word)


COMPILED = {"compile_config": CompileConfig(backend="eager", mode=None, fullgraph=True)}
COMPILED["compile_config"]._compile_all_devices = True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 2", "GPT-2"])
@torch.no_grad()
def test_the_automatic_compile_of_static_caches(family: str) -> None:
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM", lengths=(3, 9), pad_left=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = NEW | {"cache_implementation": "static"}
    found = model.generate(**batch, **static, **COMPILED)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(found, model.generate(**batch, **static))
    model.add_adapter("other", make_config("CAUSAL_LM", V + 2))
    model.set_adapter("other")
    assert torch.equal(model.generate(**batch, **static, **COMPILED), model.generate(**batch, **static))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
@pytest.mark.parametrize("family", ["Llama", "Bloom"])
@torch.no_grad()
def test_generating_with_a_compiled_forward(family: str) -> None:
    model, batch = make_adapted(family), make_batch(family, "CAUSAL_LM", lengths=(S, S))
    expected = model.generate(**batch, **NEW)
    base = model.get_base_model()
    torch._dynamo.reset()
    base.forward = torch.compile(base.forward, backend="eager")
    assert torch.equal(model.generate(**batch, **NEW), expected)


@torch.no_grad()
def test_switching_between_calls() -> None:
    model, batch = make_adapted("Llama"), make_batch("Llama", "CAUSAL_LM", lengths=(S, S))
    model.add_adapter("other", make_config("CAUSAL_LM", V + 2))
    for way in (WAYS["greedy"], WAYS["static cache"]):
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            assert torch.equal(model.generate(**batch, **way), by_hand(model, "Llama", batch, **way))
            with model.disable_adapter():
                base = make_model("Llama", "CAUSAL_LM")
                assert torch.equal(model.generate(**batch, **way), base.generate(**batch, **way))


@torch.no_grad()
def test_a_cache_for_cross_attention() -> None:
    sizes = {"add_cross_attention": True}
    model, batch = make_adapted("GPT-2", sizes=sizes), make_batch("GPT-2", "CAUSAL_LM", lengths=(S, S))
    assert torch.equal(model.generate(**batch, **NEW), by_hand(model, "GPT-2", batch, sizes, **NEW))


@torch.no_grad()
def test_static_caches_are_refused_where_the_prompt_is_concatenated() -> None:
    model = make_adapted("Llama")
    model.get_base_model().set_attn_implementation("sdpa")
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(S, S))
    with pytest.raises(ValueError, match="static cache.*changed to 'sdpa'"):
        model.generate(**batch, **NEW, cache_implementation="static")
    assert model.generate(**batch, **NEW).shape == (2, S + 8)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_steps_by_hand_equal_one_call(family: str) -> None:
    model = make_adapted(family)
    ids = make_batch(family, "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    expected = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :3], use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for column in range(3, 6):
        logits.append(model(input_ids=ids[:, column : column + 1], **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_generate_with_the_adapter_disabled_is_the_base() -> None:
    model, base = make_adapted("Llama"), make_model("Llama", "CAUSAL_LM")
    batch = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))
    with model.disable_adapter():
        assert torch.equal(model.generate(**batch, **NEW), base.generate(**batch, **NEW))


@torch.no_grad()
def test_a_cache_belongs_to_the_adapter_that_filled_it() -> None:
    model = make_adapted("Llama")
    model.add_adapter("other", make_config("CAUSAL_LM"))
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with model.disable_adapter(), pytest.raises(ValueError, match="filled under adapter 'default'.*no adapter"):
        model(input_ids=ids[:, :1], **{CACHE: cache})
    model.set_adapter("other")
    with pytest.raises(ValueError, match="filled under adapter 'default'.*'other' is active"):
        model(input_ids=ids[:, :1], **{CACHE: cache})
    with model.disable_adapter():
        unprompted = model(input_ids=ids, **{CACHE: DynamicCache()}).past_key_values
    with pytest.raises(ValueError, match="filled under no adapter.*'other' is active"):
        model(input_ids=ids[:, :1], **{CACHE: unprompted})


@torch.no_grad()
def test_a_cache_behind_a_shared_prompt_needs_the_attention_that_sees_it() -> None:
    model = make_adapted("Llama")
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.get_base_model().set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="behind a shared prompt.*changed to 'sdpa'"):
        model(input_ids=ids[:, :1], **{CACHE: cache})
    assert cache.get_seq_length() == 6
    model.get_base_model().set_attn_implementation("ptuning_sdpa")
    assert model(input_ids=ids[:, :1], **{CACHE: cache}).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
@pytest.mark.parametrize("family", ["Llama", "Bloom"])
@torch.no_grad()
def test_a_cache_is_known_by_each_of_its_names(family, name) -> None:
    """A bare backbone is given the old name as it is: transformers renames the argument inside the hooks."""
    model = make_adapted(family, "FEATURE_EXTRACTION")
    ids = make_batch(family, "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    cache = DynamicCache()
    model(input_ids=ids[:, :4], **{name: cache})
    assert cache.get_seq_length() == 4
    found = model(input_ids=ids[:, 4:], **{name: cache}).last_hidden_state
    torch.testing.assert_close(found, model(input_ids=ids).last_hidden_state[:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["GPT-2", "OPT"])
def test_texts_that_outgrow_the_positions_are_refused_while_they_grow(family) -> None:
    batch = make_batch(family, "CAUSAL_LM", lengths=(56, 56))  # and 5 virtual tokens, of 64 positions
    with pytest.raises(ValueError, match="5 virtual tokens and 60 text tokens are 65 positions, and .* has 64"):
        make_adapted(family).generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)


@torch.no_grad()
def test_what_a_cache_shows_of_itself_is_the_user_s() -> None:
    model = make_adapted("Llama")
    ids = make_batch("Llama", "CAUSAL_LM", lengths=(6, 6))["input_ids"]
    mine = DynamicCache()
    returned = model(input_ids=ids, **{CACHE: mine}).past_key_values
    expected = model(input_ids=ids[:, :5]).logits[:, -1]
    for cache in (mine, returned, copy.deepcopy(mine), pickle.loads(pickle.dumps(returned))):
        assert isinstance(cache, DynamicCache)
        assert cache.get_seq_length() == 6
    mine.crop(-2)  # the same state as `returned`
    assert returned.get_seq_length() == 4
    logits = model(input_ids=ids[:, 4:5], **{CACHE: returned}, attention_mask=torch.ones(2, 5)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="covers 3 tokens, but the cache holds 5 and 1 are new"):
        model(input_ids=ids[:, :1], **{CACHE: mine}, attention_mask=torch.ones(2, 3))
    mine.reset()
    with model.disable_adapter():
        base = make_model("Llama", "CAUSAL_LM")(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, **{CACHE: mine}).logits, base)
    assert type(mine) is DynamicCache
    assert mine.get_seq_length() == 6


@pytest.mark.parametrize("family", ["Bloom", "Mistral"])
@torch.no_grad()
def test_a_first_chunk_that_is_padding_in_a_row(family) -> None:
    model = make_adapted(family)
    _, stack = embedding_and_backbone(model.get_base_model())
    if family == "Mistral":
        stack.config._attn_implementation = "eager"  # the prompt then stands in the row
    batch = make_batch(family, "CAUSAL_LM", lengths=(20, 13, 4), pad_left=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = model(**batch).logits

    def in_chunks(first: int) -> torch.Tensor:
        begun = model(input_ids=ids[:, :first], attention_mask=mask[:, :first], **{CACHE: DynamicCache()})
        rest = model(input_ids=ids[:, first:], attention_mask=mask, **{CACHE: begun.past_key_values})
        return torch.cat([begun.logits, rest.logits], dim=1)

    torch.testing.assert_close(in_chunks(17)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    if family == "Bloom":  # it measures distance by the mask
        torch.testing.assert_close(in_chunks(9)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
        return
    with pytest.raises(ValueError, match="choose a larger `prefill_chunk_size`"):
        in_chunks(9)
