# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
https://arxiv.org/abs/2403.03206. A transformer in which picture and text attend to each other (MMDiT), trained with
flow matching in the latent space of a KL autoencoder with 16 channels. It reads the states of CLIP-L and CLIP-G side by
side, then those of T5, and the pooled states of both CLIPs. An encoder may be missing: zeros take its place.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError, raise_problems
from library.families.family import ModelFamily
from library.families.sd3 import SHEET
from library.families.sd3.options import SD3FineTuneOptions, SD3FlowOptions
from library.families.sd3.parts import (
    CLIP_G,
    CLIP_L,
    ENCODERS,
    MMDIT_PREFIX,
    T5,
    SD3Parts,
    kind,
    mmdit_rules,
    open_parts,
)
from library.families.sd3.positions import choose_crop, use_random_crop, use_scaled_positions
from library.families.sheet import Variant
from library.families.t5 import MASK, cut_padding, encode_t5
from library.io.checkpoint import CheckpointForm, save_tensors
from library.key_tables import Published
from library.log import get_logger
from library.memory.quantise import Storage
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.rng import torch_generator
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights.text import CHUNK, CLIP_ID, ClipTokenizer
from library.weights.tokenizers import (
    CLIP_G_ID,
    CLIP_G_PADDING,
    TextTokenizer,
    clip_tokenizer,
    t5_tokenizer,
    tokenizer_folders,
)
from library.weights.vae_names import VAE_PREFIX, vae_rules

log = get_logger()

CLIPS = (CLIP_L, CLIP_G)
POOLED = "{}_pooled"  # (B, width), beside the states (B, 77, width) under the encoder's own name
# folders of a pipeline, then those that may lie beside single files
TOKENIZERS = {CLIP_L: ("tokenizer",), CLIP_G: ("tokenizer_2", "tokenizer"), T5: ("tokenizer_3", "tokenizer_t5")}
CLIP_LENGTH = CHUNK + 2


