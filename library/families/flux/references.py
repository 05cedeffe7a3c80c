# SPDX-License-Identifier: Apache-2.0
"""The picture to edit in FLUX.1 Kontext: clean latents as further tokens, with places of their own.

Black Forest Labs 2025, https://arxiv.org/abs/2506.15742. Their tokens follow those of the picture in the making, with
1 instead of 0 as the first coordinate of their place; of the answer only the tokens of the picture in the making count.
"""

from __future__ import annotations

import math

from library.types import ReferenceSpec, Size

# Sizes of about a megapixel that the model was trained with, (width, height)
PUBLISHED_SIZES: tuple[Size, ...] = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
MEGAPIXEL = 1024 * 1024
STEP = 16  # pixels of a token along each side
STAGES = 8  # of the sizes below a megapixel


def kontext_size(own: Size, target: Size) -> Size:
    """The size of a reference of size `own`: the published one that is nearest in shape.

    For training pictures of much less than a megapixel it is smaller in proportion, in eighths of its sides.
    """
    width, height = min(PUBLISHED_SIZES, key=lambda size: (abs(own[0] / own[1] - size[0] / size[1]), size))
    side = math.sqrt(target[0] * target[1] / MEGAPIXEL)
    share = min(max(round(side * STAGES), 1), STAGES) / STAGES
    return _whole(width * share), _whole(height * share)


def _whole(side: float) -> int:
    return max(STEP, round(side / STEP) * STEP)


KONTEXT = ReferenceSpec(most=1, size=kontext_size)
