# SPDX-License-Identifier: Apache-2.0
"""Tiny and full-size models of the transformers, for the tests of adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.families.anima.modules import build_denoiser
from networks import lora_anima, lora_flux, lora_flux2, lora_hunyuan_image, lora_lumina, lora_sd3

FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
SD3 = {
    "sample_size": 16, "patch_size": 2, "in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 24, "pos_embed_max_size": 16,
}  # fmt: skip
FLUX2 = {
    "in_channels": 128, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": True,
}  # fmt: skip
LUMINA = {
    "sample_size": 16, "in_channels": 16, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 2,
    "num_attention_heads": 6, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 2, 2),
    "axes_lens": (300, 64, 64), "cap_feat_dim": 32,
}  # fmt: skip
HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": 32,
    "text_embed_2_dim": 24, "rope_axes_dim": (8, 8),
}  # fmt: skip


ANIMA = {
    "transformer": {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "mlp_ratio": 2.0, "text_embed_dim": 24, "adaln_lora_dim": 8, "rope_scale": (1, 4, 4),
        "extra_pos_embed_type": None,
    },
    "conditioner": {
        "source_dim": 32, "target_dim": 24, "model_dim": 24, "num_layers": 2, "num_attention_heads": 2,
        "mlp_ratio": 2.0, "target_vocab_size": 40, "min_sequence_length": 12,
    },
}  # fmt: skip


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def flux_ids() -> Tensor:
    ids = torch.zeros(4, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(4)[None]
    return ids.reshape(-1, 3)


def flux_inputs() -> dict[str, Any]:
    texts = {"encoder_hidden_states": randn(2, 7, 32), "txt_ids": torch.zeros(7, 3), "img_ids": flux_ids()}
    return {"hidden_states": randn(2, 16, 64), "timestep": torch.tensor([0.01, 0.7]), **texts}


def flux2_inputs() -> dict[str, Any]:
    ids = {"txt_ids": torch.arange(7.0).unsqueeze(1) * torch.tensor([0.0, 0, 0, 1])}
    ids["img_ids"] = torch.nn.functional.pad(flux_ids(), (0, 1))
    more = {"encoder_hidden_states": randn(2, 7, 32), "timestep": torch.tensor([0.01, 0.7]), "guidance": torch.ones(2)}
    return {"hidden_states": randn(2, 16, 128), **ids, **more}


def sd3_inputs() -> dict[str, Any]:
    texts = {"encoder_hidden_states": randn(2, 9, 32), "pooled_projections": randn(2, 24)}
    return {"hidden_states": randn(2, 16, 16, 16), "timestep": torch.tensor([10.0, 700.0]), **texts}


def lumina_inputs() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    texts = {"encoder_hidden_states": randn(2, 7, 32), "encoder_attention_mask": mask}
    return {"hidden_states": randn(2, 16, 8, 8), "timestep": torch.tensor([0.99, 0.3]), **texts}


def anima_inputs() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    texts = {"states": randn(2, 7, 32), "ids": torch.arange(14).reshape(2, 7), "states_mask": mask, "ids_mask": mask}
    return {"x": randn(2, 16, 8, 8), "timestep": torch.tensor([0.01, 0.7]), **texts}


def build(cls: str, config: dict[str, Any]) -> nn.Module:
    """A denoiser: a class of diffusers, or Anima's two."""
    import diffusers

    if cls == "AnimaDenoiser":
        return build_denoiser(**config)
    model: nn.Module = getattr(diffusers, cls)(**config)
    return model


def hunyuan_inputs() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    texts = {"text": randn(2, 7, 32), "mask": mask, "glyphs": randn(2, 5, 24)}
    return {"latents": randn(2, 64, 2, 3), "timestep": torch.tensor([10.0, 700.0]), **texts}


