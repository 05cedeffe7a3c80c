# SPDX-License-Identifier: Apache-2.0
"""Anima.

An image model of CircleStone Labs and Comfy Org: the transformer of NVIDIA's Cosmos-Predict2 2B
(https://github.com/nvidia-cosmos/cosmos-predict2) in the latent space of Qwen-Image's autoencoder. Captions are
tokenized twice: the LLM adapter, a small transformer, computes the model's text input from token ids of T5 and states
of Qwen3-0.6B. Trained with flow matching.
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
from library.errors import raise_problems
from library.families.anima import ANIMA, SHEET
from library.families.anima.names import CONDITIONER
from library.families.anima.options import AnimaFineTuneOptions, AnimaFlowOptions
from library.families.anima.parts import LATENT_CHANNELS, QWEN3, AnimaParts, denoiser_rules, open_parts
from library.families.family import ModelFamily
from library.io.checkpoint import CheckpointForm, save_tensors
from library.key_tables import Published
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens
from library.weights import qwen_vae
from library.weights.language_models import language_states
from library.weights.tokenizers import TextTokenizer, qwen_tokenizer, t5_tokenizer, tokenizer_folders

T5 = "t5"  # ids of T5's tokenizer: (B, length) int64
MASKS = {QWEN3: "qwen3_mask", T5: "t5_mask"}
PREVIEW_SHIFT = 3.0  # shift of the noise levels, at every size, as in the model's own scheduler
HUB = (("Qwen/Qwen3-0.6B", ""),)
PREFIX = "net."  # of saved files
# part of the denoiser -> substrings of the names of its weights
GROUPS = {
    "llm_adapter": (f"{CONDITIONER}.",),
    "self_attn": (".attn1.",),
    "cross_attn": (".attn2.",),
    "mlp": (".ff.",),
    "mod": (".norm1.", ".norm2.", ".norm3.", ".norm_out."),
}


class Anima(ModelFamily):
    sheet = SHEET
    latent = LatentSpec("anima", channels=LATENT_CHANNELS, factor=8, npz_suffix="_anima.npz", npz_sized_keys=True)
    variant = ANIMA
    text_masks = MASKS

    # ---- loading

    @cached_property
    def parts(self) -> AnimaParts:
        """The parts of the model, from file headers only. The first access downloads what is given as a hub id."""
        return open_parts(self.options)

    @cached_property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        folders = tokenizer_folders(self.parts.path, self.parts.qwen3_path, names=("tokenizer",))
        return {QWEN3: qwen_tokenizer(folders, cache=self.options.tokenizer_cache_dir, hub=HUB)}

    @cached_property
    def t5(self) -> TextTokenizer:
        """T5's tokenizer. T5 itself is not used: the LLM adapter has an embedding for its ids."""
        given = self.options.t5_tokenizer_path
        names = ("t5_tokenizer", "tokenizer_t5")
        folders = tokenizer_folders(self.parts.path, self.parts.qwen3_path, names=names)
        return t5_tokenizer(
            [Path(given)] if given else folders, cache=None if given else self.options.tokenizer_cache_dir
        )

    def check(self) -> None:
        parts, qwen3 = self.parts, self.parts.encoders[QWEN3]
        problems = []
        if qwen3.width != parts.conditioner["source_dim"]:
            problems.append(
                f"{parts.qwen3_path} gives states {qwen3.width} wide, and {parts.path} reads "
                f"{parts.conditioner['source_dim']}: Anima needs Qwen3-0.6B"
            )
        if parts.conditioner["target_dim"] != parts.config["text_embed_dim"]:
            problems.append(
                f"the LLM adapter gives states {parts.conditioner['target_dim']} wide, and the transformer of "
                f"{parts.path} reads {parts.config['text_embed_dim']}: they belong to different models"
            )
        for tokenizer, vocabulary, whose in (
            (self.tokenizers[QWEN3], qwen3.vocabulary, f"the text encoder {parts.qwen3_path}"),
            (self.t5, parts.conditioner["target_vocab_size"], f"the LLM adapter of {parts.path}"),
        ):
            if len(tokenizer.tokenizer) > vocabulary:
                problems.append(
                    f"{tokenizer.folder}: this tokenizer has {len(tokenizer.tokenizer)} tokens, {whose} only "
                    f"{vocabulary}; it belongs to another model"
                )
        raise_problems(problems)

    # ---- text

    def tokenize(self, captions: list[str]) -> Tokens:
        """Ids of both tokenizers."""
        qwen3 = self.tokenizers[QWEN3](captions, length=self.options.qwen3_max_token_length, name=QWEN3)
        t5 = self.t5(captions, length=self.options.t5_max_token_length, name=T5)
        cut = tuple(sorted({*qwen3.truncated, *t5.truncated}))
        return Tokens(qwen3.ids | t5.ids, qwen3.lengths | t5.lengths, truncated=cut)

    @property
    def token_limit(self) -> int:
        """The smaller of the two tokenizers' limits."""
        own, t5 = self.options.qwen3_max_token_length, self.options.t5_max_token_length
        return min(self.tokenizers[QWEN3].limit(own), self.t5.limit(t5))

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Counts of the tokenizer that makes more tokens of a caption, most often T5's."""
        return [max(counts) for counts in zip(self.tokenizers[QWEN3].count(captions), self.t5.count(captions))]

    def blank_cond(self, count: int, dtype: torch.dtype = torch.float32) -> Cond:
        own, t5 = self.options.qwen3_max_token_length, self.options.t5_max_token_length
        states = torch.zeros(count, own, self.parts.conditioner["source_dim"], dtype=dtype)
        masks = {name: torch.ones(count, length, dtype=torch.bool) for name, length in ((QWEN3, own), (T5, t5))}
        cond = {QWEN3: states, T5: torch.zeros(count, t5, dtype=torch.int64)}
        return cond | {MASKS[name]: mask for name, mask in masks.items()}

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        """The last states of Qwen3 and the ids of T5, each cut to the longest caption of the batch.

        An empty caption becomes one state of zeros: attention to it gives zero, like attention to nothing.
        """
        device = next(encoder.parameters()).device
        longest = {name: max(1, *tokens.lengths[name]) for name in MASKS}
        ids = {name: on_device(tokens.ids[name][:, :length], device) for name, length in longest.items()}
        words = tokens.mask(QWEN3, longest[QWEN3], device)
        seen = words.clone()
        seen[:, 0] = True
        [states] = language_states(encoder, ids[QWEN3], seen, (-1,))  # after the last norm
        states = states.masked_fill(~words.unsqueeze(-1), 0)
        cond = {QWEN3: states, T5: ids[T5], MASKS[QWEN3]: seen, MASKS[T5]: tokens.mask(T5, longest[T5], device)}
        return self.without_idle_masks(cond, {name: [max(1, n) for n in tokens.lengths[name]] for name in MASKS})

    # ---- pictures

    def encode_image(self, vae: nn.Module, pixels: Tensor, seeds: list[int]) -> Tensor:
        return qwen_vae.encode(vae, pixels)

    def decode_latent(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return qwen_vae.decode(vae, latents)

    @classmethod
    def scale_legacy(cls, latents: Tensor) -> Tensor:
        return latents  # sd-scripts' autoencoder normalises them itself

    # ---- training

    def objective(self, options: AnimaFlowOptions, loss: LossOptions) -> FlowObjective:
        return FlowObjective(options, loss, preview_shift=constant_shift(PREVIEW_SHIFT))

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """n - x0 for x_t = (1 - t) x0 + t n. The model reads t in float32."""
        masks = (cond.get(MASKS[name]) for name in (QWEN3, T5))
        return denoiser(x_t, t.float(), cond[QWEN3], cond[T5], *masks)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return [*denoiser.get_submodule("transformer.transformer_blocks").children()]

    # ---- full training

    def denoiser_groups(self, denoiser: nn.Module, options: AnimaFineTuneOptions, rate: float) -> list[dict[str, Any]]:
        """One group for each part with its own learning rate. The LLM adapter learns only if it has one."""
        rates = {name: getattr(options, f"{name}_lr") for name in GROUPS}
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in denoiser.named_parameters():
            group = next((group for group, marks in GROUPS.items() if any(mark in name for mark in marks)), "denoiser")
            found.setdefault(
                group if rates.get(group) is not None or group == "llm_adapter" else "denoiser", []
            ).append(parameter)
        given = {"denoiser": rate} | {name: own or 0.0 for name, own in rates.items()}
        return [{"params": own, "lr": given[name], "name": name} for name, own in found.items()]

    # ---- files

    def save(self, denoiser: nn.Module, encoders: Mapping[str, nn.Module], path: Path, form: CheckpointForm) -> None:
        """Write transformer and LLM adapter into one file, as ComfyUI and sd-scripts expect."""
        tensors = Published(denoiser.state_dict(), denoiser_rules(denoiser), PREFIX)
        tables = {f"{PREFIX}pos_embedder.{name}": table for name, table in self._position_tables().items()}
        whole: Any = ChainMap(tables, tensors)  # type: ignore[arg-type]
        save_tensors(path, whole, form.metadata, dtype=form.dtype, hashes=False)

    def _position_tables(self) -> dict[str, Tensor]:
        """Tables of the positions that readers expect in files: indices, and exponents of the rotations."""
        config = self.parts.config
        head, (frames, *sides) = config["attention_head_dim"], config["max_size"]
        space = head // 6 * 2
        shares = {"spatial": space, "temporal": head - 2 * space}
        found = {f"dim_{name}_range": torch.arange(0, size, 2).float() / size for name, size in shares.items()}
        return {"seq": torch.arange(max(frames, *(side // 2 for side in sides))).float()} | found

    def text_settings(self, name: str) -> tuple[Any, ...]:
        return self.options.qwen3_max_token_length, self.options.t5_max_token_length, self.t5.fingerprint()
