# SPDX-License-Identifier: Apache-2.0
"""What the real loaders of diffusers make of an adapter file, layer by layer, beside the live network."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.adapters.readers.comparison import NetworkComparison
from library.adapters.readers.reading import NamedModel
from tests.adapters.known_formats import TABLES


def load(name: str, tensors: Mapping[str, Tensor], denoiser: nn.Module, encoders: Sequence[nn.Module]) -> None:
    """Through the loader of the family's pipeline, into these models."""
    import diffusers
    from diffusers.loaders import lora_pipeline

    given: Any = {key: value.clone() for key, value in tensors.items()}  # some are scaled in place
    if name in ("sd1", "sd2", "sdxl"):
        parts = dict(zip(("text_encoder", "text_encoder_2"), encoders)) | {"unet": denoiser}
        kind = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
        more = {} if name == "sdxl" else {"requires_safety_checker": False, "safety_checker": None}
        lacks = ("vae", "tokenizer", "tokenizer_2", "scheduler", "feature_extractor", "text_encoder", "text_encoder_2")
        known = inspect.signature(kind.__init__).parameters
        kind(**{place: None for place in lacks if place in known} | more | parts).load_lora_weights(given)
        return
    if name == "hunyuan_image":  # its pipeline has no loader
        denoiser.load_lora_adapter(given, prefix="transformer")  # type: ignore[operator]
        return
    families = {
        "flux": "Flux", "flux2": "Flux2", "chroma": "Flux", "sd3": "SD3", "lumina": "Lumina2", "anima": "Anima",
        "sana": "Sana",
    }  # fmt: skip
    kind = getattr(lora_pipeline, f"{families[name]}LoraLoaderMixin")
    loader: Any = type("Loader", (kind,), {"lora_scale": 1.0, "hf_device_map": None, "components": {}})()
    loader.transformer, loader.text_conditioner = _two(denoiser)
    loader.text_encoder, loader.text_encoder_2, loader.text_encoder_3 = [*encoders, None, None, None][:3]
    loader.load_lora_weights(given)


def _two(denoiser: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """A denoiser, and the second model that Anima's has."""
    children = dict(denoiser.named_children())
    return children.get("transformer", denoiser), children.get("text_conditioner")


class Outcome:
    """refused, or which layers of the live network stay as they were, and which are changed otherwise."""

    def __init__(
        self,
        check: NetworkComparison,
        tensors: Mapping[str, Tensor],
        denoiser: nn.Module,
        encoders: Sequence[nn.Module],
    ):
        self.refused, self.missing, self.wrong = False, [], []
        self.error: Exception | None = None
        denoiser, encoders = copy.deepcopy(denoiser), [copy.deepcopy(encoder) for encoder in encoders]
        try:
            load(check.model, tensors, denoiser, encoders)
        except Exception as error:
            self.refused, self.error = True, error
            return
        index = NamedModel.of(check.model, [*tensors, *check.layers], TABLES).index
        models = {"unet": denoiser}
        models["transformer"], models["text_conditioner"] = _two(denoiser)
        models |= dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), encoders))
        for name, layer in check.layers.items():
            place = index.find(name)
            assert place is not None and layer.probe is not None
            expected = check._change(layer)
            modules = [_module(models, path) for path in place.layer.parts]
            effects = [_effect(module, layer.probe) for module in modules if module is not None]
            if len(effects) < len(modules) or not any(bool(effect.any()) for effect in effects):
                self.missing.append(name)
                continue
            found = torch.cat(effects)
            if place.layer.swaps(layer.shape[0], layer.shape[-1]):
                found = torch.cat(found.chunk(2)[::-1])
            if float((found - expected).norm()) > 1e-4 * float(expected.norm()):
                self.wrong.append(name)


def _module(models: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    part, _, own = path.partition(".")
    modules = dict(models[part].named_modules()) if models.get(part) is not None else {}
    return modules.get(own, modules.get(own.removeprefix("text_model.")))


def _effect(module: Any, probe: Any) -> Tensor:
    module, base = module.double(), getattr(module, "base_layer", module).double()
    with torch.no_grad():
        return probe.pick(module(probe.x) - base(probe.x))
