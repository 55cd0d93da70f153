# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that puts the prompt's ids in front of every text by itself."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Optional

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


# Around the names that the entries have in a chat template: code points that Unicode reserves for the inside of
# programs and forbids in texts that are exchanged (The Unicode Standard, 23.7).
BEGIN, END = "\ufdd0", "\ufdd1"
# A chat that templates take.
SAMPLE = [{"role": "user", "content": "a"}]


def save_with_prompt(tokenizer: PreTrainedTokenizerBase, folder: Path, ids: list[int]) -> None:
    """Saves a tokenizer that puts `ids` in front of every text, and in front of every chat if it has a template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer without the prompt; it is not changed.
        folder (`Path`): Where its files are written.
        ids (`list[int]`): V ids behind all of the tokenizer's own.

    Raises:
        ValueError: The tokenizer can't be told to put something in front, or would then write a chat otherwise.
    """
    names = [f"{BEGIN}virtual {i}{END}" for i in range(len(ids))]
    has_template = _save(
        tokenizer, folder, lambda template: put_names_first(template, f"{{{{ '{''.join(names)}' }}}}")
    )
    with _changing(folder / "tokenizer.json") as state:
        state["post_processor"] = put_ids_first(state["post_processor"], ids, names)
        if has_template:
            _add_entries(state, ids, names)
    if has_template:
        _check_chats(tokenizer, folder, len(ids))


def save_with_prompts(tokenizer: PreTrainedTokenizerBase, folder: Path, ids: dict[str, list[int]]) -> None:
    """Saves a tokenizer whose chat template, if it has one, puts the ids of the prompt in front that it is told.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer without the prompts; it is not changed.
        folder (`Path`): Where its files are written.
        ids (`dict[str, list[int]]`): By name of a prompt, its ids, behind all of the tokenizer's own.

    Raises:
        ValueError: The tokenizer has a chat template, and no places for new entries, or writes a chat otherwise then.
    """
    names = [[f"{BEGIN}{k} {i}{END}" for i in range(len(own))] for k, own in enumerate(ids.values())]
    has_template = _save(tokenizer, folder, lambda template: put_names_first(template, _names_of_prompt(ids)))
    if has_template:
        with _changing(folder / "tokenizer.json") as state:
            _add_entries(state, *(list(chain(*parts)) for parts in (ids.values(), names)))
        for name in [*ids][:1]:
            _check_chats(tokenizer, folder, len(ids[name]), prompt=name)


def _names_of_prompt(ids: dict[str, list[int]]) -> str:
    """What a chat template writes of the prompt that it is told: names of its entries, or nothing without a prompt."""
    table = json.dumps({name: [k, len(own)] for k, (name, own) in enumerate(ids.items())}, ensure_ascii=False)
    return (
        f"{{% if prompt is defined and prompt is not none %}}{{% set ptuning_prompts = {table} %}}"
        "{% if prompt not in ptuning_prompts %}{{ raise_exception('There is no prompt ' ~ prompt) }}{% endif %}"
        f"{{% for i in range(ptuning_prompts[prompt][1]) %}}{{{{ '{BEGIN}' ~ ptuning_prompts[prompt][0] ~ ' ' ~ i ~ "
        f"'{END}' }}}}{{% endfor %}}{{% endif %}}"
    )


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path, change: Callable[[str], str]) -> bool:
    """Saves a tokenizer with its chat templates changed; returns whether it has one."""
    template = tokenizer.chat_template
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        is_named = isinstance(template, dict)
        by_name = {key: change(text) for key, text in (template if is_named else {"": template}).items()}
        tokenizer.chat_template = by_name if is_named else by_name[""]
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json, and only the `tokenizers` library can be told to put "
            "something in front of every text. Load the tokenizer with `AutoTokenizer` from a folder that has one."
        )
    with _changing(folder / "tokenizer_config.json") as config:
        # Classes of single models make parts of the tokenizer anew when they load; this one takes the file as it is.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = tokenizer.model_input_names
        for name in ("add_bos_token", "add_eos_token"):  # they would write the post-processor again
            config.pop(name, None)
    return template is not None


def _check_chats(tokenizer: PreTrainedTokenizerBase, folder: Path, length: int, **told: str) -> None:
    """Refuses a tokenizer that gives a chat other ids behind a prompt of V = `length` ids than without it.

    Some write the first word of a text otherwise than those behind a special token.
    """
    written, templates = PreTrainedTokenizerFast.from_pretrained(folder), tokenizer.chat_template
    for template in templates if isinstance(templates, dict) else [None]:
        options = {"chat_template": template, "return_dict": False, **told}
        try:
            expected = tokenizer.apply_chat_template(SAMPLE, **options)
        except (TemplateError, TypeError, ValueError):  # it takes other chats only
            continue
        if written.apply_chat_template(SAMPLE, **options)[length:] != expected:
            raise ValueError(
                f"{type(tokenizer).__name__} gives a chat other ids behind a prompt than without it: its template "
                "begins with a text, and the tokenizer writes the first word of a text otherwise than later ones. Let "
                "the template begin with a special token, or remove it to export the tokenizer for plain texts."
            )