@dataclass(frozen=True)
class Tiny:
    """A tiny denoiser: its class and arguments, its inputs, its network module and arguments that adapt everything."""

    cls: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    module: ModuleType
    everything: dict[str, str]

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Random weights, frozen, in training mode (nothing in these models drops)."""
        torch.manual_seed(0)
        model = build(self.cls, self.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter) * 0.08
                parameter.copy_(1 + noise if "norm" in name and parameter.dim() == 1 else noise)
        return model.to(dtype).requires_grad_(False).train()

    def run(self, model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        inputs = {
            k: v.to(dtype) if v.is_floating_point() and k not in ("timestep", "img_ids", "txt_ids") else v
            for k, v in self.inputs().items()
        }
        if self.cls == "AnimaDenoiser":
            output: Tensor = model(**inputs)
            return output
        return model(**inputs, return_dict=False)[0]


class TinyHunyuan(Tiny):
    """With our pass, in which the layers that are one in the published model read one tensor."""

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        from library.families.hunyuan_image.forward import use_device_masks

        model = super().make(dtype)
        use_device_masks(model)
        return model

    def run(self, model: nn.Module) -> Tensor:
        inputs = self.inputs()
        dtype = next(model.parameters()).dtype
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output: Tensor = model(**inputs)
        return output.to(dtype)


TINY: dict[str, Tiny] = {
    "flux": Tiny(
        "FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 24, "guidance_embeds": True},
        lambda: {**flux_inputs(), "pooled_projections": randn(2, 24), "guidance": torch.ones(2)},
        lora_flux, {"in_dims": "2,2,2,2,2"},
    ),
    "chroma": Tiny(
        "ChromaTransformer2DModel",
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 2},
        flux_inputs, lora_flux, {"in_dims": "[2,0,0,0,2]"},
    ),
    "flux2": Tiny("Flux2Transformer2DModel", FLUX2, flux2_inputs, lora_flux2, {"in_dims": "2,2,2"}),
    "sd3": Tiny("SD3Transformer2DModel", {**SD3, "num_layers": 2}, sd3_inputs, lora_sd3, {"emb_dims": "2,2,2,2,2,2"}),
    "sd35": Tiny(
        "SD3Transformer2DModel", {**SD3, "num_layers": 3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        sd3_inputs, lora_sd3, {"emb_dims": "2,2,2,2,2,2"},
    ),
    "lumina": Tiny("Lumina2Transformer2DModel", LUMINA, lumina_inputs, lora_lumina, {"embedder_dims": "2,2,2"}),
    "anima": Tiny(
        "AnimaDenoiser", ANIMA, anima_inputs, lora_anima, {"include_patterns": ".*", "train_llm_adapter": "True"}
    ),
    "hunyuan_image": TinyHunyuan(
        "HunyuanImageTransformer2DModel", HUNYUAN, hunyuan_inputs, lora_hunyuan_image, {}
    ),
}  # fmt: skip


# ---- full size, without weights ------------------------------------------------------------------------------------

FULL: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "flux_dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, ("clip_l", "t5xxl")),
    "flux_schnell": ("FluxTransformer2DModel", {"guidance_embeds": False}, ("clip_l", "t5xxl")),
    "chroma": ("ChromaTransformer2DModel", {}, ("t5xxl",)),
    "sd3_medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        ("clip_l", "clip_g", "t5xxl"),
    ),
    "sd35_medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
         "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        ("clip_l", "clip_g", "t5xxl"),
    ),
    "sd35_large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
         "qk_norm": "rms_norm"},
        ("clip_l", "clip_g", "t5xxl"),
    ),
    "flux2_klein_4b": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
         "guidance_embeds": False}, (),
    ),
    "flux2_klein_9b": (
        "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
         "guidance_embeds": False}, (),
    ),
    "flux2_dev": ("Flux2Transformer2DModel", {}, ()),
    "lumina2": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, ("gemma2",)),
    "anima": (
        "AnimaDenoiser",
        {
            "transformer": {"in_channels": 16, "num_attention_heads": 16, "extra_pos_embed_type": None},
            "conditioner": {},
        },
        ("qwen3",),
    ),
    "hunyuan_image_2_1": ("HunyuanImageTransformer2DModel", {"text_embed_2_dim": 1472}, ()),
}  # fmt: skip


@lru_cache
def full_encoder(name: str, projection: bool = False) -> nn.Module:
    """A text encoder at full size on the meta device."""
    import transformers as t

    with torch.device("meta"):
        if name == "t5xxl":
            return t.T5EncoderModel(
                t.T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24,
                           feed_forward_proj="gated-gelu")
            )  # fmt: skip
        if name == "gemma2":
            return t.Gemma2Model(t.Gemma2Config(
                hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
                num_key_value_heads=4, head_dim=256,
            ))  # fmt: skip
        if name == "qwen3":
            return t.Qwen3Model(t.Qwen3Config(
                hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                num_key_value_heads=8, head_dim=128,
            ))  # fmt: skip
        width, layers, heads = (768, 12, 12) if name == "clip_l" else (1280, 32, 20)
        config = t.CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            hidden_act="quick_gelu" if name == "clip_l" else "gelu",
        )  # fmt: skip
        return (t.CLIPTextModelWithProjection if projection else t.CLIPTextModel)(config)


@lru_cache
def full_models(variant: str) -> tuple[list[nn.Module], nn.Module]:
    """Text encoders in the order of a run, and the denoiser, at full size on the meta device."""
    cls, config, encoders = FULL[variant]
    with torch.device("meta"):
        denoiser = build(cls, config)
    return [full_encoder(name, projection=cls.startswith("SD3")) for name in encoders], denoiser
