# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`PTuningModel`: which module is adapted, and the life of adapters: add, switch, delete, unload."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NoReturn, Optional

import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    set_additional_trainable_modules,
)
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import find_backbone
from .config import AdapterInit, PromptEncoderType, PTuningConfig, check_token_indices
from .files.checkpoint import ENCODER_KEY, TOKENS_KEY, check_file, check_state, saved_name
from .forward.wrap import attach, detach, why_in_row
from .prompts.adapter import find_layer, find_stack
from .prompts.encoder import build_encoder
from .prompts.layer import PTuningLayer, execution_device
from .prompts.saved import load_prompt
from .registration import PREFIX


# Attributes of the model that PEFT's class for a task type reads, and arguments that it passes to `forward`, given or
# not, beside those that all of these classes pass.
TASK_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SEQ_CLS": (("config",), ("labels",)),
    "TOKEN_CLS": (("config",), ("labels",)),
    "QUESTION_ANS": (("config",), ("start_positions", "end_positions")),
    "CAUSAL_LM": (("config", "prepare_inputs_for_generation"), ("labels",)),
    "SEQ_2_SEQ_LM": (
        ("prepare_inputs_for_generation",),
        ("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    ),
    "FEATURE_EXTRACTION": ((), ()),
}
COMMON_ARGUMENTS = ("input_ids", "attention_mask", "inputs_embeds")
COMMON_ARGUMENTS += ("output_attentions", "output_hidden_states", "return_dict")


class PTuningModel(BaseTuner):
    """P-tuning with the prompt hidden inside the backbone: everything outside sees the user's tokens only.

    The input embedding is wrapped by a [`PTuningLayer`], and the `forward` of the transformer stack above it by
    [`~peft_ptuning_ext.forward.wrap.run`]. It puts the prompt in front of the inputs and takes its positions off the
    outputs. Of the outputs, `attentions` keep the prompt's columns, and so does what an encoder hands to its decoder
    (`encoder_last_hidden_state`, `encoder_hidden_states`, `cross_attentions`).

    Args:
        model (`nn.Module`): The model to adapt, in place: a transformers model or a module that holds one.
        peft_config ([`PTuningConfig`] or `dict[str, PTuningConfig]`): The config, or one by adapter name.
        adapter_name (`str`): Name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Make the encoder on the meta device, to be loaded into.
        state_dict (`dict`, *optional*): Not needed; accepted as for other tuners.

    Raises:
        ValueError:
            P-tuning can't work on this model or PEFT not use it for the task type, the model or another one around
            the same backbone has this adapter already, or the weights beside a config that was loaded don't fit. The
            model is then as it was.
    """

    prefix: str = PREFIX
    tuner_layer_cls = PTuningLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model, peft_config, adapter_name, low_cpu_mem_usage=False, state_dict=None) -> None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model is a PeftModel already. Add a further adapter with `model.add_adapter(name, config)`, or "
                "get the base model back with `model.unload()` first."
            )
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(
                f"The model has an adapter named {adapter_name!r} already. Choose another name, or get the base model "
                "back with `unload()` first."
            )
        # A PeftModel hands over a dict, and its class follows from the task type. transformers injects a config alone,
        # and its task type is a label only.
        self._is_in_peft_model = isinstance(peft_config, dict)
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        self.register_state_dict_post_hook(_to_saved_names)
        self.register_load_state_dict_pre_hook(_from_saved_names)

    def named_modules(
        self, memo: Optional[set[nn.Module]] = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Modules under the names that they have in a model that is not compiled, as in `state_dict`.

        PEFT reads the keys of a file from these names. The file then fits a compiled model and a plain one.
        """
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield prefix + saved_name(name.removeprefix(prefix)), module

    def prompt_embeddings(self, adapter_name: Optional[str] = None) -> torch.Tensor:
        """Returns the prompt that enters the model, whatever the encoder: shape (V, H), in the embedding's dtype.

        Args:
            adapter_name (`str`, *optional*): Which adapter; by default the active one.

        Raises:
            ValueError: There is no adapter of this name, or none is active.
        """
        layer = self._layer()
        prompt = layer.prompt(layer.named_or_active(adapter_name))
        return prompt.to(layer.weight.dtype) if layer.weight.is_floating_point() else prompt

    @torch.no_grad()
    def nearest_tokens(
        self, tokenizer: PreTrainedTokenizerBase, k: int = 5, adapter_name: Optional[str] = None
    ) -> list[list[tuple[str, float]]]:
        """Returns, for each of the V vectors of a prompt, the `k` tokens whose embeddings point in the same direction.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's; its tokens are looked through.
            k (`int`, defaults to 5): How many tokens, with their cosine similarities, the nearest first.
            adapter_name (`str`, *optional*): Which adapter; by default the active one.

        Raises:
            ValueError: `k` is out of range, there is no adapter of this name, or none is active.
        """
        layer = self._layer()
        vocabulary = min(len(tokenizer), layer.get_base_layer().num_embeddings)
        if not 1 <= k <= vocabulary:
            raise ValueError(f"`k` must be from 1 to {vocabulary}, the size of the vocabulary, got {k}.")
        prompt = functional.normalize(self.prompt_embeddings(adapter_name).float().cpu(), dim=-1)
        directions = functional.normalize(layer.embed_ids(torch.arange(vocabulary)), dim=-1)
        similarities, ids = (prompt @ directions.T).topk(k)  # both (V, k)
        return [
            list(zip(tokenizer.convert_ids_to_tokens(row), values, strict=True))
            for row, values in zip(ids.tolist(), similarities.tolist(), strict=True)
        ]

    @property
    def prompt_route(self) -> str:
        """How the prompt gets to the text: `"shared"`, or `"concatenated: "` and the reason.

        A shared prompt is computed once for all rows of a batch. A single row that needs gradients is concatenated all
        the same, which is faster. Of some models, only the first call finds out that theirs can't be shared.
        """
        reason = why_in_row(find_stack(self.model))
        return "shared" if reason is None else f"concatenated: {reason}"

    def forget_kept_prompts(self) -> None:
        """Drops the keys and values of prompts that are kept between calls.

        They are dropped by themselves whenever the prompt, a weight, dtype or device changes; call this after writing
        to weights through `parameter.data`, which leaves no trace.
        """
        find_stack(self.model).ptuning.states.drop()

    def generate_batch(self, *args, **kwargs) -> NoReturn:
        """Refused: continuous batching puts texts that go on at different steps into one row of paged attention."""
        raise ValueError(
            "Continuous batching (`generate_batch`) has no place for a prompt. Call `generate` with a padded batch."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        find_stack(self.model).ptuning.states.drop(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"There is no adapter {unknown[0]!r}, only {list(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        with _keeping_requires_grad(self.model):
            super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        with _keeping_requires_grad(self.model):  # PEFT trains a head that is enabled
            super().enable_adapter_layers()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: Optional[list[str]] = None, **kwargs) -> Iterator[None]:
        """PEFT enters this around every call; `adapter_names` would choose an adapter for each row."""
        if adapter_names is not None:
            raise ValueError("Several P-tuning adapters in one batch (`adapter_names`) are not supported yet.")
        yield

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        vars(self).setdefault("_requires_grad_before", requires_grad)
        active = {
            module: list(module.active_adapters)
            for module in model.modules()
            if isinstance(module, (PTuningLayer, AuxiliaryTrainingWrapper))
        }
        if any(isinstance(module, PTuningLayer) and adapter_name in module.ptuning_encoders for module in active):
            self._forget(model, adapter_name)
            raise ValueError(
                f"The backbone of this {type(model).__name__} has an adapter named {adapter_name!r} already, which "
                "another model around the same backbone was given. Choose another `adapter_name`: both prompts "
                "are then at the backbone, and `set_adapter` of either model says which of them is in front."
            )
        config = self.peft_config[adapter_name]
        # PEFT would put its wrapper for trained rows around the tuner layer, which it refuses. It goes inside instead.
        self._token_indices, config.trainable_token_indices = config.trainable_token_indices, None
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if self._token_indices is not None:
                self._train_tokens(model, adapter_name, config)
        except Exception:
            _take_out(model, [adapter_name])
            for module, names in active.items():
                module.set_adapter(names)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(requires_grad[name])
            self._forget(model, adapter_name)
            raise
        finally:
            config.trainable_token_indices = self._token_indices

    def _train_tokens(self, model: nn.Module, adapter_name: str, config: PTuningConfig) -> None:
        """Puts PEFT's wrapper for trained rows inside the tuner layer, and around what is tied to the embedding.

        The tuner layer is taken out for that moment, so that PEFT itself finds the embedding and what is tied to it.
        """
        layer, path = self._layer(), self._backbone.embedding_path
        is_active = adapter_name in self.active_adapters
        requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model_config = self.get_model_config(self)
        if isinstance(_embedding(model, "output"), ModulesToSaveWrapper):  # the head is trained in full, by itself
            model_config = {**model_config, "tie_word_embeddings": False}
        tokens = SimpleNamespace(
            trainable_token_indices=self._token_indices, inference_mode=config.inference_mode, modules_to_save=None
        )
        _replace(model, path, layer.base_layer)
        try:
            set_additional_trainable_modules(model, tokens, model_config, adapter_name, activate_adapter=is_active)
        finally:
            layer.base_layer = model.get_submodule(path)
            _replace(model, path, layer)
        for name, module in model.named_modules():
            if not isinstance(module, TrainableTokensWrapper):
                continue
            module.__class__ = _TokensWrapper
            if not is_active and adapter_name in module.active_adapters:  # PEFT activates what is tied
                module.set_adapter([])
            if getattr(module.original_module, "bias", None) is not None:
                raise ValueError(
                    f"`trainable_token_indices` trains rows of {name!r}, which has a bias, and PEFT's TrainableTokens "
                    "would leave the bias out. Untie it from the input embedding, or leave the field out."
                )
        for parameter, was_trained in requires_grad:
            parameter.requires_grad_(was_trained)

    def _forget(self, model: nn.Module, adapter_name: str) -> None:
        """Removes the name of an adapter that was not added from where transformers has noted it."""
        self.peft_config.pop(adapter_name, None)  # of the model, if it is an adapter beside others there
        if not hasattr(model, "peft_config"):
            vars(model).pop("_hf_peft_config_loaded", None)

    def _prepare_adapter_config(self, peft_config: PTuningConfig, model_config: dict) -> PTuningConfig:
        """All checks of the model and of the weights that came with the config, before anything is changed."""
        backbone = self._backbone = find_backbone(self.model)
        if self._is_in_peft_model:
            _check_task_type(self.model, peft_config.task_type)
        self._check_offloaded_modules(peft_config)
        if peft_config._from_file:
            self._check_offloaded_embedding(peft_config)
        if ENCODER_KEY.strip(".") in self.peft_config:
            raise ValueError(f"An adapter can't be named {ENCODER_KEY.strip('.')!r}, the name of the module it is in.")
        for name in peft_config.modules_to_save or ():
            if f".{name}." in f".{backbone.embedding_path}.":
                raise ValueError(
                    f"`modules_to_save` names {name!r}, which holds the input embedding that the prompt goes with. "
                    "Name the modules to train without it."
                )
        rows = self._token_rows(peft_config)
        length, limit = peft_config.num_virtual_tokens, backbone.max_positions
        if limit is not None and length >= limit:
            raise ValueError(
                f"`num_virtual_tokens` is {length}, and {type(self.model).__name__} has {limit} positions for the "
                "prompt and the text together."
            )
        self._start = None
        if peft_config.prompt_tuning_init == AdapterInit.ADAPTER and not peft_config._from_file:
            self._start = load_prompt(peft_config.prompt_tuning_init_adapter, length, backbone.width)
        source, peft_config._source = peft_config._source, None
        if source is not None and (path := source.find()) is not None:
            with torch.device("meta"):
                encoder = build_encoder(peft_config, backbone.width)
            place = saved_name(backbone.embedding_path)
            trained = {**self._trained_state(peft_config), **rows}
            embeddings = self._embeddings(peft_config, rows)
            check_file(path, encoder, place, _with_saved_names(trained), _with_saved_names(embeddings))
        return peft_config

    def _check_offloaded_modules(self, peft_config: PTuningConfig) -> None:
        """Refuses to train a module whose weights are elsewhere: what is loaded into a copy of it would be lost."""
        endings = tuple(peft_config.modules_to_save or ())
        for name, module in self.model.named_modules():
            if name.endswith(endings) and any(execution_device(part) is not None for part in module.modules()):
                raise ValueError(
                    f"`modules_to_save` names {name!r}, whose weights are offloaded: PEFT can neither train nor load "
                    "a copy of it. Load the model with a `device_map` that keeps it on a device."
                )

    def _check_offloaded_embedding(self, peft_config: PTuningConfig) -> None:
        """Refuses to load a prompt beside an offloaded embedding where its values would be lost."""
        name, device_map = type(self.model).__name__, getattr(self.model, "hf_device_map", None)
        table = self.model.get_submodule(self._backbone.embedding_path)
        table = table.get_base_layer() if isinstance(table, PTuningLayer) else table
        is_offloaded = execution_device(table) is not None
        if is_offloaded and device_map is None and not self._is_in_peft_model:
            raise ValueError(
                f"The weights of this {name} are offloaded and it has no `hf_device_map`: `load_adapter` of "
                "transformers would lose the prompt. Call `PeftModel.from_pretrained(model, folder)`."
            )
        # PeftModel.from_pretrained has taken the hooks off. It writes plain vectors to disk beside the embedding, but
        # not the parameters of a network.
        is_on_disk = not is_offloaded and table.weight.is_meta and "disk" in (device_map or {}).values()
        if is_on_disk and peft_config.encoder_reparameterization_type is not PromptEncoderType.NONE:
            raise ValueError(
                f"The input embedding of this {name} is on disk, where PEFT has no place for the network of a prompt "
                "encoder. Load the model again and call its own `model.load_adapter(folder)`."
            )

    def _token_rows(self, peft_config: PTuningConfig) -> dict[str, torch.Tensor]:
        """The shapes of the rows that `trainable_token_indices` trains, by the names that they are saved under.

        Raises:
            ValueError: There is no such embedding or row, or `modules_to_save` names the module too.
        """
        check_token_indices(indices := self._token_indices)
        if indices is None:
            return {}
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if not isinstance(indices, dict):
            table = _embedding(self.model, "input")
            indices = {next((name for name, module in modules.items() if module is table), "embed_tokens"): indices}
        rows = {}
        for target, ids in indices.items():
            paths = [name for name in modules if name.endswith(target)]
            if not paths:
                raise ValueError(
                    f"`trainable_token_indices` names {target!r}, and {type(self.model).__name__} has no such module. "
                    "Name the input embedding, or give a list of ids for it."
                )
            for path in paths:
                if path.endswith(tuple(peft_config.modules_to_save or ())):
                    raise ValueError(
                        f"{path!r} is named by `trainable_token_indices` and by `modules_to_save`. Name it in one."
                    )
                if not isinstance(_bare(modules[path]), (nn.Embedding, nn.Linear)):
                    raise ValueError(
                        f"`trainable_token_indices` names {path!r}, a {type(_bare(modules[path])).__name__} and no "
                        "table of tokens. Name the input embedding, or give a list of ids for it."
                    )
                weight = _bare(modules[path]).weight
                if max(ids) >= len(weight):
                    raise ValueError(
                        f"`trainable_token_indices` has id {max(ids)}, and {path!r} has {len(weight)} rows. Call "
                        "`resize_token_embeddings` first."
                    )
                shape = (len(ids), weight.shape[1])
                rows[self._name_inside(path) + TOKENS_KEY] = torch.empty(shape, device="meta")
        return rows

    def _embeddings(self, peft_config: PTuningConfig, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of input and output embedding, by the names under which PEFT saves them if it does."""
        state, table, head = {}, _embedding(self.model, "input"), _embedding(self.model, "output")
        for name, module in self.model.named_modules():
            if module is table:
                names = [self._name_inside(name)]
            elif module is head:
                is_trained = name.endswith(tuple(peft_config.modules_to_save or ()))
                names = [name, f"{name}.original_module", f"{name}.modules_to_save"] if is_trained else [name]
            else:
                continue
            if rows:
                names += [f"{name}.token_adapter.base_layer" for name in names]
                state[name + TOKENS_KEY] = next(iter(rows.values()))
            weights = _bare(module).state_dict()
            state |= {f"{name}.{key}": value for name in names for key, value in weights.items()}
        return state

    def _name_inside(self, path: str) -> str:
        """Path of an embedding once the tuner layer is there."""
        return f"{path}.base_layer" if path == self._backbone.embedding_path else path

    def _trained_state(self, peft_config: PTuningConfig) -> dict[str, torch.Tensor]:
        """The state of the modules that PEFT is to train beside the prompt, by name in the model."""
        endings = tuple(peft_config.modules_to_save or ())
        state = {}
        for name, module in self.model.named_modules():
            if name.endswith(endings):
                module = getattr(module, "original_module", module)  # of another adapter
                state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return state

    def _check_target_module_exists(self, peft_config: PTuningConfig, key: str) -> bool:
        # By identity: once resized, an encoder-decoder's embedding has several paths, and PEFT comes with the first.
        return self.model.get_submodule(key) is self.model.get_submodule(self._backbone.embedding_path)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if not isinstance(target, PTuningLayer):
            path = self._backbone.embedding_path
            target = PTuningLayer(target, self._backbone.embed_scale)
            _replace(self.model, path, target)
            attach(self.model, self._backbone)
            for name, module in self.model.named_modules():
                if isinstance(module, PreTrainedModel) and f"{path}.".startswith(f"{name}." if name else ""):
                    module.resize_token_embeddings = _ResizeTokenEmbeddings(module)
        target.update_layer(adapter_name, peft_config, self._start)
        self._start = None
        # A new module is in training mode: its dropout would act on a model that was put into evaluation mode before.
        target.ptuning_encoders[adapter_name].train(self.model.training)
        device = execution_device(target.get_base_layer())
        if device is not None and getattr(self.model, "hf_device_map", None) is not None:
            # transformers loads a prompt to where its map has the embedding. That is not where the prompt is used, and
            # what belongs on disk is not loaded at all.
            self.model.hf_device_map[f"{current_key}{ENCODER_KEY}".rstrip(".")] = device

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's own leaves an encoder that is not upcast in the dtype that it was made in, which is not the base's.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        layer = self._layer()
        encoder = layer.ptuning_encoders[adapter_name]
        if autocast_adapter_dtype:
            encoder.float()
        elif layer.weight.is_floating_point():
            encoder.to(layer.weight.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> PTuningModel:
        try:
            return super()._apply(fn, recurse)
        except NotImplementedError as error:  # "Cannot copy out of meta tensor"
            if "disk" not in getattr(self.model, "hf_device_map", {}).values():
                raise
            raise ValueError(
                f"Weights of this {type(self.model).__name__} are on disk and can't be moved from there. Where "
                "`PeftModel.from_pretrained` meets such a model it has to be told where the weights belong: load the "
                "model again, and pass its `device_map` with `base_model.model.` before each name, and "
                "`offload_folder`. Or call the model's own `model.load_adapter(folder)`."
            ) from error

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A prompt can't be merged: it is a part of the input and changes no weight of the base model. "
            "`unload()` returns the base model without it. `peft_ptuning_ext.export_standalone` writes a model that "
            "loads without PEFT, with the prompt as entries of its vocabulary."
        )

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_merge_allowed()
        _take_out(self.model, self.peft_config)
        backbone = self.model.get_submodule(self._backbone.name)
        is_shared = any(isinstance(module, PTuningLayer) for module in backbone.modules())
        # Where another model has prompts on this backbone, it stays frozen for them.
        frozen = {p for name, p in backbone.named_parameters() if is_shared and ENCODER_KEY not in name}
        for name, parameter in self.model.named_parameters():
            if parameter not in frozen:
                parameter.requires_grad_(self._requires_grad_before.get(name, parameter.requires_grad))
        vars(self.model).pop("_hf_peft_config_loaded", None)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if ENCODER_KEY not in key:  # a head or a vocabulary, if PEFT saves the whole of it
            is_beside = ".modules_to_save." in key or key.endswith(f"{TOKENS_KEY}.{adapter_name}")
            return super()._remove_adapter_name_from_key(key, adapter_name) if is_beside else key
        # PEFT's own looks for the name at the end only; an encoder's parameters lie deeper.
        return key.replace(f"{ENCODER_KEY}{adapter_name}.", ENCODER_KEY, 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        encoder = find_layer(model).ptuning_encoders[adapter_name]
        check_state(state_dict, encoder.state_dict())
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _layer(self) -> PTuningLayer:
        return find_layer(self.model)


class _ResizeTokenEmbeddings:
    """Stands in for `resize_token_embeddings` of a transformers model that has the tuner layer.

    transformers resizes plain embeddings only. The tuner layer is taken out meanwhile and put around the new one.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, *args, **kwargs) -> nn.Embedding:
        model = self.model
        path, layer = next((n, module) for n, module in model.named_modules() if isinstance(module, PTuningLayer))
        for module in (layer.base_layer, _embedding(model, "input"), _embedding(model, "output")):
            if isinstance(module, AuxiliaryTrainingWrapper):
                raise ValueError(
                    "An adapter trains rows of the vocabulary or the output embedding (`trainable_token_indices`, "
                    "`modules_to_save`), which keep their size. Get the base model back with `unload()`, resize it, "
                    "and add the adapter then."
                )
        _replace(model, path, layer.base_layer)
        try:
            return type(model).resize_token_embeddings(model, *args, **kwargs)
        finally:
            layer.base_layer = model.get_submodule(path)
            _replace(model, path, layer)


class _TokensWrapper(TrainableTokensWrapper):
    """PEFT's wrapper for trained rows, which fails to save and load a model's adapters that train none."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return super().adapter_state_dict_load_map(adapter_name) if adapter_name in self._adapters else {}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().adapter_state_dict(adapter_name, state_dict) if adapter_name in self._adapters else {}


def _with_saved_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {saved_name(name): value for name, value in state.items()}


def _to_saved_names(tuner: PTuningModel, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Hook behind `state_dict`: names without the modules that `torch.compile` puts in between."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[prefix + saved_name(key.removeprefix(prefix))] = state_dict.pop(key)


def _from_saved_names(tuner: PTuningModel, state_dict: dict, prefix: str, *args) -> None:
    """Hook in front of `load_state_dict`: the names that the model has, compiled as it is."""
    names = [prefix + name for name, module in nn.Module.named_modules(tuner) if is_compiled_module(module)]
    for compiled in names:  # the outer ones come first
        for key in [key for key in state_dict if key.startswith(f"{compiled}.")]:
            inner = key.removeprefix(f"{compiled}.").removeprefix("_orig_mod.")
            state_dict[f"{compiled}._orig_mod.{inner}"] = state_dict.pop(key)


@contextmanager
def _keeping_requires_grad(model: nn.Module) -> Iterator[None]:
    """Inside, `requires_grad` may be set; behind, each parameter's is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, requires_grad in before:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)


def _bare(module: nn.Module) -> nn.Module:
    """The module of the base model, below the tuner layer and PEFT's wrappers."""
    while isinstance(module, (PTuningLayer, AuxiliaryTrainingWrapper)):
        module = module.base_layer if isinstance(module, PTuningLayer) else module.original_module
    return module


def _embedding(model: nn.Module, which: str) -> Optional[nn.Module]:
    return getattr(model, f"get_{which}_embeddings", lambda: None)()


def _take_out(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Removes adapters; with the last of them the backbone's wrapping, the tuner layer and that of trained modules.

    Adapters of another model around the same backbone stay, and so do those of other methods.
    """
    names, stack = set(adapter_names), find_stack(model)
    for path, module in reversed(list(model.named_modules())):  # what is inside first
        if isinstance(module, PTuningLayer):
            for name in names & module.ptuning_encoders.keys():
                del module.ptuning_encoders[name]
                stack.ptuning.states.drop(name)
            if not module.ptuning_encoders:
                if stack is not None:  # else attaching has failed
                    detach(model)
                getattr(model, "hf_device_map", {}).pop(f"{path}{ENCODER_KEY}".rstrip("."), None)
                _replace(model, path, module.base_layer)
            elif names & set(module.active_adapters):
                module.set_adapter(next(iter(module.ptuning_encoders)))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            if module._adapters <= names:
                _replace(model, path, module.original_module)
            else:
                others = [name for name in module.active_adapters if name not in names]
                for name in names & module._adapters:
                    module.delete_adapter(name, new_active_adapters=others)
    if find_layer(model) is None:
        for module in model.modules():
            if isinstance(vars(module).get("resize_token_embeddings"), _ResizeTokenEmbeddings):
                del module.resize_token_embeddings


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_task_type(model: nn.Module, task_type: Optional[str]) -> None:
    """Refuses a task type whose class of PEFT can't call this model."""
    task = str(getattr(task_type, "value", task_type))
    if task not in TASK_NEEDS:
        return
    attributes, arguments = TASK_NEEDS[task]
    missing = [f"`{attribute}`" for attribute in attributes if not hasattr(model, attribute)]
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # The decorators of transformers' models take arguments that a signature does not show.
    if not takes_any and not isinstance(model, PreTrainedModel):
        passed = (*COMMON_ARGUMENTS, *arguments)
        missing += [f"the argument `{argument}` of `forward`" for argument in passed if argument not in parameters]
    if missing:
        raise ValueError(
            f"`task_type` is {task!r}, and {type(model).__name__} lacks {', '.join(missing)}, which PEFT's model for "
            "this task uses. Choose the task type that this model is for. If there is none, leave `task_type` out and "
            "name a head to train in `modules_to_save`."
        )
