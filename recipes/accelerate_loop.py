# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains what text_classification.py trains, without Trainer: the training loop is written out, with Accelerate.

    python recipes/accelerate_loop.py
    python recipes/classify.py outputs/accelerate_loop "Could you open the window?"

A run that was interrupted, and more than one process:

    python recipes/accelerate_loop.py --resume_from_checkpoint last
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/accelerate_loop.py --learning_rate 1e-2
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import evaluate
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, extract_model_from_parallel, set_seed
from huggingface_hub import create_repo
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from shared.arguments import DataArguments, MethodArguments, ModelArguments, parse_arguments
from shared.methods import choose_learning_rate
from shared.models import find_model, find_packaged_encoder
from shared.report import Outcome, Repository, make_command, write_run
from shared.resuming import find_checkpoint
from shared.sources import METRICS, load_data
from text_classification import (
    SPEECH_ACTS,
    ColumnArguments,
    list_predictions,
    load_model,
    number_labels,
    tokenize,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, get_scheduler


@dataclass
class LoopArguments:
    """Arguments of the loop, with the names and meanings of `TrainingArguments`."""

    output_dir: str = field(
        default="outputs/accelerate_loop", metadata={"help": "Folder for everything that is written."}
    )
    num_train_epochs: int = field(default=12, metadata={"help": "How often the training rows are used."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Texts of a batch in each process."})
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Texts of a batch of an evaluation in each process."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches before a step of the optimizer."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate at the end of the warm-up. Default: that of the method."}
    )
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps in which the rate rises."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients with a larger norm are scaled down to this norm."}
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Number format of the computations. Default: that of `accelerate launch`."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is a GPU."})
    seed: int = field(
        default=42, metadata={"help": "Runs with the same seed are bitwise equal in one process on a CPU."}
    )
    load_best_model_at_end: bool = field(default=False, metadata={"help": "Keep the epoch with the best accuracy."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": 'A folder checkpoint-N of this loop, or "last".'}
    )
    report_to: Literal["tensorboard"] | None = field(
        default=None, metadata={"help": "Where else losses and metrics are logged."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the output folder at the end."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Name of the repository. Default: that of the folder."}
    )
    hub_token: str | None = field(default=None, metadata={"help": "Token for the upload. Default: that of the login."})


def save_trained_only(models: list, weights: list, folder: str) -> None:
    """A hook for `Accelerator.save_state`: saves the adapter in place of the whole model.

    `weights` is empty where Accelerate saves the parts of a sharded model itself, which is left to it.
    """
    model = extract_model_from_parallel(models[0])
    if weights and isinstance(model, PeftModel):
        weights.clear()
        model.save_pretrained(folder, is_main_process=PartialState().is_main_process)


def load_trained_only(models: list, folder: str) -> None:
    """A hook for `Accelerator.load_state`: loads the adapter that `save_trained_only` has saved."""
    if (Path(folder) / "adapter_model.safetensors").is_file():
        set_peft_model_state_dict(extract_model_from_parallel(models.pop()), load_peft_weights(folder))


def save_checkpoint(accelerator: Accelerator, folder: Path, history: list[dict]) -> None:
    """Saves a checkpoint as "unfinished" and then renames it, so that every folder "checkpoint-N" is whole."""
    unfinished = folder.with_name("unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / "history.json").write_text(json.dumps(history), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def find_best(history: list[dict]) -> int:
    """Returns the epoch with the best accuracy, the first of several."""
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    return accuracies.index(max(accuracies)) + 1


@torch.no_grad()
def predict(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (rows, labels) and labels (rows,) of all processes, with each row once."""
    model.eval()
    rows = [accelerator.gather_for_metrics((model(**batch).logits.float(), batch["labels"])) for batch in loader]
    model.train()
    return torch.cat([logits for logits, _ in rows]).cpu(), torch.cat([labels for _, labels in rows]).cpu()


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, ColumnArguments, MethodArguments, LoopArguments]
    model_args, data_args, columns, method, args = parse_arguments(dataclasses, {"depth": "DEEP"}, argv)
    folder = Path(args.output_dir)
    checkpoint = find_checkpoint(args, are_whole=True)  # see save_checkpoint
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=folder,
        # The rows then come in the same order in any number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        cpu=args.use_cpu,
    )
    set_seed(args.seed)

    name = find_model(model_args.model_name_or_path or find_packaged_encoder())
    data, labels = number_labels(load_data(data_args, SPEECH_ACTS), columns.text_column, columns.label_column)
    model, tokenizer = load_model(name, labels, columns.max_length, method)
    choose_learning_rate(args, method, model)
    tokens = tokenize(data, tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    loaders = {
        split: DataLoader(rows, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
        for split, rows in tokens.items()
    }
    train_loader = DataLoader(tokens["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collate)

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], args.learning_rate, weight_decay=0
    )
    # A prepared scheduler takes as many steps at once as there are processes. Its steps are therefore counted from the
    # loader before `prepare`, which has the batches of all processes.
    steps = math.ceil(len(train_loader) / args.gradient_accumulation_steps) * args.num_train_epochs
    scheduler = get_scheduler("linear", optimizer, int(args.warmup_ratio * steps), steps)
    model, optimizer, scheduler, train_loader = accelerator.prepare(model, optimizer, scheduler, train_loader)
    loaders = {split: accelerator.prepare(loader) for split, loader in loaders.items()}
    accelerator.register_save_state_pre_hook(save_trained_only)
    accelerator.register_load_state_pre_hook(load_trained_only)
    accelerator.init_trackers("runs")

    metric = evaluate.load(str(METRICS / "accuracy_f1"), keep_in_memory=True)

    def measure(split: str) -> tuple[dict, torch.Tensor]:
        logits, truth = predict(accelerator, model, loaders[split])
        scores = metric.compute(predictions=logits.argmax(-1), references=truth)
        loss = torch.nn.functional.cross_entropy(logits, truth).item()
        return {f"eval_{key}": value for key, value in {**scores, "loss": loss}.items()}, logits

    measured = "test" if "test" in loaders else "validation"
    before, _ = measure(measured)
    history, first_epoch = [], 0
    if checkpoint:
        accelerator.load_state(checkpoint)
        history = json.loads((Path(checkpoint) / "history.json").read_text(encoding="utf-8"))
        first_epoch = int(history[-1]["epoch"])
    progress = tqdm(
        total=args.num_train_epochs * len(train_loader),
        initial=first_epoch * len(train_loader),
        disable=not accelerator.is_local_main_process,
    )
    patience = math.inf if method.early_stopping_patience is None else method.early_stopping_patience
    for epoch in range(first_epoch + 1, args.num_train_epochs + 1):
        if history and epoch - 1 - find_best(history) >= patience:  # also where a run that had stopped is resumed
            break
        train_loader.set_epoch(epoch)  # the order of the rows depends on seed and epoch only, also after resuming
        losses = []
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            progress.update()
        train_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        scores, _ = measure("validation")
        history += [{"epoch": epoch, "loss": train_loss}, {"epoch": epoch, **scores}]
        accelerator.log(history[-2] | history[-1], step=epoch)
        progress.write(f"epoch {epoch}: training loss {train_loss:.4f}, accuracy {scores['eval_accuracy']:.1%}")

        best = find_best(history)
        save_checkpoint(accelerator, folder / f"checkpoint-{epoch}", history)
        if accelerator.is_main_process:
            for path in set(folder.glob("checkpoint-*")) - {folder / f"checkpoint-{kept}" for kept in (epoch, best)}:
                shutil.rmtree(path)
    progress.close()
    if args.load_best_model_at_end and history:
        accelerator.wait_for_everyone()
        accelerator.load_state(folder / f"checkpoint-{find_best(history)}")
    after, logits = measure(measured)
    accelerator.end_training()

    state = accelerator.get_state_dict(model)  # every process calls this: each may have a part of the weights
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        repository = None
        if args.push_to_hub:
            created = create_repo(args.hub_model_id or folder.name, token=args.hub_token, exist_ok=True)
            repository = Repository(created.repo_id, args.hub_token)
        predictions, confusion = list_predictions(data[measured], logits.numpy(), labels)
        outcome = Outcome(
            task="text-classification",
            metric="accuracy",
            before=before,
            after=after,
            predictions=predictions,
            command=make_command(__file__, argv),
            data=data_args,
            method=method,
            confusion=confusion,
        )
        write_run(folder, model, history, outcome, repository)


if __name__ == "__main__":
    main()
