# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", https://arxiv.org/abs/2112.10752.
A U-Net in the latent space of a KL autoencoder, conditioned on the states of one CLIP text encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.families.family import ModelFamily
from library.families.sd import SHEET
from library.families.sd.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, unet_rules
from library.families.sd.options import SDFineTuneOptions, SDOptions
from library.families.sd.parts import SDParts, open_parts
from library.families.sd.save import (
    NOTHING,
    Pipeline,
    names_read,
    save_pipeline,
    save_single,
    scheduler_config,
)
from library.families.sd.unet_blocks import unet_blocks
from library.families.sheet import Variant
from library.io.checkpoint import CheckpointForm
from library.key_tables import Rule, publish
from library.log import get_logger
from library.memory.quantise import Storage
from library.objectives.ddpm import DDPMObjective, scaled_linear_betas
from library.objectives.options import DDPMOptions, LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights import kl_vae
from library.weights.clip_names import clip_level, clip_rules, open_clip_rules
from library.weights.loading import PIPELINE_FILES, Part, locate
from library.weights.new_tokens import NewWord, add_word
from library.weights.text import CHUNK, ClipTokenizer, find_tokenizer, join_chunks
from library.weights.vae_names import VAE_PREFIX, vae_rules

log = get_logger()

ENCODER = "clip"  # name of the text encoder in Tokens
CONTEXT = "context"  # name of its states in a Cond: (B, 77, width), or 152 and 227 long with more chunks
MASK = "context_mask"  # (B, longest) bool: which of them are not padding, with --no_token_padding
# further entries of a folder's model_index.json
FURTHER_COMPONENTS = {
    "feature_extractor": NOTHING, "image_encoder": NOTHING, "requires_safety_checker": False, "safety_checker": NOTHING
}  # fmt: skip
MODEL_FILES = (*PIPELINE_FILES, "unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors")


