# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`--method`: this package, stock PEFT's methods or the head alone make the same frozen model trainable."""

import warnings

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_ptuning_ext import PromptMonitor, PTuningConfig
from shared.arguments import MethodArguments


# PEFT 0.21 itself reads the old name while it wraps a model.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


# Learning rates where `--learning_rate` is not given. Adam moves a number by about the rate in each step, whatever its
# gradient. So the rates of this package's prompts without a network are in units of the RMS of the numbers that the
# prompt starts at: one rate suits models whose embeddings differ in scale. The other rates lie among those that did
# best on the tasks of docs/measurements.md.
RATES = {"ptuning": 3e-2, "peft_ptuning": 1e-2, "peft_prefix": 5e-2, "lora": 3e-3, "head": 3e-2}
RELATIVE_RATES = {"INPUT": 0.5, "DEEP": 0.05}


def make_trainable(
    model: PreTrainedModel, args: MethodArguments, task_type: str, tokenizer: PreTrainedTokenizerBase
) -> PeftModel | PreTrainedModel:
    """Freezes the model except for what the method trains, and prints how many parameters that is.

    The result is a `PeftModel`, or the model itself for the method "head".

    Raises:
        ValueError: The method does not suit the model, or an argument does not suit the method.
    """
    if not args.frozen_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # in frozen layers, dropout only adds noise between prompt and loss
    if task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        # Trainer passes the number of labels of a step to the model. Heads of transformers 5.23 accept and ignore that
        # number, and the loss would grow with `gradient_accumulation_steps`. With False, Trainer divides the loss.
        model.accepts_loss_kwargs = False
    if args.method == "head":
        adapted = _head_only(model)
    else:
        adapted = get_peft_model(model, _make_config(args, task_type, tokenizer))
    trainable, deployed = count_parameters(adapted)
    total = sum(_size(parameter) for parameter in adapted.parameters())
    print(
        f"{args.method}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.3%}), "
        f"{deployed:,} of them deployed"
    )
    return adapted


def choose_learning_rate(args: TrainingArguments, method: MethodArguments, model: torch.nn.Module) -> None:
    """Sets the learning rate where none was given: that of the method, or in units of where the prompt starts."""
    if args.learning_rate is not None:
        return
    is_plain = method.method == "ptuning" and method.encoder in (None, "NONE")
    args.learning_rate = prompt_rate(model) if is_plain else RATES[method.method]
    print(f"learning rate {args.learning_rate:.2g}")


def prompt_rate(model: PeftModel) -> float:
    """The learning rate for the active prompt, from the root mean square of the numbers that it starts at."""
    config = model.active_peft_config
    if config.is_deep:
        numbers = [state for pair in model.prompt_key_values().values() for state in pair]
    else:
        numbers = [model.prompt_embeddings()]
    rms = torch.cat([part.detach().float().flatten() for part in numbers]).square().mean().sqrt()
    return RELATIVE_RATES[config.prompt_depth] * float(rms)


def _make_config(args: MethodArguments, task_type: str, tokenizer: PreTrainedTokenizerBase) -> PeftConfig:
    prompt = {"num_virtual_tokens": args.num_virtual_tokens, "task_type": task_type}
    if args.method == "ptuning":
        return PTuningConfig(
            **prompt,
            prompt_depth=args.depth,
            shift_positions=args.shift_positions,
            encoder_reparameterization_type=args.encoder,
            encoder_dropout=args.encoder_dropout,
            prompt_tuning_init=args.prompt_tuning_init,
            prompt_tuning_init_text=args.prompt_tuning_init_text,
            prompt_tuning_init_adapter=args.prompt_tuning_init_adapter,
            tokenizer_name_or_path=tokenizer if args.prompt_tuning_init == "TEXT" else None,
        )
    starts = ("prompt_tuning_init", "prompt_tuning_init_text", "prompt_tuning_init_adapter")
    options = ("depth", "shift_positions", "encoder", "encoder_dropout", *starts)
    given = [name for name in options if getattr(args, name) != getattr(MethodArguments, name)]
    if args.method == "peft_ptuning":
        encoder = args.encoder or "MLP"
        if encoder not in ("MLP", "LSTM") or set(given) - {"encoder"}:
            raise ValueError(
                "Stock P-tuning stands at the input, has the encoders MLP and LSTM without dropout, and starts at "
                "random only."
            )
        return PromptEncoderConfig(**prompt, encoder_reparameterization_type=encoder)
    if args.method == "peft_prefix":
        if given:
            raise ValueError(
                f"`--{given[0]}` has no meaning with `--method peft_prefix`: stock prefix tuning lacks it."
            )
        return PrefixTuningConfig(**prompt)
    if given:
        raise ValueError(f"`--{given[0]}` is about a prompt, and `--method lora` has none.")
    return LoraConfig(task_type=task_type, r=args.lora_r)


def _head_only(model: PreTrainedModel) -> PreTrainedModel:
    model.base_model.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`--method head`: {type(model).__name__} has no head apart from its frozen embeddings.")
    return model


def count_parameters(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """Returns the number of trained parameters, and the number of those that are deployed.

    Where a network produces the prompt, only its result is deployed, not the network.
    """
    sizes = {name: _size(parameter) for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    encoder = {name for name in sizes if "ptuning_encoders." in name or "prompt_encoder." in name}
    # A deep prompt is as large as its keys and values, which are frozen where a network adds to them. Any other prompt
    # is as large as the embedding that goes into its network, here and in PEFT.
    prompt = {name for name in encoder if ".keys." in name or ".values." in name}
    prompt = prompt or {name for name in encoder if name.removesuffix(".weight").endswith(".embedding")}
    deployed = trained - encoder | prompt
    return sum(sizes[name] for name in trained), sum(sizes[name] for name in deployed)


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed ZeRO-3 leaves empty tensors in the model


def make_callbacks(args: MethodArguments) -> list[TrainerCallback]:
    """Returns the callback that stops early, if `--early_stopping_patience` is given."""
    patience = args.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def watch_prompt(trainer: Trainer, args: MethodArguments) -> None:
    """Makes Trainer log norm, gradient and effect of a prompt, and warn if the prompt does not learn."""
    if args.method == "ptuning":
        PromptMonitor.watch(trainer)
