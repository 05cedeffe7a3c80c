# SPDX-License-Identifier: Apache-2.0
"""The interface of an architecture, one subclass each. What is known of it without files is in its sheet."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.sheet import ModelFacts, PreviewDefaults, Sheet, Variant
from library.io.checkpoint import CheckpointForm
from library.memory.block_swap import spread
from library.memory.quantise import Storage
from library.objectives.base import Objective
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, ReferenceSpec, Tokens
from library.weights import kl_vae, weight_check
from library.weights.loading import Part
from library.weights.new_tokens import NewWord
from library.weights.quick_import import import_diffusers
from library.weights.text import ClipTokenizer
from library.weights.text_encoders import EncoderPart
from library.weights.tokenizers import TextTokenizer

STAYING_BLOCKS = 2  # that are never swapped, as in sd-scripts


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Where each module of a model comes from."""

    path: Path  # of the model: a file or a folder
    denoiser: Part
    config: Mapping[str, Any]  # of the denoiser, as diffusers has it
    vae: Part
    encoders: Mapping[str, EncoderPart]  # those that were found, in the order of adapter files


class ModelFamily(ABC):
    """Loads, encodes, predicts and names the weights of one architecture. Holds options and headers, no modules."""

    sheet: ClassVar[Sheet]
    latent: ClassVar[LatentSpec]
    references: ClassVar[ReferenceSpec | None] = None  # how reference pictures are taken; None: there are none
    # Outputs of text encoders that are padded, (B, length ...) -> their masks, (B, length) bool, False at padding;
    # batches in which nothing is padded lack the mask
    text_masks: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def name(self) -> str:
        """Its name in the registry."""
        return self.sheet.name

    @property
    @abstractmethod
    def variant(self) -> Variant:
        """Which of the models of the sheet this is. Known after `check`."""

    @property
    def preview(self) -> PreviewDefaults:
        """What prompts of previews mean where they say nothing."""
        return self.variant.preview

    # ---- loading

    @property
    @abstractmethod
    def parts(self) -> ModelParts:
        """Headers of the files. The first use downloads what is given as a hub id."""

    @property
    @abstractmethod
    def tokenizers(self) -> Mapping[str, ClipTokenizer | TextTokenizer]:
        """The tokenizer of each text encoder of this run."""

    @abstractmethod
    def check(self) -> None:
        """Find the files and read their headers. Raises UserError for whatever a header can tell."""

    def check_weights(self) -> None:
        """Check that each part's file has every weight and nothing more. Reads headers, builds empty modules.

        Raises UserError naming the weights. Called after `check`, and before anything is loaded.
        """
        import_diffusers()
        parts = {name: self.part(name) for name in ("denoiser", "vae", *self.encoders)}
        weight_check.check_weights(parts, self.part("denoiser").file.path)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders of this run, in the order of adapter files and learning rates.

        Optional ones that were not given are left out. Known after `check`.
        """
        return tuple(self.sheet.adapter_prefixes)

    def load_text_encoder(
        self, name: str, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain"
    ) -> nn.Module:
        """Frozen, in evaluation mode. dtype None: as the file has it. storage: as in `loading.Part.load`."""
        return self.part(name).load(dtype, device, storage=storage)

    def load_vae(self, dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        """Frozen, in evaluation mode, in `vae_dtype(dtype)`. dtype None: as the file has it."""
        return self.parts.vae.load(self.vae_dtype(dtype), device)

    def vae_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of the VAE where that of the run is `dtype`: float32 with --no_half_vae."""
        return torch.float32 if self.options.no_half_vae else dtype

    def load_denoiser(
        self, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain"
    ) -> nn.Module:
        """Frozen, in evaluation mode. dtype None: as the file has it. storage: as in `loading.Part.load`."""
        return self.parts.denoiser.load(dtype, device, storage=storage)

    def part(self, name: str) -> Part:
        """Where "denoiser", "vae" or a text encoder comes from."""
        own = {"denoiser": self.parts.denoiser, "vae": self.parts.vae}
        return own[name] if name in own else self.parts.encoders[name].part

    def empty_denoiser(self, dtype: torch.dtype | None = None, storage: Storage = "plain") -> nn.Module:
        """The module of `load_denoiser` with its weights on the meta device, without memory for them."""
        return self.part("denoiser").empty(dtype, storage)

    # ---- text

    @abstractmethod
    def tokenize(self, captions: list[str]) -> Tokens:
        """Token ids, and weights where captions are weighted. Truncated captions are named in the result."""

    def tokenize_with(self, captions: list[str], pictures: Sequence[Sequence[Tensor]]) -> Tokens:
        """`tokenize` of captions with the reference pictures that the encoders of `references.seen_by` look at.

        pictures: those of each caption, 3 H W float32 in [-1, 1]; empty where no picture is shown. Where no encoder
        looks at pictures, they change nothing.
        """
        return self.tokenize(captions)

    @property
    @abstractmethod
    def token_limit(self) -> int:
        """Most tokens of a caption; longer ones are cut. Start, end and padding do not count."""

    @abstractmethod
    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption, uncut, counted as `token_limit` counts."""

    @property
    def text_length_varies(self) -> bool:
        """Whether batches come to the denoiser with texts of different lengths."""
        return False

    @abstractmethod
    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """What encoder `name` gives for the whole batch (every tensor B first): the part of a Cond that is its own.

        Gradient flows where the encoder learns. Padding that nothing reads is cut to the longest caption, with a mask.
        """

    def encode_text(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Cond:
        """The parts of these encoders together. A batch may have further parts from the cache."""
        cond: Cond = {}
        for name, encoder in encoders.items():
            cond |= self.encode_part(name, encoder, tokens)
        return cond

    @abstractmethod
    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        """Zeros of the shapes that the text encoders of this run give for `count` captions, none of them padded."""

    def drop_text(self, cond: Cond) -> Cond:
        """In training only: leave out outputs of single encoders at random (torch's global generator)."""
        return cond

    def split_cond(self, cond: Cond) -> list[Cond]:
        """One Cond per caption, without the batch axis and without padding: what the cache holds."""
        count = len(next(iter(cond.values())))
        cond, lengths = dict(cond), {}
        for name, mask in self.text_masks.items():
            if mask not in cond:
                cond[mask] = torch.ones(cond[name].shape[:2], dtype=torch.bool, device=cond[name].device)
            lengths[name] = lengths[mask] = cond[mask].sum(1).tolist()
        return [
            {name: tensor[i, : lengths[name][i]] if name in lengths else tensor[i] for name, tensor in cond.items()}
            for i in range(count)
        ]

    @classmethod
    def join_conds(cls, conds: list[Cond]) -> Cond:
        """The inverse: a batch, tensors of different length padded with zeros at the end."""
        found = {name: nn.utils.rnn.pad_sequence([cond[name] for cond in conds], batch_first=True) for name in conds[0]}
        return cls.without_idle_masks(found, {name: [len(cond[name]) for cond in conds] for name in cls.text_masks})

    @classmethod
    def without_idle_masks(cls, cond: Cond, lengths: Mapping[str, Sequence[int]]) -> Cond:
        """Without the masks of texts that are all of one length: attention without a mask is quicker.

        lengths: of the texts of a batch, for each name in `text_masks`. The device would have to be asked.
        """
        idle = [mask for name, mask in cls.text_masks.items() if len({*lengths[name]}) == 1]
        return {name: tensor for name, tensor in cond.items() if name not in idle}

    # ---- pictures

    def encode_image(self, vae: nn.Module, pixels: Tensor, seeds: list[int]) -> Tensor:
        """Pixels B 3 H W in [-1, 1] -> scaled latents B C h w float32; posterior noise from each sample's own seed."""
        return kl_vae.encode(vae, pixels, seeds)

    def encode_reference(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """Reference pictures B 3 H W in [-1, 1] -> scaled latents B C h w float32. Nothing is drawn."""
        return kl_vae.encode(vae, pixels, None)

    def decode_latent(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Scaled latents B C h w -> pixels B 3 H W float32 in [-1, 1]."""
        return kl_vae.decode(vae, latents)

    @classmethod
    @abstractmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        """Raw VAE latents, as the cache files of sd-scripts hold them, as the model wants them."""

    # ---- training

    @abstractmethod
    def objective(self, options: Any, loss: LossOptions) -> Objective:
        """What is trained. `options`: the option group of the objective that this family has."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """The denoiser's output B C h w for noised latents x_t at t (B).

        `batch` is None in previews, except where the prompt has reference pictures: they are `batch.references`.
        """

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The denoiser's blocks in the order in which they run."""

    def optional(self, denoiser: nn.Module) -> list[nn.Module]:
        """Parts of the denoiser outside its blocks that only some batches need."""
        return []

    def swapped(self, denoiser: nn.Module, count: int, options: Any = None) -> list[int]:
        """Indices into `blocks` of those that --blocks_to_swap `count` keeps in main memory, evenly spread.

        options: the option group "finetune" of full training; a family may have options of its own there. The denoiser
        may be `empty_denoiser`. Raises UserError when it has too few blocks.
        """
        require_blocks("--blocks_to_swap", count, self.most_swapped(denoiser))
        return spread(len(self.blocks(denoiser)), count)

    def most_swapped(self, denoiser: nn.Module) -> int:
        """The largest number that --blocks_to_swap takes."""
        return len(self.blocks(denoiser)) - STAYING_BLOCKS

    def modulations(self, denoiser: nn.Module) -> tuple[nn.Module, list[nn.Linear]] | None:
        """The module that gives the time embedding, and the Linears in blocks, in order, that are given its silu.

        None: the model has none, or they are a small part of the weights.
        """
        return None

    # ---- textual inversion

    def add_word(self, word: str, count: int, like: str | None) -> dict[str, NewWord]:
        """Make `word` in captions stand for `count` new tokens. Returns what they are to each text encoder.

        like: text whose tokens they begin as. Reads headers only, so that it can come before any model is loaded.
        Raises UserError when the vocabulary has the word, or when the model cannot be taught one.
        """
        raise UserError("textual inversion is not available for this model: train a LoRA instead")

    # ---- full training

    def learning_parts(self, options: Any) -> dict[str, float | None]:
        """Which parts learn ("denoiser" or an encoder's name), each with its own learning rate or None.

        options: the option group "finetune" that this family has.
        """
        return {"denoiser": None}

    def denoiser_groups(self, denoiser: nn.Module, options: Any, rate: float) -> list[dict[str, Any]]:
        """Optimizer groups {"params", "lr", "name"} of the denoiser. What is in none of them stays frozen."""
        return [{"params": [*denoiser.parameters()], "lr": rate, "name": "denoiser"}]

    # ---- files

    @property
    def table_name(self) -> str:
        """Name of the table of the model's layers in adapter files: of an Architecture, or of one of its variants."""
        return self.name

    @abstractmethod
    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        """Write a checkpoint in published names, whole or not at all. form: one of the sheet's `formats`.

        encoders: those that learned. What else belongs into the file is taken from the source. `path` is a folder
        where the form is one.
        """

    def vae_fingerprint(self) -> str:
        """A hash of all that cached latents depend on besides the pictures."""
        return self.parts.vae.fingerprint()

    def text_fingerprint(self, name: str) -> str:
        """A hash of all that cached outputs of encoder `name` depend on besides the captions."""
        settings = self.text_settings(name)
        text = f"{self.part(name).fingerprint()} {self.tokenizers[name].fingerprint()} {settings}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @abstractmethod
    def text_settings(self, name: str) -> tuple[Any, ...]:
        """The options that change the outputs of encoder `name`: part of the key of their cache."""

    def adapter_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with an adapter file for this model although the names of its layers fit; None: nothing.

        tensors: with kohya keys. Completes the line "<file> ...". Called before anything is loaded.
        """
        return None

    def model_names(self) -> dict[str, str]:
        """What was given for "sd_model" and "vae": `library.io.metadata.file_facts` makes names and hashes of it."""
        names = {"sd_model": self.options.pretrained_model_name_or_path, "vae": self.options.own_vae}
        return {kind: name for kind, name in names.items() if name}

    def facts(self) -> ModelFacts:
        """What the metadata of saved files say about the model."""
        return self.variant.facts


def require_blocks(flag: str, count: int, limit: int) -> None:
    """Raises UserError when `flag` asks for more than `limit` blocks."""
    if count > max(0, limit):
        raise UserError(f"{flag} {count}: at most {max(0, limit)} blocks of this model can be swapped")
