# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""TRL's distillation trainers: each step has the loss and the gradient of the concatenation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from by_hand import deep_by_hand
from datasets import Dataset
from families import make_model
from learnable import SETTINGS, frozen, losses
from making import make_config
from peft import PeftModel
from reference import V, concatenated
from tiny_tokenizers import CHAT, SIZE, TEXTS, make_tokenizer
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer


RATE = 0.5
PLAIN_STEPS = {
    **SETTINGS,
    "bf16": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}

Rows = list[torch.Tensor]
Prompt = torch.Tensor | dict[int, tuple[torch.Tensor, torch.Tensor]]


def divergences(student: Rows, teacher: Rows, beta: float) -> Rows:
    """The generalized Jensen-Shannon divergence at each token (Agarwal et al., 2024, equation 1), by row."""
    found = []
    for logits_s, logits_t in zip(student, teacher, strict=True):
        s, t = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
        mixture = ((1 - beta) * s.exp() + beta * t.exp()).log()
        to_teacher = (t.exp() * (t - (s if beta == 0 else mixture))).sum(-1)
        to_student = (s.exp() * (s - (t if beta == 1 else mixture))).sum(-1)
        weights = {0: (1, 0), 1: (0, 1)}.get(beta, (beta, 1 - beta))
        found.append(weights[0] * to_teacher + weights[1] * to_student)
    return found


def log_probs(logits: Rows, tokens: Rows) -> Rows:
    return [one.log_softmax(-1).gather(-1, ids[:, None])[:, 0] for one, ids in zip(logits, tokens, strict=True)]


def mixed(beta: float) -> Callable:
    return lambda student, teacher, tokens: divergences(student, teacher, beta)


def sampled(student: Rows, teacher: Rows, tokens: Rows) -> Rows:
    """The score function of the reverse divergence, at the tokens that were sampled."""
    pairs = zip(log_probs(student, tokens), log_probs(teacher, tokens), strict=True)
    return [(s - t).detach() * s for s, t in pairs]


def weighted(student: Rows, teacher: Rows, tokens: Rows) -> Rows:
    """IW-OPD: the same, where a token weighs less, the more of the row's divergence comes before it."""
    found = []
    for s, t in zip(log_probs(student, tokens), log_probs(teacher, tokens), strict=True):
        distance = (s - t).abs().detach()
        share = (distance.cumsum(0) - distance) / distance.sum()
        found.append((s - t).detach() * s * (1 + IWOPDConfig.iw_opd_gamma * (1 - share)))
    return found


@dataclass
class Case:
    """A trainer, and its loss at each token of the answers. Its teacher is another model or the student's own."""

    trainer: type[Trainer]
    config: type
    loss: Callable
    columns: tuple[str, ...] = ("messages",)
    teacher: str = "another model"
    is_on_policy: bool = True
    arguments: dict = field(default_factory=dict)


