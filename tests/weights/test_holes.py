# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with a hole, or with a tensor too many, is named by its header, whatever part of the model it is in."""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.family import ModelFamily
from library.families.registry import FAMILIES, open_family
from library.weights.flux2_vae import build_vae
from library.weights.language_models import _build
from library.weights.loading import build_empty, shipped_config
from library.weights.text_encoders import _build_projected_clip, _build_t5
from library.weights.weight_files import open_weights
from tests.families import anima, flux, flux2, hunyuan_image, lumina, sana, sd, sd3, sdxl

DATA = Path(__file__).parents[1] / "data_files" / "weights"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "C64": 8, "U8": 1}


def family(name: str, options: Mapping[str, Any]) -> ModelFamily:
    known = FAMILIES[name]
    values = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return open_family(known, known.option_groups["model"](**values))


def problems(name: str, options: Mapping[str, Any]) -> list[str]:
    try:
        family(name, options).check_weights()
    except UserError as error:
        assert len(error.problems) <= 10 and all("\n" not in line for line in error.problems)
        return error.problems
    return []


class Header:
    """The header of a file, entry by entry. It is written again in its place: the data stay where they are."""

    def __init__(self, path: Path) -> None:
        self.path, raw = path, path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + length])
        content.pop("__metadata__", None)
        self.entries = content
        self.texts = {name: f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in content.items()}
        self.room, self.end = len(",".join(self.texts.values())) + 1000, len(raw) - 8 - length  # of header and data
        path.write_bytes(self.room.to_bytes(8, "little") + bytes(self.room) + raw[8 + length :])
        self.restore()

    def write(self, texts: Mapping[str, str]) -> None:
        with self.path.open("r+b") as file:
            file.seek(8)
            file.write(("{" + ",".join(texts.values()) + "}").encode().ljust(self.room))

    def without(self, *names: str) -> None:
        self.write({name: text for name, text in self.texts.items() if name not in names})

    def changed(self, name: str, **values: Any) -> None:
        """With other values of one entry. A new one is as the first, of no numbers."""
        entry = self.entries.get(name, {**next(iter(self.entries.values())), "shape": [0], "data_offsets": [0, 0]})
        self.write({**self.texts, name: f"{json.dumps(name)}:{json.dumps({**entry, **values})}"})

    def restore(self) -> None:
        self.write(self.texts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """Name -> family and options, made once."""
    makers: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
        "sd1": ("sd", lambda folder: sd.make(folder, layout="single")),
        "sd2": ("sd", lambda folder: {**sd.make(folder, version=2, layout="single"), "v2": True}),
        "sd1 folder": ("sd", sd.make),
        "sdxl": ("sdxl", lambda folder: sdxl.make(folder, layout="single")),
        "flux": ("flux", lambda folder: flux.make(folder, layout="whole")),
        "chroma": ("flux", lambda folder: flux.make(folder, variant="chroma", layout="diffusers")),
        "sd35": ("sd3", lambda folder: sd3.make(folder, layout="single", kind="5-medium")),
        "lumina": ("lumina", lumina.make),
        "anima": ("anima", anima.make),
        "anima folder": ("anima", partial(anima.make, layout="diffusers")),
        "flux2": ("flux2", flux2.make),
        "sana": ("sana", lambda folder: sana.make(folder, layout="files", normed=True, blocks=2)),
        "hunyuan_image": ("hunyuan_image", hunyuan_image.make),
    }
    made: dict[str, tuple[str, dict[str, Any]]] = {}

    def get(name: str) -> tuple[str, dict[str, Any]]:
        if name not in made:
            kind, make = makers[name]
            made[name] = kind, make(tmp_path_factory.mktemp("model"))
        return made[name]

    return get


