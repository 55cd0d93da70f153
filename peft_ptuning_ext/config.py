# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`PTuningConfig`: every field of the method and all of their validation."""

from __future__ import annotations

import copy
import enum
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Optional, Union

from peft import PeftConfig, PeftType, PromptTuningInit
from transformers import AutoConfig, PreTrainedTokenizerBase

from .files.card import complete_card
from .files.checkpoint import CheckpointSource, replacing, saved_vocabulary
from .registration import PEFT_TYPE_NAME
from .templates.cloze import check_settings
from .templates.template import PromptTemplate


class PromptEncoderType(str, enum.Enum):
    """What produces the prompt from the trainable parameters. See [`PTuningConfig`]."""

    NONE = "NONE"
    MLP = "MLP"
    LSTM = "LSTM"
    RESIDUAL = "RESIDUAL"


class PromptDepth(str, enum.Enum):
    """Where a prompt enters the model. See [`PTuningConfig`]."""

    INPUT = "INPUT"
    DEEP = "DEEP"


class PromptStacks(str, enum.Enum):
    """Which stacks of an encoder-decoder have a deep prompt. See [`PTuningConfig`]."""

    ENCODER = "ENCODER"
    DECODER = "DECODER"
    BOTH = "BOTH"


class PromptInit(str, enum.Enum):
    """The starts of a prompt that PEFT's [`~peft.PromptTuningInit`] does not have. See [`PTuningConfig`]."""

    ADAPTER = "ADAPTER"
    ZERO_VALUES = "ZERO_VALUES"


# Bounded, so that the network stays within a few tens of prompts of 20 vectors at any width.
DEFAULT_HIDDEN_SIZE = {PromptEncoderType.MLP: 128, PromptEncoderType.LSTM: 64, PromptEncoderType.RESIDUAL: 128}
DEFAULT_NUM_LAYERS = {PromptEncoderType.MLP: 2, PromptEncoderType.LSTM: 2, PromptEncoderType.RESIDUAL: 1}

DEFAULT_NUM_VIRTUAL_TOKENS = 20

# What can make the keys and values of a deep prompt.
DEEP_ENCODER_TYPES = (PromptEncoderType.NONE, PromptEncoderType.MLP)

# Fields that are used with one start of the prompt only.
INIT_FIELDS = {
    "prompt_tuning_init_text": PromptTuningInit.TEXT,
    "tokenizer_name_or_path": PromptTuningInit.TEXT,
    "prompt_tuning_init_adapter": PromptInit.ADAPTER,
}

# Configs come from strangers, and a network is laid out (without memory) before the weights beside it are compared.
MAX_SIZE, MAX_LAYERS = 2**24, 64


