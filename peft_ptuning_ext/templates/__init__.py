# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens anywhere in a text, and a classifier that reads label words off a language model."""
