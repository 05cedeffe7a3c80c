# SPDX-License-Identifier: Apache-2.0
"""Configurations of other trainers, read for tools/convert_config.py: one module for each trainer.

A module has tables of the other trainer's keys, each with what becomes of it (`keys.Key`), and `read`, which makes a
`Draft` of a document. Names and defaults are those of the projects' sources in 2025 and 2026.
"""

from tools.other_trainers import (
    ai_toolkit,
    diffusers_examples,
    diffusion_pipe,
    kohya_gui,
    musubi_tuner,
    onetrainer,
    simpletuner,
)
from tools.other_trainers.keys import Draft

# name for --from -> its module; a file is of the first one that knows it
READERS = {
    "ai-toolkit": ai_toolkit,
    "diffusion-pipe": diffusion_pipe,
    "musubi": musubi_tuner,
    "simpletuner": simpletuner,
    "kohya_ss": kohya_gui,
    "onetrainer": onetrainer,
    "diffusers": diffusers_examples,
}

__all__ = ["READERS", "Draft"]
