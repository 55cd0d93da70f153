# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Where a prompt enters a model: facts about its architecture, and every table of exceptions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto


# Backbones whose pooler is not a module that takes the last hidden state (B, S, H).
POOLERS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    # ALBERT's pooler is a plain Linear behind the slicing of the first token and before an activation.
    "albert": lambda backbone, hidden: backbone.pooler_activation(backbone.pooler(hidden[:, 0])),
}

RECURRENT = "it keeps a recurrent state instead of a key-value cache, from which the prompt can't be told"

# Backbones that are refused by name: nothing in their interface tells that a prompt in front would go wrong.
REFUSED_MODEL_TYPES: dict[str, str] = {
    "funnel": "it pools neighbouring positions, and the prompt would be pooled with the text",
    "lxmert": "its pooler reads the first position under a name of its own",
    "prophetnet": "its n-gram streams are laid out for token ids",
    "unlimited_ocr_text": "its cache counts the tokens of the first call, and the prompt is not among them",
    "minimax": "its cache does not tell how many tokens it holds",
    "xlstm": RECURRENT,
}

# Parameters of a backbone's `forward` with which a prompt in front can't be right, and why.
REFUSED_PARAMETERS: dict[str, str] = {
    "per_layer_inputs": "its layers read more embeddings of the token ids, and a prompt has no ids",
    "cross_attention_states": "its layers attend to images, and a prompt has no rule for what it sees of them",
    "image_encoder_embeddings": "its layers attend to images, and a prompt has no rule for what it sees of them",
    "cache_params": RECURRENT,
    "state": RECURRENT,
    "mems": "it keeps memories instead of a key-value cache, from which the prompt can't be told",
    "past_buckets_states": "its hashing attention ties positions to fixed buckets",
}

# Classes that scale the embeddings of token ids, but not `inputs_embeds`: the attribute that is the factor.
EMBED_SCALES: dict[str, str] = {
    "BlenderbotSmallEncoder": "embed_scale",
    "FalconH1Model": "embedding_multiplier",
    "MarianEncoder": "embed_scale",
    "MvpDecoder": "embed_scale",
    "MvpEncoder": "embed_scale",
    "PegasusEncoder": "embed_scale",
}

# What a virtual token has in the inputs that have one value for each token.
PER_TOKEN_FILLS: dict[str, int] = {
    "attention_mask": 1,
    "token_type_ids": 0,
    "task_type_ids": 0,  # ERNIE: what it takes where none are given
    "visual_pos_masks": 0,  # Qwen3-VL and its kin: a virtual token is no part of an image
    "vision_mask": 0,  # Granite 4 Vision, (B, S, H)
    "moe_mm_token_type_ids": 0,  # ERNIE 4.5 VL: it goes to the experts of text
}

# Inputs whose second dimension may be S by chance, or that are not read at the backbone's positions.
UNTOUCHED_INPUTS = frozenset({"encoder_hidden_states", "encoder_attention_mask", "labels", "shift_labels"})

# Arguments that describe several texts packed in one row. Attention that takes a prompt reads positions instead.
PACKING_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")

# Arguments that speak of positions or lengths in ways that have no rule for a prompt.
REFUSED_INPUTS = ("lengths", "entity_position_ids", "global_attention_mask", "cross_attention_mask")

# Names under which backbones keep a table of absolute positions (learned or sinusoidal).
POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")

# Classes that measure distance by the unmasked tokens in between: padding between prompt and text changes nothing.
DISTANCE_BY_MASK = frozenset({"BloomModel"})

# What the name of an attention implementation begins with on an adapted model; the rest is the model's own.
ADAPTED = "ptuning_"

# Attention that calculates by itself: the modules that make its keys and values of the text.
KEY_VALUE_PROJECTIONS: dict[str, tuple[str, str]] = {
    "DisentangledSelfAttention": ("key_proj", "value_proj"),
    "MPNetSelfAttention": ("k", "v"),
}

# Kinds of layers whose memory of earlier tokens is their keys and values, all of them or those within a window.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})

