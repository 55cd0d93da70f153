# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The token classification recipe from end to end on a tiny model, its metric and its data set."""

import random
import runpy

import evaluate
import pytest
import token_classification as recipe
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from peft import PeftModel
from safetensors.torch import load_file
from tiny_recipes import (
    FILES,
    PLOTS,
    RECIPES,
    RUN,
    assert_deep_prompt_is_saved,
    outcome,
    read_rows,
    save_backbone,
    train,
    write_rows,
)
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer


JOURNEYS = RECIPES / "data" / "journeys"

TAGS = {
    "oslo": "B-place",
    "lima": "B-place",
    "new": "B-place",
    "york": "I-place",
    "nora": "B-person",
    "lind": "I-person",
}
PHRASES = ["to oslo", "lima", "new york", "nora", "nora lind", "from", "we go", "is late", "and", "tomorrow"]


def sentences(split):
    return read_rows(JOURNEYS / f"{split}.jsonl")


def entities(tags):
    """The spans of tags with their kinds: an entity also ends where the kind changes."""
    found, start = set(), 0
    for i, (before, tag) in enumerate(zip(["O", *tags], [*tags, "O"])):
        if before != "O" and (tag[0] != "I" or tag[2:] != before[2:]):
            found.add((start, i, before[2:]))
        if tag != "O" and (tag[0] == "B" or tag[2:] != before[2:]):
            start = i
    return found


def measure(rows):
    """Accuracy of words, and precision, recall and F1 of entities."""
    pairs = [(entities(row["tags"]), entities(row["prediction"])) for row in rows]
    right = sum(len(truth & guess) for truth, guess in pairs)
    precision = right / max(sum(len(guess) for _, guess in pairs), 1)
    recall = right / sum(len(truth) for truth, _ in pairs)
    words = [word for row in rows for word in zip(row["tags"], row["prediction"], strict=True)]
    return {
        "accuracy": sum(truth == guess for truth, guess in words) / len(words),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
    }


def make_rows(count, seed):
    """Sentences of 4 to 28 words in which a name is always a name."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = [word for _ in range(draw.randint(4, 14)) for word in draw.choice(PHRASES).split()]
        rows.append({"tokens": words, "ner_tags": [TAGS.get(word, "O") for word in words]})
    return rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run on a tiny BERT, for which some sentences are too long and Oslo is several tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = {"train": make_rows(80, 0), "validation": make_rows(30, 1)}
    return {
        **RUN,
        "model_name_or_path": save_backbone(folder / "model", PHRASES[1:]),
        **{f"{split}_file": write_rows(folder / f"{split}.jsonl", rows[split]) for split in rows},
        "max_length": 18,
    }


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return train(recipe, tiny, tmp_path_factory.mktemp("trained") / "output")


def predict(folder, backbone, texts):
    """The saved adapter on one text at a time: the tag at the first token of each word, O where there is none."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForTokenClassification.from_pretrained(backbone, config=config)
    model = PeftModel.from_pretrained(model, folder).eval()
    predicted = []
    for words in texts:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        tags = dict(reversed([*zip(encoded.word_ids(), best)]))  # of equal keys the first one stays
        predicted.append([config.id2label[tags[i]] if i in tags else "O" for i in range(len(words))])
    return predicted


