# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`PromptTemplate`: a text with columns of the data and slots for virtual tokens, and how rows become token ids.

A slot is written into a text as one reserved token of the vocabulary, once for each of its virtual tokens. The ids
then go through collators, trainers and `generate` like any others, and the model knows the slots by their id.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import compress
from numbers import Number
from types import NoneType
from typing import Any, NoReturn, Optional

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, PreTrainedTokenizerBase


# What a template's text is made of: doubled braces, something in braces, a brace that is alone, words.
PIECES = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")
SLOT = re.compile(r"\{prompt(?::([0-9]{1,8}))?\}")
COLUMN = re.compile(r"\{(\w+(?:[ .-]+\w+)*)\}")

# Names of tokens that vocabularies keep in reserve. Of several tokens of a kind, the one with the highest number is
# taken: T5 was pretrained with `<extra_id_0>` far more often than with `<extra_id_99>`.
RESERVED = [
    re.compile(pattern)
    for pattern in (
        r"\[unused_?([0-9]+)\]",
        r"<\|reserved_special_token_([0-9]+)\|>",
        r"<\|?reserved_?([0-9]+)\|?>",
        r"<unused_?([0-9]+)>",
        r"<\|extra_([0-9]+)\|>",
        r"<SPECIAL_([0-9]+)>",
        r"\[control_([0-9]+)\]",
        r"madeupword([0-9]+)",
        r"<extra_id_([0-9]+)>",
    )
]
# The token of byte 255 in a vocabulary that has all bytes. UTF-8 never has this byte, so no text yields the token.
UNREACHABLE = "ÿ"
# SmolLM has it in notebooks only, in the place of an output that a cell does not have.
EMPTY_OUTPUT = "<empty_output>"
# Stands for a slot in a text, where the tokenizer does not find the placeholder in one.
MARKER = "<|slot of a prompt template|>"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Tokenizers without a limit have a model_max_length of 1e30.
NO_LIMIT = 10**9


