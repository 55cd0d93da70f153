# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes train what one does, with the accelerate configs of the recipes; gloo on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path

import accelerate_loop
import processes
import pytest
import text_classification
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from learnable import make_base
from peft import PeftModel
from safetensors.torch import load_file
from tiny_recipes import as_words, read_rows, save_backbone, write_rows
from train_distributed import DEADLINE, PROMPTED, TRAINED, collate, make_prompted, make_rows, prompt_of

from peft_ptuning_ext import make_model_card


HERE = Path(__file__).resolve().parents[1]
CONFIGS = HERE.parent / "recipes" / "accelerate"
LAUNCHED = ["ddp.yaml", "fsdp2.yaml"]
LAYERS = {"Llama": "LlamaDecoderLayer", "BERT": "BertLayer"}


def launch(config: str, *arguments: str) -> None:
    """`accelerate launch` with one of the recipes' configs."""
    program = ["--config_file", str(CONFIGS / config), *arguments]
    processes.launch("accelerate.commands.launch", *program, deadline=2 * DEADLINE)


@pytest.mark.parametrize("prompted", PROMPTED)
@pytest.mark.parametrize("config", LAUNCHED)
def test_two_processes_train_as_one(config, prompted, tmp_path) -> None:
    (family, options), is_sharded = PROMPTED[prompted], config == "fsdp2.yaml"
    route = "deep" if "prompt_depth" in options else "shared" if family == "Llama" else "conc"
    options = ["--fsdp_transformer_layer_cls_to_wrap", LAYERS[family]] if is_sharded else []
    launch(config, *options, str(HERE / "train_distributed.py"), prompted, str(tmp_path))
    for name, train in TRAINED.items():
        alone = train(prompted, tmp_path / "alone")
        assert (alone["prompt"] - prompt_of(make_prompted(prompted))).abs().max() > 1e-3
        # The folder may be there, but only the main process writes.
        assert not [path for path in tmp_path.glob(f"{name} 1/**/*") if path.is_file()]
        states = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("alone", f"{name} 0")]
        torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)
        # A model can make much of the last bit of a prompt, so logits are compared where the prompt is the same.
        loaded = PeftModel.from_pretrained(make_base(family), tmp_path / f"{name} 0")
        with torch.no_grad():
            logits = loaded(input_ids=collate(make_rows(prompted, len(alone["logits"]), seed=99))["input_ids"]).logits
        for process in range(2):
            result = torch.load(tmp_path / f"{name} {process}.pt")
            assert result.keys() == alone.keys()
            assert result["is_sharded"] == is_sharded
            torch.testing.assert_close(result["prompt"], alone["prompt"], rtol=0, atol=1e-6)
            torch.testing.assert_close(result["logits"], logits, rtol=0, atol=1e-5)
            for key in {"gradients", "losses", "watched"} & alone.keys():
                torch.testing.assert_close(result[key], alone[key], rtol=1e-5, atol=1e-6)
            assert result.get("card") == alone.get("card")
            assert result.get("route", route).startswith(route)


def test_weights_of_zero_3_are_not_read_twice(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = make_prompted("Llama").eval()
    batch = collate(make_rows("Llama", 3, seed=0))
    expected = model(**batch).loss
    assert model.prompt_route == "shared"
    # What DeepSpeed marks the parameters with that it has spread over processes.
    projection = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    projection.weight.ds_id = 0
    calls = []
    projection.register_forward_hook(lambda *_: calls.append(1))
    assert model.prompt_route == "shared"
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, expected, rtol=0, atol=1e-5)
    assert len(calls) == 1


def test_a_card_is_written_from_sizes_where_zero_3_has_partitioned_the_weights() -> None:
    model = make_prompted("BERT")
    expected = make_model_card(model, "adapter").text
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = parameter.new_empty(0)
    assert make_model_card(model, "adapter").text == expected