def files_of(kind: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """The files of weights of a model."""
    opened = family(kind, options)
    parts = [opened.part(name) for name in ("denoiser", "vae", *opened.encoders)]
    yield from dict.fromkeys(path for part in parts for path in part.file.files if path.suffix == ".safetensors")


# ---- one tensor -----------------------------------------------------------------------------------------------------

# What may be missing: a model is the same without it, or another tensor takes its place
OPTIONAL = ("shared.weight", "encoder.embed_tokens.weight", "clip_l.transformer.text_projection.weight",
            "norm_final.weight", "pos_embed", "y_embedder.y_embedding", "logit_scale",
            "cond_stage_model.model.text_projection")  # fmt: skip
# model -> starts of the names that are removed there, and every which of them: no reader of names is left out
SWEEPS: dict[str, tuple[tuple[str, ...], int]] = {
    "sd1": (("",), 1),
    "sd2": (("cond_stage_model.",), 1),
    "sdxl": (("model.diffusion_model.", "conditioner."), 3),
    "flux": (("model.", "text_encoders."), 1),
    "chroma": (("",), 2),
    "sd35": (("model.", "text_encoders."), 2),
    "lumina": (("",), 2),
    "anima": (("",), 4),
    "anima folder": (("",), 4),
    # of its encoder some layers that are loaded: nothing above them is missed
    "flux2": (
        ("double", "single", "img", "time", "txt", "final", "encoder", "decoder", "bn.run", "model.layers.1."),
        2,
    ),
    "sana": (("",), 4),
    "hunyuan_image": (("double_blocks.", "single_blocks.", "byt5_in.", "txt_in.", "encoder.", "decoder."), 7),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_each_tensor_removed_in_turn_is_named(models: Any, name: str) -> None:
    (kind, options), (starts, step) = models(name), SWEEPS[name]
    assert problems(kind, options) == []
    passed, unnamed, count = [], [], 0
    for path in files_of(kind, options):
        header = Header(path)
        for lost in [own for own in header.entries if own.startswith(starts)][::step]:
            header.without(lost)
            found, count = problems(kind, options), count + 1
            if not found and not lost.endswith(OPTIONAL):
                passed.append(lost)
            unnamed += [lost] if found and not any(lost in line and str(path) in line for line in found) else []
        header.restore()
    assert passed == [] and unnamed == [] and count > 40


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sd1", "model.diffusion_model.input_blocks.9.0.in_layers.2.weight"),
        ("sd1", "model.diffusion_model.output_blocks.1.1.transformer_blocks.1.norm1.weight"),
        ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"),
        ("sd1", "first_stage_model.encoder.down.4.block.0.conv1.weight"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.9.ln_1.weight"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.7.ln_1.weight"),
        ("flux", "model.diffusion_model.single_blocks.2.linear1.weight"),
        ("flux", "model.diffusion_model.double_blocks.99.img_attn.proj.weight"),
        ("flux", "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.q.weight"),
        ("chroma", "transformer_blocks.7.attn.to_q.weight"),
        ("sd35", "model.diffusion_model.joint_blocks.9.x_block.attn.qkv.weight"),
        ("lumina", "context_refiner.2.attention.out.weight"),
        ("lumina", "something.of.nobody"),
        ("anima", "net.llm_adapter.blocks.2.mlp.0.weight"),
        ("anima", "net.blocks.3.mlp.layer1.weight"),
        ("flux2", "single_blocks.2.linear1.weight"),
        ("sana", "blocks.2.attn.qkv.weight"),
        ("hunyuan_image", "double_blocks.7.img_attn_qkv.weight"),
    ],
)
def test_a_tensor_that_is_not_read_is_named(models: Any, name: str, more: str) -> None:
    kind, options = models(name)
    header = Header(Path(next(files_of(kind, options))))
    header.changed(more)
    found = problems(kind, options)
    header.restore()
    assert any(more in line and str(header.path) in line for line in found), found


def header_with(kind: str, options: Mapping[str, Any], start: str) -> Header:
    """Of the file that has a name that begins so."""
    headers = (Header(path) for path in files_of(kind, options))
    return next(header for header in headers if any(name.startswith(start) for name in header.entries))


