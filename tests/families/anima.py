# SPDX-License-Identifier: Apache-2.0
"""Anima for the contract tests: tiny models of real classes, and the loss in plain formulas."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from library.types import Batch
from tests.families.base import Case
from tests.tiny_text import make_qwen3, t5_pieces, write_t5_tokenizer
from tests.trainers.helpers import Adapters

TEXT_WIDTH, QWEN3_WIDTH = 24, 32
HEADS, HEAD = 2, 32
INDEX = {
    "transformer": ["diffusers", "CosmosTransformer3DModel"],
    "text_conditioner": ["diffusers", "AnimaTextConditioner"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
    "text_encoder": ["transformers", "Qwen3Model"],
}


def make(folder: Path, *, layout: str = "files", seed: int = 0) -> dict[str, Any]:
    """The options that name a tiny model below `folder`.

    layout "files": model, qwen3 and vae in files of their own under published names, as ComfyUI and sd-scripts take
    them; "diffusers": a pipeline's folder; "parts": the folder of the transformer with that of the text conditioner
    beside it, and folders of the others; "adapter": as "files", the LLM adapter in one of its own. The pipeline's
    folder is always there, as `folder/pipeline`. Equal seeds give equal weights.
    """
    folder = Path(folder)
    pipeline = write_pipeline(folder / "pipeline", seed)
    if layout == "diffusers":
        return {"pretrained_model_name_or_path": pipeline}
    if layout == "parts":
        names = {"pretrained_model_name_or_path": "transformer", "qwen3": "text_encoder", "vae": "vae"}
        return {option: pipeline / name for option, name in names.items()}
    qwen3 = make_qwen3(folder, seed=4 + seed)  # with its tokenizer beside it
    write_t5_tokenizer(folder / "t5_tokenizer")
    tensors, vae = published(*tiny_modules(seed))
    names = {"pretrained_model_name_or_path": "anima", "vae": "vae"}
    if layout == "adapter":
        names["llm_adapter_path"] = "adapter"
        own = {name: tensor for name, tensor in tensors.items() if ".llm_adapter." in name}
        save_file({name.removeprefix("net."): tensor for name, tensor in own.items()}, folder / "adapter.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in own}
    save_file(tensors, folder / "anima.safetensors")
    save_file(vae, folder / "vae.safetensors")
    return {"qwen3": qwen3.path, **{option: folder / f"{name}.safetensors" for option, name in names.items()}}


def write_pipeline(folder: Path, seed: int) -> Path:
    """As AnimaModularPipeline.save_pretrained lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in zip(("transformer", "text_conditioner", "vae"), tiny_modules(seed), strict=True):
        module.save_pretrained(folder / name)
    make_qwen3(folder, seed=4 + seed, name="text_encoder", layout="folder")
    write_t5_tokenizer(folder / "t5_tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "AnimaModularPipeline", **INDEX}))
    return folder


def tiny_modules(seed: int = 0) -> tuple[Any, Any, Any]:
    """(transformer, text conditioner, VAE) with random weights. The global random state is left as it was."""
    from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = CosmosTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            num_layers=3,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH,
            adaln_lora_dim=8,
            rope_scale=(1.0, 4.0, 4.0),
            concat_padding_mask=True,
            extra_pos_embed_type=None,
        )
        conditioner = AnimaTextConditioner(
            source_dim=QWEN3_WIDTH,
            target_dim=TEXT_WIDTH,
            model_dim=TEXT_WIDTH,
            num_layers=2,
            num_attention_heads=2,
            mlp_ratio=2.0,
            target_vocab_size=len(t5_pieces()) + 3,
        )
        vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1)
        nn.init.normal_(vae.quant_conv.bias, std=3.0)  # latents as far from zero as real ones: there is much to learn
        for module in (transformer, conditioner):
            for name, parameter in module.named_parameters():
                if "norm" in name and parameter.ndim == 1:  # a table that mixes up two norms must show
                    nn.init.normal_(parameter, 1.0, 0.2)
    return transformer.eval(), conditioner.eval(), vae.eval()