def test_files_are_written(trained):
    plots = {*PLOTS, "confusion_matrix.png"}
    assert {path.name for path in trained.output.iterdir() if not path.name.startswith("checkpoint-")} == FILES | plots
    for name in plots:
        assert (trained.output / name).read_bytes().startswith(b"\x89PNG")
    card = (trained.output / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert f"| f1 | {trained.metrics['before']['f1']:.4f} | {trained.metrics['after']['f1']:.4f} |" in card


def test_prompt_and_head_move_and_the_backbone_stays(trained):
    assert trained.moved == {
        name for name in trained.before if "ptuning_encoders" in name or "modules_to_save" in name
    }
    assert len(trained.moved) == 2 * 2 + 2  # keys and values of two layers, weight and bias of the head


def test_adapter_holds_prompt_and_head_only(trained):
    labels = len(trained.model.config.id2label)
    tensors = load_file(trained.output / "adapter_model.safetensors").values()
    assert sorted(tuple(tensor.shape) for tensor in tensors) == sorted([(2, 4, 16)] * 4 + [(labels, 32), (labels,)])
    assert_deep_prompt_is_saved(trained, 4, 2, "RANDOM")


def test_metrics_are_those_of_the_predictions_on_whole_texts(trained, tiny):
    given = read_rows(tiny["validation_file"])
    assert [(row["tokens"], row["tags"]) for row in trained.rows] == [(r["tokens"], r["ner_tags"]) for r in given]
    measured = measure(trained.rows)
    assert {name: trained.metrics["after"][name] for name in measured} == pytest.approx(measured)
    assert measured["f1"] > trained.metrics["before"]["f1"] + 0.1
    evaluations = [entry for entry in trained.metrics["history"] if "eval_f1" in entry]
    assert [entry["step"] for entry in evaluations] == [20, 40]
    assert evaluations[-1]["eval_f1"] == trained.metrics["after"]["f1"]


def test_words_beyond_the_length_count_as_outside(trained, tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(trained.output)
    assert tokenizer.model_max_length == tiny["max_length"]
    kept = [
        set(tokenizer(row["tokens"], is_split_into_words=True, truncation=True).word_ids()) for row in trained.rows
    ]
    cut = [
        (tag, guess)
        for row, words in zip(trained.rows, kept)
        for i, (tag, guess) in enumerate(zip(row["tags"], row["prediction"]))
        if i not in words
    ]
    assert {guess for _, guess in cut} == {"O"}
    assert {tag for tag, _ in cut} > {"O"}  # so some entities were missed for it
    train(recipe, {**tiny, "max_steps": 1}, tmp_path / "output")
    total = sum(len(row["tags"]) for row in trained.rows)
    assert (
        f"{len(cut)} of the {total} words of the validation data are beyond `--max_length`" in capsys.readouterr().out
    )


def test_words_without_a_token_count_as_outside(tiny, tmp_path):
    rows = [{"tokens": ["to", "\u200b", "Oslo"], "ner_tags": ["O", "B-mark", "B-place"]} for _ in range(8)]
    files = {f"{split}_file": write_rows(tmp_path / f"{split}.jsonl", rows) for split in ("train", "validation")}
    run = train(recipe, {**tiny, **files}, tmp_path / "output")
    assert all(row["prediction"] == ["O", "O", "B-place"] for row in run.rows)


def test_saved_adapter_gives_the_same_tags(trained, tiny):
    assert predict(trained.output, tiny["model_name_or_path"], [row["tokens"] for row in trained.rows]) == [
        row["prediction"] for row in trained.rows
    ]
    assert len({tag for row in trained.rows for tag in row["prediction"]}) > 2


def test_rows_keep_their_places_where_evaluation_is_grouped_by_length(tiny, tmp_path):
    run = train(recipe, {**tiny, "train_sampling_strategy": "group_by_length"}, tmp_path / "output")
    predicted = [row["prediction"] for row in run.rows]
    assert predicted == predict(run.output, tiny["model_name_or_path"], [row["tokens"] for row in run.rows])
    measured = measure(run.rows)
    assert {name: run.metrics["after"][name] for name in measured} == pytest.approx(measured)


def test_seed_decides_the_run(trained, tiny, tmp_path):
    same, other = train(recipe, tiny, tmp_path / "same"), train(recipe, {**tiny, "seed": 7}, tmp_path / "other")
    assert outcome(trained.output) == outcome(same.output)
    assert trained.metrics["after"]["loss"] != other.metrics["after"]["loss"]


def test_resumed_run_equals_an_uninterrupted_one(trained, tiny, tmp_path):
    checkpoint = trained.output / "checkpoint-20"
    resumed = train(recipe, {**tiny, "resume_from_checkpoint": checkpoint}, tmp_path / "resumed")
    name = "adapter_model.safetensors"
    assert (checkpoint / name).read_bytes() != (resumed.output / name).read_bytes()
    assert not (resumed.output / "checkpoint-20").exists()  # it did not begin at the beginning
    assert outcome(resumed.output) == outcome(trained.output)


def test_prompt_at_the_input(tiny, tmp_path):
    done = train(recipe, {**tiny, "depth": "INPUT", "max_steps": 4, "eval_strategy": "no"}, tmp_path)
    (prompt,) = (name for name in done.moved if "ptuning_encoders" in name)
    assert done.before[prompt].shape == (4, 32)


@pytest.mark.parametrize("method", ["peft_prefix", "lora", "head"])
def test_other_methods_run(tiny, tmp_path, method):
    run = train(recipe, {**tiny, "method": method}, tmp_path / "output")
    part = {"peft_prefix": "prompt_encoder", "lora": "lora_", "head": "classifier"}[method]
    assert any(part in name for name in run.moved)
    assert all(part in name or "classifier" in name for name in run.moved)


def test_test_file_is_measured_and_the_best_checkpoint_kept(tiny, tmp_path):
    test_file = write_rows(tmp_path / "test.jsonl", make_rows(10, 2))
    # The lowest F1 is called the best, so that it is the first of a run that learns.
    stopping = {"load_best_model_at_end": True, "greater_is_better": False, "early_stopping_patience": 1}
    run = train(recipe, {**tiny, **stopping, "max_steps": 100, "test_file": test_file}, tmp_path / "output")
    assert [row["tokens"] for row in run.rows] == [row["tokens"] for row in read_rows(test_file)]
    measured = measure(run.rows)
    assert {name: run.metrics["after"][name] for name in measured} == pytest.approx(measured)
    scores = {e["step"]: e["eval_f1"] for e in run.metrics["history"] if "eval_f1" in e}
    assert [*scores] == [20, 40]
    assert scores[20] < scores[40]
    name = "adapter_model.safetensors"
    assert (run.output / name).read_bytes() == (run.output / "checkpoint-20" / name).read_bytes()


def test_numbers_with_names_as_on_the_hub(tiny, tmp_path, monkeypatch):
    names = ["B-x", "I-x", "O"]
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=names))})
    rows = Dataset.from_dict({"words": [["so", "it", "is"]] * 8, "tags": [[2, 0, 1]] * 8}, features=features)
    monkeypatch.setattr(recipe, "load_data", lambda args, packaged: DatasetDict(train=rows, validation=rows))
    run = train(recipe, {**tiny, "tokens_column": "words", "tags_column": "tags"}, tmp_path / "output")
    assert run.model.config.id2label == dict(enumerate(names))
    assert [row["tags"] for row in run.rows] == [["O", "B-x", "I-x"]] * 8
    assert [row["prediction"] for row in run.rows] == [["O", "B-x", "I-x"]] * 8


