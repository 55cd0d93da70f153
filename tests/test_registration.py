# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import make_model
from making import make_config
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model, inject_adapter_in_model
from reference import main_output, make_batch
from sentence_transformers import SentenceTransformer
from transformers import BertTokenizer

import peft_ptuning_ext
from peft_ptuning_ext import PTuningConfig, PTuningModel


def _in_a_worker(connection) -> None:
    config, prompt = connection.recv()
    member = peft.PeftType("PTUNING")
    connection.send((config, member is config.peft_type, prompt.sum().item()))


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # of fork, on 3.12 and later
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_know_the_method(method) -> None:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    worker = context.Process(target=_in_a_worker, args=(there,))
    worker.start()
    here.send((make_config(), torch.ones(3)))
    assert here.poll(60)
    assert here.recv() == (make_config(), True, 3.0)
    worker.join()
    assert worker.exitcode == 0


def test_importing_twice_and_reloading_are_harmless() -> None:
    before = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.copy()
    for _ in range(2):
        importlib.reload(peft_ptuning_ext)
    assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("peft_ptuning_ext")}
    try:
        fresh = importlib.import_module("peft_ptuning_ext")
        assert fresh.PTuningConfig is not PTuningConfig
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PTUNING"] is fresh.PTuningConfig
        assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["PTUNING"] is fresh.PTuningModel
    finally:
        sys.modules.update(modules)
        importlib.reload(peft_ptuning_ext)
    assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["PTUNING"] == "ptuning_"


