# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 klein base and dev.

Black Forest Labs 2025, https://github.com/black-forest-labs/flux2. A rectified-flow transformer over latents and the
states of three layers of a language model: Qwen3 for klein, Mistral for dev. dev also has embedded guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.formats.adapter_files import by_module
from library.adapters.formats.layer_tensors import inputs_of
from library.device import on_device
from library.errors import UserError
from library.families.family import ModelFamily
from library.families.flux.model import places_of
from library.families.flux2 import SHEET, VARIANTS, Flux2Variant
from library.families.flux2.options import Flux2FlowOptions
from library.families.flux2.parts import ENCODER, LATENT_CHANNELS, Flux2Parts, denoiser_rules, open_parts, variant_of
from library.io.checkpoint import CheckpointForm, save_tensors
from library.key_tables import Published
from library.objectives.base import Sampler
from library.objectives.flow import FlowObjective, LatentSize, constant_shift
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, ReferenceSpec, Size, Tokens
from library.weights import flux2_vae
from library.weights.language_models import language_states
from library.weights.tokenizers import ChatTokenizer, mistral_tokenizer, qwen_tokenizer, tokenizer_folders

REFERENCE_STEP = 10  # between the first coordinates of the pictures' places
TOKEN = 16  # pixels of a token along each side


