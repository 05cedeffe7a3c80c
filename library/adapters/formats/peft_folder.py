# SPDX-License-Identifier: Apache-2.0
"""The names of the files in a folder that PEFT writes. No torch: command lines are checked with them."""

PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
