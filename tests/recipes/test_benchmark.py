# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark from end to end on tiny models: it writes what it has measured. No test asks how fast."""

import json
import shutil
from types import SimpleNamespace

import benchmark
import benchmark_cases
import benchmark_report
import benchmark_runs
import numpy as np
import pytest
import torch
from tiny_recipes import RECIPES
from transformers import GPT2Config, GPT2LMHeadModel


POSITION_IDS = "Position ids are not supported for parameter efficient tuning"
RESULTS = RECIPES / "measure" / "results"


def run(folder, **arguments):
    """Runs the recipe and returns its folder, report and tables."""
    settings = {"model_size": "tiny", "device": "cpu", "rounds": 2, "warmup": 1, "output_dir": folder, **arguments}
    argv = []
    for name, value in settings.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    benchmark.main(argv)
    report = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder, report=report, tables=read_tables(folder / "benchmark.md"))


def read_tables(path):
    """The tables of a Markdown file by heading, each a list of rows by column."""
    tables = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = tables.setdefault(line[3:], [])
        elif line.startswith("|") and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {title: [dict(zip(header, row, strict=True)) for row in rows] for title, (header, *rows) in tables.items()}


def find(report, measure, method, batch_size):
    (result,) = [
        result
        for result in report["results"]
        if (result["measure"], result["method"], result["batch_size"]) == (measure, method, batch_size)
    ]
    return result


def as_cell(ratios):
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(
        tmp_path_factory.mktemp("done"),
        batch_sizes=[1, 2],
        text_lengths=[8],
        prompt_lengths=[3],
        methods=["ptuning", "peft_ptuning"],
        measures=["train_step", "prefill"],
    )