# Rotary embeddings whose frequencies depend on how long the whole text is, prompt and all.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Backbone:
    """The transformer stack that a prompt enters, as facts and names, so that it survives copying and pickling.

    Args:
        name (`str`): Path of the backbone in the model, empty if the model is the backbone.
        embedding (`str`): Path of the input embedding in the backbone.
        width (`int`): Width H of the input embedding.
        parameters (`tuple[str, ...]`): Names of the positional parameters of the backbone's `forward`.
        cache_name (`str`): What its `forward` calls the key-value cache: `cache` since transformers 5.24.
        is_causal (`bool`): Whether its attention looks back only.
        counts_tokens (`bool`):
            Whether positions that the caller leaves out are the numbers of the unmasked tokens. This holds for
            decoders, as `generate` does it, and for models that count from behind a padding index by themselves.
        counts_itself (`bool`): Whether the backbone leaves padding out of its positions without being told.
        beside_text (`bool`):
            If True, a left-padded row becomes [padding, prompt, text]; if False, [prompt, padding, text]. True for
            models that measure distance in columns: padding between prompt and text would change the distance there.
        embed_scale (`float`): What the backbone multiplies the embeddings of token ids by, before it goes on.
        first_position (`int`): The position that the backbone gives to its first token.
        max_positions (`int`, *optional*): How many tokens its table of positions holds; `None` if it has no table.
        decoder (`str`, *optional*):
            Path in the model of the decoder that attends to this backbone, if it is an encoder-decoder's encoder.
        not_in_attention (`str`, *optional*):
            Why its attention can't be given keys and values in front of the text's; `None` if it can.
        not_recorded (`str`, *optional*):
            Why the prompt's keys and values can't be computed apart from the text; `None` if they can.
        is_rotary (`bool`): Whether its positions are rotations that do not depend on the length of the text.
        deep_way (`str`, *optional*):
            How keys and values of a deep prompt get in front of the text's: `"attention"`, through transformers'
            attention interface; `"projections"`, behind the modules that make the text's; `"cache"`, as tokens that
            the cache holds. `None` if they can't.
        not_deep (`str`, *optional*): Why they can't.
    """

    name: str
    embedding: str
    width: int
    parameters: tuple[str, ...]
    cache_name: str
    is_causal: bool
    counts_tokens: bool
    counts_itself: bool
    beside_text: bool
    embed_scale: float
    first_position: int
    max_positions: Optional[int]
    decoder: Optional[str]
    not_in_attention: Optional[str]
    not_recorded: Optional[str]
    is_rotary: bool
    deep_way: Optional[str]
    not_deep: Optional[str]

    @property
    def embedding_path(self) -> str:
        """Path of the input embedding in the model."""
        return f"{self.name}.{self.embedding}" if self.name else self.embedding


