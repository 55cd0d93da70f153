# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The tuner layer: stands around the input embedding and holds one prompt encoder per adapter."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.func import functional_call

from ..config import PTuningConfig
from .build import build_encoder
from .choice import Names, Rows, chosen_rows
from .deep import DeepPromptEncoder, Shapes, cast
from .encoder import PromptEncoder
from .prompt import Prompt, States
from .start import start_vectors
from .stored import Ready, StoredPrompts


# Why a prompt is not merged, and what there is instead.
NO_MERGE = (
    "A prompt can't be merged: it is a part of the input and changes no weight of the base model. "
    "`unload()` returns the base model without it. `peft_ptuning_ext.export_standalone` writes a model that "
    "loads without PEFT, with the prompt as entries of its vocabulary."
)


class PTuningLayer(nn.Module, BaseTunerLayer):
    """Passes token ids through to the wrapped embedding, and holds one prompt encoder for each adapter.

    Args:
        base_layer (`nn.Module`): The model's input embedding, ids (B, S) → (B, S, H).
        embed_scale (`float`): What the model multiplies its output by.

    Attributes:
        bank ([`~peft_ptuning_ext.prompts.stored.StoredPrompts`], *optional*): Prompts beside the adapters.
        merges (`int`):
            How often adapters of other methods were merged or unmerged. PEFT writes to weights through `data` then,
            which leaves no trace in them.
    """

    adapter_layer_names = ("ptuning_encoders",)

    def __init__(self, base_layer: nn.Module, embed_scale: float = 1.0):
        super().__init__()
        self.base_layer = base_layer
        self.embed_scale = embed_scale
        self.ptuning_encoders = nn.ModuleDict()
        self.bank: Optional[StoredPrompts] = None
        self._active_adapter = []
        self._told: list[str] = []
        self.merged_adapters = []
        self.merges = 0
        self.register_state_dict_post_hook(_to_plain_names)
        self.register_load_state_dict_pre_hook(_from_plain_names)

    @property
    def active_adapter(self) -> list[str]:
        """All adapters that were made active together, of other methods, too.

        transformers asks the first tuner layer of a model, which this one often is, for the active adapters of all.
        """
        return self._told

    @property
    def active_adapters(self) -> list[str]:
        """The prompts that are active."""
        return self._active_adapter

    @property
    def known(self) -> Collection[str]:
        """Names of all prompts that there are: of adapters, and of a bank."""
        return self.ptuning_encoders if self.bank is None else ChainMap(self.ptuning_encoders, self.bank)

    def encoder(self, name: str) -> PromptEncoder | DeepPromptEncoder:
        """The encoder of an adapter, or that of a prompt in the bank."""
        if self.bank is None or name in self.ptuning_encoders:
            return self.ptuning_encoders[name]
        return self.stored(name).encoder

    def stored(self, name: str) -> Ready:
        """A prompt in the bank, ready for use where the embedding computes."""
        return self.bank.ready(name, self._device)

    def get_base_layer(self) -> nn.Module:
        """Returns the embedding itself, below adapters of other methods and PEFT's wrapper for trained rows."""
        layer = self.base_layer
        while isinstance(layer, AuxiliaryTrainingWrapper) or hasattr(layer, "base_layer"):
            layer = layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer.base_layer
        return layer

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.base_layer(*args, **kwargs)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of `token_ids`, (B, S) or (N,), as the model's first layer gets them, with H at the end."""
        embeds = self(token_ids)
        return embeds if self.embed_scale == 1 else embeds * self.embed_scale

    @torch.no_grad()
    def look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of `token_ids` (N,) as in evaluation, for use outside a call of the model: (N, H).

        Hooks on the embedding get one row (1, N, H), as in a call of the model. Those that add noise in training, such
        as NEFTune's, add none.
        """
        was_training = {module: module.training for module in (self, *self.base_layer.modules())}
        try:
            for module in was_training:
                module.training = False
            return self.embed(token_ids[None])[0]
        finally:
            for module, mode in was_training.items():
                module.training = mode

    @property
    def prompt_names(self) -> Names | Rows:
        """Names of the adapters whose prompts are in front now, for all rows or by row.

        They are empty if there is none, or if adapters are disabled.
        """
        if self._disable_adapters:
            return ()
        rows = chosen_rows(self)
        return tuple(self._active_adapter) if rows is None else rows

    @property
    def placeholder_id(self) -> Optional[int]:
        """The id whose embeddings the active prompt replaces; `None` if it is in front of the text."""
        return None if self._disable_adapters else self.placeholder_of(tuple(self._active_adapter))

    def placeholder_of(self, names: Names) -> Optional[int]:
        """The id whose embeddings the prompt of adapters by name replaces; `None` if it is in front of the text."""
        return self.encoder(names[0]).placeholder_id if names else None

    def make_prompt(self, names: Names, dtype: torch.dtype) -> Prompt:
        """Returns the prompt of adapters at the input by name, with its vectors, (1, V, H), in `dtype`."""
        vectors = [self.encode(name) for name in names]
        joined = vectors[0] if len(vectors) == 1 else torch.cat(vectors)
        return Prompt(names, len(joined), joined[None].to(dtype))

    def length_at_input(self, names: Names) -> int:
        """How many vectors the prompts of adapters by name have at the input, V."""
        return sum(self.encoder(name).num_virtual_tokens for name in names if not self.is_deep(name))

    def make_deep_prompt(self, names: Names, dtype: torch.dtype) -> Prompt:
        """Returns the prompt of deep adapters by name, with its keys and values, in `dtype`.

        Raises:
            ValueError: The adapters don't have the same layers.
        """
        encoders = [self.encoder(name) for name in names]
        parts = [cast(self.encode(name), dtype) for name in names]
        states = parts[0]
        if any(part.keys() != states.keys() for part in parts):
            raise ValueError(f"The prompts of adapters {list(names)} are in different layers, and can't be composed.")
        if len(parts) > 1:
            by_kind = {layer: zip(*(part[layer] for part in parts), strict=True) for layer in states}
            states = {layer: tuple(torch.cat(kind, dim=2) for kind in kinds) for layer, kinds in by_kind.items()}
        positions = sum(encoder.num_virtual_tokens for encoder in encoders if encoder.shift_positions)
        return Prompt(names, sum(e.num_virtual_tokens for e in encoders), states=states, taken=positions)

    @property
    def dtype(self) -> Optional[torch.dtype]:
        """The dtype of the embeddings; `None` if their table is quantized."""
        return self.weight.dtype if self.weight.is_floating_point() else None

    def named_or_active(self, adapter_name: Optional[str] = None) -> str:
        """Returns the name of an adapter that is there: the given one, or the active one.

        Raises:
            ValueError: There is no adapter of this name, none is active, or several are.
        """
        if adapter_name is None:
            if not self.active_adapters:
                raise ValueError(f"No adapter is active. Name one of {list(self.ptuning_encoders)}.")
            if len(self.active_adapters) > 1:
                raise ValueError(
                    f"The adapters {list(self.active_adapters)} are active together. Name one of them, or make one of "
                    "both: `model.add_weighted_adapter(..., combination_type='cat')`."
                )
            return self.active_adapters[0]
        if adapter_name not in self.ptuning_encoders:
            raise ValueError(f"There is no adapter {adapter_name!r}, only {list(self.ptuning_encoders)}.")
        return adapter_name

    @contextmanager
    def without_prompt(self) -> Iterator[None]:
        """Inside, no prompt is put in front; what else an adapter has, such as a head, stays."""
        was_disabled, self._disable_adapters = self._disable_adapters, True
        try:
            yield
        finally:
            self._disable_adapters = was_disabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        told = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        # Other methods may have adapters on the model too, and all of them are told the names of all.
        names = [name for name in told if name in self.ptuning_encoders]
        self.check_together(names)
        super().set_adapter(names, inference_mode=inference_mode)
        self._told = told
        self._freeze_constants()

    def check_together(self, names: Sequence[str]) -> None:
        """Refuses adapters by name that can't be active together.

        Raises:
            ValueError: One is there twice, or has a template.
        """
        if len(set(names)) < len(names):
            raise ValueError(f"An adapter can be active once, got {names}.")
        placed = [name for name in names if self.encoder(name).placeholder_id is not None]
        if placed and len(names) > 1:
            raise ValueError(
                f"Adapter {placed[0]!r} has a prompt template, which says where its prompt stands. It can't be active "
                f"together with others, got {names}."
            )

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._freeze_constants()

    def enable_adapters(self, enabled: bool) -> None:
        """Puts the prompt in front again, or no longer.

        Unlike PEFT's own this leaves `requires_grad` alone: that would train what was loaded for inference, once it
        was disabled and enabled.
        """
        self._disable_adapters = not enabled

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Merges nothing: PEFT calls it on every tuner layer, to merge those of other methods underneath a prompt.

        Raises:
            ValueError: The prompt itself is to be merged.
        """
        if any(name in self.ptuning_encoders for name in adapter_names or ()):
            raise ValueError(NO_MERGE)
        self.merges += 1

    def unmerge(self) -> None:
        """Takes nothing back, as [`merge`] has merged nothing."""
        self.merges += 1

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Optional[list[str]]
    ) -> PTuningLayer:
        """Removes, and perhaps merges, what another method has inside this layer, and stays itself.

        PEFT calls this when the adapters of another method are unloaded.
        """
        while isinstance(self.base_layer, BaseTunerLayer):
            if merge:
                self.base_layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.base_layer = self.base_layer.base_layer
        self.merges += 1
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        others = [name for name in self._told if name != adapter_name and name not in self.ptuning_encoders]
        super().delete_adapter(adapter_name)
        self._told = [*others, *self._active_adapter]
        self.enable_without_adapters()

    def enable_without_adapters(self) -> None:
        """Ends that adapters are disabled where none is left, for then nobody can: a bank would be disabled, too."""
        if not self.ptuning_encoders:
            self._disable_adapters = False

    def _freeze_constants(self) -> None:
        """PEFT makes all parameters of an encoder trainable, and an encoder's constants never are."""
        for encoder in self.ptuning_encoders.values():
            encoder.freeze_constants()

    def update_layer(
        self,
        adapter_name: str,
        config: PTuningConfig,
        start: Optional[torch.Tensor | States] = None,
        shapes: Optional[Shapes] = None,
    ) -> None:
        """Adds the encoder of a new adapter, unless on meta with its prompt at `start` or as `config` says.

        Args:
            adapter_name (`str`): Its name.
            config ([`PTuningConfig`]): Its config.
            start (`torch.Tensor` or `dict[int, tuple]`, *optional*): Vectors (V, H), or keys and values by layer.
            shapes (`dict[int, LayerShape]`, *optional*): What each layer takes, for a deep prompt.
        """
        encoder = build_encoder(config, self.get_base_layer().embedding_dim, shapes)
        if self._device.type == "meta":
            encoder = encoder.to("meta")
        elif not next(encoder.parameters()).is_meta:  # low_cpu_mem_usage: the values come with the checkpoint
            encoder.start_at(start_vectors(self, config) if start is None else start)
        self.ptuning_encoders[adapter_name] = encoder
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        # PEFT's own also casts to the base's dtype, which would round a float32 prompt on its way into a bf16 model.
        device = device or self._device
        if device.type != "meta" and not any(p.is_meta for p in self.ptuning_encoders[adapter_name].parameters()):
            self.ptuning_encoders[adapter_name].to(device)

    def prompt(self, adapter_name: str) -> torch.Tensor:
        """Returns the vectors of an adapter's prompt, shape (V, H), in its encoder's dtype.

        Raises:
            ValueError: The prompt is deep and has no vectors.
        """
        if self.is_deep(adapter_name):
            raise ValueError(
                f"The prompt of adapter {adapter_name!r} is deep: it consists of keys and values in every layer, and "
                "has no vectors in front of the input embeddings. `model.prompt_key_values()` returns what it has."
            )
        return self.encode(adapter_name)

    def is_deep(self, adapter_name: str) -> bool:
        """Whether an adapter's prompt is keys and values in every layer."""
        return isinstance(self.encoder(adapter_name), DeepPromptEncoder)

    def encode(self, adapter_name: str) -> torch.Tensor | States:
        """Returns what an adapter's encoder makes: vectors (V, H), or keys and values by layer, in its own dtype."""
        encoder = self.encoder(adapter_name)
        gathered = {name: _gather(value) for name, value in encoder.named_parameters() if isinstance(value, DTensor)}
        encoded = functional_call(encoder, gathered, ()) if gathered else encoder()
        return dict(encoded) if isinstance(encoder, DeepPromptEncoder) else encoded

    @torch.no_grad()
    def embed_ids(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of `token_ids` (N,) to compare a prompt with or start it at: (N, H), float32 on the CPU."""
        with gather_params_ctx(self.base_layer.parameters()), align_module_device(self.get_base_layer()):
            return self.look_up(token_ids.to(self._device)).float().cpu()

    @property
    def _device(self) -> torch.device:
        """Where the embedding computes: an offloaded one has its weights elsewhere."""
        device = execution_device(self.get_base_layer())
        return self.weight.device if device is None else torch.device(device)


def _to_plain_names(layer: PTuningLayer, state: dict, prefix: str, local_metadata: dict) -> None:
    """Gives the embedding below a bank the names that it has in the base model, with which the model is saved."""
    if layer.bank is not None and not layer.ptuning_encoders:
        for key in [key for key in state if key.startswith(f"{prefix}base_layer.")]:
            state[prefix + key.removeprefix(f"{prefix}base_layer.")] = state.pop(key)


def _from_plain_names(layer: PTuningLayer, state: dict, prefix: str, *args: Any) -> None:
    """Undoes [`_to_plain_names`] when the model's weights are loaded."""
    if layer.bank is not None and not layer.ptuning_encoders:
        for name in layer.base_layer.state_dict():
            if prefix + name in state:
                state[f"{prefix}base_layer.{name}"] = state.pop(prefix + name)


def execution_device(module: nn.Module) -> Optional[int | str | torch.device]:
    """Where a module computes whose weights accelerate keeps elsewhere; `None` if they are where it computes."""
    outer = getattr(module, "_hf_hook", None)
    hooks = getattr(outer, "hooks", (outer,))  # of a SequentialHook, or the only one
    return next((hook.execution_device for hook in hooks if getattr(hook, "offload", False)), None)


def _gather(parameter: DTensor) -> torch.Tensor:
    """The whole of a sharded parameter (FSDP2), whose gradient is the mean of the processes'.

    FSDP2 gathers the encoder's parameters when the embedding layer runs. The prompt is needed before that, so they are
    gathered here.
    """
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
