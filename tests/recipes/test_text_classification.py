# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The text classification recipe and classify.py from end to end on a tiny model, their metric and data set."""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import classify
import evaluate
import pytest
import text_classification as recipe
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from shared import report
from tiny_recipes import (
    FILES,
    PLOTS,
    RECIPES,
    assert_deep_prompt_is_saved,
    losses,
    outcome,
    read_metrics,
    read_rows,
    run,
    save_backbone,
    train,
    write_rows,
)


SPEECH_ACTS = RECIPES / "data" / "speech_acts"

LABELS = ["apology", "complaint", "congratulation", "invitation", "promise"]
LABELS += ["question", "refusal", "request", "thanks", "warning"]
TINY_LABELS = ("apology", "question", "thanks")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run on a two-layer BERT and a few rows of the data set."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = {}
    for split, file, count in (("train", "train.jsonl", 60), ("validation", "test.jsonl", 20)):
        rows[split] = [row for row in read_rows(SPEECH_ACTS / file) if row["label"] in TINY_LABELS][:count]

    model = save_backbone(folder / "model", [row["text"] for row in rows["train"]])
    return {
        "model_name_or_path": model,
        "train_file": write_rows(folder / "train.jsonl", rows["train"]),
        "validation_file": write_rows(folder / "validation.jsonl", rows["validation"]),
        "max_length": 40,
        "num_virtual_tokens": 4,
        "max_steps": 24,
        "save_strategy": "no",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "use_cpu": True,
    }


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return train(recipe, tiny, tmp_path_factory.mktemp("trained") / "output")


def test_files_are_written(trained):
    plots = {*PLOTS, "confusion_matrix.png"}
    assert {path.name for path in trained.output.iterdir()} == FILES | plots
    for name in plots:
        assert (trained.output / name).read_bytes().startswith(b"\x89PNG")


def test_prompt_and_head_move_and_the_backbone_stays(trained):
    assert trained.moved == {
        name for name in trained.before if "ptuning_encoders" in name or "modules_to_save" in name
    }
    assert len(trained.moved) == 2 * 2 + 2  # keys and values of two layers, weight and bias of the head


def test_adapter_holds_prompt_and_head_only(trained):
    shapes = {name: tuple(t.shape) for name, t in load_file(trained.output / "adapter_model.safetensors").items()}
    labels = len(trained.model.config.id2label)
    assert sorted(shapes.values()) == sorted([(2, 4, 16)] * 4 + [(labels, 32), (labels,)])
    assert_deep_prompt_is_saved(trained, 4, 2, "RANDOM")


def test_metrics_agree_with_predictions(trained, tiny):
    rows, metrics = trained.rows, trained.metrics
    given = read_rows(Path(tiny["validation_file"]))
    assert [(row["text"], row["label"]) for row in rows] == [(row["text"], row["label"]) for row in given]
    assert metrics["after"]["accuracy"] == sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert metrics["before"]["loss"] != metrics["after"]["loss"]
    assert len(losses(metrics)) == tiny["max_steps"]
    assert len({row["prediction"] for row in rows}) > 1  # else the comparison with a fresh process says little


def test_saved_adapter_gives_the_same_labels_in_a_fresh_process(trained, tmp_path):
    rows = trained.rows
    command = [sys.executable, str(RECIPES / "classify.py"), str(trained.output)]
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


def test_classify_has_sentences_of_its_own(trained, capsys):
    known = {row["text"] for split in ("train", "test") for row in read_rows(SPEECH_ACTS / f"{split}.jsonl")}
    assert not known & set(classify.SENTENCES)
    classify.main([str(trained.output)])
    out = capsys.readouterr().out
    assert all(sentence in out for sentence in classify.SENTENCES)


