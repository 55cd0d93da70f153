# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the method known to PEFT. The only place that reaches into PEFT's registries."""

from aenum import extend_enum
from peft import mapping
from peft.utils import PeftType, register_peft_method


PEFT_TYPE_NAME = "PTUNING"
PREFIX = "ptuning_"


def register(config_cls: type, model_cls: type) -> None:
    """Adds `PeftType.PTUNING` and points PEFT's registries at the two classes.

    Calling it again is harmless: the enum member is kept, and after a reload the newest classes win.

    Args:
        config_cls (`type`): The [`~peft.PeftConfig`] subclass.
        model_cls (`type`): The [`~peft.tuners.tuners_utils.BaseTuner`] subclass.
    """
    if PEFT_TYPE_NAME not in PeftType.__members__:
        extend_enum(PeftType, PEFT_TYPE_NAME, PEFT_TYPE_NAME)
    peft_type = PeftType[PEFT_TYPE_NAME]
    if peft_type in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    else:
        register_peft_method(name=PEFT_TYPE_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
