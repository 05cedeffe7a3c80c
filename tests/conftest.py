# SPDX-License-Identifier: Apache-2.0
"""Test-wide settings: one thread (tiny models lose time to more), and no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
