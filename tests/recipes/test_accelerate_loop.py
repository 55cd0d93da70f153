# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The recipe that is a loop of its own, from end to end on a tiny model."""

from types import SimpleNamespace

import accelerate_loop as recipe
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from shared import report
from tiny_recipes import FILES, outcome, read_metrics, read_rows, run, save_backbone, write_rows
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


EPOCHS = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run on a two-layer BERT and texts that one word gives away."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {"yes": ["sunny", "bright", "warm"], "no": ["rainy", "dark", "cold"]}
    rows = [{"text": f"day {i} is {words[label][i % 3]}", "label": label} for i in range(24) for label in words]
    model = save_backbone(folder / "model", [row["text"] for row in rows])
    return {
        "model_name_or_path": model,
        "train_file": write_rows(folder / "train.jsonl", rows[:36]),
        "validation_file": write_rows(folder / "validation.jsonl", rows[36:]),
        "max_length": 32,
        "num_virtual_tokens": 4,
        "encoder": "MLP",
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.02,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
    }


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(recipe, {**tiny, "output_dir": folder})
    return SimpleNamespace(folder=folder, metrics=read_metrics(folder))


def test_it_learns_and_writes_its_files(trained):
    found = {path.name for path in trained.folder.iterdir()}
    best = max(
        range(1, EPOCHS + 1),
        key=lambda epoch: [e["eval_accuracy"] for e in trained.metrics["history"] if "eval_accuracy" in e][epoch - 1],
    )
    files = FILES - {"training_args.bin"} | {"confusion_matrix.png"}
    assert found == files | {f"checkpoint-{EPOCHS}", f"checkpoint-{best}"}
    losses = [entry["loss"] for entry in trained.metrics["history"] if "loss" in entry]
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0]
    assert "python recipes/accelerate_loop.py --model_name_or_path" in (trained.folder / "README.md").read_text()


