# SPDX-License-Identifier: Apache-2.0
"""What a file of weights is, told from its tensor names and shapes alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# what programs put before a denoiser's names
PREFIXES = ("model.diffusion_model.", "net.", "diffusion_model.", "transformer.", "unet.")
ADAPTER_ENDINGS = (".lora_down.weight", ".lora_A.weight", ".lora_up.weight", ".hada_w1_a", ".lokr_w1", ".oft_blocks", ".lora.down.weight")


@dataclass(frozen=True)
class Kind:
    """One kind of file. `answer` completes the line "<file> is ..."."""

    name: str
    marks: tuple[str, ...]  # tensor names without prefix, of which one is enough
    answer: str


def _model(name: str, title: str, script: str, *marks: str) -> Kind:
    return Kind(name, marks, f"{title} checkpoint: use {script}")


# in order: a kind stands before those that share a mark with it
KINDS = (
    Kind("controlnet", ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"),
         "a ControlNet, not a checkpoint: give the base model that it belongs to"),
    Kind("lllite", ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",),
         "a ControlNet-LLLite, not a checkpoint: give the base model that it belongs to"),
    _model("sd3", "an SD3", "sd3_train_network.py", "joint_blocks.0.x_block.attn.qkv.weight"),
    _model("flux2", "a FLUX.2", "flux2_train_network.py", "double_stream_modulation_img.lin.weight", "double_stream_modulation_img.linear.weight"),
    _model("hunyuan_image", "a HunyuanImage-2.1", "hunyuan_image_train_network.py", "byt5_in.fc1.weight", "context_embedder_2.linear_1.weight"),
    _model("chroma", "a Chroma", "flux_train_network.py --model_type chroma", "distilled_guidance_layer.in_proj.weight"),
    _model("flux", "a FLUX.1", "flux_train_network.py", "double_blocks.0.img_mod.lin.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    _model("lumina", "a Lumina-Image-2.0", "lumina_train_network.py", "cap_embedder.0.weight", "time_caption_embed.caption_embedder.0.weight"),
    _model("anima", "an Anima", "anima_train_network.py", "llm_adapter.embed.weight", "blocks.0.adaln_modulation_self_attn.1.weight"),
    _model("sana", "a SANA", "sana_train_network.py", "attention_y_norm.weight", "caption_norm.weight"),
    _model("sdxl", "an SDXL", "sdxl_train_network.py", "label_emb.0.0.weight", "add_embedding.linear_1.weight"),
)  # fmt: skip
EMBEDDING_MARKS = ("emb_params", "string_to_param.*", "clip_l", "clip_g")
TEXT_MARKS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight", "token_embedding.weight",
              "shared.weight", "encoder.embed_tokens.weight", "model.embed_tokens.weight", "embed_tokens.weight")  # fmt: skip
UNET_LDM = "input_blocks.0.0.weight"
UNET_DIFFUSERS = "conv_in.weight"
VAE_LDM = "encoder.conv_in.weight"

# folders: class of the denoiser (or of the pipeline) in the JSON files -> kind
PIPELINES = {
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "Flux2": "flux2",
    "Flux": "flux",
    "Lumina2": "lumina",
    "HunyuanImage": "hunyuan_image",
    "Chroma": "chroma",
    "Anima": "anima",
    "Sana": "sana",
}


def strip_prefix(names: Shapes) -> dict[str, tuple[int, ...]]:
    """The same shapes with every denoiser prefix taken off."""
    result = {}
    for name, shape in names.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), "")
        result[name[len(prefix) :]] = shape
    return result


def foreign_file(shapes: Shapes) -> str | None:
    """What a file is that is no SD 1.x/2.x checkpoint: "an SDXL checkpoint: use sdxl_train_network.py", or None."""
    names = strip_prefix(shapes)
    if any(name.endswith(ADAPTER_ENDINGS) for name in shapes):
        return "a LoRA (adapter weights), not a checkpoint: give it to --network_weights or --base_weights"
    kind = next((kind for kind in KINDS if any(mark in names for mark in kind.marks)), None)
    if kind is not None:
        return kind.answer
    if UNET_LDM in names:
        return None
    if "down_blocks.0.resnets.0.conv1.weight" in names and UNET_DIFFUSERS in names:
        return "a U-Net in diffusers names without the rest: give the folder that holds unet, vae and text_encoder"
    if VAE_LDM in names or "first_stage_model.encoder.conv_in.weight" in names:
        return "a VAE, not a checkpoint: give it to --vae"
    if any(mark in names for mark in EMBEDDING_MARKS):
        return "a textual inversion embedding, not a checkpoint"
    if any(mark in names for mark in TEXT_MARKS):
        return "a text encoder, not a checkpoint"
    return "no Stable Diffusion checkpoint: it has no model.diffusion_model.* weights"


def foreign_pipeline(class_name: str) -> str | None:
    """The same for the `_class_name` of a folder's model_index.json: "StableDiffusionXLPipeline" -> "an SDXL checkpoint: ..."."""
    for start, name in PIPELINES.items():
        if class_name.startswith(start):
            return next(kind.answer for kind in KINDS if kind.name == name)
    return None


def context_dim(shapes: Shapes) -> int | None:
    """Width of the text states that a U-Net attends to, in either naming; None without cross attention."""
    return next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