MATRICES = (
    ("sd1", "model.diffusion_model.time_embed.2.weight"),
    ("sd1", "first_stage_model.decoder.conv_in.weight"),
    ("sd1", "first_stage_model.encoder.mid.attn_1.q.weight"),
    ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.weight"),
    ("flux", "model.diffusion_model.single_blocks.1.linear1.weight"),
    ("flux", "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.o.weight"),
    ("flux", "decoder.conv_out.weight"),
    ("sd35", "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"),
    ("sd35", "model.diffusion_model.pos_embed"),
    ("lumina", "layers.1.attention.qkv.weight"),
    ("anima", "net.llm_adapter.blocks.1.cross_attn.k_proj.weight"),
    ("anima", "encoder.downsamples.1.resample.1.weight"),
    ("flux2", "single_blocks.1.linear1.weight"),
    ("flux2", "model.layers.26.mlp.up_proj.weight"),
    ("sana", "blocks.1.cross_attn.kv_linear.weight"),
    ("sana", "encoder.stages.4.op_list.0.context_module.main.qkv.conv.weight"),
    ("hunyuan_image", "single_blocks.1.linear1.weight"),
    ("hunyuan_image", "decoder.up.0.upsample.conv.weight"),
)


@pytest.mark.parametrize(("name", "tensor"), MATRICES)
def test_shapes_and_kinds_of_numbers(models: Any, name: str, tensor: str) -> None:
    """Transposed, without an axis, with more; numbers that are none of a weight. float64 is one."""
    kind, options = models(name)
    header = header_with(kind, options, tensor)
    shape = header.entries[tensor]["shape"]
    others = [[*shape, 1, 1, 1], [math.prod(shape)], [1, *shape], [shape[0] * shape[1], 1, *shape[2:]]]
    others += [[*shape[1::-1], *shape[2:]]] if shape[0] != shape[1] else []
    for other in others:
        header.changed(tensor, shape=other)
        assert any(tensor in line for line in problems(kind, options)), other
    end = header.end
    with header.path.open("ab") as file:
        file.write(bytes(8 * math.prod(shape)))
    for dtype in ("I64", "C64", "U8", "F64"):
        header.changed(tensor, dtype=dtype, data_offsets=[end, end + math.prod(shape) * SIZES[dtype]])
        found = problems(kind, options)
        assert (found == []) == (dtype == "F64") and all(f"{tensor} is stored as" in line for line in found), found
    header.restore()


def test_float64_is_cast(models: Any, tmp_path: Path) -> None:
    kind, options = models("sd1 folder")
    tensors = load_file(options["pretrained_model_name_or_path"] / "unet" / "diffusion_pytorch_model.safetensors")
    part = family(kind, options).part("denoiser")
    expected = part.load(None, "cpu").state_dict()
    save_file({name: tensor.double() for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    for storage in ("plain", "half"):
        wide = replace(part, file=open_weights(tmp_path / "m.safetensors"))
        found = wide.load(None if storage == "plain" else torch.float32, "cpu", storage=storage).state_dict()
        assert all(found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]) for name in expected)
        assert {tensor.dtype for tensor in wide.empty(None, storage).state_dict().values()} == {torch.float32}


