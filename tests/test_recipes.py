# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The classification recipes from end to end on a tiny model, and the data set that comes with them."""

import csv
import importlib.util
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import evaluate
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SPEECH_ACTS = RECIPES / "data" / "speech_acts"

LABELS = ["apology", "complaint", "congratulation", "invitation", "promise"]
LABELS += ["question", "refusal", "request", "thanks", "warning"]
TINY_LABELS = ("apology", "question", "thanks")
OUTPUTS = {"metrics.json", "predictions.jsonl", "confusion_matrix.png", "loss_curve.png", "adapter"}


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def recipe():
    """text_classification.py as a module; recipes are no package."""
    spec = importlib.util.spec_from_file_location("text_classification", RECIPES / "text_classification.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run on a two-layer BERT and a few rows of the data set."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = {}
    for split, file, count in (("train", "train.jsonl", 60), ("validation", "test.jsonl", 20)):
        rows[split] = [row for row in read_rows(SPEECH_ACTS / file) if row["label"] in TINY_LABELS][:count]

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *string.punctuation]
    pieces += ["##" + letter for letter in string.ascii_lowercase]
    words = Counter(word for row in rows["train"] for word in re.findall("[a-z]{2,}", row["text"].lower()))
    pieces += [word for word, _ in words.most_common(100)]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that different texts come out visibly different
    )
    BertModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {
        "model_name_or_path": str(folder / "model"),
        "train_file": write_rows(folder / "train.jsonl", rows["train"]),
        "validation_file": write_rows(folder / "validation.jsonl", rows["validation"]),
        "max_length": 40,
        "num_virtual_tokens": 4,
        "max_steps": 24,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "use_cpu": True,
    }


def run(recipe, arguments):
    recipe.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def trained(recipe, tiny, tmp_path_factory):
    """The output folder of one run, the model after it and copies of its parameters before it."""
    output = tmp_path_factory.mktemp("trained") / "output"
    seen = {}
    load_model = recipe.load_model

    def load_and_remember(*args):
        model, tokenizer = load_model(*args)
        seen.update(model=model, before={name: p.detach().clone() for name, p in model.named_parameters()})
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "load_model", load_and_remember)
        run(recipe, {**tiny, "output_dir": output})
    return SimpleNamespace(output=output, **seen)


def test_files_are_written(trained):
    assert {path.name for path in trained.output.iterdir()} == OUTPUTS
    for name in ("confusion_matrix.png", "loss_curve.png"):
        assert (trained.output / name).read_bytes().startswith(b"\x89PNG")


def test_prompt_and_head_move_and_the_backbone_stays(trained):
    moved = {name for name, p in trained.model.named_parameters() if not torch.equal(p.detach(), trained.before[name])}
    assert moved == {name for name in trained.before if "ptuning_encoders" in name or "modules_to_save" in name}
    assert len(moved) == 3  # prompt, weight and bias of the head


def test_adapter_holds_prompt_and_head_only(trained):
    shapes = {
        name: tuple(t.shape) for name, t in load_file(trained.output / "adapter/adapter_model.safetensors").items()
    }
    labels = len(trained.model.config.id2label)
    assert sorted(shapes.values()) == sorted([(4, 32), (labels, 32), (labels,)])


def test_metrics_agree_with_predictions(trained, tiny):
    rows = read_rows(trained.output / "predictions.jsonl")
    metrics = json.loads((trained.output / "metrics.json").read_text())
    given = read_rows(Path(tiny["validation_file"]))
    assert [(row["text"], row["label"]) for row in rows] == [(row["text"], row["label"]) for row in given]
    assert metrics["after"]["accuracy"] == sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert metrics["before"]["loss"] != metrics["after"]["loss"]
    assert len(metrics["train_loss"]) == tiny["max_steps"]
    assert len({row["prediction"] for row in rows}) > 1  # else the comparison with a fresh process says little


