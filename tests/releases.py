# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the installed release of transformers calls things."""

from __future__ import annotations

import inspect

from transformers import LlamaModel, PreTrainedModel


# The cache, as decoders and `generate` take it: `cache` since 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# Layers that run again in the backward pass: `activation_checkpointing` since 5.23.
CHECKPOINTING = "gradient_checkpointing"
if hasattr(PreTrainedModel, "activation_checkpointing_enable"):
    CHECKPOINTING = "activation_checkpointing"
