# SPDX-License-Identifier: Apache-2.0
"""Adapter formats: names, ways there and back without loss, and each reader's formula on each written file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.adapters.formats.conversion import alphas_in, read_tensors, write_tensors
from library.errors import UserError
from tests.adapters.known_formats import (
    BY_NAME,
    architecture_of,
    convert,
    dora_norms,
    format_of,
    header,
    layers_in,
    read_adapter,
    to_kohya,
)
from tests.adapters.lora_samples import (
    SAMPLES,
    adapter,
    anima,
    changed,
    comfy_apply,
    comfy_keys,
    expected_weights,
    flat,
    flux,
    lumina,
    named_sd,
    norms_of,
    published_weights,
    sd3,
    sd_unet,
)

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_1_linear1"
TABLE = {name: name for name in ("flux", "flux2", "sd3", "lumina", "anima", "sana", "hunyuan_image")}
TABLE |= {"chroma": "flux"}

ENCODERS = {  # kohya name -> the same in comfy and in peft
    "flux": {
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        ),
        "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0": (
            "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wi_0",
            "text_encoder_2.encoder.block.1.layer.1.DenseReluDense.wi_0",
        ),
    },
    "sd3": {
        "lora_te2_text_model_encoder_layers_30_mlp_fc2": (
            "text_encoders.clip_g.transformer.text_model.encoder.layers.30.mlp.fc2",
            "text_encoder_2.text_model.encoder.layers.30.mlp.fc2",
        ),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_o": (
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.o",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.o",
        ),
    },
    "lumina": {
        "lora_te_layers_25_mlp_gate_proj": (
            "text_encoders.gemma2_2b.transformer.model.layers.25.mlp.gate_proj",
            "text_encoder.layers.25.mlp.gate_proj",
        ),
    },
    "anima": {
        "lora_te_layers_27_mlp_gate_proj": (
            "text_encoders.qwen3_06b.transformer.model.layers.27.mlp.gate_proj",
            "text_encoder.layers.27.mlp.gate_proj",
        ),
    },
    "sana": {
        "lora_te_layers_3_self_attn_o_proj": (
            "text_encoders.gemma2_2b.transformer.model.layers.3.self_attn.o_proj",
            "text_encoder.layers.3.self_attn.o_proj",
        ),
    },
    "chroma": {},
    "flux2": {},
    "hunyuan_image": {},
}  # fmt: skip


def random_lora(
    keys: dict[str, tuple[int, int]], rank: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """kohya name -> (rows, inputs) as random tensors."""
    draw = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for key, (rows, inputs) in keys.items():
        found[f"{key}.alpha"] = torch.tensor(2.0, dtype=dtype)
        found[f"{key}.lora_down.weight"] = torch.randn(rank, inputs, generator=draw).to(dtype)
        found[f"{key}.lora_up.weight"] = torch.randn(rows, rank, generator=draw).to(dtype)
    return found


def full(name: str, **options: object) -> dict[str, Tensor]:
    """An adapter for the family's tiny denoiser and some layers of its text encoders."""
    dtype = options.get("dtype", torch.float32)
    assert isinstance(dtype, torch.dtype)
    return random_lora(dict.fromkeys(ENCODERS[name], (12, 8)), dtype=dtype) | adapter(SAMPLES[name](), **options)  # type: ignore[arg-type]


def chain(
    tensors: dict[str, Tensor], *formats: str, norms: object = None, architecture: str | None = None
) -> dict[str, Tensor]:
    """Through files of these formats: what each header says is kept."""
    more: Any = {"norms": norms, "architecture": architecture}
    for to in formats:
        entry = header(tensors, to)
        written = convert(tensors, to, **more)
        assert format_of(written) == to
        tensors = convert(written, "kohya", alphas=alphas_in(entry), **more)
    return tensors


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_architecture_and_format_are_found(name: str) -> None:
    tensors = full(name)
    for to in ("kohya", "comfy", "peft"):
        written = convert(tensors, to)
        if to == "kohya" or name != "hunyuan_image":  # tiny widths: the names are those of FLUX.1
            assert architecture_of(written) == TABLE[name]
        assert format_of(written) == to


