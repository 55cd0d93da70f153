# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters from strangers: whatever the two files hold, they load right or raise a documented error, and a model on
which they fail to load is as it was."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from reference import V, make_batch
from transformers import PreTrainedModel

from peft_ptuning_ext import PromptTemplate, PTuningConfig, import_from_peft


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**9, 2**63, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ENCODERS = {
    "NONE": {},
    "MLP": {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8},
    "LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 4},
    "RESIDUAL": {"encoder_reparameterization_type": "RESIDUAL"},
    "deep": {"prompt_depth": "DEEP"},
    "deep MLP": {"prompt_depth": "DEEP", "encoder_reparameterization_type": "MLP", "encoder_hidden_size": 8},
}


def prompt_of(model: PeftModel) -> list[torch.Tensor]:
    """The vectors of a prompt, or the keys and values of a deep one."""
    if not model.peft_config["default"].is_deep:
        return [model.base_model.prompt_embeddings()]
    return [state for pair in model.base_model.prompt_key_values().values() for state in pair]


class Target:
    """A model to load into, and whether it is still as it was."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = make_model("BERT", "SEQ_CLS")
        self.batch = make_batch("BERT", "SEQ_CLS")
        self.before = self.look(self.base)
        self.seen = Counter()

    def look(self, model: PreTrainedModel) -> tuple:
        modules = [(name, type(module)) for name, module in model.named_modules()]
        state = {key: value.clone() for key, value in model.state_dict().items()}
        trained = [parameter.requires_grad for parameter in model.parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        with torch.no_grad():
            return modules, trained, hooks, state, model(**self.batch).logits

    def check_unchanged(self) -> None:
        assert not hasattr(self.base, "peft_config")
        *now, state, logits = self.look(self.base)
        *then, first_state, first_logits = self.before
        assert now == then
        assert all(torch.equal(value, state[key]) for key, value in first_state.items())
        assert torch.equal(logits, first_logits)

    def load(self, load) -> None:
        """Loads with `load`; what it raises is counted, and checked to be documented."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = load(self.base, self.folder)
            except (ValueError, TypeError) as error:
                self.seen[str(error).replace(str(self.folder), "")[:40]] += 1
                self.check_unchanged()
                return
        with torch.no_grad():
            logits = model.eval()(**self.batch).logits
            parts = prompt_of(model)
        config = model.peft_config["default"]
        shape = (4, config.num_virtual_tokens, 8) if config.is_deep else (config.num_virtual_tokens, 32)
        assert all(part.shape == shape and torch.isfinite(part).all() for part in parts)
        assert logits.shape == self.before[-1].shape
        if load is from_pretrained:
            encoder = model.base_model._layer().ptuning_encoders["default"].state_dict()
            saved = safetensors.torch.load_file(self.folder / WEIGHTS)
            found = {key.rpartition("ptuning_encoders.")[2]: value for key, value in saved.items()}
            assert all(torch.equal(value, found[name].to(value)) for name, value in encoder.items())
        self.seen["loaded"] += 1
        model.unload()
        self.check_unchanged()


@contextmanager
def saved(folder: Path, config: PeftConfig) -> Iterator[Target]:
    """A target whose folder holds an adapter of `config`; what was seen on it is looked at in the end."""
    get_peft_model(make_model("BERT", "SEQ_CLS"), config).save_pretrained(folder)
    shutil.copy(folder / CONFIG, folder / "config")
    shutil.copy(folder / WEIGHTS, folder / "weights")
    target = Target(folder)
    yield target
    assert not target.seen or len(target.seen) > 3, target.seen  # not one error for all


@pytest.fixture(scope="module", params=ENCODERS, name="target")
def _target(request, tmp_path_factory) -> Iterator[Target]:
    config = PTuningConfig(num_virtual_tokens=V, task_type="SEQ_CLS", **ENCODERS[request.param])
    with saved(tmp_path_factory.mktemp("adapter"), config) as target:
        yield target


def restore(folder: Path) -> None:
    shutil.copy(folder / "config", folder / CONFIG)
    shutil.copy(folder / "weights", folder / WEIGHTS)


def damage(path: Path, data: st.DataObject) -> None:
    """Flips some bits of a file, most of them in its header, and may cut its end off."""
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    where = st.integers(0, header - 1) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(where, min_size=0, max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)


def from_pretrained(base: PreTrainedModel, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, folder)


FIELDS = sorted(PTuningConfig(task_type="SEQ_CLS").to_dict().keys() - {"peft_type"})


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(min_size=1, max_size=8), JSON, min_size=1, max_size=3)
)
def test_any_value_in_any_field_of_a_config(target, changes) -> None:
    restore(target.folder)
    config = json.loads((target.folder / CONFIG).read_text())
    changes.pop("peft_type", None)
    (target.folder / CONFIG).write_text(json.dumps(config | changes))
    target.load(from_pretrained)


@FUZZ
@given(data=st.data())
def test_flipped_bits_and_cut_ends_of_weights(target, data) -> None:
    restore(target.folder)
    damage(target.folder / WEIGHTS, data)
    target.load(from_pretrained)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, V, 8, 32, 10**9, 2**62, -1]), max_size=3)