def published(transformer: nn.Module, conditioner: nn.Module, vae: nn.Module) -> tuple[dict[str, Tensor], ...]:
    """The tensors of the published files: transformer and LLM adapter in one, and the VAE."""
    from library.families.anima.modules import AnimaDenoiser
    from library.families.anima.parts import denoiser_rules
    from library.key_tables import publish
    from library.weights.qwen_vae import wan_rules

    denoiser = AnimaDenoiser(transformer, conditioner)
    return (
        publish(denoiser.state_dict(), denoiser_rules(denoiser), "net."),
        publish(vae.state_dict(), wan_rules(vae)),
    )


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return next(p for p in (path, path.parent, path.parent / "pipeline") if (p / "model_index.json").is_file())


def without_torchvision() -> None:
    """diffusers resizes the padding mask with torchvision, which is not installed."""
    from diffusers.models.transformers import transformer_cosmos

    resize = lambda mask, size, interpolation: F.interpolate(mask, size)
    functional, modes = types.SimpleNamespace(resize=resize), types.SimpleNamespace(NEAREST="nearest")
    transforms = types.SimpleNamespace(functional=functional, InterpolationMode=modes)
    vars(transformer_cosmos).setdefault("transforms", transforms)


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: noise levels (sigmoid), then noise."""
    from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
    from transformers import Qwen2Tokenizer, Qwen3Model, T5Tokenizer

    without_torchvision()
    folder = pipeline_of(options)
    transformer = CosmosTransformer3DModel.from_pretrained(folder / "transformer")
    conditioner = AnimaTextConditioner.from_pretrained(folder / "text_conditioner")
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    encoder = Qwen3Model.from_pretrained(folder / "text_encoder")
    asked = {"padding": "max_length", "truncation": True, "max_length": 512, "return_tensors": "pt"}
    qwen3 = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", padding_side="right")(batch.captions, **asked)
    t5 = T5Tokenizer.from_pretrained(folder / "t5_tokenizer")(batch.captions, **asked)

    weights = with_lora(encoder, adapters, lambda path: f"lora_te_{path}".replace(".", "_"))
    mask = qwen3.attention_mask
    states = functional_call(encoder, weights, (qwen3.input_ids,), {"attention_mask": mask}).last_hidden_state
    states = states.masked_fill(mask.unsqueeze(-1) == 0, 0)
    weights = with_lora(conditioner, adapters, lambda path: f"lora_unet_llm_adapter_{path}".replace(".", "_"))
    text = functional_call(conditioner, weights, (states, t5.input_ids, t5.attention_mask, mask))
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        latents = (vae.encode(batch.pixels.unsqueeze(2)).latent_dist.mode() - mean) / std

    s = torch.sigmoid(torch.randn(len(latents), generator=generator))
    noise = torch.randn(latents[:, :, 0].shape, generator=generator).unsqueeze(2)
    level = s.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    weights = with_lora(transformer, adapters, published_path)
    more = {"padding_mask": torch.zeros(1, 1, *batch.pixels.shape[2:])}
    return F.mse_loss(functional_call(transformer, weights, (noisy, s, text), more).sample, noise - latents)


LAYERS = {  # diffusers -> published
    "transformer_blocks.": "blocks.",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    "to_out.0": "output_proj",
    ".to_q": ".q_proj",
    ".to_k": ".k_proj",
    ".to_v": ".v_proj",
    ".ff.net.0.proj": ".mlp.layer1",
    ".ff.net.2": ".mlp.layer2",
}


def published_path(path: str) -> str:
    """The name of a layer of the transformer in adapter files."""
    for own, name in LAYERS.items():
        path = path.replace(own, name)
    return f"lora_unet_{path}".replace(".", "_")


def with_lora(module: nn.Module, adapters: Adapters, name_of: Any) -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down."""
    weights = dict(module.state_dict())
    for path, _ in module.named_modules():
        if f"{(name := name_of(path))}.alpha" in adapters:
            alpha, down, up = (adapters[f"{name}.{part}"] for part in ("alpha", "lora_down.weight", "lora_up.weight"))
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + up @ down * (alpha / len(down))
    return weights


EVERY_LAYER = {"network_args": ["include_patterns=.*"]}
CASES: dict[str, Case] = {"anima": Case("anima", make, loss, overfit=EVERY_LAYER)}
