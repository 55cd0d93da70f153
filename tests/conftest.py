# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from importlib.metadata import version
from typing import Optional

import pytest
import torch
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_ptuning_ext.forward import one_pass


torch.set_num_threads(1)  # the models are tiny, and the suite runs one process per core


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "accelerate"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A release of transformers may come before the release of PEFT that its own adapter methods ask for."""
    try:
        return (yield)
    except Exception as error:
        if Version(version("peft")) < Version(MIN_PEFT_VERSION) and _is_about_peft(error):
            pytest.skip(f"transformers' own adapter methods ask for PEFT {MIN_PEFT_VERSION}, which is not installed.")
        raise


def _is_about_peft(error: Optional[BaseException]) -> bool:
    """Whether an error is, or was raised while handling, transformers' about the version of PEFT."""
    return error is not None and ("version of PEFT" in str(error) or _is_about_peft(error.__context__))


@pytest.fixture(autouse=True, scope="session")
def _as_on_wide_models() -> None:
    """On the narrow models of the tests a prompt in each row is the cheaper way to train.

    For the whole session, because a run that several tests of a file look at begins before the first of them.
    """
    one_pass.OVERHEAD = 0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
