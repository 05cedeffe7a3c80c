# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0 for the contract tests: tiny models of real classes, and the loss in plain formulas."""

from __future__ import annotations

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
from tests.tiny import WORDS
from tests.trainers.helpers import Adapters

TEXT_WIDTH, HEADS, KEY_HEADS, HEAD = 32, 6, 2, 8
GEMMA_LAYERS = 3
SHIFT = 6.0  # --discrete_flow_shift
PIPELINE = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "Lumina2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make(folder: Path, *, layout: str = "files", seed: int = 0, system_prompt: str = "") -> dict[str, Any]:
    """The options that name a tiny model below `folder`.

    layout "files": model, gemma2 and ae in files of their own under published names, as sd-scripts takes them; "whole":
    all in one file; "diffusers": a pipeline's folder; "transformer": the folder of the transformer, and folders of the
    others. The pipeline's folder is always there, as `folder/pipeline`. Equal seeds give equal weights.
    """
    folder = Path(folder)
    pipeline = write_pipeline(folder / "pipeline", seed)
    options: dict[str, Any] = {"system_prompt": system_prompt} if system_prompt else {}
    if layout == "diffusers":
        return options | {"pretrained_model_name_or_path": pipeline}
    if layout == "transformer":
        names = {"pretrained_model_name_or_path": "transformer", "gemma2": "text_encoder", "ae": "vae"}
        return options | {option: pipeline / name for option, name in names.items()}
    write_tokenizer(folder / "tokenizer")
    denoiser, encoder, vae = published(*tiny_modules(seed))
    if layout == "whole":
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in denoiser.items()}
        tensors |= {f"text_encoders.gemma2_2b.transformer.model.{name}": tensor for name, tensor in encoder.items()}
        tensors |= {f"vae.{name}": tensor for name, tensor in vae.items()}
        save_file(tensors, folder / "whole.safetensors")
        return options | {"pretrained_model_name_or_path": folder / "whole.safetensors"}
    save_file(denoiser | {"norm_final.weight": torch.ones(48)}, folder / "lumina.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in encoder.items()}, folder / "gemma2.safetensors")
    save_file(vae, folder / "ae.safetensors")
    names = {"pretrained_model_name_or_path": "lumina", "gemma2": "gemma2", "ae": "ae"}
    return options | {option: folder / f"{name}.safetensors" for option, name in names.items()}


def write_pipeline(folder: Path, seed: int) -> Path:
    """As Lumina2Pipeline.save_pretrained lays it out."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    for name, module in zip(("transformer", "text_encoder", "vae"), tiny_modules(seed), strict=True):
        module.save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Lumina2Pipeline", **PIPELINE}))
    return folder


def tiny_modules(seed: int = 0) -> tuple[Any, Any, Any]:
    """(denoiser, Gemma 2, autoencoder) with random weights. The global random state is left as it was."""
    from diffusers import AutoencoderKL, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = Lumina2Transformer2DModel(
            hidden_size=HEADS * HEAD,
            num_layers=2,
            num_refiner_layers=2,
            num_attention_heads=HEADS,
            num_kv_heads=KEY_HEADS,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            cap_feat_dim=TEXT_WIDTH,
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
        vae = AutoencoderKL(
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
        for name, parameter in denoiser.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # a table that mixes up two norms must show
                nn.init.normal_(parameter, 1.0, 0.2)
    return denoiser.eval(), encoder.eval(), vae.eval()


def published(denoiser: nn.Module, encoder: nn.Module, vae: nn.Module) -> tuple[dict[str, Tensor], ...]:
    """The tensors of the three under the names of their published files."""
    from library.families.lumina.parts import denoiser_rules
    from library.key_tables import publish
    from library.weights.vae_names import vae_rules

    return (
        publish(denoiser.state_dict(), denoiser_rules(denoiser)),
        dict(encoder.state_dict()),
        publish(vae.state_dict(), vae_rules(vae)),
    )


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Gemma's special tokens, letters, the WORDS as single tokens, bytes for anything else; and the merges."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for letter in word[1:]:
            merges[left, letter] = None
            left += letter
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz,.()<>:"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [a + b for a, b in merges]
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of Gemma, with its start token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    words, merges = vocabulary()
    tokenizer = GemmaTokenizer(vocab=words, merges=merges)
    start = [("<bos>", words["<bos>"])]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=start)
    tokenizer.save_pretrained(folder)
    return folder


# ---- the loss, a second time ----------------------------------------------------------------------------------------


def pipeline_of(options: dict[str, Any]) -> Path:
    """The pipeline's folder that `make` wrote."""
    path = Path(options["pretrained_model_name_or_path"])
    return next(p for p in (path, path.parent, path.parent / "pipeline") if (p / "model_index.json").is_file())


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: noise levels (shift), then noise."""
    from diffusers import AutoencoderKL, Lumina2Transformer2DModel
    from transformers import Gemma2Model, GemmaTokenizer

    folder = pipeline_of(options)
    denoiser = Lumina2Transformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    encoder = Gemma2Model.from_pretrained(folder / "text_encoder")
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer", padding_side="right")

    system = options.get("system_prompt", "")
    texts = [f"{system} <Prompt Start> {caption}" if system else caption for caption in batch.captions]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = tokens.attention_mask.bool()
    weights = with_lora(encoder, adapters, lambda path: f"lora_te_{path}".replace(".", "_"))
    more = {"attention_mask": mask, "output_hidden_states": True}
    states = functional_call(encoder, weights, (tokens.input_ids,), more).hidden_states[-2]
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
    draws = [torch.randn(16, *posterior.mean.shape[2:], generator=torch.Generator().manual_seed(seed))
             for seed in batch.latent_seeds]  # fmt: skip
    latents = (posterior.mean + posterior.std * torch.stack(draws) - 0.1159) * 0.3611

    s = torch.sigmoid(torch.randn(len(latents), generator=generator))
    s = SHIFT * s / (1 + (SHIFT - 1) * s)
    noise = torch.randn(latents.shape, generator=generator)
    level = s.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    weights = with_lora(denoiser, adapters, published_path)
    answer = functional_call(denoiser, weights, (noisy, 1 - s, states, mask)).sample
    return F.mse_loss(answer, latents - noise)


LAYERS = {  # diffusers -> published
    ".norm1.linear": ".adaLN_modulation.1",
    ".attn.to_out.0": ".attention.out",
    ".attn.to_q": ".attention.qkv",
    ".attn.to_k": ".attention.qkv",
    ".attn.to_v": ".attention.qkv",
    ".feed_forward.linear_": ".feed_forward.w",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
}


def published_path(path: str) -> str:
    """The name of a layer of the denoiser in adapter files; q, k and v have one name."""
    for own, name in LAYERS.items():
        path = path.replace(own, name)
    return f"lora_unet_{path}".replace(".", "_")


def with_lora(module: nn.Module, adapters: Adapters, name_of: Any) -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down; of q, k and v each has its rows of the fused layer's."""
    weights = dict(module.state_dict())
    for path, _ in module.named_modules():
        if f"{(name := name_of(path))}.alpha" not in adapters:
            continue
        alpha, down, up = (adapters[f"{name}.{part}"] for part in ("alpha", "lora_down.weight", "lora_up.weight"))
        delta = up @ down * (alpha / len(down))
        if name.endswith("_qkv"):
            rows = [HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD]
            delta = delta.split(rows)["qkv".index(path[-1])]
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
    return weights


CASES: dict[str, Case] = {
    "lumina": Case("lumina", make, loss),
    "lumina system prompt": Case(
        "lumina", lambda folder: make(folder, layout="diffusers", system_prompt="a photo star"), loss
    ),
}
