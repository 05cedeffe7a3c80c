# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
https://arxiv.org/abs/2307.01952. A U-Net in the latent space of a KL autoencoder. It attends to the states of CLIP-L
and CLIP-G side by side, and is told the pooled state of CLIP-G, the size of the picture's file, where it was cropped,
and the size that it was given.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError, raise_problems
from library.families.sd.names import UNET_PREFIX, unet_rules
from library.families.sd.save import NOTHING
from library.families.sd.unet_family import Pipelines, UnetFamily
from library.families.sdxl import SHEET
from library.families.sdxl.names import BLOCK_COUNT, CLIP_G_PREFIX, CLIP_L_PREFIX, sdxl_block
from library.families.sdxl.options import SDXLFineTuneOptions
from library.families.sdxl.parts import ADDED_NUMBERS, CLIP_G, CLIP_L, ENCODERS, SDXLParts, marks, open_parts
from library.families.sheet import Variant
from library.key_tables import Published
from library.log import get_logger
from library.objectives.ddpm import DDPMObjective
from library.objectives.options import DDPMOptions, LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights import kl_vae
from library.weights.clip_names import clip_g_rules, clip_rules
from library.weights.text import CHUNK, ClipTokenizer, join_chunks, read_tokenizer
from library.weights.tokenizers import CLIP_G_PADDING, clip_tokenizer, tokenizer_folders
from library.weights.vae_names import VAE_PREFIX, vae_rules

log = get_logger()

POOLED = f"{CLIP_G}_pooled"  # (B, width), beside the states (B, 77, width) under the encoders' own names
# further entries of a folder's model_index.json
EMPTY_PROMPT = {"force_zeros_for_empty_prompt": True}
FURTHER_COMPONENTS = {"feature_extractor": NOTHING, **EMPTY_PROMPT, "image_encoder": NOTHING}
ADVICE = "give --no_half_vae, or a VAE made for fp16 with --vae"


