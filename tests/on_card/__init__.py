# SPDX-License-Identifier: Apache-2.0
"""Tests that need a CUDA device, real or simulated: python -m pytest -p tests.cuda_simulation.plugin tests/on_card"""
