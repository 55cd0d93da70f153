# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that needs neither this package nor PEFT: the prompt as entries of the vocabulary."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from .backbone import Backbone, find_backbone
from .checkpoint import replacing
from .export import Adapter, find_adapter


# The bias of the new entries where a model's output has one: a probability of 0.
NEVER = -1e4
# Files of a model that was in the folder before, which would be read with the new one.
STALE = ("chat_template.*", "additional_chat_templates/*", "model*.safetensors*", "pytorch_model*.bin*")
# Around the names that the entries have in a chat template: code points that Unicode reserves for the inside of
# programs and forbids in texts that are exchanged (The Unicode Standard, 23.7).
BEGIN, END = "\ufdd0", "\ufdd1"

READS_EACH_TOKEN = (
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
GENERATES_FROM_ENCODER = (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,)
READS_LAST_TOKEN = (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,)


def export_standalone(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: str, adapter_name: Optional[str] = None
) -> None:
    """Writes an ordinary Hugging Face folder in which the prompt is V new entries of the vocabulary.

    Their embeddings are the prompt, and the tokenizer puts them in front of every text. The folder loads with
    `AutoModelFor…` and `AutoTokenizer`, without this package and PEFT, and computes the same at the user's tokens.

    Generation never yields the new entries: the folder's generation config suppresses them and normalizes what
    remains, so that the probabilities of the others are those of the model. Their logits are there all the same in the
    output of `forward`: of probability 0 where the model has a bias on them; where the output embedding is tied, those
    of the prompt's vectors; else the mean logit, so that they share less than V / vocabulary of the probability.

    Where a model multiplies its embeddings (Gemma) and is in bfloat16, the prompt is rounded once more, by up to 2⁻⁸.

    Ids of the new entries begin behind the last row of the model's embedding. A text can't produce them: without a
    chat template they have no name, and the template writes names that it removes from what it is given.

    The prompt comes with the special tokens of a plain text, and with the text of a chat template. What a template has
    rendered is therefore tokenized with `add_special_tokens=False`, as `apply_chat_template` does; a plain text
    without special tokens has no prompt.

    Args:
        model (`PeftModel` or a transformers model): The model that has the adapter; it is not changed.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; it is not changed.
        directory (`str`): Folder to write to; made if it is not there. A model in it is replaced, other files stay.
        adapter_name (`str`, *optional*): Which adapter; by default the active one.

    Raises:
        ValueError:
            The model reads the prompt's positions outside the backbone (a pooled first token, say), its weights are
            quantized, the tokenizer can't be told to put something in front, or the folder holds an adapter, which
            would be loaded on top. Nothing is written then.
    """
    adapter = find_adapter(model, adapter_name)
    base_model = adapter.base_model
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
    backbone = find_backbone(base_model)
    _check_model(base_model, backbone)
    prompt = adapter.prompt()
    first_id = adapter.layer.get_base_layer().num_embeddings
    if (largest := max(tokenizer.get_vocab().values())) >= first_id:
        raise ValueError(
            f"The tokenizer gives ids up to {largest}, and the model has {first_id} embeddings: it is of another "
            "model, or `model.resize_token_embeddings` was not called."
        )
    ids = list(range(first_id, first_id + len(prompt)))
    standalone = _make_model(adapter, backbone.embedding_path, prompt, first_id)
    standalone.generation_config = _make_generation_config(base_model, ids)
    with replacing(directory, STALE) as folder:
        _save_tokenizer(folder, tokenizer, ids)
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
    kind = base_model.config.model_type
    is_decoder = (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if not is_encoder_decoder and (backbone.is_causal or is_decoder):
        allowed += READS_LAST_TOKEN
    if not any(name in names for mapping in allowed for names in mapping.values()):
        raise ValueError(
            f"{name} can't be exported: with the prompt in the text, a model that reads its output off the first "
            "token or the mean of all would read the prompt. Known to be exact are token classification, question "
            "answering and mask filling by an encoder or decoder, generation from text, and classification by a "
            "decoder's last token. Serve this one with the package: after `import peft_ptuning_ext`, "
            "`AutoPeftModelFor…` loads it."
        )


def _make_model(adapter: Adapter, embedding_path: str, prompt: torch.Tensor, first_id: int) -> PreTrainedModel:
    """A copy of the base model that shares its weights, but for those that have a row per entry of the vocabulary."""
    base_model = adapter.base_model
    state = _plain_state(adapter, embedding_path)
    table = adapter.layer.get_base_layer().weight
    rows = _as_rows(adapter, prompt)
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


def _plain_state(adapter: Adapter, embedding_path: str) -> dict[str, torch.Tensor]:
    """The state of the base model as it is without adapters, but with what this one has trained beside the prompt."""
    state = adapter.base_model.state_dict()
    wrapped = {embedding_path: "base_layer"}
    for name, module in adapter.base_model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            is_mine = adapter.name in module.modules_to_save
            wrapped[name] = f"modules_to_save.{adapter.name}" if is_mine else "original_module"
    for name, inner in wrapped.items():
        prefix, kept = f"{name}.", f"{name}.{inner}."
        state = {
            prefix + key.removeprefix(kept) if key.startswith(kept) else key: value
            for key, value in state.items()
            if key.startswith(kept) or not key.startswith(prefix)
        }
    return state


@torch.no_grad()
def _as_rows(adapter: Adapter, prompt: torch.Tensor) -> torch.Tensor:
    """The rows of the embedding that come out of it as the prompt: (V, H)."""
    layer = adapter.layer
    table = layer.get_base_layer().weight
    largest = int(table.abs().max(dim=1).values.argmax())
    column = int(table[largest].abs().argmax())
    scale = layer.embed(torch.tensor([largest], device=table.device))[0, column] / table[largest, column]
    ids = torch.linspace(0, len(table) - 1, min(len(table), 64), device=table.device).long()
    expected = layer.embed(ids).float()
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


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Saves the tokenizer so that it puts `ids` in front of every text."""
    names = [f"{BEGIN}virtual {i}{END}" for i in range(len(ids))]
    template = tokenizer.chat_template
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        is_named = isinstance(template, dict)
        by_name = {
            key: put_names_first(text, names) for key, text in (template if is_named else {"": template}).items()
        }
        tokenizer.chat_template = by_name if is_named else by_name[""]
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json, and only the `tokenizers` library can be told to put "
            "something in front of every text. Load the tokenizer with `AutoTokenizer` from a folder that has one."
        )
    with _changing(folder / "tokenizer.json") as state:
        state["post_processor"] = put_ids_first(state["post_processor"], ids, names)
        if template is not None:
            _add_entries(state, ids, names)
    with _changing(folder / "tokenizer_config.json") as config:
        # Classes of single models make parts of the tokenizer anew when they load; this one takes the file as it is.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = tokenizer.model_input_names
        for name in ("add_bos_token", "add_eos_token"):  # they would write the post-processor again
            config.pop(name, None)


@contextmanager
def _changing(path: Path) -> Iterator[dict]:
    state = json.loads(path.read_text(encoding="utf-8"))
    yield state
    path.write_text(json.dumps(state, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def put_ids_first(post_processor: Optional[dict], ids: list[int], names: list[str]) -> dict:
    """Returns what the `tokenizers` library reads as `post_processor` with `ids` in front.

    Args:
        post_processor (`dict`, *optional*): The entry of a tokenizer.json.
        ids (`list[int]`): V ids, which need no entry in the vocabulary.
        names (`list[str]`): Their names in the tokens of an encoding.

    Raises:
        ValueError: The kind of post-processor is unknown.
    """
    steps = post_processor["processors"] if (post_processor or {}).get("type") == "Sequence" else [post_processor]
    steps = [step for step in steps if step is not None]
    others = [step for step in steps if step["type"] == "ByteLevel"]  # they trim offsets
    rest = [step for step in steps if step["type"] != "ByteLevel"]
    if len(rest) > 1 or (rest and rest[0]["type"] not in TEMPLATES):
        raise ValueError(
            f"The tokenizer's post-processor {' and '.join(step['type'] for step in rest)} is not one that something "
            f"can be put in front of: {', '.join(TEMPLATES)}."
        )
    if rest and rest[0]["type"] == "RobertaProcessing":
        trims = {key: rest[0][key] for key in ("add_prefix_space", "trim_offsets")}
        others.append({"type": "ByteLevel", **trims, "use_regex": True})
    template = TEMPLATES[rest[0]["type"]](rest[0]) if rest else _template([], ["A0"], ["A0", "B1"])
    first = f"{BEGIN}prompt{END}"
    template["special_tokens"][first] = {"id": first, "ids": ids, "tokens": names}
    for kind in ("single", "pair"):
        template[kind].insert(0, {"SpecialToken": {"id": first, "type_id": 0}})
    return {"type": "Sequence", "processors": [*others, template]} if others else template


def _template(special: list[tuple[str, int]], single: list[str], pair: list[str]) -> dict:
    """A `TemplateProcessing`. A piece is A, B or the number of a special token, and the token type."""

    def piece(code: str) -> dict:
        if code[0] in "AB":
            return {"Sequence": {"id": code[0], "type_id": int(code[1])}}
        return {"SpecialToken": {"id": special[int(code[0])][0], "type_id": int(code[1])}}

    return {
        "type": "TemplateProcessing",
        "single": [piece(code) for code in single],
        "pair": [piece(code) for code in pair],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in special},
    }


# Post-processors of the `tokenizers` library that put tokens around a text, written as a template.
TEMPLATES: dict[str, Callable[[dict], dict]] = {
    "TemplateProcessing": copy.deepcopy,
    "BertProcessing": lambda step: _template(
        [step["cls"], step["sep"]], ["00", "A0", "10"], ["00", "A0", "10", "B1", "11"]
    ),
    "RobertaProcessing": lambda step: _template(
        [step["cls"], step["sep"]], ["00", "A0", "10"], ["00", "A0", "10", "10", "B0", "10"]
    ),
}


def put_names_first(template: str, names: list[str]) -> str:
    """Returns a chat template that writes `names`, then what `template` writes without the code points they have."""
    template = re.sub(r"(\r\n|\r|\n)\Z", "", template)  # as Jinja does at the end
    # Where an answer of the model begins can't be told inside a block that is kept: without the tag, callers who ask
    # for it are warned.
    template = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", template)
    template = re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", template)
    given = "{% set ptuning_text %}\n" + template + "{{ '' }}{% endset %}"
    return f"{given}{{{{ '{''.join(names)}' + ptuning_text | replace('{BEGIN}', '') | replace('{END}', '') }}}}"


def _add_entries(state: dict, ids: list[int], names: list[str]) -> None:
    """Gives the new ids the names that the chat template writes."""
    vocabulary = state["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError(
            f"The tokenizer has a chat template and the model {state['model'].get('type')}, whose vocabulary has no "
            "places for the prompt behind the rows of the embedding. Remove the template to export it for plain texts."
        )
    for token in state["added_tokens"]:  # those outside of the vocabulary are numbered by its size
        vocabulary.setdefault(token["content"], token["id"])
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for id, name in zip(ids, names):
        vocabulary[name] = id
        state["added_tokens"].append({"id": id, "content": name, **options})
