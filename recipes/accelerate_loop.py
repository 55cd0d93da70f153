# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""text_classification.py without Trainer: the same model and data in a loop of one's own, on Accelerate.

python recipes/accelerate_loop.py
python recipes/classify.py outputs/accelerate_loop "Could you open the window?"
accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/accelerate_loop.py --learning_rate 1e-2
python recipes/accelerate_loop.py --resume_from_checkpoint last
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
from shared.report import describe, make_command, plot_confusion, push, write_card, write_predictions, write_results
from shared.resuming import find_checkpoint
from shared.sources import METRICS, find_model, find_packaged_encoder, load_data
from text_classification import SPEECH_ACTS, ColumnArguments, load_model, number_labels
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, get_scheduler


@dataclass
class LoopArguments:
    """The loop; names and meanings are those of `TrainingArguments`."""

    output_dir: str = field(default="outputs/accelerate_loop", metadata={"help": "Where everything is written."})
    num_train_epochs: int = field(default=12, metadata={"help": "Times that the training data is gone through."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Texts of a step in each process."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts of an evaluation in each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of an optimizer step."})
    learning_rate: float = field(default=3e-2, metadata={"help": "The highest, after the warm-up."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps in which it rises."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longer gradients are cut to this."})
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None, metadata={"help": "Default: what `accelerate launch` says."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    seed: int = field(default=42, metadata={"help": "Decides the run, bitwise on one CPU process."})
    load_best_model_at_end: bool = field(default=False, metadata={"help": "Keep the epoch of the best accuracy."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": 'A folder checkpoint-N of this loop, or "last".'}
    )
    report_to: Literal["tensorboard"] | None = field(default=None, metadata={"help": "Where else to log."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the output folder at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository. Default: name of the folder."})
    hub_token: str | None = field(default=None, metadata={"help": "Token to push with. Default: that of the login."})


def save_trained_only(models: list, weights: list, folder: str) -> None:
    """For `Accelerator.save_state`: an adapter in place of the whole model, unless that is sharded and saved."""
    model = extract_model_from_parallel(models[0])
    if weights and isinstance(model, PeftModel):
        weights.clear()
        model.save_pretrained(folder, is_main_process=PartialState().is_main_process)


def load_trained_only(models: list, folder: str) -> None:
    """For `Accelerator.load_state`: see `save_trained_only`."""
    if (Path(folder) / "adapter_model.safetensors").is_file():
        set_peft_model_state_dict(extract_model_from_parallel(models.pop()), load_peft_weights(folder))


def save_checkpoint(accelerator: Accelerator, folder: Path, history: list[dict]) -> None:
    """Writes the state beside its place and moves it there, so that what is called a checkpoint is a whole one."""
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


@torch.no_grad()
def predict(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (N, labels) and the labels (N,) of all processes, each row once."""
    model.eval()
    rows = [accelerator.gather_for_metrics((model(**batch).logits.float(), batch["labels"])) for batch in loader]
    model.train()
    return torch.cat([logits for logits, _ in rows]).cpu(), torch.cat([labels for _, labels in rows]).cpu()


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, DataArguments, ColumnArguments, MethodArguments, LoopArguments]
    model_args, data_args, columns, method, args = parse_arguments(dataclasses, {}, argv)
    folder = Path(args.output_dir)
    checkpoint = find_checkpoint(args, are_whole=True)  # see save_checkpoint
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=folder,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # one order for any number of processes
        cpu=args.use_cpu,
    )
    set_seed(args.seed)

    name = find_model(model_args.model_name_or_path or find_packaged_encoder())
    data, labels = number_labels(load_data(data_args, SPEECH_ACTS), columns.text_column, columns.label_column)
    model, tokenizer = load_model(name, labels, columns.max_length, method)
    tokens = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True),
        batched=True,
        remove_columns=["text"],
        desc="Tokenizing",
    )
    collate = DataCollatorWithPadding(tokenizer)
    loaders = {
        split: DataLoader(rows, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
        for split, rows in tokens.items()
    }
    train_loader = DataLoader(tokens["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collate)

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], args.learning_rate, weight_decay=0
    )
    # A prepared scheduler steps once for each process, so it counts the batches of all of them.
    steps = math.ceil(len(train_loader) / args.gradient_accumulation_steps) * args.num_train_epochs
    scheduler = get_scheduler("linear", optimizer, int(args.warmup_ratio * steps), steps)
    model, optimizer, scheduler, train_loader = accelerator.prepare(model, optimizer, scheduler, train_loader)
    loaders = {split: accelerator.prepare(loader) for split, loader in loaders.items()}
    accelerator.register_save_state_pre_hook(save_trained_only)
    accelerator.register_load_state_pre_hook(load_trained_only)
    accelerator.init_trackers("runs")

    metric = evaluate.load(str(METRICS / "accuracy_f1"), keep_in_memory=True)

    def measure(split: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
        logits, truth = predict(accelerator, model, loaders[split])
        scores = metric.compute(predictions=logits.argmax(-1), references=truth)
        loss = torch.nn.functional.cross_entropy(logits, truth).item()
        return {f"eval_{key}": value for key, value in {**scores, "loss": loss}.items()}, logits, truth

    measured = "test" if "test" in loaders else "validation"
    before, _, _ = measure(measured)
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
    for epoch in range(first_epoch + 1, args.num_train_epochs + 1):
        train_loader.set_epoch(epoch)  # the order is a matter of seed and epoch, when resumed, too
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
        scores, _, _ = measure("validation")
        history += [{"epoch": epoch, "loss": train_loss}, {"epoch": epoch, **scores}]
        accelerator.log(history[-2] | history[-1], step=epoch)
        progress.write(f"epoch {epoch}: training loss {train_loss:.4f}, accuracy {scores['eval_accuracy']:.1%}")

        accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
        best = accuracies.index(max(accuracies)) + 1
        save_checkpoint(accelerator, folder / f"checkpoint-{epoch}", history)
        if accelerator.is_main_process:
            for path in set(folder.glob("checkpoint-*")) - {folder / f"checkpoint-{kept}" for kept in (epoch, best)}:
                shutil.rmtree(path)
        if method.early_stopping_patience is not None and epoch - best >= method.early_stopping_patience:
            break
    progress.close()
    if args.load_best_model_at_end:
        accelerator.wait_for_everyone()
        accelerator.load_state(folder / f"checkpoint-{best}")
    after, logits, truth = measure(measured)
    accelerator.end_training()

    state = accelerator.get_state_dict(model)  # by all processes, which may have parts of it
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        results = write_results(folder, model, before, after, history)
        probabilities = logits.softmax(-1)
        rows = zip(data[measured]["text"], truth.tolist(), probabilities.argmax(-1).tolist(), probabilities.tolist())
        write_predictions(
            folder,
            (
                {"text": text, "label": labels[label], "prediction": labels[guess], "probability": row[guess]}
                for text, label, guess, row in rows
            ),
        )
        plot_confusion(truth.tolist(), logits.argmax(-1).tolist(), labels, folder)
        repository = None
        if args.push_to_hub:
            repository = create_repo(args.hub_model_id or folder.name, token=args.hub_token, exist_ok=True).repo_id
        command = make_command(__file__, argv)
        write_card(folder, model, results, "SEQ_CLS", data_args, method, command, repository)
        if repository is not None:
            push(folder, repository, args.hub_token)
        print(describe(results, "accuracy"))
        print(f"written to {folder}")


if __name__ == "__main__":
    main()
