# SPDX-License-Identifier: Apache-2.0
"""A CUDA device in main memory: what runs on a GPU is tested on machines without one. See docs/simulated_card.md.

Nothing here imports torch before `simulate()`: the card has to be there first.
"""
