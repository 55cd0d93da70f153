# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What adding and removing an adapter takes: checks, rows of the vocabulary, names in files, and the way back."""
