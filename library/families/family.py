# SPDX-License-Identifier: Apache-2.0
"""The interface of an architecture; each has one subclass. What is known without opening files is in its sheet."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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

STAYING_BLOCKS = 2  # blocks that are never swapped, as in sd-scripts


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Where each module of a model comes from."""

    path: Path  # of the model: a file or a folder
    denoiser: Part
    config: Mapping[str, Any]  # of the denoiser, in the form of diffusers
    vae: Part
    encoders: Mapping[str, EncoderPart]  # the encoders that were found, in the order of adapter files


class ModelFamily(ABC):
    """Loading, encoding, prediction and weight names of one architecture. Holds options and headers, but no modules."""

    sheet: ClassVar[Sheet]
    latent: ClassVar[LatentSpec]
    # Padded outputs of text encoders, (B, length ...) -> their masks, (B, length) bool, False at padding. A batch
    # without padding has no mask
    text_masks: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def name(self) -> str:
        """The family's name in the registry."""
        return self.sheet.name

    @property
    @abstractmethod
    def variant(self) -> Variant:
        """The model of the sheet that was given. Known after `check`."""

    @property
    def edits(self) -> bool:
        """Whether the model learns to edit pictures (--task edit)."""
        return self.options.task == "edit"

    @property
    def grows_input(self) -> bool:
        """Whether the denoiser gets new input channels for reference pictures. False for files that `check` refuses."""
        return False

    @property
    def references(self) -> ReferenceSpec | None:
        """How reference pictures are used; None: they are not."""
        return None

    @property
    def preview_references(self) -> ReferenceSpec | None:
        """How the pictures are used that a preview's prompt names."""
        return self.references

    @property
    def reads_masks(self) -> bool:
        """Whether the denoiser is shown each picture's mask and what it leaves of the picture."""
        return False

    @property
    def preview(self) -> PreviewDefaults:
        """Defaults for prompts of previews."""
        return self.variant.preview

    # ---- loading

    @property
    @abstractmethod
    def parts(self) -> ModelParts:
        """The parts of the model, from file headers only. The first access downloads what is given as a hub id."""

    @property
    @abstractmethod
    def tokenizers(self) -> Mapping[str, ClipTokenizer | TextTokenizer]:
        """The tokenizer of each text encoder of this run."""

    @abstractmethod
    def check(self) -> None:
        """Find the files and read their headers. Raises UserError for every problem that shows in a header."""

    def check_weights(self) -> None:
        """Check that each part's file has all of its weights and no others. Reads headers and builds empty modules.

        Raises UserError that names the weights. Called after `check` and before anything is loaded.
        """
        import_diffusers()
        parts = {name: self.part(name) for name in ("denoiser", "vae", *self.encoders)}
        weight_check.check_weights(parts, self.part("denoiser").file.path)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders of this run, in the order of adapter files and learning rates.

        Optional encoders that were not given are left out. Known after `check`.
        """
        return tuple(self.sheet.adapter_prefixes)

    def load_text_encoder(
        self, name: str, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain"
    ) -> nn.Module:
        """The text encoder, frozen, in evaluation mode. dtype None: that of the file. storage: see `Part.load`."""
        return self.part(name).load(dtype, device, storage=storage)

    def load_vae(self, dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        """The VAE, frozen, in evaluation mode, in `vae_dtype(dtype)`. dtype None: that of the file."""
        return self.parts.vae.load(self.vae_dtype(dtype), device)

    def vae_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of the VAE in a run with `dtype`: float32 with --no_half_vae."""
        return torch.float32 if self.options.no_half_vae else dtype

    def load_denoiser(
        self, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain"
    ) -> nn.Module:
        """The denoiser, frozen, in evaluation mode. dtype None: that of the file. storage: see `Part.load`."""
        return self.parts.denoiser.load(dtype, device, storage=storage)

    def part(self, name: str) -> Part:
        """The part called "denoiser" or "vae", or that of a text encoder."""
        own = {"denoiser": self.parts.denoiser, "vae": self.parts.vae}
        return own[name] if name in own else self.parts.encoders[name].part

    def empty_denoiser(self, dtype: torch.dtype | None = None, storage: Storage = "plain") -> nn.Module:
        """The module of `load_denoiser` with its weights on the meta device, where they take no memory."""
        return self.part("denoiser").empty(dtype, storage)

    # ---- text

    @abstractmethod
    def tokenize(self, captions: list[str]) -> Tokens:
        """Token ids, and weights if captions are weighted. `Tokens.truncated` has the captions that were cut."""

    def tokenize_with(self, captions: list[str], pictures: Sequence[Sequence[Tensor]]) -> Tokens:
        """`tokenize` for captions with reference pictures, which the encoders in `references.seen_by` look at.

        pictures: those of each caption, 3 H W float32 in [-1, 1]; may be empty. They have no effect if no encoder looks
        at pictures.
        """
        return self.tokenize(captions)

    @property
    @abstractmethod
    def token_limit(self) -> int:
        """Maximum number of tokens of a caption; longer ones are cut. Start, end and padding do not count."""

    @abstractmethod
    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each whole caption, counted in the same way as `token_limit`."""

    @property
    def text_length_varies(self) -> bool:
        """Whether the length of the denoiser's text input differs between batches."""
        return False

    @abstractmethod
    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """The outputs of encoder `name` for the whole batch: its part of a Cond. The first axis of every tensor is B.

        Gradients flow if the encoder learns. Padding that nothing reads is cut to the longest caption, and masked.
        """

    def encode_text(self, tokens: Tokens, encoders: Mapping[str, nn.Module]) -> Cond:
        """The outputs of all of these encoders. A batch may have further ones from the cache."""
        cond: Cond = {}
        for name, encoder in encoders.items():
            cond |= self.encode_part(name, encoder, tokens)
        return cond

    @abstractmethod
    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        """Zeros in the shapes of the text encoders' outputs for `count` captions without padding."""

    def drop_text(self, cond: Cond, seed: int) -> Cond:
        """Drop outputs of single encoders at random, the same for every `seed`. Used in training only."""
        return cond

    def drop_references(self, batch: Batch, seed: int) -> Batch:
        """Drop reference pictures at random, the same for every `seed`. Used in training only."""
        return batch

    def split_cond(self, cond: Cond) -> list[Cond]:
        """Split into one Cond per caption, without the batch axis and without padding, as in the cache."""
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
        """The inverse of `split_cond`: a batch. Tensors of different lengths are padded with zeros at the end."""
        found = {name: nn.utils.rnn.pad_sequence([cond[name] for cond in conds], batch_first=True) for name in conds[0]}
        return cls.without_idle_masks(found, {name: [len(cond[name]) for cond in conds] for name in cls.text_masks})

    @classmethod
    def without_idle_masks(cls, cond: Cond, lengths: Mapping[str, Sequence[int]]) -> Cond:
        """Leave out the masks of texts that all have one length: attention is faster without a mask.

        lengths: of the texts of a batch, for each name in `text_masks`. Reading them from the masks would make the host
        wait for the device.
        """
        idle = [mask for name, mask in cls.text_masks.items() if len({*lengths[name]}) == 1]
        return {name: tensor for name, tensor in cond.items() if name not in idle}

    # ---- pictures

    def encode_image(self, vae: nn.Module, pixels: Tensor, seeds: list[int]) -> Tensor:
        """Pixels B 3 H W in [-1, 1] -> scaled latents B C h w float32. Each sample's seed draws its posterior noise."""
        return kl_vae.encode(vae, pixels, seeds)

    def encode_reference(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """Reference pictures B 3 H W in [-1, 1] -> scaled latents B C h w float32. Nothing is drawn."""
        return kl_vae.encode(vae, pixels, None)

    def shown(self, batch: Batch) -> Sequence[Tensor]:
        """Pixels that `encode_references` is given in training, B 3 H W each: those of the reference pictures."""
        return batch.reference_pixels

    def encode_references(self, encode: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`Batch.references` of pictures B 3 H W in [-1, 1]. encode: `encode_reference` with a VAE."""
        return tuple(map(encode, pictures))

    def decode_latent(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Scaled latents B C h w -> pixels B 3 H W float32 in [-1, 1]."""
        return kl_vae.decode(vae, latents)

    @classmethod
    @abstractmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        """Scale raw VAE latents, which cache files of sd-scripts hold, for the model."""

    # ---- training

    @abstractmethod
    def objective(self, options: Any, loss: LossOptions) -> Objective:
        """The training objective. `options`: the family's option group "objective"."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """The denoiser's output B C h w for noised latents x_t at t (B).

        `batch` is None in previews, unless the prompt has reference pictures, which are in `batch.references`.
        """

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The denoiser's blocks, in the order in which they run."""

    def optional(self, denoiser: nn.Module) -> list[nn.Module]:
        """Modules of the denoiser, outside its blocks, that only some batches use."""
        return []

    def swapped(self, denoiser: nn.Module, count: int, options: Any = None) -> list[int]:
        """Indices into `blocks` of the blocks that --blocks_to_swap `count` keeps in main memory, evenly spread.

        options: the option group "finetune" of full training, which may hold options of the family. The denoiser may
        be `empty_denoiser`. Raises UserError if it has too few blocks.
        """
        require_blocks("--blocks_to_swap", count, self.most_swapped(denoiser))
        return spread(len(self.blocks(denoiser)), count)

    def most_swapped(self, denoiser: nn.Module) -> int:
        """The largest value for --blocks_to_swap."""
        return len(self.blocks(denoiser)) - STAYING_BLOCKS

    def modulations(self, denoiser: nn.Module) -> tuple[nn.Module, list[nn.Linear]] | None:
        """The module that computes the time embedding, and the Linears of the blocks, in order, that read its SiLU.

        None: the model has no such Linears, or they are a small part of its weights.
        """
        return None

    # ---- textual inversion

    def add_word(self, word: str, count: int, like: str | None) -> dict[str, NewWord]:
        """Make `word` in captions stand for `count` new tokens. Returns the new tokens of each text encoder.

        like: text whose tokens initialise the new ones. Reads headers only, and can be called before any model is
        loaded. Raises UserError if the vocabulary has the word already, or if the model cannot learn new words.
        """
        raise UserError("textual inversion is not available for this model: train a LoRA instead")

    # ---- full training

    def learning_parts(self, options: Any) -> dict[str, float | None]:
        """The parts that learn ("denoiser" or an encoder's name), each with its learning rate, or None for the default.

        options: the family's option group "finetune".
        """
        return {"denoiser": None}

    def denoiser_groups(self, denoiser: nn.Module, options: Any, rate: float) -> list[dict[str, Any]]:
        """Optimizer groups {"params", "lr", "name"} of the denoiser. Parameters in none of them stay frozen."""
        return [{"params": [*denoiser.parameters()], "lr": rate, "name": "denoiser"}]

    # ---- files

    @property
    def table_name(self) -> str:
        """Name of the model's table of layers in adapter files: that of an Architecture or of one of its variants."""
        return self.name

    @abstractmethod
    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        """Write a checkpoint in published names, atomically. form: one of the sheet's `formats`.

        encoders: the trained ones. The rest of the file is copied from the source. `path` is a folder if the form is
        one.
        """

    def vae_fingerprint(self) -> str:
        """Hash of everything, except the pictures, that cached latents depend on."""
        return self.parts.vae.fingerprint()

    def text_fingerprint(self, name: str) -> str:
        """Hash of everything, except the captions, that cached outputs of encoder `name` depend on."""
        settings = self.text_settings(name)
        text = f"{self.part(name).fingerprint()} {self.tokenizers[name].fingerprint()} {settings}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @abstractmethod
    def text_settings(self, name: str) -> tuple[Any, ...]:
        """Values of the options that change the outputs of encoder `name`: part of their cache key."""

    def adapter_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why an adapter file does not fit this model although its layer names do; None if it fits.

        tensors: with kohya keys. The result completes the line "<file> ...". Called before anything is loaded.
        """
        return None

    def model_names(self) -> dict[str, str]:
        """The values given for "sd_model" and "vae": `library.io.metadata.file_facts` names and hashes them."""
        names = {"sd_model": self.options.pretrained_model_name_or_path, "vae": self.options.own_vae}
        return {kind: name for kind, name in names.items() if name}

    def facts(self) -> ModelFacts:
        """Facts about the model for the metadata of saved files."""
        return self.variant.facts


def require_blocks(flag: str, count: int, limit: int) -> None:
    """Raise UserError if `flag` asks for more than `limit` blocks."""
    if count > max(0, limit):
        raise UserError(f"{flag} {count}: at most {max(0, limit)} blocks of this model can be swapped")
