# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Templates: what a row becomes, how it is cut, and what is refused before anything is changed."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from decimal import Decimal

import numpy
import pytest
import torch
from datasets import Dataset
from families import make_model
from making import make_adapted
from peft import PeftModel, get_peft_model
from tiny_tokenizers import CHAT, KINDS, TEXTS, make_tokenizer
from transformers import (
    AddedToken,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from peft_ptuning_ext import PromptTemplate, PTuningConfig
from peft_ptuning_ext.templates.template import MARKER


TEXT = "{premise} {prompt:2} Question: {hypothesis}? {prompt} Answer: {mask}."
ROW = {"premise": "A bird sat on the old wall.", "hypothesis": "the bird sang"}
SLOT = "<|reserved_special_token_3|>"


def with_slot(kind: str, **options) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(kind, **options)
    tokenizer.add_tokens([AddedToken("<|reserved_special_token_1|>", special=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(SLOT, special=True)], special_tokens=True)
    return tokenizer


def bert(*words: str, **options) -> BertTokenizer:
    pieces = ["[PAD]", "[unused0]", "[unused1]", "[unused12]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"?.:'*,-", *words]
    pieces += ["#", "##s", "[", "]", "unused", "##12", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += ["##" + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, **{"model_max_length": 64, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_tokenized_as_in_running_text(kind: str) -> None:
    """What stands between two slots is what the tokenizer makes of it behind a token that it knows."""
    tokenizer = with_slot(kind)
    template = PromptTemplate(TEXT)
    found = template.encode(tokenizer, ROW)
    slot = tokenizer.convert_tokens_to_ids(SLOT)
    text = f"A bird sat on the old wall.{SLOT}{SLOT} Question: the bird sang?{SLOT} Answer:<mask>."
    assert found == dict(tokenizer(text))
    assert found["input_ids"].count(slot) == template.num_virtual_tokens == 3
    assert tokenizer(template.render(tokenizer, ROW)) == found
    bare = [
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("A bird sat on the old wall.", " Ques")
    ]
    ids = found["input_ids"]
    first = ids.index(slot)
    assert ids[first - len(bare[0]) : first] == bare[0]  # no token of a space in front of the slot
    assert ids[first + 2] == tokenizer(" Question", add_special_tokens=False)["input_ids"][0]


def test_a_slot_in_front_leaves_the_text_as_it_is() -> None:
    tokenizer = with_slot("Llama 3")
    ids = PromptTemplate("{prompt:4}{a}").encode(tokenizer, {"a": "A bird sat."})["input_ids"]
    plain = tokenizer("A bird sat.")["input_ids"]
    assert ids == plain[:1] + [tokenizer.convert_tokens_to_ids(SLOT)] * 4 + plain[1:]


def test_a_token_that_the_tokenizer_finds_in_no_text() -> None:
    """BERT's `[unused…]` are in its vocabulary only. The user's tokenizer stays as it was."""
    tokenizer = bert("bird", "question")
    template = PromptTemplate("{a} {prompt:2} question: {b}").for_tokenizer(tokenizer)
    assert (template.placeholder, template.placeholder_id) == ("[unused12]", 3)
    found = template.encode(tokenizer, {"a": "bird", "b": 7})
    pieces = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert pieces[:5] == ["[CLS]", "bird", "[unused12]", "[unused12]", "question"]
    pieces = tokenizer.convert_ids_to_tokens(template.encode(tokenizer, {"a": "[unused12]", "b": ""})["input_ids"])
    assert pieces[1:8] == ["[", "unused", "##12", "]", "[unused12]", "[unused12]", "question"]  # in data it is text
    with pytest.raises(ValueError, match=r"Row 0: column 'b' holds '\[unused12\]'"):
        template.encode(tokenizer, {"a": "bird", "b": MARKER})
    assert MARKER not in tokenizer.get_vocab()
    assert set(found) == set(tokenizer("a"))
    assert "[unused12]" not in tokenizer.get_added_vocab()
    with pytest.raises(ValueError, match=r"does not find it in a text.*additional_special_tokens.*id stays the same"):
        template.render(tokenizer, {"a": "bird", "b": "bird"})
    tokenizer.add_tokens([AddedToken("[unused12]", special=True)], special_tokens=True)
    assert template.render(tokenizer, {"a": "a", "b": "b"}) == "a[unused12][unused12] question: b"


def test_a_byte_that_no_text_has() -> None:
    tokenizer = make_tokenizer("GPT-2")
    template = PromptTemplate("{a} {prompt:2} It is {b}").for_tokenizer(tokenizer)
    assert template.placeholder == "ÿ"
    ids = template.encode(tokenizer, {"a": "L'Haÿ", "b": "ÿ"})["input_ids"]
    first = ids.index(template.placeholder_id)
    assert tokenizer.decode(ids[:first] + ids[first + 2 :]) == "L'Haÿ It is ÿ"


def test_a_message_of_a_chat() -> None:
    tokenizer = with_slot("Llama 3", chat_template=CHAT)
    template = PromptTemplate("{prompt:3} {question}").for_tokenizer(tokenizer)
    message = {"role": "user", "content": template.render(tokenizer, {"question": "What is written?"})}
    ids = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
    assert ids.count(template.placeholder_id) == 3
    model = get_peft_model(
        make_model("Llama", "CAUSAL_LM", vocab_size=400), PTuningConfig("CAUSAL_LM", prompt_template=template)
    )
    assert model.generate(input_ids=torch.tensor([ids]), max_new_tokens=2, pad_token_id=0).shape == (1, len(ids) + 2)


def test_columns_are_cut_in_their_order() -> None:
    tokenizer = with_slot("BERT")
    template = PromptTemplate(TEXT, shortenable=("hypothesis", "premise"))
    slot = tokenizer.convert_tokens_to_ids(SLOT)
    whole = template.encode(tokenizer, ROW)["input_ids"]
    empty = template.encode(tokenizer, dict.fromkeys(ROW, ""))["input_ids"]
    without_hypothesis = template.encode(tokenizer, {**ROW, "hypothesis": ""})["input_ids"]
    for length in range(len(empty), len(whole) + 1):
        ids = template.encode(tokenizer, ROW, max_length=length)["input_ids"]
        assert len(empty) <= len(ids) <= length
        assert length - len(ids) < 6  # a word of several tokens is cut within
        assert [ids.count(i) for i in (slot, tokenizer.mask_token_id)] == [3, 1]
        if length >= len(without_hypothesis):  # the second column is whole as long as the first can be cut
            assert ids[: whole.index(slot)] == whole[: whole.index(slot)]
    with pytest.raises(ValueError, match=rf"fixed in the template is {len(empty)} tokens.*`max_length` is"):
        template.encode(tokenizer, ROW, max_length=len(empty) - 1)
    with pytest.raises(ValueError, match="Row 1, cut as far as `shortenable` allows, is .* tokens long, 3 of them"):
        replace(template, shortenable=("premise",)).map_function(tokenizer, max_length=len(empty) + 2)(
            {"premise": ["a", "b"], "hypothesis": ["", "the bird sang and sang"]}
        )
    short = with_slot("BERT", model_max_length=len(whole) - 1)
    assert len(template.encode(short, ROW)["input_ids"]) <= len(whole) - 1  # the tokenizer's limit by itself
    with pytest.raises(ValueError, match=rf"`max_length` is {len(whole) - 1}"):
        PromptTemplate(TEXT).encode(short, ROW)


def test_nothing_is_cut_that_would_fit() -> None:
    tokenizer, row = bert(), {"a": ".:'*,-?", "b": "?.:"}
    template = PromptTemplate("{a} {prompt:2} {b}", shortenable=["a", "b"])
    for length in range(4, 15):
        ids = template.encode(tokenizer, row, max_length=length)["input_ids"]
        assert len(ids) == min(length, 14)  # every character is a token
    with pytest.raises(ValueError, match="What is fixed in the template is 4 tokens long, 2 of them virtual"):
        template.encode(tokenizer, row, max_length=3)


# The templates of the few-shot code of "GPT Understands, Too" (https://github.com/THUDM/P-tuning, PT-Fewshot, patterns
# 1 to 4). There a text is a list of parts, tokenized one by one; parts with the flag 1 are the words "the", whose
# embeddings are replaced by trained ones.
THE = object()
MASK = "[MASK]"
PAPER = {
    "RTE": (
        "{premise} Question: {hypothesis}? {prompt} Answer: {mask}.",
        ["premise", "Question:", "hypothesis", "?", THE, "Answer:", MASK, "."],
    ),
    "CB": (
        "{premise} [SEP] {hypothesis}? {prompt} answer: {mask}",
        ["premise", "[SEP]", "hypothesis", "?", THE, " answer: ", MASK],
    ),
    "COPA, cause": (
        "{choice1} or {choice2}? {premise} because {prompt} {mask}.",
        ["choice1", "or", "choice2", "?", "premise", "because", THE, MASK * 3, "."],
    ),
    "COPA, effect": (
        "{choice1} or {choice2}? {premise} so {prompt} {mask}.",
        ["choice1", "or", "choice2", "?", "premise", "so", THE, MASK * 3, "."],
    ),
    "WSC": (
        "{text} {prompt} pronoun '*{pronoun}*' refers to {mask}.",
        ["text", THE, "pronoun '*", "pronoun", "*' refers to", MASK * 3 + "."],
    ),
    "WSC, 2": (
        "{prompt} {text} {prompt} pronoun '*{pronoun}*' refers to {mask}.",
        [THE, "text", THE, "pronoun '*", "pronoun", "*' refers to", MASK * 3 + "."],
    ),
    "BoolQ": (
        "{passage}. {prompt} Question: {question}? Answer: {mask}.",
        ["passage", ".", THE, " Question: ", "question", "? Answer: ", MASK, "."],
    ),
    "MultiRC": (
        "{passage}. Question: {question}? Is it {answer}? {prompt} {mask}.",
        ["passage", ". Question: ", "question", "? Is it ", "answer", "?", THE, MASK, "."],
    ),
    "WiC": (
        "{text1} [SEP] {text2} {prompt} *{word} *? {mask}",
        ["text1", "[SEP]", "text2", THE, "*", "word", " *?", MASK],
    ),
    "WiC, 2": (
        "{text1} [SEP] {text2} {prompt} *{word} *? {prompt} {mask}",
        ["text1", "[SEP]", "text2", THE, "*", "word", " *?", THE, MASK],
    ),
    "WiC, 3": (
        "{prompt} {text1} [SEP] {text2} {prompt} *{word} *? {prompt} {mask}",
        [THE, "text1", "[SEP]", "text2", THE, "*", "word", " *?", THE, MASK],
    ),
    "WiC, 4": (
        "{prompt} {text1} [SEP] {text2} {prompt} *{word} *? {prompt} {mask} {prompt}",
        [THE, "text1", "[SEP]", "text2", THE, "*", "word", " *?", THE, MASK, THE],
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_templates_of_the_paper(name: str) -> None:
    text, parts = PAPER[name]
    tokenizer = bert("question", "answer", "is", "it", "or", "because", "so", "pronoun", "refers", "to")
    template = PromptTemplate(text).for_tokenizer(tokenizer)
    row = {column: f"the {column}'s value" for column in template.columns}
    expected = [tokenizer.cls_token_id]
    for part in parts:
        if part is THE:
            expected.append(template.placeholder_id)
        else:
            expected += tokenizer(row.get(part, part), add_special_tokens=False)["input_ids"]
    expected.append(tokenizer.sep_token_id)
    num_masks = 3 if MASK * 3 in "".join(part for part in parts if part is not THE) else 1
    encoded = template.map_function(tokenizer, num_masks=num_masks)({key: [value] for key, value in row.items()})
    assert encoded["input_ids"] == [expected]
    assert expected.count(template.placeholder_id) == template.num_virtual_tokens == parts.count(THE)


def test_map_of_a_data_set_trains_a_model() -> None:
    tokenizer = with_slot("BERT", padding_side="right")
    template = PromptTemplate("{text} {prompt:3} It is {prompt:2}", shortenable=["text"]).for_tokenizer(tokenizer)
    function = template.map_function(tokenizer, max_length=20)
    data = Dataset.from_dict({"text": ["A bird", "She counts her steps " * 9], "label": [0, 1]})
    encoded = data.map(pickle.loads(pickle.dumps(function)), batched=True, remove_columns=["text"])
    assert [encoded[i]["input_ids"] for i in range(2)] == [
        template.encode(tokenizer, row, max_length=20)["input_ids"] for row in data
    ]
    model = get_peft_model(
        make_model("BERT", "SEQ_CLS", vocab_size=400), PTuningConfig("SEQ_CLS", prompt_template=template)
    )
    batch = DataCollatorWithPadding(tokenizer)(list(encoded))
    model(**batch).loss.backward()
    assert model.base_model._layer().ptuning_encoders["default"].embedding.grad.norm(dim=1).min() > 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"a {SLOT} b", rf"Row 0: column 'a' holds '{SLOT}'".replace("|", r"\|") + ".*is there 4 times"),
        ("a <mask> b", "Row 0: column 'a' holds '<mask>', which stands for a slot or mask"),
    ],
)
def test_data_brings_no_slot_in(value: str, message: str) -> None:
    template = PromptTemplate("{a} {prompt:3} {mask}")
    tokenizer = with_slot("RoBERTa")
    for make in (template.encode, template.render):
        with pytest.raises(ValueError, match=message):
            make(tokenizer, {"a": value})


def test_a_collator_that_masks_tokens_leaves_marked_slots_alone() -> None:
    tokenizer = with_slot("BERT", padding_side="right")
    template = PromptTemplate("{a} {prompt:3} {b}").for_tokenizer(tokenizer)
    encode = template.map_function(tokenizer)
    rows = [{"input_ids": ids} for ids in encode({"a": TEXTS, "b": TEXTS})["input_ids"]]
    slots = (template.placeholder_id, *tokenizer.all_special_ids)
    marked = [{**row, "special_tokens_mask": [int(i in slots) for i in row["input_ids"]]} for row in rows]
    model = make_adapted("BERT", "masked LM", sizes={"vocab_size": len(tokenizer)}, length=3, prompt_template=template)
    options = {"mlm_probability": 0.9, "mask_replace_prob": 0.9, "random_replace_prob": 0}
    collate = DataCollatorForLanguageModeling(tokenizer, **options)
    assert model(**collate(marked)).loss.isfinite()
    with pytest.raises(ValueError, match="collators that mask tokens"):
        model(**collate(rows))


@pytest.mark.parametrize("value", ["{prompt:3}", "{mask}", "{", "}}", "{0.__class__}", "%s {a!r:>9}", "\\n", ""])
def test_data_with_braces_stays_text(value: str) -> None:
    tokenizer = with_slot("GPT-2")
    ids = PromptTemplate("{prompt:2}{a}").encode(tokenizer, {"a": value})["input_ids"]
    assert ids[2:] == tokenizer(value)["input_ids"]
    assert tokenizer.decode(ids[2:]) == value


def test_braces_of_the_text() -> None:
    tokenizer = with_slot("GPT-2")
    template = PromptTemplate("{{{a}}} {{}} {{prompt}} {prompt}")
    assert template.columns == ["a"]
    assert template.render(tokenizer, {"a": "x"}) == "{x} {} {prompt}" + SLOT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a}", "has no slot"),
        ("", "has no slot"),
        ("{prompt} {a", "brace at character 9 that does not pair up"),
        ("{prompt} a}", "brace at character 10"),
        ("{prompt:0}", r"has '\{prompt:0\}'"),
        ("{prompt:-1}", r"has '\{prompt:-1\}'.*Allowed are"),
        ("{prompt:x}", r"has '\{prompt:x\}'"),
        ("{prompt:999999999}", "Allowed are"),
        ("{promt:3} {prompt}", r"has '\{promt:3\}'"),
        ("{prompt} {a!r}", r"has '\{a!r\}'"),
        ("{prompt} {a[0]}", r"has '\{a\[0\]\}'"),
        ("{prompt} {}", r"has '\{\}'"),
        ("{prompt} {mask} {mask}", r"has 2 times \{mask\}"),
    ],
)
def test_texts_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTemplate(text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shortenable": "a"}, TypeError, "must be a list of column names, got 'a'"),
        ({"shortenable": ["b"]}, ValueError, "different ones of the columns"),
        ({"shortenable": ["a", "a"]}, ValueError, "different ones of the columns"),
        ({"placeholder": 3}, TypeError, "must be the name of a token"),
        ({"placeholder_id": "3", "placeholder": "x"}, TypeError, "must be a token id"),
        ({"placeholder_id": True, "placeholder": "x"}, TypeError, "must be a token id"),
        ({"placeholder_id": 3}, ValueError, "is the id of `placeholder`"),
        ({"placeholder_id": -1, "placeholder": "x"}, ValueError, "is the id of `placeholder`"),
    ],
)
def test_values_that_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PromptTemplate("{a} {prompt}", **options)
    with pytest.raises(TypeError, match="text of a prompt template must be a string, got 3"):
        PromptTemplate(3)


def test_what_a_tokenizer_can_not_do() -> None:
    plain, tokenizer = make_tokenizer("BERT"), with_slot("GPT-2")
    before = plain.get_vocab()
    with pytest.raises(ValueError, match="no reserved token such as .*`placeholder=...`.*add_special_tokens.*resize"):
        PromptTemplate("{prompt}").for_tokenizer(plain)
    with pytest.raises(ValueError, match="must be one token of the vocabulary.*makes [2-9] tokens of '<slot>'"):
        PromptTemplate("{prompt}", placeholder="<slot>").for_tokenizer(plain)
    for name in ("<pad>", "<s>", "</s>", "<unk>", "<mask>"):
        with pytest.raises(ValueError, match=f"'{name}' is the tokenizer's .*, which has a meaning"):
            PromptTemplate("{prompt}", placeholder=name).for_tokenizer(plain)
    resolved = PromptTemplate("{prompt}").for_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="knows its placeholder .* as id 7, and in this tokenizer it is"):
        replace(resolved, placeholder_id=7).for_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="The template's own text: .* is there 2 times, and the template has 1"):
        PromptTemplate(f"{SLOT} {{prompt}}").map_function(tokenizer)
    for name, value in {"max_length": 0, "num_masks": "2"}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be an int of at least 1"):
            PromptTemplate("{prompt}").map_function(tokenizer, **{name: value})
    assert plain.get_vocab() == before


