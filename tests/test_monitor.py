# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What a prompt is told about: `PromptMonitor` beside a training, and `nearest_tokens`."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from families import VOCABULARY, make_model
from making import make_adapted, make_arguments, make_config
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, default_data_collator
from transformers.integrations.neftune import activate_neftune

from peft_ptuning_ext import DataCollatorWithAdapterNames, PromptMonitor, fold_prompt, to_prompt_embeds


V = 4
VALUES = {"prompt_norm", "prompt_grad_norm", "prompt_shift", "prompt_effect"}


def make_data(task: str = "SEQ_CLS", size: int = 32) -> list[dict]:
    """Texts half of whose tokens tell their label; or each token has its own."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for label in torch.randint(2, (size,), generator=generator).tolist():
        ids = torch.randint(10, VOCABULARY, (8,), generator=generator)
        ids[::2] = 8 - label
        labels = {"SEQ_CLS": label, "TOKEN_CLS": (ids > 50).long(), "CAUSAL_LM": ids}[task]
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": labels})
    return rows


def make_short_run(folder, model: PeftModel | None = None, data=None, **arguments) -> Trainer:
    """A Trainer of a few steps that logs every other one; a prompt on a BERT classifier if there is no model."""
    model = model or make_adapted("BERT", "SEQ_CLS", length=V)
    defaults = {"learning_rate": 1e-2, "max_steps": 6, "logging_steps": 2, "label_names": ["labels"]}
    data = data or make_data(model.peft_config["default"].task_type)
    return Trainer(model, make_arguments(folder, **{**defaults, **arguments}), train_dataset=data)


def logged(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("family", "task"), [("BERT", "SEQ_CLS"), ("Llama", "CAUSAL_LM"), ("BERT", "TOKEN_CLS")])
def test_values_are_those_computed_by_hand(family, task, tmp_path) -> None:
    model = make_adapted(family, task, length=V)
    trainer = make_short_run(tmp_path, model, max_grad_norm=0, lr_scheduler_type="constant")
    start = model.prompt_embeddings().detach().clone()
    norms = []

    class GradientNorms(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            norms.append(next(p.grad for n, p in model.named_parameters() if "ptuning_encoders" in n).norm().item())

    trainer.add_callback(GradientNorms())
    trainer.add_callback(PromptMonitor(rows=3))
    trainer.train()
    entries = logged(trainer)
    assert all(entry.keys() >= VALUES for entry in entries)
    assert [entry["prompt_grad_norm"] for entry in entries] == pytest.approx(norms[1::2])

    prompt = model.prompt_embeddings().detach()
    assert entries[-1]["prompt_norm"] == pytest.approx(prompt.norm(dim=1).mean().item())
    assert entries[-1]["prompt_shift"] == pytest.approx(((prompt - start).norm() / start.norm()).item())

    model.eval()
    batch = {
        name: torch.stack([torch.as_tensor(row[name]) for row in trainer.train_dataset[:3]]) for name in ("input_ids",)
    }
    with torch.no_grad():
        prompted = model(**batch).logits
        head = {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n}
        base = model.unload()
        for name, parameter in head.items():
            path = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            base.get_parameter(path).copy_(parameter)
        plain = base.eval()(**batch).logits
    assert entries[-1]["prompt_effect"] == pytest.approx(((prompted - plain).norm() / plain.norm()).item(), rel=1e-5)
    assert entries[-1]["prompt_effect"] > 0


def test_padding_is_left_out_of_the_effect(tmp_path) -> None:
    effects = []
    for padded in (False, True):
        data = make_data("TOKEN_CLS")
        for row in data:
            if padded:
                row["input_ids"] = torch.cat([row["input_ids"], torch.zeros(5, dtype=torch.long)])
                row["attention_mask"] = torch.cat([row["attention_mask"], torch.zeros(5, dtype=torch.long)])
                row["labels"] = torch.cat([row["labels"], torch.full((5,), -100)])
        trainer = make_short_run(tmp_path, make_adapted("BERT", "TOKEN_CLS", length=V), data, learning_rate=0.0)
        trainer.add_callback(PromptMonitor())
        trainer.train()
        effects.append([entry["prompt_effect"] for entry in logged(trainer)])
    assert effects[0] == pytest.approx(effects[1], rel=1e-5)


def collate_with_a_draw(rows: list[dict]) -> dict:
    torch.rand(1)
    return default_data_collator(rows)


@pytest.mark.parametrize("encoder", ["NONE", "MLP"])
def test_watching_changes_nothing(encoder, tmp_path) -> None:
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    runs = []
    for watched in (False, True):
        model = make_adapted("BERT", "SEQ_CLS", dropout, length=V, encoder_reparameterization_type=encoder)
        trainer = make_short_run(tmp_path, model, logging_steps=1)
        trainer.data_collator = collate_with_a_draw
        if watched:
            PromptMonitor.watch(trainer)
        trainer.train()
        runs.append(([entry["loss"] for entry in logged(trainer)], trainer.model.prompt_embeddings()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert trainer.model.training


def test_reporters_get_the_values_of_a_monitor_that_watches(tmp_path) -> None:
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(set(logs))

    trainer = make_short_run(tmp_path)
    trainer.add_callback(Reporter())
    PromptMonitor.watch(trainer)
    trainer.train()
    assert all(names >= VALUES for names in seen if "loss" in names)
    assert not any(names & VALUES for names in seen if "loss" not in names)


def test_gradient_of_a_network_is_that_of_its_parameters(tmp_path) -> None:
    model = make_adapted("BERT", "SEQ_CLS", length=V, encoder_reparameterization_type="LSTM")
    trainer = make_short_run(tmp_path, model)
    PromptMonitor.watch(trainer)
    trainer.train()
    assert all(entry["prompt_grad_norm"] > 0 for entry in logged(trainer))


def test_data_that_can_not_be_indexed_has_no_effect_logged(tmp_path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_data())

    trainer = make_short_run(tmp_path, data=Stream())
    PromptMonitor.watch(trainer)
    trainer.train()
    assert all(entry.keys() & VALUES == VALUES - {"prompt_effect"} for entry in logged(trainer))


def test_a_batch_that_the_model_does_not_take_has_no_effect_logged(tmp_path) -> None:
    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(input_ids=inputs["left"] + inputs["right"], labels=inputs["labels"]).loss

    plain = make_short_run(tmp_path, remove_unused_columns=False)
    data = [{"left": row["input_ids"], "right": 0 * row["input_ids"], "labels": row["labels"]} for row in make_data()]
    trainer = OwnLoss(plain.model, plain.args, train_dataset=data)
    PromptMonitor.watch(trainer)
    trainer.train()
    assert all(entry.keys() & VALUES == VALUES - {"prompt_effect"} for entry in logged(trainer))


def test_gradients_that_are_kept_elsewhere_are_not_missed(tmp_path) -> None:
    gradients = {}

    class Take(TrainerCallback):
        """As DeepSpeed: the parameters have no gradients when the optimizer steps."""

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for parameter in model.parameters():
                gradients[parameter], parameter.grad = parameter.grad, None

    class GiveBack(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for parameter in model.parameters():
                parameter.grad = gradients[parameter]

    trainer = make_short_run(tmp_path, max_steps=24, learning_rate=3e-2)
    trainer.add_callback(GiveBack())
    PromptMonitor.watch(trainer, patience=4)
    trainer.callback_handler.callbacks.insert(0, Take())
    trainer.train()  # a warning would be an error
    entries = logged(trainer)
    assert all(entry.keys() & VALUES == VALUES - {"prompt_grad_norm"} for entry in entries)
    assert entries[-1]["prompt_shift"] > 0


def without_weights_on_the_prompt(trainer: Trainer) -> None:
    """Attention that no longer reads values: the prompt goes nowhere, and no gradient comes back."""
    for name, parameter in trainer.model.named_parameters():
        if "value" in name:
            parameter.data.zero_()


def with_not_a_number(trainer: Trainer) -> None:
    next(p for n, p in trainer.model.named_parameters() if "ptuning_encoders" in n).data.fill_(math.nan)


def advice_in(trainer: Trainer) -> list[str]:
    """What a training says of prompts that do not learn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in caught if "does not seem to learn" in str(warning.message)]