def reference_size(own: Size, target: Size) -> Size:
    """The size of a reference: its own, or smaller with the area of the training picture, in whole tokens."""
    share = min(1.0, math.sqrt(target[0] * target[1] / (own[0] * own[1])))
    width, height = (max(TOKEN, int(side * share) // TOKEN * TOKEN) for side in own)
    return width, height


REFERENCES = ReferenceSpec(most=10, size=reference_size)


class Flux2(ModelFamily):
    sheet = SHEET
    latent = LatentSpec("flux2", channels=LATENT_CHANNELS, factor=16, npz_suffix="_flux2.npz", npz_sized_keys=True)

    # ---- loading

    @cached_property
    def parts(self) -> Flux2Parts:
        """The parts of the model, from file headers only. The first access downloads what is given as a hub id."""
        return open_parts(self.options)

    @cached_property
    def tokenizers(self) -> dict[str, ChatTokenizer]:
        text = self.parts.text
        places = tokenizer_folders(self.parts.path, self.parts.encoder_path, names=("tokenizer",))
        read = qwen_tokenizer if text.kind == "qwen3" else mistral_tokenizer
        cache = self.options.tokenizer_cache_dir
        return {ENCODER: read(places, cache=cache, before=text.before, after=text.after)}

    @property
    def variant(self) -> Flux2Variant:
        return variant_of(self.parts.config)

    def check(self) -> None:
        parts, encoder, tokenizer = self.parts, self.parts.encoders[ENCODER], self.tokenizers[ENCODER]
        read = parts.config["joint_attention_dim"]
        if len(parts.text.layers) * encoder.width != read:
            raise UserError(
                f"--text_encoder: {parts.encoder_path} gives states {encoder.width} wide, and {parts.path} reads "
                f"{read // len(parts.text.layers)}: FLUX.2 {self.variant.title} needs {self.variant.encoder}"
            )
        if len(tokenizer.tokenizer) > encoder.vocabulary:
            raise UserError(
                f"{tokenizer.folder}: this tokenizer has {len(tokenizer.tokenizer)} tokens, the text encoder "
                f"{parts.encoder_path} only {encoder.vocabulary}; it belongs to another model"
            )
        if self.token_limit < 1:
            length = self.options.text_encoder_max_token_length
            raise UserError(
                f"--text_encoder_max_token_length {length}: the chat around a caption takes {length - self.token_limit}"
            )

    def adapter_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """FLUX.1 and all sizes of FLUX.2 share layer names: the widths of the inputs tell which model a file is for."""
        layers = {name: inputs_of(own) for name, own in by_module(tensors).items()}
        of = lambda width, inner: all(
            found in (0, wanted)
            for name, found in layers.items()
            if (wanted := layer_inputs(name, width, inner)) is not None
        )
        config = self.parts.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if of(width, round(width * config["mlp_ratio"])):
            return None
        sizes = {f"FLUX.2 {variant.title}": (variant.width, 3 * variant.width) for variant in VARIANTS.values()}
        sizes["FLUX.1"] = (3072, 12288)
        other = next((name for name, size in sizes.items() if of(*size)), "a model of another size")
        return f"is for {other}, and this model is FLUX.2 {self.variant.title}"

    @property
    def references(self) -> ReferenceSpec | None:
        return REFERENCES if self.edits else None

    # ---- text

    def tokenize(self, captions: list[str]) -> Tokens:
        tokenizer = self.tokenizers[ENCODER]
        return tokenizer(captions, length=self.options.text_encoder_max_token_length, name=ENCODER)

    @property
    def token_limit(self) -> int:
        return self.tokenizers[ENCODER].limit(self.options.text_encoder_max_token_length)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return self.tokenizers[ENCODER].count(captions)

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        size = self.options.text_encoder_max_token_length, self.parts.config["joint_attention_dim"]
        return {ENCODER: torch.zeros(count, *size, dtype=dtype)}

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """States of the whole length: the model was trained with padding and attends to all of it."""
        device = next(encoder.parameters()).device
        ids = on_device(tokens.ids[ENCODER], device)
        words = tokens.mask(ENCODER, ids.shape[1], device)
        words = words.flip(1) if self.tokenizers[ENCODER].pads_left else words
        return {ENCODER: torch.cat(language_states(encoder, ids, words, self.parts.text.layers), -1)}

    # ---- pictures

    def encode_image(self, vae: nn.Module, pixels: Tensor, seeds: list[int]) -> Tensor:
        return flux2_vae.encode(vae, pixels)

    def encode_reference(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        return flux2_vae.encode(vae, pixels)

    def decode_latent(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return flux2_vae.decode(vae, latents)

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents

    # ---- training

    def objective(self, options: Flux2FlowOptions, loss: LossOptions) -> FlowObjective:
        return Flux2Objective(options, loss, preview_shift=constant_shift(1.0))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """Noise - latents, B 128 h w. Latent pixels are tokens at (0, row, column, 0), text tokens at (0, 0, 0, i).

        Those of reference pictures follow at (10, row, column, 0), (20, ...) and so on.
        """
        text, (height, width) = cond[ENCODER], x_t.shape[-2:]
        pictures = [x_t, *(latents.to(x_t) for latents in batch.references)] if batch is not None else [x_t]
        tokens = [picture.flatten(2).transpose(1, 2) for picture in pictures]
        place = torch.arange(text.shape[1], dtype=torch.float32, device=text.device)
        answer = denoiser(
            hidden_states=tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1),
            encoder_hidden_states=text,
            timestep=t,  # 0..1: the model multiplies by 1000
            img_ids=F.pad(places_of(pictures, side=1, step=REFERENCE_STEP), (0, 1)),
            txt_ids=F.pad(place.unsqueeze(1), (3, 0)),
            guidance=self._guidance(cond, t) if self.parts.config["guidance_embeds"] else None,
            return_dict=False,
        )[0]
        return answer[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def _guidance(self, cond: Cond, t: Tensor) -> Tensor:
        """(B) float32: that of a preview's prompt, else that of --guidance_scale."""
        told = cond.get("guidance")
        return torch.full_like(t, self.options.guidance_scale, dtype=torch.float32) if told is None else told

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        groups = ("transformer_blocks", "single_transformer_blocks")
        return [block for group in groups for block in denoiser.get_submodule(group).children()]

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        tensors = Published(denoiser.state_dict(), denoiser_rules(denoiser))
        save_tensors(path, tensors, form.metadata, dtype=form.dtype, hashes=False)

    def text_settings(self, name: str) -> tuple[Any, ...]:
        return self.options.text_encoder_max_token_length, self.parts.text.layers


class Flux2Objective(FlowObjective):
    """Flow matching. The shift of previews also depends on their number of steps."""

    def sampler(self, name: str, steps: int, *, size: LatentSize, shift: float | None = None) -> Sampler:
        return super().sampler(name, steps, size=size, shift=preview_shift(size, steps) if shift is None else shift)


def preview_shift(size: LatentSize, steps: int) -> float:
    """Black Forest Labs' factor e^mu for latents of this size and this number of steps.

    mu is linear in the steps between its values for 10 and 200 steps, which are linear in the tokens. Above 4300 tokens
    it is the value for 200 steps.
    """
    tokens = size[0] * size[1]
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return math.exp(many if tokens > 4300 else few + (many - few) * (steps - 10) / 190)


def layer_inputs(name: str, width: int, inner: int) -> int | None:
    """Input width of a block's layer, by its name in adapter files; None outside of the blocks.

    width: that of the model's states. inner: that of its feed-forward layers.
    """
    if not name.startswith(("lora_unet_double_blocks_", "lora_unet_single_blocks_")):
        return None
    return inner if name.endswith("_mlp_2") else width + inner if name.endswith("_linear2") else width
