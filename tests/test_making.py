# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests rely on where they compare adapted models with each other."""

from __future__ import annotations

import torch
from making import make_adapted, make_config


def test_the_prompt_is_the_same_at_every_call_and_that_of_no_other_adapter() -> None:
    model = make_adapted()
    model.add_adapter("other", make_config("CAUSAL_LM"))
    assert not torch.allclose(model.prompt_embeddings("other"), model.prompt_embeddings("default"))
    assert torch.equal(make_adapted().prompt_embeddings(), model.prompt_embeddings("default"))


def test_a_task_that_peft_has_no_type_for() -> None:
    assert make_config("masked LM").task_type is None
    assert make_config("SEQ_CLS", 3).to_dict().items() >= {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}.items()
