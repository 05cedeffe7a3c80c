# SPDX-License-Identifier: Apache-2.0
"""What a preview prompt gives to the encoders: its size, its reference pictures and its texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from library.data.encoding import LatentJob, Text, reference_jobs
from library.data.file_hashes import state_of
from library.data.images import load_image
from library.data.records import Sample, SubsetConfig
from library.errors import UserError
from library.sampling.prompts import Prompt
from library.types import ReferenceSpec, Size


def size_of(prompt: Prompt, default: Size, multiple: int) -> Size:
    """(width, height) of a preview in pixels, rounded down to multiples of `multiple`. default: where it names none."""
    wanted = (prompt.width or default[0], prompt.height or default[1])
    width, height = (max(multiple, size - size % multiple) for size in wanted)
    return width, height


def references_of(prompt: Prompt, spec: ReferenceSpec | None, size: Size) -> tuple[LatentJob, ...]:
    """The reference pictures of a prompt, at the sizes that the family gives them. size: of the preview.

    Raises UserError for a picture that cannot be read, and where there are more or fewer than the model takes.
    """
    paths = prompt.references or ()
    if spec is None or (not paths and not spec.roles):
        return ()
    if len(paths) > spec.most:
        raise UserError(f"--sample_prompts: this model takes at most {spec.most} reference pictures: {prompt.prompt}")
    if spec.roles and len(paths) != len(spec.roles):
        wanted = " ".join(f"--ref {role.upper()}" for role in spec.roles)
        raise UserError(f"--sample_prompts: this model needs {wanted}: {prompt.prompt}")
    return reference_jobs([_sample(path) for path in paths], size, spec)


def shown_of(references: tuple[LatentJob, ...], spec: ReferenceSpec | None) -> tuple[LatentJob, ...]:
    """Those of a prompt's references that text encoders look at: all or none."""
    return references if spec is not None and spec.seen_by else ()


def texts_of(prompts: Sequence[Prompt], spec: ReferenceSpec | None, default: Size, multiple: int) -> list[Text]:
    """The texts of all previews, for a cache of text outputs. default, multiple: as in `size_of`."""
    found: list[Text] = []
    for prompt in prompts:
        shown = shown_of(references_of(prompt, spec, size_of(prompt, default, multiple)), spec)
        found += [Text(prompt.negative_prompt, shown), Text(prompt.prompt, shown)]
    return found


def _sample(path: str) -> Sample:
    height, width = load_image(path, alpha=False).rgb.shape[:2]
    state = state_of(path)
    return Sample(path, (width, height), "", SubsetConfig(str(Path(path).parent)), state.mtime_ns, state.size)
