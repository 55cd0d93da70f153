# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`PromptMonitor`: a Trainer callback that logs what a prompt does, and warns when it does not learn."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Optional

import torch
from accelerate.utils import DistributedType
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .prompts.layer import PTuningLayer


if TYPE_CHECKING:  # they take longer to import than all of this package
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

# Learning rates at which prompts without a network learn, by whether they are deep, in units of the RMS of the numbers
# that they start at: Adam moves a number by about the rate in a step, whatever the gradient.
RATES = {False: (0.2, 2), True: (0.02, 0.2)}
MIN_SHIFT = 0.01
MIN_EFFECT = 0.001


class PromptMonitor(TrainerCallback):
    """Logs the prompt beside the loss, and warns once when it does not learn.

    A prompt that is frozen, or that the optimizer does not hold, is told at the start. The prompts that are watched
    are those that are trained; if none is, the active one. Of several, the values have the adapter's name behind them,
    as in `prompt_norm_style`.

    Each log entry that has a loss gains

    - `prompt_norm`: mean L2 norm of the V vectors. A deep prompt has `prompt_norm_keys_0`, `prompt_norm_values_0` and
      so on instead: those of the keys and of the values of each layer;
    - `prompt_grad_norm`: L2 norm of the gradient of the prompt encoder's parameters, after clipping. Left out where
      they have none to show, as under DeepSpeed, which keeps gradients to itself;
    - `prompt_shift`: how far the prompt is from where training began, relative to its norm there;
    - `prompt_effect`: how much the model's outputs differ from those without the prompt (the head stays), relative to
      their norm, on the first rows of the training data. Left out where the data set can't be indexed or the model not
      be called with what the collator makes.

    `Trainer(callbacks=[PromptMonitor()])` brings them into `state.log_history` and onto the screen. TensorBoard and
    other reporters run before the callbacks of the user: `PromptMonitor.watch(trainer)` puts a monitor before them.

    Args:
        patience (`int`, defaults to 100): Optimizer steps after which a prompt should have learned something.
        rows (`int`, defaults to 2): Rows of the training data for `prompt_effect`; 0 leaves it out.

    Raises:
        ValueError: `patience` or `rows` is out of range, or the model that is trained has no P-tuning adapter.
    """

    def __init__(self, patience: int = 100, rows: int = 2):
        if patience < 1 or rows < 0:
            raise ValueError(f"`patience` must be at least 1 and `rows` at least 0, got {patience} and {rows}.")
        self.patience = patience
        self.rows = rows

    @classmethod
    def watch(cls, trainer: Trainer, **kwargs) -> PromptMonitor:
        """Puts a monitor before the trainer's other callbacks, so that every reporter gets its values; returns it."""
        monitor = cls(**kwargs)
        trainer.callback_handler.callbacks.insert(0, monitor)
        return monitor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        layer = _find_layer(model)
        trained = [name for name in layer.ptuning_encoders if _trained_parameters(layer, name)]
        self._names = trained or layer.active_adapters[:1]
        self._start = {name: _flat(_prompt(layer, name)) for name in self._names}  # all numbers in one row
        self._first_step = state.global_step
        self._grad_norms: dict[str, torch.Tensor] = {}  # of the last step, read when it is logged
        self._highest_grad_norms: dict[str, torch.Tensor] = {}  # of all steps, since a batch may lack a prompt
        self._losses: list[float] = []
        advice = None if trained else _advise_to_unfreeze(self._names[0])
        if args.distributed_state.distributed_type == DistributedType.NO:  # DeepSpeed trains copies
            for name in trained:
                if not _is_held(_trained_parameters(layer, name), kwargs["optimizer"]):
                    advice = _advise_new_trainer(name)
        if advice is not None and state.is_world_process_zero:
            warnings.warn(advice, stacklevel=2)
        self._has_warned = advice is not None
        self._batch = self._first_rows(kwargs.get("train_dataloader"), args.device)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        layer, self._grad_norms = _find_layer(model), {}
        for name in self._names:
            trained = _trained_parameters(layer, name)
            norms = [_whole(p.grad).norm() for p in trained if p.grad is not None]
            if norms or not trained:
                norm = torch.stack(norms).norm() if norms else torch.zeros(())
                self._grad_norms[name] = norm
                self._highest_grad_norms[name] = torch.maximum(self._highest_grad_norms.get(name, norm), norm)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, Any],
        **kwargs,
    ) -> None:
        if "loss" not in logs:
            return
        layer = _find_layer(model)
        of_prompts = {name: self._look(layer, name) for name in self._names}
        effect = {}
        if self._batch is not None:
            try:
                effect = {"prompt_effect": _effect(model, layer, self._batch)}
            except (TypeError, ValueError):  # a batch for a loss of the trainer's own; no reason to stop a training
                self._batch = None
        is_single = len(self._names) == 1
        values = effect | {
            key if is_single else f"{key}_{name}": value
            for name, found in of_prompts.items()
            for key, value in found.items()
        }
        logs.update(values)
        state.log_history[-1].update(values)

        self._losses.append(float(logs["loss"]))
        steps = state.global_step - self._first_step
        if steps >= self.patience and not self._has_warned:
            for whose, name, symptom in self._find_symptoms(of_prompts, effect):
                if state.is_world_process_zero:
                    rms = float(self._start[name].square().mean().sqrt())
                    rates = [share * rms for share in RATES[layer.is_deep(name)]]
                    warnings.warn(_advise(whose, symptom, steps, args.learning_rate, *rates), stacklevel=2)
                self._has_warned = True

    def _look(self, layer: PTuningLayer, name: str) -> dict[str, float]:
        """The values of one prompt."""
        parts, start = _prompt(layer, name), self._start[name]
        values = {key: float(part.norm(dim=-1).mean()) for key, part in parts.items()}
        values["prompt_shift"] = float((_flat(parts) - start).norm() / start.norm())
        if name in self._grad_norms:
            values["prompt_grad_norm"] = float(self._grad_norms[name])
        return values

    def _find_symptoms(
        self, of_prompts: dict[str, dict[str, float]], effect: dict[str, float]
    ) -> list[tuple[str, str, str]]:
        """What speaks against learning: whose it is, the adapter, and the symptom.

        Loss and effect are those of all prompts of a batch, and not held against each of several.
        """
        is_single = len(of_prompts) == 1
        found = []
        for name, values in of_prompts.items():
            symptom = self._find_symptom(name, values | effect if is_single else values)
            if symptom is not None:
                found.append(("the prompt" if is_single else f"the prompt of {name!r}", name, symptom))
        third = len(self._losses) // 3
        first, last = sum(self._losses[:third]), sum(self._losses[len(self._losses) - third :])
        if not found and third and last >= first:
            symptom = f"the loss has not fallen ({first / third:.4g} at first, {last / third:.4g} now)"
            found.append(("the prompt" if is_single else "this training", self._names[0], symptom))
        return found

    def _find_symptom(self, name: str, values: dict[str, float]) -> Optional[str]:
        """What speaks against a prompt learning, or `None`."""
        if not all(torch.isfinite(torch.tensor(list(values.values())))):
            return "it has values that are not finite"
        # Where gradients are kept elsewhere, no prompt has a norm of them.
        if self._highest_grad_norms and not self._highest_grad_norms.get(name):
            return "no gradient has reached it"
        if values["prompt_shift"] < MIN_SHIFT:
            return f"it has moved by {values['prompt_shift']:.2%} of its norm only"
        if values.get("prompt_effect", 1.0) < MIN_EFFECT:
            return f"it changes the model's outputs by {values['prompt_effect']:.2%} only"
        return None

    def _first_rows(self, dataloader, device: torch.device) -> Optional[dict[str, torch.Tensor]]:
        """The first rows of the training data as a batch of the collator's, or `None`."""
        dataset = getattr(dataloader, "dataset", None)
        if self.rows == 0 or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            return None
        with torch.random.fork_rng(devices=[]):  # collators that draw leave the run's random numbers alone
            batch = dataloader.collate_fn([dataset[i] for i in range(min(self.rows, len(dataset)))])
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def _advise(whose: str, symptom: str, steps: int, learning_rate: float, low: float, high: float) -> str:
    return (
        f"After {steps} steps {whose} does not seem to learn: {symptom}. Prompts need a higher learning rate than "
        f"weights. Without a network it is relative to the numbers they started at, here {low:.1g} to {high:.1g} "
        f"(`learning_rate` is {learning_rate:g}), with warm-up. Then try "
        'another start (`prompt_tuning_init="SAMPLE_VOCAB"` or `"TEXT"`). '
        "Without any gradient, look at the labels first: all of them may be ignored."
    )


