# SPDX-License-Identifier: Apache-2.0
"""Importing diffusers without what it would import only because it is installed.

diffusers imports bitsandbytes and peft, where it finds them, for its own quantisers and LoRA loaders, which a training
does not use. They are 1.2 of 4.7 CPU seconds of all imports, and a line on stderr
(diffusers 0.42, bitsandbytes 0.50, peft 0.21).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Within it these packages look as if they were not installed, unless they are imported already."""
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def import_diffusers() -> None:
    """Import the parts of diffusers that have to do with models, if nobody has yet."""
    if "diffusers" not in sys.modules:
        with hidden("bitsandbytes", "peft"):
            import diffusers.models.autoencoders.autoencoder_kl
            import diffusers.models.unets.unet_2d_condition  # noqa: F401
