# SPDX-License-Identifier: Apache-2.0
"""What a file of weights is, told from its tensor names and shapes alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# what programs put before a denoiser's names
PREFIXES = ("model.diffusion_model.", "net.", "diffusion_model.", "transformer.", "unet.")


@dataclass(frozen=True)
class Kind:
    """One kind of file. `answer` completes the line "<file> is ..."."""

    name: str
    answer: str
    marks: tuple[str, ...]  # tensor names without prefix, or starts of them that end with a dot: one is enough

    def has(self, names: Collection[str]) -> bool:
        """Whether a file with these names is one. A start that several tensors have outlives the loss of one."""
        starts = tuple(mark for mark in self.marks if mark.endswith("."))
        return any(mark in names for mark in self.marks) or any(name.startswith(starts) for name in names)


def _model(name: str, title: str, script: str | None, *marks: str) -> Kind:
    """script: what trains it, None for an architecture that is only recognised."""
    answer = f"{title} checkpoint: use {script}" if script else f"{title} checkpoint, which no script here trains yet"
    return Kind(name, answer, marks)


# Of each architecture: a name in published and one in diffusers files. A kind stands before those that share its marks.
ARCHITECTURES = (
    _model("sd3", "an SD3", "sd3_train_network.py", "joint_blocks.", "pos_embed."),
    _model(
        "flux2",
        "a FLUX.2",
        None,
        "double_stream_modulation_img.",
        "double_stream_modulation_txt.",
    ),
    _model(
        "hunyuan_image",
        "a HunyuanImage-2.1",
        None,
        "byt5_in.",
        "context_embedder_2.",
    ),
    _model(
        "chroma",
        "a Chroma",
        "flux_train_network.py --model_type chroma",
        "distilled_guidance_layer.",
    ),
    _model(
        "flux",
        "a FLUX.1",
        "flux_train_network.py",
        "double_blocks.0.img_mod.lin.",
        "single_transformer_blocks.0.attn.to_q.",
    ),
    _model(
        "lumina",
        "a Lumina-Image-2.0",
        "lumina_train_network.py",
        "cap_embedder.",
        "time_caption_embed.",
    ),
    _model(
        "anima",
        "an Anima",
        None,
        "llm_adapter.",
        "blocks.0.adaln_modulation_self_attn.",
    ),
    _model("sana", "a SANA", None, "attention_y_norm.weight", "caption_norm.weight"),
    _model("sdxl", "an SDXL", "sdxl_train_network.py", "label_emb.", "add_embedding."),
)

ADAPTER_ENDINGS = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora.down.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".oft_blocks",
)
ADAPTER_ANSWER = "a LoRA or other adapter, not a checkpoint: it belongs to --network_weights or --base_weights"
CONTROL_ENDINGS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight", ".conditioning1.0.weight")
CONTROL_ANSWER = "a ControlNet, not a checkpoint: give the base model that it was made for"

# parts of a model; asked only when the file holds no SD U-Net in published names
PARTS = (
    Kind(
        "unet",
        "a U-Net in diffusers names without the rest: give the folder that holds unet, vae and text_encoder",
        ("down_blocks.",),
    ),
    Kind(
        "vae",
        "a VAE, not a checkpoint: it belongs to --vae",
        ("encoder.conv_in.", "first_stage_model.encoder.conv_in."),
    ),
    Kind("embedding", "a textual inversion embedding, not a checkpoint", ("emb_params", "clip_l", "clip_g")),
    Kind(
        "text encoder",
        "a text encoder, not a checkpoint",
        (
            "text_model.",
            "embeddings.",
            "token_embedding.",
            "shared.",
            "encoder.embed_tokens.",
            "encoder.block.",
            "model.embed_tokens.",
            "embed_tokens.",
        ),
    ),
)
SD_UNET = "input_blocks."
SD_ANSWER = "a Stable Diffusion 1.x or 2.x checkpoint: use train_network.py"
UNKNOWN_ANSWERS = {
    "sd": "no Stable Diffusion checkpoint: it has no model.diffusion_model.* weights",
    "sdxl": "no SDXL checkpoint: it has no model.diffusion_model.* weights",
}

# start of a pipeline's class name -> architecture; a longer name stands before those that it starts with
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


def architecture(shapes: Shapes) -> Kind | None:
    """The architecture of a file that is not SD 1.x/2.x, or None."""
    names = {name[len(_prefix(name)) :] for name in shapes}
    return next((kind for kind in ARCHITECTURES if kind.has(names)), None)


def _prefix(name: str) -> str:
    return next((p for p in PREFIXES if name.startswith(p)), "")


def foreign_file(shapes: Shapes, wanted: str = "sd") -> str | None:
    """What a file is that is no checkpoint of architecture `wanted`, or None when it is one.

    "an SDXL checkpoint: use sdxl_train_network.py". wanted: the name of one of ARCHITECTURES, or "sd" for SD 1.x/2.x.
    """
    if any(name.endswith(ADAPTER_ENDINGS) for name in shapes):
        return ADAPTER_ANSWER
    if any(name.endswith(CONTROL_ENDINGS) for name in shapes):
        return CONTROL_ANSWER
    kind = architecture(shapes)
    if kind is not None:
        return None if kind.name == wanted else kind.answer
    names = {name[len(_prefix(name)) :] for name in shapes}
    if any(name.startswith(SD_UNET) for name in names):
        return None if wanted == "sd" else SD_ANSWER
    part = next((part for part in PARTS if part.has(names)), None)
    return part.answer if part else UNKNOWN_ANSWERS.get(wanted, "a file of unknown names: it has no denoiser inside")


def foreign_pipeline(class_name: str, wanted: str = "sd") -> str | None:
    """The same for a folder, by `_class_name` in its model_index.json. Unknown classes pass."""
    for start, name in PIPELINES.items():
        if class_name.startswith(start):
            return None if name == wanted else next(kind.answer for kind in ARCHITECTURES if kind.name == name)
    return SD_ANSWER if class_name.startswith("StableDiffusion") and wanted != "sd" else None


def context_dim(shapes: Shapes) -> int | None:
    """Width of the text states that a U-Net attends to, in either naming; None without cross attention."""
    return next((shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
