# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The least time that a step of a Llama can take on a device: its arithmetic and its memory traffic at full speed.

The device's speed is measured, by one large product of matrices and one large copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmark_cases import METHODS, NEW_TOKENS, OTHER_ATTENTION, Shape
from peft import LoraConfig
from transformers import PreTrainedConfig


# Methods whose prompt stands in every row.
IN_EVERY_ROW = {"ptuning_concatenated", "peft_ptuning", "peft_prompt_tuning"}
# Methods whose gradients go back to the input embeddings.
AT_THE_INPUT = {"ptuning", *IN_EVERY_ROW, *(f"ptuning_{name}" for name in OTHER_ATTENTION)}
# Methods whose prompt consists of keys and values.
IN_EVERY_LAYER = {"ptuning_deep", "peft_prefix"}


@dataclass(frozen=True)
class Speed:
    """What a device was found to do at most.

    Args:
        flops (`float`): Floating-point operations per second of a large product.
        bandwidth (`float`): Bytes per second that a large copy reads and writes.
        bytes_per_number (`int`): Of the number format.
    """

    flops: float
    bandwidth: float
    bytes_per_number: int


@torch.no_grad()
def measure_speed(device: str, dtype: torch.dtype) -> Speed:
    """Measures a device; the best of ten each."""
    size, length = (512, 2**22) if device == "cpu" else (8192, 2**30)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = 2 * size**3 / _best(lambda: one @ other, device)
    source = torch.zeros(length, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * length / _best(lambda: target.copy_(source), device)
    return Speed(product, copied, dtype.itemsize)


def _best(function: Callable, device: str) -> float:
    seconds = []
    for _ in range(12):
        if device != "cpu":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(4):  # so that the host's part does not count
            function()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - start) / 4)
    return min(seconds[2:])


def count_positions(measure: str, shape: Shape, method: str) -> tuple[int, int]:
    """How many positions go through the layers, and how many pairs of a query and a key there are."""
    rows, text, length = shape
    in_text = rows * text * (text + 1) // 2
    if METHODS[method].config_class in (None, LoraConfig):
        return rows * text, in_text
    if method in IN_EVERY_ROW:
        return rows * (text + length), rows * (text + length) * (text + length + 1) // 2
    pairs = in_text + rows * text * length
    if method in IN_EVERY_LAYER or measure != "train_step":  # or stored
        return rows * text, pairs
    return length + rows * text, pairs + length * (length + 1) // 2


def least_seconds(config: PreTrainedConfig, measure: str, shape: Shape, method: str, speed: Speed) -> float:
    """The least time of a step.

    Weights are frozen, so a backward pass costs what a forward pass does in products with weights, and twice that in
    attention. Everything but products is left out, and so are the adapter's own layers.

    Args:
        config (`PreTrainedConfig`): Of the Llama.
        measure (`str`): Name of the measure.
        shape ([`Shape`]): B, S and V.
        method (`str`): Name of the method.
        speed ([`Speed`]): Of the device.
    """
    positions, pairs = count_positions(measure, shape, method)
    layers, width, query_width = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    query_width, state_width = (n * config.head_dim for n in (query_width, config.num_key_value_heads))
    of_layers = layers * width * (2 * query_width + 2 * state_width + 3 * config.intermediate_size)
    of_head = width * config.vocab_size
    is_training = measure == "train_step"
    with_logits = shape.batch_size * (shape.text_length if is_training else 1)
    if is_training and method == "peft_ptuning":
        with_logits = positions  # it computes those of the prompt, too
    products = 2 * (of_layers * positions + of_head * with_logits)
    attention = 4 * layers * query_width * pairs
    flops = 2 * products + 3 * attention if is_training else products + attention
    if is_training and METHODS[method].config_class is not None and method not in AT_THE_INPUT:
        flops -= 2 * positions * width * (query_width + 2 * state_width)  # no gradient leaves the first layer
    traffic = (of_layers + of_head) * speed.bytes_per_number
    seconds = max(flops / speed.flops, (2 if is_training else 1) * traffic / speed.bandwidth)
    if measure != "tokens_per_second":
        return seconds
    seen = pairs_of_last_query(shape, method) + NEW_TOKENS / 2  # on average
    states = 2 * layers * state_width * speed.bytes_per_number * shape.batch_size * seen
    flops = 2 * shape.batch_size * (of_layers + of_head + 2 * layers * query_width * seen)
    return seconds + (NEW_TOKENS - 1) * max((traffic + states) / speed.bandwidth, flops / speed.flops)


def pairs_of_last_query(shape: Shape, method: str) -> int:
    """How many keys the last token of a text sees."""
    has_prompt = METHODS[method].config_class not in (None, LoraConfig)
    return shape.text_length + has_prompt * shape.prompt_length
