# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


torch.set_num_threads(1)  # the models are tiny, and the suite runs one process per core


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