class StableDiffusion(ModelFamily):
    sheet = SHEET
    latent = LatentSpec("sd", channels=4, factor=8, npz_suffix="_sd.npz")

    def __init__(self, options: SDOptions) -> None:
        super().__init__(options)
        self.version = 2 if options.v2 else 1
        self.max_tokens = options.max_token_length or CHUNK
        # SD 2.x reads the layer before the file's last, which is the last of the module: see sd_parts
        self.layer = options.clip_skip

    @property
    def variant(self) -> Variant:
        return self.sheet.variants[f"sd{self.version}{' v' if self.options.v_parameterization else ''}"]

    # ---- loading

    @cached_property
    def parts(self) -> SDParts:
        """Headers of the files. The first use downloads what is given as a hub id."""
        path = locate(self.options.pretrained_model_name_or_path, "--pretrained_model_name_or_path", MODEL_FILES)
        vae = locate(self.options.vae, "--vae", kl_vae.VAE_FILES) if self.options.vae else None
        return open_parts(path, version=self.version, vae=vae)

    @cached_property
    def tokenizer(self) -> ClipTokenizer:
        return find_tokenizer(self.parts.path, version=self.version, cache=self.options.tokenizer_cache_dir)

    @property
    def table_name(self) -> str:
        return f"sd{self.version}"

    def check(self) -> None:
        depth, vocabulary = self.parts.text_layers, self.parts.text_vocabulary
        if self.layer is not None and self.layer > depth:
            raise UserError(f"--clip_skip {self.layer}: the text encoder has {depth} layers")
        trained = self.parts.scheduler.get("prediction_type")
        if trained is not None and (trained == "v_prediction") != self.options.v_parameterization:
            state = "without" if trained == "v_prediction" else "with"
            log.warning(f"{self.parts.path} is configured for {trained}, and this run is {state} --v_parameterization")
        tokens = len(self.tokenizer.tokenizer)
        if tokens > vocabulary:
            raise UserError(
                f"{self.tokenizer.folder}: this tokenizer has {tokens} tokens, the text encoder of {self.parts.path} "
                f"only {vocabulary}; it belongs to another model"
            )

    @property
    def encoders(self) -> tuple[str, ...]:
        return (ENCODER,)

    def load_text_encoder(
        self, name: str, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain"
    ) -> nn.Module:
        return self.parts.text_encoder.load(dtype, device, storage=storage)

    def load_vae(self, dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        return self.parts.vae.load(torch.float32 if self.options.no_half_vae else dtype, device)

    def load_denoiser(
        self, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain"
    ) -> nn.Module:
        return self.parts.unet.load(dtype, device, storage=storage)

    def part(self, name: str) -> Part:
        return {"denoiser": self.parts.unet, "vae": self.parts.vae, ENCODER: self.parts.text_encoder}[name]

    # ---- text

    def tokenize(self, captions: list[str]) -> Tokens:
        return self.tokenizer(
            captions, max_tokens=self.max_tokens, weighted=self.options.weighted_captions, name=ENCODER
        )

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return self.tokenizer.count(captions, weighted=self.options.weighted_captions)

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        chunks = self.max_tokens // CHUNK
        return {CONTEXT: torch.zeros(count, chunks * CHUNK + 2, self.parts.text_width, dtype=dtype)}

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

    def add_word(self, word: str, count: int, like: str | None) -> dict[str, NewWord]:
        self.tokenizer, new = add_word(self.tokenizer, self.parts.text_encoder, word, count, like)
        return {ENCODER: new}

    def _states(self, encoder: nn.Module, ids: Tensor) -> Tensor:
        """(N, 77) -> (N, 77, width): the last states, or those of an earlier layer through the final norm."""
        if self.layer is None:
            return encoder(ids).last_hidden_state
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-self.layer]
        return encoder.get_submodule(f"{clip_level(encoder)}final_layer_norm")(hidden)

    # ---- training

    def objective(self, options: DDPMOptions, loss: LossOptions) -> DDPMObjective:
        prediction = "v_prediction" if self.options.v_parameterization else "epsilon"
        return DDPMObjective(options, loss, prediction_type=prediction, betas=betas(self.parts.scheduler))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        context = cond[CONTEXT]
        if MASK in cond and batch is not None:
            # The encoder is causal: its states of captions without padding are the first ones of those with it.
            # Previews keep the padding, as every program has it that will use the model.
            context = context[:, : cond[MASK].shape[1]]
        return denoiser(x_t, t, encoder_hidden_states=context, return_dict=False)[0]

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return unet_blocks(denoiser)

    # ---- full training

    def learning_parts(self, options: SDFineTuneOptions) -> dict[str, float | None]:
        learns = options.train_text_encoder and options.encoders_until not in (-1, 0)
        return {"denoiser": None, **({ENCODER: options.learning_rate_te} if learns else {})}

    # ---- files

    def save(
        self,
        denoiser: nn.Module,
        encoders: Mapping[str, nn.Module],
        path: Path,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        self.save_as(CheckpointForm(), denoiser, encoders, path, dtype, metadata)

    def save_as(
        self,
        form: CheckpointForm,
        denoiser: nn.Module,
        encoders: Mapping[str, nn.Module],
        path: Path,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        parts = self.parts
        vae = parts.vae.load(None, "cpu")
        encoder = encoders.get(ENCODER) or parts.text_encoder.load(None, "cpu")
        if form.is_folder:
            modules = {"unet": denoiser, "vae": vae, "text_encoder": encoder}
            scheduler = scheduler_config(parts.scheduler, v_prediction=self.options.v_parameterization)
            pipeline = Pipeline(
                "StableDiffusionPipeline", modules, {"tokenizer": self.tokenizer}, scheduler, FURTHER_COMPONENTS
            )
            save_pipeline(path, pipeline, form, dtype=dtype)
            return
        tensors = published_tensors(denoiser, encoder, vae, version=self.version)
        source = None if parts.path.is_dir() else parts.unet.file
        if source is None and self.version == 2:
            tensors |= unused_open_clip(tensors)
        pairs = ((parts.unet, denoiser), (parts.vae, vae), (parts.text_encoder, encoder))
        known = {name for part, module in pairs if part.file is source for name in names_read(part, module)}
        save_single(path, tensors, form, dtype=dtype, metadata=metadata, source=source, known=known)

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents * 0.18215  # of every published VAE of SD 1.x and 2.x

    def vae_fingerprint(self) -> str:
        return self.parts.vae.fingerprint()

    def text_fingerprint(self, name: str) -> str:
        settings: tuple[Any, ...] = (self.version, self.layer, self.max_tokens, self.options.weighted_captions)
        if self.options.no_token_padding:
            settings += (MASK,)
        parts = f"{self.parts.text_encoder.fingerprint()} {self.tokenizer.fingerprint()} {settings}"
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def model_names(self) -> dict[str, str]:
        names = {"sd_model": self.options.pretrained_model_name_or_path, "vae": self.options.vae}
        return {kind: name for kind, name in names.items() if name}


def betas(scheduler: Mapping[str, Any]) -> Tensor:
    """The noise schedule of a model's own configuration, (steps,) float32. Raises UserError for unknown kinds."""
    if scheduler.get("trained_betas"):
        return torch.tensor(scheduler["trained_betas"], dtype=torch.float32)
    steps, kind = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_schedule", "linear")
    start, end = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    if kind == "scaled_linear":
        return scaled_linear_betas(steps, start, end)
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    raise UserError(f"scheduler_config.json: beta_schedule '{kind}' is not known; scaled_linear and linear are")


def published_tensors(unet: nn.Module, encoder: nn.Module, vae: nn.Module, *, version: int) -> dict[str, Tensor]:
    """The tensors of a single-file checkpoint, as far as the modules have them."""
    text = (OPEN_CLIP_PREFIX, open_clip_rules) if version == 2 else (CLIP_PREFIX, clip_rules)
    parts: tuple[tuple[nn.Module, str, Callable[[Any], tuple[Rule, ...]]], ...] = (
        (unet, UNET_PREFIX, unet_rules),
        (vae, VAE_PREFIX, vae_rules),
        (encoder, *text),
    )
    tensors: dict[str, Tensor] = {}
    for module, prefix, rules in parts:
        tensors |= publish(module.state_dict(), rules(module), prefix)
    return tensors


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