@dataclass(frozen=True)
class PromptTemplate:
    """A text with columns of the data and slots for virtual tokens.

    `"{premise} {prompt:2} Question: {hypothesis}? {prompt} Answer: {mask}."` has the columns `premise` and
    `hypothesis`, a slot of 2 virtual tokens and one of 1, and the mask of a masked language model. For a causal model
    `{mask}` stands at the end: the answer is read from the last token before it. `{{` and `}}` are braces. Spaces in
    front of a slot or mask are left out, because there they would be tokens of their own; the words behind a slot keep
    theirs.

    Args:
        text (`str`):
            The template's text.
        shortenable (`Sequence[str]`, *optional*):
            Columns that may be cut where a text is too long, in this order: the first is cut at its end, to nothing if
            need be, before the second is touched.
        placeholder (`str`, *optional*):
            The token that stands for a virtual token in ids. Its own embedding is then never used. By default
            [`~PromptTemplate.for_tokenizer`] takes one that the vocabulary keeps in reserve.
        placeholder_id (`int`, *optional*):
            Its id, which [`~PromptTemplate.for_tokenizer`] fills in.

    Raises:
        ValueError: The text has no slot, two masks, or braces with something else in them; or another value can't be.
        TypeError: A value has the wrong type.
    """

    text: str
    shortenable: Sequence[str] = ()
    placeholder: Optional[str] = None
    placeholder_id: Optional[int] = None

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise TypeError(f"The text of a prompt template must be a string, got {self.text!r}.")
        kinds = [kind for kind, _ in self.parts]
        if "prompt" not in kinds:
            raise ValueError(
                f"The prompt template {self.text!r} has no slot. Write {{prompt:n}} where n virtual tokens belong."
            )
        if kinds.count("mask") > 1:
            raise ValueError(f"The prompt template {self.text!r} has {kinds.count('mask')} times {{mask}}, not one.")
        self._check_shortenable()
        if not isinstance(self.placeholder, (str, NoneType)) or self.placeholder == "":
            raise TypeError(f"`placeholder` must be the name of a token, got {self.placeholder!r}.")
        if type(self.placeholder_id) not in (int, NoneType):
            raise TypeError(f"`placeholder_id` must be a token id, got {self.placeholder_id!r}.")
        if self.placeholder_id is not None and (self.placeholder is None or not 0 <= self.placeholder_id < NO_LIMIT):
            raise ValueError(
                "`placeholder_id` is the id of `placeholder`, got "
                f"{self.placeholder_id} and {self.placeholder!r}. Call `template.for_tokenizer(tokenizer)`."
            )

    def _check_shortenable(self) -> None:
        names = self.shortenable
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`shortenable` must be a list of column names, got {names!r}.")
        if len(set(names)) < len(names) or not set(names) <= set(self.columns):
            raise ValueError(f"`shortenable` must be different ones of the columns {self.columns}, got {names!r}.")
        object.__setattr__(self, "shortenable", tuple(names))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptTemplate:
        """Makes the template that a config has saved.

        Raises:
            ValueError: A name is unknown, or a value can't be.
            TypeError: A value has the wrong type.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or "text" not in values or values.keys() - known:
            raise ValueError(f"A saved prompt template has `text`, and may have {sorted(known)}, got {values!r}.")
        return cls(**values)

    @cached_property
    def parts(self) -> list[tuple[str, Any]]:
        """The text as pairs of kind and value: text, column, prompt (value: how many tokens) and mask."""
        return _parse(self.text)

    @property
    def num_virtual_tokens(self) -> int:
        """V: the virtual tokens of all slots."""
        return sum(value for kind, value in self.parts if kind == "prompt")

    @property
    def columns(self) -> list[str]:
        """The columns of the data, each once, in the order of the text."""
        return list(dict.fromkeys(value for kind, value in self.parts if kind == "column"))

    @property
    def has_mask(self) -> bool:
        """Whether the text has a `{mask}`."""
        return any(kind == "mask" for kind, _ in self.parts)

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
        """Returns this template with the placeholder that it has in a tokenizer's vocabulary, and the token's id.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's; it is not changed.

        Raises:
            ValueError:
                The tokenizer has no such token, or another id for it, or the token has a meaning already; or the
                tokenizer has no mask, which then has to be at the end of the template.
        """
        if self.has_mask and tokenizer.mask_token is None and not self._ends_in_mask:
            raise ValueError(
                f"This {type(tokenizer).__name__} has no mask token. In a template for a causal model {{mask}} stands "
                f"at the end, where the answer is read, and in {self.text!r} something stands behind it."
            )
        name = self.placeholder or _find_reserved(tokenizer)
        token_id = tokenizer.get_vocab().get(name)
        if token_id is None:
            raise ValueError(
                f"`placeholder` must be one token of the vocabulary, and this {type(tokenizer).__name__} makes "
                f"{len(tokenizer.tokenize(name))} tokens of {name!r}. {_how_to_add(name)}"
            )
        if roles := [role for role in ROLES if getattr(tokenizer, role, None) == name]:
            raise ValueError(
                f"`placeholder` {name!r} is the tokenizer's {roles[0]}, which has a meaning in a text. Choose a token "
                "that texts do not have."
            )
        if self.placeholder_id not in (None, token_id):
            raise ValueError(
                f"The template knows its placeholder {name!r} as id {self.placeholder_id}, and in this tokenizer it "
                f"is {token_id}. Use the tokenizer that the adapter was trained with."
            )
        return replace(self, placeholder=name, placeholder_id=token_id)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], max_length: Optional[int] = None
    ) -> dict[str, list[int]]:
        """Encodes one row of the data. For many rows use [`~PromptTemplate.map_function`], which is faster.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's; it is not changed.
            row (`Mapping[str, Any]`): A value for each column.
            max_length (`int`, *optional*): As in [`~PromptTemplate.map_function`].

        Returns:
            `dict[str, list[int]]`: What the tokenizer returns: input_ids, attention_mask and so on.

        Raises:
            ValueError, TypeError: As of [`~PromptTemplate.map_function`].
        """
        batch = self.map_function(tokenizer, max_length)({name: [value] for name, value in row.items()})
        return {name: values[0] for name, values in batch.items()}

    def map_function(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: Optional[int] = None,
        num_masks: int = 1,
        keep_slots: bool = True,
    ) -> RowEncoder:
        """Returns a function for `datasets.Dataset.map(function, batched=True)`, which can be pickled.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's; it is not changed.
            max_length (`int`, *optional*):
                How many tokens a row may have, virtual and special ones among them. By default the tokenizer's
                `model_max_length`. Longer rows are cut in the columns that `shortenable` names.
            num_masks (`int`, defaults to 1): How many masks `{mask}` stands for.
            keep_slots (`bool`, defaults to `True`):
                With `False` the slots are left out, for a model without the prompt. The rest of a row is the same.

        Returns:
            [`RowEncoder`]

        Raises:
            ValueError: As of [`~PromptTemplate.for_tokenizer`], or what is fixed in the text is too long.
        """
        return RowEncoder(self.for_tokenizer(tokenizer), tokenizer, max_length, num_masks, keep_slots)

    def render(self, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], num_masks: int = 1) -> str:
        """Returns a row as a text in which the slots are the placeholder's name, for a pipeline or a chat's message.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's; it is not changed.
            row (`Mapping[str, Any]`): A value for each column.
            num_masks (`int`, defaults to 1): How many masks `{mask}` stands for.

        Raises:
            ValueError:
                As of [`~PromptTemplate.map_function`], or the tokenizer does not find the placeholder in a text.
        """
        template = self.for_tokenizer(tokenizer)
        if template.placeholder not in tokenizer.get_added_vocab():
            raise ValueError(
                f"This {type(tokenizer).__name__} has {template.placeholder!r} in its vocabulary, and does not find "
                f"it in a text. {_how_to_add(template.placeholder)} Its id stays the same."
            )
        encoder = RowEncoder(template, tokenizer, num_masks=num_masks)
        encoder({name: [value] for name, value in row.items()})  # for its checks
        return encoder.render(row)

    @property
    def _ends_in_mask(self) -> bool:
        """Whether nothing but spaces stands behind the mask."""
        kinds = [kind for kind, value in self.parts if kind != "text" or value.strip(" ")]
        return kinds[-1] == "mask"


class RowEncoder:
    """Makes token ids of rows by a template and a tokenizer: what [`PromptTemplate.map_function`] returns.

    A whole row is tokenized at once, so that words next to a slot are tokenized as in running text.

    Args:
        template ([`PromptTemplate`]): With its placeholder's id.
        tokenizer (`PreTrainedTokenizerBase`): The model's; it is not changed.
        max_length (`int`, *optional*), num_masks (`int`, defaults to 1), keep_slots (`bool`, defaults to `True`):
            As in [`PromptTemplate.map_function`].

    Raises:
        ValueError: What is fixed in the template is too long, or does not yield the slots.
    """

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer: PreTrainedTokenizerBase,
        max_length: Optional[int] = None,
        num_masks: int = 1,
        keep_slots: bool = True,
    ):
        for name, value in {"max_length": max_length, "num_masks": num_masks}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}.")
        self.template = template
        self.tokenizer, self.slot = _find_in_texts(tokenizer, template.placeholder)
        self.max_length = min(max_length or NO_LIMIT, tokenizer.model_max_length)
        self.keep_slots = keep_slots
        self.counts = {template.placeholder_id: template.num_virtual_tokens}
        self.mask = ""
        if template.has_mask and tokenizer.mask_token is not None:
            self.mask = tokenizer.mask_token * num_masks
            self.counts[tokenizer.mask_token_id] = num_masks
        empty = dict.fromkeys(template.columns, "")
        fixed = self._tokenize([empty])["input_ids"][0]
        self._check_counts(fixed, empty, "The template's own text")
        if len(fixed) > self.max_length:
            self._refuse_length("What is fixed in the template", len(fixed))

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        """Encodes rows, given as a list for each column.

        Raises:
            ValueError:
                A column is missing, columns differ in length or have no rows, a value holds the placeholder or the
                mask, or a row is too long with the columns cut that may be. The message names the row.
            TypeError: A column is no list of values, or a value is neither a text nor a number.
        """
        if missing := [name for name in self.template.columns if name not in rows]:
            raise ValueError(f"The template has the column {missing[0]!r}, and the data has {list(rows)}.")
        size = _count_rows({name: rows[name] for name in self.template.columns} or rows)
        values = [{name: rows[name][i] for name in self.template.columns} for i in range(size)]
        values = [_as_texts(row, f"Row {i}") for i, row in enumerate(values)]
        encoded = self._tokenize(values)
        for i, row in enumerate(values):
            self._check_counts(encoded["input_ids"][i], row, f"Row {i}")
            if len(encoded["input_ids"][i]) > self.max_length:
                shorter = self._tokenize([self._cut(row, f"Row {i}")])
                for name, column in shorter.items():
                    encoded[name][i] = column[0]
                self._check_counts(encoded["input_ids"][i], row, f"Row {i}, once cut")  # half a word may be a slot
        return encoded if self.keep_slots else self._without_slots(encoded)

    def _without_slots(self, encoded: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        is_text = [[i != self.template.placeholder_id for i in ids] for ids in encoded["input_ids"]]
        return {name: list(map(list, map(compress, rows, is_text))) for name, rows in encoded.items()}

    def render(self, row: Mapping[str, Any]) -> str:
        """Returns a row as a text in which slots and masks are tokens that [`RowEncoder.tokenizer`] finds."""
        row = _as_texts({name: row[name] for name in self.template.columns}, "The row")
        text = ""
        for kind, value in self.template.parts:
            if kind in ("prompt", "mask"):
                text = text.rstrip(" ") + (self.slot * value if kind == "prompt" else self.mask)
            else:
                text += row[value] if kind == "column" else value
        # Where a mask is nothing, it ends the text; spaces behind it would be tokens.
        return text.rstrip(" ") if self.template.has_mask and not self.mask else text

    def _tokenize(self, rows: list[dict[str, str]]) -> dict[str, list[list[int]]]:
        encoded = dict(self.tokenizer([self.render(row) for row in rows], truncation=False, verbose=False))
        slot, placeholder = self.tokenizer.convert_tokens_to_ids(self.slot), self.template.placeholder_id
        if slot != placeholder:
            encoded["input_ids"] = [[placeholder if i == slot else i for i in ids] for ids in encoded["input_ids"]]
        return encoded

    def _cut(self, row: dict[str, str], where: str) -> dict[str, str]:
        """The row with the columns that may be cut as long as they can be."""
        for name in self.template.shortenable:
            whole = row[name]

            def count(end: int, name: str = name, whole: str = whole, row: dict[str, str] = row) -> int:
                return len(self._tokenize([{**row, name: whole[:end]}])["input_ids"][0])

            fitting = bisect_right(range(len(whole) + 1), self.max_length, key=count)
            row = {**row, name: whole[: max(fitting - 1, 0)]}
            if fitting:
                return row
        length = len(self._tokenize([row])["input_ids"][0])
        self._refuse_length(f"{where}, cut as far as `shortenable` allows,", length)

    def _refuse_length(self, what: str, length: int) -> NoReturn:
        raise ValueError(
            f"{what} is {length} tokens long, {self.template.num_virtual_tokens} of them virtual, and `max_length` is "
            f"{self.max_length}. Shorten the template, or name columns to cut in `shortenable`, now "
            f"{list(self.template.shortenable)}."
        )

    def _check_counts(self, ids: list[int], row: dict[str, str], where: str) -> None:
        """Refuses a row whose data yields a slot or a mask."""
        for token_id, expected in self.counts.items():
            if (found := ids.count(token_id)) == expected:
                continue
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            written = {token, self.slot} if token_id == self.template.placeholder_id else {token}
            names = [name for name, value in row.items() if written & set(self.tokenizer.tokenize(value))]
            culprit = f"column {names[0]!r} holds {token!r}, which" if names else f"{token!r}"
            way_out = ", or choose another `placeholder`" if token_id == self.template.placeholder_id else ""
            raise ValueError(
                f"{where}: {culprit} stands for a slot or mask of the template. It is there {found} times, and the "
                f"template has {expected}. Take it out of the text{way_out}."
            )


def _parse(text: str) -> list[tuple[str, Any]]:
    """Splits a template's text into pairs of kind and value."""
    parts: list[tuple[str, Any]] = []
    for match in PIECES.finditer(text):
        piece = match[0]
        if piece in ("{{", "}}"):
            parts.append(("text", piece[0]))
        elif piece in ("{", "}"):
            raise ValueError(
                f"The prompt template {text!r} has a brace at character {match.start()} that does not pair up. Write "
                f"{piece * 2} for a brace in the text."
            )
        elif not piece.startswith("{"):
            parts.append(("text", piece))
        elif piece == "{mask}":
            parts.append(("mask", None))
        elif slot := SLOT.fullmatch(piece):
            parts.append(("prompt", int(slot[1] or 1)))
        elif column := COLUMN.fullmatch(piece):
            parts.append(("column", column[1]))
        else:
            parts.append(("unknown", piece))
    for kind, value in parts:
        if kind == "unknown" or (kind == "prompt" and value == 0):
            found = value if kind == "unknown" else "{prompt:0}"
            raise ValueError(
                f"The prompt template {text!r} has {found!r}. Allowed are {{prompt}}, {{prompt:n}} with n from 1, "
                "{mask}, and {column} with the name of a column."
            )
    return parts