def find_backbone(model: nn.Module) -> Backbone:
    """Finds the transformer stack above the input embedding, and says so if there is none that takes a prompt.

    For an encoder-decoder this is the encoder; for a vision-language model, the text model; otherwise the nearest
    `PreTrainedModel` around the input embedding.

    Args:
        model (`nn.Module`): A transformers model, or a module that holds exactly one.

    Returns:
        [`Backbone`]

    Raises:
        ValueError: P-tuning can't work on this model. The message names the class and the reason.
    """
    prefix, pretrained = _outermost_pretrained(model)
    decoder = None
    if (
        getattr(pretrained.config, "is_encoder_decoder", False)
        and (stack := _stack(pretrained, "decoder")) is not None
    ):
        encoder = _stack(pretrained, "encoder")
        if encoder is None or encoder is stack:
            raise _refusal(pretrained, "it is an encoder-decoder without an encoder of its own")
        decoder = _path_of(model, stack)
        pretrained, prefix = encoder, _path_of(model, encoder)
    embedding = _input_embedding(pretrained)

    paths = [name for name, module in pretrained.named_modules(remove_duplicate=False) if module is embedding]
    if len(paths) != 1:
        raise _refusal(pretrained, f"its input embedding is registered {len(paths)} times ({', '.join(paths)})")
    name, backbone = max(
        ((n, m) for n, m in pretrained.named_modules() if isinstance(m, PreTrainedModel) and _holds(n, paths[0])),
        key=lambda pair: len(pair[0]),
    )
    parameters = tuple(inspect.signature(type(backbone).forward).parameters)[1:]
    if "inputs_embeds" not in parameters:
        raise _refusal(backbone, "its forward takes no `inputs_embeds`")
    if backbone.config.model_type in REFUSED_MODEL_TYPES:
        raise _refusal(backbone, REFUSED_MODEL_TYPES[backbone.config.model_type])
    if set(getattr(backbone.config, "layer_types", None) or ()) == {"linear_attention"}:
        raise _refusal(backbone, RECURRENT)  # since transformers 5.24, its state is passed as `cache`, too
    if getattr(backbone.config, "token_dropout", False):
        raise _refusal(backbone, "`token_dropout` of its config rescales the embeddings of token ids only")
    if backbone.config.model_type == "esm" and (
        backbone.config.position_embedding_type != "rotary" or backbone.config.emb_layer_norm_before
    ):
        raise _refusal(backbone, "it gives positions and a layer norm to the embeddings of token ids only")
    for parameter, reason in REFUSED_PARAMETERS.items():
        # Gemma 4 takes such inputs only if its config gives them a width.
        is_unused = parameter == "per_layer_inputs" and getattr(backbone.config, "hidden_size_per_layer_input", 1) == 0
        if parameter in parameters and not is_unused:
            raise _refusal(backbone, reason)
    for kind in {type(module) for module in backbone.modules()} - {type(backbone)}:
        inputs = inspect.signature(kind.forward).parameters
        if (
            "hidden_states" in inputs
            and "input_ids" in inputs
            and inputs["input_ids"].default is inspect.Parameter.empty
        ):
            raise _refusal(backbone, f"its {kind.__name__} reads the token ids again, and a prompt has none")
    if isinstance(getattr(backbone, "pooler", None), nn.Linear) and backbone.config.model_type not in POOLERS:
        raise _refusal(backbone, "its pooler reads a slice that only its own forward knows")

    first_position, max_positions = _positions(backbone)
    is_causal, is_local, has_positions = _is_causal(backbone), _is_local(backbone), "position_ids" in parameters
    deep_way, not_deep = _deep_way(backbone, is_causal)
    return Backbone(
        name=".".join(part for part in (prefix, name) if part),
        embedding=paths[0][len(name) :].lstrip("."),
        width=table_of(embedding).embedding_dim,
        parameters=tuple(p for p in parameters if p != "kwargs"),
        cache_name="cache" if "cache" in parameters else "past_key_values",
        is_causal=is_causal,
        counts_tokens=has_positions and (is_causal or first_position > 0),
        counts_itself=first_position > 0 or _reads_mask_for_positions(backbone),
        beside_text=is_local or (not has_positions if is_causal else max_positions is None or first_position > 0),
        embed_scale=float(getattr(backbone, EMBED_SCALES.get(type(backbone).__name__, ""), 1.0)),
        first_position=first_position,
        max_positions=max_positions,
        decoder=decoder,
        not_in_attention=_why_not_in_attention(backbone),
        not_recorded=_why_not_recorded(backbone, first_position),
        is_rotary=bool(getattr(backbone.config, "rope_parameters", None))
        and not _rope_types(backbone.config) & LENGTH_DEPENDENT_ROPE,
        deep_way=deep_way,
        not_deep=not_deep,
    )


