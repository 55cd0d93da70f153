# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Models that are spread over processes or devices answer and train as they do in one place, or say why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import make_model
from making import make_adapted, make_config
from peft import PeftModel, get_peft_model
from processes import launch
from reference import make_batch
from run_tensor_parallel import CASES, DEADLINE, TASK, results_of


HERE = Path(__file__).resolve().parents[1]


def assert_close(one, other) -> None:
    """Relations of floats within what a sum in another order costs; everything else is the same."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module", name="spread")
def _spread(tmp_path_factory) -> Path:
    """A folder with what two processes have made of a model whose weights are spread over them."""
    folder = tmp_path_factory.mktemp("spread")
    make_model("Llama", TASK).save_pretrained(folder / "base")
    program = [str(HERE / "run_tensor_parallel.py"), str(folder)]
    launch("torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program, deadline=2 * DEADLINE)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_parts_of_the_weights_are_one_with_all(case, spread) -> None:
    model = PeftModel.from_pretrained(make_model("Llama", TASK), spread / case, is_trainable=True)
    alone = results_of(model)
    first, second = (torch.load(spread / f"{case} {rank}.pt") for rank in range(2))
    for result in (first, second):
        for key in ("losses", "gradients", "logits", "generated"):
            assert_close(result[key], alone[key])
    assert first["batched"] == alone["batched"] == alone["generated"][:, -4:].tolist()


def test_what_parts_of_the_weights_have_no_place_for_is_refused(spread) -> None:
    for rank in range(2):
        errors = torch.load(spread / f"errors {rank}.pt")
        assert [is_changed for _, is_changed in errors.values()] == [False, False]
        assert "spread over 2 processes (tensor parallelism)" in errors["deep"][0]
        assert "Choose prompt_depth='INPUT'" in errors["deep"][0]
        assert "Leave `trainable_token_indices` out" in errors["rows"][0]


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
@pytest.mark.parametrize("options", [{}, {"prompt_depth": "DEEP"}], ids=["input", "deep"])
def test_parts_of_texts_are_refused(options, size, monkeypatch) -> None:
    """Accelerate cuts texts on accelerators only."""
    model, batch = make_adapted("Llama", **options), make_batch("Llama", TASK)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    expected = model(**batch).logits
    state = Accelerator(cpu=True).state
    monkeypatch.setattr(state, "parallelism_config", type("Config", (), {size: 2})(), raising=False)
    with pytest.raises(ValueError, match=f"LlamaModel got parts of texts.*{size}=2.*Leave context and sequence"):
        model(**batch)
    with model.disable_adapter():
        assert model(**batch).logits.isfinite().all()
    state.parallelism_config = None
    assert_close(model(**batch).logits, expected)


# Layers in turn where they compute and elsewhere; the embedding, at which the prompt is, in both places.
PLACES = {
    "embedding on disk": {"embed_tokens": "disk", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu"},
    "layer on disk": {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "disk"},
}


@pytest.mark.parametrize("options", [{}, {"prompt_depth": "DEEP"}], ids=["input", "deep"])
@pytest.mark.parametrize("place", PLACES)
def test_layers_in_several_places_are_one_model(place, options, tmp_path) -> None:
    whole = make_model("Llama", TASK)
    whole.save_pretrained(tmp_path / "base")
    device_map = {f"model.{name}": device for name, device in PLACES[place].items()}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    spread = type(whole).from_pretrained(tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "off")
    results = []
    for base in (whole, spread.eval()):
        torch.manual_seed(0)
        model, batch = get_peft_model(base, make_config(TASK, **options)).eval(), make_batch("Llama", TASK)
        with torch.no_grad():
            logits = [model(**batch).logits for _ in range(2)]  # the second finds stored states, or none
        generated = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([logits, generated, loss.detach(), gradients])
    assert_close(*results)
