# SPDX-License-Identifier: Apache-2.0
"""Write FLUX.1 files with random weights of the real width: for measurements of memory and time, not for pictures.

    python tools/make_random_flux.py --double 3 --single 4 --t5_layers 2 --output /tmp/flux

writes /tmp/flux/flux.safetensors (3.3 GB in bfloat16), clip_l, t5xxl and ae beside it, and tokenizers. The whole model
has 19 double and 38 single blocks, T5 24 layers. Memory holds one tensor at a time.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.families.flux.parts import build_flux, denoiser_rules
from library.key_tables import Rule, publish
from library.weights.kl_vae import build_vae
from library.weights.loading import build_empty, shipped_config
from library.weights.vae_names import vae_rules
from tools.base_model.tokenizer import save_tokenizer
from tools.make_random_checkpoint import DTYPES, random_values, write_tensors

# a small T5 tokenizer: these are its only pieces
LETTERS = "abcdefghijklmnopqrstuvwxyz,.():0123456789"
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
TINY_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}
TINY_FLUX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
}
TINY_AE = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}


def build_clip(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def build_t5(config: dict[str, Any]) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config))


def clip_rules(module: nn.Module) -> tuple[Rule, ...]:
    """Below `text_model.`, which transformers has or has not."""
    return tuple(Rule(f"text_model.{name.removeprefix('text_model.')}", (name,)) for name in module.state_dict())


def t5_rules(module: nn.Module) -> tuple[Rule, ...]:
    """Use one embedding for both of its names."""
    return tuple(Rule(name, (name,)) for name in module.state_dict() if name != "encoder.embed_tokens.weight")


def write_part(path: Path, module: nn.Module, rules: Sequence[Rule], *, dtype: torch.dtype, seed: int) -> None:
    """Write a file with published names. Values depend on seed, file name and tensor name only."""
    state = nn.Module.to(module, dtype).state_dict()  # on the meta device; the `to` of diffusers warns about casts
    table = {rule.published: rule for rule in rules}

    def make(name: str) -> Tensor:
        values = {own: random_values(state[own], seed, path.stem, own) for own in table[name].ours}
        return publish(values, [table[name]])[name]

    write_tensors(path, publish(state, rules), make)


def write_t5_tokenizer(folder: Path) -> None:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--double", type=int, default=19, help="double blocks")
    parser.add_argument("--single", type=int, default=38, help="single blocks")
    parser.add_argument("--t5_layers", type=int, default=24, help="layers of T5")
    parser.add_argument("--schnell", action="store_true", help="without the guidance embedder")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, for tests of this tool")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--t5_tokenizer", type=Path, help="folder to copy; without it a small one is made")
    parser.add_argument("--clip_tokenizer", type=Path, help="folder to copy; without it a small one is made")
    options = parser.parse_args(argv)
    blocks = {"num_layers": options.double, "num_single_layers": options.single, "guidance_embeds": not options.schnell}
    parts: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
        "flux": (build_flux, denoiser_rules, shipped_config("flux") | blocks, TINY_FLUX),
        "clip_l": (build_clip, clip_rules, shipped_config("clip_l"), TINY_TEXT),
        "t5xxl": (build_t5, t5_rules, shipped_config("t5xxl") | {"num_layers": options.t5_layers}, TINY_T5),
        "ae": (build_vae, vae_rules, shipped_config("flux_ae"), TINY_AE),
    }
    for name, (build, rules, config, tiny) in parts.items():
        module = build_empty(functools.partial(build, {**config, **(tiny if options.tiny else {})}))
        path = options.output / f"{name}.safetensors"
        write_part(path, module, rules(module), dtype=DTYPES[options.dtype], seed=options.seed)
        print(path)
    tokenizers = {
        "tokenizer": (options.clip_tokenizer, save_tokenizer),
        "tokenizer_t5": (options.t5_tokenizer, write_t5_tokenizer),
    }
    for name, (source, make) in tokenizers.items():
        folder = options.output / name
        if source is not None:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        else:
            folder.mkdir(exist_ok=True)
            make(folder)


if __name__ == "__main__":
    main()
