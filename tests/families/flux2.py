# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 for the contract tests: tiny models of real classes, and the loss in plain formulas."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from tests.tiny_text import make_mistral, make_qwen3
from tests.trainers.helpers import Adapters

WIDTH, HEAD, TEXT_WIDTH = 256, 16, 32
DOUBLE, SINGLE = 2, 2  # blocks
LAYERS = {"klein": 29, "dev": 31}  # of the text encoders: two more than are read
LENGTH = {"klein": 48, "dev": 72}  # tokens of a text
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def make(
    folder: Path, *, variant: str = "klein", layout: str = "files", seed: int = 0,
    blocks: tuple[int, int] = (DOUBLE, SINGLE), **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """The options that name a tiny "klein" or "dev" below `folder`. Equal seeds give equal weights.

    layout "files": model, text_encoder and ae in files of their own under published names; "comfy": the same with the
    prefix and names of ComfyUI's files; "whole": all in one such file; "diffusers": a pipeline's folder;
    "transformer": the folder of the transformer, and folders of the others; "file": the model in diffusers' names.
    The pipeline's folder is always there, as `folder/pipeline`. settings: further options.
    """
    folder = Path(folder)
    modules = write_pipeline(folder / "pipeline", variant, seed, blocks)
    options = {"text_encoder_max_token_length": LENGTH[variant], **settings}
    if layout == "diffusers":
        return options | {"pretrained_model_name_or_path": folder / "pipeline"}
    if layout == "transformer":
        names = {"pretrained_model_name_or_path": "transformer", "text_encoder": "text_encoder", "ae": "vae"}
        return options | {option: folder / "pipeline" / name for option, name in names.items()}
    (folder / "tokenizer").symlink_to(folder / "pipeline" / "tokenizer")
    prefix = "" if layout in ("files", "file") else "model.diffusion_model."
    denoiser = modules["transformer"].state_dict() if layout == "file" else published_denoiser(modules["transformer"])
    encoder, vae = modules["text_encoder"].state_dict(), published_vae(modules["vae"], inside=layout != "file")
    if layout == "comfy":
        vae = modules["vae"].state_dict()
    contents = {
        "pretrained_model_name_or_path": {prefix + name: tensor for name, tensor in denoiser.items()},
        "text_encoder": {f"model.{name}": tensor for name, tensor in encoder.items()},
        "ae": vae,
    }
    if layout == "whole":
        name = "qwen3_4b" if variant == "klein" else "mistral3_24b"
        whole = contents["pretrained_model_name_or_path"] | {f"vae.{key}": tensor for key, tensor in vae.items()}
        whole |= {f"text_encoders.{name}.transformer.model.{key}": tensor for key, tensor in encoder.items()}
        contents = {"pretrained_model_name_or_path": whole}
    for option, content in contents.items():
        options[option] = folder / f"{option}.safetensors"
        save_file({key: tensor.clone() for key, tensor in content.items()}, options[option])
    return options


def published_shapes(width: int, double: int, single: int, text: int, guidance: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file, by the modules of https://github.com/black-forest-labs/flux2."""
    names: dict[str, tuple[int, ...]] = {"img_in": (width, 128), "txt_in": (width, text)}
    for embedder in ("time_in", "guidance_in") if guidance else ("time_in",):
        names |= {f"{embedder}.in_layer": (width, 256), f"{embedder}.out_layer": (width, width)}
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            names |= {f"{block}_attn.qkv": (3 * width, width), f"{block}_attn.proj": (width, width)}
            names |= {f"{block}_mlp.0": (6 * width, width), f"{block}_mlp.2": (width, 3 * width)}
            names |= {f"{block}_attn.norm.{name}_norm": (128,) for name in ("query", "key")}
    for i in range(single):
        block = f"single_blocks.{i}"
        names |= {f"{block}.linear1": (9 * width, width), f"{block}.linear2": (width, 4 * width)}
        names |= {f"{block}.norm.{name}_norm": (128,) for name in ("query", "key")}
    names |= {f"double_stream_modulation_{side}.lin": (6 * width, width) for side in ("img", "txt")}
    names |= {"single_stream_modulation.lin": (3 * width, width)}
    names |= {"final_layer.linear": (128, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    return {f"{name}.{'scale' if len(shape) == 1 else 'weight'}": shape for name, shape in names.items()}


PUBLISHED = {  # variant -> arguments of `published_shapes`
    "klein-4b": (3072, 5, 20, 7680, False),
    "klein-9b": (4096, 8, 24, 12288, False),
    "dev": (6144, 8, 48, 15360, True),
}


def published_denoiser(denoiser: nn.Module) -> dict[str, Tensor]:
    """The tensors of a published file."""
    from library.families.flux2.parts import denoiser_rules
    from library.key_tables import publish

    return publish(denoiser.state_dict(), denoiser_rules(denoiser))


def published_vae(vae: nn.Module, inside: bool = True) -> dict[str, Tensor]:
    """inside: the convolutions around the latents belong to encoder and decoder, as in the original file."""
    from library.key_tables import publish
    from library.weights.flux2_vae import COUNTER, _published_rules

    return publish(vae.state_dict(), _published_rules(vae, inside)) | {COUNTER: torch.tensor(7)}


def write_pipeline(folder: Path, variant: str, seed: int, blocks: tuple[int, int]) -> dict[str, Any]:
    """As the pipeline's save_pretrained lays it out. Returns the modules by folder name."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    folder.mkdir(parents=True, exist_ok=True)
    modules = {"transformer": tiny_denoiser(variant, seed, *blocks), "vae": tiny_vae(seed)}
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    words = partial(make_mistral, text=SYSTEM_MESSAGE)
    maker, chat = (make_qwen3, QWEN_CHAT) if variant == "klein" else (words, MISTRAL_CHAT)
    settings = {"width": TEXT_WIDTH, "layers": LAYERS[variant], "layout": "folder", "name": "text_encoder"}
    modules["text_encoder"] = maker(folder, seed=seed + 3, **settings).module
    (folder / "tokenizer" / "chat_template.jinja").write_text(chat)
    name = "Flux2KleinPipeline" if variant == "klein" else "Flux2Pipeline"
    told = {"is_distilled": False} if variant == "klein" else {}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **told}), encoding="utf-8")
    return modules


def tiny_denoiser(variant: str, seed: int = 0, double: int = DOUBLE, single: int = SINGLE) -> Any:
    """Random weights. The global random state is left as it was."""
    from diffusers import Flux2Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser: Any = Flux2Transformer2DModel(
            in_channels=128, num_layers=double, num_single_layers=single, attention_head_dim=HEAD,
            num_attention_heads=WIDTH // HEAD, joint_attention_dim=3 * TEXT_WIDTH, timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=variant == "dev",
        )  # fmt: skip
        for name, parameter in denoiser.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # a table that mixes up two norms must show
                parameter.data += 0.2 * torch.randn(parameter.shape)
        denoiser.proj_out.weight.data *= 1.5  # 128 numbers hardly pass this width: in few steps it learns less output
    return denoiser.eval()


def tiny_vae(seed: int = 0) -> Any:
    from diffusers import AutoencoderKLFlux2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=32)
        vae.bn.running_mean.normal_(0, 0.1)
        vae.bn.running_var.uniform_(0.2, 2)
    return vae.eval()


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return next(p for p in (path, path.parent, path.parent / "pipeline") if (p / "model_index.json").is_file())


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: noise levels (flux2_shift), then noise."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    folder = pipeline_of(options)
    denoiser = Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = Flux2KleinPipeline._patchify_latents(vae.encode(batch.pixels).latent_dist.mode())
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        latents = (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
        text = texts(folder, options, batch.captions)
        shown = [
            (Flux2KleinPipeline._patchify_latents(vae.encode(pixels).latent_dist.mode()) - mean)
            / torch.sqrt(variance + vae.config.batch_norm_eps)
            for pixels in batch.reference_pixels
        ]

    tokens = latents.shape[2] * latents.shape[3]
    shift = torch.tensor(0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)).exp()
    s = torch.sigmoid(torch.randn(len(latents), generator=generator))
    s = shift * s / (1 + (shift - 1) * s)
    noise = torch.randn(latents.shape, generator=generator)
    level = s.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    guidance = options.get("guidance_scale", 1.0)
    answer = forward(denoiser, with_lora(denoiser, adapters), noisy, s, text, guidance, shown)
    return F.mse_loss(answer, noise - latents)


def texts(folder: Path, options: dict[str, Any], captions: list[str]) -> Tensor:
    """States of the text encoder, by the pipelines themselves."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline
    from transformers import AutoTokenizer, MistralModel, Qwen3Model

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    length = options["text_encoder_max_token_length"]
    if "Klein" in json.loads((folder / "model_index.json").read_text())["_class_name"]:
        encoder = Qwen3Model.from_pretrained(folder / "text_encoder")
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(encoder, tokenizer, captions, max_sequence_length=length)
    encoder = MistralModel.from_pretrained(folder / "text_encoder")
    return Flux2Pipeline._get_mistral_3_small_prompt_embeds(encoder, tokenizer, captions, max_sequence_length=length)


def forward(
    denoiser: Any, weights: dict[str, Tensor], noisy: Tensor, s: Tensor, text: Tensor, guidance: float,
    shown: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """The model's output for noisy latents, by diffusers alone. shown: latents of reference pictures."""
    from diffusers import Flux2KleinPipeline as Pipeline

    tokens, places = Pipeline._pack_latents(noisy), Pipeline._prepare_latent_ids(noisy)
    if shown:
        more = torch.cat([Pipeline._pack_latents(latents) for latents in shown], 1)
        of_one = Pipeline._prepare_image_ids([latents[:1] for latents in shown])
        places = torch.cat([places, of_one.expand(len(noisy), -1, -1)], 1)
        tokens = torch.cat([tokens, more], 1)
    answer = functional_call(denoiser, weights, (), {
        "hidden_states": tokens, "encoder_hidden_states": text, "timestep": s,
        "img_ids": places, "txt_ids": Pipeline._prepare_text_ids(text),
        "guidance": torch.full_like(s, guidance) if denoiser.config.guidance_embeds else None,
    }).sample  # fmt: skip
    return answer[:, : noisy.shape[2] * noisy.shape[3]].transpose(1, 2).reshape(noisy.shape)


PARTS = {
    "single_transformer_blocks.{i}.attn.to_qkv_mlp_proj": ("single_blocks.{i}.linear1", None),
    "single_transformer_blocks.{i}.attn.to_out": ("single_blocks.{i}.linear2", None),
    "transformer_blocks.{i}.attn.to_out.0": ("double_blocks.{i}.img_attn.proj", None),
    "transformer_blocks.{i}.attn.to_add_out": ("double_blocks.{i}.txt_attn.proj", None),
    "transformer_blocks.{i}.ff.linear_in": ("double_blocks.{i}.img_mlp.0", None),
    "transformer_blocks.{i}.ff.linear_out": ("double_blocks.{i}.img_mlp.2", None),
    "transformer_blocks.{i}.ff_context.linear_in": ("double_blocks.{i}.txt_mlp.0", None),
    "transformer_blocks.{i}.ff_context.linear_out": ("double_blocks.{i}.txt_mlp.2", None),
    **{f"transformer_blocks.{{i}}.attn.to_{n}": ("double_blocks.{i}.img_attn.qkv", k) for k, n in enumerate("qkv")},
    **{
        f"transformer_blocks.{{i}}.attn.add_{n}_proj": ("double_blocks.{i}.txt_attn.qkv", k)
        for k, n in enumerate("qkv")
    },
}
PLACES = {ours.format(i=i): (theirs.format(i=i), row) for ours, (theirs, row) in PARTS.items() for i in range(8)}


def with_lora(module: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down; q, k and v have their rows of the fused layer's product."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for path, (published, part) in PLACES.items():
        name = f"lora_unet_{published}".replace(".", "_")
        if f"{name}.alpha" not in adapters or f"{path}.weight" not in weights:
            continue
        alpha, down, up = (adapters[f"{name}.{end}"] for end in ("alpha", "lora_down.weight", "lora_up.weight"))
        delta = up @ down * (alpha / len(down))
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + (delta if part is None else delta.chunk(3)[part])
    return weights


CASES: dict[str, Case] = {
    "flux2": Case("flux2", make, loss, overfit={"unet_lr": 5e-3}),
    "flux2 dev": Case(
        "flux2", partial(make, variant="dev", layout="diffusers"), loss, {"guidance_scale": 3.5},
        overfit={"unet_lr": 5e-3},
    ),
}  # fmt: skip
