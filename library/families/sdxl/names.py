# SPDX-License-Identifier: Apache-2.0
"""Where a single file of SDXL has its text encoders, and the numbers of the blocks of its U-Net.

The names of the U-Net are those of Stable Diffusion 1.x and 2.x: see library/families/sd/names.py.
"""

from __future__ import annotations

CLIP_L_PREFIX = "conditioner.embedders.0.transformer.text_model."
CLIP_G_PREFIX = "conditioner.embedders.1.model."

BLOCK_COUNT = 23  # time and label embeddings, 9 input blocks, 3 middle ones, 9 output blocks, the last layers
_STARTS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def sdxl_block(published: str) -> int:
    """Index among the 23 blocks of SDXL's U-Net that rates and ranks are given for, from a published path."""
    kind, _, rest = published.partition(".")
    if kind in _STARTS:
        return _STARTS[kind] + int(rest.partition(".")[0])
    return BLOCK_COUNT - 1 if kind == "out" else 0