def test_its_adapter_gives_its_predictions(trained, tiny):
    config = AutoConfig.from_pretrained(trained.folder)
    base = AutoModelForSequenceClassification.from_pretrained(tiny["model_name_or_path"], config=config)
    model = PeftModel.from_pretrained(base, trained.folder).eval()
    rows = read_rows(trained.folder / "predictions.jsonl")
    batch = AutoTokenizer.from_pretrained(trained.folder)(
        [row["text"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        probabilities = model(**batch).logits.softmax(-1)
    assert [config.id2label[int(row.argmax())] for row in probabilities] == [row["prediction"] for row in rows]
    for row, expected in zip(probabilities, rows, strict=True):
        assert row.max().item() == pytest.approx(expected["probability"], abs=1e-5)
    accuracy = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    assert trained.metrics["after"]["accuracy"] == accuracy


def test_a_checkpoint_holds_no_backbone(trained):
    names = load_file(trained.folder / f"checkpoint-{EPOCHS}" / "adapter_model.safetensors")
    assert all("ptuning_encoders" in name or "classifier" in name for name in names)
    assert not list(trained.folder.rglob("model*.safetensors"))
    assert not (trained.folder / "unfinished").exists()


def test_seed_decides_the_run(trained, tiny, tmp_path):
    run(recipe, {**tiny, "output_dir": tmp_path / "same"})
    run(recipe, {**tiny, "output_dir": tmp_path / "other", "seed": 7})
    assert read_metrics(tmp_path / "same") == trained.metrics
    assert read_metrics(tmp_path / "other")["history"] != trained.metrics["history"]


def test_a_resumed_run_equals_an_uninterrupted_one(trained, tiny, tmp_path, monkeypatch):
    save_checkpoint = recipe.save_checkpoint

    def save_and_stop(accelerator, folder, history):
        save_checkpoint(accelerator, folder, history)
        if folder.name == "checkpoint-2":
            (tmp_path / "unfinished").mkdir()  # what a process that is killed while it saves would leave
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, {**tiny, "output_dir": tmp_path})
    assert not (tmp_path / "metrics.json").exists()
    with pytest.raises(ValueError, match="checkpoint last`: there is no whole checkpoint in .*empty"):
        run(recipe, {**tiny, "output_dir": tmp_path / "empty", "resume_from_checkpoint": "last"})
    run(recipe, {**tiny, "output_dir": tmp_path, "resume_from_checkpoint": "last"})
    assert read_metrics(tmp_path) == trained.metrics
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (trained.folder / name).read_bytes()


STOPS_EARLY = {"depth": "INPUT", "learning_rate": 0.5, "num_train_epochs": 12, "early_stopping_patience": 2}


@pytest.mark.parametrize("options", [{}, STOPS_EARLY])
def test_a_finished_run_that_is_resumed_stays_as_it_is(options, tiny, tmp_path):
    options = {**tiny, **options, "load_best_model_at_end": True, "output_dir": tmp_path}
    run(recipe, options)
    first = outcome(tmp_path)
    run(recipe, {**options, "resume_from_checkpoint": "last"})
    assert outcome(tmp_path) == first


def test_without_an_epoch_there_is_none_to_go_back_to(tiny, tmp_path):
    run(recipe, {**tiny, "num_train_epochs": 0, "load_best_model_at_end": True, "output_dir": tmp_path})
    metrics = read_metrics(tmp_path)
    assert metrics["history"] == []
    assert metrics["before"] == metrics["after"]


def test_deep_prompt_of_a_network(tiny, tmp_path):
    run(recipe, {**tiny, "depth": "DEEP", "num_train_epochs": 1, "output_dir": tmp_path})
    saved = load_file(tmp_path / "adapter_model.safetensors")
    keys = [tensor for name, tensor in saved.items() if ".keys." in name]
    assert [tuple(tensor.shape) for tensor in keys] == [(2, 4, 16)] * 2  # heads, V, width of a head
    assert any("mlp" in name for name in saved)
    assert read_metrics(tmp_path)["trained_parameters"] > read_metrics(tmp_path)["deployed_parameters"]


def test_the_best_epoch_comes_back(tiny, tmp_path):
    run(recipe, {**tiny, **STOPS_EARLY, "load_best_model_at_end": True, "output_dir": tmp_path})
    metrics = read_metrics(tmp_path)
    accuracies = [entry["eval_accuracy"] for entry in metrics["history"] if "eval_accuracy" in entry]
    best = accuracies.index(max(accuracies)) + 1
    assert len(accuracies) == min(12, best + 2)
    assert metrics["after"]["accuracy"] == max(accuracies) > accuracies[-1]


def test_accumulated_batches_are_one_large_batch(tiny, tmp_path):
    kept = {**tiny, "num_train_epochs": 1, "train_file": tiny["validation_file"]}  # 12 rows: 3 batches of 4
    run(recipe, {**kept, "per_device_train_batch_size": 12, "output_dir": tmp_path / "large"})
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    run(recipe, {**kept, **accumulated, "output_dir": tmp_path / "small"})
    large, small = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("large", "small"))
    for name, value in large.items():
        torch.testing.assert_close(value, small[name], rtol=0, atol=1e-3)  # of a step of 0.02


def test_head_only_is_saved_whole(tiny, tmp_path):
    options = {"method": "head", "encoder": "NONE", "num_train_epochs": 1}
    run(recipe, {**tiny, **options, "output_dir": tmp_path})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"


def test_it_is_pushed_without_checkpoints(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(report, "upload_folder", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(recipe, "create_repo", lambda name, **kwargs: SimpleNamespace(repo_id=f"someone/{name}"))
    options = {"num_train_epochs": 1, "push_to_hub": True, "hub_model_id": "prompt", "hub_token": "hf_secret"}
    run(recipe, {**tiny, **options, "output_dir": tmp_path})
    assert [(call["repo_id"], call["folder_path"], call["token"]) for call in calls] == [
        ("someone/prompt", tmp_path, "hf_secret")
    ]
    assert "checkpoint-*" in calls[0]["ignore_patterns"]
    assert "hf_secret" not in (tmp_path / "README.md").read_text()


def test_tensorboard_is_written_when_asked_for(tiny, tmp_path):
    run(recipe, {**tiny, "num_train_epochs": 1, "report_to": "tensorboard", "output_dir": tmp_path})
    assert list(tmp_path.rglob("events.out.tfevents.*"))
