# SPDX-License-Identifier: Apache-2.0
"""HunyuanImage-2.1.

Tencent 2025, https://github.com/Tencent-Hunyuan/HunyuanImage-2.1. A transformer of double and single blocks over
latents 32 times smaller than pictures along each side. It reads states of Qwen2.5-VL and, for quoted text, those of a
ByT5 that was trained on glyphs. Trained with flow matching. The distilled model also reads a guidance and, as a mean
flow, the time at which a step ends (Geng et al. 2025, https://arxiv.org/abs/2505.13447).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import raise_problems
from library.families.hunyuan_image import BYT5, QWEN, SHEET, VARIANTS, HunyuanImageVariant
from library.families.hunyuan_image.glyphs import LENGTH, glyph_tokenizer
from library.families.hunyuan_image.options import HunyuanImageFlowOptions
from library.families.hunyuan_image.parts import HunyuanImageParts, denoiser_rules, open_parts
from library.families.two_streams import TwoStreamFamily
from library.io.checkpoint import CheckpointForm, save_tensors
from library.key_tables import Published
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights.language_models import language_states
from library.weights.text_encoders import t5_states
from library.weights.tokenizers import ChatTokenizer, TextTokenizer, qwen_tokenizer, tokenizer_folders

MASK = "{}_mask"  # (B, length) bool, False at padding; missing in batches without padding
SCALE = 0.75289  # scaling factor of the published autoencoder
TIMES = 1000  # the model embeds noise levels and guidance of 0..1 as 0..1000
PLAIN_BYT5 = 384  # tokens of Google's ByT5; the one that was trained on glyphs also has colours and fonts
CHAT = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)  # before a caption; the denoiser does not read its states
CHAT_END = "<|im_end|>"
QWEN_HUB = (("Qwen/Qwen2.5-VL-7B-Instruct", ""),)


class HunyuanImage(TwoStreamFamily):
    sheet = SHEET
    embedder = "time_guidance_embed"
    latent = LatentSpec("hunyuan_image", channels=64, factor=32, npz_suffix="_hi.npz", npz_sized_keys=True)
    encoders = (QWEN, BYT5)

    # ---- loading

    @cached_property
    def parts(self) -> HunyuanImageParts:
        """The parts of the model, from file headers only. The first access downloads what is given as a hub id."""
        return open_parts(self.options)

    @cached_property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        return {QWEN: self._chat, BYT5: glyph_tokenizer()}

    @cached_property
    def _chat(self) -> ChatTokenizer:
        folders = tokenizer_folders(self.parts.path, self.parts.places[QWEN], names=("tokenizer",))
        cache = self.options.tokenizer_cache_dir
        return qwen_tokenizer(folders, cache=cache, before=CHAT, after=CHAT_END, hub=QWEN_HUB)

    @cached_property
    def _hidden(self) -> int:
        """Number of tokens before a caption, whose states the denoiser does not read."""
        return len(self._chat.tokenizer(CHAT, add_special_tokens=False).input_ids)

    @property
    def variant(self) -> HunyuanImageVariant:
        return VARIANTS["distilled" if self.parts.config["guidance_embeds"] else "base"]

    def check(self) -> None:
        parts, problems = self.parts, []
        needed = {QWEN: ("text_embed_dim", "Qwen2.5-VL 7B"), BYT5: ("text_embed_2_dim", "ByT5 small")}
        for name, (key, what) in needed.items():
            width, wanted = parts.encoders[name].width, parts.config[key]
            if width != wanted:
                problems.append(
                    f"{parts.places[name]} gives states {width} wide, and {parts.path} reads {wanted}: "
                    f"HunyuanImage-2.1 needs {what}"
                )
        if parts.encoders[BYT5].vocabulary == PLAIN_BYT5:
            problems.append(
                f"{parts.places[BYT5]} is ByT5 as Google published it: HunyuanImage-2.1 needs the one that was trained "
                "on glyphs (byt5_small_glyphxl)"
            )
        tokens, vocabulary = len(self._chat.tokenizer), parts.encoders[QWEN].vocabulary
        if tokens > vocabulary:
            problems.append(
                f"{self._chat.folder}: this tokenizer has {tokens} tokens, the text encoder {parts.places[QWEN]} only "
                f"{vocabulary}; it belongs to another model"
            )
        raise_problems(problems)

    # ---- text

    @property
    def text_length_varies(self) -> bool:
        return True

    def tokenize(self, captions: list[str]) -> Tokens:
        qwen = self._chat(captions, length=self._hidden + self.options.text_encoder_max_token_length, name=QWEN)
        byt5 = self.tokenizers[BYT5](captions, length=LENGTH, name=BYT5)
        return Tokens({**qwen.ids, **byt5.ids}, {**qwen.lengths, **byt5.lengths}, truncated=qwen.truncated)

    @property
    def token_limit(self) -> int:
        return self._chat.limit(self._hidden + self.options.text_encoder_max_token_length)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return self._chat.count(captions)

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        lengths = {QWEN: self.options.text_encoder_max_token_length, BYT5: LENGTH}
        cond = {
            name: torch.zeros(count, length, self.parts.encoders[name].width, dtype=dtype)
            for name, length in lengths.items()
        }
        return cond | {
            MASK.format(name): torch.ones(count, length, dtype=torch.bool) for name, length in lengths.items()
        }

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """States of the batch's texts, cut to the longest. Those of ByT5 have length 0 if no caption quotes anything.

        Padding is zero, as in `join_conds`.
        """
        device, lengths = next(encoder.parameters()).device, tokens.lengths[name]
        longest = max(lengths)
        ids, mask = on_device(tokens.ids[name], device)[:, :longest], tokens.mask(name, longest, device)
        if name == QWEN:
            states = language_states(encoder, ids, mask, (-1,))[0][:, self._hidden :]
            mask = mask[:, self._hidden :]
        elif longest:
            seen = mask | (torch.arange(longest, device=device) == 0)  # never mask a whole text
            states = t5_states(encoder, ids, seen if min(lengths) < longest else None)
        else:
            states = torch.zeros(len(ids), 0, self.parts.encoders[BYT5].width, device=device)
        masked = {MASK.format(name): mask} if min(lengths) < longest else {}
        return {name: states * mask.unsqueeze(-1)} | masked

    def split_cond(self, cond: Cond) -> list[Cond]:
        parts: list[Cond] = [{} for _ in next(iter(cond.values()))]
        for name in [name for name in self.encoders if name in cond]:
            states = cond[name]
            mask = cond.get(MASK.format(name), torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))
            for part, own, seen, length in zip(parts, states, mask, mask.sum(1).tolist(), strict=True):
                part |= {name: own[:length], MASK.format(name): seen[:length]}
        return parts

    @classmethod
    def join_conds(cls, conds: list[Cond]) -> Cond:
        joined = super().join_conds(conds)
        for name in [name for name in cls.encoders if name in joined]:
            if len({len(cond[name]) for cond in conds}) == 1:
                del joined[MASK.format(name)]  # attention is faster without a mask
        return joined

    # ---- pictures

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents * SCALE  # sd-scripts scales when it reads its cache

    # ---- training

    def objective(self, options: HunyuanImageFlowOptions, loss: LossOptions) -> FlowObjective:
        return FlowObjective(options, loss, preview_shift=constant_shift(self.variant.preview_shift))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """Noise - latents. A mean flow also reads the time at which the step ends: outside of previews, `t` itself."""
        states = [cond.get(key) for name in self.encoders for key in (name, MASK.format(name))]
        if not cond[BYT5].shape[1]:
            states[-2:] = [None, None]
        time, told = t.float() * TIMES, {}
        if self.parts.config["guidance_embeds"]:
            guidance = cond.get("guidance", torch.full_like(time, self.options.guidance_scale))
            told["guidance"] = guidance * TIMES
        if self.parts.config["use_meanflow"]:
            told["timestep_r"] = cond.get("step_end", t).float() * TIMES
        return denoiser(x_t, time, *states, **told)

    def optional(self, denoiser: nn.Module) -> list[nn.Module]:
        """The module that reads the glyphs of quoted text."""
        return [denoiser.get_submodule("context_embedder_2")]

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        tensors = Published(denoiser.state_dict(), denoiser_rules(denoiser))
        save_tensors(path, tensors, form.metadata, dtype=form.dtype, hashes=False)

    def text_settings(self, name: str) -> tuple[Any, ...]:
        if name == BYT5:
            return (LENGTH,)
        return self.options.text_encoder_max_token_length, self.parts.encoders[QWEN].layers