SHORT = {"max_completion_length": 5, "top_k": 1}  # the only token that can be sampled is the most probable one
GREEDY = {"max_new_tokens": 5, "temperature": 1e-4}  # GKD samples from all tokens
AT_1 = {"temperature": 1.0}  # GOLD divides the logits of its loss by it
OWN = {**SHORT, "num_generations": 2, "distillation_mode": "full_logits", "distillation_alpha": 0.3}
ASKED = ("prompt", "privileged_context")
CASES = {
    "distillation": Case(DistillationTrainer, DistillationConfig, mixed(1), ("prompt",), arguments=SHORT),
    "distillation-mixed": Case(
        DistillationTrainer, DistillationConfig, mixed(0.3), ("prompt",), arguments=SHORT | {"beta": 0.3}
    ),
    "gkd-given": Case(GKDTrainer, GKDConfig, mixed(0.5), is_on_policy=False, arguments={"lmbda": 0.0}),
    "gkd-on-policy": Case(GKDTrainer, GKDConfig, mixed(0), arguments=GREEDY | {"lmbda": 1.0, "beta": 0.0}),
    "gold-given": Case(GOLDTrainer, GOLDConfig, mixed(0.5), is_on_policy=False, arguments=AT_1 | {"lmbda": 0.0}),
    "gold-on-policy": Case(GOLDTrainer, GOLDConfig, mixed(0.5), arguments=AT_1 | SHORT | {"lmbda": 1.0}),
    "iw-opd": Case(IWOPDTrainer, IWOPDConfig, weighted, arguments=SHORT),
    "iw-opd-jsd": Case(
        IWOPDTrainer,
        IWOPDConfig,
        mixed(0.3),
        arguments=SHORT | {"distillation_objective": "jsd", "beta": 0.3, "loss_top_k": 0},
    ),
    "sdft": Case(SDFTTrainer, SDFTConfig, mixed(0.3), ASKED, "without its prompt", arguments=OWN),
    "sdft-live": Case(
        SDFTTrainer, SDFTConfig, mixed(0.3), ASKED, "with it", arguments=OWN | {"teacher_model_kind": "live"}
    ),
    "sdpo": Case(
        SDPOTrainer,
        SDPOConfig,
        sampled,
        ("prompt",),
        "without its prompt",
        arguments=SHORT | {"num_generations": 2, "teacher_model_kind": "base"},
    ),
    "sdpo-live": Case(
        SDPOTrainer,
        SDPOConfig,
        mixed(0.3),
        ("prompt",),
        "with it",
        arguments=OWN | {"teacher_model_kind": "live"},
    ),
}


def make_data(columns: tuple[str, ...]) -> Dataset:
    """Questions of different lengths, with answers."""
    rows = []
    for question, answer in zip(TEXTS, reversed(TEXTS), strict=True):
        messages = [{"role": "user", "content": question[:12]}, {"role": "assistant", "content": answer[:9]}]
        rows.append({"messages": messages, "prompt": question[: 6 + len(rows)], "privileged_context": answer[:6]})
    return Dataset.from_list(rows * 2).select_columns([*columns])


def make_trainer(case: Case, folder, peft_config) -> Trainer:
    tokenizer = make_tokenizer("nothing around", CHAT)
    options = {"train_dataset": make_data(case.columns), "processing_class": tokenizer, "peft_config": peft_config}
    if case.teacher == "another model":
        make_model("Qwen3", "CAUSAL_LM", vocab_size=SIZE).save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
        options["teacher_model"] = str(folder / "teacher")
    if case.trainer is SDPOTrainer:
        options["reward_funcs"] = lambda completions, **_: [1.0] * len(completions)
    arguments = case.config(folder, **PLAIN_STEPS, **case.arguments)
    return case.trainer(make_model("Llama", "CAUSAL_LM", vocab_size=SIZE), args=arguments, **options)


def prompt_of(model: PeftModel) -> Prompt:
    """A copy of the prompt: vectors, or keys and values by layer."""
    if model.peft_config["default"].is_deep:
        return {layer: (k.detach().clone(), v.detach().clone()) for layer, (k, v) in model.prompt_key_values().items()}
    return model.prompt_embeddings().detach().clone()


def tensors(prompt: Prompt) -> list[torch.Tensor]:
    return [prompt] if isinstance(prompt, torch.Tensor) else [tensor for pair in prompt.values() for tensor in pair]


def watch(trainer: Trainer) -> list[tuple[Prompt, dict]]:
    """What each step begins with: the prompt, and the inputs of its loss."""
    steps, compute_loss = [], trainer.compute_loss

    def watching(model, inputs, **kwargs):
        steps.append((prompt_of(trainer.model), {**kwargs, **inputs}))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watching
    return steps


