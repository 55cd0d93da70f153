# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Several adapters: trained in one batch by Trainer, combined into new ones, refilled under a name."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from families import make_model
from making import make_adapted, make_arguments, make_config
from peft import PeftModel
from reference import S, V, make_batch
from transformers import Trainer, default_data_collator

from peft_ptuning_ext import DataCollatorWithAdapterNames


def make_three(**options) -> PeftModel:
    model = make_adapted()
    torch.manual_seed(5)
    for name in ("second", "third"):
        model.add_adapter(name, make_config("CAUSAL_LM", **options))
    return model


def train(model: PeftModel, rows: list[tuple[list[int], str]], folder) -> dict[str, torch.Tensor]:
    """Trains all adapters on rows of ids and names, and returns the prompts."""
    data = Dataset.from_list([{"input_ids": ids, "labels": ids, "adapter_names": name} for ids, name in rows])
    arguments = make_arguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=len(rows),
        remove_unused_columns=False,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        average_tokens_across_devices=False,
    )
    model.set_requires_grad(list(model.peft_config), True)
    model.base_model.model.accepts_loss_kwargs = False
    trainer = Trainer(
        model, arguments, data_collator=DataCollatorWithAdapterNames(default_data_collator), train_dataset=data
    )
    trainer.train()
    return {name: model.base_model.prompt_embeddings(name).detach() for name in model.peft_config}


def test_trainer_trains_each_row_in_its_adapter(tmp_path) -> None:
    """Two adapters in one batch are trained as each alone, on half of the loss, which is the mean of all rows."""
    ids = torch.randint(5, 90, (4, S), generator=torch.Generator().manual_seed(1)).tolist()
    names = ["default", "second", "second", "default"]
    found = train(model := make_three(), list(zip(ids, names)), tmp_path / "both")
    start = make_three()
    for name in ("default", "second"):
        own = [(row, name) for row, other in zip(ids, names) if other == name]
        padded = own + [(ids[0], "__base__")] * 2  # rows that teach nobody, so that the mean is over as many
        torch.testing.assert_close(found[name], train(make_three(), padded, tmp_path / name)[name], rtol=0, atol=1e-5)
        assert (found[name] - start.base_model.prompt_embeddings(name)).abs().max() > 1e-3
    assert torch.equal(found["third"], start.base_model.prompt_embeddings("third"))
    assert model.active_adapter == "default"


def test_a_row_without_a_name_is_refused() -> None:
    collate = DataCollatorWithAdapterNames(default_data_collator)
    with pytest.raises(ValueError, match="Row 1 of a batch has no `adapter_names`.*remove_unused_columns"):
        collate([{"input_ids": [1], "adapter_names": "default"}, {"input_ids": [1]}])
    assert collate([{"input_ids": [1], "adapter_names": ["a", "b"]}])["adapter_names"] == [("a", "b")]


@pytest.mark.parametrize("options", [{}, {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8}])
def test_a_weighted_sum(options) -> None:
    model, batch = make_three(**options), make_batch("Llama", "CAUSAL_LM")
    before = model(**batch).logits
    model.add_weighted_adapter(["default", "second", "third"], [0.5, 2.0, -1.0], "sum")
    prompts = [model.base_model.prompt_embeddings(name) for name in ("default", "second", "third")]
    expected = 0.5 * prompts[0] + 2 * prompts[1] - prompts[2]
    torch.testing.assert_close(model.base_model.prompt_embeddings("sum"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
    assert model.active_adapter == "default"
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)


@pytest.mark.parametrize("depth", ["INPUT", "DEEP"])
def test_one_behind_the_other_is_the_composition(depth, tmp_path) -> None:
    model, batch = make_three(prompt_depth=depth), make_batch("Llama", "CAUSAL_LM")
    model.add_weighted_adapter(["second", "third"], [1, 1], "both", combination_type="cat")
    model.base_model.set_adapter(["second", "third"])
    expected = model(**batch).logits
    model.set_adapter("both")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(make_model("Llama", "CAUSAL_LM"), tmp_path / "both")
    assert loaded.peft_config["default"].num_virtual_tokens == 2 * V
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-6)


ERRORS = {
    "type": (["default"], [1.0], {"combination_type": "svd"}, "must be one of"),
    "weights": (["default", "second"], [1.0], {}, "a number for each"),
    "none": ([], [], {}, "a number for each"),
    "unknown": (["default", "there"], [1.0, 1.0], {}, "no adapter 'there'"),
    "length": (["default", "longer"], [1.0, 1.0], {}, "prompts of one length"),
    "depth": (["default", "deep"], [1.0, 1.0], {}, "differ in `prompt_depth`"),
    "weights of cat": (["default", "second"], [1.0, 0.5], {"combination_type": "cat"}, "no weights but 1"),
    "name": (["default", "second"], [1.0, 1.0], {"adapter_name": "third"}, "'third' already"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_can_not_be_combined_changes_nothing(case) -> None:
    model = make_three()
    model.add_adapter("longer", make_config("CAUSAL_LM", V + 1))
    model.add_adapter("deep", make_config("CAUSAL_LM", prompt_depth="DEEP"))
    names, weights, options, message = ERRORS[case]
    before = {*model.state_dict()}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(names, weights, **{"adapter_name": "new", **options})
    assert "new" not in model.peft_config
    assert {*model.state_dict()} == before


def test_adapters_with_heads_are_not_combined() -> None:
    model = make_adapted("BERT", "SEQ_CLS")
    model.add_adapter("second", make_config("SEQ_CLS"))
    with pytest.raises(ValueError, match="has `modules_to_save`"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "new")


@torch.no_grad()
def test_new_values_under_a_name_compile_nothing_again(tmp_path) -> None:
    model, batch = make_three(), make_batch("Llama", "CAUSAL_LM") | {"use_cache": False}
    model.set_adapter("second")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.set_adapter("default")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert (compiled(**batch).logits - expected).abs().max() > 1e-4
    model.load_adapter(tmp_path / "second", "default")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-5)
