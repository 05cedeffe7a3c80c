# SPDX-License-Identifier: Apache-2.0
"""Tiny models of real classes for all tests: the layout of Stable Diffusion, random weights, a second to make."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

LAYERS = 3  # of the text encoder: --clip_skip 2 is neither its first nor its last
WIDTH = 32  # of the text states
WORDS = ("cat", "dog", "red", "blue", "photo", "sks", "girl", "star")


def make_tiny_sd(
    folder: Path,
    *,
    version: int = 1,
    layout: str = "diffusers",
    v_prediction: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A tiny SD 1.x or 2.x model below `folder`. Returns what goes into --pretrained_model_name_or_path.

    layout "diffusers": `folder` itself, as StableDiffusionPipeline.save_pretrained lays it out, tokenizer inside.
    layout "single": `folder/model.safetensors` in published names, with the tokenizer in `folder/tokenizer`.
    Latents are 4 channels at an eighth of the size; 64 x 64 pictures are enough. Equal seeds give equal weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unet, vae, encoder = (module.to(dtype) for module in tiny_modules(version=version, seed=seed))
    write_tokenizer(folder / "tokenizer", padding="!" if version == 2 else None)
    if layout == "single":
        return _write_single(folder / "model.safetensors", unet, vae, encoder, version)
    from diffusers import DDPMScheduler

    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction" if v_prediction else "epsilon",
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _write_single(path: Path, unet: nn.Module, vae: nn.Module, encoder: nn.Module, version: int) -> Path:
    from safetensors.torch import save_file

    from library.families.sd.model import published_tensors, unused_open_clip

    tensors = published_tensors(unet, encoder, vae, version=version)
    if version == 2:
        tensors |= unused_open_clip(tensors)
    save_file(tensors, path)
    return path


def tiny_modules(*, version: int = 1, seed: int = 0):
    """(U-Net, VAE, text encoder) with random weights. The global random state is left as it was."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = len(vocabulary()[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=(1, 1) if version == 2 else 8,
            use_linear_projection=version == 2,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            scaling_factor=0.18215,
        )
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=1,
                hidden_act="gelu" if version == 2 else "quick_gelu",
                projection_dim=WIDTH,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
                pad_token_id=0 if version == 2 else words - 1,
            )
        )
    return unet.eval(), vae.eval(), encoder.eval()


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte symbols ("!" is 0), the WORDS as single tokens, start and end token; and the merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            merges[left, right] = None
            left += right
    tokens = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, list(merges)


def write_tokenizer(folder: Path, *, padding: str | None = None) -> Path:
    """A CLIP tokenizer whose only whole words are WORDS; anything else falls into letters."""
    from transformers import CLIPTokenizer

    words, merges = vocabulary()
    pad = padding or "<|endoftext|>"
    CLIPTokenizer(vocab=words, merges=merges, model_max_length=77, pad_token=pad).save_pretrained(folder)
    return folder