DTYPES = st.sampled_from(["F32", "F16", "BF16", "I32", "U8", "BOOL", "F64", "X9"])


@FUZZ
@given(data=st.data())
def test_headers_that_lie(target, data) -> None:
    restore(target.folder)
    content = (target.folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    entry = header[name]
    kind = data.draw(st.sampled_from(["shape", "dtype", "offsets", "rename", "drop", "add"]))
    if kind == "shape":
        entry["shape"] = data.draw(SHAPES)
    elif kind == "dtype":
        entry["dtype"] = data.draw(DTYPES)
    elif kind == "offsets":
        entry["data_offsets"] = data.draw(st.lists(st.integers(0, 2**64), min_size=2, max_size=2))
    elif kind == "rename":
        header[data.draw(st.text(max_size=60) | st.just(name + "x"))] = header.pop(name)
    elif kind == "drop":
        header.pop(name)
    else:
        names = st.text(max_size=20) | st.sampled_from([f"base_model.model.{key}" for key in target.before[-2]])
        header[data.draw(names)] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    encoded = json.dumps(header).encode()
    (target.folder / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])
    target.load(from_pretrained)


SLOT = 4  # the placeholder's id
PIECES = [
    "{a}",
    "{b c}",
    "{prompt}",
    "{prompt:2}",
    "{prompt:5}",
    "{mask}",
    "{{",
    "}}",
    "{",
    "}",
    "{a.__class__}",
    " x ",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
TEMPLATE_FIELDS = ["text", "shortenable", "placeholder", "placeholder_id"]


@pytest.fixture(scope="module", name="templated")
def _templated(tmp_path_factory) -> Iterator[Target]:
    template = PromptTemplate("{a} {prompt:3} {b c} {prompt:2}", ["a"], "<slot>", SLOT)
    with saved(tmp_path_factory.mktemp("template"), PTuningConfig("SEQ_CLS", prompt_template=template)) as target:
        yield target


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from(TEMPLATE_FIELDS) | st.text(min_size=1, max_size=8),
        JSON | TEXTS | st.integers(0, 120) | st.sampled_from([["a"], ["b c", "a"], []]),
        min_size=1,
        max_size=2,
    )
)
def test_any_value_in_a_saved_template(templated, changes) -> None:
    restore(templated.folder)
    config = json.loads((templated.folder / CONFIG).read_text())
    config["prompt_template"] |= changes
    (templated.folder / CONFIG).write_text(json.dumps(config))
    try:
        model = PeftModel.from_pretrained(templated.base, templated.folder).eval()
    except (ValueError, TypeError) as error:
        templated.seen[str(error)[:40]] += 1
        templated.check_unchanged()
        return
    template = model.peft_config["default"].prompt_template
    ids = torch.full((1, 9), 50 if template.placeholder_id != 50 else 51)
    ids[:, 2:7] = template.placeholder_id
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    templated.seen["loaded"] += 1
    model.unload()
    templated.check_unchanged()


@pytest.fixture(scope="module", name="stock")
def _stock(tmp_path_factory) -> Iterator[Target]:
    config = PromptTuningConfig(num_virtual_tokens=V, task_type="SEQ_CLS")
    with saved(tmp_path_factory.mktemp("stock"), config) as target:
        yield target


def take_over(base: PreTrainedModel, folder: Path) -> PeftModel:
    return import_from_peft(base, str(folder), force="SEQ_CLS")


STOCK_FIELDS = sorted(PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=V).to_dict().keys() - {"peft_type"})


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(STOCK_FIELDS), JSON, min_size=1, max_size=3))
def test_any_value_in_a_stock_config(stock, changes) -> None:
    restore(stock.folder)
    config = json.loads((stock.folder / CONFIG).read_text())
    (stock.folder / CONFIG).write_text(json.dumps(config | changes))
    stock.load(take_over)


@FUZZ
@given(data=st.data())
def test_flipped_bits_of_stock_weights(stock, data) -> None:
    restore(stock.folder)
    damage(stock.folder / WEIGHTS, data)
    stock.load(take_over)


@FUZZ
@given(data=st.data())
def test_a_further_adapter_leaves_the_first_alone(target, data) -> None:
    restore(target.folder)
    model = PeftModel.from_pretrained(make_model("BERT", "SEQ_CLS"), target.folder).eval()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    if data.draw(st.booleans()):
        damage(target.folder / WEIGHTS, data)
    else:
        config = json.loads((target.folder / CONFIG).read_text())
        changes = data.draw(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
        (target.folder / CONFIG).write_text(json.dumps(config | changes))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model.load_adapter(target.folder, "second")
        except (ValueError, TypeError):
            assert {name: value.requires_grad for name, value in model.named_parameters()} == {
                name: is_trained for name, (_, is_trained) in before.items()
            }
            assert list(model.peft_config) == ["default"]
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], value) for name, (value, _) in before.items())
        assert model(**target.batch).logits.isfinite().all()
