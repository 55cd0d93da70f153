# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A long context and the inputs behind it: read from files, checked, and put into the model's frame of tokens."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict, load_dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shared.arguments import check_at_least
from shared.sources import DATA


FRONT_DESK = DATA / "front_desk"


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
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={
            "help": "Number format of the frozen weights. Default: bfloat16, or float32 on an x86 CPU without "
            "AVX-512, which has no fast products in bfloat16."
        },
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
        ValueError: The template has no place for the input, the chat template puts no system message in front, or
            the text that ends an answer is empty.
    """
    if args.stop == "":
        raise ValueError("`--stop` should be a text of one character or more, got ''. Leave it out for none.")
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
        dataset = load_dataset("text", data_files=str(file), split="train").rename_column("text", "input")
        return dataset.filter(lambda row: bool(row["input"].strip()))
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
    check_at_least(1, args, "num_virtual_tokens", "top_k")
    if args.num_virtual_tokens > length:
        raise ValueError(
            f"`--num_virtual_tokens` is {args.num_virtual_tokens}, and the context has {length} tokens: a longer "
            "prompt saves nothing."
        )
    return length
