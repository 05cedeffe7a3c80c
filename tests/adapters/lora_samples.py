# SPDX-License-Identifier: Apache-2.0
"""Random adapters for tiny real denoisers, the weights that they must lead to, and how ComfyUI reads a file.

Everything here is written down literally from the facts: no code of `networks/` is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.families.anima.modules import build_denoiser
from library.families.anima.names import anima_names
from library.families.flux.names import flux_names
from library.families.flux2.names import flux2_names
from library.families.hunyuan_image.names import hunyuan_names
from library.families.lumina.names import lumina_names
from library.families.sana.adapter_names import sana_layers
from library.families.sd.names import unet_rules
from library.families.sd3.names import sd3_names
from library.key_tables import SWAP_HALVES, ModuleName, named

ROOT = Path(__file__).resolve().parent.parent.parent
Norms = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sample:
    """One denoiser with its names; `part` is what peft calls it."""

    model: nn.Module
    names: list[ModuleName]
    run: Callable[[nn.Module], Tensor]
    part: str = "transformer"
    comfy: Callable[[str], str] = lambda published: published  # published path -> that in ComfyUI's model

    def layers(self) -> Iterator[tuple[ModuleName, list[nn.Module]]]:
        """Published layers with their modules, Linear layers and convolutions over all channels only."""
        modules = {path: m for path, m in self.model.named_modules() if getattr(m, "groups", 1) == 1}
        for name in self.names:
            own = [modules.get(path) for path in name.ours]
            if all(isinstance(module, (nn.Linear, nn.Conv2d)) for module in own):
                yield name, [module for module in own if module is not None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def frozen(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().requires_grad_(False).eval()


def flux(double: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16) -> Sample:
    from diffusers import FluxTransformer2DModel

    axes = {16: (4, 6, 6), 128: (16, 56, 56)}[head_dim]
    model = frozen(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=axes,
        )
    )

    def run(transformer: nn.Module) -> Tensor:
        return transformer(
            hidden_states=noise(1, 6, 64), encoder_hidden_states=noise(1, 3, 32, seed=1),
            pooled_projections=noise(1, 24, seed=2), timestep=torch.tensor([0.4]), guidance=torch.tensor([3.5]),
            img_ids=torch.arange(18.0).reshape(6, 3), txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip

    return Sample(model, flux_names(double, single), run)


def flux2(double: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16, guidance: bool = True) -> Sample:
    from diffusers import Flux2Transformer2DModel

    model = frozen(
        lambda: Flux2Transformer2DModel(
            in_channels=128,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            guidance_embeds=guidance,
            axes_dims_rope=(head_dim // 4,) * 4,
        )
    )

    def run(transformer: nn.Module) -> Tensor:
        return transformer(
            hidden_states=noise(1, 6, 128), encoder_hidden_states=noise(1, 3, 48, seed=1),
            timestep=torch.tensor([0.4]), guidance=torch.tensor([3.5]) if guidance else None,
            img_ids=torch.arange(24.0).reshape(6, 4), txt_ids=torch.zeros(3, 4),
        ).sample  # fmt: skip

    return Sample(model, flux2_names(double, single), run)


def chroma() -> Sample:
    from diffusers import ChromaTransformer2DModel

    model = frozen(
        lambda: ChromaTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        )
    )

    def run(transformer: nn.Module) -> Tensor:
        return transformer(
            hidden_states=noise(1, 6, 64), encoder_hidden_states=noise(1, 3, 32, seed=1), timestep=torch.tensor([0.4]),
            img_ids=torch.arange(18.0).reshape(6, 3), txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip

    return Sample(model, flux_names(1, 1, guidance_layers=2), run)


def sd3() -> Sample:
    from diffusers import SD3Transformer2DModel

    model = frozen(
        lambda: SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            pos_embed_max_size=16,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
    )

    def run(transformer: nn.Module) -> Tensor:
        return transformer(
            hidden_states=noise(1, 16, 8, 8), encoder_hidden_states=noise(1, 5, 32, seed=1),
            pooled_projections=noise(1, 24, seed=2), timestep=torch.tensor([400.0]),
        ).sample  # fmt: skip

    return Sample(model, sd3_names(3), run)


def lumina(hidden: int = 48, layers: int = 2, refiners: int = 1, **changes: Any) -> Sample:
    from diffusers import Lumina2Transformer2DModel

    config = {
        "sample_size": 16, "in_channels": 16, "hidden_size": hidden, "num_layers": layers,
        "num_refiner_layers": refiners, "num_attention_heads": 6, "num_kv_heads": 2, "multiple_of": 16,
        "axes_dim_rope": (4, 2, 2), "axes_lens": (300, 64, 64), "cap_feat_dim": 32,
    }  # fmt: skip
    model = frozen(lambda: Lumina2Transformer2DModel(**{**config, **changes}))

    def run(transformer: nn.Module) -> Tensor:
        return transformer(
            hidden_states=noise(1, 16, 8, 8), encoder_hidden_states=noise(1, 5, 32, seed=1),
            timestep=torch.tensor([0.4]), encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
        ).sample  # fmt: skip

    return Sample(model, lumina_names(layers, refiners), run)


def anima() -> Sample:
    transformer = {
        "in_channels": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 32,
        "adaln_lora_dim": 8, "extra_pos_embed_type": None,
    }  # fmt: skip
    conditioner = {
        "source_dim": 24, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_attention_heads": 2,
        "target_vocab_size": 20, "min_sequence_length": 8,
    }  # fmt: skip
    model = frozen(lambda: build_denoiser(transformer, conditioner))

    def run(denoiser: nn.Module) -> Tensor:
        return denoiser(
            noise(1, 16, 8, 8), torch.tensor([0.4]), noise(1, 5, 24, seed=1), torch.arange(6).unsqueeze(0), None, None
        )

    return Sample(model, anima_names(2, 1), run)


def sana() -> Sample:
    from diffusers import SanaTransformer2DModel

    model = frozen(
        lambda: SanaTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
            qk_norm="rms_norm_across_heads",
        )
    )

    def run(transformer: nn.Module) -> Tensor:
        return transformer(
            hidden_states=noise(1, 32, 4, 4), encoder_hidden_states=noise(1, 5, 32, seed=1),
            timestep=torch.tensor([400.0]),
        ).sample  # fmt: skip

    return Sample(model, sana_layers(2), run)


def hunyuan() -> Sample:
    from diffusers import HunyuanImageTransformer2DModel

    model = frozen(
        lambda: HunyuanImageTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
            text_embed_dim=32, text_embed_2_dim=24, rope_axes_dim=(8, 8),
        )
    )  # fmt: skip

    def run(transformer: nn.Module) -> Tensor:
        return transformer(
            hidden_states=noise(1, 64, 2, 3), timestep=torch.tensor([400.0]),
            encoder_hidden_states=noise(1, 5, 32, seed=1), encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool),
            encoder_hidden_states_2=noise(1, 4, 24, seed=2),
            encoder_attention_mask_2=torch.ones(1, 4, dtype=torch.bool),
        ).sample  # fmt: skip

    return Sample(model, hunyuan_names(1, 1, 1), run, comfy=in_comfyui)


def in_comfyui(published: str) -> str:
    """HunyuanImage-2.1 as ComfyUI has it, in the blocks and in the refiner."""
    for theirs, own in (
        ("mod.linear", "mod.lin"),
        ("modulation.linear", "modulation.lin"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
        ("attn_", "attn."),
        ("linear_1", "in_layer"),
        ("linear_2", "out_layer"),
        ("time_in.mlp.0", "time_in.in_layer"),
        ("time_in.mlp.2", "time_in.out_layer"),
        ("t_embedder.mlp.0", "t_embedder.in_layer"),
        ("t_embedder.mlp.2", "t_embedder.out_layer"),
    ):
        published = published.replace(theirs, own)
    return published  # fmt: skip


def sd_unet(version: str) -> dict[str, str]:
    """Path in diffusers -> published path of every layer of the real U-Net (built without weights)."""
    from diffusers import UNet2DConditionModel

    config = json.loads((ROOT / "configs" / "models" / f"{version}.json").read_text())["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    rules = (rule for rule in unet_rules(unet) if rule.published.endswith(".weight"))
    return {rule.ours[0].removesuffix(".weight"): rule.published.removesuffix(".weight") for rule in rules}


SAMPLES: dict[str, Callable[[], Sample]] = {
    "flux": flux,
    "flux2": flux2,
    "chroma": chroma,
    "sd3": sd3,
    "lumina": lumina,
    "anima": anima,
    "sana": sana,
    "hunyuan_image": hunyuan,
}


# ---- adapters -----------------------------------------------------------------------------------------------------


def flat(path: str) -> str:
    return path.replace(".", "_")


def adapter(
    sample: Sample, *, rank: int = 4, alpha: float | None = 2.0, split: bool = False, dora: bool = False,
    dtype: torch.dtype = torch.float32, only: str = "",
) -> dict[str, Tensor]:  # fmt: skip
    """Random tensors with kohya keys for every layer (whose name has `only` in it). split: fused layers in blocks."""
    draw = seeded(7)
    found: dict[str, Tensor] = {}
    for name, modules in sample.layers():
        key = f"lora_unet_{flat(name.published)}"
        if only not in key:
            continue
        weight = fused_weight(name, modules)
        kernel = weight.shape[2:]
        ranks = rank * len(modules) if split else rank
        down = torch.randn(ranks, *weight.shape[1:], generator=draw) * 0.3
        if split:
            up = torch.block_diag(*[torch.randn(len(m.weight), rank, generator=draw) for m in modules])
        else:
            up = torch.randn(len(weight), rank, generator=draw)
        if alpha is not None:
            found[f"{key}.alpha"] = torch.tensor(alpha * (len(modules) if split else 1), dtype=dtype)
        found[f"{key}.lora_down.weight"] = down.to(dtype)
        found[f"{key}.lora_up.weight"] = up.reshape(*up.shape, *[1] * len(kernel)).to(dtype)
        if dora:
            norms = weight.flatten(1).norm(dim=1) * (1 + torch.rand(len(weight), generator=draw))
            found[f"{key}.dora_scale"] = norms.reshape(-1, *[1] * (weight.dim() - 1)).to(dtype)
    return found


def swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def fused_weight(name: ModuleName, modules: list[nn.Module]) -> Tensor:
    """The published weight."""
    whole = torch.cat([module.weight.detach() for module in modules])
    return swapped(whole) if name.op is SWAP_HALVES else whole


def changed(tensors: Mapping[str, Tensor], key: str, weight: Tensor) -> Tensor:
    """The weight with kohya's adapter `key`: W + alpha / rank * up * down; DoRA: m V / |V|, rows of the output."""
    up, down = tensors[f"{key}.lora_up.weight"].float(), tensors[f"{key}.lora_down.weight"].float()
    scale = float(tensors.get(f"{key}.alpha", torch.tensor(float(len(down))))) / len(down)
    v = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if f"{key}.dora_scale" not in tensors:
        return v
    norm = v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.dim() - 1))
    return tensors[f"{key}.dora_scale"].float() / norm * v