class StableDiffusion3(ModelFamily):
    sheet = SHEET
    latent = LatentSpec("sd3", channels=16, factor=8, npz_suffix="_sd3.npz", npz_sized_keys=True)

    @property
    def variant(self) -> Variant:
        return self.sheet.variants[kind(self.parts.config)]

    # ---- loading

    @cached_property
    def parts(self) -> SD3Parts:
        """Headers of the files. The first use downloads what is given as a hub id."""
        return open_parts(self.options)

    @cached_property
    def clip_tokenizers(self) -> dict[str, ClipTokenizer]:
        """Tokenizers of the CLIPs of this run."""
        settings = {CLIP_L: (CLIP_ID, None), CLIP_G: (CLIP_G_ID, CLIP_G_PADDING)}
        cache = self.options.tokenizer_cache_dir
        return {
            name: clip_tokenizer(self._tokenizer_places(name), cache=cache, hub_id=hub_id, padding=padding)
            for name, (hub_id, padding) in settings.items()
            if name in self.encoders
        }

    @cached_property
    def t5_tokenizer(self) -> TextTokenizer:
        return t5_tokenizer(self._tokenizer_places(T5), cache=self.options.tokenizer_cache_dir)

    def _tokenizer_places(self, name: str) -> list[Path]:
        return tokenizer_folders(self.parts.path, self.parts.places[name], names=TOKENIZERS[name])

    def check(self) -> None:
        config, encoders = self.parts.config, self.parts.encoders
        problems = []
        clip = sum(part.width for name, part in encoders.items() if name in CLIPS)
        whole = all(name in encoders for name in CLIPS)
        if clip > config["pooled_projection_dim"] or (whole and clip < config["pooled_projection_dim"]):
            problems.append(
                f"{self.parts.path} reads CLIP states {config['pooled_projection_dim']} wide, the given encoders make "
                f"{clip}: {self._sources(CLIPS)} belong to another model"
            )
        if T5 in encoders and encoders[T5].width != config["joint_attention_dim"]:
            problems.append(
                f"{self._sources((T5,))} makes states {encoders[T5].width} wide, {self.parts.path} reads "
                f"{config['joint_attention_dim']}: SD3 needs T5-XXL"
            )
        for name, tokenizer in self.tokenizers.items():
            tokens, vocabulary = len(tokenizer.tokenizer), encoders[name].vocabulary
            if tokens > vocabulary:
                problems.append(f"--{name}: the tokenizer has {tokens} tokens, the encoder only {vocabulary}")
        raise_problems(problems)
        missing = [f"--{name}" for name in ENCODERS if name not in encoders]
        if missing:
            log.warning(
                f"{self.parts.path}: trained without {' and '.join(missing)}, zeros take the place of its states"
            )

    def _sources(self, names: Sequence[str]) -> str:
        return " and ".join(str(self.parts.encoders[n].part.file.path) for n in names if n in self.parts.encoders)

    @property
    def tokenizers(self) -> dict[str, ClipTokenizer | TextTokenizer]:
        return {**self.clip_tokenizers, **({T5: self.t5_tokenizer} if T5 in self.encoders else {})}

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(self.parts.encoders)

    def load_denoiser(
        self, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain"
    ) -> nn.Module:
        denoiser = super().load_denoiser(dtype, device, storage=storage)
        if self.options.pos_emb_random_crop_rate:
            use_random_crop(denoiser, self.options.pos_emb_random_crop_rate)
        if self.options.enable_scaled_pos_embed:
            config = self.parts.config
            use_scaled_positions(denoiser, config["sample_size"] // config["patch_size"])
        return denoiser

    # ---- text

    def tokenize(self, captions: list[str]) -> Tokens:
        found = [tokenizer(captions, max_tokens=CHUNK, weighted=False, name=name)
                 for name, tokenizer in self.clip_tokenizers.items()]  # fmt: skip
        if T5 in self.encoders:
            found.append(self.t5_tokenizer(captions, length=self.options.t5xxl_max_token_length, name=T5))
        return Tokens(
            ids={name: ids for tokens in found for name, ids in tokens.ids.items()},
            lengths={name: lengths for tokens in found for name, lengths in tokens.lengths.items()},
            truncated=found[-1].truncated,  # T5's, which reads most of a caption
        )

    @property
    def token_limit(self) -> int:
        return self.t5_tokenizer.limit(self.options.t5xxl_max_token_length) if T5 in self.encoders else CHUNK

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        if T5 in self.encoders:
            return self.t5_tokenizer.count(captions)
        return next(iter(self.clip_tokenizers.values())).count(captions, weighted=False)

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        cond: Cond = {}
        for name, encoder in self.parts.encoders.items():
            length = self.options.t5xxl_max_token_length if name == T5 else CLIP_LENGTH
            cond[name] = torch.zeros(count, length, encoder.width, dtype=dtype)
            if name in CLIPS:
                cond[POOLED.format(name)] = torch.zeros(count, encoder.width, dtype=dtype)
            elif self.options.apply_t5_attn_mask:
                cond[MASK] = torch.ones(count, length, dtype=torch.bool)
        return cond

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """Outputs of an encoder: the input of a CLIP's last layer with its pooled state, or T5's states."""
        if name == T5:
            return encode_t5(encoder, tokens, masked=self.options.apply_t5_attn_mask)
        ids = on_device(tokens.ids[name], next(encoder.parameters()).device)[:, 0]
        output = encoder(ids, output_hidden_states=True)
        states = output.hidden_states[-2]
        if self.options.apply_lg_attn_mask:
            is_end = ids == self.clip_tokenizers[name].end
            is_padding = is_end.cumsum(1) - is_end.long() > 0  # after the first end token
            states = states.masked_fill(is_padding.unsqueeze(-1), 0)
        return {name: states, POOLED.format(name): output.text_embeds}

    def drop_text(self, cond: Cond, seed: int) -> Cond:
        """Zeros in place of an encoder's states, drawn for every sample and encoder."""
        rates = {
            CLIP_L: self.options.clip_l_dropout_rate,
            CLIP_G: self.options.clip_g_dropout_rate,
            T5: self.options.t5_dropout_rate,
        }
        cond = dict(cond)
        for name in [name for name, rate in rates.items() if rate and name in cond]:
            generator = torch_generator(seed, name, device=cond[name].device)
            draws = torch.rand(len(cond[name]), device=cond[name].device, generator=generator)
            kept = draws >= rates[name]
            for key in [key for key in (name, POOLED.format(name)) if key in cond]:
                shape = (-1, *[1] * (cond[key].ndim - 1))
                cond[key] = torch.where(kept.view(shape), cond[key], 0)
        return cond

    def split_cond(self, cond: Cond) -> list[Cond]:
        return cut_padding(super().split_cond(cond), cond)

    # ---- pictures

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return (latents - 0.0609) * 1.5305  # of the published VAE; sd-scripts scales when it reads its cache

    # ---- training

    def objective(self, options: SD3FlowOptions, loss: LossOptions) -> FlowObjective:
        return FlowObjective(options, loss, preview_shift=constant_shift(3.0))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        context, pooled = self._conditions(cond, x_t)
        if self.options.pos_emb_random_crop_rate:
            choose_crop(denoiser, None if batch is None else batch.seed)
        # float32: the model makes its sinusoids of it before it goes on in its own precision
        steps = t.float() * 1000
        return denoiser(x_t, context, pooled, steps, return_dict=False)[0]

    def _conditions(self, cond: Cond, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 77 + T5's length, context width) and (B, pooled width), with zeros in place of what is missing."""
        config, count = self.parts.config, len(x_t)
        zeros = lambda *shape: x_t.new_zeros(count, *shape)
        missing = config["pooled_projection_dim"]
        missing -= sum(cond[POOLED.format(name)].shape[-1] for name in CLIPS if name in cond)
        states, pooled = [], []
        for name in CLIPS:
            states.append(cond[name].to(x_t.dtype) if name in cond else zeros(CLIP_LENGTH, missing))
            pooled.append(cond[POOLED.format(name)].to(x_t.dtype) if name in cond else zeros(missing))
            missing = missing if name in cond else 0  # with both missing, the first zeros are wide enough
        width, length = config["joint_attention_dim"], self.options.t5xxl_max_token_length
        clip = torch.cat(states, -1)
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        t5 = cond[T5].to(x_t.dtype) if T5 in cond else zeros(0, width)
        t5 = F.pad(t5, (0, 0, 0, length - t5.shape[1]))
        return torch.cat([clip, t5], 1), torch.cat(pooled, -1)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return [*denoiser.get_submodule("transformer_blocks").children()]

    def modulations(self, denoiser: nn.Module) -> tuple[nn.Module, list[nn.Linear]] | None:
        names = ("norm1.linear", "norm1_context.linear")
        linears = [block.get_submodule(name) for block in self.blocks(denoiser) for name in names]
        return denoiser.get_submodule("time_text_embed"), linears  # type: ignore[return-value]

    # ---- full training

    def learning_parts(self, options: SD3FineTuneOptions) -> dict[str, float | None]:
        rates = {
            CLIP_L: (options.train_text_encoder, options.learning_rate_te1),
            CLIP_G: (options.train_text_encoder, options.learning_rate_te2),
            T5: (options.train_t5xxl, options.learning_rate_te3),
        }
        asked = {name: rate for name, (learns, rate) in rates.items() if learns and rate != 0}
        missing = [f"--{name}" for name in asked if name not in self.encoders]
        if missing:
            raise UserError(f"what is to learn is not there: give {' and '.join(missing)}, or learning rate 0 for it")
        return {"denoiser": None, **asked}

    def denoiser_groups(self, denoiser: nn.Module, options: SD3FineTuneOptions, rate: float) -> list[dict[str, Any]]:
        blocks, count = self.blocks(denoiser), options.num_last_block_to_freeze or 0
        if count > len(blocks):
            raise UserError(f"--num_last_block_to_freeze {count}: the model has {len(blocks)} blocks")
        frozen = {parameter for block in blocks[len(blocks) - count :] for parameter in block.parameters()}
        learning = [parameter for parameter in denoiser.parameters() if parameter not in frozen]
        return [{"params": learning, "lr": rate, "name": "denoiser"}]

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        """MMDiT and VAE in `path`; each text encoder that learned beside it, in `<name>_<encoder>.safetensors`."""
        vae = self.parts.vae.load(None, "cpu")
        mmdit = Published(denoiser.state_dict(), mmdit_rules(denoiser), MMDIT_PREFIX)
        whole: Any = ChainMap(mmdit, Published(vae.state_dict(), vae_rules(vae), VAE_PREFIX))  # type: ignore[arg-type]
        save_tensors(path, whole, form.metadata, dtype=form.dtype, hashes=False)
        for name, encoder in encoders.items():
            beside = path.with_name(f"{path.stem}_{name}{path.suffix}")
            save_tensors(beside, self.parts.encoders[name].published(encoder), {}, dtype=form.dtype, hashes=False)

    def text_settings(self, name: str) -> tuple[Any, ...]:
        if name == T5:
            return self.options.apply_t5_attn_mask, self.options.t5xxl_max_token_length
        return (self.options.apply_lg_attn_mask,)