@contextmanager
def _changing(path: Path) -> Iterator[dict]:
    state = json.loads(path.read_text(encoding="utf-8"))
    yield state
    path.write_text(json.dumps(state, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def put_ids_first(post_processor: Optional[dict], ids: list[int], names: list[str]) -> dict:
    """Returns what the `tokenizers` library reads as `post_processor` with `ids` in front.

    Args:
        post_processor (`dict`, *optional*): The entry of a tokenizer.json.
        ids (`list[int]`): V ids, which need no entry in the vocabulary.
        names (`list[str]`): Their names in the tokens of an encoding.

    Raises:
        ValueError: The kind of post-processor is unknown.
    """
    steps = post_processor["processors"] if (post_processor or {}).get("type") == "Sequence" else [post_processor]
    steps = [step for step in steps if step is not None]
    others = [step for step in steps if step["type"] == "ByteLevel"]  # they trim offsets
    rest = [step for step in steps if step["type"] != "ByteLevel"]
    if len(rest) > 1 or (rest and rest[0]["type"] not in TEMPLATES):
        raise ValueError(
            f"The tokenizer's post-processor {' and '.join(step['type'] for step in rest)} is not one that something "
            f"can be put in front of: {', '.join(TEMPLATES)}."
        )
    if rest and rest[0]["type"] == "RobertaProcessing":
        trims = {key: rest[0][key] for key in ("add_prefix_space", "trim_offsets")}
        others.append({"type": "ByteLevel", **trims, "use_regex": True})
    template = TEMPLATES[rest[0]["type"]](rest[0]) if rest else _template([], ["A0"], ["A0", "B1"])
    first = f"{BEGIN}prompt{END}"
    template["special_tokens"][first] = {"id": first, "ids": ids, "tokens": names}
    for kind in ("single", "pair"):
        template[kind].insert(0, {"SpecialToken": {"id": first, "type_id": 0}})
    return {"type": "Sequence", "processors": [*others, template]} if others else template


def _template(special: list[tuple[str, int]], single: list[str], pair: list[str]) -> dict:
    """A `TemplateProcessing`. A piece is A, B or the number of a special token, and the token type."""

    def piece(code: str) -> dict:
        if code[0] in "AB":
            return {"Sequence": {"id": code[0], "type_id": int(code[1])}}
        return {"SpecialToken": {"id": special[int(code[0])][0], "type_id": int(code[1])}}

    return {
        "type": "TemplateProcessing",
        "single": [piece(code) for code in single],
        "pair": [piece(code) for code in pair],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in special},
    }


# Post-processors of the `tokenizers` library that put tokens around a text, written as a template.
TEMPLATES: dict[str, Callable[[dict], dict]] = {
    "TemplateProcessing": copy.deepcopy,
    "BertProcessing": lambda step: _template(
        [step["cls"], step["sep"]], ["00", "A0", "10"], ["00", "A0", "10", "B1", "11"]
    ),
    "RobertaProcessing": lambda step: _template(
        [step["cls"], step["sep"]], ["00", "A0", "10"], ["00", "A0", "10", "10", "B0", "10"]
    ),
}


def put_names_first(template: str, names: str) -> str:
    """Returns a chat template that writes names of entries, then what `template` writes without their code points.

    Args:
        template (`str`): The chat template.
        names (`str`): What writes the names, as a part of a template.
    """
    template = re.sub(r"(\r\n|\r|\n)\Z", "", template)  # as Jinja does at the end
    # Where an answer of the model begins can't be told inside a block that is kept: without the tag, callers who ask
    # for it are warned.
    template = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", template)
    template = re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", template)
    given = "{% set ptuning_text %}\n" + template + "{{ '' }}{% endset %}"
    return f"{given}{names}{{{{ ptuning_text | replace('{BEGIN}', '') | replace('{END}', '') }}}}"


def _add_entries(state: dict, ids: list[int], names: list[str]) -> None:
    """Gives the new ids the names that the chat template writes."""
    vocabulary = state["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError(
            f"The tokenizer has a chat template and the model {state['model'].get('type')}, whose vocabulary has no "
            "places for the prompt behind the rows of the embedding. Remove the template to export it for plain texts."
        )
    for token in state["added_tokens"]:  # those outside of the vocabulary are numbered by its size
        vocabulary.setdefault(token["content"], token["id"])
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for id, name in zip(ids, names):
        vocabulary[name] = id
        state["added_tokens"].append({"id": id, "content": name, **options})
