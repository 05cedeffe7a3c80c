# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 for the contract tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from library.types import Batch
from tests.families.base import Case
from tests.tiny import WORDS, vocabulary, write_tokenizer
from tests.trainers.helpers import Adapters

T5_LENGTH = 24  # --t5xxl_max_token_length of all runs
CLIP_WIDTHS = {"clip_l": 32, "clip_g": 48}
CONTEXT = 96  # width of T5's states; wider than both CLIPs together, as in the real model
FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


# ---- tiny models ----------------------------------------------------------------------------------------------------


def make(
    folder: Path, *, layout: str = "diffusers", kind: str = "medium", seed: int = 0, layers: int | None = None
) -> dict[str, Any]:
    """A tiny model below `folder`, and the options that name it. kind: "medium" or "5-medium".

    layout "diffusers": a pipeline in `folder/pipeline`. "single": one file with everything, in published names.
    "files": a file with the MMDiT in bare published names, and a file for each other part. "transformer": diffusers'
    file of the transformer, and those files. The last three have tokenizers beside them, and the pipeline too.
    """
    modules = tiny_modules(kind=kind, seed=seed, layers=layers)
    write_pipeline(folder / "pipeline", modules)
    options: dict[str, Any] = {"t5xxl_max_token_length": T5_LENGTH}
    if layout == "diffusers":
        return options | {"pretrained_model_name_or_path": folder / "pipeline"}
    write_tokenizers(folder)
    return options | write_files(folder, modules, layout)


def tiny_modules(*, kind: str = "medium", seed: int = 0, layers: int | None = None) -> dict[str, Any]:
    """MMDiT, VAE and text encoders with random weights, by the names of their options ("denoiser", "vae", ...)."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    is_35 = kind == "5-medium"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: dict[str, Any] = {
            "denoiser": SD3Transformer2DModel(
                sample_size=16,
                num_layers=layers or (3 if is_35 else 2),
                attention_head_dim=16 if is_35 else 64,
                num_attention_heads=8 if is_35 else 2,
                joint_attention_dim=CONTEXT,
                caption_projection_dim=128,
                pooled_projection_dim=sum(CLIP_WIDTHS.values()),
                pos_embed_max_size=24,
                dual_attention_layers=(0, 1) if is_35 else (),
                qk_norm="rms_norm" if is_35 else None,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(32, 32, 32, 32),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            **{name: tiny_clip(name) for name in CLIP_WIDTHS},
            "t5xxl": tiny_t5(),
        }
        for module in modules.values():
            for name, parameter in module.named_parameters():
                if name.endswith("bias") or "norm" in name:  # nothing is at a value at which a mistake would not show
                    nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
    return {name: module.eval() for name, module in modules.items()}


def tiny_clip(name: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    words, width = len(vocabulary()[0]), CLIP_WIDTHS[name]
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=1,
        hidden_act="gelu" if name == "clip_g" else "quick_gelu",
        projection_dim=width,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )
    return CLIPTextModelWithProjection(config)


def tiny_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_vocabulary()),
        d_model=CONTEXT,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces with their scores: letters, and the WORDS as a whole."""
    letters = [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz,.():0123456789"]
    words = [(f"▁{word}", -1.0) for word in WORDS]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters, *words]


def write_tokenizers(folder: Path) -> None:
    from transformers import T5Tokenizer

    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2", padding="!")
    T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0).save_pretrained(folder / "tokenizer_3")