@pytest.mark.parametrize(
    ("name", "width", "mlp"), [("flux", 3072, "img_mlp_0"), ("hunyuan_image", 3584, "img_mlp_fc1")]
)
def test_flux_and_hunyuan_image_are_told_apart_by_their_widths(name: str, width: int, mlp: str) -> None:
    tensors = random_lora({f"lora_unet_double_blocks_0_{mlp}": (4 * width, width)}, rank=1)
    for to in ("kohya", "comfy", "peft"):
        written = convert(tensors, to)
        assert (architecture_of(written), format_of(written)) == (name, to)
        assert to_kohya(written).keys() | {f"lora_unet_double_blocks_0_{mlp}.alpha"} == tensors.keys()
    assert "diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight" in convert(tensors, "comfy")


def test_names_that_sd_scripts_converts_to_for_comfyui_are_read() -> None:
    tensors = random_lora({"lora_unet_single_blocks_3_modulation_lin": (3 * 3584, 3584)})
    found = to_kohya(tensors, among=["hunyuan_image"])
    assert {key.partition(".")[0] for key in found} == {"lora_unet_single_blocks_3_modulation_linear"}


@pytest.mark.parametrize("name", ENCODERS)
def test_names_of_text_encoders(name: str) -> None:
    tensors = full(name)
    comfy, peft = convert(tensors, "comfy"), convert(tensors, "peft")
    for in_comfy, in_peft in ENCODERS[name].values():
        assert f"{in_comfy}.lora_A.weight" in comfy and f"{in_comfy}.lora_B.weight" in comfy
        assert f"{in_peft}.lora_A.weight" in peft and f"{in_peft}.lora_B.weight" in peft


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_every_layer_of_stable_diffusion_has_its_published_name(version: str) -> None:
    table = {layer.parts[0]: layer.comfy for layer in BY_NAME[version].layers(1)}
    assert len(sd_unet(version)) > 340
    for ours, published in sd_unet(version).items():
        assert table[f"unet.{ours}"] == f"diffusion_model.{published}"


@pytest.mark.parametrize(("width", "name", "clip"), [(768, "sd1", "clip_l"), (1024, "sd2", "clip_h")])
def test_stable_diffusion_1_and_2_are_told_apart_by_the_text(width: int, name: str, clip: str) -> None:
    query = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for lora in (random_lora({query: (width, width)}), random_lora({key: (1280, width)})):
        assert architecture_of(lora) == name
    comfy = convert(random_lora({query: (width, width)}), "comfy")
    path = f"text_encoders.{clip}.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    assert {*comfy} == {f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.alpha"}


def test_comfy_has_alpha_where_every_reader_takes_it() -> None:
    assert any(key.endswith(".alpha") for key in convert(adapter(flux()), "comfy"))
    assert not any(key.endswith(".alpha") for key in convert(adapter(lumina()), "comfy"))  # diffusers reads this one
    assert not any(key.endswith(".alpha") for key in convert(adapter(anima()), "comfy"))  # ... and this one
    assert not any(key.endswith(".alpha") for key in convert(adapter(flux()), "peft"))


