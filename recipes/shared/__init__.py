# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What the recipes share. `python recipes/NAME.py` puts `recipes/` on the path, where this package is found."""
