# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Sharing through a Hub: pushed from one process, loaded in another, over the protocol of `huggingface_hub`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from families import make_model
from hub_server import TOKEN, Hub, serving


@pytest.fixture(name="hub")
def _hub():
    with serving() as hub:
        yield hub


PRELUDE = """
import json, sys, torch
torch.set_num_threads(1)
import peft_ptuning_ext
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft_ptuning_ext import PTuningConfig
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
base = lambda: AutoModelForCausalLM.from_pretrained(folder + "/base")
ids = torch.tensor([[5, 6, 7, 8]])
logits = lambda model: model.eval()(input_ids=ids).logits.tolist()
def error(call):
    try:
        call()
    except Exception as exception:
        names = []
        while exception is not None:
            names.append(type(exception).__name__ + ": " + str(exception))
            exception = exception.__cause__ or exception.__context__
        return names
"""


def start(code: str, hub: Hub, folder: Path, home: str, token: str | None = TOKEN, **env: str):
    """A process that runs `code` behind the prelude; it may set `result`."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env = inherited | env | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / home), "HF_HUB_DISABLE_XET": "1"}
    env |= {"PYTHONWARNINGS": "ignore"} | ({"HF_TOKEN": token} if token else {})
    program = f"{PRELUDE}\nresult = None\n{code}\njson.dump(result, open(sys.argv[2], 'w'))"
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(folder / f"{home}.json")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(code: str, hub: Hub, folder: Path, home: str, token: str | None = TOKEN, **env: str):
    """What `code` sets as `result`."""
    process = start(code, hub, folder, home, token, **env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return json.loads((folder / f"{home}.json").read_text())


@pytest.fixture(name="folder")
def _folder(tmp_path) -> Path:
    make_model("Llama", "CAUSAL_LM").save_pretrained(tmp_path / "base")
    return tmp_path


PUSH = """
torch.manual_seed(0)
model = get_peft_model(base(), PTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8))
"""


def test_what_is_pushed_comes_back(hub, folder) -> None:
    pushed = run(
        PUSH
        + """
result = [logits(model)]
model.push_to_hub("user/adapter", private=True)
model.base_model._layer().ptuning_encoders["default"].embedding.data.add_(1)
result.append(logits(model))
model.push_to_hub("user/adapter", revision="second")
model.peft_config["default"].push_to_hub("user/config")
import tempfile, huggingface_hub
with tempfile.TemporaryDirectory() as temporary:
    model.save_pretrained(temporary)
    huggingface_hub.upload_folder(repo_id="user/adapter", folder_path=temporary, path_in_repo="inner")
""",
        hub,
        folder,
        "author",
    )
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= hub.files("user/adapter").keys()
    assert "adapter_config.json" in hub.files("user/config")
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)

    load = """
loaded = PeftModel.from_pretrained(base(), "user/adapter")
result = [logits(loaded), logits(PeftModel.from_pretrained(base(), "user/adapter", revision="second"))]
result.append(logits(AutoPeftModelForCausalLM.from_pretrained("user/adapter", revision="second")))
result.append(logits(PeftModel.from_pretrained(base(), "user/adapter", subfolder="inner")))
loaded.load_adapter("user/adapter", "other", revision="second", is_trainable=True)
loaded.set_adapter("other")
result.append(logits(loaded))
plain = base()
plain.load_adapter("user/adapter", adapter_kwargs={"cache_dir": folder + "/elsewhere"})
result.append(logits(plain))
assert PTuningConfig.from_pretrained("user/config").num_virtual_tokens == 5
assert PeftConfig.from_pretrained("user/config", token=%r).encoder_hidden_size == 8
"""
    first, second = pushed
    assert run(load % TOKEN, hub, folder, "reader") == [first, second, second, second, second, first]
    assert (folder / "elsewhere" / "models--user--adapter").is_dir()

    # Nothing of it for a stranger, unless the token is passed; and the cache works when the server is gone.
    refused = """