def test_seed_decides_the_run(tiny, trained, tmp_path):
    run(recipe, {**tiny, "output_dir": tmp_path / "same"})
    run(recipe, {**tiny, "output_dir": tmp_path / "other", "seed": 7})
    name = "metrics.json"
    assert (trained.output / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert outcome(trained.output) == outcome(tmp_path / "same")
    assert losses(trained.metrics) != losses(read_metrics(tmp_path / "other"))


def test_prompt_arguments_reach_the_adapter(tiny, tmp_path, capsys):
    prompt = {
        "depth": "INPUT",
        "encoder": "RESIDUAL",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "what does it do",
    }
    run(recipe, {**tiny, **prompt, "max_steps": 1, "output_dir": tmp_path})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["encoder_reparameterization_type"] == "RESIDUAL"
    assert config["prompt_tuning_init_text"] == "what does it do"
    assert config["num_virtual_tokens"] == tiny["num_virtual_tokens"]
    out = capsys.readouterr().out
    assert re.search(r"ptuning: [\d,]+ of [\d,]+ parameters are trained \(.*%\), 227 of them deployed", out)
    assert "accuracy before training" in out


def test_deep_prompt(tiny, tmp_path):
    deep = {"depth": "DEEP", "prompt_tuning_init": "ZERO_VALUES", "encoder_dropout": 0.1}
    done = train(recipe, {**tiny, **deep, "max_steps": 4}, tmp_path)
    assert_deep_prompt_is_saved(done, tiny["num_virtual_tokens"], 2, "ZERO_VALUES")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["encoder_dropout"] == 0.1


def test_deep_prompt_of_a_network_is_deployed_without_it(tiny, tmp_path):
    plain, network = tmp_path / "plain", tmp_path / "network"
    run(recipe, {**tiny, "depth": "DEEP", "max_steps": 1, "output_dir": plain})
    run(recipe, {**tiny, "depth": "DEEP", "encoder": "MLP", "max_steps": 1, "output_dir": network})
    plain, network = read_metrics(plain), read_metrics(network)
    assert network["deployed_parameters"] == plain["deployed_parameters"]
    assert network["trained_parameters"] > network["deployed_parameters"]


def test_deep_prompt_takes_no_positions_of_the_text(tiny, tmp_path):
    long = {**tiny, "max_length": 62, "max_steps": 1, "output_dir": tmp_path}
    with pytest.raises(ValueError, match=r"4 virtual tokens and `--max_length` 62 are 66 positions, .* has 64"):
        run(recipe, {**long, "depth": "INPUT"})
    run(recipe, {**long, "depth": "DEEP"})


def test_numbers_in_csv_as_labels(tiny, tmp_path):
    files = {}
    for split in ("train", "validation"):
        files[f"{split}_file"] = tmp_path / f"{split}.csv"
        with open(files[f"{split}_file"], "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence", "stars"), *((f"this is film {i}", i % 3 * 5) for i in range(12))])
    columns = {"text_column": "sentence", "label_column": "stars"}
    run(recipe, {**tiny, **files, **columns, "max_steps": 1, "output_dir": tmp_path / "output"})
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "5", "2": "10"}
    assert {row["label"] for row in read_rows(tmp_path / "output" / "predictions.jsonl")} == {"0", "5", "10"}


def test_other_data_can_be_swapped_in_and_keep_their_names(tiny, tmp_path, monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "maybe"])})
    rows = Dataset.from_dict({"text": ["so it is", "not at all"] * 4, "label": [1, 0] * 4}, features=features)
    unlabelled = rows.map(lambda row: {"label": -1})  # as the test splits of GLUE
    splits = DatasetDict(train=rows, validation=rows, test=unlabelled)
    monkeypatch.setattr(recipe, "load_data", lambda *args: splits)
    run(recipe, {**tiny, "max_steps": 1, "output_dir": tmp_path})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert [row["label"] for row in read_rows(tmp_path / "predictions.jsonl")] == ["yes", "no"] * 4


def test_accumulated_batches_are_one_large_batch(tiny, tmp_path):
    outcomes = []
    for batch, steps in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3}
        run(recipe, {**tiny, **sizes, "eval_strategy": "no", "output_dir": tmp_path})
        history = read_metrics(tmp_path)["history"]
        outcomes.append([value for entry in history for value in (entry["loss"], entry["grad_norm"])])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)


def test_predictions_stand_beside_their_texts_when_evaluation_is_grouped_by_length(tiny, trained, tmp_path):
    run(recipe, {**tiny, "train_sampling_strategy": "group_by_length", "max_steps": 1, "output_dir": tmp_path})
    rows, given = read_rows(tmp_path / "predictions.jsonl"), read_rows(Path(tiny["validation_file"]))
    assert [(row["text"], row["label"]) for row in rows] == [(row["text"], row["label"]) for row in given]
    accuracy = read_metrics(tmp_path)["after"]["accuracy"]
    assert sum(row["label"] == row["prediction"] for row in rows) / len(rows) == accuracy


def test_resuming_from_the_last_checkpoint(tiny, tmp_path):
    saving = {**tiny, "save_strategy": "steps", "save_steps": 12, "output_dir": tmp_path}
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        run(recipe, {**saving, "resume_from_checkpoint": "last"})
    run(recipe, saving)
    straight = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "checkpoint-24" / "trainer_state.json").write_text("{")  # as if killed while it was written
    run(recipe, {**saving, "resume_from_checkpoint": "last"})
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == straight


