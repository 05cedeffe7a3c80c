# SPDX-License-Identifier: Apache-2.0
"""Tiny text encoders of real classes with their tokenizers, as bare files and as transformers folders."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
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


def make_qwen3(folder: Path, *, seed: int = 4, width: int = 32, layers: int = 4, **settings: Any) -> Made:
    """A tiny Qwen3 below `folder`: `qwen3.safetensors` and `tokenizer`. Four heads, two of them for keys."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(head_dim=8, rope_parameters=ROPE, **_decoder(width, layers, 4, 2, qwen_tokens()))
    return _write_decoder(folder, Qwen3Model, config, seed, write_qwen_tokenizer, {"name": "qwen3", **settings})


def make_qwen25_vl(folder: Path, *, seed: int = 5, width: int = 32, layers: int = 4, **settings: Any) -> Made:
    """The text part of a tiny Qwen2.5-VL below `folder`: `qwen25_vl.safetensors` and `tokenizer`. One key head."""
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    sections = {**ROPE, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLTextConfig(
        rms_norm_eps=1e-6,
        max_window_layers=layers,
        rope_parameters=sections,
        **_decoder(width, layers, 4, 1, qwen_tokens()),
    )
    return _write_decoder(
        folder, Qwen2_5_VLTextModel, config, seed, write_qwen_tokenizer, {"name": "qwen25_vl", **settings}
    )


def make_mistral(
    folder: Path, *, seed: int = 6, width: int = 32, layers: int = 4, text: str = "", **settings: Any
) -> Made:
    """A tiny Mistral below `folder`: `mistral.safetensors` and `tokenizer`. Four heads, one of them for keys.

    text: as in `write_mistral_tokenizer`.
    """
    from transformers import MistralConfig, MistralModel

    rope = {**ROPE, "rope_theta": 1e9}
    own = _decoder(width, layers, 4, 1, mistral_tokens(text))
    config = MistralConfig(head_dim=16, rms_norm_eps=1e-5, sliding_window=None, rope_parameters=rope, **own)
    return _write_decoder(
        folder, MistralModel, config, seed, partial(write_mistral_tokenizer, text=text), {"name": "mistral", **settings}
    )


ROPE = {"rope_type": "default", "rope_theta": 1e6}


def _decoder(width: int, layers: int, heads: int, keys: int, tokens: dict[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }


def _write_decoder(
    folder: Path, model: Any, config: Any, seed: int, write_tokenizer: Any, settings: dict[str, Any]
) -> Made:
    place = write_tokenizer(Path(folder) / settings.pop("tokenizer", "tokenizer"))
    return write(folder, _random(model, config, seed), place, **settings)


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


QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MISTRAL_MARKS = ("<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")


def _byte_tokens(marks: tuple[str, ...], merges: list[tuple[str, str]]) -> dict[str, int]:
    """Bytes as byte-level BPE writes them, what is merged of them, and marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges), *marks]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def qwen_tokens() -> dict[str, int]:
    return _byte_tokens(QWEN_MARKS, gemma2_merges())


def mistral_tokens(text: str = "") -> dict[str, int]:
    return _byte_tokens(MISTRAL_MARKS, _mistral_merges(text))


def _mistral_merges(text: str) -> list[tuple[str, str]]:
    return [*_merges(f"\u0120{word}" for word in text.split()), *gemma2_merges()]


def write_qwen_tokenizer(folder: Path) -> Path:
    """Real tokens of the chat, and the padding token that Qwen has."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=qwen_tokens(),
        merges=gemma2_merges(),
        extra_special_tokens=list(QWEN_MARKS[1:]),  # type: ignore[arg-type]
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_mistral_tokenizer(folder: Path, text: str = "") -> Path:
    """It begins every text with <s> where it is asked for special tokens. text: its words are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = mistral_tokens(text)
    own = Tokenizer(models.BPE(vocab=tokens, merges=_mistral_merges(text)))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens=list(MISTRAL_MARKS[3:]),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def gemma2_merges() -> list[tuple[str, str]]:
    return _merges(WORDS)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """All that whole words are merged from, letter by letter."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
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
