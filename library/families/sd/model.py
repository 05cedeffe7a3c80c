# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", https://arxiv.org/abs/2112.10752.
A U-Net in the latent space of a KL autoencoder, conditioned on the states of one CLIP text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.families.sd import SHEET
from library.families.sd.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, unet_rules
from library.families.sd.options import SDFineTuneOptions, SDOptions
from library.families.sd.parts import ENCODER, open_parts
from library.families.sd.save import NOTHING
from library.families.sd.unet_family import Pipelines, UnetFamily, UnetParts
from library.families.sheet import Variant
from library.key_tables import publish
from library.log import get_logger
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights import kl_vae
from library.weights.clip_names import clip_level, clip_rules, open_clip_rules
from library.weights.loading import PIPELINE_FILES, locate
from library.weights.text import CHUNK, ClipTokenizer, find_tokenizer, join_chunks
from library.weights.vae_names import VAE_PREFIX, vae_rules

log = get_logger()

CONTEXT = "context"  # name of its states in a Cond: (B, 77, width), or 152 and 227 long with more chunks
MASK = "context_mask"  # (B, longest) bool: which of them are not padding, with --no_token_padding
# further entries of a folder's model_index.json
FURTHER_COMPONENTS = {
    "feature_extractor": NOTHING, "image_encoder": NOTHING, "requires_safety_checker": False, "safety_checker": NOTHING
}  # fmt: skip
MODEL_FILES = (*PIPELINE_FILES, "unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors")


class StableDiffusion(UnetFamily):
    sheet = SHEET
    folders: ClassVar[Mapping[str, str]] = {ENCODER: "text_encoder"}
    pipeline = Pipelines("StableDiffusionPipeline", FURTHER_COMPONENTS)
    edit_pipeline = Pipelines("StableDiffusionInstructPix2PixPipeline", FURTHER_COMPONENTS)
    latent = LatentSpec("sd", channels=4, factor=8, npz_suffix="_sd.npz")

    def __init__(self, options: SDOptions) -> None:
        super().__init__(options)
        self.version = 2 if options.v2 else 1
        # SD 2.x reads the layer before the file's last, which is the last of the module: see library.families.sd.parts
        self.layer = options.clip_skip

    @property
    def variant(self) -> Variant:
        return self.sheet.variants[f"sd{self.version}{' v' if self.options.v_parameterization else ''}"]

    # ---- loading

    @cached_property
    def parts(self) -> UnetParts:
        """Headers of the files. The first use downloads what is given as a hub id."""
        path = locate(self.options.pretrained_model_name_or_path, "--pretrained_model_name_or_path", MODEL_FILES)
        vae = locate(self.options.vae, "--vae", kl_vae.VAE_FILES) if self.options.vae else None
        return open_parts(path, version=self.version, vae=vae, edits=self.edits)

    @cached_property
    def tokenizers(self) -> dict[str, ClipTokenizer]:
        cache = self.options.tokenizer_cache_dir
        return {ENCODER: find_tokenizer(self.parts.path, version=self.version, cache=cache)}

    @property
    def table_name(self) -> str:
        return f"sd{self.version}"

    def check(self) -> None:
        depth = self.parts.encoders[ENCODER].layers
        if self.layer is not None and self.layer > depth:
            raise UserError(f"--clip_skip {self.layer}: the text encoder has {depth} layers")
        trained = self.parts.scheduler.get("prediction_type")
        if trained is not None and (trained == "v_prediction") != self.options.v_parameterization:
            state = "without" if trained == "v_prediction" else "with"
            log.warning(f"{self.parts.path} is configured for {trained}, and this run is {state} --v_parameterization")
        if surplus := self.surplus_tokens(ENCODER, "the text encoder"):
            raise UserError(surplus)

    # ---- text

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        chunks = self.max_tokens // CHUNK
        return {CONTEXT: torch.zeros(count, chunks * CHUNK + 2, self.parts.encoders[ENCODER].width, dtype=dtype)}

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        device = next(encoder.parameters()).device
        ids = on_device(tokens.ids[ENCODER], device)  # B chunks 77
        states = self._states(encoder, ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        context = join_chunks(states)
        if tokens.weights is not None:
            weights = join_chunks(tokens.weights[ENCODER]).to(context)
            context = context * weights.unsqueeze(-1)
        if self.options.no_token_padding:
            return {CONTEXT: context, MASK: tokens.mask(ENCODER, max(tokens.lengths[ENCODER]), device)}
        return {CONTEXT: context}

    def split_cond(self, cond: Cond) -> list[Cond]:
        parts = super().split_cond(cond)
        return [{**part, MASK: part[MASK][part[MASK]]} if MASK in part else part for part in parts]

    def _states(self, encoder: nn.Module, ids: Tensor) -> Tensor:
        """(N, 77) -> (N, 77, width): the last states, or those of an earlier layer through the final norm."""
        if self.layer is None:
            return encoder(ids).last_hidden_state
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-self.layer]
        return encoder.get_submodule(f"{clip_level(encoder)}final_layer_norm")(hidden)

    # ---- training

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        context = cond[CONTEXT]
        if MASK in cond and batch is not None:
            # The encoder is causal: its states of captions without padding are the first ones of those with it.
            # Previews keep the padding, as every program has it that will use the model.
            context = context[:, : cond[MASK].shape[1]]
        return denoiser(self.input_of(x_t, batch), t, encoder_hidden_states=context, return_dict=False)[0]

    # ---- full training

    def learning_parts(self, options: SDFineTuneOptions) -> dict[str, float | None]:
        learns = options.train_text_encoder and options.encoders_until not in (-1, 0)
        return {"denoiser": None, **({ENCODER: options.learning_rate_te} if learns else {})}

    # ---- files

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents * 0.18215  # of every published VAE of SD 1.x and 2.x

    def file_tensors(self, denoiser: nn.Module, vae: nn.Module, clips: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        tensors = published_tensors(denoiser, clips[ENCODER], vae, version=self.version)
        if self.version == 2 and self.parts.path.is_dir():
            tensors |= unused_open_clip(tensors)
        return tensors

    def text_settings(self, name: str) -> tuple[Any, ...]:
        padding = (MASK,) if self.options.no_token_padding else ()
        return (self.version, self.layer, *super().text_settings(name), *padding)


def published_tensors(unet: nn.Module, encoder: nn.Module, vae: nn.Module, *, version: int) -> dict[str, Tensor]:
    """The tensors of a single-file checkpoint, as far as the modules have them."""
    prefix, rules = (OPEN_CLIP_PREFIX, open_clip_rules) if version == 2 else (CLIP_PREFIX, clip_rules)
    return {
        **publish(unet.state_dict(), unet_rules(unet), UNET_PREFIX),
        **publish(vae.state_dict(), vae_rules(vae), VAE_PREFIX),
        **publish(encoder.state_dict(), rules(encoder), prefix),
    }


def unused_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's last block (a copy of the one before), text_projection and logit_scale: no picture depends on them."""
    blocks = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
    last = max(int(name[len(blocks) :].split(".")[0]) for name in tensors if name.startswith(blocks))
    start = f"{blocks}{last}."
    rest = {f"{blocks}{last + 1}.{n[len(start) :]}": t.clone() for n, t in tensors.items() if n.startswith(start)}
    norm = tensors[f"{OPEN_CLIP_PREFIX}ln_final.weight"]
    rest[f"{OPEN_CLIP_PREFIX}text_projection"] = torch.ones(len(norm), len(norm), dtype=norm.dtype)
    rest[f"{OPEN_CLIP_PREFIX}logit_scale"] = torch.ones((), dtype=norm.dtype)
    return rest
