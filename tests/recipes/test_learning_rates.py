# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Learning rates that the recipes choose where none is given: those of prompts follow the scale of the model."""

from types import SimpleNamespace

import pytest
import torch
from families import make_model
from shared.arguments import MethodArguments
from shared.methods import RATES, RELATIVE_RATES, choose_learning_rate, make_trainable


def rate_of(method: MethodArguments, scale: float = 1.0, given: float | None = None) -> float:
    """The rate at which a recipe would train, on a model whose embeddings are multiplied by `scale`."""
    model = make_model("BERT", "SEQ_CLS")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    torch.manual_seed(0)
    args = SimpleNamespace(learning_rate=given)
    choose_learning_rate(args, method, make_trainable(model, method, "SEQ_CLS", None))
    return args.learning_rate


def test_the_rate_of_a_prompt_grows_with_the_embeddings() -> None:
    method = MethodArguments(depth="INPUT")
    assert rate_of(method, 10.0) == pytest.approx(10 * rate_of(method))
    weight = make_model("BERT", "SEQ_CLS").get_input_embeddings().weight
    assert rate_of(method) == pytest.approx(RELATIVE_RATES["INPUT"] * weight.square().mean().sqrt().item(), rel=0.2)


def test_the_rate_of_a_deep_prompt_is_in_units_of_its_keys_and_values() -> None:
    method = MethodArguments(depth="DEEP")
    model = make_model("BERT", "SEQ_CLS")
    torch.manual_seed(0)
    adapted = make_trainable(model, method, "SEQ_CLS", None)
    numbers = torch.cat([state.flatten() for pair in adapted.prompt_key_values().values() for state in pair])
    assert rate_of(method) == pytest.approx(RELATIVE_RATES["DEEP"] * numbers.square().mean().sqrt().item())


@pytest.mark.parametrize("method", ["peft_ptuning", "lora", "head"])
def test_other_methods_have_rates_of_their_own(method) -> None:
    assert rate_of(MethodArguments(method=method)) == rate_of(MethodArguments(method=method), 10.0) == RATES[method]


def test_a_network_is_trained_at_a_rate_for_weights() -> None:
    method = MethodArguments(depth="INPUT", encoder="MLP")
    assert rate_of(method) == rate_of(method, 10.0) == RATES["ptuning"]


def test_a_rate_that_is_given_stays() -> None:
    assert rate_of(MethodArguments(depth="INPUT"), given=0.25) == 0.25