# ---- whole blocks, and configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("flux", "model.diffusion_model.single_blocks.0."),
        ("flux", "text_encoders.clip_l.transformer.text_model.encoder.layers.1."),
        ("flux", "text_encoders.t5xxl.transformer.encoder.block.0."),
        ("sd35", "model.diffusion_model.joint_blocks.2."),  # the last: the one before has not its form
        ("sd35", "model.diffusion_model.joint_blocks.1."),
        ("sd1", "model.diffusion_model.input_blocks.2."),
        ("sd1", "model.diffusion_model.output_blocks.1."),
        ("sd1", "first_stage_model.decoder.up.0."),
        ("sdxl", "model.diffusion_model.middle_block.1."),
        ("lumina", "layers.0."),
        ("lumina", "noise_refiner.1."),
        ("anima", "net.blocks.0."),
        ("anima", "net.llm_adapter.blocks.0."),
        ("anima", "encoder.downsamples.1."),
        ("anima", "decoder.upsamples.0."),
        ("flux2", "double_blocks.0."),
        ("flux2", "model.layers.5."),
        ("sana", "blocks.0."),
        ("sana", "decoder.stages.2.op_list.1."),
        ("sana", "encoder.stages.3."),
        ("hunyuan_image", "double_blocks.0."),
        ("hunyuan_image", "encoder.down.2."),
    ],
)
def test_whole_blocks_removed(models: Any, name: str, block: str) -> None:
    kind, options = models(name)
    header = header_with(kind, options, block)
    header.without(*(own for own in header.entries if own.startswith(block)))
    found = problems(kind, options)
    header.restore()
    assert found and all(str(header.path) in line for line in found)


@pytest.mark.parametrize(("part", "key"), [("transformer", "num_layers"), ("text_encoder", "num_layers")])
@pytest.mark.parametrize("number", [1, 3, 10**12, 10**4000])
def test_a_configuration_of_another_depth(models: Any, part: str, key: str, number: int) -> None:
    kind, options = models("chroma")
    path = options["pretrained_model_name_or_path"] / part / "config.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), key: number}), encoding="utf-8")
    found = problems(kind, options)
    path.write_text(before, encoding="utf-8")
    assert found and all(len(line) < 1000 for line in found)
    assert number == 10**12 or any(str(path.parent) in line for line in found)


# ---- real files -----------------------------------------------------------------------------------------------------


