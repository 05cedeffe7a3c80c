# SPDX-License-Identifier: Apache-2.0
"""HunyuanImage-2.1 for the contract tests: tiny models of real classes, and the loss in plain formulas."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from library.types import Batch
from tests.families.base import Case
from tests.tiny_text import make_qwen25_vl, published, write
from tests.trainers.helpers import Adapters

HEADS, HEAD, TEXT_WIDTH, GLYPH_WIDTH = 8, 16, 32, 24  # narrower, 64 numbers of a token do not pass
WIDTH = HEADS * HEAD
QWEN_LAYERS = 4  # of which the last two are not read
DOUBLE, SINGLE = 2, 2  # blocks
DEEP = 3, 4  # the fewest of which some can be swapped
SHIFT = 5.0
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
FOLDERS = {"text_encoder": "text_encoder", "text_encoder_2": "byt5", "vae": "vae"}  # of a pipeline -> options
FILES = {"byt5": "byt5_small_glyphxl", "text_encoder": "qwen25_vl", "vae": "hunyuan_vae"}


def make(
    folder: Path, *, layout: str = "files", seed: int = 0, distilled: bool = False,
    blocks: tuple[int, int] = (DOUBLE, SINGLE), **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """The options that name a tiny model below `folder`. Equal seeds give equal weights.

    layout "files": denoiser, text encoders and VAE in files of their own under published names; "split": q, k and v
    apart; "comfy": in ComfyUI's names, below `model.diffusion_model.`; "diffusers": a pipeline's folder; "transformer":
    the folder of the transformer, and folders of the others; "file": the denoiser in diffusers' names in one file.
    The pipeline's folder is always there, as `folder/pipeline`. settings: further options.
    """
    folder = Path(folder)
    modules = write_pipeline(folder / "pipeline", seed, distilled, blocks)
    if layout == "diffusers":
        return settings | {"pretrained_model_name_or_path": folder / "pipeline"}
    if layout == "transformer":
        options = {option: folder / "pipeline" / name for name, option in FOLDERS.items()}
        return settings | options | {"pretrained_model_name_or_path": folder / "pipeline" / "transformer"}
    tensors = {
        "hunyuanimage": published_denoiser(modules["transformer"], layout),
        FILES["text_encoder"]: {f"model.{n}": t for n, t in published(modules["text_encoder"]).items()},
        FILES["byt5"]: t5_file(modules["text_encoder_2"]),
        FILES["vae"]: published_vae(modules["vae"]),
    }
    for name, content in tensors.items():
        save_file({key: tensor.clone() for key, tensor in content.items()}, folder / f"{name}.safetensors")
    (folder / "tokenizer").symlink_to(folder / "pipeline" / "tokenizer")
    options = {option: folder / f"{name}.safetensors" for option, name in FILES.items()}
    return settings | options | {"pretrained_model_name_or_path": folder / "hunyuanimage.safetensors"}


def write_pipeline(folder: Path, seed: int, distilled: bool, blocks: tuple[int, int]) -> dict[str, nn.Module]:
    """As HunyuanImagePipeline.save_pretrained lays it out. Returns the modules by folder name."""
    folder.mkdir(parents=True, exist_ok=True)
    denoiser: Any = tiny_denoiser(seed, distilled=distilled, double=blocks[0], single=blocks[1])
    vae: Any = tiny_vae(seed)
    denoiser.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    qwen = make_qwen25_vl(
        folder, seed=seed + 5, width=TEXT_WIDTH, layers=QWEN_LAYERS, layout="folder", name="text_encoder"
    )
    byt5 = write(folder, tiny_byt5(seed), folder, name="text_encoder_2", layout="folder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanImagePipeline"}), encoding="utf-8")
    return {"transformer": denoiser, "vae": vae, "text_encoder": qwen.module, "text_encoder_2": byt5.module}


def tiny_denoiser(seed: int = 0, *, distilled: bool = False, double: int = DOUBLE, single: int = SINGLE) -> nn.Module:
    """The global random state is left as it was."""
    from diffusers import HunyuanImageTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = HunyuanImageTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            num_layers=double,
            num_single_layers=single,
            num_refiner_layers=2,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=GLYPH_WIDTH,
            rope_axes_dim=(HEAD // 2, HEAD // 2),
            guidance_embeds=distilled,
            use_meanflow=distilled,
        )
        for name, parameter in denoiser.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # a table that mixes up two norms must show
                nn.init.normal_(parameter, 1.0, 0.2)
    return denoiser.eval()


def tiny_vae(seed: int = 0) -> nn.Module:
    """32 x 32 pixels are a latent pixel of 64 channels, as in the real one."""
    from diffusers import AutoencoderKLHunyuanImage

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=64,
            block_out_channels=(32, 32, 32, 32, 64, 128),
            layers_per_block=1,
            spatial_compression_ratio=32,
            sample_size=384,
            scaling_factor=0.75289,
        )
    return vae.eval()


def tiny_byt5(seed: int = 0) -> nn.Module:
    """Bytes, and a few tokens more, as the one that was trained on glyphs has."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=270, d_model=GLYPH_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 9)
        module = T5EncoderModel(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 1.0, 0.3)
    return module