GOOD = [{"tokens": ["to", "Oslo"], "ner_tags": ["O", "B-place"]}]
TEXT = [{"tokens": "to Oslo", "ner_tags": ["O", "B-place"]}]
NUMBERS = [{"tokens": ["a"], "ner_tags": [3]}]
OUTSIDE = [{"tokens": ["a"], "ner_tags": ["O"]}]


@pytest.mark.parametrize(
    ("changes", "train_rows", "validation_rows", "message"),
    [
        ({"tokens_column": "words"}, GOOD, GOOD, r"train data has no column 'words', only \['tokens', 'ner_tags'\]"),
        ({"tags_column": "tags"}, GOOD, GOOD, r"train data has no column 'tags', only \['tokens', 'ner_tags'\]"),
        ({}, TEXT, TEXT, "'tokens' of the train data has rows that are no list"),
        (
            {},
            GOOD,
            [*GOOD, {"tokens": [], "ner_tags": []}],
            "Row 2 of the validation data has no words in column 'tok",
        ),
        ({}, GOOD, [{"tokens": ["to", None], "ner_tags": ["O", "O"]}], "Row 1 of the validation data has no words in"),
        (
            {},
            [*GOOD, {"tokens": ["a", "b"], "ner_tags": ["O"]}],
            GOOD,
            "Row 2 of the train data has 2 'tokens' and 1 'ner_",
        ),
        (
            {},
            GOOD,
            [{"tokens": ["a"], "ner_tags": ["B-time"]}],
            r"validation data has tags .* train.* lacks: \['B-time'\]",
        ),
        (
            {},
            [{"tokens": ["a"], "ner_tags": [None]}, *GOOD],
            GOOD,
            "Row 1 of the train data has words without a tag in",
        ),
        (
            {},
            [*GOOD, {"tokens": ["a"], "ner_tags": ["NOUN"]}],
            GOOD,
            "Row 2 of the train data has 'NOUN' in column 'ner",
        ),
        ({}, NUMBERS, NUMBERS, "Row 1 of the train data has 3 in column 'ner_tags'"),
        ({}, OUTSIDE, OUTSIDE, r"'ner_tags' of the train data needs O and an entity"),
        ({}, NUMBERS, GOOD, r"train\.jsonl and .*validation\.jsonl can't be read as one table: "),
        ({"method": "peft_ptuning"}, GOOD, GOOD, "Stock P-tuning can't do token classification: "),
        (
            {"depth": "INPUT", "max_length": 61},
            GOOD,
            GOOD,
            "4 virtual tokens and `--max_length` 61 are 65 positions, and the model has 64",
        ),
    ],
)
def test_bad_input_is_refused_before_training(tiny, tmp_path, changes, train_rows, validation_rows, message):
    files = {
        "train_file": write_rows(tmp_path / "train.jsonl", train_rows),
        "validation_file": write_rows(tmp_path / "validation.jsonl", validation_rows),
    }
    with pytest.raises(ValueError, match=message):
        train(recipe, {**tiny, **files, **changes}, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_unlabelled_test_split_of_the_hub_is_refused(tiny, tmp_path, monkeypatch):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-x"]))})
    rows, blind = (
        Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [tags]}, features=features)
        for tags in ([0, 1], [-1, -1])
    )
    splits = DatasetDict(train=rows, validation=rows, test=blind)
    monkeypatch.setattr(recipe, "load_data", lambda args, packaged: splits)
    with pytest.raises(ValueError, match="Row 1 of the test data has words without a tag in column 'ner_tags'"):
        train(recipe, tiny, tmp_path / "output")


