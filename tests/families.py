# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The model families and tasks of the contract, as two-layer random models made from configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as tf
from transformers import PretrainedConfig, PreTrainedModel


VOCABULARY = 99
PAD = 0

ENCODER_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
DECODER_SIZES = {**ENCODER_SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
WITHOUT_HEAD_DIM = {key: value for key, value in DECODER_SIZES.items() if key != "head_dim"}

# Task types of PEFT, and the two tasks for which PEFT has none; what makes a model of a config.
TASKS: dict[str, type] = {
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": tf.AutoModel,
    "masked LM": tf.AutoModelForMaskedLM,
    "multiple choice": tf.AutoModelForMultipleChoice,
}
PEFT_TASKS = frozenset(task for task in TASKS if task.isupper())


@dataclass(frozen=True)
class Family:
    """A family of models. `kind` is encoder, decoder or encoder-decoder."""

    kind: str
    make_config: Callable[..., PretrainedConfig]
    sizes: dict = field(default_factory=dict)

    def config(self, **overrides) -> PretrainedConfig:
        return self.make_config(**{**self.sizes, **overrides})

    @property
    def tasks(self) -> list[str]:
        """The tasks for which transformers has a model of this family."""
        skipped = {"CAUSAL_LM", "SEQ_2_SEQ_LM"} if self.kind == "encoder" else {"SEQ_2_SEQ_LM", "masked LM"}
        if self.kind == "encoder-decoder":
            skipped = {"CAUSAL_LM", "masked LM", "multiple choice"}
        config_class = type(self.config())
        return [name for name, auto in TASKS.items() if name not in skipped and config_class in auto._model_mapping]


ENCODERS = {
    "BERT": Family("encoder", tf.BertConfig, ENCODER_SIZES),
    "RoBERTa": Family("encoder", tf.RobertaConfig, {**ENCODER_SIZES, "pad_token_id": 1}),
    "XLM-R": Family("encoder", tf.XLMRobertaConfig, {**ENCODER_SIZES, "pad_token_id": 1}),
    "ELECTRA": Family("encoder", tf.ElectraConfig, {**ENCODER_SIZES, "embedding_size": 20}),
    "ALBERT": Family("encoder", tf.AlbertConfig, {**ENCODER_SIZES, "embedding_size": 20}),
    "DistilBERT": Family(
        "encoder",
        tf.DistilBertConfig,
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        | {"max_position_embeddings": 64, "pad_token_id": PAD},
    ),
    "DeBERTa-v2": Family(
        "encoder",
        tf.DebertaV2Config,
        {**ENCODER_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        | {"position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "MPNet": Family("encoder", tf.MPNetConfig, {**ENCODER_SIZES, "pad_token_id": 1}),
    "ModernBERT": Family(
        "encoder",
        tf.ModernBertConfig,
        {**ENCODER_SIZES, "local_attention": 6, "global_attn_every_n_layers": 2}
        | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4},
    ),
}
DECODERS = {
    "GPT-2": Family(
        "decoder",
        tf.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": PAD}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "OPT": Family(
        "decoder",
        tf.OPTConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"ffn_dim": 48, "word_embed_proj_dim": 20, "max_position_embeddings": 64, "pad_token_id": PAD}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "Llama": Family("decoder", tf.LlamaConfig, DECODER_SIZES),
    "Mistral": Family("decoder", tf.MistralConfig, {**DECODER_SIZES, "sliding_window": 6}),
    "Qwen3": Family("decoder", tf.Qwen3Config, DECODER_SIZES),
    "Gemma 2": Family("decoder", tf.Gemma2Config, {**DECODER_SIZES, "sliding_window": 6}),
    "Gemma 3": Family(
        "decoder",
        tf.Gemma3TextConfig,
        {**DECODER_SIZES, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi-3": Family("decoder", tf.Phi3Config, WITHOUT_HEAD_DIM),
    "GPT-NeoX": Family("decoder", tf.GPTNeoXConfig, ENCODER_SIZES | {"bos_token_id": 1, "eos_token_id": 2}),
    "Bloom": Family(
        "decoder",
        tf.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": PAD}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "Falcon": Family(
        "decoder",
        tf.FalconConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Mixtral": Family(
        "decoder", tf.MixtralConfig, {**DECODER_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "Qwen3-MoE": Family(
        "decoder",
        tf.Qwen3MoeConfig,
        {**DECODER_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}
ENCODER_DECODERS = {
    "T5": Family(
        "encoder-decoder",
        tf.T5Config,
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": PAD},
    ),
    "BART": Family(
        "encoder-decoder",
        tf.BartConfig,
        {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 2, "forced_eos_token_id": None},
    ),
}
FAMILIES = ENCODERS | DECODERS | ENCODER_DECODERS
CELLS = [(name, task) for name, family in FAMILIES.items() for task in family.tasks]


def make_model(
    family: str | Family, task: str, attn_implementation: str | None = None, **overrides
) -> PreTrainedModel:
    """A random float32 model in evaluation mode, the same at every call; biases and norms are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family = FAMILIES[family] if isinstance(family, str) else family
        model = TASKS[task].from_config(family.config(**overrides), attn_implementation=attn_implementation)
        # Weights that start at zero or one would hide a missing bias or a wrong norm.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else parameter.data.add_(
                0.1 * torch.randn_like(parameter)
            )
    return model.eval()


def support_table() -> str:
    """The families and tasks of the contract as the Markdown table of docs/guarantees.md."""
    rows = ["| family | " + " | ".join(TASKS) + " |", "|---|" + ":-:|" * len(TASKS)]
    for name, family in FAMILIES.items():
        rows.append(f"| {name} | " + " | ".join("✓" if task in family.tasks else "" for task in TASKS) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(support_table())
