# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0.

Qin et al. 2025, "Lumina-Image 2.0: A Unified and Efficient Image Generative Framework",
https://arxiv.org/abs/2503.21758. One transformer over text and picture in the latent space of FLUX.1's autoencoder; the
text is the states of Gemma 2 2B. Trained with flow matching: the model's time runs from 0, noise, to 1, picture.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.families.family import ModelFamily
from library.families.lumina import LUMINA2, SHEET
from library.families.lumina.options import LuminaFlowOptions, LuminaOptions
from library.families.lumina.parts import ENCODER, LATENT_CHANNELS, UNUSED, LuminaParts, denoiser_rules, open_parts
from library.io.checkpoint import CheckpointForm, save_tensors
from library.key_tables import Published
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights.tokenizers import TextTokenizer, gemma2_tokenizer, tokenizer_folders

MASK = "gemma2_mask"  # (B, length) bool, False where a shorter text is padded; batches in which none is lack it
LAYER = -2  # of hidden_states: what the last layer reads
PREVIEW_SHIFT = 6.0  # of the noise levels, at every size: the model's own scheduler has it
PROMPT_START = " <Prompt Start> "  # between system prompt and caption


class Lumina(ModelFamily):
    sheet = SHEET
    latent = LatentSpec("lumina", channels=LATENT_CHANNELS, factor=8, npz_suffix="_lumina.npz", npz_sized_keys=True)
    variant = LUMINA2

    def __init__(self, options: LuminaOptions) -> None:
        super().__init__(options)
        self.prefix = f"{options.system_prompt}{PROMPT_START}" if options.system_prompt else ""

    # ---- loading

    @cached_property
    def parts(self) -> LuminaParts:
        """Headers of the files. The first use downloads what is given as a hub id."""
        return open_parts(self.options)

    @cached_property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        gemma2 = self.parts.gemma2_path
        folders = tokenizer_folders(self.parts.path, gemma2, names=("tokenizer",))
        return {ENCODER: gemma2_tokenizer(folders, cache=self.options.tokenizer_cache_dir, file=gemma2)}

    def check(self) -> None:
        parts, gemma2, tokenizer = self.parts, self.parts.encoders[ENCODER], self.tokenizers[ENCODER]
        if gemma2.width != parts.config["cap_feat_dim"]:
            raise UserError(
                f"{parts.gemma2_path} gives states {gemma2.width} wide, and {parts.path} reads "
                f"{parts.config['cap_feat_dim']}: Lumina-Image 2.0 needs Gemma 2 2B"
            )
        if len(tokenizer.tokenizer) > gemma2.vocabulary:
            raise UserError(
                f"{tokenizer.folder}: this tokenizer has {len(tokenizer.tokenizer)} tokens, the text encoder "
                f"{parts.gemma2_path} only {gemma2.vocabulary}; it belongs to another model"
            )
        if self.token_limit < 1:
            length = self.options.gemma2_max_token_length
            raise UserError(
                f"--system_prompt fills all {length} tokens of --gemma2_max_token_length and leaves none to captions"
            )

    # ---- text

    @property
    def text_length_varies(self) -> bool:
        return True

    def tokenize(self, captions: list[str]) -> Tokens:
        """The system prompt stands before every caption, the empty one too."""
        texts = [self.prefix + caption for caption in captions]
        return self.tokenizers[ENCODER](texts, length=self.options.gemma2_max_token_length, name=ENCODER)

    @property
    def token_limit(self) -> int:
        """What the system prompt leaves of --gemma2_max_token_length."""
        tokenizer = self.tokenizers[ENCODER]
        return tokenizer.limit(self.options.gemma2_max_token_length) - tokenizer.count([self.prefix])[0]

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        texts = [self.prefix, *(self.prefix + caption for caption in captions)]
        empty, *counts = self.tokenizers[ENCODER].count(texts)
        return [count - empty for count in counts]

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        length = self.options.gemma2_max_token_length
        states = torch.zeros(count, length, self.parts.config["cap_feat_dim"], dtype=dtype)
        return {ENCODER: states, MASK: torch.ones(count, length, dtype=torch.bool)}

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """States of the batch's texts, cut to the longest. Padding is zero, as `join_conds` makes it."""
        device, lengths = next(encoder.parameters()).device, tokens.lengths[ENCODER]
        longest = max(lengths)
        ids, mask = on_device(tokens.ids[ENCODER], device)[:, :longest], tokens.mask(ENCODER, longest, device)
        states = encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[LAYER]
        return {ENCODER: states * mask.unsqueeze(-1)} | ({MASK: mask} if min(lengths) < longest else {})

    def split_cond(self, cond: Cond) -> list[Cond]:
        mask = cond.get(MASK, torch.ones(cond[ENCODER].shape[:2], dtype=torch.bool, device=cond[ENCODER].device))
        lengths = mask.sum(1).tolist()
        return [{ENCODER: cond[ENCODER][i, :n], MASK: mask[i, :n]} for i, n in enumerate(lengths)]

    @classmethod
    def join_conds(cls, conds: list[Cond]) -> Cond:
        joined = super().join_conds(conds)
        if len({len(cond[ENCODER]) for cond in conds}) == 1:
            del joined[MASK]  # attention without a mask is quicker, and on the device nobody can look
        return joined

    # ---- pictures

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents  # sd-scripts' autoencoder of FLUX.1 and Lumina scales on its own

    # ---- training

    def objective(self, options: LuminaFlowOptions, loss: LossOptions) -> FlowObjective:
        return FlowObjective(options, loss, preview_shift=constant_shift(PREVIEW_SHIFT))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """n - x0 for x_t = (1 - t) x0 + t n: the model is told 1 - t, in float32, and answers with x0 - n."""
        return -denoiser(x_t, 1 - t.float(), cond[ENCODER], cond.get(MASK))

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        groups = ("context_refiner", "noise_refiner", "layers")
        return [block for group in groups for block in denoiser.get_submodule(group).children()]

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        tensors = Published(denoiser.state_dict(), denoiser_rules(denoiser))
        whole = ChainMap({UNUSED: self._unused(tensors)}, tensors)  # type: ignore[arg-type]
        save_tensors(path, whole, form.metadata, dtype=form.dtype, hashes=False)

    def _unused(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What readers of such files expect and no picture depends on: from the source, else made up."""
        part = self.parts.denoiser
        if part.prefix + UNUSED in part.file.shapes:
            return part.file.tensor(part.prefix + UNUSED)
        weight = tensors["x_embedder.weight"]
        return torch.ones(len(weight), dtype=weight.dtype)

    def text_settings(self, name: str) -> tuple[Any, ...]:
        return self.prefix, self.options.gemma2_max_token_length
