# SPDX-License-Identifier: Apache-2.0
"""Tiny real models in published files for the tests of the LoRA tools, and the same models read from a file again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.families.sd.model import unused_open_clip
from library.families.sd.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, unet_rules
from library.families.sdxl.names import CLIP_G_PREFIX, CLIP_L_PREFIX
from library.io.checkpoint import save_tensors
from library.key_tables import Rule, expand, publish, read
from library.weights.clip_names import clip_g_rules, clip_rules, open_clip_rules
from library.weights.vae_names import VAE_PREFIX, vae_rules
from networks import lora, lora_anima, lora_flux, lora_flux2, lora_hunyuan_image, lora_lumina, lora_sana, lora_sd3
from tests.adapters import lora_samples
from tests.adapters.models import randomize
from tests.tiny import tiny_modules

UNTOUCHED = {"alphas_cumprod": torch.linspace(1, 0, 7), "model_ema.decay": torch.tensor(0.5)}  # unknown to us


@dataclass(frozen=True)
class Part:
    """A module of a model, and its names in the file."""

    module: nn.Module
    rules: tuple[Rule, ...]
    prefix: str


@dataclass(frozen=True)
class Model:
    """A tiny model: its denoiser first, then its text encoders; what else is in the file."""

    parts: tuple[Part, ...]
    network: ModuleType
    run: Callable[[Sequence[nn.Module]], list[Tensor]]  # outputs of all parts
    more: Mapping[str, Tensor]

    @property
    def modules(self) -> list[nn.Module]:
        return [part.module for part in self.parts]

    def tensors(self) -> dict[str, Tensor]:
        """The published file."""
        found = {name: value.clone() for name, value in self.more.items()}
        for part in self.parts:
            found |= publish(part.module.state_dict(), part.rules, part.prefix)
        return found

    def write(self, path: Path, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None) -> Path:
        save_file({name: value.to(dtype or value.dtype) for name, value in self.tensors().items()}, path, metadata)
        return path

    def read(self, path: Path) -> list[nn.Module]:
        """The modules with the weights of a file."""
        tensors, found = load_file(path), []
        for part in self.parts:
            module = copy.deepcopy(part.module)
            shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
            own, wrong = read(tensors.__getitem__, tensors, part.rules, shapes, part.prefix)
            assert not wrong
            module.load_state_dict({name: value.float() for name, value in own.items()})
            found.append(module)
        return found

    def adapter(
        self, path: Path, module: ModuleType | None = None, *, seed: int = 3, dim: int = 4, **args: str
    ) -> Path:
        """A file with random adapters on the default layers, as `module` writes it."""
        torch.manual_seed(seed)
        network = (module or self.network).create_network(
            1.0, dim, 2.0, None, [*self.modules[1:]] or None, self.modules[0], **args
        )
        randomize(network, seed, 0.1)
        network.attach(train_denoiser=True, train_text_encoder=True)
        network.detach()
        metadata = {"ss_network_dim": str(dim), "modelspec.title": path.stem}
        return save_tensors(path, network.state(torch.float32), metadata)

    def applied(self, path: Path, strength: float, module: ModuleType | None = None) -> list[Tensor]:
        """Outputs with the adapters of a file at work."""
        network, _ = (module or self.network).create_network_from_weights(
            strength, path, None, [*self.modules[1:]] or None, self.modules[0], for_inference=True
        )
        network.attach(train_denoiser=True, train_text_encoder=True)
        with torch.no_grad():
            outputs = self.run(self.modules)
        network.detach()
        return outputs

    def outputs(self, modules: Sequence[nn.Module] | None = None) -> list[Tensor]:
        with torch.no_grad():
            return self.run(modules or self.modules)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def tiny_unet(**config: object) -> nn.Module:
    """A Stable Diffusion U-Net with all levels of the real one, 32 channels wide."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return frozen(UNet2DConditionModel(**{"sample_size": 8, "layers_per_block": 2, "cross_attention_dim": 32} | config))


def run_clip(encoder: nn.Module) -> Tensor:
    return encoder(torch.arange(14).reshape(2, 7)).last_hidden_state


def stable_diffusion(version: int) -> Model:
    unet = tiny_unet(
        block_out_channels=(32, 32, 32, 32), attention_head_dim=1 if version == 2 else 4,
        use_linear_projection=version == 2,
    )  # fmt: skip
    _, vae, encoder = (frozen(module) for module in tiny_modules(version=version))
    draw = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 7, 32, generator=draw)
    prefix, rules = (OPEN_CLIP_PREFIX, open_clip_rules) if version == 2 else (CLIP_PREFIX, clip_rules)
    more = {**UNTOUCHED, **publish(vae.state_dict(), vae_rules(vae), VAE_PREFIX)}
    text_part = Part(encoder, rules(encoder), prefix)
    if version == 2:
        more |= unused_open_clip(publish(encoder.state_dict(), text_part.rules, prefix))
    return Model(
        (Part(unet, unet_rules(unet), UNET_PREFIX), text_part), lora,
        lambda modules: [modules[0](latents, torch.tensor([10, 500]), text).sample, run_clip(modules[1])], more,
    )  # fmt: skip


def sdxl() -> Model:
    """All levels and transformer blocks of the real one; text states of both encoders are 32 + 32 wide."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    unet = tiny_unet(
        block_out_channels=(32, 32, 32), attention_head_dim=1, use_linear_projection=True, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    _, vae, clip_l = (frozen(module) for module in tiny_modules())
    config = CLIPTextConfig(**{**clip_l.config.to_dict(), "hidden_act": "gelu"})
    clip_g = frozen(CLIPTextModelWithProjection(config))
    draw = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 7, 64, generator=draw)
    added = {"text_embeds": torch.randn(2, 32, generator=draw), "time_ids": torch.arange(12.0).reshape(2, 6)}

    def run(modules: Sequence[nn.Module]) -> list[Tensor]:
        noise = modules[0](latents, torch.tensor([10, 500]), text, added_cond_kwargs=added).sample
        return [noise, run_clip(modules[1]), run_clip(modules[2])]

    encoders = (
        Part(clip_l, clip_rules(clip_l), CLIP_L_PREFIX),
        Part(clip_g, clip_g_rules(clip_g), CLIP_G_PREFIX),
    )
    more = {**UNTOUCHED, **publish(vae.state_dict(), vae_rules(vae), VAE_PREFIX)}
    return Model((Part(unet, unet_rules(unet), UNET_PREFIX), *encoders), lora, run, more)


def transformer(name: str, network: ModuleType, prefix: str = "") -> Model:
    sample = lora_samples.SAMPLES[name]()
    rules = expand(sample.names, sample.model.state_dict())
    more = dict(UNTOUCHED) if prefix else {}
    return Model((Part(frozen(sample.model), rules, prefix),), network, lambda modules: [sample.run(modules[0])], more)


MODELS: dict[str, Callable[[], Model]] = {
    "sd1": lambda: stable_diffusion(1),
    "sd2": lambda: stable_diffusion(2),
    "sdxl": sdxl,
    "flux": lambda: transformer("flux", lora_flux),
    "chroma": lambda: transformer("chroma", lora_flux),
    "flux2": lambda: transformer("flux2", lora_flux2),
    "sd3": lambda: transformer("sd3", lora_sd3, UNET_PREFIX),
    "lumina": lambda: transformer("lumina", lora_lumina),
    "anima": lambda: transformer("anima", lora_anima, "net."),
    "sana": lambda: transformer("sana", lora_sana),
    "hunyuan_image": lambda: transformer("hunyuan_image", lora_hunyuan_image),
}
