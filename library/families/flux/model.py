# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 dev, Kontext, Fill and schnell.

Black Forest Labs 2024, https://github.com/black-forest-labs/flux. A rectified-flow transformer over latents and T5
states, which is also told CLIP-L's pooled output, and in dev a guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.families.family import STAYING_BLOCKS, require_blocks
from library.families.flux import SHEET, VARIANTS, FluxVariant
from library.families.flux.fill import FILL, FILL_PREVIEW, encode_masked, picture_and_mask, problem_of_input
from library.families.flux.options import FluxFineTuneOptions, FluxFlowOptions, FluxOptions
from library.families.flux.parts import CLIP, FLUX, T5, Design, FluxParts, denoiser_rules, open_parts
from library.families.flux.references import KONTEXT
from library.families.t5 import MASK, cut_padding, encode_t5
from library.families.two_streams import TwoStreamFamily, block_lists
from library.io.checkpoint import CheckpointForm, save_tensors
from library.key_tables import Published
from library.objectives.flow import FlowObjective, constant_shift, resolution_shift
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, ReferenceSpec, Tokens
from library.weights.text import CHUNK
from library.weights.tokenizers import clip_tokenizer, t5_tokenizer, tokenizer_folders

POOLED = f"{CLIP}_pooled"  # (B, width)