def test_files_and_what_they_say_of_the_run(done):
    names = {path.name for path in done.folder.iterdir()}
    plots = {"train_step_by_batch_size.png", "prefill_by_batch_size.png"}  # V has one value, so nothing against V
    assert names == {"benchmark.json", "benchmark.md", *plots}
    assert all((done.folder / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert done.report["settings"]["methods"] == ["base", "ptuning", "peft_ptuning"]
    assert done.report["machine"]["versions"]["torch"] == torch.__version__
    assert done.report["machine"]["threads"] == torch.get_num_threads()
    assert "to be compared within this file only" in done.report["note"]
    assert len(done.report["results"]) == 2 * 2 * 3
    assert all(len(result["raw"]) == 2 and result["unit"] == "seconds" for result in done.report["results"])


def test_tables_are_ratios_of_what_was_measured(done):
    assert list(done.tables) == ["Training step: time relative to the base", "Prefill: time relative to the base"]
    for measure, rows in zip(("train_step", "prefill"), done.tables.values()):
        assert [(row["B"], row["S"], row["V"]) for row in rows] == [("1", "8", "3"), ("2", "8", "3")]
        for row in rows:
            base, this, stock = (
                np.array(find(done.report, measure, method, int(row["B"]))["raw"])
                for method in ("base", "ptuning", "peft_ptuning")
            )
            assert row["this package"] == as_cell(this / base)
            assert row["PEFT P-tuning"] == as_cell(stock / base)
            assert row["PEFT P-tuning ÷ this"] == as_cell(stock / this)
            assert row.get("this ÷ base", as_cell(this / base)) == as_cell(this / base)
    limits = [row["limit of this ÷ base"] for row in done.tables["Training step: time relative to the base"]]
    assert limits == ["1.375", "1.188"]  # 1 + V / (B · S)


def test_absolute_values_are_written_on_a_gpu_only(done):
    assert " ms" not in (done.folder / "benchmark.md").read_text(encoding="utf-8")
    report = {**done.report, "settings": {**done.report["settings"], "device": "cuda"}}
    result = find(done.report, "prefill", "ptuning", 2)
    absolute = f"{1000 * np.median(result['raw']):.2f} ms, "
    assert absolute + benchmark_report.write_cell(result) in benchmark_report.write_tables(report)


def test_check_compares_with_the_concatenation(done, tmp_path, monkeypatch):
    assert len(done.report["checks"]) == 2
    assert all(entry["difference"] < 1e-5 < 1e-2 < entry["effect_of_the_prompt"] for entry in done.report["checks"])
    monkeypatch.setitem(benchmark_runs.TOLERANCE, "float32", -1.0)
    with pytest.raises(RuntimeError, match="differ from the base model's on the concatenation"):
        run(tmp_path / "none", shapes=["1,8,3"], methods=["ptuning"], measures=["prefill"])


@pytest.mark.filterwarnings(f"ignore:{POSITION_IDS}:UserWarning")
def test_tokens_per_second_is_a_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_cases.generate, "__defaults__", (4,))
    methods = ["ptuning", "peft_ptuning"]
    done = run(tmp_path, shapes=["2,8,3"], methods=methods, measures=["tokens_per_second"])
    base, this, stock = (
        np.array(find(done.report, "tokens_per_second", method, 2)["raw"]) for method in ("base", *methods)
    )
    ((row,),) = done.tables.values()
    assert row["this package"] == as_cell(base / this)
    assert row["this ÷ PEFT P-tuning"] == as_cell(stock / this)


def test_memory_is_measured_in_other_processes(tmp_path):
    done = run(tmp_path, shapes=["8,64,32"], methods=["peft_ptuning"], measures=["train_memory"])
    (base,), (stock,) = (find(done.report, "train_memory", method, 8)["raw"] for method in ("base", "peft_ptuning"))
    logits = 8 * 64 * 512 * 4
    assert logits < base < stock < 100 * logits
    ((row,),) = done.tables.values()
    assert row["PEFT P-tuning"] == f"{stock / base:.2f}"
    assert (tmp_path / "train_memory.png").exists()


def test_failing_method_is_written_down_and_the_rest_is_kept(tmp_path):
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")  # its attention has no q_proj
    done = run(
        tmp_path / "output",
        model_name_or_path=tmp_path / "model",
        shapes=["2,8,3", "1,8,3"],
        methods=["ptuning", "lora"],
        measures=["train_step", "prefill"],
    )
    for batch_size in (1, 2):
        result = find(done.report, "train_step", "lora", batch_size)
        assert result["error"].startswith("NoMatchingPeftModuleError: Target modules {")
        assert "raw" not in result
        assert len(find(done.report, "train_step", "ptuning", batch_size)["raw"]) == 2
    rows = [row for table in done.tables.values() for row in table]
    assert len(rows) == 4
    assert all(row["LoRA"] == "fails" and row["this package"] != "fails" for row in rows)
    text = (tmp_path / "output" / "benchmark.md").read_text(encoding="utf-8")
    assert text.count("LoRA fails: NoMatchingPeftModuleError: Target modules") == 2  # once under each table
    assert "(B 2, S 8, V 3), (B 1, S 8, V 3)" in text


def test_method_that_fails_in_a_step(tmp_path, monkeypatch):
    def fail(model, inputs, labels):
        if model.prompt_length == 3:
            raise MemoryError("too\nlarge")

    args = SimpleNamespace(rounds=2, warmup=1, seed=0, device="cpu")
    measure = benchmark_cases.Measure("some step", fail)
    models = {name: torch.nn.Linear(1, 1) for name in ("base", "ptuning", "lora")}
    for name, model in models.items():
        model.prompt_length = 3 if name == "lora" else 0
    seconds, errors = benchmark_runs.time_methods(measure, models, ({}, None), args)
    assert {name: len(values) for name, values in seconds.items()} == {"base": 2, "ptuning": 2}
    assert errors == {"lora": "MemoryError: too"}
    models["ptuning"].prompt_length = 3
    with pytest.raises(MemoryError):
        benchmark_runs.time_methods(measure, models, ({}, None), args)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_floor_passes_gradients_to_the_embeddings(architecture):
    args = benchmark_cases.BenchmarkArguments(architecture=architecture, model_size="tiny", device="cpu")
    base = benchmark_runs.load_base(args)
    seen = []
    base.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    benchmark_cases.train_step(base.train(), *benchmark_runs.make_batch(base, benchmark_cases.Shape(2, 8, 3), args))
    (embeds,) = seen
    assert embeds.shape == embeds.grad.shape == (2, 8, 64)
    assert embeds.grad.abs().sum(-1)[:, :-1].min() > 0  # the last token predicts none
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("method", [*benchmark_cases.DEFAULT_METHODS[1:], "ptuning_concatenated"])
def test_adapted_models_share_the_weights_of_the_base(method):
    args = benchmark_cases.BenchmarkArguments(model_size="tiny", device="cpu")
    base = benchmark_runs.load_base(args)
    model = benchmark_runs.adapt(base, method, 3, args)
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    assert shared <= {parameter.data_ptr() for parameter in model.parameters()}
    benchmark_cases.train_step(model.train(), *benchmark_runs.make_batch(base, benchmark_cases.Shape(2, 8, 3), args))
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert trained
    assert not shared & {parameter.data_ptr() for parameter in trained}
    assert type(base.model).__name__ == "LlamaModel"
    assert not any("lora" in name or "prompt" in name for name, _ in base.named_modules())


def test_encoder(tmp_path):
    measures = ["train_step", "forward"]
    done = run(tmp_path, architecture="bert", shapes=["2,8,4"], measures=measures)
    assert done.report["settings"]["methods"] == benchmark_cases.DEFAULT_METHODS
    assert all("raw" in result for result in done.report["results"])
    ((train,), (_,)) = done.tables.values()
    assert train["limit of this ÷ base"] == "1.500"  # 1 + V / S: the prompt is computed with every row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["ptuning", "p-tuning"]}, r"`--methods` are \['base', .*, got \['p-tuning'\]"),
        ({"measures": ["speed"]}, r"`--measures` of llama are \['train_step', .*, got \['speed'\]"),
        ({"measures": ["prefill"], "architecture": "bert"}, r"`--measures` of bert .*, got \['prefill'\]"),
        ({"shapes": ["1,8,2", "1,8"]}, r"three numbers each, B,S,V as in 16,32,100, got \['1,8,2', '1,8'\]"),
        ({"shapes": ["1,8,x"]}, "three numbers each"),
        ({"shapes": ["1,0,2"]}, r"must be at least 1, got \[\(1, 0, 2\)\]"),
        ({"shapes": ["1,8,2"], "batch_sizes": [1]}, "either `--shapes` or lists of sizes"),
        ({"rounds": 0}, "`--rounds` must be at least 1, got 0"),
        ({"warmup": 0}, "`--warmup` must be at least 1, got 0"),
        ({"device": "abacus"}, "`--device` is cpu or cuda, got 'abacus'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(benchmark, "load_base", None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "output", **arguments)
    assert not (tmp_path / "output").exists()


def test_sizes_default_to_the_target_shapes_or_the_whole_grid():
    shapes = benchmark_cases.complete(benchmark_cases.BenchmarkArguments())
    assert shapes == [(16, 32, 100), (16, 64, 50), (16, 128, 20), (1, 128, 20)]
    shapes = benchmark_cases.complete(benchmark_cases.BenchmarkArguments(prompt_lengths=[20]))
    assert shapes == [(b, s, 20) for b in (1, 4, 16, 32) for s in (32, 128, 512)]


def test_committed_tables_are_what_the_committed_numbers_say():
    files = sorted(RESULTS.glob("benchmark*/benchmark.json"))
    assert len(files) == 4
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        assert benchmark_report.write_tables(report) == file.with_suffix(".md").read_text(encoding="utf-8")


def test_plots_are_drawn_again_from_the_numbers(tmp_path, monkeypatch):
    results = RESULTS / "benchmark" / "benchmark.json"
    shutil.copy(results, tmp_path)
    figures = {}
    monkeypatch.setattr(
        benchmark_report.Figure, "savefig", lambda figure, path, **_: figures.update({path.name: figure})
    )
    monkeypatch.setattr(benchmark, "load_base", None)  # nothing is measured
    benchmark.main(["--plot_folder", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.json"}

    report = json.loads(results.read_text(encoding="utf-8"))
    panels = figures["overview.png"].axes
    assert len(panels) == len(benchmark_report.OVERVIEW) == 3
    for axes, name in zip(panels, benchmark_report.OVERVIEW):
        rows = benchmark_report.select(report, name).values()
        for bars in axes.containers:
            (method,) = [key for key, case in benchmark_cases.METHODS.items() if case.label == bars.get_label()]
            assert [bar.get_height() for bar in bars] == [row[method]["to_base"][1] for row in rows]
        assert len(axes.containers) == len(report["settings"]["methods"]) - 1


def test_overview_needs_all_its_measures(tmp_path):
    run(tmp_path, shapes=["1,8,3"], methods=["ptuning"], measures=["train_step"])
    assert not (tmp_path / "overview.png").exists()