def fake(path: Path, shapes: Mapping[str, Any], dtype: str = "F16") -> Path:
    """A file of that header whose data are a hole in the file: gigabytes that take no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def listed(name: str) -> dict[str, Any]:
    with gzip.open(DATA / f"{name}.json.gz") as file:
        return json.load(file)


def below(prefix: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def real() -> dict[str, dict[str, Any]]:
    """Names and shapes of published files, as published checkpoints and the classes of their makers have them."""
    clip = _build_projected_clip
    own: dict[str, Any] = {
        "clip_l": clip,
        "clip_g": clip,
        "t5xxl": _build_t5,
        "gemma2": partial(_build, kind="gemma2", layers=None),
        "qwen3": partial(_build, kind="qwen3", layers=None),
        "mistral": partial(_build, kind="mistral", layers=None),
        "qwen25_vl": partial(_build, kind="qwen2.5_vl", layers=None),
    }
    files = {}
    for name, build in own.items():
        module = build_empty(partial(build, shipped_config(name)))
        files[name] = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    byt5 = {
        **shipped_config("t5xxl"),
        "vocab_size": 1510,
        "d_model": 1472,
        "d_ff": 3584,
        "num_layers": 12,
        "num_heads": 6,
    }
    module = build_empty(partial(_build_t5, byt5))
    files["byt5"] = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    lists = {"sd1": "sd15_full_output", "sd2": "sd2_full_output", "sdxl": "sdxl_full_output", "flux": "flux_dev_output",
             "schnell": "flux_schnell_output", "chroma": "chroma_input", "ae": "flux_ae_input",
             "lumina": "lumina2_output", "anima": "anima_output", "qwen3_06b": "anima_qwen3_input",
             "qwen_vae": "anima_qwen_image_vae_input", "hunyuan_image": "hunyuan_image_input",
             "hunyuan_image_vae": "hunyuan_image_vae_input"}  # fmt: skip
    files |= {name: flux2.published_shapes(*sizes) for name, sizes in flux2.PUBLISHED.items()}
    vae = build_empty(lambda: build_vae(shipped_config("flux2_ae")))
    files["flux2 ae"] = {key: list(tensor.shape) for key, tensor in flux2.published_vae(vae).items()}
    return {**files, **{name: listed(file) for name, file in lists.items()}, **listed("sd3_outputs")}


def extras(start: str, *names: str) -> dict[str, Any]:
    return {f"{start}{name}": [1] for name in names}


EMA = extras("model_ema.", "decay", "num_updates", "diffusion_modeltime_embed0weight")
SCHEDULE = extras("", "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "posterior_variance",
                  "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
                  "sqrt_recipm1_alphas_cumprod", "posterior_log_variance_clipped", "posterior_mean_coef1",
                  "denoiser.sigmas", "logvar", "scale_factor", "lvlb_weights")  # fmt: skip
POSITIONS = "transformer.text_model.embeddings.position_ids"


def published_files(real: dict[str, dict[str, Any]], place: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(label, family, options) of the files that people have."""

    def file(shapes: Mapping[str, Any], dtype: str = "F16", count: list[int] = []) -> Path:  # noqa: B006
        count.append(1)
        return fake(place / f"{len(count)}.safetensors", shapes, dtype)

    sd1, sd2, xl = real["sd1"], real["sd2"], real["sdxl"]
    model = "pretrained_model_name_or_path"
    yield "sd1", "sd", {model: file({**sd1, **EMA, **SCHEDULE, **extras("cond_stage_model.", POSITIONS)}, "F32")}
    yield "sd1 as ComfyUI saves", "sd", {model: file({**sd1, **extras("cond_stage_model.", "logit_scale")})}
    yield "sd1 old", "sd", {model: file({name.replace("text_model.", ""): shape for name, shape in sd1.items()})}
    flat = {name: shape[:2] if ".attn_1." in name else shape for name, shape in sd1.items()}
    vae = {name.removeprefix("first_stage_model."): shape for name, shape in sd1.items() if "first_stage" in name}
    vae |= {**EMA, **extras("loss.", "logvar", "discriminator.main.0.weight")}
    yield "sd1 and vae-ft-mse", "sd", {model: file(flat), "vae": file(vae)}
    yield "sd2", "sd", {"v2": True, model: file({**sd2, **EMA, **extras("cond_stage_model.model.", "attn_mask")})}
    cut = {name: shape for name, shape in sd2.items() if ".resblocks.23." not in name}
    yield "sd2 without the last block", "sd", {"v2": True, model: file(cut)}
    ours = extras("conditioner.embedders.0.", POSITIONS, "logit_scale", "transformer.text_projection.weight")
    yield "sdxl", "sdxl", {model: file({**xl, **ours, "v_pred": [0], "ztsnr": [0]}), "vae": file(flat)}
    clips = {name: below(f"text_encoders.{name}.transformer.", real[name]) for name in ("clip_l", "clip_g", "t5xxl")}
    scales = extras("text_encoders.", "clip_l.logit_scale", "clip_g.logit_scale", "t5xxl.logit_scale")
    plain = {name: shape for name, shape in real["clip_l"].items() if "projection" not in name}
    whole = {**real["clip_l"], **extras("", "logit_scale", "visual_projection.weight", "vision_model.x.y")}
    whole |= extras("text_model.embeddings.", "position_ids")
    clip, big, t5, ae = file(plain), file(real["clip_g"]), file(real["t5xxl"], "F8_E4M3"), file(real["ae"], "F32")
    for kind in ("medium", "5-medium", "5-large"):
        inside = {**real[kind], **scales}
        yield f"sd3 {kind}", "sd3", {model: file({**inside, **clips["clip_l"], **clips["clip_g"], **clips["t5xxl"]})}
        yield f"sd3 {kind} alone", "sd3", {model: file(real[kind]), "clip_l": clip, "clip_g": big, "t5xxl": t5}
    scaled = {name.replace(".weight", ".scale_weight"): [] for name in real["t5xxl"] if "SelfAttention.q" in name}
    full = {**real["t5xxl"], **scaled, **extras("", "scaled_fp8", "lm_head.weight", "decoder.block.0.layer.0.x.weight")}
    for kind in ("flux", "schnell"):
        yield kind, "flux", {model: file(real[kind], "BF16"), "clip_l": file(whole), "t5xxl": file(full), "ae": ae}
        prefixed = below("model.diffusion_model.", real[kind])
        rest = {**clips["clip_l"], **clips["t5xxl"], **scales, **below("vae.", real["ae"])}
        yield f"{kind} all in one", "flux", {model: file({**prefixed, **rest}, "F8_E4M3")}
    yield "chroma", "flux", {"model_type": "chroma", model: file(real["chroma"], "BF16"), "t5xxl": t5, "ae": ae}
    next_dit = {**real["lumina"], **extras("", "norm_final.weight")}
    gemma = below("model.", real["gemma2"]) | extras("", "spiece_model", "lm_head.weight")
    yield "lumina", "lumina", {model: file(next_dit, "BF16"), "gemma2": file(gemma), "ae": ae}
    qwen = file(below("model.", real["qwen3"]) | extras("", "lm_head.weight"))
    mistral = file(below("language_model.model.", real["mistral"]) | extras("", "lm_head.weight", "vision_tower.x"))
    for kind, encoder in {"klein-4b": qwen, "dev": mistral}.items():
        options = {"text_encoder": encoder, "ae": file(real["flux2 ae"], "F32")}
        yield f"flux2 {kind}", "flux2", {model: file(real[kind], "BF16"), **options}
        prefixed = below("model.diffusion_model.", real[kind])
        yield f"flux2 {kind} of ComfyUI", "flux2", {model: file(prefixed, "F8_E4M3"), **options}
    text = below("text_encoders.gemma2_2b.transformer.model.", real["gemma2"]) | below("vae.", real["ae"])
    yield "lumina all in one", "lumina", {model: file({**below("model.diffusion_model.", next_dit), **text})}
    qwen3 = below("model.", real["qwen3_06b"]) | extras("", "lm_head.weight")
    given = {"qwen3": file(qwen3, "BF16"), "vae": file(real["qwen_vae"], "BF16")}
    for prefix in ("net.", "model.diffusion_model.", ""):
        names = {prefix + name.removeprefix("net."): shape for name, shape in real["anima"].items()}
        yield f"anima {prefix}", "anima", {model: file(names, "BF16"), **given}
    seeing = below("model.", real["qwen25_vl"]) | extras("", "lm_head.weight", "visual.patch_embed.proj.weight")
    texts = {"text_encoder": file(seeing, "BF16"), "byt5": file(real["byt5"])}
    dit, vae = real["hunyuan_image"], real["hunyuan_image_vae"]
    video = {name: [*shape, 1] if ".attn_1." in name and len(shape) == 4 else shape for name, shape in vae.items()}
    yield "hunyuan image", "hunyuan_image", {model: file(dit, "BF16"), "vae": file(vae), **texts}
    inner = [3584]
    more = {f"{name}.mlp.{i}.{end}": [*inner, *([256] if i == 0 else inner)][: 2 if end == "weight" else 1]
            for name in ("guidance_in", "time_r_in") for i in (0, 2) for end in ("weight", "bias")}  # fmt: skip
    distilled = {model: file({**dit, **more}, "BF16"), "vae": file(below("vae.", video), "F32"), **texts}
    yield "hunyuan image distilled", "hunyuan_image", distilled


