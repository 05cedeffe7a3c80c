# SPDX-License-Identifier: Apache-2.0
"""What Stable Diffusion 1.x, 2.x and XL have in common: a U-Net, the DDPM objective, CLIP tokenizers, files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.family import ModelFamily, ModelParts
from library.families.sd.editing import REFERENCES, with_reference, without_some
from library.families.sd.save import Pipeline, names_read, save_pipeline, save_single, scheduler_config
from library.families.sd.unet_blocks import unet_blocks
from library.io.checkpoint import CheckpointForm
from library.objectives.ddpm import DDPMObjective, scaled_linear_betas
from library.objectives.options import DDPMOptions, LossOptions
from library.types import Batch, ReferenceSpec, Tokens
from library.weights import kl_vae
from library.weights.grown_input import EDIT_CHANNELS, LATENT_CHANNELS
from library.weights.new_tokens import NewWord, add_word
from library.weights.text import CHUNK, ClipTokenizer

# The change of the first convolution in adapter files of 1.x and 2.x, and of XL
EDIT_CHANGES = ("lora_unet_conv_in.diff", "lora_unet_input_blocks_0_0.diff")


@dataclass(frozen=True, kw_only=True)
class UnetParts(ModelParts):
    """Where each module comes from."""

    scheduler: Mapping[str, Any]  # configuration of the noise schedule


@dataclass(frozen=True)
class Pipelines:
    """How diffusers calls a model in a folder."""

    name: str  # its class: "StableDiffusionPipeline"
    further_components: Mapping[str, Any]  # further entries of model_index.json


class UnetFamily(ModelFamily):
    """A family whose denoiser is the U-Net of Stable Diffusion, and whose text encoders are CLIPs."""

    folders: ClassVar[Mapping[str, str]]  # text encoder -> its folder in a pipeline
    pipeline: ClassVar[Pipelines]
    edit_pipeline: ClassVar[Pipelines]  # of models that edit pictures

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.max_tokens = options.max_token_length or CHUNK

    @property
    @abstractmethod
    def parts(self) -> UnetParts: ...

    @cached_property
    @abstractmethod
    def tokenizers(self) -> dict[str, ClipTokenizer]: ...

    # ---- pictures to edit

    @property
    def references(self) -> ReferenceSpec | None:
        return REFERENCES if self.edits else None

    @property
    def grows_input(self) -> bool:
        try:
            return self.edits and self.parts.config.get("in_channels", LATENT_CHANNELS) == LATENT_CHANNELS
        except UserError:
            return False

    def encode_reference(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        return kl_vae.encode_unscaled(vae, pixels) if self.edits else super().encode_reference(vae, pixels)

    def drop_references(self, batch: Batch, seed: int) -> Batch:
        options = self.options
        rates = {"captioned": options.reference_dropout_rate, "uncaptioned": options.joint_dropout_rate}
        return without_some(batch, seed, **rates)

    def input_of(self, x_t: Tensor, batch: Batch | None) -> Tensor:
        """The U-Net's input: noised latents (B 4 h w), and behind them those of the reference picture (B 8 h w)."""
        return with_reference(x_t, batch) if self.edits else x_t

    # ---- text

    def tokenize(self, captions: list[str]) -> Tokens:
        weighted = self.options.weighted_captions
        found = [
            tokenizer(captions, max_tokens=self.max_tokens, weighted=weighted, name=name)
            for name, tokenizer in self.tokenizers.items()
        ]
        weights = {name: own for tokens in found for name, own in (tokens.weights or {}).items()}
        return Tokens(
            {name: ids for tokens in found for name, ids in tokens.ids.items()},
            {name: lengths for tokens in found for name, lengths in tokens.lengths.items()},
            weights or None,
            found[0].truncated,
        )

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return self.tokenizers[self.encoders[0]].count(captions, weighted=self.options.weighted_captions)

    def text_settings(self, name: str) -> tuple[Any, ...]:
        return self.max_tokens, self.options.weighted_captions

    def add_word(self, word: str, count: int, like: str | None) -> dict[str, NewWord]:
        found = {}
        for name, tokenizer in self.tokenizers.items():
            self.tokenizers[name], found[name] = add_word(tokenizer, self.part(name), word, count, like)
        return found

    def surplus_tokens(self, name: str, whose: str) -> list[str]:
        """A problem when the tokenizer of encoder `name` has more tokens than `whose` vocabulary."""
        tokenizer, vocabulary = self.tokenizers[name], self.parts.encoders[name].vocabulary
        tokens = len(tokenizer.tokenizer)
        if tokens <= vocabulary:
            return []
        return [
            f"{tokenizer.folder}: this tokenizer has {tokens} tokens, {whose} of {self.parts.path} only {vocabulary}; "
            "it belongs to another model"
        ]

    # ---- training

    def objective(self, options: DDPMOptions, loss: LossOptions) -> DDPMObjective:
        prediction = "v_prediction" if self.options.v_parameterization else "epsilon"
        return DDPMObjective(options, loss, prediction_type=prediction, betas=betas(self.parts.scheduler))

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return unet_blocks(denoiser)

    # ---- files

    def adapter_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        shapes = [value.shape for name, value in tensors.items() if name in EDIT_CHANGES]
        if not self.edits and any(len(shape) == 4 and shape[1] == EDIT_CHANNELS for shape in shapes):
            return "is for editing pictures: add --task edit"
        return None

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        """The whole model. Of a single file survives what nobody here reads, such as the marks of v-prediction."""
        vae = self.parts.vae.load(None, "cpu")
        clips = {name: encoders.get(name) or self.load_text_encoder(name, None, "cpu") for name in self.encoders}
        if form.is_folder:
            modules = {"unet": denoiser, "vae": vae, **{self.folders[name]: clip for name, clip in clips.items()}}
            tokenizers = {self.folders[n].replace("text_encoder", "tokenizer"): t for n, t in self.tokenizers.items()}
            kind = self.edit_pipeline if self.edits else self.pipeline
            pipeline = Pipeline(kind.name, modules, tokenizers, self.scheduler(), kind.further_components)
            save_pipeline(path, pipeline, form)
            return
        source = None if self.parts.path.is_dir() else self.parts.denoiser.file
        known = {name for name in source.shapes if self.is_left_out(name)} if source is not None else set()
        for name, module in {"denoiser": denoiser, "vae": vae, **clips}.items():
            if self.part(name).file is source:
                known |= names_read(self.part(name), module)
        save_single(path, self.file_tensors(denoiser, vae, clips), form, source=source, known=known)

    def scheduler(self) -> dict[str, Any]:
        """The noise schedule as a folder has it."""
        return scheduler_config(self.parts.scheduler, v_prediction=self.options.v_parameterization)

    @classmethod
    def is_left_out(cls, name: str) -> bool:
        """Whether a tensor of a source file is not in a trained one."""
        return False

    @abstractmethod
    def file_tensors(self, denoiser: nn.Module, vae: nn.Module, clips: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        """The tensors of a single-file checkpoint, as far as the modules have them."""


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
