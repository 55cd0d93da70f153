# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""To the format of stock PEFT's prompt tuning, and back."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Optional

from peft import PeftConfig, PeftModel, PromptTuningConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn

from ..backbone import Backbone, find_backbone
from ..config import PTuningConfig
from ..files.checkpoint import ENCODER_KEY, CheckpointSource, read_tensors, replacing, saved_name
from ..prompts.adapter import Adapter, find_adapter
from ..prompts.saved import STOCK_KEY, STOCK_TYPES


# Task types with which stock PEFT computes something else than this package, and what.
STOCK_DIFFERS: dict[str, str] = {
    "SEQ_CLS": "it pools by position from states that begin with the prompt: BERT and its kin classify by the first "
    "prompt vector instead of [CLS]",
    "TOKEN_CLS": "it fails on labels, and its logits begin with V that belong to no token",
    "QUESTION_ANS": "its start and end logits are shifted by V",
    "FEATURE_EXTRACTION": "its hidden states begin with V that belong to no token",
}


def export_to_peft(
    model: nn.Module, directory: str, adapter_name: Optional[str] = None, force: Optional[str] = None
) -> None:
    """Writes an adapter that PEFT loads without this package: prompt tuning, the network folded away.

    For `CAUSAL_LM` and `SEQ_2_SEQ_LM`, logits and generated tokens of stock PEFT equal those of this package where no
    padding stands on the left (stock PEFT leaves the gap between prompt and text there).

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter.
        directory (`str`): Folder to write to; made if it is not there.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.
        force (`str`, *optional*):
            The adapter's task type, to export where stock PEFT computes something else all the same. A head that was
            trained beside the prompt is written too.

    Raises:
        ValueError:
            Stock PEFT would compute something else, `force` names another task type, or the adapter has a prompt
            template or trains rows of the vocabulary (`trainable_token_indices`).
    """
    adapter = find_adapter(model, adapter_name)
    if adapter.config.trainable_token_indices is not None:
        raise ValueError(
            "The adapter trains rows of the vocabulary beside the prompt (`trainable_token_indices`), for which stock "
            "PEFT's prompts have no place. Stay with this package."
        )
    if adapter.config.prompt_template is not None:
        raise ValueError(
            "The adapter has a prompt template, and stock PEFT puts a prompt in front of every text. Stay with this "
            "package."
        )
    backbone = find_backbone(adapter.base_model)
    task_type = _task_type(adapter)
    _check_stock(task_type, backbone, adapter.base_model, force)
    heads = trained_modules(adapter)
    if heads and task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ValueError(
            f"The adapter has trained modules beside the prompt ({', '.join(heads)}), for which stock PEFT's "
            f"{task_type} prompts have no place."
        )

    prompt = adapter.prompt().float().cpu().contiguous()
    tensors = {STOCK_KEY: prompt}
    for name, module in heads.items():
        tensors |= {f"base_model.{name}.{key}": value.cpu().contiguous() for key, value in module.state_dict().items()}
    config = PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_layers=_size(adapter.base_model, "num_hidden_layers"),
        num_attention_heads=_size(adapter.base_model, "num_attention_heads"),
        base_model_name_or_path=adapter.base_model_name or None,
        revision=adapter.config.revision,
        inference_mode=True,
    )
    with replacing(directory) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)


