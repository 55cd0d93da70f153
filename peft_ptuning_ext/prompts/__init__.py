# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""What stands in front of the text: prompt encoders, and the layer that holds them."""