def read_texts(inputs: dict) -> tuple[dict, dict, torch.Tensor]:
    """What student and teacher read, and which tokens at the end of both belong to the answers."""
    if "labels" in inputs:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return batch, batch, inputs["labels"] != -100
    answer, mask = inputs["completion_ids"], inputs["completion_mask"]
    student = {
        "input_ids": torch.cat([inputs["prompt_ids"], answer], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], mask], dim=1),
    }
    teacher = student
    if "teacher_input_ids" in inputs:
        teacher = {name: inputs[f"teacher_{name}"] for name in student}
    return student, teacher, mask.bool()


def at_answers(logits: torch.Tensor, is_answer: torch.Tensor) -> Rows:
    """The logits (B, S, ·) from which the tokens of each answer follow, or the tokens themselves one further on."""
    length = is_answer.shape[1]
    padded = torch.nn.functional.pad(logits, (0, 0, 1, 0))[:, :-1]
    return [row[seen] for row, seen in zip(padded[:, -length:], is_answer)]


def with_prompt(prompt: Prompt, batch: dict) -> torch.Tensor:
    """The logits of the student's base behind the prompt, (B, S, ·)."""
    base = make_model("Llama", "CAUSAL_LM", vocab_size=SIZE)
    if isinstance(prompt, dict):
        return deep_by_hand("Llama", base, prompt, batch)
    return concatenated(base, "CAUSAL_LM", prompt, batch)


def by_hand(case: Case, prompt: Prompt, inputs: dict) -> tuple[torch.Tensor, Rows, Rows]:
    """The loss of a step, the answers' tokens, and the most probable ones in their place."""
    batch, teacher_batch, is_answer = read_texts(inputs)
    student = at_answers(with_prompt(prompt, batch), is_answer)
    with torch.no_grad():
        if case.teacher == "with it":
            teacher = with_prompt(prompt, teacher_batch)
        else:
            family = "Qwen3" if case.teacher == "another model" else "Llama"
            teacher = make_model(family, "CAUSAL_LM", vocab_size=SIZE)(**teacher_batch).logits
        teacher = at_answers(teacher, is_answer)
    ids = batch["input_ids"][:, -is_answer.shape[1] :]
    tokens = [row[seen] for row, seen in zip(ids, is_answer)]
    found = case.loss(student, teacher, tokens)
    if case.trainer in (SDFTTrainer, SDPOTrainer):
        loss = torch.stack([row.mean() for row in found]).mean()
    else:
        loss = torch.cat(found).sum() / inputs["num_items_in_batch"]  # what Trainer counts: the labels of the data
    return loss, tokens, [logits.argmax(-1) for logits in student]


# TRL turns gradient checkpointing off and on by methods with old names.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("depth", ["INPUT", "DEEP"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_step_is_that_of_the_concatenation(case: Case, depth: str, tmp_path) -> None:
    trainer = make_trainer(case, tmp_path, make_config("CAUSAL_LM", V, prompt_depth=depth))
    before, steps = frozen(trainer.model), watch(trainer)
    trainer.train()
    assert len(steps) == len(losses(trainer)) == 2
    afterwards = [*(prompt for prompt, _ in steps[1:]), prompt_of(trainer.model)]
    for (prompt, inputs), after, logged in zip(steps, afterwards, losses(trainer), strict=True):
        for tensor in tensors(prompt):
            tensor.requires_grad_()
        loss, tokens, likely = by_hand(case, prompt, inputs)
        assert len(tokens) == 4
        assert logged == pytest.approx(loss.item(), abs=1e-5)
        assert abs(logged) > 1e-3
        if case.is_on_policy:
            assert [row.tolist() for row in tokens] == [row.tolist() for row in likely]
        for old, new, gradient in zip(tensors(prompt), tensors(after), torch.autograd.grad(loss, tensors(prompt))):
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close((old - new) / RATE, gradient, rtol=1e-3, atol=2e-6)
    for name, value in frozen(trainer.model).items():
        assert torch.equal(value, before[name]), name