def _advise_to_unfreeze(adapter_name: str) -> str:
    return (
        f"The prompt of the adapter {adapter_name!r} is frozen: this training does not change it. Adapters are loaded "
        "for inference unless `is_trainable=True` is given. To train it, load it with "
        "`PeftModel.from_pretrained(model, folder, is_trainable=True)` and make the trainer with that model."
    )


def _is_held(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer holds one of the parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in held for parameter in parameters)


def _advise_new_trainer(adapter_name: str) -> str:
    return (
        f"The optimizer does not hold the prompt of the adapter {adapter_name!r}: this training does not change it. "
        "The adapter was added, unfolded or folded after the optimizer was made. Make a new trainer."
    )


def _find_layer(model: nn.Module) -> PTuningLayer:
    for module in model.modules():
        if isinstance(module, PTuningLayer) and module.active_adapters:
            return module
    raise ValueError(f"PromptMonitor watches a P-tuning adapter, and {type(model).__name__} has no active one.")


def _trained_parameters(layer: PTuningLayer, name: str) -> list[nn.Parameter]:
    return [parameter for parameter in layer.ptuning_encoders[name].parameters() if parameter.requires_grad]


@torch.no_grad()
def _prompt(layer: PTuningLayer, name: str) -> dict[str, torch.Tensor]:
    """Copies of the parts of an adapter's prompt by the names of their norms, each (…, V, H or D), float32."""
    with gather_params_ctx(layer.ptuning_encoders[name].parameters()):
        encoded = layer.encode(name)
        if not layer.is_deep(name):
            return {"prompt_norm": _whole(encoded).float().clone()}
        return {
            f"prompt_norm_{kind}_{index}": _whole(state[0]).float().clone()
            for index, pair in encoded.items()
            for kind, state in zip(("keys", "values"), pair, strict=True)
        }


def _flat(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """All numbers of a prompt in one row."""
    return torch.cat([part.flatten() for part in parts.values()])


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _effect(model: nn.Module, layer: PTuningLayer, batch: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of the outputs with the prompt from those without it."""
    was_training = model.training
    model.eval()
    try:
        prompted = _outputs(model, batch)
        with layer.without_prompt():
            plain = _outputs(model, batch)
    finally:
        model.train(was_training)
    return float((prompted - plain).norm() / plain.norm())


def _outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output of a call that is no loss, as float32; of one vector per token, those of the text only."""
    outputs = model(**batch).values()
    output = next(value for value in outputs if torch.is_tensor(value) and value.dim() > 1)
    mask = batch.get("attention_mask")
    if mask is not None and output.shape[:2] == mask.shape:
        output = output[mask.bool()]
    return output.float()
