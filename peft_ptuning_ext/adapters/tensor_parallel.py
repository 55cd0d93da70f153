# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Models whose weights transformers has spread over processes (`tp_plan="auto"`): what a new adapter needs there."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..config import PTuningConfig


def check_tensor_parallel(model: nn.Module, config: PTuningConfig, trains_rows: bool) -> None:
    """Refuses what can't be cut into the parts that the processes have.

    Args:
        model (`nn.Module`): The model without the new adapter.
        config ([`PTuningConfig`]): The config of the new adapter.
        trains_rows (`bool`): Whether it trains rows of the vocabulary.

    Raises:
        ValueError: The adapter can't be trained or used on this model.
    """
    mesh = find_mesh(model)
    if mesh is None:
        return
    spread = f"The weights of this {type(model).__name__} are spread over {mesh.size()} processes (tensor parallelism)"
    if config.is_deep:
        raise ValueError(
            f"{spread}, and attention has a part of the heads in each of them. A prompt in every layer "
            "(prompt_depth='DEEP') has keys and values for all heads. Choose prompt_depth='INPUT', or load the model "
            "without `tp_plan`."
        )
    if trains_rows:
        raise ValueError(
            f"{spread}, among them the table of token embeddings, of which PEFT can't train single rows there. Leave "
            "`trainable_token_indices` out, or load the model without `tp_plan`."
        )


@torch.no_grad()
def start_alike(model: nn.Module, encoder: nn.Module) -> None:
    """Gives a new encoder the same values in all processes: those that it was given in the first.

    Each process draws a prompt by itself. Under tensor parallelism the prompts have to be one.
    """
    mesh = find_mesh(model)
    if mesh is None:
        return
    group = mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        if not tensor.is_meta:
            torch.distributed.broadcast(tensor.data, src=first, group=group)


def find_mesh(model: nn.Module) -> Optional[DeviceMesh]:
    """The processes that the weights of a model are spread over by tensor parallelism; `None` if they are not."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ()):
            mesh = parameter.device_mesh["tp"]
            return mesh if mesh.size() > 1 else None
    return None
