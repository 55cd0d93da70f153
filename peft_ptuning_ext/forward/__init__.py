# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""How one call goes: the prompt in front of the text on the way in, off again on the way out."""
