# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Carries the names of adapters from the rows of a data set to the calls of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


COLUMN = "adapter_names"


@dataclass
class DataCollatorWithAdapterNames:
    """Makes batches with `adapter_names`, so that each row is trained in its own adapter.

    The data set has a column `adapter_names` with the name of an adapter in each row. `Trainer` drops columns that the
    model's `forward` does not name, so pass `remove_unused_columns=False`.

    Args:
        collator (`Callable`): What makes batches of the other columns, such as `DataCollatorWithPadding`.

    Raises:
        ValueError: A row has no name.
    """

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, features: Sequence[dict[str, Any]]) -> Any:
        if missing := [row for row, feature in enumerate(features) if COLUMN not in feature]:
            raise ValueError(
                f"Row {missing[0]} of a batch has no `{COLUMN}`. Give the data set a column of this name, and pass "
                "`remove_unused_columns=False` to `TrainingArguments`."
            )
        others = [{name: value for name, value in feature.items() if name != COLUMN} for feature in features]
        batch = self.collator(others)
        batch[COLUMN] = [tuple(n) if isinstance(n := feature[COLUMN], list) else n for feature in features]
        return batch
