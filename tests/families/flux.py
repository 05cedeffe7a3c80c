# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 and Chroma for the contract tests: tiny models of real classes, and the loss in plain formulas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from library.types import Batch
from tests.families.base import Case
from tests.tiny_text import make_clip_l, make_t5, published
from tests.trainers.helpers import Adapters

WIDTH, HEAD, TEXT_WIDTH, POOLED_WIDTH = 256, 16, 64, 32  # narrower, 64 numbers of a token do not pass
DOUBLE, SINGLE = 2, 2  # blocks
DEEP = 3, 4  # the fewest of which some can be swapped
CLASSES = {"dev": "FluxPipeline", "schnell": "FluxPipeline", "fill": "FluxFillPipeline", "chroma": "ChromaPipeline"}
# parts of a pipeline -> options that name them alone
FLUX_FOLDERS = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl", "vae": "ae"}
CHROMA_FOLDERS = {"text_encoder": "t5xxl", "vae": "ae"}
ALL_IN_ONE = {"clip_l": "text_encoders.clip_l.transformer.", "t5xxl": "text_encoders.t5xxl.transformer."}


def make(
    folder: Path, *, variant: str = "dev", layout: str = "files", seed: int = 0,
    blocks: tuple[int, int] = (DOUBLE, SINGLE), **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """The options that name a tiny "dev", "schnell", "fill" or "chroma" below `folder`. Equal seeds give equal weights.

    layout "files": denoiser, clip_l, t5xxl and ae in files of their own under published names; "comfy": the same with
    `model.diffusion_model.`; "whole": denoiser and text encoders in one such file; "diffusers": a pipeline's folder;
    "transformer": the folder of the transformer, and folders of the others; "file", "parts": the denoiser in diffusers'
    names in one file, or in three without an index; "index": in three with one.
    The pipeline's folder is always there, as `folder/pipeline`. settings: further options.
    """
    folder = Path(folder)
    modules = write_pipeline(folder / "pipeline", variant, seed, blocks)
    options: dict[str, Any] = settings | ({"model_type": variant} if variant in ("chroma", "fill") else {})
    if layout == "diffusers":
        return options | {"pretrained_model_name_or_path": folder / "pipeline"}
    names = CHROMA_FOLDERS if variant == "chroma" else FLUX_FOLDERS
    if layout == "transformer":
        options["pretrained_model_name_or_path"] = folder / "pipeline" / "transformer"
        return options | {option: folder / "pipeline" / name for name, option in names.items()}
    encoders = {names[name]: published(modules[name]) for name in names if name != "vae"}
    tensors = {"vae.safetensors": published_vae(modules["vae"])}
    options["ae"] = folder / "vae.safetensors"
    if layout != "whole":
        tensors |= {f"{name}.safetensors": encoder for name, encoder in encoders.items()}
        options |= {name: folder / f"{name}.safetensors" for name in encoders}
    tensors |= denoiser_files(modules["transformer"], layout)
    if layout == "whole":
        for name, encoder in encoders.items():
            tensors["model.safetensors"] |= {ALL_IN_ONE[name] + key: tensor for key, tensor in encoder.items()}
    for name, content in tensors.items():
        save_file({key: tensor.clone() for key, tensor in content.items()}, folder / name)
    first = next(name for name in tensors if name.startswith("model"))
    for tokenizer in (folder / "pipeline").glob("tokenizer*"):
        (folder / tokenizer.name).symlink_to(tokenizer)
    return options | {"pretrained_model_name_or_path": folder / first}


def denoiser_files(denoiser: nn.Module, layout: str) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors."""
    if layout in ("file", "parts"):
        tensors = denoiser.state_dict()
        count = 3 if layout == "parts" else 1
        parts = [{name: tensors[name] for name in list(tensors)[i::count]} for i in range(count)]
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        return {"model.safetensors": parts[0]} if count == 1 else dict(zip(names, parts, strict=True))
    prefix = "" if layout == "files" else "model.diffusion_model."
    return {"model.safetensors": {prefix + name: t for name, t in published_denoiser(denoiser).items()}}


def published_denoiser(denoiser: nn.Module) -> dict[str, Tensor]:
    """The tensors of a published file."""
    from library.families.flux.parts import denoiser_rules
    from library.key_tables import publish

    return publish(denoiser.state_dict(), denoiser_rules(denoiser))


def published_vae(vae: nn.Module) -> dict[str, Tensor]:
    from library.key_tables import publish
    from library.weights.vae_names import vae_rules

    return publish(vae.state_dict(), vae_rules(vae))


def write_pipeline(folder: Path, variant: str, seed: int, blocks: tuple[int, int]) -> dict[str, Any]:
    """As the pipeline's save_pretrained lays it out. Returns the modules by folder name."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = {"transformer": tiny_denoiser(variant, seed, double=blocks[0], single=blocks[1]), "vae": tiny_vae(seed)}
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    t5 = partial(make_t5, folder, width=TEXT_WIDTH, seed=seed + 2, layout="folder")
    if variant == "chroma":
        modules["text_encoder"] = t5(name="text_encoder", tokenizer="tokenizer").module
    else:
        modules["text_encoder"] = make_clip_l(folder, seed=seed, layout="folder", name="text_encoder").module
        modules["text_encoder_2"] = t5(name="text_encoder_2", tokenizer="tokenizer_2").module
    (folder / "model_index.json").write_text(json.dumps({"_class_name": CLASSES[variant]}), encoding="utf-8")
    return modules


def tiny_denoiser(variant: str, seed: int = 0, *, double: int = DOUBLE, single: int = SINGLE) -> Any:
    """Random weights. The global random state is left as it was."""
    from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

    sizes: dict[str, Any] = {
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": HEAD,
        "num_attention_heads": WIDTH // HEAD,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if variant == "chroma":
            guidance = {"approximator_num_channels": 16, "approximator_hidden_dim": 24, "approximator_layers": 2}
            denoiser: Any = ChromaTransformer2DModel(**sizes, **guidance)
        else:
            inputs = {"in_channels": 384, "out_channels": 64} if variant == "fill" else {}
            denoiser = FluxTransformer2DModel(
                **sizes, **inputs, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=variant != "schnell"
            )
        for name, parameter in denoiser.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # a table that mixes up two norms must show
                parameter.data += 0.2 * torch.randn(parameter.shape)
    return denoiser.eval()


def tiny_vae(seed: int = 0) -> Any:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    return vae.eval()


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return next(p for p in (path, path.parent, path.parent / "pipeline") if (p / "model_index.json").is_file())


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: noise levels (shift), then noise."""
    from diffusers import AutoencoderKL, ChromaTransformer2DModel, FluxTransformer2DModel

    folder, is_chroma = pipeline_of(options), options.get("model_type") == "chroma"
    denoiser = (ChromaTransformer2DModel if is_chroma else FluxTransformer2DModel).from_pretrained(
        folder / "transformer"
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    texts = (chroma_texts if is_chroma else flux_texts)(folder, options, batch.captions, adapters)
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
    draws = [torch.randn(16, *posterior.mean.shape[2:], generator=torch.Generator().manual_seed(seed))
             for seed in batch.latent_seeds]  # fmt: skip
    latents = (posterior.mean + posterior.std * torch.stack(draws) - 0.1159) * 0.3611

    shift = options["discrete_flow_shift"]
    s = torch.sigmoid(torch.randn(len(latents), generator=generator))
    s = shift * s / (1 + (shift - 1) * s)
    noise = torch.randn(latents.shape, generator=generator)
    level = s.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    weights = with_fused_lora(denoiser, adapters)
    with torch.no_grad():
        shown = [(vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611 for pixels in batch.reference_pixels]
    more = fill_tokens(vae, batch) if options.get("model_type") == "fill" else None
    answer = forward(denoiser, weights, noisy, s, texts, options, shown, more)
    if batch.masks is None:
        return F.mse_loss(answer, noise - latents)
    counted = F.interpolate(batch.masks, size=latents.shape[2:], mode="area")
    return (counted * (answer - noise + latents) ** 2).mean()


def fill_tokens(vae: Any, batch: Batch) -> Tensor:
    """What FLUX.1 Fill is shown beside the noisy latents, by the pipeline's own functions."""
    from diffusers import FluxFillPipeline as Pipeline

    height, width = batch.pixels.shape[2:]
    mask = (batch.masks > 0.5).float()
    with torch.no_grad():
        latents = (vae.encode(batch.pixels * (1 - mask)).latent_dist.mode() - 0.1159) * 0.3611
        pipeline = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)),
                                   vae_scale_factor=8, _pack_latents=Pipeline._pack_latents)  # fmt: skip
        packed, shown = Pipeline.prepare_mask_latents(
            pipeline, mask, latents, len(mask), 16, 1, height, width, latents.dtype, latents.device, None
        )
    return torch.cat([shown, packed], -1)


