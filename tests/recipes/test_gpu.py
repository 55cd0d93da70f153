# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What measures on a GPU, tried on a CPU with a tiny model: it runs to the end, in its time, and counts right."""

import json
import math

import benchmark_cases
import benchmark_report
import benchmark_runs
import gpu
import pytest
import roofline
import torch
from benchmark_cases import METHODS, Shape
from torch.utils.flop_counter import FlopCounterMode


SHAPES = [Shape(b, s, v) for v in (20, 100) for b in (1, 4, 16) for s in (128, 512, 2048)]


def run(folder, *arguments):
    gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--output_dir", str(folder), *arguments])
    return json.loads((folder / "cpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_cases.generate, "__defaults__", (2,))
        patch.setattr(gpu, "GENERATING", gpu.WAYS)  # PEFT's generate warns
        patch.setattr(gpu, "EVERY", (*gpu.WAYS, "ptuning_deep", "lora"))
        folder = tmp_path_factory.mktemp("done")
        return folder, run(folder, "--batch_sizes", "2")


def test_all_cells_are_measured_and_written(done) -> None:
    folder, report = done
    assert report["errors"] == []
    assert report["done"] == report["planned"] > 4
    assert all(result["raw"] for result in report["results"])
    assert {result["measure"] for result in report["results"]} == set(gpu.MEASURED)
    routes = {result["method"]: result["route"] for result in report["results"]}
    assert routes["ptuning_concatenated"].startswith("concatenated")
    assert routes["ptuning"] == "shared"
    (check,) = report["checks"]
    assert check["difference"] < 1e-5 < 1e-2 < check["effect_of_the_prompt"]
    text = (folder / "cpu.md").read_text(encoding="utf-8")
    assert "Tried on a CPU" in text
    assert text.count("| tiny | Training step | 2 | 8 | 3 |") == text.count("| tiny | Prefill | 2 | 8 | 3 |") == 1
    assert (folder / "cpu_tiny_ways.png").read_bytes().startswith(b"\x89PNG")


def test_tables_and_plots_are_made_without_matplotlib_or_later(done, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(done[1]), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(benchmark_report, "Figure", None)
        gpu.main(["--draw", str(file)])
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
    gpu.main(["--draw", str(file)])
    assert (tmp_path / "cpu_tiny_ways.png").exists()


def test_a_run_whose_time_is_up_writes_what_it_has(tmp_path) -> None:
    report = run(tmp_path, "--minutes", "1e-6")
    assert report["done"] == 0 < report["planned"]
    assert "0 of" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


def test_no_step_begins_after_the_deadline() -> None:
    calls = []
    measure = benchmark_cases.Measure("some step", lambda *_: calls.append(1))
    args = benchmark_cases.BenchmarkArguments(device="cpu", rounds=9, warmup=1)
    models = {"base": torch.nn.Linear(1, 1)}
    with pytest.raises(TimeoutError):
        benchmark_runs.time_methods(measure, models, (), args, deadline=-math.inf)
    assert calls == []
    seconds, _ = benchmark_runs.time_methods(measure, models, (), args, enough=-1.0)
    assert len(seconds["base"]) == 1  # a round is completed
    assert len(calls) == 2


def test_a_failing_method_is_noted_and_the_others_are_measured(tmp_path, monkeypatch) -> None:
    def fail(measure, model, batch, device, first=gpu.first_step):
        if getattr(model, "prompt_route", None) == "shared":
            raise torch.OutOfMemoryError("too large")
        return first(measure, model, batch, device)

    monkeypatch.setattr(gpu, "first_step", fail)
    monkeypatch.setattr(gpu, "plan", lambda *_: [gpu.Cell("tiny", Shape(2, 8, 3), "prefill", gpu.WAYS)])
    report = run(tmp_path)
    results = {result["method"]: result for result in report["results"]}
    assert results["ptuning"]["error"] == "OutOfMemoryError: too large"
    assert results["base"]["raw"]
    assert results["ptuning_concatenated"]["raw"]
    assert "this package fails: OutOfMemoryError" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


def test_the_plan_has_the_most_important_cells_first_and_each_once() -> None:
    cells = gpu.plan(["1b", "8b"], SHAPES, ("base_flex_attention",))
    assert len(cells) == len(set(cells))
    assert [cell.shape for cell in cells[:18]] == SHAPES
    assert {(cell.model_size, cell.measure, cell.methods) for cell in cells[:18]} == {("1b", "train_step", gpu.WAYS)}
    every = {(size, shape, name) for size in ("1b", "8b") for shape in SHAPES for name in gpu.MEASURED}
    assert {cell[:3] for cell in cells if cell.methods == gpu.EVERY} == every
    assert any("base_flex_attention" in cell.methods for cell in cells)


@pytest.mark.parametrize("measure", ["train_step", "prefill", "tokens_per_second"])
@pytest.mark.parametrize("method", gpu.EVERY)
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_the_arithmetic_is_that_of_a_step(method, measure, monkeypatch) -> None:
    """Against torch's own counter, which counts attention to all keys; beside narrow heads that is little."""
    monkeypatch.setattr(benchmark_cases.generate, "__defaults__", (4,))
    monkeypatch.setattr(roofline, "NEW_TOKENS", 4)
    args = benchmark_cases.BenchmarkArguments(model_size="tiny", device="cpu")
    base, shape = benchmark_runs.load_base(args), Shape(4, 8, 16)
    model, batch = benchmark_runs.adapt(base, method, 16, args), benchmark_runs.make_batch(base, shape, args)
    step = benchmark_cases.MEASURES[measure].step
    benchmark_runs.prepare(model, benchmark_cases.MEASURES[measure])
    if method == "lora" and measure != "train_step":
        pytest.skip("its own matrices count, too")
    if method == "ptuning_deep":
        if measure == "train_step":
            pytest.skip("torch's counter fails where an argument of a module is a leaf")
        model.requires_grad_(False)
    if METHODS[method].config_class is not None:
        step(model, *batch)  # stores the prompt's keys and values
    with FlopCounterMode(display=False) as counter:
        step(model, *batch)
    counted = counter.get_total_flops()
    least = roofline.least_seconds(base.config, measure, shape, method, roofline.Speed(1.0, math.inf, 4))
    assert least == pytest.approx(counted, rel=0.08)


def test_traffic_counts_where_there_is_little_to_compute() -> None:
    args = benchmark_cases.BenchmarkArguments(model_size="1b")
    config, shape = benchmark_runs.make_config(args), Shape(1, 128, 20)
    speed = roofline.Speed(1e15, 4e12, 2)
    first, tokens = (
        roofline.least_seconds(config, name, shape, "ptuning", speed) for name in ("first_token", "tokens_per_second")
    )
    weights = 2 * 1.0e9 / speed.bandwidth
    assert (tokens - first) / (benchmark_cases.NEW_TOKENS - 1) == pytest.approx(weights, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "`--device` is cpu or cuda, got 'abacus'"),
        (["--minutes", "0"], "`--minutes` must be above 0"),
        (["--rounds", "0"], "`--rounds` at least 1"),
        (["--batch_sizes", "0"], "must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tmp_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "output", *arguments)
    assert not (tmp_path / "output").exists()