def _find_reserved(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a token that the vocabulary keeps in reserve."""
    vocabulary = tokenizer.get_vocab()
    for pattern in RESERVED:
        if found := [match for match in map(pattern.fullmatch, vocabulary) if match]:
            return max(found, key=lambda match: int(match[1]))[0]
    if set(ByteLevel.alphabet()) <= vocabulary.keys():
        return UNREACHABLE
    if EMPTY_OUTPUT in tokenizer.get_added_vocab():
        return EMPTY_OUTPUT
    raise ValueError(
        f"The vocabulary of this {type(tokenizer).__name__} has no reserved token such as [unused1] for the slots of "
        f"a template. Name a token that texts do not have: `placeholder=...`. {_how_to_add('<prompt>')} And where the "
        "vocabulary has grown, `model.resize_token_embeddings(len(tokenizer))`, before the adapter is made."
    )


def _how_to_add(name: str) -> str:
    return (
        "To make it one that is found in texts: "
        f"`tokenizer.add_special_tokens({{'additional_special_tokens': [{name!r}]}})`."
    )


def _find_in_texts(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer that finds slots in a text, and what a slot is there: the token itself, or else a marker."""
    if name in tokenizer.get_added_vocab():
        return tokenizer, name
    told = copy.deepcopy(tokenizer)
    told.add_tokens([AddedToken(MARKER, special=True, normalized=False)], special_tokens=True)
    return told, MARKER


def _count_rows(columns: Mapping[str, Sequence[Any]]) -> int:
    for name, values in columns.items():
        if not hasattr(values, "__len__") or isinstance(values, (str, bytes)):
            raise TypeError(
                f"Column {name!r} must be a list of values, got {values!r}. Pass `batched=True` to `Dataset.map`, or "
                "encode one row with `template.encode(tokenizer, row)`."
            )
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"Columns must have the same number of rows, at least 1, got {lengths}.")
    return next(iter(lengths.values()))


def _as_texts(row: Mapping[str, Any], where: str) -> dict[str, str]:
    for name, value in row.items():
        if not isinstance(value, (str, Number)):  # NumPy's numbers, too
            raise TypeError(f"{where}: column {name!r} must be a text or a number, got {value!r}.")
    return {name: str(value) for name, value in row.items()}