def test_importing_has_no_other_effect() -> None:
    program = (
        "import peft, transformers, torch\n"
        "from transformers import AttentionInterface\n"
        "before = {k: dict(vars(v)) for k, v in {'P': peft.PeftModel, 'M': torch.nn.Module, 'T': "
        "transformers.PreTrainedModel, 'C': transformers.Cache}.items()}, list(AttentionInterface())\n"
        "import peft_ptuning_ext\n"
        "after = {k: dict(vars(v)) for k, v in {'P': peft.PeftModel, 'M': torch.nn.Module, 'T': "
        "transformers.PreTrainedModel, 'C': transformers.Cache}.items()}, list(AttentionInterface())\n"
        "assert before[0] == after[0]\n"
        "assert before[1] == after[1]\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_auto_classes_find_the_method(tmp_path) -> None:
    make_model("BERT", "SEQ_CLS").save_pretrained(tmp_path / "base")
    base = type(make_model("BERT", "SEQ_CLS")).from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, make_config("SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    batch = make_batch("BERT", "SEQ_CLS")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert isinstance(loaded.base_model, PTuningModel)
    assert torch.equal(main_output(loaded(**batch)), main_output(model(**batch)))


# PEFT says so of every method whose second adapter is added by transformers.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@pytest.mark.parametrize(("family", "task"), [("GPT-2", "CAUSAL_LM"), ("BERT", "SEQ_CLS"), ("T5", "SEQ_2_SEQ_LM")])
@torch.no_grad()
def test_transformers_own_adapter_methods(family, task, tmp_path) -> None:
    """`add_adapter`, `disable_adapters`, `set_adapter`, `load_adapter`, `delete_adapter` of a transformers model."""
    batch = make_batch(family, task)
    expected = main_output(make_model(family, task)(**batch))
    model = make_model(family, task)
    model.add_adapter(make_config(encoder_hidden_size=8))
    enabled = main_output(model.eval()(**batch))
    assert not torch.allclose(enabled, expected)
    model.disable_adapters()
    assert torch.equal(main_output(model(**batch)), expected)
    model.enable_adapters()
    model.add_adapter(make_config(length=3), "second")
    assert not torch.allclose(main_output(model(**batch)), enabled)
    model.set_adapter("default")
    assert torch.equal(main_output(model(**batch)), enabled)
    model.save_pretrained(tmp_path / "adapter")

    loaded = make_model(family, task)
    loaded.load_adapter(tmp_path / "adapter", "mine")
    for name, value in model.state_dict().items():
        if ".ptuning_encoders.default." in name:
            assert torch.equal(loaded.state_dict()[name.replace(".default.", ".mine.")], value), name
    torch.testing.assert_close(main_output(loaded(**batch)), enabled, rtol=0, atol=1e-5)
    loaded.delete_adapter("mine")
    assert torch.equal(main_output(loaded(**batch)), expected)

    wrapped = PeftModel.from_pretrained(make_model(family, task), tmp_path / "adapter").eval()
    torch.testing.assert_close(main_output(wrapped(**batch)), enabled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["BERT", "Llama", "MPNet"])
@torch.no_grad()
def test_forward_of_a_bare_backbone_is_a_call(family) -> None:
    """Torch runs hooks on calls only, and sentence-transformers calls `forward`."""
    batch = make_batch(family, "FEATURE_EXTRACTION")
    untouched = make_model(family, "FEATURE_EXTRACTION")
    model = make_model(family, "FEATURE_EXTRACTION")
    model.add_adapter(make_config())
    model.eval()
    expected = main_output(model(**batch))
    assert torch.equal(main_output(model.forward(**batch)), expected)
    assert torch.equal(main_output(model.forward(batch["input_ids"], batch["attention_mask"])), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(main_output(twin.forward(**batch)), expected)
        assert isinstance(twin, type(untouched))
    hidden = model.forward(**batch, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in hidden] == [batch["input_ids"].shape[1]] * 3
    model.disable_adapters()
    assert torch.equal(main_output(model.forward(**batch)), main_output(untouched(**batch)))
    model.enable_adapters()
    assert inspect.signature(model.forward) == inspect.signature(untouched.forward)
    assert (type(model).__name__, type(model).__module__) == (type(untouched).__name__, type(untouched).__module__)

    add_hook_to_module(model, ModelHook())  # puts a `forward` of its own on the instance
    assert torch.equal(main_output(model(**batch)), expected)
    remove_hook_from_module(model)
    hooked = make_model(family, "FEATURE_EXTRACTION")
    add_hook_to_module(hooked, ModelHook())
    hooked.add_adapter(make_config())
    peft.set_peft_model_state_dict(hooked.eval(), peft.get_peft_model_state_dict(model))
    assert torch.equal(main_output(hooked(**batch)), expected)


@torch.no_grad()
def test_sentence_transformers_pools_the_users_tokens(tmp_path) -> None:
    model = make_model("BERT", "FEATURE_EXTRACTION")
    model.save_pretrained(tmp_path)
    BertTokenizer(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"])}).save_pretrained(
        tmp_path
    )
    texts = ["a", "a b b a"]
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    before = plain.encode(texts, convert_to_tensor=True)
    plain.add_adapter(make_config("FEATURE_EXTRACTION"))
    embedded = plain.eval().encode(texts, convert_to_tensor=True)
    assert not torch.allclose(embedded, before)
    batch = plain.tokenizer(texts, padding=True, return_tensors="pt")
    hidden = plain[0].model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(embedded, (hidden * mask).sum(1) / mask.sum(1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_inject_adapter_in_model() -> None:
    batch = make_batch("Llama", "CAUSAL_LM")
    model = inject_adapter_in_model(make_config(), make_model("Llama", "CAUSAL_LM")).eval()
    same = get_peft_model(make_model("Llama", "CAUSAL_LM"), make_config()).eval()
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(same))
    assert torch.equal(main_output(model(**batch)), main_output(same(**batch)))


def test_a_pickled_model_is_read_in_a_fresh_process(tmp_path) -> None:
    model = get_peft_model(make_model("Llama", "CAUSAL_LM"), make_config()).eval()
    batch = make_batch("Llama", "CAUSAL_LM")
    with torch.no_grad():
        expected = main_output(model(**batch))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, batch, expected)))
    program = (
        "import pickle, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "model, batch, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(**batch).logits, expected)\n"
        "assert model.active_adapter == 'default' and model.peft_type == 'PTUNING'\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pickle")], check=True)