@pytest.mark.parametrize(
    ("change", "arguments", "symptom"),
    [
        (None, {"learning_rate": 1e-6}, r"it has moved by 0\.0\d% of its norm only.*`learning_rate` is 1e-06"),
        (without_weights_on_the_prompt, {}, "no gradient has reached it"),
        (with_not_a_number, {}, "it has values that are not finite"),
        (None, {"learning_rate": 30.0, "warmup_steps": 12}, r"the loss has not fallen \(.* at first, .* now\)"),
    ],
)
def test_a_prompt_that_does_not_learn_is_told_once(change, arguments, symptom, tmp_path) -> None:
    trainer = make_short_run(tmp_path, max_steps=24, lr_scheduler_type="constant_with_warmup", **arguments)
    if change:
        change(trainer)
    PromptMonitor.watch(trainer, patience=12)
    messages = advice_in(trainer)
    assert len(messages) == 1
    with pytest.raises(UserWarning, match=f"After 12 steps .*{symptom}.*SAMPLE_VOCAB"):
        warnings.warn(messages[0], stacklevel=1)


def test_a_frozen_prompt_is_told_before_the_first_step(tmp_path) -> None:
    make_short_run(tmp_path).model.save_pretrained(tmp_path / "adapter")
    trainer = make_short_run(tmp_path, max_steps=6)
    trainer.model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), tmp_path / "adapter")
    trainer.model.enable_input_require_grads()  # as trainers do that checkpoint: the backward pass then finds a path
    steps = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            steps.append(len(caught))

    trainer.add_callback(Steps())
    PromptMonitor.watch(trainer, patience=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught if "prompt" in str(warning.message)]
    assert len(messages) == 1
    assert "'default' is frozen" in messages[0]
    assert "is_trainable=True" in messages[0]
    assert "learning rate" not in messages[0]
    assert steps[0] >= 1
    assert {entry["prompt_shift"] for entry in logged(trainer)} == {0}