# ---- there and back -----------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, object]] = {
    "alpha equals rank": {"alpha": 4.0},
    "power of two": {"alpha": 1.0},
    "without alpha": {"alpha": None},
    "float16": {"alpha": 2.0, "dtype": torch.float16},
    "float16, no power of two": {"alpha": 2.7, "dtype": torch.float16},
    "bfloat16, no power of two": {"alpha": 5.0, "rank": 6, "dtype": torch.bfloat16},
    "split": {"split": True, "rank": 2, "alpha": 1.0},
    "split, bfloat16": {"split": True, "rank": 3, "alpha": 1.0, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_no_bit_is_lost(name: str, variant: str) -> None:
    tensors = full(name, **VARIANTS[variant])
    assert_same(chain(tensors, "comfy", "peft", "kohya", architecture=TABLE[name]), tensors)
    assert_same(chain(tensors, "peft", "comfy", architecture=TABLE[name]), tensors)


def test_no_bit_is_lost_of_stable_diffusion() -> None:
    tensors = sd_adapter("sd1", alpha=1.0, dtype=torch.float16)
    assert_same(chain(tensors, "comfy", "peft", "kohya"), tensors)


def test_float32_with_another_scale_is_exact_to_one_unit() -> None:
    tensors = full("flux", alpha=2.7)
    back = chain(tensors, "peft")
    for key, value in tensors.items():
        assert torch.allclose(back[key], value, rtol=1.2e-7, atol=0), key
        assert "lora_up" in key or torch.equal(back[key], value)


def test_small_float16_values_survive_a_small_scale() -> None:
    """lora_B alone would fall below float16's smallest normal number; it is written in float32 then."""
    tensors = adapter(flux(), alpha=4.0 / 64, dtype=torch.float16)
    tensors = {key: value * 2**-10 if "lora_up" in key else value for key, value in tensors.items()}
    peft = convert(tensors, "peft")
    assert {value.dtype for key, value in peft.items() if "lora_B" in key} == {torch.float32}
    assert {value.dtype for key, value in peft.items() if "lora_A" in key} == {torch.float16}
    assert_same(chain(tensors, "peft"), tensors)


def test_ranks_and_alphas_of_their_own() -> None:
    sample = flux()
    tensors = adapter(sample, rank=4, alpha=1.0)
    tensors |= adapter(sample, rank=8, alpha=3.0, only="mlp", dtype=torch.bfloat16)
    tensors |= adapter(sample, rank=2, alpha=None, only="img_attn_proj")
    for i in range(2):
        del tensors[f"lora_unet_double_blocks_{i}_img_attn_proj.alpha"]
    [entry] = header(tensors, "peft").values()
    alphas = json.loads(entry)
    assert alphas["*"] == [1.0, "float32"] and len(alphas) == 1 + 8 + 2
    assert_same(chain(tensors, "peft", "comfy", "peft"), tensors)


def test_an_untrained_adapter_comes_back_as_it_was() -> None:
    for rank in (3, 4):
        tensors = {k: v * 0 if "lora_up" in k else v for k, v in adapter(flux(), rank=rank, alpha=float(rank)).items()}
        assert_same(chain(tensors, "peft"), tensors)


# ---- parts --------------------------------------------------------------------------------------------------------


def test_a_fused_layer_shares_its_down_matrix() -> None:
    tensors = adapter(flux(), alpha=4.0)
    peft = convert(tensors, "peft")
    path, up = "transformer.transformer_blocks.0.attn", tensors[f"{QKV}.lora_up.weight"]
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(peft[f"{path}.{part}.lora_A.weight"], tensors[f"{QKV}.lora_down.weight"])
        assert torch.equal(peft[f"{path}.{part}.lora_B.weight"], up[i * 32 : (i + 1) * 32])


def test_split_layers_have_the_small_rank() -> None:
    tensors = adapter(lumina(), split=True, rank=2, alpha=2.0)
    peft = convert(tensors, "peft")
    shapes = {part: tuple(peft[f"transformer.layers.1.attn.{part}.lora_B.weight"].shape) for part in ("to_q", "to_k")}
    assert shapes == {"to_q": (48, 2), "to_k": (16, 2)}
    down = tensors["lora_unet_layers_1_attention_qkv.lora_down.weight"]
    assert torch.equal(peft["transformer.layers.1.attn.to_k.lora_A.weight"], down[2:4])
    tensors = adapter(lumina(), split=True, rank=2, dora=True)
    tensors["lora_unet_layers_1_attention_qkv.lora_up.weight"][:, 1] = 0  # a rank that is not used
    assert convert(tensors, "peft")["transformer.layers.1.attn.to_q.lora_B.weight"].shape == (48, 2)


def test_last_layers_have_their_halves_swapped() -> None:
    for sample, key, path in (
        (flux(), "lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear"),
        (
            sd3(),
            "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1",
            "transformer.transformer_blocks.2.norm1_context.linear",
        ),
    ):
        tensors = adapter(sample, alpha=4.0)
        first, second = tensors[f"{key}.lora_up.weight"].chunk(2)
        assert torch.equal(convert(tensors, "peft")[f"{path}.lora_B.weight"], torch.cat([second, first]))


def test_files_with_some_parts_only() -> None:
    """What most FLUX files of other trainers are: no proj_mlp. Its rows are zero, and it stays away on the way back."""
    peft = convert(adapter(flux(), alpha=4.0, split=True), "peft")
    some = {k: v for k, v in peft.items() if "proj_mlp" not in k and "attn.to_k" not in k}
    kohya = to_kohya(some)
    up = kohya[f"{LINEAR1}.lora_up.weight"]
    assert up.shape == (32 * 7, 8) and kohya[f"{LINEAR1}.lora_down.weight"].shape == (8, 32)
    assert not up[32:64].any() and not up[96:].any() and up[:32, :4].all() and up[64:96, 4:].all()
    assert_same(convert(kohya, "peft"), some)


def test_parts_with_scales_of_their_own() -> None:
    peft = convert(adapter(flux(), split=True, alpha=4.0, only="double_blocks_0_img_attn_qkv"), "peft")
    path = "transformer.transformer_blocks.0.attn.to_q"
    kohya = to_kohya({**peft, f"{path}.alpha": torch.tensor(8.0)})
    expected = torch.block_diag(
        2 * peft[f"{path}.lora_B.weight"], *(v for k, v in peft.items() if "lora_B" in k and "to_q" not in k)
    )
    assert torch.equal(kohya[f"{QKV}.lora_up.weight"], expected) and f"{QKV}.alpha" not in kohya


# ---- what ComfyUI arrives at --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize(
    ("name", "to"), [*((name, to) for name in SAMPLES for to in ("kohya", "comfy")), ("flux", "peft"), ("sd3", "peft")]
)
def test_comfyui_arrives_at_the_trained_weights(name: str, split: bool, to: str) -> None:
    sample = SAMPLES[name]()
    tensors = adapter(sample, alpha=2.7, split=split)
    found, unused = comfy_apply(convert(tensors, to), published_weights(sample), comfy_keys(sample))
    if (name, to) == ("hunyuan_image", "kohya"):  # as sd-scripts writes them; ComfyUI has other names for some layers
        left = {key.partition(".")[0] for key in unused}
        assert "lora_unet_double_blocks_0_img_mlp_fc1" in left and "lora_unet_double_blocks_0_img_attn_qkv" not in left
        return
    assert unused == set()
    for path, weight in expected_weights(sample, tensors).items():
        assert torch.allclose(found[path], weight, atol=1e-4, rtol=1e-4), path