def why_not_in_decoder(decoder: PreTrainedModel) -> Optional[str]:
    """Why the self-attention of an encoder-decoder's decoder can't be given keys and values; `None` if it can."""
    parameters = inspect.signature(type(decoder).forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if not takes_any or not hasattr(sys.modules[type(decoder).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return "its attention does not go through transformers' attention interface"
    if (reason := _other_layers(decoder.config)) is not None:
        return reason
    if (reason := _why_not_implementation(decoder)) is not None:
        return reason
    if not any(getattr(module, "is_causal", None) is True for module in decoder.modules()):
        return "its self-attention does not say that it is causal, and can't be told from its cross-attention"
    return None


def max_positions(stack: PreTrainedModel) -> Optional[int]:
    """How many tokens the table of positions of a stack holds; `None` if it has no table."""
    return _positions(stack)[1]


def pool(backbone: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Applies the backbone's own pooler to `hidden_states`, shape (B, S, H)."""
    pooler = POOLERS.get(backbone.config.model_type)
    return pooler(backbone, hidden_states) if pooler is not None else backbone.pooler(hidden_states)


def _refusal(module: nn.Module, reason: str) -> ValueError:
    return ValueError(f"P-tuning can't be applied to {type(module).__name__}: {reason}.")


def _outermost_pretrained(model: nn.Module) -> tuple[str, PreTrainedModel]:
    if isinstance(model, PreTrainedModel):
        return "", model
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(_holds(outer, name) for outer, _ in found):
            found.append((name, module))
    if len(found) != 1:
        count = "no transformers model" if not found else f"{len(found)} transformers models"
        raise _refusal(model, f"it holds {count}, and exactly one is needed")
    return found[0]


def _holds(outer: str, inner: str) -> bool:
    """Whether path `inner` lies at or below path `outer`."""
    return not outer or inner == outer or inner.startswith(outer + ".")


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _stack(model: PreTrainedModel, which: str) -> Optional[nn.Module]:
    """The encoder or decoder of an encoder-decoder, or `None` where the model is only the other half."""
    stack = getattr(model, f"get_{which}")()
    if not isinstance(stack, PreTrainedModel) or stack is model:
        return None
    # A vision-language model's decoder may be a whole encoder-decoder (BLIP-2 on T5).
    return (_stack(stack, which) or stack) if getattr(stack.config, "is_encoder_decoder", False) else stack


def _input_embedding(model: PreTrainedModel) -> nn.Module:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if embedding is None:
        raise _refusal(model, "it has no input embedding (`get_input_embeddings` finds none)")
    table = table_of(embedding)
    if not hasattr(table, "embedding_dim") or not hasattr(table, "num_embeddings"):
        raise _refusal(model, f"its input embedding is a {type(table).__name__}, not a table of token embeddings")
    return embedding


def table_of(embedding: nn.Module) -> nn.Module:
    """Returns the embedding itself, below whatever adapters and wrappers of PEFT stand around it already."""
    while isinstance(embedding, AuxiliaryTrainingWrapper) or hasattr(embedding, "base_layer"):
        is_wrapper = isinstance(embedding, AuxiliaryTrainingWrapper)
        embedding = embedding.original_module if is_wrapper else embedding.base_layer
    return embedding


def _is_causal(backbone: PreTrainedModel) -> bool:
    """Whether attention looks back only: by the config, else by the layers, else by what the model is made for."""
    config = backbone.config
    if (from_config := getattr(config, "is_causal", None)) is not None:
        return bool(from_config)
    if any(getattr(module, "is_causal", None) is True for module in backbone.modules()):
        return True  # cross-attention never says so
    if getattr(config, "is_encoder_decoder", False):
        return False
    # XGLM and MPT say it nowhere. A model for the next token that is not also one for masked tokens is a decoder.
    return getattr(config, "is_decoder", False) or is_decoder_only(config)


def is_decoder_only(config: PreTrainedConfig) -> bool:
    """Whether transformers has this kind of model for the next token, and not for masked tokens."""
    kind = config.model_type
    return (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _is_local(backbone: PreTrainedModel) -> bool:
    """Whether some layers look back a limited number of columns, or carry a state along."""
    config = backbone.config
    layer_types = getattr(config, "layer_types", None) or ()
    return bool(
        getattr(config, "sliding_window", None)
        or getattr(config, "attention_chunk_size", None)
        or any(layer_type != "full_attention" for layer_type in layer_types)
        or "local" in (getattr(config, "attention_layers", None) or ())  # GPT-Neo
    )


def _positions(backbone: PreTrainedModel) -> tuple[int, Optional[int]]:
    """First position and number of positions of the backbone's table, if it has one."""
    for name, module in backbone.named_modules():
        if name.rpartition(".")[2] not in POSITION_TABLES:
            continue
        if hasattr(module, "create_position_ids_from_input_ids"):  # sinusoids, for any length
            return (module.padding_idx or 0) + 1, None
        if isinstance(module, nn.Embedding):
            if module.padding_idx is not None:  # RoBERTa and its kin count from behind the padding index
                first = module.padding_idx + 1
                return first, module.num_embeddings - first
            return 0, module.num_embeddings - getattr(module, "offset", 0)  # OPT's and BART's tables are 2 longer
    return 0, None


def _reads_mask_for_positions(backbone: PreTrainedModel) -> bool:
    """Whether a table of positions is given the mask, to count what is no padding (OPT)."""
    tables = (module for name, module in backbone.named_modules() if name.rpartition(".")[2] in POSITION_TABLES)
    return any("attention_mask" in inspect.signature(table.forward).parameters for table in tables)


def _why_not_in_attention(backbone: PreTrainedModel) -> Optional[str]:
    """Why attention can't be given keys and values in front of the text's; `None` if it can."""
    config = backbone.config
    parameters = inspect.signature(type(backbone).forward).parameters.values()
    if not type(backbone)._supports_attention_backend or not any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters
    ):
        return "its attention does not go through transformers' attention interface"
    if (reason := _other_layers(config)) is not None:
        return reason
    if (reason := _why_not_implementation(backbone)) is not None:
        return reason
    if config.output_attentions:
        return "its config asks for `output_attentions`"
    return None


def adapted_name(implementation: Optional[str]) -> str:
    """What an attention implementation is called on an adapted model: `sdpa` → `ptuning_sdpa`."""
    return f"{ADAPTED}{own_name(implementation)}"


def own_name(implementation: Optional[str]) -> str:
    """What the model itself calls its attention implementation: `ptuning_sdpa` → `sdpa`."""
    return str(implementation).removeprefix(ADAPTED)


def is_adapted(implementation: Optional[str]) -> bool:
    """Whether the name of an attention implementation is that of an adapted model."""
    return implementation is not None and implementation.startswith(ADAPTED)


def attention_functions(cls: type[nn.Module]) -> AttentionInterface:
    """The attention functions that the models in the file of a class choose from."""
    return getattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)


def _why_not_implementation(stack: PreTrainedModel) -> Optional[str]:
    """Why an attention implementation takes no prompt; `None` if it does."""
    name = own_name(stack.config._attn_implementation)
    if name.startswith("paged|"):
        return f"its attention implementation is {name!r}, which is for continuous batching"
    if name != "eager" and name not in attention_functions(type(stack)):
        return f"its attention implementation is {name!r}, which is not registered with `AttentionInterface`"
    return None


def _other_layers(config: PreTrainedConfig) -> Optional[str]:
    """Says so if a model has layers that attend in another way than to all tokens or those within a window."""
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"it has layers of another kind than attention ({', '.join(sorted(kinds)) or 'chunked_attention'})"
    return None


def _deep_way(backbone: PreTrainedModel, is_causal: bool) -> tuple[Optional[str], Optional[str]]:
    """How a deep prompt gets to the attention of a backbone, or why it does not: one of both is `None`."""
    config, parameters = backbone.config, inspect.signature(type(backbone).forward).parameters
    if (reason := _other_layers(config)) is not None:
        return None, reason
    if getattr(config, "add_cross_attention", False):
        return None, "it has cross-attention"
    if config.model_type == "doge":
        return None, "its attention makes a mask of the values in its cache"
    if any(map(key_value_projections, backbone.modules())):
        return "projections", None
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    has_interface = hasattr(sys.modules[type(backbone).__module__], "ALL_ATTENTION_FUNCTIONS")
    reason = _why_not_implementation(backbone)
    if takes_any and has_interface and reason is None:
        return "attention", None
    if is_causal and not {"cache", "past_key_values"}.isdisjoint(parameters):
        return "cache", None
    if takes_any and has_interface:
        return None, reason
    return None, "its attention does not go through transformers' attention interface"


def key_value_projections(module: nn.Module) -> Optional[tuple[str, str]]:
    """The names of the modules that make the keys and values of an attention that calculates by itself, or `None`."""
    names = KEY_VALUE_PROJECTIONS.get(type(module).__name__)
    # DeBERTa's attention has the name of DeBERTa-v2's, and one projection for queries, keys and values.
    return names if names is not None and all(hasattr(module, name) for name in names) else None


def _why_not_recorded(backbone: PreTrainedModel, first_position: int) -> Optional[str]:
    """Why the prompt's keys and values can't be computed apart from the text; `None` if they can.

    What comes first must not depend on what follows, and the text must be told that it begins at position V.
    """
    config, parameters = backbone.config, inspect.signature(type(backbone).forward).parameters
    if not getattr(config, "is_causal", True) or not any(
        getattr(module, "is_causal", None) is True for module in backbone.modules()
    ):
        return "its attention is not causal"
    if "position_ids" not in parameters:
        return "it can't be told positions"
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    if _rope_types(config) & LENGTH_DEPENDENT_ROPE:
        return "its rotary embedding depends on the length of the whole text"
    if first_position > 0:
        return "it counts positions from another than 0"
    return None


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """The kinds of rotary embedding in a config, one for all layers or one by kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {entry.get("rope_type", "default") for entry in (rope, *rope.values()) if isinstance(entry, dict)}