def t5_file(module: nn.Module) -> dict[str, Tensor]:
    """One name for the embedding, as in ComfyUI's file."""
    return {name: t for name, t in module.state_dict().items() if name != "encoder.embed_tokens.weight"}


def published_denoiser(denoiser: nn.Module, layout: str = "files") -> dict[str, Tensor]:
    """The tensors of a file of this layout."""
    from library.families.hunyuan_image.parts import denoiser_rules
    from library.key_tables import publish

    naming = {"files": "published", "file": "diffusers"}.get(layout, layout)
    prefix = "model.diffusion_model." if layout == "comfy" else ""
    return publish(denoiser.state_dict(), denoiser_rules(denoiser, naming), prefix)


def published_vae(vae: nn.Module) -> dict[str, Tensor]:
    from library.key_tables import publish
    from library.weights.hunyuan_vae import vae_rules

    return publish(vae.state_dict(), vae_rules(vae))


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return next(p for p in (path, path.parent, path.parent / "pipeline") if (p / "model_index.json").is_file())


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: noise levels (shift), then noise."""
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImageTransformer2DModel

    folder = pipeline_of(options)
    denoiser = HunyuanImageTransformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderKLHunyuanImage.from_pretrained(folder / "vae")
    with torch.no_grad():
        texts = encoded(folder, batch.captions)
        posterior = vae.encode(batch.pixels).latent_dist
    draws = [torch.randn(64, *posterior.mean.shape[2:], generator=torch.Generator().manual_seed(seed))
             for seed in batch.latent_seeds]  # fmt: skip
    latents = (posterior.mean + posterior.std * torch.stack(draws)) * 0.75289

    s = torch.sigmoid(torch.randn(len(latents), generator=generator))
    s = SHIFT * s / (1 + (SHIFT - 1) * s)
    noise = torch.randn(latents.shape, generator=generator)
    level = s.view(-1, 1, 1, 1)
    more = {**texts, "timestep": s * 1000}
    if denoiser.config.guidance_embeds:  # the velocity is the mean over no time, at guidance 1
        more |= {"guidance": torch.full_like(s, 1000.0), "timestep_r": s * 1000}
    weights = with_lora(denoiser, adapters)
    answer = functional_call(denoiser, weights, ((1 - level) * latents + level * noise,), more).sample
    return F.mse_loss(answer, noise - latents)


def encoded(folder: Path, captions: list[str]) -> dict[str, Tensor]:
    """What the transformer is called with for these captions, padded to the lengths that the pipeline has."""
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, Qwen2Tokenizer, T5EncoderModel

    start = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    qwen = Qwen2_5_VLTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    hidden = len(tokenizer(start).input_ids)
    call = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer([f"{start}{text}<|im_end|>" for text in captions], max_length=hidden + 64, **call)
    states = qwen(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True).hidden_states[-3]
    texts = {"encoder_hidden_states": states[:, hidden:], "encoder_attention_mask": tokens.attention_mask[:, hidden:]}

    byt5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
    glyphs = torch.zeros(len(captions), 128, GLYPH_WIDTH)
    mask = torch.zeros(len(captions), 128, dtype=torch.int64)
    for i, caption in enumerate(captions):
        words = [straight or curly for straight, curly in re.findall(r'"(.*?)"|“(.*?)”', caption)]
        if words:
            text = ". ".join(f'Text "{word}"' for word in words) + ". "
            tokens = ByT5Tokenizer()(text, max_length=128, **call)
            glyphs[i], mask[i] = (
                byt5(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0],
                tokens.attention_mask,
            )
    return texts | {"encoder_hidden_states_2": glyphs, "encoder_attention_mask_2": mask}


PARTS = {
    "single_transformer_blocks.{i}.attn.to_q": ("single_blocks.{i}.linear1", 0),
    "single_transformer_blocks.{i}.attn.to_k": ("single_blocks.{i}.linear1", 1),
    "single_transformer_blocks.{i}.attn.to_v": ("single_blocks.{i}.linear1", 2),
    "single_transformer_blocks.{i}.proj_mlp": ("single_blocks.{i}.linear1", 3),
    "single_transformer_blocks.{i}.proj_out": ("single_blocks.{i}.linear2", None),
    "single_transformer_blocks.{i}.norm.linear": ("single_blocks.{i}.modulation.linear", None),
    "transformer_blocks.{i}.attn.to_out.0": ("double_blocks.{i}.img_attn_proj", None),
    "transformer_blocks.{i}.attn.to_add_out": ("double_blocks.{i}.txt_attn_proj", None),
    "transformer_blocks.{i}.ff.net.0.proj": ("double_blocks.{i}.img_mlp.fc1", None),
    "transformer_blocks.{i}.ff.net.2": ("double_blocks.{i}.img_mlp.fc2", None),
    "transformer_blocks.{i}.ff_context.net.0.proj": ("double_blocks.{i}.txt_mlp.fc1", None),
    "transformer_blocks.{i}.ff_context.net.2": ("double_blocks.{i}.txt_mlp.fc2", None),
    "transformer_blocks.{i}.norm1.linear": ("double_blocks.{i}.img_mod.linear", None),
    "transformer_blocks.{i}.norm1_context.linear": ("double_blocks.{i}.txt_mod.linear", None),
    **{f"transformer_blocks.{{i}}.attn.to_{n}": ("double_blocks.{i}.img_attn_qkv", k) for k, n in enumerate("qkv")},
    **{
        f"transformer_blocks.{{i}}.attn.add_{n}_proj": ("double_blocks.{i}.txt_attn_qkv", k)
        for k, n in enumerate("qkv")
    },
}
PLACES = {ours.format(i=i): (theirs.format(i=i), row) for ours, (theirs, row) in PARTS.items() for i in range(4)}


def with_lora(module: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down; the parts of a fused layer have their rows of the product."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for path, (published_path, part) in PLACES.items():
        name = f"lora_unet_{published_path}".replace(".", "_")
        if f"{name}.alpha" not in adapters:
            continue
        alpha, down, up = (adapters[f"{name}.{end}"] for end in ("alpha", "lora_down.weight", "lora_up.weight"))
        delta = up @ down * (alpha / len(down))
        if part is not None:
            delta = (*delta[: 3 * WIDTH].split(WIDTH), delta[3 * WIDTH :])[part]
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
    return weights


USUAL = {"timestep_sampling": "shift", "text_encoder_max_token_length": 64}
DISTILLED = partial(make, distilled=True)
CASES: dict[str, Case] = {
    "hunyuan_image": Case("hunyuan_image", make, loss, USUAL, make_deep=partial(make, blocks=DEEP)),
    # every caption quotes something, so that ByT5 has its part in it
    "hunyuan_image distilled": Case(
        "hunyuan_image",
        DISTILLED,
        loss,
        {**USUAL, "caption_prefix": 'a sign "red star",'},
        make_deep=partial(DISTILLED, blocks=DEEP),
    ),
}