class Flux(TwoStreamFamily):
    sheet = SHEET
    embedder = "time_text_embed"
    latent = LatentSpec("flux", channels=16, factor=8, npz_suffix="_flux.npz", npz_sized_keys=True)
    design: ClassVar[Design] = FLUX
    extra_tokens: ClassVar[int] = 0  # of the padding, which the model sees with --apply_t5_attn_mask

    def __init__(self, options: FluxOptions) -> None:
        super().__init__(options)
        self.masks_text = options.apply_t5_attn_mask

    # ---- loading

    @cached_property
    def parts(self) -> FluxParts:
        """Headers of the files. The first use downloads what is given as a hub id."""
        return open_parts(self.options, FILL if self.fills else self.design)

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """Encoder name -> its tokenizer."""
        cache = self.options.tokenizer_cache_dir
        t5 = t5_tokenizer(self.tokenizer_places(T5, "tokenizer_2", "tokenizer_t5"), cache=cache)
        return {CLIP: clip_tokenizer(self.tokenizer_places(CLIP, "tokenizer"), cache=cache), T5: t5}

    def tokenizer_places(self, encoder: str, *names: str) -> list[Path]:
        """Folders of these names in which the tokenizer of an encoder may lie."""
        return tokenizer_folders(self.parts.path, self.parts.places[encoder], names=names)

    @property
    def variant(self) -> FluxVariant:
        if self.is_kontext:
            return VARIANTS["kontext"]
        if self.fills:
            return VARIANTS["fill"]
        return VARIANTS["dev" if self.parts.config["guidance_embeds"] else "schnell"]

    @property
    def is_kontext(self) -> bool:
        """Whether the model is FLUX.1 Kontext, whose file cannot be told from dev's."""
        return self.options.model_type == "kontext"

    @property
    def references(self) -> ReferenceSpec | None:
        return KONTEXT if self.is_kontext and self.edits else None

    @property
    def fills(self) -> bool:
        """Whether the model is FLUX.1 Fill, which is shown masks and what they leave of the pictures."""
        return self.options.model_type == "fill"

    @property
    def reads_masks(self) -> bool:
        return self.fills

    @property
    def preview_references(self) -> ReferenceSpec | None:
        return FILL_PREVIEW if self.fills else self.references

    def check(self) -> None:
        if self.is_kontext and not self.parts.config["guidance_embeds"]:
            raise UserError(f"--model_type kontext: {self.parts.path} has no guidance: it is another model")
        for name, encoder in self.parts.encoders.items():
            tokens = len(self.tokenizers[name].tokenizer)
            if tokens > encoder.vocabulary:
                raise UserError(
                    f"the tokenizer of {name} has {tokens} tokens, {self.parts.places[name]} only "
                    f"{encoder.vocabulary}; it belongs to another model"
                )

    # ---- text

    @property
    def text_length(self) -> int:
        """Tokens of T5 for a caption, with end token and padding."""
        return self.options.t5xxl_max_token_length or self.variant.text_length

    @property
    def text_length_varies(self) -> bool:
        return self.masks_text

    def tokenize(self, captions: list[str]) -> Tokens:
        tokens = self.tokenizers[T5](captions, length=self.text_length, name=T5)
        if CLIP not in self.tokenizers:
            return tokens
        clip = self.tokenizers[CLIP](captions, max_tokens=CHUNK, weighted=False, name=CLIP)
        # that CLIP cuts a caption is not worth a warning: T5 reads all of it
        return Tokens({**clip.ids, **tokens.ids}, {**clip.lengths, **tokens.lengths}, truncated=tokens.truncated)

    @property
    def token_limit(self) -> int:
        return self.tokenizers[T5].limit(self.text_length)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return self.tokenizers[T5].count(captions)

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        widths, length = {name: encoder.width for name, encoder in self.parts.encoders.items()}, self.text_length
        cond = {T5: torch.zeros(count, length, widths[T5], dtype=dtype)}
        if CLIP in widths:
            cond[POOLED] = torch.zeros(count, widths[CLIP], dtype=dtype)
        return cond | ({MASK: torch.ones(count, length, dtype=torch.bool)} if self.masks_text else {})

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        if name == CLIP:
            ids = on_device(tokens.ids[CLIP], next(encoder.parameters()).device)
            return {POOLED: encoder(ids[:, 0]).pooler_output}
        return encode_t5(encoder, tokens, masked=self.masks_text, more=self.extra_tokens)

    def split_cond(self, cond: Cond) -> list[Cond]:
        return cut_padding(super().split_cond(cond), cond)

    # ---- pictures

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents  # sd-scripts writes FLUX latents shifted and scaled already

    def shown(self, batch: Batch) -> Sequence[Tensor]:
        return picture_and_mask(batch) if self.fills else super().shown(batch)

    def encode_references(self, encode: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return encode_masked(encode, pictures) if self.fills else super().encode_references(encode, pictures)

    # ---- training

    def objective(self, options: FluxFlowOptions, loss: LossOptions) -> FlowObjective:
        shift = self.variant.preview_shift
        return FlowObjective(options, loss, preview_shift=resolution_shift if shift is None else constant_shift(shift))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """Noise - latents, B 16 h w. A token is 2 x 2 latent pixels, placed by row and column; text has no place."""
        text, (height, width) = cond[T5], x_t.shape[-2:]
        references = [latents.to(x_t) for latents in batch.references] if batch is not None else []
        pictures = [x_t] if self.fills else [x_t, *references]
        tokens = [pack(picture) for picture in pictures]
        if self.fills:  # channels of the same tokens
            tokens = [torch.cat([*tokens, *map(pack, references)], -1)]
        inputs: dict[str, Any] = {
            "hidden_states": tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1),
            "timestep": t,  # 0..1: the model multiplies by 1000
            "encoder_hidden_states": text,
            "txt_ids": text.new_zeros(text.shape[1], 3, dtype=torch.float32),
            "img_ids": places_of(pictures, side=2, step=1),
        }
        # of one caption alone nothing is padding, and attention without a mask is faster
        mask = _over_pictures(cond[MASK], inputs["hidden_states"]) if MASK in cond and len(text) > 1 else None
        inputs |= self.further_inputs(cond, t, mask)
        return unpack(denoiser(**inputs, return_dict=False)[0][:, : tokens[0].shape[1]], height, width)

    def further_inputs(self, cond: Cond, t: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What else the transformer is called with. mask: (B, text + picture) bool, None where nothing is padding."""
        is_told = self.parts.config["guidance_embeds"]
        masked = {} if mask is None else {"joint_attention_kwargs": {"attention_mask": mask[:, None, None]}}
        return {
            "pooled_projections": cond[POOLED],
            "guidance": self._guidance(cond, t) if is_told else None,
            **masked,
        }

    def _guidance(self, cond: Cond, t: Tensor) -> Tensor:
        """(B) float32: of a preview's prompt, else the one that is trained with."""
        told = cond.get("guidance")
        return torch.full_like(t, self.options.guidance_scale, dtype=torch.float32) if told is None else told

    def swapped(self, denoiser: nn.Module, count: int, options: FluxFineTuneOptions | None = None) -> list[int]:
        """Or as many double and single blocks as the options say."""
        given = (options.double_blocks_to_swap, options.single_blocks_to_swap) if options else (None, None)
        if not any(given):
            return super().swapped(denoiser, count)
        if count:
            raise UserError(
                "--blocks_to_swap says how many double and single blocks are swapped: "
                "leave out --double_blocks_to_swap and --single_blocks_to_swap"
            )
        double, single = (number or 0 for number in given)
        doubles, singles = map(len, block_lists(denoiser))
        require_blocks("--double_blocks_to_swap", double, doubles - STAYING_BLOCKS)
        require_blocks("--single_blocks_to_swap", single, singles - STAYING_BLOCKS)
        return self.swapped_of_each(denoiser, double, single)

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        tensors = Published(denoiser.state_dict(), denoiser_rules(denoiser))
        save_tensors(path, tensors, form.metadata, dtype=form.dtype, hashes=False)

    def adapter_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        return problem_of_input(tensors, self.parts.config["in_channels"])

    def text_settings(self, name: str) -> tuple[Any, ...]:
        return (self.text_length, self.masks_text, self.extra_tokens) if name == T5 else ()


# ---- latents as tokens ----------------------------------------------------------------------------------------------


def pack(latents: Tensor) -> Tensor:
    """B C 2h 2w -> B (h w) (C 4): one token for 2 x 2 pixels, channel by channel."""
    return rearrange(latents, "b c (rows i) (columns j) -> b (rows columns) (c i j)", i=2, j=2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of height x width."""
    places = {"rows": height // 2, "columns": width // 2}
    return rearrange(tokens, "b (rows columns) (c i j) -> b c (rows i) (columns j)", i=2, j=2, **places)


def picture_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows columns, 3) float32: 0, row, column of each token."""
    places = (torch.arange(count, dtype=torch.float32, device=device) for count in (rows, columns))
    row, column = torch.meshgrid(*places, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)


def places_of(pictures: Sequence[Tensor], *, side: int, step: float) -> Tensor:
    """(N, 3) float32: number times `step`, row and column of the tokens of several pictures, one after the other.

    side: latent pixels along a side of a token.
    """
    places = []
    for number, picture in enumerate(pictures):
        own = picture_ids(picture.shape[-2] // side, picture.shape[-1] // side, picture.device)
        if number:
            own[:, 0] = number * step
        places.append(own)
    return places[0] if len(places) == 1 else torch.cat(places)


def _over_pictures(mask: Tensor, tokens: Tensor) -> Tensor:
    """The mask of the text with every token of the picture after it: (B, T) -> (B, T + N)."""
    return torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1)