def test_rows_that_are_refused() -> None:
    tokenizer, template = with_slot("GPT-2"), PromptTemplate("{a} {b} {prompt}")
    with pytest.raises(ValueError, match=r"has the column 'b', and the data has \['a', 'c'\]"):
        template.encode(tokenizer, {"a": "x", "c": "y"})
    encode = template.map_function(tokenizer)
    with pytest.raises(TypeError, match="Row 1: column 'b' must be a text or a number, got None"):
        encode({"a": ["x", "y"], "b": ["x", None]})
    with pytest.raises(TypeError, match="Column 'a' must be a list of values, got 'xy'.*`batched=True`"):
        encode({"a": "xy", "b": "zz"})
    for rows in ({"a": ["x"], "b": ["y", "z"]}, {"a": [], "b": []}):
        with pytest.raises(ValueError, match="must have the same number of rows, at least 1"):
            encode(rows)
    with pytest.raises(ValueError, match="at least 1, got {}"):
        PromptTemplate("{prompt} once").map_function(tokenizer)({})


def test_numbers_of_other_libraries() -> None:
    tokenizer, template = with_slot("GPT-2"), PromptTemplate("{a} {prompt}")
    for value in (numpy.int64(3), numpy.float32(2.5), Decimal("1.5")):
        assert template.encode(tokenizer, {"a": value}) == template.encode(tokenizer, {"a": str(value)})