def published_weights(sample: Sample) -> dict[str, Tensor]:
    return {name.published: fused_weight(name, modules) for name, modules in sample.layers()}


def expected_weights(sample: Sample, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published path -> weight with the adapter."""
    return {
        path: changed(tensors, key, weight)
        if f"{(key := f'lora_unet_{flat(path)}')}.lora_up.weight" in tensors
        else weight
        for path, weight in published_weights(sample).items()
    }


def merge(sample: Sample, tensors: Mapping[str, Tensor]) -> None:
    """Put the adapter into the sample's model."""
    expected = expected_weights(sample, tensors)
    for name, modules in sample.layers():
        whole = expected[name.published]
        whole = swapped(whole) if name.op is SWAP_HALVES else whole
        for module, part in zip(modules, whole.split([len(m.weight) for m in modules])):
            module.weight.data.copy_(part)


def norms_of(sample: Sample, tensors: Mapping[str, Tensor]) -> Norms:
    """Row norms of W and of V."""
    plain = {key: value for key, value in tensors.items() if not key.endswith("dora_scale")}
    found: Norms = {}
    for path, weight in published_weights(sample).items():
        key = f"lora_unet_{flat(path)}"
        if f"{key}.lora_up.weight" in tensors:
            found[key] = weight.flatten(1).norm(dim=1), changed(plain, key, weight).flatten(1).norm(dim=1)
    return found


# ---- ComfyUI 0.3.64 -----------------------------------------------------------------------------------------------

Target = tuple[str, slice | None, bool]  # weight, its rows, whether its halves are swapped


def comfy_keys(sample: Sample) -> dict[str, Target]:
    """Names that ComfyUI knows for each weight: flat, dotted, and for FLUX and SD3 those of diffusers."""
    keys: dict[str, Target] = {}
    for name, modules in sample.layers():
        whole: Target = (name.published, None, False)
        path = sample.comfy(name.published)
        keys |= {f"lora_unet_{flat(path)}": whole, f"diffusion_model.{path}": whole}
        start = 0
        for path, module in zip(name.ours, modules):
            rows = slice(start, start := start + len(module.weight))
            keys[f"transformer.{path}"] = (name.published, rows, name.op is SWAP_HALVES)
    return keys


def comfy_apply(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], keys: Mapping[str, Target]
) -> tuple[dict[str, Tensor], set[str]]:
    """The weights that ComfyUI arrives at, and the keys of the file that it does not use."""
    result = {path: weight.clone() for path, weight in weights.items()}
    used: set[str] = set()
    for x, (path, rows, swap) in keys.items():
        for up_name, down_name in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
            if f"{x}.{up_name}" not in tensors:
                continue
            up, down = tensors[f"{x}.{up_name}"].float(), tensors[f"{x}.{down_name}"].float()
            alpha, dora = tensors.get(f"{x}.alpha"), tensors.get(f"{x}.dora_scale")
            used |= {k for k in (f"{x}.{up_name}", f"{x}.{down_name}", f"{x}.alpha", f"{x}.dora_scale") if k in tensors}
            target = result[path] if rows is None else result[path][rows]
            change = (up.flatten(1) @ down.flatten(1)).reshape(target.shape)
            change = change if alpha is None else change * (float(alpha) / len(down))
            change = swapped(change) if swap else change
            if dora is None:
                target += change
            else:  # the norm of the weight before the change, where the magnitudes are as long as the output
                assert dora.shape[0] == len(target)
                norm = target.flatten(1).norm(dim=1).reshape(-1, *[1] * (target.dim() - 1))
                target[:] = (target + change) * (dora.float() / norm)
            break
    return result, set(tensors) - used


def named_sd(version: str) -> list[ModuleName]:
    return [named(published, ours) for ours, published in sd_unet(version).items()]
