# SPDX-License-Identifier: Apache-2.0
"""Tiny text encoders of real classes with their tokenizers, as bare files and as transformers folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import WORDS, vocabulary, write_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz,.():0123456789"


class Made(NamedTuple):
    """What a maker wrote."""

    path: Path  # a .safetensors file, or a folder
    tokenizer: Path  # folder
    module: nn.Module  # what it was written from, float32, in evaluation mode


def make_clip_l(folder: Path, *, projection: bool = False, seed: int = 0, **settings: Any) -> Made:
    """A tiny CLIP-L below `folder`: `clip_l.safetensors` and `tokenizer`.

    projection: a CLIPTextModelWithProjection. settings: layout, name, tokenizer, dtype, prefix as in `write`; width.
    """
    settings = {"name": "clip_l", "tokenizer": "tokenizer", **settings}
    return _make_clip(folder, "quick_gelu", None, projection, seed, **settings)


def make_clip_g(folder: Path, *, projection: bool = True, seed: int = 1, **settings: Any) -> Made:
    """A tiny CLIP-G below `folder`: `clip_g.safetensors` and `tokenizer_2`. Wider than CLIP-L by a half."""
    settings = {"name": "clip_g", "tokenizer": "tokenizer_2", "width": 48, **settings}
    return _make_clip(folder, "gelu", "!", projection, seed, **settings)


def _make_clip(
    folder: Path,
    activation: str,
    padding: str | None,
    projection: bool,
    seed: int,
    *,
    width: int = 32,
    layers: int = 3,
    tokenizer: str,
    **settings: Any,
) -> Made:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = len(vocabulary()[0])
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=0 if padding else words - 1,
    )
    module = _random(CLIPTextModelWithProjection if projection else CLIPTextModel, config, seed)
    return write(folder, module, write_tokenizer(Path(folder) / tokenizer, padding=padding), **settings)


def make_t5(folder: Path, *, seed: int = 2, width: int = 64, layers: int = 2, **settings: Any) -> Made:
    """A tiny T5 v1.1 below `folder`: `t5xxl.safetensors` and `tokenizer_t5`."""
    from transformers import T5Config, T5EncoderModel

    settings = {"name": "t5xxl", "tokenizer": "tokenizer_t5", **settings}
    place = write_t5_tokenizer(Path(folder) / settings.pop("tokenizer"))
    config = T5Config(
        vocab_size=len(t5_pieces()),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return write(folder, _random(T5EncoderModel, config, seed), place, **settings)


def make_gemma2(folder: Path, *, seed: int = 3, width: int = 48, layers: int = 3, **settings: Any) -> Made:
    """A tiny Gemma 2 below `folder`: `gemma2.safetensors` and `tokenizer`. Four heads, one of them for keys."""
    from transformers import Gemma2Config, Gemma2Model

    settings = {"name": "gemma2", "tokenizer": "tokenizer", **settings}
    place = write_gemma2_tokenizer(Path(folder) / settings.pop("tokenizer"))
    config = Gemma2Config(
        vocab_size=len(gemma2_tokens()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    return write(folder, _random(Gemma2Model, config, seed), place, **settings)


def _random(model: Any, config: Any, seed: int) -> nn.Module:
    """With weights that are no ones and zeros anywhere. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = model(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return module


def write(
    folder: Path,
    module: nn.Module,
    tokenizer: Path,
    *,
    name: str,
    layout: str = "file",
    dtype: torch.dtype = torch.float32,
    prefix: str | None = None,
) -> Made:
    """layout "file": `<name>.safetensors` in the names of ComfyUI's files; "folder": `<name>/` of save_pretrained.

    prefix: before every name of a file, in place of CLIP's `text_model.` level where that would come first.
    """
    folder = Path(folder)
    if layout == "folder":
        copy.deepcopy(module).to(dtype).save_pretrained(folder / name)  # type: ignore[operator]
        return Made(folder / name, tokenizer, module)
    tensors = {f"{prefix or ''}{key}": tensor.to(dtype).clone() for key, tensor in published(module).items()}
    save_file(tensors, folder / f"{name}.safetensors")
    return Made(folder / f"{name}.safetensors", tokenizer, module)


def published(module: nn.Module) -> dict[str, Tensor]:
    """The names of ComfyUI's files: CLIP's below `text_model.`, whatever transformers calls them."""
    tensors = module.state_dict()
    if "CLIP" not in type(module).__name__:
        return tensors
    kept = ("text_model.", "text_projection.")
    return {name if name.startswith(kept) else f"text_model.{name}": tensor for name, tensor in tensors.items()}


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def t5_pieces() -> list[tuple[str, float]]:
    """SentencePiece pieces with scores; WORDS are whole, anything else falls into letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return special + [("▁", -2.0)] + [(c, -3.0) for c in LETTERS] + [(f"▁{word}", -1.0) for word in WORDS]


def write_t5_tokenizer(folder: Path) -> Path:
    from transformers import T5Tokenizer

    T5Tokenizer(vocab=t5_pieces(), extra_ids=0).save_pretrained(folder)
    return folder


def gemma2_tokens() -> dict[str, int]:
    """Special tokens, letters, bytes, and WORDS with all that they are merged from."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [left + right for left, right in gemma2_merges()]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def gemma2_merges() -> list[tuple[str, str]]:
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for letter in word[1:]:
            merges[left, letter] = None
            left += letter
    return list(merges)


def write_gemma2_tokenizer(folder: Path) -> Path:
    """With <bos> before every caption, as the published one has it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    tokens = gemma2_tokens()
    tokenizer = GemmaTokenizer(vocab=tokens, merges=gemma2_merges())  # type: ignore[arg-type]
    bos = ("<bos>", tokens["<bos>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[bos]
    )
    tokenizer.save_pretrained(folder)
    return folder
