# SPDX-License-Identifier: Apache-2.0
"""SANA for the contract tests: tiny models of real classes, and the loss in plain formulas."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from library.types import Batch
from tests.families.base import Case
from tests.families.lumina import write_tokenizer
from tests.trainers.helpers import Adapters

TEXT_WIDTH, HEADS, HEAD = 32, 2, 32
GEMMA_LAYERS = 2
SHIFT = 3.0  # --discrete_flow_shift
SHORT = "a photo star:"  # an instruction that costs the tests little
PIPELINE = {
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def make(
    folder: Path,
    *,
    layout: str = "diffusers",
    seed: int = 0,
    normed: bool = False,
    blocks: int = 3,
    instruction: str | None = SHORT,
) -> dict[str, Any]:
    """The options that name a tiny model below `folder`.

    layout "diffusers": a pipeline's folder; "transformer": the folder of the transformer, and folders of the others;
    "files": denoiser, Gemma 2 and DC-AE in files of their own, under published names; "plain": the same under
    diffusers' names. The pipeline's folder is always there, as `folder/pipeline`. Equal seeds give equal weights.
    normed: queries and keys have norms, as in SANA-1.5. instruction: None for the one that SANA was trained with.
    """
    folder = Path(folder)
    modules = tiny_modules(seed, normed=normed, blocks=blocks)
    pipeline = write_pipeline(folder / "pipeline", *modules)
    options: dict[str, Any] = {} if instruction is None else {"complex_human_instruction": instruction}
    if layout == "diffusers":
        return options | {"pretrained_model_name_or_path": pipeline}
    names = ("pretrained_model_name_or_path", "gemma2", "vae")
    if layout == "transformer":
        return options | dict(zip(names, (pipeline / name for name in ("transformer", "text_encoder", "vae"))))
    write_tokenizer(folder / "tokenizer")
    if layout == "files":
        denoiser, encoder, vae = published(*modules)
    else:
        denoiser, encoder, vae = (dict(module.state_dict()) for module in modules)
    for name, tensors in zip(names, (denoiser, encoder, vae)):
        options[name] = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, options[name])
    return options


def write_pipeline(folder: Path, *modules: Any) -> Path:
    """As SanaPipeline.save_pretrained lays it out."""
    from diffusers import DPMSolverMultistepScheduler

    folder.mkdir(parents=True, exist_ok=True)
    for name, module in zip(("transformer", "text_encoder", "vae"), modules, strict=True):
        module.save_pretrained(folder / name)
    scheduler = DPMSolverMultistepScheduler(flow_shift=SHIFT, use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline", **PIPELINE}))
    return folder


def tiny_modules(seed: int = 0, *, normed: bool = False, blocks: int = 3) -> tuple[Any, Any, Any]:
    """(denoiser, Gemma 2, DC-AE) with random weights. The global random state is left as it was."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    from tests.families.lumina import vocabulary

    width = HEADS * HEAD
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = SanaTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            num_layers=blocks,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD,
            cross_attention_dim=width,
            caption_channels=TEXT_WIDTH,
            qk_norm="rms_norm_across_heads" if normed else None,
        )
        encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(vocabulary()[0]),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=GEMMA_LAYERS,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
            )
        )
        vae = AutoencoderDC(
            attention_head_dim=8,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=(8, 8, 8, 16, 32, 32),
            decoder_block_out_channels=(8, 8, 8, 16, 32, 32),
            encoder_layers_per_block=(1, 1, 1, 1, 1, 2),
            decoder_layers_per_block=(1, 1, 2, 1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        )
        for module in (denoiser, vae):
            for name, parameter in module.named_parameters():
                if "norm" in name and parameter.ndim == 1:  # a table that mixes up two norms must show
                    nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return denoiser.eval(), encoder.eval(), vae.eval()


def published(denoiser: nn.Module, encoder: nn.Module, vae: nn.Module) -> tuple[dict[str, Tensor], ...]:
    """The tensors of the three under the names of their published files."""
    from library.families.sana.parts import sana_rules
    from library.key_tables import publish
    from library.weights.dc_ae import dc_ae_rules

    unused = {"y_embedder.y_embedding": torch.ones(4, TEXT_WIDTH), "pos_embed": torch.ones(1, 1024, HEADS * HEAD)}
    return (
        publish(denoiser.state_dict(), sana_rules(denoiser)) | unused,
        {f"model.{name}": tensor for name, tensor in encoder.state_dict().items()},
        publish(vae.state_dict(), dc_ae_rules(vae)),
    )


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return next(p for p in (path, path.parent, path.parent / "pipeline") if (p / "model_index.json").is_file())


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: noise levels (shift), then noise."""
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Model, GemmaTokenizer

    folder = pipeline_of(options)
    denoiser = SanaTransformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderDC.from_pretrained(folder / "vae")
    encoder = Gemma2Model.from_pretrained(folder / "text_encoder")
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer", padding_side="right")

    trained_with = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    told = options.get("complex_human_instruction", trained_with)
    weights = with_lora(encoder, adapters, "lora_te_{}".format)
    parts = []
    for caption in batch.captions:  # as SanaPipeline.encode_prompt does: an empty prompt is given no instruction
        text = caption.lower().strip()
        longest = 300 + (len(tokenizer.encode(told)) - 2 if text and told else 0)
        more = {"padding": "max_length", "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = tokenizer([told + text if text else ""], **more)
        states = functional_call(encoder, weights, (tokens.input_ids,), {"attention_mask": tokens.attention_mask})
        kept = [0, *range(-299, 0)]
        parts.append((states.last_hidden_state[:, kept], tokens.attention_mask[:, kept]))
    states, mask = (torch.cat(tensors) for tensors in zip(*parts))
    with torch.no_grad():
        latents = vae.encode(batch.pixels).latent * 0.41407

    s = torch.sigmoid(torch.randn(len(latents), generator=generator))
    s = SHIFT * s / (1 + (SHIFT - 1) * s)
    noise = torch.randn(latents.shape, generator=generator)
    level = s.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    weights = with_lora(denoiser, adapters, "lora_unet_{}".format)
    answer = functional_call(denoiser, weights, (noisy, states, s * 1000), {"encoder_attention_mask": mask}).sample
    return F.mse_loss(answer, noise - latents)


def with_lora(module: nn.Module, adapters: Adapters, name_of: Any) -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down."""
    weights = dict(module.state_dict())
    for path, _ in module.named_modules():
        if f"{(name := name_of(path).replace('.', '_'))}.alpha" not in adapters:
            continue
        alpha, down, up = (adapters[f"{name}.{part}"] for part in ("alpha", "lora_down.weight", "lora_up.weight"))
        weight = weights[f"{path}.weight"]
        delta = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
        weights[f"{path}.weight"] = weight + delta.reshape(weight.shape)
    return weights


CASES: dict[str, Case] = {
    "sana": Case(
        "sana",
        lambda folder: make(folder, normed=True),
        loss,
        overfit={"network_args": ["out_dim=16", "mlp_dim=16", "embedder_dims=16,16,16"], "unet_lr": 1e-2},
    ),
}
