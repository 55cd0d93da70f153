# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods on tiny data: what is run, what is chosen, and what the table says."""

import dataclasses
import importlib
import json
import subprocess
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import compare
import compare_report
import evaluate
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import RECIPES, save_backbone, write_rows
from transformers import AutoModelForSequenceClassification


RATES = [0.001, 0.1]
CHANGED = ["num_virtual_tokens", "prompt_tuning_init", "lr_scheduler_type", "warmup_steps", "max_grad_norm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with two tasks, as `--data_folder` should look, and a tiny backbone."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{'good' if i % 2 else 'bad'} film number {i}" for i in range(60)]
    (folder / "sst2").mkdir()
    (folder / "wnut17").mkdir()
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    tagged = [{"tokens": text.split(), "ner_tags": ["O", "B-film", "I-film", "O"]} for text in texts]
    for split, part in (("train", slice(40)), ("test", slice(40, 60))):
        write_rows(folder / "sst2" / f"{split}.jsonl", rows[part])
        write_rows(folder / "wnut17" / f"{split}.jsonl", tagged[part])
    return SimpleNamespace(folder=folder, model=save_backbone(folder / "model", texts))


@pytest.fixture(name="runs")
def _runs(monkeypatch):
    """The commands that were run; here in this process, which takes a second and not ten."""
    commands = []

    def run(command, **kwargs):
        recipe = importlib.import_module(Path(command[1]).stem)
        commands.append(dict(zip(command[2::2], command[3::2])))
        try:
            recipe.main(command[2:])
        except ValueError as error:
            return SimpleNamespace(returncode=1, stderr=f"Traceback\nValueError: {error}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run))
    shorten(monkeypatch)
    return commands


def shorten(monkeypatch):
    """Texts that fit into the tiny backbone."""
    for name in ("sst2", "wnut17"):
        task = compare.TASKS[name]
        options = {**task.options, "max_length": 14, "per_device_train_batch_size": 8, "bf16": False}
        monkeypatch.setitem(compare.TASKS, name, dataclasses.replace(task, options=options))


def run(data, output, *words, methods=None, name="ablation"):
    arguments = ["--data_folder", str(data.folder), "--model_name_or_path", data.model, "--output_dir", str(output)]
    arguments += ["--learning_rates", *map(str, RATES), "--num_virtual_tokens", "4", "--max_steps", "3"]
    arguments += ["--workers", "1", "--held_out_rows", "10", *words]
    compare.main([*arguments, *(["--methods", *methods] if methods else [])])
    return json.loads((output / f"{'compare' if methods else name}.json").read_text())


def test_rates_are_chosen_on_training_rows_and_seeds_measured_on_the_test(data, runs, tmp_path):
    words = ["--tasks", "sst2", "--seeds", "2", "--search_seeds", "2"]
    rows = run(data, tmp_path, *words, methods=["ptuning", "lora", "head"])
    searches = [words for words in runs if "search_test" in words["--validation_file"]]
    tests = [words for words in runs if words not in searches]
    assert len(searches) == 3 * 2 * len(RATES)
    assert len(tests) == 3 * 2
    assert all("search_train" in words["--train_file"] for words in searches)
    assert all(Path(words["--train_file"]).name == "train.jsonl" for words in tests)
    assert all(Path(words["--validation_file"]).name == "test.jsonl" for words in tests)
    assert {words["--max_steps"] for words in runs} == {"3"}

    folder = tmp_path / "sst2"
    held_out = set((folder / "search_test.jsonl").read_text().splitlines())
    kept = set((folder / "search_train.jsonl").read_text().splitlines())
    train = set((data.folder / "sst2" / "train.jsonl").read_text().splitlines())
    assert len(held_out) == 10
    assert not held_out & kept
    assert held_out | kept == train

    for row in rows:
        measured = {
            path.parent.name: json.loads(path.read_text())["after"]["accuracy"]
            for path in (folder / row["method"]).glob("*/metrics.json")
        }
        assert row["search"] == {
            str(rate): [measured[f"search-lr{rate:g}-seed{seed}"] for seed in range(2)] for rate in RATES
        }
        assert mean(row["search"][str(row["learning_rate"])]) == max(map(mean, row["search"].values()))
        assert row["scores"] == [measured[f"test-lr{row['learning_rate']:g}-seed{seed}"] for seed in range(2)]
        assert not list((folder / row["method"]).rglob("*.safetensors"))
    head, lora = (next(row for row in rows if row["method"] == name) for name in ("head", "lora"))
    assert head["scores_before"] == lora["scores_before"]  # the same model: LoRA's B starts at 0
    assert head["deployed_parameters"] < lora["deployed_parameters"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_options_of_the_recipe_and_fewer_test_rows(data, runs, tmp_path):
    words = ["--tasks", "sst2", "--seeds", "1", "--test_rows", "6", "--methods", "head"]
    words += ["--recipe_options", "--max_length", "9"]
    run(data, tmp_path, *words, name="compare")
    assert {words["--max_length"] for words in runs} == {"9"}
    test = (data.folder / "sst2" / "test.jsonl").read_text().splitlines()
    used = (tmp_path / "sst2" / "test.jsonl").read_text().splitlines()
    assert len(test) > 6
    assert used == test[:6]
    with pytest.raises(ValueError, match="recipe_options="):
        run(data, tmp_path, *words[:-1], "10", name="compare")


def test_what_is_finished_is_not_run_again(data, runs, tmp_path):
    first = run(data, tmp_path, "--tasks", "sst2", "--seeds", "1", methods=["head"])
    count = len(runs)
    assert run(data, tmp_path, "--tasks", "sst2", "--seeds", "1", methods=["head"]) == first
    assert len(runs) == count
    run(data, tmp_path, "--tasks", "sst2", "--seeds", "2", methods=["head"])
    assert len(runs) == count + 1


def test_runs_of_other_settings_do_not_end_in_one_table(data, runs, tmp_path):
    words = ["--tasks", "sst2", "--seeds", "1", "--search_seeds", "1"]
    run(data, tmp_path, *words, methods=["head"])
    count = len(runs)
    with pytest.raises(
        ValueError,
        match=r"runs with num_virtual_tokens=4 \(now 6\), max_steps=3 \(now 5\): give another `--output_dir`",
    ):
        run(data, tmp_path, *words, "--max_steps", "5", "--num_virtual_tokens", "6", methods=["head"])
    assert len(runs) == count
    assert (tmp_path / "compare.json").is_file()


def test_one_change_at_a_time_at_the_rate_of_the_unchanged(data, runs, tmp_path):
    rows = run(data, tmp_path, "--tasks", "sst2", "--seeds", "2", "--search_seeds", "1", "--ablation")
    assert all("search_test" in words["--validation_file"] for words in runs)
    rate = max(rows[0]["search"], key=rows[0]["search"].get)
    assert {row["learning_rate"] for row in rows} == {float(rate)}
    assert [row["method"] for row in rows] == ["ptuning", *compare.CHANGES["ptuning"]]
    folders = [words["--output_dir"] for words in runs]
    assert len(folders) == len(set(folders)) == len(RATES) + 1 + 2 * len(compare.CHANGES["ptuning"])

    seen = set()
    plain = next(words for words in runs if words["--output_dir"].endswith(f"sst2/ptuning/search-lr{rate}-seed1"))
    for row in rows:
        metrics = [
            json.loads(
                (tmp_path / "sst2" / row["method"] / f"search-lr{rate}-seed{seed}" / "metrics.json").read_text()
            )
            for seed in range(2)
        ]
        assert row["scores"] == [found["after"]["accuracy"] for found in metrics]
        if row["method"] != "ptuning":
            (words,) = (
                found for found in runs if found["--output_dir"].endswith(f"{row['method']}/search-lr{rate}-seed1")
            )
            (changed,) = {name for name in words if words[name] != plain.get(name)} - {"--output_dir"}
            seen.add(changed)
    trained = {row["method"]: row["trained_parameters"] for row in rows}
    assert seen == {f"--{name}" for name in CHANGED}
    assert trained["length5"] < trained["length50"]
    table = (tmp_path / "ablation.md").read_text().splitlines()
    assert table[0] == f"| change | sst2, accuracy, rate {float(rate):g} |"
    assert len(table) == 2 + len(rows)
    scores = rows[1]["scores"]
    assert table[3] == f"| V = 5 | {mean(scores):.1%} ± {stdev(scores):.1%} ({min(scores):.1%}) |"


def test_a_deep_prompt_has_changes_of_its_own(data, runs, tmp_path, monkeypatch):
    wanted = {"deep_length5", "deep_zero_values", "deep_dropout0.1", "deep_mlp"}
    kept = {name: change for name, change in compare.CHANGES["ptuning_deep"].items() if name in wanted}
    monkeypatch.setitem(compare.CHANGES, "ptuning_deep", kept)
    words = ["--tasks", "sst2", "--seeds", "1", "--search_seeds", "1", "--ablation", "ptuning_deep"]
    rows = run(data, tmp_path, *words, name="ablation_ptuning_deep")
    assert [row["method"] for row in rows] == ["ptuning_deep", *kept]
    assert {words["--depth"] for words in runs} == {"DEEP"}
    changed = {Path(words["--output_dir"]).parent.name: words for words in runs}
    assert changed["deep_length5"]["--num_virtual_tokens"] == "5"
    assert changed["deep_zero_values"]["--prompt_tuning_init"] == "ZERO_VALUES"
    assert changed["deep_dropout0.1"]["--encoder_dropout"] == "0.1"
    assert changed["deep_mlp"]["--encoder"] == "MLP"
    table = (tmp_path / "ablation_ptuning_deep.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| none", *(f"| {kept[name].name}" for name in kept)]


def test_a_method_in_two_halves_starts_from_the_first(data, runs, tmp_path, monkeypatch):
    found = []
    original = compare._run_recipe

    def run_and_look(run, task, args, method, folder, *words):
        reason = original(run, task, args, method, folder, *words)
        found.append(load_file(folder / "adapter_model.safetensors"))
        return reason

    monkeypatch.setattr(compare, "_run_recipe", run_and_look)
    words = ["--tasks", "sst2", "--seeds", "1", "--learning_rates", "1e-9"]
    (row,) = run(data, tmp_path, *words, methods=["ptuning_unfolded"])
    first, second = runs
    assert [words["--max_steps"] for words in runs] == ["1", "2"]
    assert first["--depth"] == "INPUT"
    assert second["--depth"] == "DEEP"
    assert second["--prompt_tuning_init_adapter"] == first["--output_dir"]
    assert first["--seed"] == second["--seed"]
    assert second["--data_seed"] != first["--seed"]
    assert len(row["scores"]) == 1
    # At a rate of almost 0, keys and values still are those that the model makes of the vectors.
    base = AutoModelForSequenceClassification.from_pretrained(data.model)
    vectors = next(value for name, value in found[0].items() if name.endswith("embedding"))
    with torch.no_grad():
        hidden = base.bert.embeddings(inputs_embeds=vectors[None])
        keys = base.bert.encoder.layer[0].attention.self.key(hidden)[0]
    (saved,) = (value for name, value in found[1].items() if name.endswith("keys.0"))
    torch.testing.assert_close(saved.transpose(0, 1).flatten(1), keys, rtol=0, atol=1e-4)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_first_half_that_fails_is_the_reason(data, runs, tmp_path):
    words = ["--tasks", "sst2", "--seeds", "1", "--learning_rates", "0.1", "--num_virtual_tokens", "60"]
    (row,) = run(data, tmp_path, *words, methods=["ptuning_unfolded"])
    assert row["error"].startswith("ValueError: 60 virtual tokens and")
    assert len(runs) == 1


def test_no_change_is_tried_where_the_unchanged_refuses(data, runs, tmp_path):
    words = ["--tasks", "sst2", "--search_seeds", "1", "--ablation", "--num_virtual_tokens", "60"]
    with pytest.raises(ValueError, match="sst2: ValueError: 60 virtual tokens and"):
        run(data, tmp_path, *words)
    assert len(runs) == len(RATES)
    assert not (tmp_path / "ablation.json").exists()


def test_a_method_that_refuses_a_task_says_so_in_the_table(data, runs, tmp_path):
    methods = ["ptuning_deep", "peft_ptuning", "peft_prefix"]
    rows = run(data, tmp_path, "--tasks", "wnut17", "--seeds", "1", "--search_seeds", "1", methods=methods)
    assert rows[1]["error"].startswith("ValueError: Stock P-tuning can't do token classification")
    assert "scores" in rows[0]
    assert "scores" in rows[2]
    assert (
        rows[0]["deployed_parameters"] == rows[2]["deployed_parameters"]
    )  # keys and values of V tokens, and the head
    assert rows[1]["error"] in (tmp_path / "compare.md").read_text()


def test_a_killed_run_says_so_in_the_table(data, tmp_path, monkeypatch):
    killed = SimpleNamespace(returncode=-9, stderr="Map: 100%")
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=lambda command, **kwargs: killed))
    (row,) = run(data, tmp_path, "--tasks", "sst2", methods=["head"])
    assert row["error"] == "ended with status -9"


def test_the_table():
    scores = {"ptuning": [0.7, 0.8], "lora": [0.9, 0.9], "head": [0.5, 0.5]}
    rows = [
        {"task": "sst2", "method": method, "metric": "accuracy", "scores": values, "learning_rate": 0.03}
        | {"trained_parameters": 1234, "deployed_parameters": 567}
        for method, values in scores.items()
    ]
    table = compare_report.make_table(rows).splitlines()
    assert len(table) == 5
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    spread = stdev(scores["ptuning"])
    assert cells[:2] == ["sst2, accuracy", "this package, NONE"]
    assert cells[2] == f"{mean(scores['ptuning']):.1%} ± {spread:.1%} (70.0%) of 2"
    assert cells[3:] == ["62%", "0.03", "1,234", "567"]  # (75 - 50) / (90 - 50)

    rows[1]["scores_before"] = [0.4, 0.4]
    rows[2] = {"task": "sst2", "method": "head", "metric": "accuracy", "error": "no head"}
    assert "| 70% |" in compare_report.make_table(rows).splitlines()[2]  # (75 - 40) / (90 - 40)
    del rows[2]
    assert "%|" not in compare_report.make_table(rows).replace(" ", "").splitlines()[2]


def test_the_table_of_a_language_model():
    scores = {"ptuning": [0.3, 0.5], "lora": [0.6, 0.8]}
    rows = [
        {"task": "e2e_nlg", "method": method, "metric": "rouge_l", "scores": values, "scores_before": [0.2, 0.2]}
        | {"learning_rate": 0.03, "trained_parameters": 1234, "deployed_parameters": 567, "has_head": False}
        | {"others": {"bleu": {"before": [5.0, 6.0], "after": [40.0, 43.0 if method == "lora" else 30.0]}}}
        for method, values in scores.items()
    ]
    other = {"task": "sst2", "method": "head", "metric": "accuracy", "error": "no head"}
    title, _, ours, lora, untrained, failed = compare_report.make_table([*rows, other]).splitlines()
    widths = {line.count("|") for line in (title, ours, lora, untrained, failed)}
    assert len(widths) == 1
    assert " bleu |" in title
    assert "| 40% | 35.0 |" in ours  # (40 - 20) / (70 - 20), from the untrained model
    assert "| 100% | 41.5 |" in lora
    assert untrained == "| e2e_nlg, rouge_l | without training | 20.0% |  | 5.5 |  |  |  |"


def test_committed_tables_are_what_the_committed_numbers_say():
    results = RECIPES / "measure" / "results"
    files = sorted(results.glob("compare*/compare.json"))
    assert len(files) == 4
    for file in files:
        table = compare_report.make_table(json.loads(file.read_text(encoding="utf-8")))
        assert table + "\n" == file.with_suffix(".md").read_text(encoding="utf-8")
    file = results / "compare" / "ablation.json"
    table = compare_report.make_ablation_table(json.loads(file.read_text(encoding="utf-8")))
    assert table + "\n" == file.with_suffix(".md").read_text(encoding="utf-8")


def test_recipes_are_run_in_processes_of_their_own(data, tmp_path, monkeypatch):
    shorten(monkeypatch)
    seen = []

    def run_and_note(command, **kwargs):
        seen.append(kwargs["env"]["OMP_NUM_THREADS"])
        return subprocess.run(command, **kwargs)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run_and_note))
    words = ["--data_folder", str(data.folder), "--tasks", "sst2", "--model_name_or_path", data.model, "--seeds", "1"]
    words += ["--search_seeds", "1", "--methods", "head", "--max_steps", "2", "--held_out_rows", "10"]
    words += ["--num_virtual_tokens", "4"]
    compare.main([*words, "--learning_rates", "0.1", "--output_dir", str(tmp_path)])
    (row,) = json.loads((tmp_path / "compare.json").read_text())
    assert len(row["scores"]) == 1
    assert seen == ["1"]  # of a single rate, none is to be chosen


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="There is no file .*sst2/train.jsonl: `--data_folder` should hold"):
        compare.main(["--data_folder", str(tmp_path), "--tasks", "sst2", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_groups_of_rows_stay_together():
    lines = [str(i) for i in range(1000)]
    found = [int(line) for line in compare._spread(lines, 100, 20)]
    assert len(found) == len(set(found)) == 100
    assert sum(after - before == 1 for before, after in pairwise(found)) >= 95
    assert compare._spread(lines, 2000, 20) == lines
    assert [len(compare._spread(lines, count, 20)) for count in (5, 20, 30)] == [5, 20, 20]
    single = [int(line) for line in compare._spread(lines, 100, 1)]
    assert len(single) == 100
    assert {after - before for before, after in pairwise(single)} <= {10, 11}


def test_every_task_measures_what_its_recipe_writes():
    metrics = {
        "text_classification": {"accuracy": 0.5},
        "token_classification": {"f1": 0.5},
        "question_answering": {"f1": 0.5},
        "causal_lm": {"rouge_l": 50.0, "exact_match": 50.0},
    }
    for task in compare.TASKS.values():
        assert task.score({"after": metrics[task.recipe]}) == 0.5
    folder = RECIPES / "metrics"
    written = {
        "entity_f1": evaluate_on(folder / "entity_f1", [["B-x"]], [["B-x"]])["f1"],
        "squad_f1": evaluate_on(folder / "squad_f1", ["x"], [["x"]])["f1"],
        "bleu_rouge": evaluate_on(folder / "bleu_rouge", ["x"], [["x"]])["rouge_l"],
        "exact_match": evaluate_on(folder / "bleu_rouge", ["x"], [["x"]])["exact_match"],
        "accuracy_f1": evaluate_on(folder / "accuracy_f1", [0], [0])["accuracy"],
    }
    assert written == {"entity_f1": 1, "squad_f1": 1, "bleu_rouge": 100, "exact_match": 100, "accuracy_f1": 1}


def evaluate_on(folder, predictions, references):
    return evaluate.load(str(folder), keep_in_memory=True).compute(predictions=predictions, references=references)
