# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL for the contract tests."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from library.types import Batch
from tests.families.base import Case
from tests.families.sd import wider
from tests.tiny import vocabulary, write_tokenizer
from tests.trainers.helpers import Adapters, with_lora

WIDTHS = {"clip_l": 32, "clip_g": 48}
POOLED = 40  # width of CLIP-G's projected state: another one than that of its other states
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"
CLASSES = {
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


# ---- tiny models ----------------------------------------------------------------------------------------------------


def make(folder: Path, *, layout: str = "diffusers", v_prediction: bool = False, seed: int = 0) -> dict[str, Any]:
    """A tiny model below `folder`, and the options that name it.

    layout "diffusers": a pipeline in `folder/pipeline`. "single": that and `folder/model.safetensors` in published
    names, with the tokenizer in `folder/tokenizer`.
    """
    modules = tiny_modules(seed=seed)
    write_pipeline(folder / "pipeline", modules, v_prediction=v_prediction)
    if layout == "diffusers":
        return {"pretrained_model_name_or_path": folder / "pipeline"}
    from safetensors.torch import save_file

    write_tokenizer(folder / "tokenizer")
    save_file(single_file(modules), folder / "model.safetensors")
    return {"pretrained_model_name_or_path": folder / "model.safetensors"}


def tiny_modules(*, seed: int = 0) -> dict[str, Any]:
    """U-Net with the blocks of the real one, VAE and both text encoders, random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64, 64),  # narrower, groups of one channel make gradients rough
                layers_per_block=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(1, 1, 1),
                cross_attention_dim=sum(WIDTHS.values()),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + POOLED,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(32, 32, 32, 32),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                scaling_factor=0.13025,
            ),
            **{name: tiny_clip(name) for name in WIDTHS},
        }
        for module in modules.values():
            for name, parameter in module.named_parameters():
                if name.endswith("bias") or "norm" in name:  # nothing is at a value at which a mistake would not show
                    nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
    return {name: module.eval() for name, module in modules.items()}


def tiny_clip(name: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words, width = len(vocabulary()[0]), WIDTHS[name]
    is_g = name == "clip_g"
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=1,
        hidden_act="gelu" if is_g else "quick_gelu",
        projection_dim=POOLED if is_g else width,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=0 if is_g else words - 1,
    )
    return CLIPTextModelWithProjection(config) if is_g else CLIPTextModel(config)


def write_pipeline(folder: Path, modules: dict[str, Any], *, v_prediction: bool = False) -> None:
    """As StableDiffusionXLPipeline.save_pretrained lays it out."""
    from diffusers import DDPMScheduler

    folders = {"unet": "unet", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    for name, part in folders.items():
        modules[name].save_pretrained(folder / part)
    prediction = "v_prediction" if v_prediction else "epsilon"
    scheduler: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    scheduler.save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", padding="!")
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False, **CLASSES}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def single_file(modules: dict[str, Any]) -> dict[str, Tensor]:
    """The whole model in published names."""
    from library.families.sdxl.model import published

    parts = published(modules["unet"], modules["vae"], modules)
    return {name: value for part in parts for name, value in part.items()} | {LOGIT_SCALE: torch.tensor(4.6)}


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return path if path.is_dir() else path.parent / "pipeline"


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: timesteps, then noise."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = pipeline_of(options)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    outputs = []
    for number, model in enumerate((CLIPTextModel, CLIPTextModelWithProjection), start=1):
        ending = "" if number == 1 else "_2"
        encoder = model.from_pretrained(folder / f"text_encoder{ending}")
        tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{ending}")
        ids = tokenizer(batch.captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        weights = with_lora(encoder, adapters, partial(encoder_layer, number))
        outputs.append(functional_call(encoder, weights, (ids.input_ids,), {"output_hidden_states": True}))
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
    shape = posterior.mean.shape[1:]
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in batch.latent_seeds]
    latents = (posterior.mean + posterior.std * torch.stack(draws)) * 0.13025

    t = torch.randint(0, 1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, t)
    assert batch.original_sizes is not None and batch.crop_top_lefts is not None and batch.target_sizes is not None
    times = torch.tensor([
        [*original.tolist(), *corner.tolist(), *target.tolist()]
        for original, corner, target in zip(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
    ])  # fmt: skip
    added = {"text_embeds": outputs[1].text_embeds, "time_ids": times}
    published = published_layers(unet)
    weights = with_lora(unet, adapters, lambda path: f"lora_unet_{published.get(path, path)}".replace(".", "_"))
    if batch.reference_pixels:  # InstructPix2Pix
        with torch.no_grad():
            noisy = torch.cat([noisy, vae.encode(batch.reference_pixels[0]).latent_dist.mode()], 1)
        weights["conv_in.weight"] = wider(weights["conv_in.weight"]) + adapters["lora_unet_input_blocks_0_0.diff"]
    pred = functional_call(unet, weights, (noisy, t, states), {"added_cond_kwargs": added}).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    return F.mse_loss(pred, scheduler.get_velocity(latents, noise, t) if is_v else noise)


def encoder_layer(number: int, path: str) -> str:
    """The name of one of a text encoder's layers in adapter files."""
    level = "" if path.startswith("text_model.") else "text_model."
    return f"lora_te{number}_{level}{path}".replace(".", "_")


PLACES = {
    **{f"down_blocks.{i}.{kind}.{j}": f"input_blocks.{3 * i + j + 1}.{int(kind == 'attentions')}"
       for i in range(3) for j in range(2) for kind in ("resnets", "attentions")},
    **{f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{3 * i + 3}.0.op" for i in range(2)},
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    **{f"up_blocks.{i}.{kind}.{j}": f"output_blocks.{3 * i + j}.{int(kind == 'attentions')}"
       for i in range(3) for j in range(3) for kind in ("resnets", "attentions")},
    **{f"up_blocks.{i}.upsamplers.0.conv": f"output_blocks.{3 * i + 2}.2.conv" for i in range(2)},
}  # fmt: skip
RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection", "norm1": "in_layers.0", "norm2": "out_layers.0"}  # fmt: skip


def published_layers(unet: nn.Module) -> dict[str, str]:
    """Path in diffusers -> published path of the layers in blocks, written down for the real model's blocks."""
    found = {}
    for path, _ in unet.named_modules():
        start = next((start for start in PLACES if path == start or path.startswith(f"{start}.")), None)
        if start is not None:
            rest = path[len(start) + 1 :]
            found[path] = ".".join(part for part in (PLACES[start], RESNET.get(rest, rest)) if part)
    return found


CONV = {"network_args": ["conv_dim=16", "conv_alpha=16"], "unet_lr": 5e-3}
CASES: dict[str, Case] = {
    "sdxl": Case("sdxl", make, loss, overfit=CONV),
    "sdxl v": Case(
        "sdxl",
        lambda folder: make(folder, layout="single", v_prediction=True),
        loss,
        {"v_parameterization": True},
        overfit=CONV,
    ),
}
