# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Runs prompts of this package in PEFT's own comparison of methods (MetaMathQA and GSM8K), by PEFT's own program.

It needs a checkout of PEFT, a GPU, the Hub and Llama-3.2-3B. From the root of this repository:

    git clone https://github.com/huggingface/peft
    python recipes/measure/metamath.py input --peft peft
    python recipes/measure/metamath.py deep --peft peft

The experiments are the functions below. One is written into the checkout, as PEFT asks for, and PEFT's `run.py` runs
it: 5,000 steps of 4 rows, then the test set of GSM8K. The result is a file of PEFT's format in its folder `results` or
`temporary_results`. Numbers that PEFT publishes there: P-tuning 35.0%, prompt tuning 34.3%, prefix tuning that starts
at a text 41.6%, LoRA of rank 32 47.8%.

`--model_id`, `--max_steps` and `--eval_steps` try the whole with a smaller model in fewer steps.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from peft_ptuning_ext import PTuningConfig


FOLDER = Path("method_comparison", "MetaMathQA")
METHOD = "ptuning_ext"

# Where the prompts start: the format that the answers have, in our words.
TEXT = (
    "Solve the problem with short steps, one calculation in each, and check the result. The last line has the number "
    "alone, like this. The answer is: 42"
)

# What runs PEFT's program. A config from a file never makes a tokenizer load, so the prompt would start at random; a
# copy of the config is one of the caller's.
PROGRAM = """
import dataclasses, runpy, sys
import peft, peft_ptuning_ext
load = peft.PeftConfig.from_pretrained
peft.PeftConfig.from_pretrained = lambda path: dataclasses.replace(load(path), peft_type=None)
sys.path.insert(0, "")
runpy.run_path("run.py", run_name="__main__")
"""


def make_config(model_id: str, depth: str, length: int) -> PTuningConfig:
    """The config of a prompt that starts at TEXT."""
    return PTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prompt_depth=depth,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=model_id,
    )


# By name: depth, V and learning rate. The optimizer's weight decay would pull a prompt to 0.
EXPERIMENTS = {"input": ("INPUT", 50, 5e-3), "deep": ("DEEP", 50, 5e-3)}


def write_experiment(folder: Path, name: str, options: dict) -> Path:
    """Writes an experiment into PEFT's folder, and returns its path inside.

    Args:
        folder (`Path`): The folder of the comparison.
        name (`str`): Which experiment.
        options (`dict`): Fields of PEFT's training parameters that are not at their defaults.

    Raises:
        ValueError: `folder` is none of a checkout of PEFT.
    """
    defaults = folder / "default_training_params.json"
    if not defaults.is_file():
        raise ValueError(f"{folder} has no {defaults.name}: `--peft` should be the folder of a checkout of PEFT.")
    depth, length, learning_rate = EXPERIMENTS[name]
    settings = {"optimizer_kwargs": {"lr": learning_rate, "weight_decay": 0.0}, **options}
    model_id = settings.get("model_id") or json.loads(defaults.read_text(encoding="utf-8"))["model_id"]
    path = Path("experiments", METHOD, name)
    (folder / path).mkdir(parents=True, exist_ok=True)
    make_config(model_id, depth, length).save_pretrained(str(folder / path))
    (folder / path / "training_params.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--peft", type=Path, default=Path("peft"), help="Folder of a checkout of PEFT.")
    parser.add_argument("--model_id", help="Another model than PEFT's.")
    parser.add_argument("--max_steps", type=int, help="Fewer steps than PEFT's.")
    parser.add_argument("--eval_steps", type=int, help="Steps between evaluations.")
    args = parser.parse_args(argv)
    folder = args.peft / FOLDER
    options = {name: getattr(args, name) for name in ("model_id", "max_steps", "eval_steps")}
    path = write_experiment(folder, args.experiment, {name: v for name, v in options.items() if v is not None})
    done = subprocess.run([sys.executable, "-c", PROGRAM, "-v", str(path)], cwd=folder)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
