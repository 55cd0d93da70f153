# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A model behind a long context as a teacher: its answers, its distributions over them, and how far another one is."""

import hashlib
from dataclasses import asdict, dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from shared.contexts import ContextArguments, Frame


@torch.no_grad()
def write_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[list[int]], stop: str | None, **options
) -> list[list[int]]:
    """Returns the tokens of a greedy answer to each text (or a sampled one), with the tokens that end it."""
    model.eval()
    batch = tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt").to(model.device)
    ends = {} if stop is None else {"stop_strings": [stop], "tokenizer": tokenizer}
    ids = model.generate(
        **batch,
        **{"do_sample": False, "num_beams": 1} | options | ends,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [_until_end(row, tokenizer, stop) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


def _until_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, stop: str | None) -> list[int]:
    for i, token in enumerate(ids):
        if token == tokenizer.eos_token_id or (stop is not None and stop in tokenizer.decode(ids[: i + 1])):
            return ids[: i + 1]
    return ids


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: str | None) -> str:
    """The text of an answer without what ends it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return (text if stop is None else text.partition(stop)[0]).strip()


class Teacher:
    """The frozen model with the context in front: writes answers, and says how probable each of their tokens is.

    The context is a prompt whose vectors are the embeddings of its tokens, which this package computes once for all
    rows. `datasets` knows the rows by what `__getstate__` returns, and finds them again in its cache.

    Args:
        model ([`PeftModel`]): The model with the context as its prompt.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        frame ([`Frame`]): What stands around an input.
        args ([`ContextArguments`]): `top_k` and the length of answers.
    """

    def __init__(self, model: PeftModel, tokenizer, frame: Frame, args: ContextArguments):
        self.model, self.tokenizer, self.frame = model, tokenizer, frame
        self.top_k, self.max_new_tokens = args.top_k, args.max_new_tokens
        weights = hashlib.sha256()
        for _, tensor in sorted(model.state_dict().items()):
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.identity = [asdict(frame), self.top_k, self.max_new_tokens, weights.hexdigest()]

    def __getstate__(self) -> dict:
        return {"identity": self.identity}

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Adds the row's tokens and those of its answer, and the teacher's log-probabilities over the answer."""
        texts = [self.frame.ids(self.tokenizer, text) for text in rows["input"]]
        answers = write_answers(self.model, self.tokenizer, texts, self.frame.stop, max_new_tokens=self.max_new_tokens)
        ids, logprobs, rest = self.distributions(texts, answers)
        return {
            "text_ids": texts,
            "answer_ids": answers,
            "teacher_ids": ids,
            "teacher_logprobs": logprobs,
            "teacher_rest": rest,
        }

    @torch.no_grad()
    def distributions(self, texts: list[list[int]], answers: list[list[int]]) -> tuple[list, list, list]:
        """The most probable tokens at each place of the answers, their log-probabilities, and that of all others."""
        self.model.eval()
        rows = [{"text_ids": text, "answer_ids": answer} for text, answer in zip(texts, answers, strict=True)]
        batch = to_batch(rows, self.tokenizer.pad_token_id)
        logits = self.model(**{key: to_device(value, self.model.device) for key, value in batch.items()}).logits
        logprobs = logits[:, :-1].float().log_softmax(-1)
        top, ids = logprobs.topk(min(self.top_k, logprobs.shape[-1]))
        # Where nothing is left over, a number that `datasets` can store stands for the log of 0.
        rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp_min(torch.finfo(torch.float32).min)
        parts = ([row[-len(answer) :].tolist() for row, answer in zip(part, answers)] for part in (ids, top, rest))
        return tuple(parts)


def to_device(value, device: torch.device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def to_batch(rows: list[dict], pad_token_id: int) -> dict:
    """Returns the model's inputs, padded on the left so that all answers end in the last column.

    Logits are computed from the token in front of the longest answer on: (B, N + 1, vocabulary).
    """
    ids = [torch.tensor([*row["text_ids"], *row["answer_ids"]]) for row in rows]
    longest = max(len(row["answer_ids"]) for row in rows)
    return {
        "input_ids": _pad_left(ids, pad_token_id),
        "attention_mask": _pad_left([torch.ones_like(row) for row in ids], 0),
        "logits_to_keep": longest + 1,
    }


def _pad_left(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


@dataclass(frozen=True)
class DistillationCollator:
    """Makes a batch of rows that a [`Teacher`] has seen.

    Besides the model's inputs it has "labels" (B, S), which are -100 but for the answers, and the teacher's
    log-probabilities: "teacher_ids" and "teacher_logprobs" (B, N, k), "teacher_rest" (B, N). N is the longest answer,
    and k is `top_k`.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict:
        teacher = {
            name: _pad_left([torch.tensor(row[name]) for row in rows], 0)
            for name in ("teacher_ids", "teacher_logprobs", "teacher_rest")
        }
        labels = [torch.tensor([-100] * len(row["text_ids"]) + row["answer_ids"]) for row in rows]
        return {**to_batch(rows, self.pad_token_id), "labels": _pad_left(labels, -100), **teacher}


def divergence(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Returns the Kullback-Leibler divergence of the model from the teacher at each place, (B, N).

    The k tokens count singly, and all others as one. This is the divergence of the full distributions where k is the
    vocabulary, and less where it is not.

    Args:
        logits (`torch.Tensor`): Of the model, (B, N, vocabulary).
        ids (`torch.Tensor`): The teacher's k most probable tokens, (B, N, k).
        logprobs (`torch.Tensor`): The teacher's log-probabilities of them, (B, N, k).
        rest (`torch.Tensor`): The log of the probability of all other tokens, (B, N).
    """
    own = logits.float().log_softmax(-1)
    found = (logprobs.exp() * (logprobs - own.gather(-1, ids))).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return found
    return found + rest.exp() * (rest - own.scatter(-1, ids, -torch.inf).logsumexp(-1))


def run_student(model: nn.Module, batch: dict) -> tuple[CausalLMOutputWithPast, torch.Tensor]:
    """Returns what the model says to a batch, and its divergence from the teacher at each token of the answers."""
    batch = dict(batch)
    teacher = [batch.pop(name) for name in ("teacher_ids", "teacher_logprobs", "teacher_rest")]
    present = batch.pop("labels")[:, -teacher[0].shape[1] :] != -100
    outputs = model(**batch)
    return outputs, divergence(outputs.logits[:, :-1], *teacher)[present]