def write_pipeline(folder: Path, modules: dict[str, Any]) -> None:
    """As StableDiffusion3Pipeline.save_pretrained lays it out."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    modules["denoiser"].save_pretrained(folder / "transformer")
    modules["vae"].save_pretrained(folder / "vae")
    for name, part in FOLDERS.items():
        modules[name].save_pretrained(folder / part)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    write_tokenizers(folder)
    index = {"_class_name": "StableDiffusion3Pipeline", **CLASSES}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def write_files(folder: Path, modules: dict[str, Any], layout: str) -> dict[str, Any]:
    """The model as files in published names; returns their options."""
    from safetensors.torch import save_file

    tensors = {name: published(name, modules[name]) for name in modules}
    model = folder / "model.safetensors"
    if layout == "single":
        prefixes = {"denoiser": "model.diffusion_model.", "vae": "first_stage_model."}
        prefixes |= {name: f"text_encoders.{name}.transformer." for name in FOLDERS}
        whole = {prefixes[name] + key: value for name, part in tensors.items() for key, value in part.items()}
        save_file(whole, model)
        return {"pretrained_model_name_or_path": model}
    denoiser = modules["denoiser"].state_dict() if layout == "transformer" else tensors["denoiser"]
    save_file(denoiser, model)
    options: dict[str, Any] = {"pretrained_model_name_or_path": model}
    for name in ("vae", *FOLDERS):
        options[name] = folder / f"{name}.safetensors"
        save_file(tensors[name], options[name])
    return options


def published(name: str, module: Any) -> dict[str, Tensor]:
    """The tensors of a part under the names that files of it have."""
    from library.families.sd3.parts import mmdit_rules
    from library.key_tables import publish
    from library.weights.vae_names import vae_rules

    state = module.state_dict()
    if name == "denoiser":
        return publish(state, mmdit_rules(module))
    if name == "vae":
        return publish(state, vae_rules(module))
    return {key: value.clone() for key, value in state.items()}


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return path if path.is_dir() else path.parent / "pipeline"


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: noise levels, then noise."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    folder = pipeline_of(options)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    denoiser = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    states, pooled = [], []
    for number, name in enumerate(("text_encoder", "text_encoder_2"), start=1):
        encoder = CLIPTextModelWithProjection.from_pretrained(folder / name)
        tokenizer = CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(batch.captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        weights = with_lora(encoder, adapters, partial(encoder_layer, number))
        output = functional_call(encoder, weights, (ids.input_ids,), {"output_hidden_states": True})
        states.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_3")
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
    length = options["t5xxl_max_token_length"]
    ids = tokenizer(batch.captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        t5_states = t5(ids.input_ids).last_hidden_state
        posterior = vae.encode(batch.pixels).latent_dist
    clip = torch.cat(states, -1)
    context = torch.cat([F.pad(clip, (0, t5_states.shape[-1] - clip.shape[-1])), t5_states], 1)

    shape = posterior.mean.shape[1:]
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in batch.latent_seeds]
    x0 = (posterior.mean + posterior.std * torch.stack(draws) - 0.0609) * 1.5305
    t = (torch.rand(len(x0), generator=generator) * 1000).floor()
    noise = torch.randn(x0.shape, generator=generator)
    sigma = (t / 1000).view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    weights = with_lora(denoiser, adapters, published_layer)
    pred = functional_call(denoiser, weights, (x_t, context, torch.cat(pooled, -1), t)).sample
    return F.mse_loss(x_t - sigma * pred, x0)


def encoder_layer(number: int, path: str) -> str:
    """The name of one of a text encoder's layers in adapter files."""
    return f"lora_te{number}_{path}".replace(".", "_")


LAYERS = {
    "transformer_blocks.": "joint_blocks.",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    **{f"{attn}.to_{part}": f"x_block.{attn}.qkv" for attn in ("attn", "attn2") for part in "qkv"},
}


def published_layer(path: str) -> str:
    """The name of one of the MMDiT's layers in adapter files; q, k and v have one name."""
    _, _, rest = path.partition(".")
    number, _, layer = rest.partition(".")
    return f"lora_unet_joint_blocks.{number}.{LAYERS.get(layer, layer)}".replace(".", "_")


def with_lora(module: nn.Module, adapters: Adapters, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down; of q, k and v each has a third of the fused layer's rows.

    The last block's modulation of the context has (shift, scale) in files and (scale, shift) in diffusers.
    """
    weights = dict(module.state_dict())
    for path, layer in module.named_modules():
        if f"{(name := name_of(path))}.alpha" not in adapters:
            continue
        alpha, down, up = (adapters[f"{name}.{part}"] for part in ("alpha", "lora_down.weight", "lora_up.weight"))
        delta = up @ down * (alpha / len(down))
        if name.endswith("_qkv"):
            order = [part for part in "qkv" if f"{part}_proj" in path or f"to_{part}" in path]
            delta = delta.chunk(3)["qkv".index(order[0])]
        elif path.endswith("norm1_context.linear") and layer.weight.shape[0] == 2 * layer.weight.shape[1]:
            delta = delta.roll(len(delta) // 2, 0)
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
    return weights


WHOLE = {"network_args": ["emb_dims=[16,16,16,16,16,16]"]}  # the embedders and the final layer too
CASES: dict[str, Case] = {
    "sd3": Case("sd3", make, loss, overfit=WHOLE, make_deep=lambda folder: make(folder, layers=4)),
    "sd35": Case("sd3", lambda folder: make(folder, layout="single", kind="5-medium"), loss, overfit=WHOLE),
}
