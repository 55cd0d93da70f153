# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the package must equal: the base model's own output for the prompt concatenated by hand.

Nothing here uses the package. Where a head reads single positions (a pooled token, say), concatenating in front of the
whole model would make it read the prompt; there the backbone alone is given the concatenation, by replacing its
`forward` for the duration.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from families import FAMILIES, PAD
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


V = 5
S = 7
POOLED = frozenset({"SEQ_CLS", "multiple choice"})
# Heads that the reference gives the user's positions only. Some processors round the product of a narrow matrix with
# few rows otherwise than with many, and outputs are to be bitwise the same.
NARROW = frozenset({"TOKEN_CLS", "QUESTION_ANS"})


def make_batch(family: str, task: str, lengths: tuple[int, ...] = (S, S - 2), pad_left: bool = False) -> dict:
    """Token ids and mask, the last token of each text being the end-of-sequence one."""
    generator = torch.Generator().manual_seed(1)
    pad = FAMILIES[family].config().pad_token_id
    pad = PAD if pad is None else pad
    longest = max(lengths)
    ids, mask = [], []
    for length in lengths:
        text = torch.randint(5, 99, (longest,), generator=generator)[:length]
        text[-1] = 2
        fill = torch.full((longest - length,), pad)
        ids.append(torch.cat([fill, text] if pad_left else [text, fill]))
        seen = torch.ones(length, dtype=torch.long)
        mask.append(torch.cat([fill * 0, seen] if pad_left else [seen, fill * 0]))
    batch = {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}
    if task == "multiple choice":
        ids, mask = batch["input_ids"], batch["attention_mask"]
        choices = [torch.where(mask.bool(), (ids + shift) % 90 + 5, ids) for shift in range(3)]
        batch = {"input_ids": torch.stack(choices, dim=1), "attention_mask": torch.stack([mask] * 3, dim=1)}
    if FAMILIES[family].kind == "encoder-decoder" and task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        batch["decoder_input_ids"] = torch.randint(5, 99, (len(lengths), 4), generator=generator)
    return batch


def make_labels(task: str, batch: dict) -> dict:
    """Labels as a user of the base model would pass them."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    batch_size = len(ids)
    match task:
        case "SEQ_CLS" | "multiple choice":
            return {"labels": torch.arange(batch_size) % 2}
        case "TOKEN_CLS":
            return {"labels": (ids % 2).masked_fill(mask == 0, -100)}
        case "QUESTION_ANS":
            return {"start_positions": torch.arange(batch_size), "end_positions": torch.arange(batch_size) + 2}
        case "CAUSAL_LM" | "masked LM":
            return {"labels": ids.masked_fill(mask == 0, -100)}
        case "SEQ_2_SEQ_LM":
            return {"labels": batch["decoder_input_ids"].flip(1)}
    return {}


def textbook_loss(task: str, outputs, labels: dict) -> torch.Tensor:
    """The loss of a task, written out."""
    if task == "QUESTION_ANS":
        losses = [cross_entropy(outputs[f"{end}_logits"], labels[f"{end}_positions"]) for end in ("start", "end")]
        return sum(losses) / 2
    logits, targets = outputs.logits, labels["labels"]
    if task == "CAUSAL_LM":
        logits, targets = logits[:, :-1], targets[:, 1:]
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def main_output(outputs) -> torch.Tensor:
    """The tensor that a task is about: (B, …)."""
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def unmasked(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The outputs at real tokens, (N, …), if `output` has one per token of `mask`; else all of it."""
    return output[mask.bool()] if output.shape[: mask.dim()] == mask.shape else output


def embedding_and_backbone(base: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The input embedding and the stack that reads it, named by hand for each kind of model."""
    stack = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
    stack = getattr(stack, "decoder", stack) if base.config.model_type == "opt" else stack
    return stack.get_input_embeddings(), stack


def concatenated_inputs(base: PreTrainedModel, stack: nn.Module, prompt: torch.Tensor, batch: dict) -> dict:
    """`inputs_embeds=[P; E(x)]`, `attention_mask=[1_V; mask]`, and counted positions for a causal decoder."""
    embedding, _ = embedding_and_backbone(base)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs = {
        "inputs_embeds": torch.cat([prompt.expand(len(ids), -1, -1), embedding(ids)], dim=1),
        "attention_mask": torch.cat([mask.new_ones(len(mask), len(prompt)), mask], dim=1),
    }
    is_causal = hasattr(base, "prepare_inputs_for_generation") and not base.config.is_encoder_decoder
    is_causal |= FAMILIES_CAUSAL.get(base.config.model_type, False)
    if is_causal and "position_ids" in inspect.signature(type(stack).forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


FAMILIES_CAUSAL = {family.config().model_type: family.kind == "decoder" for family in FAMILIES.values()}


def concatenated(base: PreTrainedModel, task: str, prompt: torch.Tensor, batch: dict) -> torch.Tensor:
    """The main output of the base model under explicit concatenation, at the user's positions."""
    _, stack = embedding_and_backbone(base)
    if base.config.is_encoder_decoder and task != "TOKEN_CLS":
        inputs = concatenated_inputs(base, stack, prompt, batch)
        memory = stack(inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"])
        rest = {key: value for key, value in batch.items() if key != "attention_mask"}
        return main_output(base(**rest, encoder_outputs=memory, attention_mask=inputs["attention_mask"]))
    if task in POOLED | NARROW:
        with concatenating(base, prompt):
            return main_output(base(**batch))
    return main_output(base(**concatenated_inputs(base, stack, prompt, batch)))[:, len(prompt) :]


@contextmanager
def concatenating(base: PreTrainedModel, prompt: torch.Tensor) -> Iterator[None]:
    """Lets the backbone alone see the concatenation and hand on the user's positions of its last hidden state."""
    _, stack = embedding_and_backbone(base)
    forward = stack.forward

    def concatenate(input_ids=None, attention_mask=None, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("inputs_embeds", "token_type_ids", "position_ids")}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        batch = {"input_ids": input_ids, "attention_mask": mask}
        kwargs.pop("return_dict", None)
        outputs = forward(**concatenated_inputs(base, stack, prompt, batch), **kwargs, return_dict=True)
        outputs.last_hidden_state = outputs.last_hidden_state[:, len(prompt) :]
        if getattr(stack, "pooler", None) is not None:
            first = outputs.last_hidden_state[:, 0]
            if base.config.model_type == "albert":
                outputs.pooler_output = torch.tanh(stack.pooler(first))
            else:
                outputs.pooler_output = torch.tanh(stack.pooler.dense(first))
        return outputs

    stack.forward = concatenate
    try:
        yield
    finally:
        del stack.forward