def test_a_cut_brings_no_slot_in() -> None:
    """Half of a word may be the word that the placeholder is."""
    tokenizer = bert()
    tokenizer.add_tokens([AddedToken("morn", single_word=True)])
    template = PromptTemplate("{prompt} {a}", ["a"], placeholder="morn")
    assert len(template.encode(tokenizer, {"a": "mornings"})["input_ids"]) == 3 + len("mornings")
    with pytest.raises(ValueError, match="Row 0, once cut: .*is there 2 times, and the template has 1"):
        template.encode(tokenizer, {"a": "mornings"}, max_length=6)


def test_the_mask_of_a_causal_model_is_the_end() -> None:
    tokenizer = with_slot("Llama 3")
    tokenizer.mask_token = None
    for text in ("{a} {prompt} Answer: {mask}", "{a} {prompt} Answer: {mask}  "):
        ids = PromptTemplate(text).encode(tokenizer, {"a": "A bird"})["input_ids"]
        assert tokenizer.decode(ids[-2:]).endswith(":")
    with pytest.raises(ValueError, match="has no mask token.*stands at the end.*something stands behind it"):
        PromptTemplate("{a} {prompt} Answer: {mask}.").encode(tokenizer, {"a": "A bird"})


def test_several_masks() -> None:
    tokenizer = with_slot("BERT")
    ids = PromptTemplate("{prompt} {mask}.").map_function(tokenizer, num_masks=3)({"a": ["x"]})["input_ids"][0]
    assert ids.count(tokenizer.mask_token_id) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("[unused7]", "[unused7]"),
        ("<|reserved_special_token_9|>", "<|reserved_special_token_9|>"),
        ("<unused9>", "<unused9>"),
        ("<extra_id_9>", "<extra_id_9>"),
        ("[control_9]", "[control_9]"),
        ("<SPECIAL_9>", "<SPECIAL_9>"),
        ("madeupword0009", "madeupword0009"),
        ("<empty_output>", "<empty_output>"),
    ],
)
def test_reserved_tokens(name: str, expected: str) -> None:
    tokenizer = make_tokenizer("BERT")
    tokenizer.add_tokens([AddedToken(name, special=True)], special_tokens=True)
    assert PromptTemplate("{prompt}").for_tokenizer(tokenizer).placeholder == expected


