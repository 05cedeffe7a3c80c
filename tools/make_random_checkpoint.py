# SPDX-License-Identifier: Apache-2.0
"""Write a Stable Diffusion 1.x / 2.x model with random weights: for tests of size and speed, not for pictures.

    python tools/make_random_checkpoint.py --version 1 --layout both --output /tmp/sd15

writes /tmp/sd15/model.safetensors (published names) with /tmp/sd15/tokenizer beside it, and the same weights as a
folder, /tmp/sd15/diffusers. Full size is 1.07 billion parameters. Memory holds one tensor at a time.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.families.sd.model import published_tensors, unused_open_clip
from library.families.sd.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, unet_rules
from library.families.sd.parts import build_text_encoder, build_unet
from library.io.tensor_file import header_bytes, ordered_names
from library.key_tables import Rule, publish
from library.rng import torch_generator
from library.weights.clip_names import clip_rules, open_clip_rules
from library.weights.kl_vae import build_vae
from library.weights.loading import build_empty, shipped_config
from library.weights.vae_names import VAE_PREFIX, vae_rules
from tools.base_model.tokenizer import save_tokenizer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# sizes that a reader derives from the shapes (library.families.sd.parts): widths are multiples of 32
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "text_encoder": {
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "bos_token_id": 1022,
        "eos_token_id": 1023,
        "pad_token_id": 0,
    },
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class RandomModel:
    """Modules on the meta device, and the source of their tensors' values."""

    modules: Mapping[str, nn.Module]  # folder name -> module on the meta device
    version: int
    seed: int

    def value(self, part: str, name: str) -> Tensor:
        """One tensor, which depends on seed, part and name only, so that all layouts contain the same weights."""
        return random_values(self.modules[part].state_dict()[name], self.seed, part, name)

    def published_value(self, part: str, rule: Rule) -> Tensor:
        (tensor,) = publish({name: self.value(part, name) for name in rule.ours}, [rule]).values()
        return tensor


def random_values(like: Tensor, *seed: int | str) -> Tensor:
    """Normal values of variance 1 / inputs for matrices and convolutions, ones and zeros for norms and biases."""
    if like.ndim < 2:
        return torch.full(like.shape, 1.0 if str(seed[-1]).endswith("weight") else 0.0, dtype=like.dtype)
    scale = 1 / math.sqrt(math.prod(like.shape[1:]))
    return torch.empty(like.shape).normal_(0, scale, generator=torch_generator(*seed)).to(like.dtype)


def make_model(version: int, *, tiny: bool, dtype: torch.dtype, seed: int) -> RandomModel:
    config = shipped_config(f"sd{version}")
    builders = {"unet": build_unet, "vae": build_vae, "text_encoder": build_text_encoder}
    modules = {}
    for part, build in builders.items():
        values = {**config[part], **(TINY[part] if tiny else {})}
        if tiny and part == "unet" and version == 2:
            values["attention_head_dim"] = [1, 1]
        # the `to` of diffusers warns about casts
        modules[part] = nn.Module.to(build_empty(functools.partial(build, values)), dtype)
    return RandomModel(modules, version, seed)


def write_tensors(path: Path, shapes: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
    """A .safetensors file, tensor by tensor. shapes: name -> tensor on the meta device, of the file's dtype."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header_bytes(shapes, {"format": "pt"}))
        for name in ordered_names(shapes):
            file.write(make(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_single(model: RandomModel, path: Path) -> None:
    """Write the single file with published names."""
    text = (OPEN_CLIP_PREFIX, open_clip_rules)
    layout: dict[str, tuple[str, Callable[[nn.Module], tuple[Rule, ...]]]] = {
        "unet": (UNET_PREFIX, unet_rules),
        "vae": (VAE_PREFIX, vae_rules),
        "text_encoder": text if model.version == 2 else (CLIP_PREFIX, clip_rules),
    }
    places = {
        prefix + rule.published: (part, rule)
        for part, (prefix, rules) in layout.items()
        for rule in rules(model.modules[part])
    }
    with torch.device("meta"):
        shapes = published_tensors(*(model.modules[p] for p in ("unet", "text_encoder", "vae")), version=model.version)
        if model.version == 2:
            shapes |= unused_open_clip(shapes)

    def make(name: str) -> Tensor:
        if name in places:
            return model.published_value(*places[name])
        return random_values(shapes[name], model.seed, name)

    write_tensors(path, shapes, make)


def write_folder(model: RandomModel, folder: Path) -> None:
    """Write the diffusers folder, without its tokenizer."""
    for part, module in model.modules.items():
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        shapes = module.state_dict()
        write_tensors(folder / part / f"{name}.safetensors", shapes, functools.partial(model.value, part))
        module_with_config: Any = module
        if part == "text_encoder":
            module_with_config.config.save_pretrained(folder / part)
        else:
            module_with_config.save_config(folder / part)
    scheduler = {
        "_class_name": "DDPMScheduler",
        "clip_sample": False,
        **shipped_config(f"sd{model.version}")["scheduler"],
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2), encoding="utf-8")


def write_tokenizer(folder: Path, source: Path | None) -> None:
    """A copy of a real tokenizer, or the small one of the built-in model, whose tokens are a part of the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    else:
        save_tokenizer(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--version", type=int, choices=(1, 2), default=1, help="Stable Diffusion 1.x or 2.x")
    parser.add_argument("--layout", choices=("single", "diffusers", "both"), default="both")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 MB with the same structure")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a CLIP tokenizer to copy; without it a small one is made"
    )
    options = parser.parse_args(argv)
    model = make_model(options.version, tiny=options.tiny, dtype=DTYPES[options.dtype], seed=options.seed)
    if options.layout != "diffusers":
        write_single(model, options.output / "model.safetensors")
        write_tokenizer(options.output / "tokenizer", options.tokenizer)
        print(options.output / "model.safetensors")
    if options.layout != "single":
        write_folder(model, options.output / "diffusers")
        write_tokenizer(options.output / "diffusers" / "tokenizer", options.tokenizer)
        print(options.output / "diffusers")


if __name__ == "__main__":
    main()
