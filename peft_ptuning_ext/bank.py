# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`PromptBank`: any number of prompts on one model, in one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any, Optional

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import nn

from .adapters.by_row import choose_for_call, use_adapters
from .adapters.checks import check_adapter
from .adapters.deep_start import DeepStart, find_deep_start
from .adapters.installation import install, take_deep_prompts
from .adapters.records import check_modules, check_table, read_config, read_record, record_of, settings_of
from .adapters.removal import remove_adapters
from .adapters.tensor_parallel import check_tensor_parallel
from .backbone import find_backbone
from .config import PTuningConfig
from .files.bank import FILE_NAME, BankFile, check_record, write_bank
from .prompts.adapter import base_of, find_adapter, find_layer, find_stack
from .prompts.choice import BASE, list_names, repeating
from .prompts.deep import Shapes, describe
from .prompts.layer import PTuningLayer
from .prompts.stored import StoredPrompts, config_of


class PromptBank:
    """Any number of prompts on one base model, of which each row of a batch may have another one.

    A bank stands beside PEFT's adapters. PEFT keeps a config and modules for each adapter, and goes through all of
    them when one is added or made active. A bank keeps the numbers of a prompt and its name. Prompts in a file are
    read when they are needed, so a bank may be larger than memory. Its prompts are for inference: those of networks
    are folded to their numbers, and nothing of a bank is trained.

    Args:
        model (`nn.Module`):
            A transformers model, or a `PeftModel` around one. The bank is at the model inside. While no prompt is
            chosen, the model computes what it did before.

    Raises:
        ValueError: P-tuning can't work on this model, or it has a bank already. The model is then as it was.

    Example:

    ```python
    bank = PromptBank(model)
    bank.add(adapted, "invoices")
    bank.add("folder/of/an/adapter", "orders")
    bank.save("bank")

    bank = PromptBank.from_pretrained(AutoModelForCausalLM.from_pretrained(name), "bank")
    bank.generate(**batch, adapter_names=["orders", "invoices", "__base__"])
    ```
    """

    def __init__(self, model: nn.Module) -> None:
        self._attach(model, None)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | os.PathLike, subfolder: Optional[str] = None, **kwargs: Any
    ) -> PromptBank:
        """Opens a bank that was saved, on its base model.

        The names are read, and no prompt is before it is needed.

        Args:
            model (`nn.Module`): As of [`PromptBank`].
            model_id (`str`): The folder, or a repository on the Hub.
            subfolder (`str`, *optional*): Folder inside it.
            kwargs: Arguments of [`~huggingface_hub.hf_hub_download`], such as `revision` and `token`.

        Raises:
            ValueError: There is no bank, it can't be read, or it is for another model. The model is then as it was.
        """
        file = BankFile(_find(str(model_id), subfolder, kwargs))
        bank = cls.__new__(cls)
        bank._attach(model, file)
        return bank

    def _attach(self, model: nn.Module, file: Optional[BankFile]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"A prompt bank is put on a model that is loaded, got a {type(model).__name__}.")
        base = base_of(model)
        layer, stack = find_layer(base), find_stack(base)
        if layer is not None and layer.bank is not None:
            raise ValueError(
                f"This {type(base).__name__} has a prompt bank already. Add prompts to that one, or take it away with "
                "its `unload()` first."
            )
        self._model, self._base = model, base
        self._backbone = find_backbone(base) if stack is None else stack.ptuning.backbone
        self._prompts = StoredPrompts(self._backbone.width, file)
        if both := [name for name in (layer.ptuning_encoders if layer else ()) if name in self._prompts]:
            raise ValueError(f"The bank has a prompt {both[0]!r}, and so has the model. Delete the adapter first.")
        starts = self._check_file(file)
        try:
            layer = install(base, self._backbone) if layer is None else layer
            layer.bank = self._prompts
            for start in starts:
                self._take(start)
        except BaseException:
            self.unload()
            raise

    def _check_file(self, file: Optional[BankFile]) -> list[DeepStart]:
        """Refuses a file that is not for the model; returns what the model needs for its deep prompts."""
        if file is None:
            return []
        starts: dict[Optional[str], DeepStart] = {}
        seen = set()
        for name, shape in file.shapes.items():
            settings, modules = file.settings.get(name, {}), file.modules.get(name, {})
            if (kind := (shape, repr(settings), repr(modules))) in seen:  # thousands are alike
                continue
            seen.add(kind)
            whose = f"{file.path}: prompt {name!r}"
            config = self._check_config(config_of(shape, settings))
            if config.is_deep and config.prompt_stacks not in starts:
                starts[config.prompt_stacks] = find_deep_start(self._base, self._backbone, config)
            shapes = starts[config.prompt_stacks].shapes if config.is_deep else None
            if shapes is not None and file.layers.get(_as_key(config.prompt_stacks)) != _as_lists(shapes):
                raise ValueError(
                    f"{whose} has keys and values for other layers than this {type(self._base).__name__}, which takes "
                    f"{describe(shapes)}. It is for another model."
                )
            check_table(shape, self._base, self._backbone, shapes, whose)
            check_modules(modules, self._base, whose)
        return [*starts.values()]

    def _check_config(self, config: PTuningConfig) -> PTuningConfig:
        check_adapter(self._base, self._backbone, config, (), is_in_peft_model=False)
        check_tensor_parallel(self._base, config, trains_rows=False)
        return config

    def _find_start(self, config: PTuningConfig) -> Optional[DeepStart]:
        """What the model needs for the first deep prompt of these stacks; `None` if it has it, or needs nothing."""
        if not config.is_deep or config.prompt_stacks in self._prompts.shapes:
            return None
        return find_deep_start(self._base, self._backbone, config)

    def _take(self, start: DeepStart) -> None:
        """Lets the model take deep prompts."""
        config = start.config
        take_deep_prompts(self._base, self._backbone, start.modules, config.is_in_encoder, config.is_in_decoder)
        self._prompts.shapes[config.prompt_stacks] = start.shapes

    def __call__(self, *args: Any, adapter_names: Optional[list] = None, **kwargs: Any) -> Any:
        """Calls the model, with a prompt for each row where `adapter_names` is given. See [`use_adapters`].

        A name in place of the list is that of all rows.
        """
        with self._choose(adapter_names, args, kwargs):
            return self._model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Optional[list] = None, **kwargs: Any) -> Any:
        """`generate` of the model, with a prompt for each row where `adapter_names` is given."""
        with self._choose(adapter_names, args, kwargs), repeating():
            return self._model.generate(*args, **kwargs)

    def _choose(self, adapter_names: Any, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager:
        if adapter_names is None:
            return nullcontext()
        self._check_attached()
        if isinstance(adapter_names, str):
            return use_adapters(self._base, adapter_names)
        return choose_for_call(self._base, adapter_names, args, kwargs)

    def _check_attached(self) -> None:
        """Refuses to go on where the model would not see it, or sees another bank."""
        if self.layer is None or self.layer.bank is not self._prompts:
            raise ValueError(
                f"This bank is not on its {type(self._base).__name__} any more: it was unloaded, or the model's input "
                "embedding was replaced. Make or open a bank on the model again."
            )

    @property
    def base_model(self) -> nn.Module:
        """The model below all adapters."""
        return self._base

    @property
    def layer(self) -> PTuningLayer:
        """The tuner layer of the model, around its input embedding."""
        return find_layer(self._base)

    def length(self, name: str) -> int:
        """How many virtual tokens a prompt has, V."""
        return self._prompts.config(name).num_virtual_tokens

    def vectors(self, name: str) -> torch.Tensor:
        """The vectors of a prompt at the input, (V, H).

        Raises:
            ValueError: There is none of this name, or it is deep.
        """
        if self._prompts.config(name).is_deep:
            raise ValueError(f"The prompt {name!r} is deep: it consists of keys and values, and has no vectors.")
        return self._prompts[name].table

    def why_more_than_vectors(self, name: str) -> Optional[str]:
        """Why a prompt is more than vectors in front of a text, as the end of a sentence; `None` if it is not."""
        if self._prompts.config(name).is_deep:
            return "is deep: it stands in every layer"
        trained = sorted(self._prompts.modules_of(name))
        return f"came with a module of its own, {trained[0]!r}" if trained else None

    def __contains__(self, name: object) -> bool:
        return name in self._prompts

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, source: nn.Module | str | os.PathLike, name: str, adapter_name: Optional[str] = None) -> None:
        """Adds the prompt of an adapter, with the modules that were trained beside it.

        A name that the bank has is given the new prompt. The adapter is copied: what is done to it, or to its folder,
        afterwards does not change the bank.

        Args:
            source (`nn.Module` or `str`):
                A model with the adapter, whose base model may be another object than the bank's; or the folder or
                repository on the Hub that the adapter was saved to.
            name (`str`): Its name in the bank.
            adapter_name (`str`, *optional*): Which adapter of the model; by default the active one.

        Raises:
            ValueError:
                There is no such adapter, the model has one that is named so, it is for another model, or it has
                something that can't be chosen by row: a prompt template, or trained rows of the vocabulary. The bank
                is then as it was.
        """
        if not isinstance(name, str) or name in ("", BASE):
            raise ValueError(f"The name of a prompt must be a text, and not empty or {BASE!r}, got {name!r}.")
        self._check_attached()
        if not isinstance(source, (nn.Module, str, os.PathLike)):
            raise TypeError(f"`source` must be a model with an adapter, or its folder, got a {type(source).__name__}.")
        if name in self.layer.ptuning_encoders:
            raise ValueError(f"The model has an adapter {name!r}. Choose another name, or delete the adapter first.")
        adapter = find_adapter(source, adapter_name) if isinstance(source, nn.Module) else None
        saved = read_config(str(source)) if adapter is None else adapter.config
        config = self._check_config(config_of((saved.num_virtual_tokens,), settings_of(saved)))
        start = self._find_start(config)
        shapes = start.shapes if start is not None else self._prompts.shapes.get(config.prompt_stacks)
        shapes = shapes if config.is_deep else None
        whose = f"The prompt of {name!r}"
        if adapter is None:
            record = read_record(str(source), saved, self._base, self._backbone, shapes)
        else:
            record, found = record_of(adapter)
            if found != shapes:
                raise ValueError(
                    f"{whose} has keys and values for {describe(found)}, and this {type(self._base).__name__} takes "
                    f"{describe(shapes)}. It is for another model."
                )
        check_table(tuple(record.table.shape), self._base, self._backbone, shapes, whose)
        check_modules(record.modules, self._base, whose)
        check_record(record, whose)
        if start is not None:
            self._take(start)
        self._prompts.put(name, record)
        find_stack(self._base).ptuning.states.drop(name)

    def delete(self, name: str) -> None:
        """Deletes a prompt. A file that it was read from stays as it is.

        Raises:
            ValueError: There is none of this name.
        """
        self._check_attached()
        if name not in self._prompts:
            raise ValueError(f"There is no prompt {name!r} in the bank, only {list_names(self._prompts)}.")
        self._prompts.remove(name)
        find_stack(self._base).ptuning.states.drop(name)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the bank as one safetensors file: whole, or not at all. Prompts of a file are not read into memory.

        Args:
            folder (`str`): Where `prompt_bank.safetensors` goes; made if it is not there.

        Raises:
            ValueError: `folder` is a file, or the names are more than a safetensors header can hold (100 MB).
        """
        layers = {_as_key(stacks): _as_lists(shapes) for stacks, shapes in self._prompts.shapes.items()}
        write_bank(folder, self._prompts, getattr(self._base, "name_or_path", None) or "", layers)

    def push_to_hub(self, repo_id: str, private: Optional[bool] = None, token: Optional[str] = None, **kwargs) -> Any:
        """Writes the bank to a repository on the Hub, which is made if it is not there.

        Args:
            repo_id (`str`): Name of the repository.
            private (`bool`, *optional*): Whether a new one is private.
            token (`str`, *optional*): By default that of the user who is logged in.
            kwargs: Arguments of [`~huggingface_hub.HfApi.upload_folder`], such as `commit_message`.
        """
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    def unload(self) -> nn.Module:
        """Takes the bank away, and returns the model as it was before. Adapters that it has stay."""
        layer, stack = find_layer(self._base), find_stack(self._base)
        if layer is not None and (layer.bank is None or layer.bank is self._prompts):
            layer.bank = None
            for name in self._prompts if stack is not None else ():
                stack.ptuning.states.drop(name)
            remove_adapters(self._base, [])
        return self._model


def base_model_name(model_id: str | os.PathLike, subfolder: Optional[str] = None, **kwargs: Any) -> str:
    """Name of the model that a saved bank is for; empty if it has none.

    Args:
        model_id (`str`), subfolder (`str`, *optional*), kwargs: As of [`PromptBank.from_pretrained`].

    Raises:
        ValueError: There is no bank, or it can't be read.
    """
    return BankFile(_find(str(model_id), subfolder, kwargs)).base_model_name


def _find(model_id: str, subfolder: Optional[str], kwargs: dict[str, Any]) -> str:
    """The path of a bank's file.

    Raises:
        ValueError: There is none.
    """
    folder = os.path.join(model_id, subfolder or "")
    path = os.path.join(folder, FILE_NAME)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(folder):
        try:
            return hf_hub_download(model_id, FILE_NAME, subfolder=subfolder, **kwargs)
        except LocalEntryNotFoundError:  # offline: nobody can tell
            raise
        except (EntryNotFoundError, HFValidationError):
            pass
    raise ValueError(f"{folder} has no {FILE_NAME}: it is no prompt bank.")


def _as_key(stacks: Optional[str]) -> str:
    """`prompt_stacks` as a key in JSON."""
    return getattr(stacks, "value", stacks) or ""


def _as_lists(shapes: Shapes) -> list[list[int]]:
    """Shapes as in JSON: for each layer its number, key-value heads and widths."""
    return [[layer, *shape] for layer, shape in shapes.items()]