@pytest.mark.parametrize("version", ["sd1", "sd2"])
@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_comfyui_arrives_at_the_trained_weights_of_stable_diffusion(version: str, to: str) -> None:
    tensors = sd_adapter(version)
    weights = {n.published: sd_weight(n.ours[0]) for n in named_sd(version) if is_layer(n.ours[0])}
    both = {n.published: (f"lora_unet_{flat(n.ours[0])}", f"diffusion_model.{n.published}") for n in named_sd(version)}
    keys = {key: (path, None, False) for path in weights for key in both[path]}
    found, unused = comfy_apply(convert(tensors, to), weights, keys)  # type: ignore[arg-type]
    assert unused == set()
    for path, weight in weights.items():
        assert torch.allclose(found[path], changed(tensors, both[path][0], weight), atol=1e-5)


def is_layer(path: str) -> bool:
    return not any(norm in path.rpartition(".")[2] for norm in ("norm", "norm1", "norm2", "norm3"))


def sd_weight(path: str) -> Tensor:
    """A small weight: a kernel where the real one has a kernel."""
    kernel = (3, 3) if "conv" in path and "shortcut" not in path else (1, 1) if "proj_in" in path else ()
    return torch.randn(8, 6, *kernel, generator=torch.Generator().manual_seed(len(path)))