class StableDiffusionXL(UnetFamily):
    sheet = SHEET
    folders = ENCODERS
    pipeline = Pipelines("StableDiffusionXLPipeline", FURTHER_COMPONENTS)
    edit_pipeline = Pipelines("StableDiffusionXLInstructPix2PixPipeline", EMPTY_PROMPT)
    latent = LatentSpec("sdxl", channels=4, factor=8, npz_suffix="_sdxl.npz")

    @property
    def variant(self) -> Variant:
        return self.sheet.variants["sdxl v" if self.options.v_parameterization else "sdxl"]

    # ---- loading

    @cached_property
    def parts(self) -> SDXLParts:
        """Headers of the files. The first use downloads what is given as a hub id."""
        return open_parts(self.options)

    @cached_property
    def tokenizers(self) -> dict[str, ClipTokenizer]:
        """Tokenizers of both encoders. They differ in the padding only, so that one folder is enough."""
        path = self.parts.path
        first = clip_tokenizer(tokenizer_folders(path, names=("tokenizer",)), cache=self.options.tokenizer_cache_dir)
        own = (path if path.is_dir() else path.parent) / "tokenizer_2"
        return {CLIP_L: first, CLIP_G: read_tokenizer(own if own.is_dir() else first.folder, padding=CLIP_G_PADDING)}

    def check(self) -> None:
        parts, config = self.parts, self.parts.config
        problems = []
        widths = sum(encoder.width for encoder in parts.encoders.values())
        if widths != config["cross_attention_dim"]:
            problems.append(
                f"{parts.path} reads text states {config['cross_attention_dim']} wide, and its text encoders make "
                f"{widths}: its parts belong to different models"
            )
        for name in self.encoders:
            problems += self.surplus_tokens(name, name)
        raise_problems(problems)
        if parts.is_v and not self.options.v_parameterization:
            log.warning(f"{parts.path} says that it predicts v, and this run is without --v_parameterization")
        if parts.path.is_dir() and self.options.v_parameterization and not parts.is_v:  # a single file need not say it
            log.warning(f"{parts.path} says that it predicts the noise, and this run is with --v_parameterization")

    # ---- text

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        length, config = self.max_tokens // CHUNK * CHUNK + 2, self.parts.config
        pooled = config["projection_class_embeddings_input_dim"] - ADDED_NUMBERS * config["addition_time_embed_dim"]
        widths = {name: encoder.width for name, encoder in self.parts.encoders.items()}
        states = {name: torch.zeros(count, length, width, dtype=dtype) for name, width in widths.items()}
        return {**states, POOLED: torch.zeros(count, pooled, dtype=dtype)}

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """The states that go into the last layer; of CLIP-G also the projected pooled state of the first chunk."""
        ids = on_device(tokens.ids[name], next(encoder.parameters()).device)  # B chunks 77
        output = encoder(ids.flatten(0, 1), output_hidden_states=True)
        states = join_chunks(output.hidden_states[-2].unflatten(0, ids.shape[:2]))
        if tokens.weights is not None:
            states = states * join_chunks(tokens.weights[name]).to(states).unsqueeze(-1)
        if name != CLIP_G:
            return {name: states}
        return {name: states, POOLED: output.text_embeds.unflatten(0, ids.shape[:2])[:, 0]}

    # ---- pictures

    def decode_latent(self, vae: nn.Module, latents: Tensor) -> Tensor:
        pixels = kl_vae.decode(vae, latents)
        if overflows(vae, pixels):
            log.warning(f"a preview is not right, the VAE overflows in fp16: {ADVICE}")
        return pixels.nan_to_num()

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents * 0.13025  # of every published VAE of SDXL

    # ---- training

    def objective(self, options: DDPMOptions, loss: LossOptions) -> DDPMObjective:
        if self.parts.is_zero_snr and not options.zero_terminal_snr:
            log.warning(f"{self.parts.path} says that it was trained with zero terminal SNR: give --zero_terminal_snr")
        return super().objective(options, loss)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        context = torch.cat([cond[CLIP_L], cond[CLIP_G]], -1)
        added = {"text_embeds": cond[POOLED], "time_ids": self.time_ids(x_t, batch)}
        shown = self.input_of(x_t, batch)
        return denoiser(shown, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]

    def time_ids(self, x_t: Tensor, batch: Batch | None) -> Tensor:
        """(B, 6) float32: height and width of the picture file, top and left of the crop, height and width given.

        float32 as the U-Net makes sinusoids of them. In previews nothing was resized or cropped.
        """
        if batch is None or batch.original_sizes is None:
            height, width = (side * self.latent.factor for side in x_t.shape[-2:])
            sizes = on_device(torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32), x_t.device)
            return sizes.expand(len(x_t), 6)
        given = (batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        return torch.cat([size for size in given if size is not None], 1).to(x_t.device, torch.float32)

    # ---- full training

    def learning_parts(self, options: SDXLFineTuneOptions) -> dict[str, float | None]:
        if self.grows_input and options.block_lr and not options.block_lr[sdxl_block("input_blocks.0")]:
            raise UserError("--block_lr: with --task edit the first input block must learn, to read reference pictures")
        unet = {"denoiser": max(options.block_lr) if options.block_lr else None}
        if not options.train_text_encoder:
            return unet
        rates = {CLIP_L: options.learning_rate_te1, CLIP_G: options.learning_rate_te2}
        return {**unet, **{name: rate for name, rate in rates.items() if rate != 0}}

    def denoiser_groups(self, denoiser: nn.Module, options: SDXLFineTuneOptions, rate: float) -> list[dict[str, Any]]:
        """One group, or with --block_lr one for each block that learns."""
        if options.block_lr is None:
            return super().denoiser_groups(denoiser, options, rate)
        parameters = dict(denoiser.named_parameters())
        blocks: list[list[nn.Parameter]] = [[] for _ in range(BLOCK_COUNT)]
        for rule in unet_rules(denoiser):
            blocks[sdxl_block(rule.published)].append(parameters[rule.ours[0]])
        return [
            {"params": own, "lr": own_rate, "name": f"unet_block{index}"}
            for index, (own, own_rate) in enumerate(zip(blocks, options.block_lr, strict=True))
            if own and own_rate != 0
        ]

    # ---- files

    def scheduler(self) -> dict[str, Any]:
        return super().scheduler() | ({"rescale_betas_zero_snr": True} if self.parts.is_zero_snr else {})

    @classmethod
    def is_left_out(cls, name: str) -> bool:
        """Averages of untrained weights, and a table of 0, 1, 2 ..."""
        return name.startswith("model_ema.") or name.endswith("embeddings.position_ids")

    def file_tensors(self, denoiser: nn.Module, vae: nn.Module, clips: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        tensors: Any = ChainMap(*published(denoiser, vae, clips), marks(self.parts))
        return tensors


def overflows(vae: nn.Module, result: Tensor) -> bool:
    """Whether a VAE in fp16 gave infinities or NaN. Waits for the device, in fp16 only."""
    return next(vae.parameters()).dtype == torch.float16 and not bool(torch.isfinite(result).all())


def published(denoiser: nn.Module, vae: nn.Module, clips: Mapping[str, nn.Module]) -> list[Any]:
    """The tensors of a single-file checkpoint, part by part, as far as the modules have them."""
    clip_l, clip_g = clips[CLIP_L], clips[CLIP_G]
    return [
        Published(denoiser.state_dict(), unet_rules(denoiser), UNET_PREFIX),
        Published(vae.state_dict(), vae_rules(vae), VAE_PREFIX),
        Published(clip_l.state_dict(), clip_rules(clip_l), CLIP_L_PREFIX),
        Published(clip_g.state_dict(), clip_g_rules(clip_g), CLIP_G_PREFIX),
    ]