@dataclass
class PTuningConfig(PeftConfig):
    """Configuration of P-tuning with the prompt hidden inside the backbone ([`PTuningModel`]).

    The field names are those of PEFT's [`~peft.PromptEncoderConfig`] and [`~peft.PromptTuningConfig`]. The method is
    that of "GPT Understands, Too" (Liu et al., 2021, https://huggingface.co/papers/2103.10385, section 3); plain
    vectors without a network are those of Lester et al., 2021 (https://huggingface.co/papers/2104.08691). Deep prompts
    are those of "P-Tuning v2" (Liu et al., 2022, https://huggingface.co/papers/2110.07602).

    Args:
        num_virtual_tokens (`int`, *optional*):
            Number V of trainable vectors; at least 1. Defaults to 20, with a `prompt_template` to its number.
        prompt_depth (`PromptDepth` or `str`, defaults to `"INPUT"`):
            `"INPUT"`: V trainable vectors in front of the input embeddings. `"DEEP"`: V trainable keys and values in
            front of those of the text, in the attention of every layer.
        prompt_stacks (`PromptStacks` or `str`, *optional*):
            With `"DEEP"` on an encoder-decoder: which stack has the prompt, `"ENCODER"`, `"DECODER"` (in its
            self-attention) or `"BOTH"`. Where nothing is given: the encoder. Elsewhere it must be left out.
        shift_positions (`bool`, defaults to `False`):
            With `"DEEP"`: whether the text's positions begin at V, as with PEFT's prefix tuning. By default they stay
            the model's own. With `"INPUT"`, the text always stands behind the prompt. The decoder of an
            encoder-decoder keeps its own positions.
        encoder_reparameterization_type (`PromptEncoderType` or `str`, *optional*):
            What the trainable parameters go through to become the prompt. `"NONE"`: nothing, they are the prompt. A
            learning rate for them is relative to their scale: with Adam about half the RMS of the model's embeddings,
            of a deep prompt 0.05 times that of its keys and values.
            `"MLP"`: a perceptron, as in PEFT. `"LSTM"`: a bidirectional LSTM and a perceptron, as in the P-tuning
            paper (section 3.2) and PEFT. `"RESIDUAL"`: a bottleneck with LayerNorm and a skip connection, shared by
            the V vectors, as in Residual Prompt Tuning (Razdaibiedina et al., 2023,
            https://huggingface.co/papers/2305.03937, section 3). Where nothing is given: `"NONE"`, or `"MLP"` (PEFT's
            default) if any other `encoder_*` field is given.
        encoder_hidden_size (`int`, *optional*):
            Width of the network; the bottleneck of `"RESIDUAL"`. Defaults to 128, for `"LSTM"` to 64 per direction.
        encoder_num_layers (`int`, *optional*):
            Hidden layers of `"MLP"` (default 2, PEFT's shape) and `"RESIDUAL"` (default 1, the paper's shape), stacked
            layers of `"LSTM"` (default 2). `"DEEP"` takes `"NONE"` and `"MLP"`, whose last layer then makes all keys
            and values.
        encoder_dropout (`float`, defaults to 0.0):
            Dropout probability in the network, 0 ≤ p < 1: after each hidden layer of `"MLP"` and `"RESIDUAL"`,
            between the stacked layers of `"LSTM"` (which therefore needs at least 2 of them). With `"DEEP"` it acts on
            the keys and values, with or without a network.
        prompt_tuning_init (`PromptTuningInit` or `str`, defaults to `"RANDOM"`):
            Where the prompt starts, whatever the encoder. `"RANDOM"`: normal vectors with the mean and standard
            deviation of the model's own embeddings. `"SAMPLE_VOCAB"`: the embeddings of V random tokens. `"TEXT"`:
            the embeddings of `prompt_tuning_init_text`, repeated or cut to V tokens, no special tokens added.
            `"ADAPTER"`: the trained prompt of another adapter, `prompt_tuning_init_adapter`. With `"DEEP"`, the first
            three mean the keys and values that the model itself makes of tokens; `"ZERO_VALUES"` takes such keys at
            random and values of 0. A deep prompt with `"ADAPTER"` starts at another deep one, or at the keys and
            values that the model makes of a prompt at the input.
        prompt_tuning_init_adapter (`str` or `os.PathLike`, *optional*):
            The adapter of `"ADAPTER"`, a folder or a repository on the Hub: one of this package, or one of stock PEFT,
            `PROMPT_TUNING` or `P_TUNING`, for a deep prompt also `PREFIX_TUNING` or `CARTRIDGE`. Its task may be
            another; nothing but its prompt is read. It must have V virtual tokens of the model's sizes. With
            `"INPUT"`, its prompt must be at the input, too. A deep prompt that starts at the vectors of a causal
            decoder's input computes at first what they did. Some models, such as GPT-2, OPT and GPT-J, need
            `shift_positions=True` for that; with it, all tested families do (docs/guarantees.md). Like the tokenizer,
            the adapter is only used for a config that the caller has made: a config that comes from a file never makes
            anything fetch or read another adapter.
        prompt_tuning_init_text (`str`, *optional*):
            The text of `"TEXT"`.
        tokenizer_name_or_path (`str` or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of `"TEXT"`, by name or as an object (of which the name is kept in the field). It is only
            used for a config that the caller has made: a config that comes from a file never makes anything fetch or
            run a tokenizer, its prompt starts at `"RANDOM"` and gets its values from the weights beside it.
        modules_to_save (`list[str]`, *optional*):
            Names of modules besides the prompt to train and save in full, such as a task head. PEFT adds the
            classification head by itself for the task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Ids of tokens whose embeddings are trained and saved beside the prompt, such as those that a chat template
            adds ([`~peft.TrainableTokensConfig`], as in [`~peft.LoraConfig`]): a list for the model's input embedding,
            or lists by the name of the embedding module. What is tied to the input embedding follows it, unless
            `modules_to_save` names it.
        prompt_template (`PromptTemplate` or `dict`, *optional*):
            Where the vectors stand in a text, and what else stands there. The `input_ids` are then those that the
            template has encoded, with a placeholder for each vector. By default the vectors are in front of all texts.
        cloze (`dict`, *optional*):
            The words of the [`ClozeClassifier`] that the adapter is on. It is filled in when the adapter is added.
        task_type (`TaskType` or `str`, *optional*), inference_mode (`bool`, defaults to `False`):
            As in [`~peft.PeftConfig`]. With `inference_mode=True` the prompt is frozen. The task type decides how PEFT
            calls the model: a module that holds a transformers model and is none itself goes without.

    Raises:
        ValueError: A value is outside its range, or a field has no meaning for the chosen encoder or start.
        TypeError: A value has the wrong type.
    """

    num_virtual_tokens: Optional[int] = field(default=None)
    encoder_reparameterization_type: Optional[Union[str, PromptEncoderType]] = field(default=None)
    encoder_hidden_size: Optional[int] = field(default=None)
    encoder_num_layers: Optional[int] = field(default=None)
    encoder_dropout: float = field(default=0.0)
    prompt_tuning_init: Union[str, PromptTuningInit, PromptInit] = field(default=PromptTuningInit.RANDOM)
    prompt_tuning_init_text: Optional[str] = field(default=None)
    tokenizer_name_or_path: Optional[str] = field(default=None)
    modules_to_save: Optional[list[str]] = field(default=None)
    prompt_tuning_init_adapter: Optional[str] = field(default=None)
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(default=None)
    prompt_depth: Union[str, PromptDepth] = field(default=PromptDepth.INPUT)
    shift_positions: bool = field(default=False)
    prompt_template: Optional[PromptTemplate] = field(default=None)
    cloze: Optional[dict[str, Any]] = field(default=None)
    prompt_stacks: Optional[Union[str, PromptStacks]] = field(default=None)

    # Read by PEFT's injection on every config. They are no fields: which module is adapted follows from the model.
    target_modules = None
    target_parameters = None

    def __post_init__(self):
        # `save_pretrained` writes the type and a caller has no reason to: this tells a file's config from a caller's.
        self._from_file = self.peft_type is not None
        self._source: Optional[CheckpointSource] = None
        self._tokenizer: Optional[PreTrainedTokenizerBase] = None
        super().__post_init__()
        if self.peft_type not in (None, PEFT_TYPE_NAME):
            raise ValueError(f"`peft_type` of a PTuningConfig is {PEFT_TYPE_NAME!r}, got {self.peft_type!r}.")
        self.peft_type = PeftType(PEFT_TYPE_NAME)
        for name in ("inference_mode", "shift_positions"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be a bool, got {getattr(self, name)!r}.")
        self.prompt_depth = _check_choice("prompt_depth", self.prompt_depth, *PromptDepth)
        if self.shift_positions and not self.is_deep:
            raise ValueError(
                "`shift_positions` is only used with prompt_depth='DEEP'. In front of the input embeddings, a prompt "
                "always takes V positions."
            )
        self._resolve_template()
        self._check_stacks()
        _check_int("num_virtual_tokens", self.num_virtual_tokens)
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            if not isinstance(getattr(self, name), (str, NoneType)):
                raise TypeError(f"`{name}` must be a string, got {getattr(self, name)!r}.")
        if not isinstance(self.auto_mapping, (dict, NoneType)):
            raise TypeError(f"`auto_mapping` must be a dict, got {self.auto_mapping!r}.")
        self._check_modules_to_save()
        check_token_indices(self.trainable_token_indices)
        if self.cloze is not None:
            check_settings(self.cloze)
        self._resolve_encoder()
        self._check_init()

    @property
    def is_deep(self) -> bool:
        """Whether the prompt stands in every layer."""
        return self.prompt_depth is PromptDepth.DEEP

    def of_plain_prompt(self) -> PTuningConfig:
        """A copy for a prompt whose numbers are known: without a network, and without dropout inside of one."""
        config = copy.copy(self)  # other adapters may have the same config
        config.encoder_reparameterization_type = PromptEncoderType.NONE
        config.encoder_hidden_size = config.encoder_num_layers = None
        config.encoder_dropout = self.encoder_dropout if self.is_deep else 0.0
        return config

    def forget_start(self) -> None:
        """Leaves out where the prompt once started, which says nothing about what it has become."""
        self.prompt_tuning_init, self._tokenizer = PromptTuningInit.RANDOM, None
        for name in INIT_FIELDS:
            setattr(self, name, None)

    def _resolve_template(self) -> None:
        template = self.prompt_template
        if template is not None and not isinstance(template, PromptTemplate):
            template = self.prompt_template = PromptTemplate.from_dict(template)
        length = DEFAULT_NUM_VIRTUAL_TOKENS if template is None else template.num_virtual_tokens
        if self.num_virtual_tokens is None:
            self.num_virtual_tokens = length
        if template is None:
            return
        if self.num_virtual_tokens != length:
            raise ValueError(
                f"`num_virtual_tokens` is {self.num_virtual_tokens!r}, and the slots of `prompt_template` have "
                f"{length}. Leave `num_virtual_tokens` out."
            )
        if self.is_deep:
            raise ValueError(
                "`prompt_template` puts vectors among the input embeddings, and prompt_depth='DEEP' has none: its "
                "keys and values stand in every layer. Leave one of the two out."
            )
        if template.placeholder_id is None:
            raise ValueError(
                "`prompt_template` does not know the id of its placeholder yet, by which the model finds the slots. "
                "Pass `template.for_tokenizer(tokenizer)`."
            )

    @property
    def is_in_encoder(self) -> bool:
        """Whether the encoder of an encoder-decoder, or the only stack of another model, has the prompt."""
        return self.prompt_stacks is not PromptStacks.DECODER

    @property
    def is_in_decoder(self) -> bool:
        """Whether the decoder of an encoder-decoder has a prompt of its own."""
        return self.prompt_stacks in (PromptStacks.DECODER, PromptStacks.BOTH)

    def _check_stacks(self) -> None:
        if self.prompt_stacks is None:
            return
        self.prompt_stacks = _check_choice("prompt_stacks", self.prompt_stacks, *PromptStacks)
        if not self.is_deep:
            raise ValueError(
                "`prompt_stacks` is only used with prompt_depth='DEEP'. A prompt in front of the input embeddings "
                "always enters the encoder."
            )
        if self.is_in_decoder and self.shift_positions:
            raise ValueError(
                f"`shift_positions` has no meaning with prompt_stacks={self.prompt_stacks.value!r}: the decoder of an "
                "encoder-decoder counts its positions by itself. Leave it out."
            )

    def _check_modules_to_save(self) -> None:
        names = self.modules_to_save
        if names is None:
            return
        if isinstance(names, (set, tuple)):
            names = self.modules_to_save = sorted(names)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`modules_to_save` must be a list of module names, got {names!r}.")

    def _resolve_encoder(self) -> None:
        network_fields = {
            "encoder_hidden_size": self.encoder_hidden_size is not None,
            "encoder_num_layers": self.encoder_num_layers is not None,
            "encoder_dropout": self.encoder_dropout != 0,
        }
        if self.is_deep:
            del network_fields["encoder_dropout"]  # it acts on the keys and values
        given = [name for name, is_given in network_fields.items() if is_given]
        encoder = self.encoder_reparameterization_type
        if encoder is None:
            encoder = PromptEncoderType.MLP if given else PromptEncoderType.NONE
        encoder = _check_choice("encoder_reparameterization_type", encoder, *PromptEncoderType)
        self.encoder_reparameterization_type = encoder

        if isinstance(self.encoder_dropout, bool) or not isinstance(self.encoder_dropout, (int, float)):
            raise TypeError(f"`encoder_dropout` must be a float, got {self.encoder_dropout!r}.")
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"`encoder_dropout` must be at least 0 and below 1, got {self.encoder_dropout}.")
        if self.is_deep and encoder not in DEEP_ENCODER_TYPES:
            allowed = " or ".join(repr(kind.value) for kind in DEEP_ENCODER_TYPES)
            raise ValueError(
                f"encoder_reparameterization_type={encoder.value!r} makes vectors for the input, and prompt_depth is "
                f"'DEEP'. Choose {allowed}."
            )
        if encoder is PromptEncoderType.NONE:
            if given:
                networks = "'MLP'" if self.is_deep else "'MLP', 'LSTM' or 'RESIDUAL'"
                raise ValueError(
                    f"{', '.join(f'`{name}`' for name in given)} has no meaning with "
                    "encoder_reparameterization_type='NONE', which has no network. "
                    f"Leave it out or choose {networks}."
                )
            return
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = DEFAULT_HIDDEN_SIZE[encoder]
        if self.encoder_num_layers is None:
            self.encoder_num_layers = DEFAULT_NUM_LAYERS[encoder]
        _check_int("encoder_hidden_size", self.encoder_hidden_size)
        _check_int("encoder_num_layers", self.encoder_num_layers, MAX_LAYERS)
        if encoder is PromptEncoderType.LSTM and self.encoder_dropout and self.encoder_num_layers < 2:
            raise ValueError(
                "`encoder_dropout` of the LSTM lies between its stacked layers, and `encoder_num_layers` is 1. "
                "Use at least 2 layers or no dropout."
            )

    def _check_init(self) -> None:
        init = _check_choice("prompt_tuning_init", self.prompt_tuning_init, *PromptTuningInit, *PromptInit)
        self.prompt_tuning_init = init
        if init is PromptInit.ZERO_VALUES and not self.is_deep:
            raise ValueError(
                "prompt_tuning_init='ZERO_VALUES' is only used with prompt_depth='DEEP': vectors in front of the "
                "input embeddings have no values of their own."
            )
        if isinstance(self.tokenizer_name_or_path, PreTrainedTokenizerBase):
            self._tokenizer = self.tokenizer_name_or_path
            self.tokenizer_name_or_path = self._tokenizer.name_or_path
        if isinstance(self.prompt_tuning_init_adapter, os.PathLike):
            self.prompt_tuning_init_adapter = os.fspath(self.prompt_tuning_init_adapter)
        for name, of_init in INIT_FIELDS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"`{name}` must be a string, got {type(value).__name__}.")
            if value is not None and init is not of_init:
                raise ValueError(
                    f"`{name}` is only used with prompt_tuning_init={of_init.value!r}, got "
                    f"prompt_tuning_init={init.value!r}."
                )
        if self._from_file:
            return
        if init is PromptInit.ADAPTER and not self.prompt_tuning_init_adapter:
            raise ValueError(
                "prompt_tuning_init='ADAPTER' needs `prompt_tuning_init_adapter`, the folder or Hub name of an "
                f"adapter, got {self.prompt_tuning_init_adapter!r}."
            )
        if init is PromptTuningInit.TEXT:
            if not self.prompt_tuning_init_text:
                raise ValueError(
                    "prompt_tuning_init='TEXT' needs a non-empty `prompt_tuning_init_text`, "
                    f"got {self.prompt_tuning_init_text!r}."
                )
            if self._tokenizer is None and not self.tokenizer_name_or_path:
                raise ValueError(
                    "prompt_tuning_init='TEXT' needs `tokenizer_name_or_path`: a name, a path or a tokenizer."
                )

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves the config, whole or not at all. See [`~peft.PeftConfig.save_pretrained`].

        Where it completes an adapter that PEFT has just saved, whose card is made of placeholders, it fills the card.
        If PEFT has saved the vocabulary too, because it was resized, a warning says what loading the adapter needs.
        """
        with replacing(save_directory) as folder:
            super().save_pretrained(folder, **kwargs)
        complete_card(Path(save_directory), self)
        rows = saved_vocabulary(Path(save_directory), self.modules_to_save or ())
        if rows is not None and (rows_of_base := self._vocabulary_of_base()) not in (None, rows):
            warnings.warn(
                f"The vocabulary was resized from {rows_of_base} to {rows} rows in memory only: this adapter does not "
                f"load on {self.base_model_name_or_path} as it is. Save the resized model and its tokenizer, load the "
                "model from there and add prompts then. Or, whenever this adapter is loaded, load the base model, "
                f"call `resize_token_embeddings({rows})`, and `PeftModel.from_pretrained(model, folder)`.",
                stacklevel=2,
            )

    def _vocabulary_of_base(self) -> Optional[int]:
        """How many rows the vocabulary of the saved base model has, if that can be told."""
        try:
            base = AutoConfig.from_pretrained(
                self.base_model_name_or_path, revision=self.revision, trust_remote_code=False
            )
        except (OSError, ValueError):
            return None
        return getattr(base.get_text_config(), "vocab_size", None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs):
        """Loads a saved config. See [`~peft.PeftConfig.from_pretrained`].

        The config remembers where it came from, so that the weights beside it are checked before a model is changed.
        A `.bin` pickle of weights is only accepted with `use_safetensors=False`.
        """
        use_safetensors = kwargs.pop("use_safetensors", True)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        download_kwargs, _, _ = cls._split_kwargs(kwargs)
        config._source = CheckpointSource(
            str(pretrained_model_name_or_path), subfolder, use_safetensors is not False, download_kwargs
        )
        return config


def check_token_indices(value: object) -> None:
    """Raises `TypeError` or `ValueError` unless `value` is a list of token ids, a dict of such lists, or `None`.

    Trainers set the field of a config that is there already, so it is checked again when the adapter is made.
    """
    if value is None:
        return
    for indices in value.values() if isinstance(value, dict) else (value,):
        if not isinstance(indices, list) or not all(type(index) is int for index in indices):
            raise TypeError(
                "`trainable_token_indices` must be a list of token ids, or a dict of such lists by the name of the "
                f"embedding, got {value!r}."
            )
        if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError(
                f"`trainable_token_indices` must be different ids of at least 0, and some, got {value!r}."
            )
    if not value or not all(isinstance(name, str) and name for name in value if isinstance(value, dict)):
        raise ValueError(f"`trainable_token_indices` must name embedding modules, got {value!r}.")


def _check_int(name: str, value: object, largest: int = MAX_SIZE) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}.")
    if not 1 <= value <= largest:
        raise ValueError(f"`{name}` must be from 1 to {largest}, got {value}.")


def _check_choice(name: str, value: object, *choices: enum.Enum) -> enum.Enum:
    for choice in choices:
        if value == choice:  # the members are strings, too
            return choice
    allowed = ", ".join(repr(choice.value) for choice in choices)
    raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
