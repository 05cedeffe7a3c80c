# SPDX-License-Identifier: Apache-2.0
"""Chroma.

https://huggingface.co/lodestones/Chroma. FLUX.1 schnell without CLIP and without modulation layers in its blocks: one
small network makes all modulations. It always hides the padding of captions, all but one token of it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from library.families.chroma import SHEET, VARIANT
from library.families.chroma.parts import CHROMA
from library.families.flux import FluxVariant
from library.families.flux.model import Flux
from library.families.flux.options import FluxOptions
from library.families.flux.parts import T5, Design
from library.types import Cond
from library.weights.tokenizers import TextTokenizer, t5_tokenizer


class Chroma(Flux):
    sheet = SHEET
    design: ClassVar[Design] = CHROMA
    variant: FluxVariant = VARIANT
    extra_tokens: ClassVar[int] = 1  # it was trained to see one token of the padding

    def __init__(self, options: FluxOptions) -> None:
        super().__init__(options)
        self.masks_text = True

    @cached_property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        places = self.tokenizer_places(T5, "tokenizer")
        return {T5: t5_tokenizer(places, cache=self.options.tokenizer_cache_dir)}

    def further_inputs(self, cond: Cond, t: Tensor, mask: Tensor | None) -> dict[str, Any]:
        return {"attention_mask": mask}

    def modulations(self, denoiser: nn.Module) -> tuple[nn.Module, list[nn.Linear]] | None:
        return None  # its blocks are given their modulations