def test_saved_adapter_gives_the_same_labels_in_a_fresh_process(trained, tmp_path):
    rows = read_rows(trained.output / "predictions.jsonl")
    command = [sys.executable, str(RECIPES / "classify.py"), str(trained.output / "adapter")]
    result = subprocess.run(
        [*command, *(row["text"] for row in rows)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = [line.split(maxsplit=2) for line in result.stdout.splitlines()[-len(rows) :]]
    assert printed == [[row["prediction"], f"{row['probability']:.1%}", row["text"]] for row in rows]


def test_classify_has_sentences_of_its_own(trained, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("classify", RECIPES / "classify.py")
    classify = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(classify)
    known = {row["text"] for split in ("train", "test") for row in read_rows(SPEECH_ACTS / f"{split}.jsonl")}
    assert not known & set(classify.SENTENCES)
    classify.main([str(trained.output / "adapter")])
    out = capsys.readouterr().out
    assert all(sentence in out for sentence in classify.SENTENCES)


def test_seed_decides_the_run(recipe, tiny, trained, tmp_path):
    run(recipe, {**tiny, "output_dir": tmp_path / "same"})
    run(recipe, {**tiny, "output_dir": tmp_path / "other", "seed": 7})
    first, same, other = (
        folder / "metrics.json" for folder in (trained.output, tmp_path / "same", tmp_path / "other")
    )
    assert first.read_bytes() == same.read_bytes()
    assert json.loads(first.read_text())["train_loss"] != json.loads(other.read_text())["train_loss"]


def test_prompt_arguments_reach_the_adapter(recipe, tiny, tmp_path, capsys):
    prompt = {"encoder": "RESIDUAL", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "what does it do"}
    run(recipe, {**tiny, **prompt, "max_steps": 1, "output_dir": tmp_path})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["encoder_reparameterization_type"] == "RESIDUAL"
    assert config["prompt_tuning_init_text"] == "what does it do"
    assert config["num_virtual_tokens"] == tiny["num_virtual_tokens"]
    out = capsys.readouterr().out
    assert "trainable params" in out
    assert "accuracy before training" in out


def test_numbers_in_csv_as_labels(recipe, tiny, tmp_path):
    files = {}
    for split in ("train", "validation"):
        files[f"{split}_file"] = tmp_path / f"{split}.csv"
        with open(files[f"{split}_file"], "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence", "stars"), *((f"this is film {i}", i % 3 * 5) for i in range(12))])
    columns = {"text_column": "sentence", "label_column": "stars"}
    run(recipe, {**tiny, **files, **columns, "max_steps": 1, "output_dir": tmp_path / "output"})
    config = json.loads((tmp_path / "output" / "adapter" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "5", "2": "10"}
    assert {row["label"] for row in read_rows(tmp_path / "output" / "predictions.jsonl")} == {"0", "5", "10"}


def test_other_data_can_be_swapped_in_and_keep_their_names(recipe, tiny, tmp_path, monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "maybe"])})
    rows = Dataset.from_dict({"text": ["so it is", "not at all"] * 4, "label": [1, 0] * 4}, features=features)
    monkeypatch.setattr(recipe, "load_data", lambda args: DatasetDict(train=rows, validation=rows))
    run(recipe, {**tiny, "max_steps": 1, "output_dir": tmp_path})
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert [row["label"] for row in read_rows(tmp_path / "predictions.jsonl")] == ["yes", "no"] * 4


BAD = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


@pytest.mark.parametrize(
    ("changes", "train", "validation", "message"),
    [
        ({"text_column": "sentence"}, BAD, BAD, r"no column 'sentence', only \['text', 'label'\]"),
        ({"label_column": "stars"}, BAD, BAD, r"no column 'stars', only \['text', 'label'\]"),
        ({}, [], BAD, r"train\.jsonl is empty"),
        ({}, BAD, [], r"validation\.jsonl is empty"),
        ({}, BAD, [*BAD, {"text": "c", "label": "z"}], r"labels that the training data lacks: \['z'\]"),
        ({}, BAD[:1], BAD[:1], "one label only: 'x'"),
        ({}, [*BAD, {"text": "c", "label": None}], BAD, "'label' of the train data has rows without a label"),
        ({}, [*BAD, {"text": None, "label": "x"}], BAD, "'text' of the train data has rows that are no text"),
        ({"model_name_or_path": "./no/such/model"}, BAD, BAD, r"no model folder \./no/such/model"),
        (
            {"max_length": 61},
            BAD,
            BAD,
            "4 virtual tokens and `--max_length` 61 are 65 positions, and the model has 64",
        ),
        ({"train_file": "none.jsonl"}, BAD, BAD, "no file none.jsonl"),
        ({"dataset_name": "some/name"}, BAD, BAD, "either `--dataset_name` or files"),
        ({"num_virtual_tokens": 0}, BAD, BAD, "`num_virtual_tokens` must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_training(recipe, tiny, tmp_path, changes, train, validation, message):
    arguments = {
        **tiny,
        "train_file": write_rows(tmp_path / "train.jsonl", train),
        "validation_file": write_rows(tmp_path / "validation.jsonl", validation),
        "output_dir": tmp_path / "output",
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        run(recipe, arguments)
    assert not (tmp_path / "output").exists()


def test_csv_without_rows_is_refused(recipe, tiny, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    (tmp_path / "validation.csv").write_text("text,label\na,x\nb,y\n")
    files = {f"{split}_file": tmp_path / f"{split}.csv" for split in ("train", "validation")}
    with pytest.raises(ValueError, match=r"train\.csv is empty"):
        run(recipe, {**tiny, **files, "output_dir": tmp_path / "output"})
    assert not (tmp_path / "output").exists()


def test_default_backbone_is_checked(recipe, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: package)
    with pytest.raises(ValueError, match=f"has SHA-256 [0-9a-f]{{64}}, expected {recipe.MINILM_SHA256}"):
        recipe.find_model(None)
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        recipe.find_model(None)


def test_metric():
    metric = evaluate.load(str(RECIPES / "metrics" / "accuracy_f1"), keep_in_memory=True)
    result = metric.compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 2])
    # F1 by class: 2·2/(3+2), 0, 0.
    assert result == pytest.approx({"accuracy": 0.5, "macro_f1": 0.8 / 3})


@pytest.mark.parametrize(("split", "per_label"), [("train", 52), ("test", 20)])
def test_speech_acts_rows(split, per_label):
    rows = read_rows(SPEECH_ACTS / f"{split}.jsonl")
    assert all(list(row) == ["text", "label"] and row["text"].strip() == row["text"] != "" for row in rows)
    assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS, per_label)


def test_speech_acts_splits_share_no_near_duplicates():
    def words(split):
        return [set(re.findall(r"\w+", row["text"].lower())) for row in read_rows(SPEECH_ACTS / f"{split}.jsonl")]

    closest = max(len(a & b) / len(a | b) for a in words("train") for b in words("test"))
    assert 0 < closest < 0.6