def test_config(tmp_path) -> None:
    tokenizer = with_slot("BERT")
    template = PromptTemplate(TEXT, shortenable=("premise",))
    with pytest.raises(ValueError, match=r"does not know the id.*template.for_tokenizer\(tokenizer\)"):
        PTuningConfig(prompt_template=template)
    template = template.for_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="`num_virtual_tokens` is 20, and the slots of `prompt_template` have 3"):
        PTuningConfig(num_virtual_tokens=20, prompt_template=template)
    config = PTuningConfig(task_type="SEQ_CLS", prompt_template=template)
    assert config.num_virtual_tokens == 3
    assert replace(config).prompt_template == template
    assert PTuningConfig(prompt_template=config.to_dict()["prompt_template"]).prompt_template == template
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["prompt_template"]
    assert saved == {
        "text": TEXT,
        "shortenable": ["premise"],
        "placeholder": SLOT,
        "placeholder_id": template.placeholder_id,
    }
    assert PTuningConfig.from_pretrained(tmp_path).prompt_template == template
    assert PTuningConfig().num_virtual_tokens == 20


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": "{a.__class__.__init__} {prompt:3}"}, None, None),
        ({"text": "{0} {prompt:3}", "shortenable": []}, None, None),
        ({"text": "{a!r} {prompt:3}"}, ValueError, "Allowed are"),
        ({"text": "{prompt:4}"}, ValueError, "`num_virtual_tokens` is 3, and the slots"),
        ({"text": None}, TypeError, "must be a string"),
        ({"code": "x"}, ValueError, "may have"),
        ({"placeholder_id": 10**9}, ValueError, "placeholder_id"),
        ({"placeholder_id": 500}, ValueError, "has 400 embeddings"),
        ({"placeholder_id": None}, ValueError, "does not know the id"),
    ],
)
def test_a_template_that_a_stranger_has_edited(
    changes: dict, error: type | None, message: str | None, tmp_path
) -> None:
    tokenizer = with_slot("BERT")
    template = PromptTemplate("{a} {prompt:3}").for_tokenizer(tokenizer)
    base = make_model("BERT", "SEQ_CLS", vocab_size=400)
    get_peft_model(base, PTuningConfig("SEQ_CLS", prompt_template=template)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["prompt_template"] |= changes
    path.write_text(json.dumps(config))
    base = make_model("BERT", "SEQ_CLS", vocab_size=400)
    if error is not None:
        with pytest.raises(error, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert not hasattr(base, "peft_config")
        return
    loaded = PeftModel.from_pretrained(base, tmp_path).peft_config["default"].prompt_template
    name = loaded.columns[0]
    assert loaded.encode(tokenizer, {name: "A bird"}) == template.encode(tokenizer, {"a": "A bird"})
