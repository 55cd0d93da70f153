# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""P-tuning as a PEFT method whose prompt is hidden inside the backbone.

Importing this package registers the method with PEFT and has no other effect.
"""

from .adapters.by_row import use_adapters
from .adapters.collator import DataCollatorWithAdapterNames
from .bank import PromptBank
from .config import PromptEncoderType, PTuningConfig
from .export.model_card import make_model_card
from .export.prompt import fold_prompt, to_prompt_embeds, unfold_prompt
from .export.standalone import export_standalone
from .export.stock import export_to_peft, import_from_peft
from .monitor import PromptMonitor
from .prompts.encoder import PromptEncoder
from .prompts.layer import PTuningLayer
from .registration import register
from .templates.cloze import ClozeClassifier
from .templates.template import PromptTemplate
from .tuner import PTuningModel


__version__ = "0.3.0"

__all__ = [
    "ClozeClassifier",
    "DataCollatorWithAdapterNames",
    "PTuningConfig",
    "PTuningLayer",
    "PTuningModel",
    "PromptBank",
    "PromptEncoder",
    "PromptEncoderType",
    "PromptMonitor",
    "PromptTemplate",
    "export_standalone",
    "export_to_peft",
    "fold_prompt",
    "import_from_peft",
    "make_model_card",
    "to_prompt_embeds",
    "unfold_prompt",
    "use_adapters",
]

register(PTuningConfig, PTuningModel)