def test_a_prompt_that_was_replaced_behind_the_optimizer_is_told(tmp_path) -> None:
    trainer = make_short_run(tmp_path, make_adapted("BERT", "SEQ_CLS", encoder_reparameterization_type="MLP"))
    PromptMonitor.watch(trainer)
    trainer.train()
    fold_prompt(trainer.model)
    with pytest.warns(UserWarning, match="The optimizer does not hold the prompt of the adapter 'default'"):
        trainer.train()
    assert logged(trainer)[-1]["prompt_shift"] == 0


def test_outputs_like_the_bases_are_told(tmp_path, monkeypatch) -> None:
    trainer = make_short_run(tmp_path)
    # No tiny model learns from a prompt that it does not see, so the effect is given.
    monkeypatch.setattr("peft_ptuning_ext.monitor._effect", lambda *args: 1e-5)
    PromptMonitor.watch(trainer, patience=4)
    with pytest.warns(UserWarning, match=r"changes the model's outputs by 0\.00% only"):
        trainer.train()


def test_a_prompt_that_learns_is_left_in_peace(tmp_path) -> None:
    trainer = make_short_run(tmp_path, max_steps=40, learning_rate=3e-2)
    PromptMonitor.watch(trainer, patience=10)
    trainer.train()
    losses = [entry["loss"] for entry in logged(trainer)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"rows": -1}])
def test_values_out_of_range(arguments) -> None:
    with pytest.raises(ValueError, match="`patience` must be at least 1 and `rows` at least 0"):
        PromptMonitor(**arguments)


def test_there_has_to_be_a_prompt(tmp_path) -> None:
    trainer = make_short_run(tmp_path, get_peft_model(make_model("BERT", "SEQ_CLS"), LoraConfig(task_type="SEQ_CLS")))
    PromptMonitor.watch(trainer)
    with pytest.raises(ValueError, match="watches a P-tuning adapter, and PeftModel.* has no active one"):
        trainer.train()


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 3)}  # three embeddings more than words, as padded tables have
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


