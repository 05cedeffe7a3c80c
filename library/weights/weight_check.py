# SPDX-License-Identifier: Apache-2.0
"""Check that a model's files hold all of its weights in the right shapes, and no tensors that have no place in it.

Reads headers only, before anything is loaded. A tensor that is missing, has another shape or is not floating-point is
named. So is every other tensor below a part's prefix, unless published files have it and no output depends on it
(EXTRAS, `Part.extras`): it most often belongs to an incomplete block. Tensors outside of all parts come from other
programs; they are copied into saved checkpoints and reported once.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from library.errors import UserError, first_names
from library.log import get_logger
from library.weights.loading import Part
from library.weights.text_encoders import CLIP, GEMMA2, LANGUAGE_MARKS, QWEN3, QWEN25_VL, T5

log = get_logger()

# Prefixes of whole parts in a file that holds several
PLACES = (
    "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.",
)  # fmt: skip
# Extra tensors that any part may have below its prefix: constants, scales of 8-bit computation, state of a training run
ANYWHERE = (
    r"(.+\.)?(position_ids|logit_scale|logit_bias|attn_mask|inv_freq|original_inv_freq|num_batches_tracked)",
    r"(.+\.)?(scaled_fp8|scale_input|input_scale|comfy_quant|spiece_model|tekken_model)",
    r"model_ema\..+",
)
TEXT_EXTRAS = (
    r"lm_head\..+",
    r"(text_model\.)?text_projection(\.weight)?",
    r"(vision_model|visual_projection|visual|vision_tower|multi_modal_projector)\..+",
)
EXTRAS: Mapping[str, Sequence[str]] = {
    "VAE": (r"(loss|discriminator)\..+", r"(.+\.)?logvar"),
    "text encoder": TEXT_EXTRAS,
    CLIP: TEXT_EXTRAS,
    T5: (*TEXT_EXTRAS, r"decoder\..+", r"shared\.weight", r"encoder\.embed_tokens\.weight"),
    **dict.fromkeys(LANGUAGE_MARKS, TEXT_EXTRAS),
}
# Tensors outside of the parts of a published checkpoint: the noise schedule, marks, state of a training run
OUTSIDE = (
    *ANYWHERE,
    *TEXT_EXTRAS,
    r"betas|(sqrt_|log_)?((one_minus|recip|recipm1)_)?alphas_cumprod(_prev)?",
    r"logvar|posterior_\w+|lvlb_weights|scale_factor|denoiser\..+|v_pred|ztsnr",
)
# Numbers of layers of the published text encoders, by width: an encoder of that width with fewer has lost some
ENCODER_LAYERS = {
    "text encoder": {768: 12, 1024: 23},
    CLIP: {768: 12, 1280: 32},
    T5: {1472: 12, 4096: 24},
    GEMMA2: {2304: 26},
    QWEN3: {1024: 28, 2560: 36, 4096: 36},
    QWEN25_VL: {3584: 28},
}
LARGEST = 10_000_000  # largest integer in a model's configuration
INCOMPLETE = "the file is incomplete, damaged or of another architecture"
BITSANDBYTES = (".absmax", ".quant_map")


def check_weights(parts: Mapping[str, Part], main: Path) -> None:
    """Raise UserError with every problem. main: the model's file; a line is logged about its further tensors."""
    problems = [problem for part in parts.values() for problem in part_problems(part)]
    if problems:
        raise UserError(dict.fromkeys(problems))
    lines = [line for part in parts.values() for line in _unusual_depth(part)]
    for line in (*lines, *_outside([part for part in parts.values() if part.file.path == main])):
        log.warning(line)


