# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that needs neither this package nor PEFT: the prompt as entries of the vocabulary."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Optional

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from ..backbone import Backbone, find_backbone, is_decoder_only
from ..bank import PromptBank
from ..files.checkpoint import replacing, saved_name
from ..prompts.adapter import find_adapter
from ..prompts.layer import PTuningLayer
from .tokenizer import save_with_prompt, save_with_prompts


# The bias of the new entries where a model's output has one: a probability of 0.
NEVER = -1e4
# The file with the ids of each prompt of a bank: by name, the first one and their number.
PROMPT_IDS = "prompt_ids.json"
# Files of a model that was in the folder before, which would be read with the new one.
STALE = ("chat_template.*", "additional_chat_templates/*", "model*.safetensors*", "pytorch_model*.bin*", PROMPT_IDS)

READS_EACH_TOKEN = (
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
GENERATES_FROM_ENCODER = (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,)
READS_LAST_TOKEN = (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,)


@dataclass(frozen=True)
class _Source:
    """What a folder is made of.

    Args:
        base_model (`nn.Module`): The model below the adapters.
        layer ([`PTuningLayer`]): Its tuner layer.
        vectors (`torch.Tensor`): The new entries, (N, H).
        adapter_name (`str`, *optional*): The adapter whose trained modules are taken; `None`: the model's own.
    """

    base_model: nn.Module
    layer: PTuningLayer
    vectors: torch.Tensor
    adapter_name: Optional[str] = None


def export_standalone(
    model: nn.Module | PromptBank,
    tokenizer: PreTrainedTokenizerBase,
    directory: str,
    adapter_name: Optional[str] = None,
) -> None:
    """Writes an ordinary Hugging Face folder in which the prompt is V new entries of the vocabulary.

    Their embeddings are the prompt, and the tokenizer puts them in front of every text. The folder loads with
    `AutoModelFor…` and `AutoTokenizer`, without this package and PEFT, and computes the same at the user's tokens.

    Generation never yields the new entries: the folder's generation config suppresses them and normalizes what
    remains, so that the probabilities of the others are those of the model. Their logits are there all the same in the
    output of `forward`: of probability 0 where the model has a bias on them; where the output embedding is tied, those
    of the prompt's vectors; else the mean logit, so that they share less than V / vocabulary of the probability.

    Where a model multiplies its embeddings (Gemma) and is in bfloat16, the prompt is rounded once more, by up to 2⁻⁸.

    Ids of the new entries begin behind the last row of the model's embedding. Without a chat template they have no
    name, and no text produces them. With one they have names between U+FDD0 and U+FDD1, which the template removes
    from what it is given. A plain text that bypasses the template could have them: where strangers write such texts,
    refuse their ids.

    The prompt comes with the special tokens of a plain text, and with the text of a chat template. What a template has
    rendered is therefore tokenized with `add_special_tokens=False`, as `apply_chat_template` does; a plain text
    without special tokens has no prompt.

    All prompts of a bank go into one folder, and each text says which is in front of it. A chat template is told the
    name: `tokenizer.apply_chat_template(messages, prompt="orders")`, or `"chat_template_kwargs": {"prompt": "orders"}`
    in a request to a server; without a name there is no prompt. Where a text is no chat, its prompt's ids are put in
    front of those that the tokenizer returns: `prompt_ids.json` has, by name, the first id and the number of ids.

    Args:
        model (`PeftModel`, transformers model or [`PromptBank`]): What has the adapter, or all; it is not changed.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; it is not changed.
        directory (`str`): Folder to write to; made if it is not there. A model in it is replaced, other files stay.
        adapter_name (`str`, *optional*): Which adapter of a model; by default the active one.

    Raises:
        ValueError:
            The prompt is deep or has a template, the model reads the prompt's positions outside the backbone (a pooled
            first token, say), its weights are quantized, the adapter trains rows of the vocabulary
            (`trainable_token_indices`), the tokenizer can't be told to put something in front or would then write a
            chat otherwise, or the folder holds an adapter, which would be loaded on top. A bank has no prompts, or
            some of its prompts are deep or have heads of their own. Nothing is written then.
    """
    if isinstance(model, PromptBank):
        _export_bank(model, tokenizer, directory, adapter_name)
        return
    adapter = find_adapter(model, adapter_name)
    if adapter.is_deep:
        raise ValueError(
            f"The prompt of adapter {adapter.name!r} is deep: it stands in every layer, and entries of a vocabulary "
            "reach the first layer only. Serve this model with the package, write the prompt for stock PEFT with "
            "`export_to_peft`, or train it with prompt_depth='INPUT'."
        )
    if adapter.config.trainable_token_indices is not None:
        raise ValueError(
            "The adapter trains rows of the vocabulary beside the prompt (`trainable_token_indices`), which would be "
            "left out of the folder. Serve it with this package."
        )
    if adapter.config.prompt_template is not None:
        raise ValueError(
            "The adapter has a prompt template, and in a standalone folder the prompt is in front of every text. "
            "Serve it with this package."
        )
    source = _Source(adapter.base_model, adapter.layer, adapter.prompt(), adapter.name)
    _export(source, tokenizer, directory, save_with_prompt)


def _export_bank(
    bank: PromptBank, tokenizer: PreTrainedTokenizerBase, directory: str, adapter_name: Optional[str]
) -> None:
    if adapter_name is not None:
        raise ValueError(f"All prompts of a bank are exported, and `adapter_name` is {adapter_name!r}. Leave it out.")
    if not len(bank):
        raise ValueError("The bank has no prompts. Add some with `bank.add`.")
    for name in bank:
        if (reason := bank.why_more_than_vectors(name)) is not None:
            raise ValueError(
                f"The prompt {name!r} of the bank {reason}, and entries of a vocabulary are vectors in front of a "
                "text. Delete it from the bank, or serve the bank with this package."
            )
    lengths = {name: bank.length(name) for name in bank}
    source = _Source(bank.base_model, bank.layer, torch.cat([bank.vectors(name) for name in bank]))

    def save(tokenizer: PreTrainedTokenizerBase, folder: Path, ids: list[int]) -> None:
        rest = iter(ids)
        by_name = {name: [*islice(rest, length)] for name, length in lengths.items()}
        save_with_prompts(tokenizer, folder, by_name)
        firsts = {name: [own[0], len(own)] for name, own in by_name.items()}
        (folder / PROMPT_IDS).write_text(json.dumps(firsts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    _export(source, tokenizer, directory, save)


def _export(
    source: _Source,
    tokenizer: PreTrainedTokenizerBase,
    directory: str,
    save_tokenizer: Callable[[PreTrainedTokenizerBase, Path, list[int]], None],
) -> None:
    """Writes a folder whose tokenizer `save_tokenizer` writes, given the ids of the new entries."""
    if (Path(directory) / "adapter_config.json").exists():
        raise ValueError(
            f"{directory} holds an adapter, which transformers would load on top of the exported model. Choose "
            "another folder."
        )
    if hasattr(tokenizer, "set_src_lang_special_tokens"):
        raise ValueError(
            f"{type(tokenizer).__name__} writes what stands around a text anew for each language, and with it what "
            "is in front. Serve this model with the package."
        )
    backbone = find_backbone(source.base_model)
    _check_model(source.base_model, backbone)
    first_id = source.layer.get_base_layer().num_embeddings
    if (largest := max(tokenizer.get_vocab().values())) >= first_id:
        raise ValueError(
            f"The tokenizer gives ids up to {largest}, and the model has {first_id} embeddings: it is of another "
            "model, or `model.resize_token_embeddings` was not called."
        )
    ids = list(range(first_id, first_id + len(source.vectors)))
    standalone = _make_model(source, saved_name(backbone.embedding_path), first_id)
    standalone.generation_config = _make_generation_config(source.base_model, ids)
    with replacing(directory, STALE) as folder:
        save_tokenizer(tokenizer, folder, ids)
        standalone.save_pretrained(folder)


def _check_model(base_model: nn.Module, backbone: Backbone) -> None:
    name = type(base_model).__name__
    if not isinstance(base_model, PreTrainedModel):
        raise ValueError(f"{name} is no transformers model, so there is no folder that it could be loaded from.")
    if getattr(base_model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"The weights of this {name} are quantized, and entries can't be added to them. Load the model without "
            "quantization, load the adapter, and quantize the exported folder."
        )
    if any(parameter.is_meta for parameter in base_model.parameters()):
        raise ValueError(f"Weights of this {name} are offloaded. Load the model without a `device_map` to export it.")
    is_encoder_decoder = backbone.decoder is not None
    allowed = GENERATES_FROM_ENCODER if is_encoder_decoder else READS_EACH_TOKEN
    if not is_encoder_decoder and (backbone.is_causal or is_decoder_only(base_model.config)):
        allowed += READS_LAST_TOKEN
    if not any(name in names for mapping in allowed for names in mapping.values()):
        raise ValueError(
            f"{name} can't be exported: with the prompt in the text, a model that reads its output off the first "
            "token or the mean of all would read the prompt. Known to be exact are token classification, question "
            "answering and mask filling by an encoder or decoder, generation from text, and classification by a "
            "decoder's last token. Serve this one with the package: after `import peft_ptuning_ext`, "
            "`AutoPeftModelFor…` loads it."
        )


def _make_model(source: _Source, embedding_path: str, first_id: int) -> PreTrainedModel:
    """A copy of the base model that shares its weights, but for those that have a row per entry of the vocabulary."""
    base_model, prompt = source.base_model, source.vectors
    state = _plain_state(source, embedding_path)
    table = source.layer.get_base_layer().weight
    rows = _as_rows(source.layer, prompt)
    config = copy.deepcopy(base_model.config)
    config.get_text_config().vocab_size = first_id + len(prompt)
    standalone = _on_meta(base_model, config)
    extended: dict[int, torch.Tensor] = {}
    if odd := sorted(state.keys() ^ standalone.state_dict().keys()):
        raise ValueError(
            f"The weights of this {type(base_model).__name__} are not those that its class makes (first: {odd[0]!r}). "
            "Has it other adapters beside this one? Merge or unload them first."
        )
    output = next((n for n, m in standalone.named_modules() if m is standalone.get_output_embeddings()), None)
    if output is not None and state[f"{output}.weight"].data_ptr() != table.data_ptr():  # trained by itself, perhaps
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        standalone = _on_meta(base_model, config)
    if standalone.get_submodule(embedding_path).weight.shape[0] != first_id + len(prompt):
        raise ValueError(
            f"{type(base_model).__name__} can't be exported: the vocabulary of its config is not that of the "
            "embedding that the prompt goes with."
        )
    for name, expected in standalone.state_dict().items():
        tensor = state[name]
        if tensor.shape == expected.shape:
            continue
        axis = next(i for i, (old, new) in enumerate(zip(tensor.shape, expected.shape)) if old != new)
        if tensor.shape[axis] != first_id or expected.shape[axis] != first_id + len(prompt):
            raise ValueError(
                f"{type(base_model).__name__} can't be exported: {name!r} would change from {tuple(tensor.shape)} to "
                f"{tuple(expected.shape)}, which is no table of the vocabulary."
            )
        if tensor.data_ptr() not in extended:
            if tensor.data_ptr() == table.data_ptr():
                more = rows
            else:
                mean = tensor.mean(axis, keepdim=True)
                is_bias = mean.numel() == 1
                more = (torch.full_like(mean, NEVER) if is_bias else mean).repeat_interleave(len(prompt), axis)
            extended[tensor.data_ptr()] = torch.cat([tensor, more.to(tensor)], dim=axis)
        state[name] = extended[tensor.data_ptr()]
    seen: set[int] = set()
    for name, tensor in state.items():  # what the class ties is tied again below, and nothing else
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    standalone.load_state_dict(state, assign=True)
    standalone.tie_weights()
    return standalone.eval()


def _on_meta(base_model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return type(base_model)(config)


def _plain_state(source: _Source, embedding_path: str) -> dict[str, torch.Tensor]:
    """The state of the base model as it is without adapters, but with what this one has trained beside the prompt."""
    state = {saved_name(name): value for name, value in source.base_model.state_dict().items()}
    is_renamed = f"{embedding_path}.weight" in state  # as it is below a bank without adapters
    wrapped = {} if is_renamed else {embedding_path: "base_layer"}
    for name, module in source.base_model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            is_mine = source.adapter_name in module.modules_to_save
            wrapped[saved_name(name)] = f"modules_to_save.{source.adapter_name}" if is_mine else "original_module"
    for name, inner in wrapped.items():
        prefix, kept = f"{name}.", f"{name}.{inner}."
        state = {
            prefix + key.removeprefix(kept) if key.startswith(kept) else key: value
            for key, value in state.items()
            if key.startswith(kept) or not key.startswith(prefix)
        }
    return state


@torch.no_grad()
def _as_rows(layer: PTuningLayer, prompt: torch.Tensor) -> torch.Tensor:
    """The rows of the embedding that come out of it as the prompt: (V, H)."""
    table = layer.get_base_layer().weight
    largest = int(table.abs().max(dim=1).values.argmax())
    column = int(table[largest].abs().argmax())
    scale = layer.look_up(torch.tensor([largest], device=table.device))[0, column] / table[largest, column]
    ids = torch.linspace(0, len(table) - 1, min(len(table), 64), device=table.device).long()
    expected = layer.look_up(ids).float()
    if not torch.allclose(table[ids].float() * scale.float(), expected, rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"The embedding {type(layer.get_base_layer()).__name__} does more than look up a row and scale it: no "
            "row gives a vector of the prompt."
        )
    rows = (prompt / scale.to(prompt)).to(table)
    if scale == 1:
        return rows
    # A product is rounded again: take the neighbour whose product is nearest.
    away = [torch.nextafter(rows, rows.new_tensor(side)) for side in (-torch.inf, torch.inf)]
    candidates = torch.stack([rows, *away])
    errors = (candidates * scale.to(rows) - prompt.to(rows)).abs()
    return candidates.gather(0, errors.argmin(0, keepdim=True))[0]


def _make_generation_config(base_model: PreTrainedModel, ids: list[int]) -> GenerationConfig:
    config = copy.deepcopy(base_model.generation_config) if base_model.can_generate() else None
    if config is not None:
        config.suppress_tokens = [*(config.suppress_tokens or []), *ids]
        config.renormalize_logits = True
    return config
