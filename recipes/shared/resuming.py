# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Finds the checkpoint that an interrupted run can go on from."""

import json
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments


def last_whole_checkpoint(output_dir: str | Path, processes: int = 1) -> str | None:
    """Returns the last checkpoint that was written completely, or `None` if there is none.

    Trainer writes a checkpoint file by file into its final folder. `resume_from_checkpoint=True` takes the last folder
    even if the process was killed while it wrote, and half of the files are missing.

    Args:
        output_dir (`str` or `Path`): The output folder of Trainer.
        processes (`int`, defaults to 1): Number of processes that trained: `TrainingArguments.world_size`.
    """
    return next((str(folder) for folder in newest_first(output_dir) if _is_whole(folder, processes)), None)


def newest_first(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoints of a folder, the one after the most steps or epochs first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _is_whole(folder: Path, processes: int) -> bool:
    """Whether all files of a checkpoint are there and complete.

    The main process writes trainer_state.json last. The other files are checked, too: other processes write some of
    them, and after a crash of the machine any file may be cut off.
    """
    rng_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    pickles = [folder / name for name in rng_states] + [path for path in folder.rglob("*.pt*") if path.is_file()]
    # torch writes zip files. Their directory is at the end, so that a file which was cut off has none.
    return all(is_zipfile(path) for path in pickles)


def find_checkpoint(args: TrainingArguments, are_whole: bool = False) -> str | None:
    """Returns the folder of `--resume_from_checkpoint`; "last" means the last whole checkpoint of the output folder.

    Args:
        args (`TrainingArguments`): Arguments with `resume_from_checkpoint`, `output_dir` and `world_size`.
        are_whole (`bool`, defaults to `False`): Whether all checkpoints are whole, because they are moved to their
            place when they are finished. Trainer writes them in their place.

    Raises:
        ValueError: The output folder has no whole checkpoint.
    """
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    if are_whole:
        found = next(map(str, newest_first(args.output_dir)), None)
    else:
        found = last_whole_checkpoint(args.output_dir, args.world_size)
    if found is None:
        raise ValueError(f"`--resume_from_checkpoint last`: there is no whole checkpoint in {args.output_dir}.")
    return found