def forward(
    denoiser: Any, weights: dict[str, Tensor], noisy: Tensor, s: Tensor, texts: dict[str, Any], options: dict[str, Any],
    shown: Sequence[Tensor] = (), further: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The model's output for noisy latents, by diffusers alone.

    shown: latents of Kontext's reference pictures. further: channels of Fill's tokens, (B, N, 320).
    """
    rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
    tokens = F.unfold(noisy, 2, stride=2).transpose(1, 2)  # channel by channel, as the model has it
    tokens = tokens if further is None else torch.cat([tokens, further], -1)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    more = {
        **texts,
        "timestep": s,
        "img_ids": places,
        "txt_ids": torch.zeros(texts["encoder_hidden_states"].shape[1], 3),
    }
    for latents in shown:
        own = torch.cartesian_prod(torch.ones(1), *(torch.arange(n // 2).float() for n in latents.shape[2:]))
        tokens = torch.cat([tokens, F.unfold(latents, 2, stride=2).transpose(1, 2)], 1)
        more["img_ids"] = torch.cat([more["img_ids"], own])
    if "attention_mask" in more:  # pictures are behind the text
        more["attention_mask"] = F.pad(more["attention_mask"], (0, tokens.shape[1]), value=True)
        if "pooled_projections" in more:  # FLUX.1 has no such argument
            more["joint_attention_kwargs"] = {"attention_mask": more.pop("attention_mask")[:, None, None]}
    if denoiser.config.get("guidance_embeds"):
        more["guidance"] = torch.full_like(s, options["guidance_scale"])
    answer = functional_call(denoiser, weights, (tokens,), more).sample[:, : rows * columns]
    return F.fold(answer.transpose(1, 2), (2 * rows, 2 * columns), 2, stride=2)


def flux_texts(folder: Path, options: dict[str, Any], captions: list[str], adapters: Adapters) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    clip, t5 = (
        model.from_pretrained(folder / name)
        for model, name in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
    )
    call = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(captions, max_length=77, **call).input_ids
    tokens = T5Tokenizer.from_pretrained(folder / "tokenizer_2")(
        captions, max_length=options["t5xxl_max_token_length"], **call
    )
    inner = "" if "text_model" in dict(clip.named_children()) else "text_model."
    weights = with_fused_lora(clip, adapters, f"lora_te1_{inner}")
    texts = {"pooled_projections": functional_call(clip, weights, (ids,)).pooler_output}
    mask = {"attention_mask": tokens.attention_mask} if options.get("apply_t5_attn_mask") else {}
    states = functional_call(t5, with_fused_lora(t5, adapters, "lora_te3_"), (tokens.input_ids,), mask)
    return texts | {"encoder_hidden_states": states.last_hidden_state} | {k: v.bool() for k, v in mask.items()}


def chroma_texts(folder: Path, options: dict[str, Any], captions: list[str], adapters: Adapters) -> dict[str, Any]:
    """The model sees the words and one token of the padding."""
    from transformers import T5EncoderModel, T5Tokenizer

    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder")
    tokens = T5Tokenizer.from_pretrained(folder / "tokenizer")(
        captions,
        max_length=options["t5xxl_max_token_length"],
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    weights = with_fused_lora(t5, adapters, "lora_te3_")
    states = functional_call(t5, weights, (tokens.input_ids,), {"attention_mask": tokens.attention_mask})
    seen = F.pad(tokens.attention_mask, (1, 0), value=1)[:, :-1].bool()
    return {"encoder_hidden_states": states.last_hidden_state, "attention_mask": seen}


PARTS = {
    "x_embedder": ("img_in", None),
    "single_transformer_blocks.{i}.attn.to_q": ("single_blocks.{i}.linear1", 0),
    "single_transformer_blocks.{i}.attn.to_k": ("single_blocks.{i}.linear1", 1),
    "single_transformer_blocks.{i}.attn.to_v": ("single_blocks.{i}.linear1", 2),
    "single_transformer_blocks.{i}.proj_mlp": ("single_blocks.{i}.linear1", 3),
    "single_transformer_blocks.{i}.proj_out": ("single_blocks.{i}.linear2", None),
    "single_transformer_blocks.{i}.norm.linear": ("single_blocks.{i}.modulation.lin", None),
    "transformer_blocks.{i}.attn.to_out.0": ("double_blocks.{i}.img_attn.proj", None),
    "transformer_blocks.{i}.attn.to_add_out": ("double_blocks.{i}.txt_attn.proj", None),
    "transformer_blocks.{i}.ff.net.0.proj": ("double_blocks.{i}.img_mlp.0", None),
    "transformer_blocks.{i}.ff.net.2": ("double_blocks.{i}.img_mlp.2", None),
    "transformer_blocks.{i}.ff_context.net.0.proj": ("double_blocks.{i}.txt_mlp.0", None),
    "transformer_blocks.{i}.ff_context.net.2": ("double_blocks.{i}.txt_mlp.2", None),
    "transformer_blocks.{i}.norm1.linear": ("double_blocks.{i}.img_mod.lin", None),
    "transformer_blocks.{i}.norm1_context.linear": ("double_blocks.{i}.txt_mod.lin", None),
    **{f"transformer_blocks.{{i}}.attn.to_{n}": ("double_blocks.{i}.img_attn.qkv", k) for k, n in enumerate("qkv")},
    **{
        f"transformer_blocks.{{i}}.attn.add_{n}_proj": ("double_blocks.{i}.txt_attn.qkv", k)
        for k, n in enumerate("qkv")
    },
}
PLACES = {ours.format(i=i): (theirs.format(i=i), row) for ours, (theirs, row) in PARTS.items() for i in range(8)}


def with_fused_lora(module: nn.Module, adapters: Adapters, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down; the parts of a fused layer have their rows of the product."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for path, _ in module.named_modules():
        published, part = PLACES.get(path, (path, None))
        name = prefix + published.replace(".", "_") if not prefix.endswith(".") else f"{prefix}{published}"
        name = name.replace(".", "_")
        if f"{name}.alpha" not in adapters:
            continue
        alpha, down, up = (adapters[f"{name}.{end}"] for end in ("alpha", "lora_down.weight", "lora_up.weight"))
        delta = up @ down * (alpha / len(down))
        if part is not None:
            delta = (*delta[: 3 * WIDTH].split(WIDTH), delta[3 * WIDTH :])[part]
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
    return weights


USUAL = {
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.1582,
    "model_prediction_type": "raw",
    "guidance_scale": 1.0,
    "t5xxl_max_token_length": 24,
}
SLOWER = {"unet_lr": 5e-3}
CASES: dict[str, Case] = {
    "flux": Case("flux", make, loss, USUAL, overfit=SLOWER, make_deep=partial(make, blocks=DEEP)),
}
