# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Texts that are cut into parts, one for each process (context and sequence parallelism): refused."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, is_initialized


def check_whole_texts(stack: str) -> None:
    """Refuses a call whose rows are parts of texts.

    Args:
        stack (`str`): Name of the backbone's class, for the message.

    Raises:
        ValueError: Accelerate was told to cut texts.
    """
    if torch.compiler.is_compiling() or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    config = getattr(AcceleratorState(), "parallelism_config", None) if is_initialized() else None
    for size in ("cp_size", "sp_size"):
        if getattr(config, size, 1) > 1:
            raise ValueError(
                f"{stack} got parts of texts (`{size}={getattr(config, size)}` in Accelerate's `ParallelismConfig`). "
                "Every part would get a prompt, and belongs behind one. Leave context and sequence parallelism out."
            )