@pytest.mark.parametrize(
    ("method", "trained_names"),
    [
        ("peft_ptuning", {"prompt_encoder", "classifier"}),
        ("peft_prefix", {"prompt_encoder", "classifier"}),
        ("lora", {"lora_A", "lora_B", "classifier"}),
        ("head", {"classifier"}),
    ],
)
def test_other_methods_train_the_same_thing(tiny, tmp_path, method, trained_names):
    done = train(recipe, {**tiny, "method": method, "learning_rate": 0.01, "max_steps": 80}, tmp_path)
    assert {next(part for part in trained_names if part in name) for name in done.moved} == trained_names
    history = losses(done.metrics)
    assert sum(history[-8:]) < sum(history[:8])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == ("transformers" if method == "head" else "peft")
    assert card.text.count("\n\n## Training\n\n") == 1
    assert f"`--method {method}` on a frozen model" in card.text
    assert f"{done.metrics['trained_parameters']:,} parameters were trained" in card.text


def test_a_network_is_not_counted_as_deployed(tiny, tmp_path, capsys):
    run(recipe, {**tiny, "depth": "INPUT", "encoder": "MLP", "max_steps": 1, "output_dir": tmp_path})
    metrics = read_metrics(tmp_path)
    assert metrics["deployed_parameters"] == 4 * 32 + (32 + 1) * len(TINY_LABELS)  # the prompt and the head
    assert metrics["trained_parameters"] > metrics["deployed_parameters"]
    assert f"{metrics['trained_parameters']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "peft_ptuning", "encoder": "RESIDUAL"}, "the encoders MLP and LSTM"),
        ({"method": "peft_ptuning", "prompt_tuning_init": "SAMPLE_VOCAB"}, "starts at random only"),
        ({"method": "peft_ptuning", "depth": "DEEP"}, "Stock P-tuning stands at the input"),
        ({"method": "peft_prefix", "depth": "INPUT"}, "`--depth` has no meaning with `--method peft_prefix`"),
        ({"method": "lora", "encoder": "MLP"}, "`--encoder` is about a prompt, and `--method lora` has none"),
        ({"method": "lora", "depth": "DEEP"}, "`--depth` is about a prompt, and `--method lora` has none"),
        ({"depth": "DEEP", "encoder": "LSTM"}, "'LSTM' makes vectors for the input, and prompt_depth is 'DEEP'"),
        (
            {"depth": "INPUT", "prompt_tuning_init": "ZERO_VALUES"},
            "'ZERO_VALUES' is only used with prompt_depth='DEEP'",
        ),
        ({"depth": "INPUT", "encoder": "NONE", "encoder_dropout": 0.1}, "`encoder_dropout` has no meaning with"),
    ],
)
def test_arguments_that_a_method_lacks_are_refused(tiny, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, {**tiny, **arguments, "output_dir": tmp_path / "output"})
    assert not (tmp_path / "output").exists()


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tiny, tmp_path):
    saving = {**tiny, "save_strategy": "steps", "save_steps": 12, "output_dir": tmp_path}
    run(recipe, saving)
    straight = outcome(tmp_path)
    run(recipe, {**saving, "resume_from_checkpoint": tmp_path / "checkpoint-12"})
    assert outcome(tmp_path) == straight


def test_early_stopping_keeps_the_best(tiny, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    options |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "max_steps": 200, "learning_rate": 1.0}
    run(recipe, {**tiny, **options, "output_dir": tmp_path})
    metrics = read_metrics(tmp_path)
    found = [entry["eval_accuracy"] for entry in metrics["history"] if "eval_accuracy" in entry]
    assert metrics["after"]["accuracy"] == max(found)
    assert found[-1] <= max(found[:-2])
    assert len(found) < 200 / 4


def test_a_test_split_is_measured_and_not_chosen_on(tiny, tmp_path):
    rows = read_rows(Path(tiny["validation_file"]))
    files = {"validation_file": write_rows(tmp_path / "validation.jsonl", rows[:12])}
    files["test_file"] = write_rows(tmp_path / "test.jsonl", rows[12:])
    run(
        recipe,
        {
            **tiny,
            **files,
            "max_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "output_dir": tmp_path / "output",
        },
    )
    assert [row["text"] for row in read_rows(tmp_path / "output/predictions.jsonl")] == [r["text"] for r in rows[12:]]
    metrics = read_metrics(tmp_path / "output")
    evaluated = [entry for entry in metrics["history"] if "eval_loss" in entry]
    assert metrics["after"]["loss"] not in [entry["eval_loss"] for entry in evaluated]