def test_metric():
    metric = evaluate.load(str(RECIPES / "metrics" / "entity_f1"), keep_in_memory=True)
    truth = [["B-x", "I-x", "O", "B-y"], ["B-x", "O"]]
    guess = [["B-x", "O", "O", "B-y"], ["B-x", "B-y"]]
    # 2 of 4 found are right, 2 of 3 were to be found, 4 of 6 words.
    expected = {"precision": 1 / 2, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 2 / 3}
    assert metric.compute(predictions=guess, references=truth) == pytest.approx(expected)
    nothing = metric.compute(predictions=[["O"] * 4, ["O"] * 2], references=truth)
    assert nothing == pytest.approx({"precision": 0, "recall": 0, "f1": 0, "accuracy": 2 / 6})


def test_generator_writes_the_committed_sentences(tmp_path):
    generate = runpy.run_path(str(JOURNEYS / "generate.py"))
    generate["main"](tmp_path)
    for split, count in (("train", 600), ("test", 200)):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (JOURNEYS / f"{split}.jsonl").read_bytes()
        assert len(sentences(split)) == len({" ".join(row["tokens"]) for row in sentences(split)}) == count
    assert not set(generate["TRAIN_TEMPLATES"]) & set(generate["TEST_TEMPLATES"])


def test_test_sentences_and_many_of_their_names_are_new():
    def texts(split):
        return {" ".join(row["tokens"]) for row in sentences(split)}

    def names(split):
        return [
            (" ".join(row["tokens"][start:end]), kind)
            for row in sentences(split)
            for start, end, kind in entities(row["ner_tags"])
        ]

    assert not texts("train") & texts("test")
    known = {name for name, _ in names("train")}
    new = [kind for name, kind in names("test") if name not in known]
    assert 0.4 < len(new) / len(names("test")) < 0.8
    assert set(new) == {"person", "origin", "destination", "date", "price"}
    cities = {name for name, kind in names("train") if kind == "origin"}
    assert cities & {name for name, kind in names("train") if kind == "destination"}  # the place alone does not tell
    card = (JOURNEYS / "README.md").read_text()
    for split in ("train", "test"):
        assert f"{len(sentences(split))} sentences with {len(names(split))} entities" in card