KINDS = {
    "ddp.yaml": "MULTI_GPU",
    "fsdp2.yaml": "FSDP",
    "deepspeed_zero2.yaml": "DEEPSPEED",
    "deepspeed_zero3.yaml": "DEEPSPEED",
    "tpu.yaml": "XLA",
}


def test_every_config_is_known() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_configs_load_and_say_how_they_are_launched(name) -> None:
    config = load_config_from_file(str(CONFIGS / name))
    assert config.distributed_type == KINDS[name]
    options = vars(launch_command_parser().parse_args(["a_script.py"]))
    for key in {**config.fsdp_config, **config.deepspeed_config}:
        assert key in options  # accelerate itself passes over keys that it does not know

    text = (CONFIGS / name).read_text(encoding="utf-8")
    header = text[: text.index("compute_environment")]
    command = f"#     accelerate launch --config_file recipes/accelerate/{name} recipes/text_classification.py"
    assert command in header.splitlines()
    assert ("Not run by the tests" in header) == (name == "tpu.yaml")


def test_a_recipe_in_two_processes_is_the_recipe_in_one(tmp_path) -> None:
    rows = [{"text": f"a {word} day, number {i}", "label": word} for i in range(24) for word in ("bright", "dark")]
    arguments = {
        "model_name_or_path": save_backbone(tmp_path / "model", [row["text"] for row in rows]),
        "train_file": write_rows(tmp_path / "train.jsonl", rows[:32]),
        "validation_file": write_rows(tmp_path / "validation.jsonl", rows[33:]),  # 15: not the same number for both
        "max_length": 40,
        "num_virtual_tokens": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 3,
        "use_cpu": True,
    }
    text_classification.main(as_words({**arguments, "per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}))
    two = {**arguments, "per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    launch("ddp.yaml", str(CONFIGS.parent / "text_classification.py"), *as_words(two))

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    states = {f"checkpoint-{step}/rng_state" for step in (3, 6)}
    expected = files(tmp_path / "one") - {f"{state}.pth" for state in states}
    assert files(tmp_path / "two") == expected | {f"{state}_{process}.pth" for state in states for process in (0, 1)}

    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    for key in ("loss", "prompt_shift", "prompt_effect"):
        values = [[entry[key] for entry in run["history"]] for run in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key
    for key in ("accuracy", "macro_f1"):  # the loss counts rows that fill up the last batch
        assert one["after"][key] == two["after"][key]
    predictions = [read_rows(tmp_path / name / "predictions.jsonl") for name in ("one", "two")]
    for row, other in zip(*predictions, strict=True):
        assert row["text"] == other["text"]
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_the_loop_in_two_processes_is_the_loop_in_one(tmp_path) -> None:
    rows = [{"text": f"a {word} day, number {i}", "label": word} for i in range(24) for word in ("bright", "dark")]
    arguments = {
        "model_name_or_path": save_backbone(tmp_path / "model", [row["text"] for row in rows]),
        "train_file": write_rows(tmp_path / "train.jsonl", rows[:32]),
        "validation_file": write_rows(tmp_path / "validation.jsonl", rows[32:]),
        "max_length": 40,
        "num_virtual_tokens": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "warmup_ratio": 0.25,  # whole steps in both
        "load_best_model_at_end": True,  # which reads a checkpoint
        "use_cpu": True,
    }
    accelerate_loop.main(as_words({**arguments, "per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}))
    two = {**arguments, "per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    launch("ddp.yaml", str(CONFIGS.parent / "accelerate_loop.py"), *as_words(two))
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    for entry, other in zip(one["history"], two["history"], strict=True):
        assert entry == pytest.approx(other, rel=1e-4)
    assert one["after"] == pytest.approx(two["after"], rel=1e-4)
    checkpoints = sorted(path.name for path in (tmp_path / "one").glob("checkpoint-*"))
    assert checkpoints == sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*"))
    assert not [path for name in ("model*", "pytorch_model*") for path in (tmp_path / "two").rglob(name)]
    assert (tmp_path / "two" / checkpoints[0] / "adapter_model.safetensors").is_file()
