# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""`PTuningModel`: which module is adapted, and the life of adapters: add, switch, delete, unload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, delete_adapter
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from .adapters.by_row import choose_for_call
from .adapters.checks import check_adapter, check_is_new, check_saved_apart, check_weights
from .adapters.deep_start import find_deep_start, states_of_vectors
from .adapters.installation import install, take_deep_prompts
from .adapters.names import from_saved_names, naming, to_saved_names
from .adapters.other_methods import activate, check_copies, check_together, has_other_methods, keeping_others_active
from .adapters.removal import remove_adapters, undone_on_error
from .adapters.requires_grad import keeping_requires_grad, requires_grad_by_name, restore_requires_grad
from .adapters.tensor_parallel import check_tensor_parallel, start_alike
from .adapters.vocabulary import allow_adapters_without_rows, token_rows, train_token_rows
from .adapters.weighted import check_combination, combine
from .backbone import find_backbone
from .config import PromptInit, PTuningConfig
from .files.checkpoint import ENCODER_KEY, TOKENS_KEY, check_beside, check_state
from .forward.deep import record_prompt
from .forward.wrap import why_in_row
from .prompts.adapter import find_adapter, find_layer, find_stack
from .prompts.choice import repeating
from .prompts.deep import cast, without_batch
from .prompts.layer import NO_MERGE, PTuningLayer, execution_device
from .prompts.prompt import States
from .prompts.saved import load_prompt
from .registration import PREFIX


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
                "The model is a PeftModel already. Add a further prompt with `model.add_adapter(name, config)`, or "
                "get the base model back with `model.unload()` first. Beside adapters of another method, add the "
                "prompt to the model inside: `get_peft_model(model.get_base_model(), config, adapter_name=...)`."
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
        # Beside another method PEFT has the configs at the model only, and takes them away when it unloads that one.
        self.peft_config = model.peft_config
        self.register_state_dict_post_hook(to_saved_names)
        self.register_load_state_dict_pre_hook(from_saved_names)

    def named_modules(
        self, memo: Optional[set[nn.Module]] = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Modules under the names of [`~peft_ptuning_ext.adapters.names.naming`], as in `state_dict`.

        PEFT reads the keys of a file from these names. The file then fits a compiled model and a plain one.
        """
        name_of, start = naming(self), f"{prefix}." if prefix else ""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield name if name == prefix else start + name_of(name.removeprefix(start)), module

    def prompt_embeddings(self, adapter_name: Optional[str] = None) -> torch.Tensor:
        """Returns the prompt that enters the model, whatever the encoder: shape (V, H), in the embedding's dtype.

        Args:
            adapter_name (`str`, *optional*): Which adapter; by default the active one.

        Raises:
            ValueError: There is no adapter of this name, none is active, or the prompt is deep.
        """
        layer = self._layer()
        prompt = layer.prompt(layer.named_or_active(adapter_name))
        return prompt if layer.dtype is None else prompt.to(layer.dtype)

    def prompt_key_values(self, adapter_name: Optional[str] = None) -> States:
        """Returns the keys and values that stand in front of the text's in every layer.

        Those of a deep prompt are what is trained. Those of a prompt at the input of a causal decoder are what its
        vectors become there, computed by one pass of them in evaluation and without gradients.

        Args:
            adapter_name (`str`, *optional*): Which adapter; by default the active one.

        Returns:
            `dict[int, tuple[torch.Tensor, torch.Tensor]]`: By layer, keys and values, each (key-value heads, V, D).

        Raises:
            ValueError:
                There is no adapter of this name, none is active, or it has no keys and values of its own, apart from
                those of the text.
        """
        layer = self._layer()
        name = layer.named_or_active(adapter_name)
        if layer.is_deep(name):
            encoded = layer.encode(name)
        else:
            encoded, _ = record_prompt(find_stack(self.model), self.prompt_embeddings(name))
        return without_batch(cast(encoded, layer.dtype))

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
        """How the prompt gets to the text: `"shared"`, `"concatenated: "` and the reason, `"deep"`, or `"in place"`.

        A shared prompt is computed once for all rows of a batch. A batch that needs gradients is concatenated all the
        same where that is faster, as with a single row. Of some models, only the first call finds out that theirs
        can't be shared. A deep prompt stands in every layer. One with a template stands where the placeholders are in
        the ids.
        """
        layer = self._layer()
        if layer.placeholder_id is not None:
            return "in place"
        if any(layer.is_deep(name) for name in layer.active_adapters):
            return "deep"
        reason = why_in_row(find_stack(self.model))
        return "shared" if reason is None else f"concatenated: {reason}"

    def forget_kept_prompts(self) -> None:
        """Drops the keys and values of prompts that are kept between calls.

        They are dropped by themselves whenever the prompt, a weight, a hook, dtype or device changes. Call this after
        writing to weights through `parameter.data`, or to a plain attribute such as the scale of an attention: neither
        leaves a trace.
        """
        find_stack(self.model).ptuning.states.drop()

    def limit_kept_prompts(self, max_bytes: int) -> None:
        """Sets how many bytes of keys and values are kept between calls; what was used longest ago goes first.

        Args:
            max_bytes (`int`): 1 GiB before this is called. 0 keeps none.

        Raises:
            ValueError: It is negative.
        """
        if max_bytes < 0:
            raise ValueError(f"`max_bytes` must be at least 0, got {max_bytes}.")
        find_stack(self.model).ptuning.states.limit(max_bytes)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.peft_config and not self._is_prompt(adapter_name):
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.peft_config[adapter_name].peft_type]
            delete_adapter(self.model, adapter_name, prefix)
            del self.peft_config[adapter_name]
            return
        with keeping_others_active(self.model):
            super().delete_adapter(adapter_name)
        others = [name for name in self.peft_config if not self._is_prompt(name)]
        self.active_adapter = self.active_adapter or others[:1]  # a PeftModel looks up the config of an active one
        find_stack(self.model).ptuning.states.drop(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        prompts = [name for name in names if self._is_prompt(name)]
        if len(prompts) < len(names):
            activate(self.model, names, inference_mode)
            self.active_adapter = prompts or names
            return
        check_together(self.model, names)
        with keeping_others_active(self.model):
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        with keeping_requires_grad(self.model):
            super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        with keeping_requires_grad(self.model):  # PEFT trains a head that is enabled
            super().enable_adapter_layers()

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Adds an adapter whose prompt is made of those of others. It is not made active.

        Args:
            adapters (`list[str]`): Names of the others. A network of theirs is folded first.
            weights (`list[float]`): A number for each of them.
            adapter_name (`str`): Name of the new adapter.
            combination_type (`str`, defaults to `"linear"`):
                `"linear"`, the weighted sum of prompts of one length, or `"cat"`, one behind the other.

        Raises:
            ValueError: There is no such adapter or combination, or the new one is there already.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already. Choose another name.")
        self._check_names(adapters)
        found = [find_adapter(self.model, name) for name in adapters]
        check_combination(found, weights, combination_type)
        config, prompt = combine(found, weights, combination_type)
        self.peft_config[adapter_name] = config
        with keeping_requires_grad(self.model):
            self.inject_adapter(self.model, adapter_name)
        self._layer().ptuning_encoders[adapter_name].start_at(prompt)

    def _check_names(self, names: list[str]) -> None:
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"There is no adapter {unknown[0]!r}, only {list(self.peft_config)}.")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: Optional[list[str]] = None, **kwargs) -> Iterator[None]:
        """PEFT enters this around every call; `adapter_names` chooses adapters for each row."""
        if adapter_names is None:
            yield
            return
        with choose_for_call(self.model, adapter_names, args, kwargs):
            yield

    def generate(self, *args, **kwargs):
        """`generate` of the model, which may turn a row into several: beams, and several answers."""
        with repeating():
            return self.model.generate(*args, **kwargs)

    def inject_adapter(self, model, adapter_name, *args, **kwargs) -> None:
        """Adds an adapter, as PEFT does. After an error nothing is changed."""
        vars(self).setdefault("_requires_grad_before", requires_grad_by_name(model))
        config = self.peft_config[adapter_name]
        # PEFT would put its wrapper for trained rows around the tuner layer, which it refuses. It goes inside instead.
        self._token_indices, config.trainable_token_indices = config.trainable_token_indices, None
        try:
            check_is_new(model, adapter_name)
            with undone_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                check_saved_apart(find_layer(model), adapter_name, self._backbone.embedding_path)
                allow_adapters_without_rows(model)
                if self._token_indices is not None:
                    is_active = adapter_name in self.active_adapters
                    with keeping_requires_grad(model):
                        train_token_rows(model, adapter_name, self._token_indices, config.inference_mode, is_active)
        except BaseException:
            # transformers has noted the name of the adapter: in the model's configs, where others may be already.
            self.peft_config.pop(adapter_name, None)
            if not hasattr(model, "peft_config"):
                vars(model).pop("_hf_peft_config_loaded", None)
            raise
        finally:
            config.trainable_token_indices = self._token_indices

    def _prepare_adapter_config(self, peft_config: PTuningConfig, model_config: dict) -> PTuningConfig:
        """All checks of the model and of the weights that came with the config, before anything is changed."""
        model = self.model
        backbone = self._backbone = find_backbone(model)
        check_adapter(model, backbone, peft_config, self.peft_config, self._is_in_peft_model)
        check_copies(model, peft_config)
        check_tensor_parallel(model, peft_config, self._token_indices is not None)
        rows = token_rows(model, backbone.embedding_path, self._token_indices, peft_config.modules_to_save or ())
        self._start, self._deep = None, None
        if peft_config.is_deep:
            self._deep = find_deep_start(model, backbone, peft_config)
        shapes = None if self._deep is None else self._deep.shapes
        if peft_config.prompt_tuning_init == PromptInit.ADAPTER and not peft_config._from_file:
            self._start = load_prompt(peft_config, backbone.width, shapes)
            if peft_config.is_deep and isinstance(self._start, torch.Tensor):
                self._start = states_of_vectors(model, backbone, peft_config, self._start)
        peft_config.cloze = getattr(model, "cloze_settings", None)
        source, peft_config._source = peft_config._source, None
        if source is not None:
            check_weights(source, model, backbone, peft_config, rows, shapes)
        # Once resized, an encoder-decoder's embedding has several paths. PEFT comes with the first of them.
        embedding = model.get_submodule(backbone.embedding_path)
        self._target = next(name for name, module in model.named_modules() if module is embedding)
        return peft_config

    def _check_target_module_exists(self, peft_config: PTuningConfig, key: str) -> bool:
        return key == self._target

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if not isinstance(target, PTuningLayer):
            self._target = self._backbone.embedding_path
            target = install(self.model, self._backbone)
        start, shapes = self._start, None
        if self._deep is not None:
            shapes = self._deep.shapes
            start = self._deep.states() if start is None else start
            where = peft_config.is_in_encoder, peft_config.is_in_decoder
            take_deep_prompts(self.model, self._backbone, self._deep.modules, *where)
        target.update_layer(adapter_name, peft_config, start, shapes)
        start_alike(self.model, target.ptuning_encoders[adapter_name])
        self._start = self._deep = None
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
        if not self._is_prompt(adapter_name):
            return
        layer = self._layer()
        encoder = layer.ptuning_encoders[adapter_name]
        if autocast_adapter_dtype:
            encoder.float()
        elif layer.dtype is not None:
            encoder.to(layer.dtype)

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

    def _is_prompt(self, adapter_name: str) -> bool:
        """Whether an adapter is of this method, and not of another one on the same model."""
        return isinstance(self.peft_config[adapter_name], PTuningConfig)

    def _check_merge_allowed(self) -> None:
        if all(self._is_prompt(name) for name in self.peft_config):
            raise ValueError(NO_MERGE)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            raise ValueError(f"{NO_MERGE} `merge_adapter()` merges the adapters of other methods beside it.")
        prompts = [name for name in self.peft_config if self._is_prompt(name)]
        remove_adapters(self.model, prompts)
        backbone = self.model.get_submodule(self._backbone.name)
        # A bank trains nothing, and freezes nothing.
        layers = [module for module in backbone.modules() if isinstance(module, PTuningLayer)]
        is_shared = any(layer.ptuning_encoders for layer in layers)
        # Where another model has prompts on this backbone, it stays frozen for them.
        frozen = {p for name, p in backbone.named_parameters() if is_shared and ENCODER_KEY not in name}
        if has_other_methods(self.model):  # their adapters stay, and the model frozen for them
            for name in prompts:
                del self.peft_config[name]
            return self.model
        restore_requires_grad(self.model, self._requires_grad_before, frozen)
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
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        path = f"{ENCODER_KEY}{adapter_name}."
        stems = {key.partition(path)[0] + path for key in state if path in key}
        constants = find_layer(model).ptuning_encoders[adapter_name].gathered_constants
        return {stem + name: value for stem in stems for name, value in constants.items()} | state

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        encoder = find_layer(model).ptuning_encoders[adapter_name]
        check_state(state_dict, encoder.state_dict())
        check_beside(model, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _layer(self) -> PTuningLayer:
        return find_layer(self.model)
