# SPDX-License-Identifier: Apache-2.0
"""SANA and SANA-1.5.

Xie et al. 2024, "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers",
https://arxiv.org/abs/2410.10629; SANA-1.5: https://arxiv.org/abs/2501.18427. A transformer with linear attention over
latents 32 times smaller than pictures along each side. It reads states of Gemma 2 2B-it, whose input begins with an
instruction on what to do with the caption. Trained with flow matching; the model reads noise levels in thousandths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.families.family import ModelFamily
from library.families.sana import SHEET
from library.families.sana.options import SanaFlowOptions, SanaOptions
from library.families.sana.parts import ENCODER, SanaParts, open_parts
from library.families.sheet import Variant
from library.io.checkpoint import CheckpointForm, save_tensors
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights import dc_ae
from library.weights.loading import CONFIG_FOLDER
from library.weights.tokenizers import TextTokenizer, gemma2_tokenizer, tokenizer_folders

MASK = "gemma2_mask"  # (B, length) bool, False at padding; missing in batches without padding
PREVIEW_SHIFT = 3.0  # shift of the noise levels, at every size, as in the model's own scheduler
INSTRUCTION = CONFIG_FOLDER / "sana_instruction.txt"  # that of diffusers' SanaPipeline
OVERLAP = 2  # SANA counts two tokens twice: the start and the instruction's last, a space that begins the caption


class Sana(ModelFamily):
    sheet = SHEET
    latent = LatentSpec("sana", channels=dc_ae.CHANNELS, factor=32, npz_suffix="_sana.npz", npz_sized_keys=True)

    def __init__(self, options: SanaOptions) -> None:
        super().__init__(options)
        given = options.complex_human_instruction
        self.instruction = INSTRUCTION.read_text(encoding="utf-8") if given is None else given

    @property
    def variant(self) -> Variant:
        return self.sheet.variants["sana1.5" if self.parts.config.get("qk_norm") else "sana"]

    # ---- loading

    @cached_property
    def parts(self) -> SanaParts:
        """The parts of the model, from file headers only. The first access downloads what is given as a hub id."""
        return open_parts(self.options)

    @cached_property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        gemma2 = self.parts.gemma2_path
        folders = tokenizer_folders(self.parts.path, gemma2, names=("tokenizer",))
        return {ENCODER: gemma2_tokenizer(folders, cache=self.options.tokenizer_cache_dir, file=gemma2)}

    def check(self) -> None:
        parts, gemma2, tokenizer = self.parts, self.parts.encoders[ENCODER], self.tokenizers[ENCODER]
        if gemma2.width != parts.config["caption_channels"]:
            raise UserError(
                f"{parts.gemma2_path} gives states {gemma2.width} wide, and {parts.path} reads "
                f"{parts.config['caption_channels']}: SANA needs Gemma 2 2B-it"
            )
        if len(tokenizer.tokenizer) > gemma2.vocabulary:
            raise UserError(
                f"{tokenizer.folder}: this tokenizer has {len(tokenizer.tokenizer)} tokens, the text encoder "
                f"{parts.gemma2_path} only {gemma2.vocabulary}; it belongs to another model"
            )
        if self.token_limit < 1:
            least = self.options.gemma2_max_token_length + 1 - self.token_limit
            raise UserError(
                f"--gemma2_max_token_length {self.options.gemma2_max_token_length} leaves no token to captions: give "
                f"at least {least}"
            )

    # ---- text

    @property
    def text_length_varies(self) -> bool:
        return True

    @cached_property
    def skipped(self) -> int:
        """Number of tokens before a caption whose states are dropped: the instruction, without the start token."""
        return max(0, self.tokenizers[ENCODER].count([self.instruction])[0] + 1 - OVERLAP) if self.instruction else 0

    @property
    def length(self) -> int:
        """Maximum number of tokens that Gemma 2 reads."""
        return self.skipped + self.options.gemma2_max_token_length

    def tokenize(self, captions: list[str]) -> Tokens:
        """Captions in lower case, each after the instruction. An empty caption has none, as in SANA's training."""
        texts = [caption.lower().strip() for caption in captions]
        texts = [self.instruction + text if text else "" for text in texts]
        return self.tokenizers[ENCODER](texts, length=self.length, name=ENCODER)

    @property
    def token_limit(self) -> int:
        """Maximum number of tokens of a caption: those that Gemma 2 reads, less the instruction."""
        tokenizer = self.tokenizers[ENCODER]
        return tokenizer.limit(self.length) - tokenizer.count([self.instruction])[0]

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        texts = [self.instruction, *(self.instruction + caption.lower().strip() for caption in captions)]
        empty, *counts = self.tokenizers[ENCODER].count(texts)
        return [count - empty for count in counts]

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        length = self.options.gemma2_max_token_length
        states = torch.zeros(count, length, self.parts.config["caption_channels"], dtype=dtype)
        return {ENCODER: states, MASK: torch.ones(count, length, dtype=torch.bool)}

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """States of the start token and of each caption, without the instruction's. Padding is zero."""
        device, lengths = next(encoder.parameters()).device, tokens.lengths[ENCODER]
        longest = max(lengths)
        ids, read = on_device(tokens.ids[ENCODER], device)[:, :longest], tokens.mask(ENCODER, longest, device)
        states = encoder(ids, attention_mask=read, use_cache=False).last_hidden_state
        begin = 1 + self.skipped
        states, mask = (torch.cat([x[:, :1], x[:, begin:]], 1) for x in (states, read))
        kept = {1 + max(0, length - begin) for length in lengths}
        return {ENCODER: states * mask.unsqueeze(-1)} | ({MASK: mask} if len(kept) > 1 else {})

    def split_cond(self, cond: Cond) -> list[Cond]:
        mask = cond.get(MASK, torch.ones(cond[ENCODER].shape[:2], dtype=torch.bool, device=cond[ENCODER].device))
        lengths = mask.sum(1).tolist()
        return [{ENCODER: cond[ENCODER][i, :n], MASK: mask[i, :n]} for i, n in enumerate(lengths)]

    @classmethod
    def join_conds(cls, conds: list[Cond]) -> Cond:
        joined = super().join_conds(conds)
        if len({len(cond[ENCODER]) for cond in conds}) == 1:
            del joined[MASK]  # attention is faster without a mask
        return joined

    def text_settings(self, name: str) -> tuple[Any, ...]:
        return self.instruction, self.options.gemma2_max_token_length

    # ---- pictures

    def encode_image(self, vae: nn.Module, pixels: Tensor, seeds: list[int]) -> Tensor:
        """Pixels B 3 H W in [-1, 1] -> scaled latents B 32 h w float32. Nothing is drawn."""
        return dc_ae.encode(vae, pixels)

    def encode_reference(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        return dc_ae.encode(vae, pixels)

    def decode_latent(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return dc_ae.decode(vae, latents)

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents  # sd-scripts has no such cache files

    # ---- training

    def objective(self, options: SanaFlowOptions, loss: LossOptions) -> FlowObjective:
        return FlowObjective(options, loss, preview_shift=constant_shift(PREVIEW_SHIFT))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """n - x0 for x_t = (1 - t) x0 + t n. The model reads 1000 t, in float32, times its timestep_scale."""
        return denoiser(
            x_t,
            encoder_hidden_states=cond[ENCODER],
            timestep=1000 * self.parts.config.get("timestep_scale", 1.0) * t.float(),
            encoder_attention_mask=cond.get(MASK),
            return_dict=False,
        )[0]

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return [*denoiser.get_submodule("transformer_blocks").children()]

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        """Write the denoiser in diffusers' names, which its `from_single_file` and folders use."""
        save_tensors(path, denoiser.state_dict(), form.metadata, dtype=form.dtype, hashes=False)
