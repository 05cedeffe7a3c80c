# SPDX-License-Identifier: Apache-2.0
"""The example: where its parts lie, what captions become, what is predicted and what is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.families.detect import foreign_file
from library.families.family import ModelFamily, ModelParts
from library.io.checkpoint import CheckpointForm, save_tensors
from library.key_tables import Published, Rule, expand
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights import kl_vae
from library.weights.loading import Part, locate, part_file
from library.weights.sizes import depth, reading_sizes, shape_of
from library.weights.text import CHUNK, ClipTokenizer
from library.weights.text_encoders import clip_encoder
from library.weights.tokenizers import clip_tokenizer, tokenizer_folders
from tests.families.example_family import SHEET
from tests.families.example_family.names import example_names
from tests.families.example_family.options import ExampleFlowOptions
from tests.families.example_family.transformer import PATCH, ExampleTransformer

CLIP = "clip_l"  # name of the text encoder, and of its states in a Cond: (B, 77, width)
MODEL = "--pretrained_model_name_or_path"


class Example(ModelFamily):
    sheet = SHEET
    latent = LatentSpec("example", channels=4, factor=8, npz_suffix="_example.npz", npz_sized_keys=True)
    variant = SHEET.variants["example"]

    # ---- loading

    @cached_property
    def parts(self) -> ModelParts:
        """Headers of the files."""
        path = locate(self.options.pretrained_model_name_or_path, MODEL, ("*/*.json", "*/*.safetensors"))
        file = part_file(path / "transformer")
        if foreign := foreign_file(file.shapes, self.name):
            raise UserError(f"{path} is {foreign}")
        with reading_sizes(file.path):
            config = sizes(file.shapes)
        denoiser = Part("transformer", file, "", partial(build, config), rules)
        vae = kl_vae.vae_part(path, {}, needed=kl_vae.RequiredVae(4, "the example"))
        clip = clip_encoder(path / "text_encoder", option="--clip_l", projection=False)
        return ModelParts(path=path, denoiser=denoiser, config=config, vae=vae, encoders={CLIP: clip})

    @cached_property
    def tokenizers(self) -> dict[str, ClipTokenizer]:
        folders = tokenizer_folders(self.parts.path, names=("tokenizer",))
        return {CLIP: clip_tokenizer(folders, cache=self.options.tokenizer_cache_dir)}

    def check(self) -> None:
        if len(self.tokenizers[CLIP].tokenizer) > self.parts.encoders[CLIP].vocabulary:
            raise UserError(f"{self.parts.path}: tokenizer and text encoder belong to different models")

    # ---- text

    @property
    def token_limit(self) -> int:
        return CHUNK

    def tokenize(self, captions: list[str]) -> Tokens:
        return self.tokenizers[CLIP](captions, max_tokens=CHUNK, weighted=False, name=CLIP)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return self.tokenizers[CLIP].count(captions, weighted=False)

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        ids = on_device(tokens.ids[CLIP], next(encoder.parameters()).device)
        return {CLIP: encoder(ids[:, 0]).last_hidden_state}

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        return {CLIP: torch.zeros(count, CHUNK + 2, self.parts.encoders[CLIP].width, dtype=dtype)}

    # ---- training

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents

    def objective(self, options: ExampleFlowOptions, loss: LossOptions) -> FlowObjective:
        return FlowObjective(options, loss, preview_shift=constant_shift(1.0))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """Noise - latents, B 4 h w."""
        return denoiser(x_t, t, cond[CLIP].to(x_t.dtype))

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return [*denoiser.get_submodule("blocks").children()]

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        tensors = Published(denoiser.state_dict(), rules(denoiser))
        save_tensors(path, tensors, form.metadata, dtype=form.dtype, hashes=False)

    def text_settings(self, name: str) -> tuple[Any, ...]:
        return ()


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The configuration, from the shapes of a file in published names."""
    width, token = shape_of(shapes, "example_embedder.weight", 2)
    text_width = shape_of(shapes, "text_embedder.weight", 2)[1]
    return {
        "channels": token // PATCH**2, "width": width, "text_width": text_width, "blocks": depth(shapes, "blocks.{}.")
    }  # fmt: skip


def build(config: Mapping[str, int]) -> nn.Module:
    return ExampleTransformer(**config)


def rules(module: Any) -> tuple[Rule, ...]:
    """The published names of the denoiser's tensors."""
    return expand(example_names(len(module.blocks)), module.state_dict())
