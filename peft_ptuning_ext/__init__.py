# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""P-tuning as a PEFT method whose prompt is hidden inside the backbone.

Importing this package registers the method with PEFT and has no other effect.
"""

from .config import PromptEncoderType, PTuningConfig
from .encoder import PromptEncoder
from .export import export_to_peft, fold_prompt, import_from_peft, make_model_card, to_prompt_embeds
from .layer import PTuningLayer
from .monitor import PromptMonitor
from .registration import register
from .standalone import export_standalone
from .tuner import PTuningModel


__version__ = "0.1.0"

__all__ = [
    "PTuningConfig",
    "PTuningLayer",
    "PTuningModel",
    "PromptEncoder",
    "PromptEncoderType",
    "PromptMonitor",
    "export_standalone",
    "export_to_peft",
    "fold_prompt",
    "import_from_peft",
    "make_model_card",
    "to_prompt_embeds",
]

register(PTuningConfig, PTuningModel)