result = [
    error(lambda: PeftModel.from_pretrained(base(), "user/adapter")),
    error(lambda: get_peft_model(base(), PTuningConfig()).push_to_hub("user/adapter")),
    logits(PeftModel.from_pretrained(base(), "user/adapter", token=%r)),
]
"""
    load_error, push_error, with_token = run(refused % TOKEN, hub, folder, "stranger", token=None)
    assert "Can't find 'adapter_config.json' at 'user/adapter'" in load_error[0]
    assert "RepositoryNotFoundError" in "".join(load_error)
    assert "401" in "".join(push_error)
    assert with_token == first


def test_errors_name_what_is_not_there_and_the_cache_outlives_the_server(folder) -> None:
    with serving() as hub:
        run(PUSH + "model.push_to_hub('user/adapter')", hub, folder, "author")
        errors = run(
            """
result = [
    error(lambda: PeftModel.from_pretrained(base(), "user/adapter", revision="no-such")),
    error(lambda: PeftModel.from_pretrained(base(), "user/nothing")),
    error(lambda: PeftModel.from_pretrained(base(), "user/adapter", subfolder="no-such")),
    logits(PeftModel.from_pretrained(base(), "user/adapter")),
]
""",
            hub,
            folder,
            "reader",
        )
    assert "RevisionNotFoundError" in "".join(errors[0])
    assert "RepositoryNotFoundError" in "".join(errors[1])
    assert "EntryNotFoundError" in "".join(errors[2])
    # PEFT asks the server whether there is a file unless it is told that it is gone.
    again = "result = logits(PeftModel.from_pretrained(base(), 'user/adapter'))"
    assert run(again, hub, folder, "reader", HF_HUB_OFFLINE="1") == errors[3]


def test_the_card_and_what_trainer_pushes(hub, folder) -> None:
    code = """
from datasets import Dataset
from peft_ptuning_ext import make_model_card
from transformers import Trainer, TrainingArguments
rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, 6, 7]] * 4})
options = {"push_to_hub": True, "hub_model_id": "user/trained", "use_cpu": True, "report_to": "none", "max_steps": 2}
trainer = Trainer(model, TrainingArguments(folder + "/out", **options), train_dataset=rows)
trainer.train()
trainer.push_to_hub()
make_model_card(model, "user/adapter", license="mit", metrics={"loss": 0.5}).push_to_hub("user/adapter")
model.push_to_hub("user/adapter")
result = logits(model)
"""
    create = "import huggingface_hub\nhuggingface_hub.create_repo('user/adapter')\n"
    expected = run(PUSH + create + code, hub, folder, "author")
    assert {"adapter_model.safetensors", "training_args.bin"} <= hub.files("user/trained").keys()
    card = hub.files("user/adapter")["README.md"].decode()
    assert "license: mit" in card
    assert "import peft_ptuning_ext\nfrom peft import AutoPeftModelForCausalLM" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert run(code + "result = logits(model)", hub, folder, "reader") == expected
    loaded = "result = logits(PeftModel.from_pretrained(base(), 'user/trained'))"
    assert run(loaded, hub, folder, "reader") == expected


SHARE = """
from peft import PeftModel
from peft_ptuning_ext import make_model_card

model.push_to_hub("user/my-prompt")
make_model_card(model, "user/my-prompt", license="apache-2.0").push_to_hub("user/my-prompt")
first, model = logits(model), PeftModel.from_pretrained(base(), "user/my-prompt", revision="main")
"""


def test_an_adapter_and_its_card_are_shared(hub, folder) -> None:
    check = SHARE + "result = [first, logits(model)]"
    first, loaded = run(PUSH + check, hub, folder, "author")
    assert loaded == first
    assert "license: apache-2.0" in hub.files("user/my-prompt")["README.md"].decode()


def test_an_upload_that_is_killed_leaves_the_repository_as_it_was(hub, folder) -> None:
    run(PUSH + "model.push_to_hub('user/adapter')", hub, folder, "author")
    before = dict(hub.files("user/adapter"))
    arrived, killed = threading.Event(), threading.Event()

    def hold() -> None:
        arrived.set()
        killed.wait(60)

    hub.on_large_file = hold
    code = PUSH + "model.base_model._layer().ptuning_encoders['default'].embedding.data.add_(1)\n"
    process = start(code + "model.push_to_hub('user/adapter')", hub, folder, "author")
    assert arrived.wait(120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    assert hub.files("user/adapter") == before
    hub.on_large_file = lambda: None
    run(code + "model.push_to_hub('user/adapter')", hub, folder, "author")
    assert hub.files("user/adapter") != before
