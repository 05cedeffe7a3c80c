# SPDX-License-Identifier: Apache-2.0
"""Targets of the architectures whose published layers are not the modules of diffusers: made from their name tables.

A published layer that is several Linear modules of ours is one target: its adapter has one down matrix, and up rows in
the published order. Where the two halves of a layer stand in another order, the target is two pieces of one module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from library.adapters.target_spec import TargetModule, TargetSpec
from library.adapters.targets import CLIP_BLOCKS, DENOISER_PREFIX, ENCODER_PREFIX, encoder_targets
from library.errors import UserError
from library.key_tables import SWAP_HALVES, ModuleName

KINDS = (nn.Linear, nn.Conv2d)
T5_BLOCKS = frozenset({"T5LayerSelfAttention", "T5LayerFF"})
GEMMA_BLOCKS = frozenset({"Gemma2Attention", "Gemma2MLP"})


def count(model: nn.Module | None, path: str) -> int:
    """How many modules the list at `path` has; 0 where there is none."""
    found = None if model is None else dict(model.named_modules()).get(path)
    return len(found) if isinstance(found, nn.ModuleList) else 0


def require_class(model: nn.Module | None, classes: Sequence[str], network_module: str) -> None:
    """Raises UserError when the denoiser is another architecture's."""
    if model is not None and type(model).__name__ not in classes:
        raise UserError(
            f"--network_module {network_module} is for {' and '.join(classes)}; this model is a {type(model).__name__}"
        )


def table_targets(names: Iterable[ModuleName], model: nn.Module | None) -> list[TargetSpec]:
    """One target for each published Linear or convolution that the model has, in the order of the table."""
    if model is None:
        return []
    modules = dict(model.named_modules())
    found: list[TargetSpec] = []
    for name in names:
        own = [TargetModule(path, modules[path]) for path in name.ours if isinstance(modules.get(path), KINDS)]
        if own:
            pieces = _halves_swapped(own[0]) if name.op is SWAP_HALVES else tuple(own)
            own_name = f"{DENOISER_PREFIX}_{name.published.replace('.', '_')}"
            found.append(TargetSpec(own_name, pieces, "denoiser", path=name.published))
    return found


def split_targets(targets: Iterable[TargetSpec], wanted: bool) -> list[TargetSpec]:
    """With `wanted`, an adapter of its own for each module of a fused layer."""
    return [replace(t, split=wanted and len({id(m.module) for m in t.modules}) > 1) for t in targets]


def _halves_swapped(module: TargetModule) -> tuple[TargetModule, TargetModule]:
    """The published first half is our second one."""
    half = module.width // 2
    return (
        TargetModule(module.path, module.module, slice(half, 2 * half)),
        TargetModule(module.path, module.module, slice(0, half)),
    )


def text_targets(encoders: Sequence[nn.Module | None], *, t5: bool = True, outside: bool = False) -> list[TargetSpec]:
    """Attention and feed-forward layers of CLIP, T5 and Gemma 2, named by what an encoder is.

    encoders: in the order of the learning rates, None where one gets no adapters. t5: with T5. outside: with CLIP's
    layers outside of its blocks, which is its projection.
    """
    found: list[TargetSpec] = []
    for index, encoder in enumerate(encoders):
        kind = type(encoder).__name__
        if encoder is None or (kind == "T5EncoderModel" and not t5):
            continue
        if kind == "T5EncoderModel":
            found += encoder_targets(encoder, f"{ENCODER_PREFIX}3", T5_BLOCKS, index)
        elif kind == "Gemma2Model":
            found += encoder_targets(encoder, ENCODER_PREFIX, GEMMA_BLOCKS, index)
        else:
            number = 2 if index == 1 or _is_clip_g_alone(encoder, encoders) else 1
            found += encoder_targets(
                encoder, f"{ENCODER_PREFIX}{number}", None if outside else CLIP_BLOCKS, index, clip=True
            )
    return found


def _is_clip_g_alone(encoder: nn.Module, encoders: Sequence[nn.Module | None]) -> bool:
    """Whether a CLIP in the first place is the second one of SD3, because the first one was left out.

    CLIP-L of OpenAI has its own approximation of GELU; the CLIPs of OpenCLIP have the exact one.
    """
    has_second = len(encoders) > 2 or any(type(other).__name__.startswith("CLIP") for other in encoders[1:])
    return not has_second and getattr(encoder.config, "hidden_act", None) == "gelu"