@pytest.mark.parametrize(("family", "task"), [("BERT", "SEQ_CLS"), ("Gemma 2", "CAUSAL_LM"), ("T5", "SEQ_2_SEQ_LM")])
def test_nearest_tokens_are_those_a_prompt_starts_at(family, task, tokenizer) -> None:
    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w7", "tokenizer_name_or_path": tokenizer}
    model = make_adapted(family, task, length=3, **start)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.shape == (3, 32):
            parameter.data *= torch.tensor([[1.0], [5.0], [-1.0]])  # the length is not what counts, the direction is
    same, longer, opposite = model.nearest_tokens(tokenizer, k=VOCABULARY - 3)
    for row in (same, longer):
        assert row[0] == ("w7", pytest.approx(1.0))
        assert [cosine for _, cosine in row] == sorted((cosine for _, cosine in row), reverse=True)
    assert opposite[-1] == ("w7", pytest.approx(-1.0))
    assert {token for token, _ in same} == set(tokenizer.get_vocab())
    assert model.nearest_tokens(tokenizer) == [same[:5], longer[:5], opposite[:5]]


@pytest.mark.parametrize("around", [True, False])
def test_noise_on_the_embedding_stays_out_of_nearest_tokens_and_starts(around, tokenizer) -> None:
    """NEFTune's hook expects (B, S, H); it stands around the tuner layer, or on an embedding that is wrapped later."""
    config = make_config(length=V, prompt_tuning_init="SAMPLE_VOCAB")
    base = make_model("Gemma 3", "CAUSAL_LM")  # its embedding multiplies, which is no noise
    table = base.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    if not around:
        activate_neftune(base, 50.0)
    model = get_peft_model(base, config).train()
    if around:
        activate_neftune(model, 50.0)
    model.add_adapter("second", config)
    for name in ("default", "second"):
        distances = torch.cdist(model.prompt_embeddings(name), table, compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.amin(dim=1).max() < 1e-5
        directions = torch.nn.functional.normalize(table[: len(tokenizer)], dim=1)
        cosines = torch.nn.functional.normalize(model.prompt_embeddings(name), dim=1) @ directions.T
        nearest = [row[0][1] for row in model.nearest_tokens(tokenizer, 1, name)]
        assert nearest == pytest.approx(cosines.amax(dim=1).tolist())
    ids = torch.arange(5)
    assert torch.equal(to_prompt_embeds(model, ids)[V:], table[:5])
    assert not torch.allclose(model.get_input_embeddings()(ids[None])[0], table[:5])  # and training has its noise
    assert all(module.training for module in model.modules())


def test_nearest_tokens_of_another_adapter(tokenizer) -> None:
    model = make_adapted("BERT", "SEQ_CLS", length=2)
    model.add_adapter("other", make_config("SEQ_CLS", 3))
    named = model.nearest_tokens(tokenizer, 2, adapter_name="other")
    assert len(named) == 3
    model.set_adapter("other")
    assert model.nearest_tokens(tokenizer, 2) == named
    with pytest.raises(ValueError, match="no adapter 'third'"):
        model.nearest_tokens(tokenizer, adapter_name="third")
    for k in (0, VOCABULARY - 2):
        with pytest.raises(ValueError, match=f"`k` must be from 1 to {VOCABULARY - 3}, .* got {k}"):
            model.nearest_tokens(tokenizer, k)


def test_a_deep_prompt_is_watched_layer_by_layer(tmp_path) -> None:
    model = make_adapted("BERT", "SEQ_CLS", length=V, prompt_depth="DEEP")
    trainer = make_short_run(tmp_path, model, lr_scheduler_type="constant")
    PromptMonitor.watch(trainer)
    trainer.train()
    entry = logged(trainer)[-1]
    assert entry["prompt_shift"] > 0
    assert entry["prompt_effect"] > 0
    for layer, pair in model.prompt_key_values().items():
        for kind, state in zip(("keys", "values"), pair, strict=True):
            norm = state.norm(dim=-1).mean().item()
            assert entry[f"prompt_norm_{kind}_{layer}"] == pytest.approx(norm)


def make_run_by_row(folder, names: list[str], task: str = "SEQ_CLS", **arguments) -> Trainer:
    """A Trainer of two prompts on one model, in which row i has the prompt names[i % len(names)]."""
    model = make_adapted("BERT", task, length=V)
    torch.manual_seed(1)
    model.add_adapter("second", make_config(task, length=V + 1))
    model.set_requires_grad(["default", "second"])
    rows = [{**row, "adapter_names": names[i % len(names)]} for i, row in enumerate(make_data(task))]
    trainer = make_short_run(folder, model, rows, remove_unused_columns=False, **arguments)
    trainer.data_collator = DataCollatorWithAdapterNames(default_data_collator)
    return trainer


def test_each_of_several_prompts_has_values_of_its_own(tmp_path) -> None:
    trainer = make_run_by_row(tmp_path, ["default", "second"], max_grad_norm=0)
    model, norms = trainer.model, {"default": [], "second": []}
    start = {name: model.prompt_embeddings(name).detach().clone() for name in norms}

    class GradientNorms(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            for name, parameter in model.named_parameters():
                if "ptuning_encoders" in name:
                    norms["second" if "second" in name else "default"].append(parameter.grad.norm().item())

    trainer.add_callback(GradientNorms())
    trainer.add_callback(PromptMonitor())
    trainer.train()
    entry = logged(trainer)[-1]
    assert "prompt_norm" not in entry
    for name in norms:
        prompt = model.prompt_embeddings(name).detach()
        assert entry[f"prompt_norm_{name}"] == pytest.approx(prompt.norm(dim=1).mean().item())
        shift = (prompt - start[name]).norm() / start[name].norm()
        assert entry[f"prompt_shift_{name}"] == pytest.approx(shift.item())
        assert entry[f"prompt_grad_norm_{name}"] == pytest.approx(norms[name][-1])
    assert entry["prompt_effect"] > 0


@pytest.mark.parametrize("names", [["second"], ["default", "second"]], ids=["without rows", "without labels"])
def test_of_several_prompts_the_one_that_does_not_learn_is_told(names, tmp_path) -> None:
    trainer = make_run_by_row(tmp_path, names, "TOKEN_CLS", max_steps=12)
    for row in trainer.train_dataset:
        if row["adapter_names"] == "default":
            row["labels"] = torch.full_like(row["labels"], -100)
    PromptMonitor.watch(trainer, patience=4)
    messages = advice_in(trainer)
    assert len(messages) == 1
    assert "the prompt of 'default' does not seem to learn: no gradient has reached it" in messages[0]


def test_a_prompt_that_the_logged_batch_lacks_is_left_in_peace(tmp_path) -> None:
    """The steps take turns, and the second prompt never has rows in one that is logged."""
    options = {"max_steps": 12, "learning_rate": 3e-2, "per_device_train_batch_size": 2, "logging_steps": 2}
    trainer = make_run_by_row(tmp_path, ["second", "second", "default", "default"], **options)
    trainer.args.train_sampling_strategy = "sequential"
    PromptMonitor.watch(trainer, patience=4)
    assert not any("no gradient has reached it" in message for message in advice_in(trainer))
    assert "prompt_grad_norm_second" not in logged(trainer)[-1]
    assert logged(trainer)[-1]["prompt_shift_second"] > 0.01


def test_rows_without_a_prompt_are_not_held_against_those_that_learn(tmp_path) -> None:
    trainer = make_run_by_row(
        tmp_path, ["__base__", "__base__", "default", "second"], max_steps=12, learning_rate=3e-2
    )
    PromptMonitor.watch(trainer, patience=4)
    trainer.train()  # warnings are errors
    entries = logged(trainer)
    assert all(entry["prompt_effect"] == 0 for entry in entries)  # of the first two rows
    assert entries[-1]["prompt_shift_default"] > 0.01


def test_a_loss_of_several_prompts_is_told_once(tmp_path) -> None:
    options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 12, "learning_rate": 30.0}
    trainer = make_run_by_row(tmp_path, ["default", "second"], max_steps=24, **options)
    PromptMonitor.watch(trainer, patience=12)
    (message,) = advice_in(trainer)
    assert "this training does not seem to learn: the loss has not fallen" in message


def test_advice_is_in_units_of_where_the_prompt_started(tmp_path) -> None:
    trainer = make_short_run(tmp_path, learning_rate=1e-6)
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "ptuning_encoders" in n).mul_(100)
    rms = trainer.model.prompt_embeddings().square().mean().sqrt().item()
    PromptMonitor.watch(trainer, patience=2)
    with pytest.warns(UserWarning, match=re.escape(f"here {0.2 * rms:.1g} to {2 * rms:.1g} ")):
        trainer.train()
