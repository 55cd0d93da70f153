# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness: its own class for models scores and generates as the concatenation does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from by_hand import deep_by_hand
from families import make_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from making import make_config
from peft import PeftModel, get_peft_model
from reference import concatenated
from tiny_tokenizers import TEXTS, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast


KINDS = {"Llama": "nothing around", "GPT-2": "GPT-2", "T5": "nothing around"}
PAIRS = [(text[:12], text[12 : 16 + 3 * i]) for i, text in enumerate(TEXTS)]
CONTEXTS = [context for context, _ in PAIRS]
models = pytest.mark.parametrize(
    ("family", "depth"), [("Llama", "INPUT"), ("Llama", "DEEP"), ("GPT-2", "INPUT"), ("T5", "INPUT")]
)
decoders = pytest.mark.parametrize(("family", "depth"), [("Llama", "INPUT"), ("Llama", "DEEP"), ("GPT-2", "INPUT")])
ways = pytest.mark.parametrize("way", ["object", "folder"])


def task_of(family: str) -> str:
    return "SEQ_2_SEQ_LM" if family == "T5" else "CAUSAL_LM"


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(KINDS[family])


def make_base(family: str) -> PreTrainedModel:
    return make_model(family, task_of(family), vocab_size=len(tokenizer_of(family)))


def make_tuned(family: str, depth: str = "INPUT") -> PeftModel:
    base = make_base(family)
    torch.manual_seed(0)
    return get_peft_model(base, make_config(task_of(family), prompt_depth=depth)).eval()


def make_scorer(model: PeftModel, family: str, way: str, folder, **options) -> HFLM:
    """The harness's model: of the adapted model itself, or of the folders of base and adapter."""
    tokenizer = tokenizer_of(family)
    options = {"batch_size": 3, **options}
    if way == "object":
        return HFLM(pretrained=model, tokenizer=tokenizer, **options)
    model.save_pretrained(folder / "adapter")
    make_base(family).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return HFLM(pretrained=str(folder / "base"), peft=str(folder / "adapter"), device="cpu", **options)


def ask(method: Callable, requests: list[tuple]) -> list:
    kind = method.__name__
    return method([Instance(kind, {}, arguments, index) for index, arguments in enumerate(requests)])


@torch.no_grad()
def scores_by_hand(model: PeftModel, family: str, ids: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities (S, ·) behind each of `ids`; of an encoder-decoder, of each token of the answer to them."""
    ids = torch.tensor([ids])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    base = make_base(family)
    if family == "T5":
        batch["decoder_input_ids"] = torch.tensor([[base.config.decoder_start_token_id, *answer[:-1]]])
    if model.peft_config["default"].is_deep:
        logits = deep_by_hand(family, base, model.prompt_key_values(), batch)
    else:
        logits = concatenated(base, task_of(family), model.prompt_embeddings(), batch)
    return logits[0].log_softmax(-1)


def score_by_hand(model: PeftModel, family: str, ids: list[int], answer: list[int]) -> tuple[float, bool]:
    """The log-probability of an answer behind `ids`, and whether it is the most probable one."""
    read = ids if family == "T5" else [*ids, *answer[:-1]]
    found = scores_by_hand(model, family, read, answer)[-len(answer) :]
    tokens = torch.tensor(answer)
    return found.gather(1, tokens[:, None]).sum().item(), bool((found.argmax(-1) == tokens).all())


def answer_by_hand(model: PeftModel, family: str, ids: list[int], length: int) -> list[int]:
    """The most probable tokens one by one."""
    answer: list[int] = []
    while len(answer) < length and 2 not in answer:
        read = ids if family == "T5" else [*ids, *answer]
        answer.append(scores_by_hand(model, family, read, [*answer, 0])[-1].argmax().item())
    return answer


@ways
@models
def test_scores_are_those_of_the_concatenation(family: str, depth: str, way: str, tmp_path) -> None:
    model, tokenizer = make_tuned(family, depth), tokenizer_of(family)
    contexts = tokenizer(CONTEXTS).input_ids
    likely = [(context, answer_by_hand(model, family, ids, 1)) for context, ids in zip(CONTEXTS, contexts)]
    scorer = make_scorer(model, family, way, tmp_path)
    pairs = [*PAIRS, *((context, tokenizer.decode(answer)) for context, answer in likely)]
    found = ask(scorer.loglikelihood, pairs)
    expected = []
    for context, answer in pairs:
        context_ids, answer_ids = scorer._encode_pair(context, answer)
        expected.append(score_by_hand(model, family, context_ids, answer_ids))
    if family != "T5":  # whose tokens are others once they are a text
        assert {greedy for _, greedy in expected} == {True, False}
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


@ways
@decoders
def test_scores_of_whole_texts_are_those_of_the_concatenation(family: str, depth: str, way: str, tmp_path) -> None:
    """A text longer than a window is scored in two, and the prompt is in front of both."""
    model, tokenizer, window = make_tuned(family, depth), tokenizer_of(family), 8
    texts = [tokenizer.decode(tokenizer(text).input_ids[:length]) for text, length in zip(TEXTS, (16, 8, 5))]
    scorer = make_scorer(model, family, way, tmp_path, max_length=window)
    found = ask(scorer.loglikelihood_rolling, [(text,) for text in texts])
    expected = []
    for text in texts:
        ids = tokenizer(text).input_ids
        parts = [ids[start : start + window] for start in range(0, len(ids), window)]
        before = [tokenizer.bos_token_id, *(part[-1] for part in parts)]
        expected.append(sum(score_by_hand(model, family, [one], part)[0] for one, part in zip(before, parts)))
    assert found == pytest.approx(expected, abs=1e-4)


@ways
@models
def test_answers_are_those_of_the_concatenation(family: str, depth: str, way: str, tmp_path) -> None:
    """Contexts of different lengths in one batch."""
    model, tokenizer = make_tuned(family, depth), tokenizer_of(family)
    contexts = [context[: 4 + 3 * i] for i, context in enumerate(CONTEXTS)]
    ids = tokenizer(contexts).input_ids
    assert len({len(row) for row in ids}) > 1
    # Of an encoder-decoder, the harness takes the tokens of the longest context and of the beginning for the answer's.
    length = max(map(len, ids)) + 5 if family == "T5" else 6
    answers = [answer_by_hand(model, family, row, length) for row in ids]
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    stop = next(letter for letter in expected[-1][1:] if letter.isascii() and letter.isprintable())
    scorer = make_scorer(model, family, way, tmp_path)
    requests = [(context, {"until": [stop], "max_gen_toks": 6}) for context in contexts]
    assert ask(scorer.generate_until, requests) == [text.split(stop)[0] for text in expected]


def test_a_prompt_takes_room_in_a_table_of_positions(tmp_path) -> None:
    model, tokenizer = make_tuned("GPT-2"), tokenizer_of("GPT-2")
    long = tokenizer.decode(tokenizer(TEXTS[0] * 4).input_ids[:62])
    with pytest.raises(ValueError, match="are 67 positions, and GPT2Model has 64. Truncate the text to 59 tokens"):
        ask(make_scorer(model, "GPT-2", "object", tmp_path).loglikelihood_rolling, [(long,)])
    (found,) = ask(make_scorer(model, "GPT-2", "object", tmp_path, max_length=59).loglikelihood_rolling, [(long,)])
    ids = tokenizer(long).input_ids
    first = score_by_hand(model, "GPT-2", [tokenizer.bos_token_id], ids[:59])[0]
    # The last window is filled up with what comes before.
    assert found == pytest.approx(first + score_by_hand(model, "GPT-2", ids[2:59], ids[59:])[0], abs=1e-4)