def import_from_peft(
    base_model: nn.Module,
    model_id: str,
    adapter_name: str = "default",
    is_trainable: bool = False,
    force: Optional[str] = None,
    subfolder: Optional[str] = None,
    **download_kwargs: Any,
) -> PeftModel:
    """Makes a stock `PROMPT_TUNING` or `P_TUNING` adapter one of this package, with plain vectors.

    Stock PEFT saves the vectors only, not the network that made them, so they are all that there is to go on with.

    Args:
        base_model (`PreTrainedModel` or `PeftModel`):
            The model that the adapter was trained on, or one that has adapters of this package already, which is then
            given another.
        model_id (`str`): Folder, or repository on the Hub.
        adapter_name (`str`, defaults to `"default"`): Name of the adapter.
        is_trainable (`bool`, defaults to `False`): Whether the prompt is trained on.
        force (`str`, *optional*):
            The adapter's task type, to take it over where stock PEFT computes something else all the same.
        subfolder (`str`, *optional*): Folder inside `model_id`.
        download_kwargs: `revision`, `token`, `cache_dir` and so on, as for [`~huggingface_hub.hf_hub_download`].

    Returns:
        [`~peft.PeftModel`]

    Raises:
        ValueError:
            It is another kind of adapter, its file is damaged or does not fit the model, or stock PEFT computes
            something else for its task. The model is then as it was.
    """
    if adapter_name in getattr(base_model, "peft_config", {}):
        raise ValueError(f"The model has an adapter named {adapter_name!r} already. Choose another `adapter_name`.")
    config = PeftConfig.from_pretrained(model_id, subfolder=subfolder, **download_kwargs)
    if config.peft_type not in STOCK_TYPES:
        raise ValueError(
            f"{model_id} is an adapter of type {config.peft_type.value}. Those that can be taken over are "
            f"{' and '.join(kind.value for kind in STOCK_TYPES)}."
        )
    bare = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    backbone = find_backbone(bare)
    _check_stock(config.task_type, backbone, bare, force)

    own = PTuningConfig(
        task_type=config.task_type,
        num_virtual_tokens=config.num_virtual_tokens,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    length, submodules = own.num_virtual_tokens, config.num_transformer_submodules
    if submodules not in (None, 1, 2):
        raise ValueError(f"`num_transformer_submodules` of {model_id} must be 1 or 2, got {submodules!r}.")
    folder = os.path.join(model_id, subfolder or "")
    if os.path.isfile(os.path.join(folder, WEIGHTS_NAME)) and SAFETENSORS_WEIGHTS_NAME not in os.listdir(folder):
        raise ValueError(
            f"{folder} has only the pickle {WEIGHTS_NAME}, which can run code when it is loaded. If you trust it, "
            "load it with stock PEFT and save it again: that writes safetensors."
        )
    path = CheckpointSource(str(model_id), subfolder, True, download_kwargs).find()
    tensors = read_tensors(path, {STOCK_KEY: (length * (submodules or 1), backbone.width)})
    # Of an encoder-decoder's rows, stock PEFT puts the first V in front of the encoder and the others nowhere.
    prompt = tensors.pop(STOCK_KEY)[:length].clone()
    heads = {f"base_model.model.{key.removeprefix('base_model.')}": value for key, value in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        key = f"base_model.model.{saved_name(backbone.embedding_path)}{ENCODER_KEY}embedding"
        save_file({key: prompt, **heads}, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        own.save_pretrained(folder)
        if not isinstance(base_model, PeftModel):
            return PeftModel.from_pretrained(base_model, folder, adapter_name, is_trainable=is_trainable)
        base_model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
        return base_model


def _check_stock(task_type: Optional[str], backbone: Backbone, base_model: nn.Module, force: Optional[str]) -> None:
    """Refuses what stock PEFT computes differently, unless the caller named the task type."""
    if task_type is None:
        raise ValueError(
            f"The adapter on this {type(base_model).__name__} has no task type, without which stock PEFT leaves the "
            "prompt out."
        )
    if force is not None and force != task_type:
        raise ValueError(f"`force` must name the adapter's task type, {task_type!r}, got {force!r}.")
    reason = STOCK_DIFFERS.get(task_type)
    if reason is None and backbone.embed_scale != 1:
        reason = f"{type(base_model).__name__} scales the embeddings of token ids only, and it hands over embeddings"
    if reason is not None and force is None:
        raise ValueError(
            f"Stock PEFT computes something else for {task_type}: {reason}. Stay with this package, or pass "
            f"force={task_type!r} to take it all the same."
        )


def _task_type(adapter: Adapter) -> Optional[str]:
    """The adapter's task type; where it has none, that of a generating model."""
    if adapter.config.task_type is not None:
        return str(getattr(adapter.config.task_type, "value", adapter.config.task_type))
    if not getattr(adapter.base_model, "can_generate", lambda: False)():
        return None
    return "SEQ_2_SEQ_LM" if adapter.base_model.config.is_encoder_decoder else "CAUSAL_LM"


def trained_modules(adapter: Adapter) -> dict[str, nn.Module]:
    """Modules that the adapter trains and saves beside the prompt, by the names that they are saved under."""
    return {
        saved_name(name): module.modules_to_save[adapter.name]
        for name, module in adapter.base_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter.name in module.modules_to_save
    }


def _size(model: nn.Module, name: str) -> Optional[int]:
    return getattr(model.config.get_text_config(), name, None)
