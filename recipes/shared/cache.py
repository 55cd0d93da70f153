# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The folder in which recipes keep what takes long to make: `~/.cache/peft_ptuning_ext`, or in `$XDG_CACHE_HOME`."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns the folder `name` of the cache. The first call makes it, and other processes wait for that.

    `make` fills an empty folder, which gets its name afterwards. A folder of that name is therefore whole.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_ptuning_ext"
    folder = root / name
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the system frees this lock if the process is killed
        if not folder.is_dir():
            draft = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
            try:
                make(draft)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder
