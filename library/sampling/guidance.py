# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance of previews: what the model is asked in one pass, and how its predictions are combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.sampling.prompts import Prompt
from library.types import Batch


@dataclass(frozen=True)
class Guidance:
    """Guidance by the prompt (Ho and Salimans 2022, equation 6), and by the reference picture apart from it.

    With both scales: Brooks et al. 2023 (InstructPix2Pix), equation 3,

        e = e(-, -) + picture * (e(picture, -) - e(-, -)) + text * (e(picture, text) - e(picture, -))

    with the negative prompt for the missing text, and zeros for the missing picture.
    """

    text: float  # scale of the prompt; 1: not guided
    picture: float | None = None  # scale of the reference picture; None: not guided by it, it is always shown

    @property
    def is_idle(self) -> bool:
        """Whether one prediction, with the prompt and its references, is enough."""
        return self.text == 1.0 and self.picture in (None, 1.0)

    def texts(self, prompt: Prompt) -> list[str]:
        """The texts of one pass. The last one is the prompt."""
        if self.is_idle:
            return [prompt.prompt]
        return [prompt.negative_prompt] * (1 if self.picture is None else 2) + [prompt.prompt]

    def batch(self, prompt: Prompt, references: Sequence[Tensor]) -> Batch | None:
        """What `predict` reads of a batch: the reference pictures (latents 1 C h w each). None without any."""
        if not references:
            return None
        texts = self.texts(prompt)
        shown = torch.ones(len(texts), 1, 1, 1, device=references[0].device)
        if self.picture is not None and not self.is_idle:
            shown[0] = 0
        shared = tuple(latents * shown.to(latents) for latents in references)
        return Batch(names=texts, captions=texts, loss_weights=torch.ones(len(texts)), references=shared)

    def combined(self, predictions: Tensor) -> Tensor:
        """The guided prediction, 1 C h w, from those of one pass, in the order of `texts`."""
        *others, complete = predictions.split(1)
        if self.is_idle:
            return complete
        without_text = others[-1]
        guided = without_text + self.text * (complete - without_text)
        return guided if self.picture is None else guided + (self.picture - 1) * (without_text - others[0])
