# SPDX-License-Identifier: Apache-2.0
"""The text encoder: a two-layer CLIP text model, first taught to tell the words of a caption apart.

An untrained text encoder next to an untrained denoiser gave pictures that ignore the caption; after a
few seconds of classification the two train well together.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .draw import COLOURS, THINGS, Scene, random_scene
from .tokenizer import CONTEXT_LENGTH
from .training import Budget, RunningMean, Schedule, Stopwatch, progress_line

HIDDEN_SIZE = 96


@dataclass(frozen=True)
class TextOptions:
    learning_rate: float = 2e-3
    batch_size: int = 32
    captions: int = 12000
    pad_positions: int = 5  # read per caption besides the end token
    embedding_deviation: float = 0.25  # larger than CLIP's .02, so that words differ from the first step
    seed: int = 9


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The CLIP text model, 0.26 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=HIDDEN_SIZE,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids of captions, N x 77."""
    encoded = tokenizer(list(captions), padding="max_length", max_length=CONTEXT_LENGTH, truncation=True)
    return torch.tensor(encoded["input_ids"])


def _labels(scenes: Sequence[Scene]) -> Tensor:
    """Class indices of thing, colour and background in captions, N x 3. "No background" is a class."""
    things, colours = list(THINGS), list(COLOURS)
    backgrounds = [colours.index(s.background) if "background" in s.caption else len(colours) for s in scenes]
    rows = [(things.index(s.thing), colours.index(s.colour), b) for s, b in zip(scenes, backgrounds)]
    return torch.tensor(rows)


def _end_and_pad_positions(ends: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of the end token and of `count` random pad tokens after it, N x (1 + count)."""
    share = torch.rand(len(ends), count, generator=generator)
    behind = ends[:, None] + (share * (CONTEXT_LENGTH - ends[:, None])).long()
    return torch.cat([ends[:, None], behind], dim=1)


def pretrain_text_encoder(
    tokenizer: CLIPTokenizer, budget: Budget, options: TextOptions = TextOptions()
) -> CLIPTextModel:
    """Train the encoder: temporary linear heads must read a caption's meaning from its end and pad tokens."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    encoder = build_text_encoder(tokenizer)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=options.embedding_deviation)
    rng = random.Random(options.seed)
    scenes = [random_scene(rng) for _ in range(options.captions)]
    ids, labels = token_ids(tokenizer, [scene.caption for scene in scenes]), _labels(scenes)
    ends = (ids == tokenizer.eos_token_id).float().argmax(1)
    heads = nn.ModuleList(nn.Linear(HIDDEN_SIZE, count) for count in (len(THINGS), len(COLOURS), len(COLOURS) + 1))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    schedule, watch, losses = (
        Schedule(options.learning_rate, warmup_steps=20, decay_share=0.8),
        Stopwatch(),
        RunningMean(),
    )
    samples = step = 0
    while (fraction := budget.fraction(samples, watch.minutes)) < 1:
        chosen = torch.randint(0, len(ids), (options.batch_size,), generator=generator)
        positions = _end_and_pad_positions(ends[chosen], options.pad_positions, generator)
        states = encoder(ids[chosen]).last_hidden_state  # N 77 c
        read = states.gather(1, positions[:, :, None].expand(-1, -1, HIDDEN_SIZE))  # N p c
        loss = sum(
            F.cross_entropy(head(read).flatten(0, 1), label.repeat_interleave(positions.shape[1]))
            for head, label in zip(heads, labels[chosen].T)
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, fraction)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, samples = step + 1, samples + options.batch_size
        losses.add(loss.item())
        if step % 100 == 0:
            print(progress_line("text", samples, watch.minutes, fraction, loss=losses.read()), flush=True)
    return encoder.eval()