def test_published_files_are_read(real: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="trainyard"):
        found = {label: problems(kind, given) for label, kind, given in published_files(real, tmp_path)}
    assert len(found) > 15 and not any(found.values()), found
    assert caplog.messages == []


def test_lost_ends_of_published_models(real: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the widths tell: a text encoder with fewer layers lost some. There are transformers with fewer blocks."""
    model, given = "pretrained_model_name_or_path", {}
    t5 = {name: shape for name, shape in real["t5xxl"].items() if ".block.23." not in name}
    for name, shapes in {"clip_l": real["clip_l"], "t5xxl": t5, "ae": real["ae"]}.items():
        given[name] = fake(tmp_path / f"{name}.safetensors", shapes)
    pruned = {name: shape for name, shape in real["flux"].items() if not name.startswith("double_blocks.18.")}
    given[model] = fake(tmp_path / "model.safetensors", pruned)
    (line,) = problems("flux", given)
    assert line.startswith(f"{given['t5xxl']}: the T5 text encoder has 23 layers") and line.endswith("has 24")
    fake(given["t5xxl"], real["t5xxl"])
    with caplog.at_level(logging.WARNING, logger="trainyard"):
        assert problems("flux", given) == []
    assert "num_layers 18, not 19" in caplog.text
    medium = {name: shape for name, shape in real["medium"].items() if ".joint_blocks.23." not in name}
    encoders = {name: fake(tmp_path / f"{name}.safetensors", real[name]) for name in ("clip_g", "clip_l")}
    found = problems("sd3", {model: fake(tmp_path / "sd3.safetensors", medium), **encoders})
    assert any("joint_blocks.22.context_block.attn.proj.weight" in line for line in found)
    quantised = {**real["flux"], "double_blocks.0.img_mlp.0.weight.absmax": [64]}
    fake(given[model], quantised)
    (line,) = problems("flux", given)
    assert "bitsandbytes" in line


def test_a_vae_of_another_kind_of_model(real: Any, tmp_path: Path) -> None:
    """By the channels of its latents: alone, inside a checkpoint, in a folder."""
    inside = {name: shape for name, shape in real["sdxl"].items() if name.startswith("first_stage_model.")}
    write = lambda name, shapes: fake(tmp_path / f"{name}.safetensors", shapes)
    alone = write("vae", {name.removeprefix("first_stage_model."): shape for name, shape in inside.items()})
    ae = write("ae", real["ae"])
    files = {name: write(name, real[name]) for name in ("clip_l", "clip_g", "t5xxl", "gemma2", "qwen25_vl", "byt5")}
    names = ("sd1", "sdxl", "flux", "medium", "lumina", "hunyuan_image")
    models = {name: write(name, real[name]) for name in names}
    of_model = lambda name, *own: {"pretrained_model_name_or_path": models[name], **{n: files[n] for n in own}}
    wrong = [
        ("flux", {**of_model("flux", "clip_l", "t5xxl"), "ae": alone}, "--ae", 4, 16),
        ("flux", {**of_model("flux", "clip_l", "t5xxl"), "ae": models["sdxl"]}, "--ae", 4, 16),
        ("lumina", {**of_model("lumina", "gemma2"), "ae": models["sd1"]}, "--ae", 4, 16),
        ("sd3", {**of_model("medium", "clip_l", "clip_g"), "vae": alone}, "--vae", 4, 16),
        (
            "hunyuan_image",
            {**of_model("hunyuan_image"), "text_encoder": files["qwen25_vl"], "byt5": files["byt5"], "vae": ae},
            "--vae",
            16,
            64,
        ),
        ("sdxl", {**of_model("sdxl"), "vae": ae}, "--vae", 16, 4),
        ("sd", {**of_model("sd1"), "vae": models["medium"]}, "--vae", 16, 4),
    ]
    for kind, given, option, channels, needed in wrong:
        (line,) = problems(kind, given)
        path = given[option.removeprefix("--")]
        assert line.startswith(f"{option}: {path} makes latents of {channels} channels, not {needed}: the VAE"), line
    mixed = {**real["sdxl"], **below("first_stage_model.", real["ae"])}
    (line,) = problems("sdxl", {"pretrained_model_name_or_path": fake(tmp_path / "mixed.safetensors", mixed)})
    assert "its VAE makes latents of 16 channels, not 4" in line