def sd_adapter(version: str, alpha: float = 2.7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(2)
    for path in sd_unet(version):
        if is_layer(path):
            key, shape = f"lora_unet_{flat(path)}", sd_weight(path).shape
            found[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
            found[f"{key}.lora_down.weight"] = torch.randn(4, *shape[1:], generator=draw).to(dtype)
            found[f"{key}.lora_up.weight"] = torch.randn(8, 4, *[1] * (len(shape) - 2), generator=draw).to(dtype)
    return found


# ---- DoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("name", ["flux", "sd3", "lumina"])
def test_each_readers_dora_formula_gives_the_trained_weights(name: str, split: bool) -> None:
    sample = SAMPLES[name]()
    tensors = adapter(sample, alpha=2.0, dora=True, split=split)
    expected = expected_weights(sample, tensors)  # kohya files: m V / |V|, as LyCORIS reads them
    base = {f"lora_unet_{flat(path)}": weight for path, weight in published_weights(sample).items()}
    norms = dora_norms(tensors, base.get)
    for key, (before, after) in norms_of(sample, tensors).items():
        assert torch.allclose(norms[key][0], before) and torch.allclose(norms[key][1], after, rtol=1e-5)
    comfy = convert(tensors, "comfy", norms=norms)
    found, unused = comfy_apply(comfy, published_weights(sample), comfy_keys(sample))
    assert unused == set()
    peft = convert(tensors, "peft")
    for layer, modules in sample.layers():
        path = layer.published
        assert torch.allclose(found[path], expected[path], atol=1e-4, rtol=1e-4), path
        whole = expected[path]
        if layers_in(tensors)[f"lora_unet_{flat(path)}"].swaps(*whole.shape[:2]):
            whole = torch.cat(whole.chunk(2)[::-1])
        for own, module, part in zip(layer.ours, modules, whole.split([len(m.weight) for m in modules])):
            assert torch.allclose(peft_dora(peft, f"transformer.{own}", module.weight), part, atol=1e-4, rtol=1e-4), own
    back = chain(tensors, "comfy", norms=norms)
    assert all(torch.allclose(back[key], value, rtol=1e-5) for key, value in tensors.items())
    assert_same(chain(tensors, "peft"), tensors)


def peft_dora(tensors: dict[str, Tensor], path: str, weight: Tensor) -> Tensor:
    """PEFT: m / |V| * V with V = W + B A, rows of the output."""
    up, down = tensors[f"{path}.lora_B.weight"], tensors[f"{path}.lora_A.weight"]
    magnitude = tensors[f"{path}.lora_magnitude_vector"]
    assert magnitude.shape == ((len(weight),) if weight.dim() == 2 else (1, len(weight), 1, 1))
    v = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    shape = (-1, *[1] * (weight.dim() - 1))
    return magnitude.reshape(shape) / v.flatten(1).norm(dim=1).reshape(shape) * v


def test_dora_needs_the_base_model_for_comfy() -> None:
    tensors = adapter(flux(), dora=True, only="double_blocks_0_img_mlp_0")
    with pytest.raises(UserError, match="img_mlp_0 is a DoRA: ComfyUI scales it by the base model's weights"):
        convert(tensors, "comfy")
    with pytest.raises(UserError, match="the base model has no weight for 1 layers of the adapter: lora_unet_double"):
        dora_norms(tensors, lambda name: None)
    key = "lora_unet_double_blocks_0_img_mlp_0.dora_scale"
    inputs = {**tensors, key: torch.rand(1, 32)}  # of the input axis: both formulas are the same
    assert torch.equal(convert(inputs, "comfy")["diffusion_model.double_blocks.0.img_mlp.0.dora_scale"], inputs[key])


# ---- what other programs write ------------------------------------------------------------------------------------


def test_spellings_of_other_programs() -> None:
    expected = adapter(flux(), alpha=4.0)
    peft = convert(expected, "peft")
    kohya = {key: value for key, value in expected.items() if not key.endswith("alpha")}

    def spelled(prefix: str, a: str, b: str) -> dict[str, Tensor]:
        return {
            prefix + k.removeprefix("transformer.").replace("lora_A.weight", a).replace("lora_B.weight", b): v
            for k, v in peft.items()
        }

    for tensors in (
        spelled("transformer.", "lora_A.default.weight", "lora_B.default.weight"),
        spelled("transformer.", "lora.down.weight", "lora.up.weight"),
        spelled("transformer.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        spelled("base_model.model.", "lora_A.weight", "lora_B.weight"),
        spelled("", "lora_A.my_name.weight", "lora_B.my_name.weight"),
        spelled("transformer.", "lora_down.weight", "lora_up.weight"),
    ):
        assert_same(to_kohya(tensors), kohya)
    for prefix in ("lora_transformer_", "lora_unet_"):  # flat names of diffusers' layers
        flat_names = {}
        for key, value in spelled("", "lora_down.weight", "lora_up.weight").items():
            path, _, ending = key.rpartition(".lora_")
            flat_names[f"{prefix}{flat(path)}.lora_{ending}"] = value
        assert_same(to_kohya(flat_names), kohya)
    bare = {k.removeprefix("diffusion_model."): v for k, v in convert(expected, "comfy").items()}
    assert format_of(bare) == "comfy"
    assert_same(to_kohya(bare), expected)
    assert_same(to_kohya({f"model.diffusion_model.{k}": v for k, v in bare.items()}), expected)


def test_alphas_in_a_header_of_diffusers(tmp_path: Path) -> None:
    """What `save_lora_weights` writes: readers multiply with lora_alpha / r, or lora_alpha / sqrt(r)."""
    peft = convert(adapter(flux(), alpha=4.0, only="img_mlp"), "peft")
    config = {
        "transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": False,
        "transformer.alpha_pattern": {"transformer_blocks.1.ff.net.2": 16}, "transformer.rank_pattern": {},
    }  # fmt: skip
    path = tmp_path / "a.safetensors"
    write_tensors(path, peft, {"lora_adapter_metadata": json.dumps(config)})
    found = read_adapter(path)
    alphas = {key: float(value) for key, value in found.items() if key.endswith("alpha")}
    assert alphas == {
        f"lora_unet_double_blocks_{i}_img_mlp_{j}.alpha": 16.0 if (i, j) == (1, 2) else 8.0
        for i in (0, 1)
        for j in (0, 2)
    }
    write_tensors(path, peft, {"lora_adapter_metadata": json.dumps({**config, "transformer.use_rslora": True})})
    assert read_tensors(path)["transformer.transformer_blocks.0.ff.net.2.alpha"] == 16.0
    write_tensors(path, peft, {"lora_adapter_metadata": "no json"})
    with pytest.raises(UserError, match="the header entry lora_adapter_metadata is not understood"):
        read_tensors(path)


def test_an_adapter_file_restores_its_alphas(tmp_path: Path) -> None:
    tensors = full("sd3", alpha=2.7, dtype=torch.float16)
    path = tmp_path / "a.safetensors"
    write_tensors(path, convert(tensors, "peft"), header(tensors, "peft"))
    assert_same(read_adapter(path), tensors)
    write_tensors(path, tensors, {})
    assert_same(read_adapter(path), tensors)


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_what_peft_has_no_name_for() -> None:
    tensors = adapter(flux(), only="double_blocks_0_img")
    conv = "lora_unet_mid_block_resnets_0_conv1"
    tucker = {
        f"{conv}.lora_down.weight": torch.ones(2, 8, 1, 1), f"{conv}.lora_mid.weight": torch.ones(2, 2, 3, 3),
        f"{conv}.lora_up.weight": torch.ones(8, 2, 1, 1),
    }  # fmt: skip
    for foreign, expected in (
        (tucker, f"1 adapters have no name in the peft format: {conv} (lora_down.weight, lora_mid.weight"),
        ({**tensors, f"{QKV}.w_norm": torch.ones(2)}, f"{QKV} (alpha, lora_down.weight, lora_up.weight, w_norm)"),
        ({f"{QKV}.hada_w1_a": torch.ones(2, 2)}, f"1 adapters have no name in the peft format: {QKV} (hada_w1_a)"),
        ({f"{QKV}.lokr_w1": torch.ones(2, 2)}, f"{QKV} (lokr_w1)"),
        ({**tensors, f"{QKV}.dora_scale": torch.ones(1, 32)}, f"{QKV} (alpha, dora_scale,"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            convert(foreign, "peft")
        assert expected in str(error.value) and "\n" not in str(error.value)


def test_comfy_takes_every_kind_of_adapter() -> None:
    """ComfyUI knows kohya's suffixes below dotted names; Tucker's middle matrix only beside lora_up and lora_down."""
    conv, norm = "lora_unet_mid_block_resnets_0_conv1", "lora_unet_mid_block_resnets_0_norm1"
    tensors = {
        f"{conv}.alpha": torch.tensor(1.0), f"{conv}.lora_down.weight": torch.ones(2, 8, 1, 1),
        f"{conv}.lora_mid.weight": torch.ones(2, 2, 3, 3), f"{conv}.lora_up.weight": torch.ones(8, 2, 1, 1),
        f"{norm}.w_norm": torch.ones(8), f"{norm}.b_norm": torch.ones(8),
    }  # fmt: skip
    comfy = convert(tensors, "comfy")
    block = "diffusion_model.middle_block.0.in_layers"
    assert {*comfy} == {
        f"{block}.2.alpha", f"{block}.2.lora_down.weight", f"{block}.2.lora_mid.weight", f"{block}.2.lora_up.weight",
        f"{block}.0.w_norm", f"{block}.0.b_norm",
    }  # fmt: skip
    assert_same(convert(comfy, "kohya"), tensors)


def test_what_is_not_understood() -> None:
    other = random_lora(
        {"lora_unet_stages_4_1_proj_in": (8, 8), "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 8)}
    )
    for tensors, expected in (
        (other, "the adapter is for no architecture that is known (Stable Diffusion 1.x, Stable Diffusion 2.x, FLUX.1"),
        (random_lora({QKV: (96, 32), "lora_unet_double_blocks_0_img_mod_other": (8, 8)}),
         "1 of 2 layers of the adapter are unknown: FLUX.1 or Chroma comes nearest but has not lora_unet_double"),
        ({"transformer.x_embedder.lora_C.weight": torch.ones(1)}, "1 keys of the adapter file are not understood"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            convert(tensors, "comfy")
        assert expected in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(
        UserError, match=r"is for no architecture that is known \(Stable Diffusion 3 or 3\.5\): lora_unet_double"
    ):
        convert(random_lora({QKV: (96, 32)}), "peft", architecture="sd3")
    for damaged in ("no json", '{"*": 3}', '{"*": [1.0, "nn"]}', '{"*": [1.0, "nothing"]}', "[]"):
        with pytest.raises(UserError, match="the header entry lora_alphas of the adapter file is not understood"):
            alphas_in({"lora_alphas": damaged})


def test_text_encoders_alone() -> None:
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = random_lora({key: (8, 8)})
    assert architecture_of(tensors) == "flux"
    assert all(k.startswith("text_encoder_3.") for k in convert(tensors, "peft", architecture="sd3"))


def test_unknown_kohya_keys_are_left_to_the_network() -> None:
    tensors = {"lora_unet_anything.lora_down.weight": torch.ones(1), "oft_unet_x.oft_blocks": torch.ones(1)}
    assert_same(to_kohya(tensors), tensors)
    assert_same(to_kohya({"foo.bar.lora_down.weight": torch.ones(1)}), {"foo.bar.lora_down.weight": torch.ones(1)})


@pytest.mark.parametrize("encoder", [[], ["lora_te_text_model_encoder_layers_0_mlp_fc1"]])
def test_a_small_model_has_layers_that_the_published_one_has_not(encoder: list[str]) -> None:
    """Flat names of XL in diffusers, and of a U-Net of 1.x with attention in its first block upwards."""
    layers = ["lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_up_blocks_0_attentions_0_proj_in", *encoder]
    file = {f"{name}.{end}.weight": torch.ones(2, 2) for name in layers for end in ("lora_down", "lora_up")}
    assert to_kohya(file, among=["sd1", "sd2"]).keys() == file.keys()
    if not encoder:
        assert "lora_unet_input_blocks_4_1_proj_in.lora_up.weight" in to_kohya(file, among=["sdxl"])