def part_problems(part: Part) -> Iterator[str]:
    """Problems with the weights of one part, one line each."""
    path, shapes = part.file.path, part.file.shapes
    if any(name.startswith(part.prefix) and name.endswith(BITSANDBYTES) for name in shapes):
        yield f"{path}: the {part.what} is quantised with bitsandbytes: give the file in half precision or fp8"
        return
    senseless = [*_senseless(part)]
    if senseless:
        yield from senseless
        return
    try:
        expected = part.expected()
    except Exception as error:  # diffusers and transformers raise errors of any class for impossible sizes
        yield f"{path}: its sizes make no {part.what}: {[*str(error).splitlines(), ''][0]}"
        return
    missing = [name for name in expected if name not in shapes]
    if missing:
        source = part.file.source(missing[0])
        yield f"{source}: {len(missing)} weights of the {part.what} are missing ({first_names(missing)}): {INCOMPLETE}"
    wrong = [name for name, fitting in expected.items() if name in shapes and shapes[name] not in fitting]
    if wrong:
        first = f"{wrong[0]} is {shapes[wrong[0]]}, not {expected[wrong[0]][0]}"
        more = f"; also {first_names(wrong[1:])}" if len(wrong) > 1 else ""
        source = part.file.source(wrong[0])
        yield f"{source}: {len(wrong)} weights of the {part.what} have another shape ({first}{more}): {INCOMPLETE}"
    yield from _number_problems(part, [name for name in expected if name in shapes])
    extra = [*_left_over(part, expected)]
    if extra:
        source = part.file.source(extra[0])
        yield f"{source}: {len(extra)} tensors have no place in the {part.what} ({first_names(extra)}): {INCOMPLETE}"
    yield from _lost_layers(part)


def _left_over(part: Part, weights: Collection[str]) -> Iterator[str]:
    """Names with the part's prefix that are neither its weights nor known extras of published files."""
    known = re.compile("|".join((*ANYWHERE, *EXTRAS.get(part.what, ()), *part.extras)))
    for name in part.file.shapes:
        own = name[len(part.prefix) :]
        if name in weights or not name.startswith(part.prefix) or (not part.prefix and name.startswith(PLACES)):
            continue
        if not known.fullmatch(own) and not (part.spare and own.startswith(part.spare)):
            yield name


def _number_problems(part: Part, names: Sequence[str]) -> Iterator[str]:
    wrong = {name: dtype for name in names if not (dtype := part.file.dtype(name)).is_floating_point}
    if wrong:
        first, dtype = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        kind = str(dtype).removeprefix("torch.")
        yield f"{part.file.source(first)}: {first} is stored as {kind}{more}: weights are floating-point numbers"


def _configs(part: Part) -> list[Mapping[str, Any]]:
    """Configurations of the models in the module. The first one gives its depth."""
    args = part.build.args if isinstance(part.build, partial) else ()
    return [arg for arg in args if isinstance(arg, Mapping)] or [{}]


def _senseless(part: Part) -> Iterator[str]:
    """Numbers of a config.json that are far too large for this file: building such a model would never end."""
    for key, value in (item for config in _configs(part) for item in config.items()):
        most = len(part.file.shapes) if key.endswith("layers") else LARGEST
        if isinstance(value, int) and value > most:
            yield f"{part.file.path}: its {part.what} is said to have {key} = {reprlib.repr(value)}, more than {most}"


def _width(config: Mapping[str, Any]) -> int:
    found = [config.get(key) for key in ("hidden_size", "d_model", "num_attention_heads", "attention_head_dim")]
    hidden, model, heads, head = (value if isinstance(value, int) else 0 for value in found)
    return hidden or model or heads * head


def _lost_layers(part: Part) -> Iterator[str]:
    config = _configs(part)[0]
    usual = ENCODER_LAYERS.get(part.what, {}).get(_width(config), 0)
    found = config.get("num_hidden_layers", config.get("num_layers"))
    if isinstance(found, int) and found < usual:
        yield f"{part.file.path}: the {part.what} has {found} layers, the published one of its width has {usual}"


def _unusual_depth(part: Part) -> Iterator[str]:
    config = _configs(part)[0]
    usual = part.published_depths.get(_width(config), {})
    other = [f"{key} {config.get(key)}, not {count}" for key, count in usual.items() if config.get(key) != count]
    if other:
        told = " and ".join(other)
        yield f"{part.file.path}: its {part.what} is not as deep as the published one ({told}): was it made so?"


def _outside(parts: Sequence[Part]) -> Iterator[str]:
    """A line about the tensors of a file outside of its parts. parts: those in the file."""
    starts = tuple(part.prefix for part in parts) + PLACES
    known = re.compile("|".join(OUTSIDE))
    names = [n for n in (parts[0].file.shapes if parts else ()) if not n.startswith(starts) and not known.fullmatch(n)]
    if names:
        yield f"{parts[0].file.path}: {len(names)} tensors belong to no part of the model: {first_names(names)}"