def test_tensorboard_sees_the_prompt(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(recipe, {**tiny, "max_steps": 2, "report_to": "tensorboard", "output_dir": tmp_path})
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*"))))
    events.Reload()
    names = ("loss", "prompt_norm_keys_0", "prompt_norm_values_1", "prompt_grad_norm", "prompt_effect")
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])


def test_model_card_is_the_packages_and_says_how_it_was_trained(tiny, trained, monkeypatch):
    card, metrics = ModelCard.load(trained.output / "README.md"), trained.metrics
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == pytest.approx(
        metrics["after"], abs=1e-6
    )
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    assert {"p-tuning", "peft_ptuning_ext"} <= set(card.data.tags)
    assert "| prompt | keys and values of 4 positions in each of 2 layers, encoder `NONE` |" in card.text
    assert card.text.count("\n\n## Training\n\n") == 1
    before, after = metrics["before"]["accuracy"], metrics["after"]["accuracy"]
    assert f"| accuracy | {before:.4f} | {after:.4f} |" in card.text
    command = re.search(r"```bash\n(.*?)\n```", card.text, flags=re.DOTALL)[1]
    assert command.startswith("python recipes/text_classification.py --model_name_or_path ")
    assert "--num_virtual_tokens 4" in command
    monkeypatch.chdir(trained.output.parent)
    names = {}
    exec(re.search(r"```python\n(.*?)\n```", card.text, flags=re.DOTALL)[1], names)
    state = names["model"].state_dict()
    for name, tensor in trained.model.state_dict().items():
        if "original_module" not in name:  # a head that is new in every process
            assert torch.equal(tensor, state[name]), name


def test_the_folder_is_pushed_without_checkpoints_and_the_token_stays_here(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(report, "upload_folder", lambda **kwargs: calls.append(kwargs))
    trainer = recipe.Trainer
    monkeypatch.setattr(
        trainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "someone/prompt")
    )
    monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda self, folder: None)
    run(recipe, {**tiny, "max_steps": 1, "push_to_hub": True, "hub_token": "hf_secret", "output_dir": tmp_path})
    assert len(calls) == 1
    assert calls[0]["repo_id"] == "someone/prompt"
    assert calls[0]["token"] == "hf_secret"
    assert "checkpoint-*" in calls[0]["ignore_patterns"]
    assert "hf_secret" not in (tmp_path / "README.md").read_text()
    assert 'from_pretrained("someone/prompt"' in (tmp_path / "README.md").read_text()


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
        (
            {},
            *[[{**row, "label": [1]} for row in BAD]] * 2,
            "'label' of the train data has rows that are no text or",
        ),
        ({}, *[[{**row, "label": {"a": 1}} for row in BAD]] * 2, "'label' of the train data has rows that are no t"),
        ({"model_name_or_path": "./no/such/model"}, BAD, BAD, r"no model folder \./no/such/model"),
        (
            {"depth": "INPUT", "max_length": 61},
            BAD,
            BAD,
            "4 virtual tokens and `--max_length` 61 are 65 positions, and the model has 64",
        ),
        ({"train_file": "none.jsonl"}, BAD, BAD, "no file none.jsonl"),
        ({"dataset_name": "some/name"}, BAD, BAD, "either `--dataset_name` or files"),
        ({"num_virtual_tokens": 0}, BAD, BAD, "`num_virtual_tokens` must be from 1 to"),
    ],
)
def test_bad_input_is_refused_before_training(tiny, tmp_path, changes, train, validation, message):
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


def test_csv_without_rows_is_refused(tiny, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    (tmp_path / "validation.csv").write_text("text,label\na,x\nb,y\n")
    files = {f"{split}_file": tmp_path / f"{split}.csv" for split in ("train", "validation")}
    with pytest.raises(ValueError, match=r"train\.csv is empty"):
        run(recipe, {**tiny, **files, "output_dir": tmp_path / "output"})
    assert not (tmp_path / "output").exists()


def test_names_of_classes_are_not_read_as_formulas(tmp_path):
    report.plot_confusion([0, 1, 2], [0, 1, 1], [r"$\foo$", "$5 to $6", r"\$"], tmp_path)
    assert (tmp_path / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")


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
