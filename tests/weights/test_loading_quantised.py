# SPDX-License-Identifier: Apache-2.0
"""Models that are quantised while they are loaded: names, values, memory, fp8 files as they are, errors, learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.errors import UserError
from library.families.adapters import load_network_module
from library.families.family import ModelFamily
from library.families.registry import FAMILIES, open_family
from library.memory.quantise import QuantLinear, quantise, quantised, quantised_names
from library.types import Cond
from library.weights.text_encoders import t5_encoder
from library.weights.weight_files import WeightFile, open_weights
from tests.families import anima, flux, hunyuan_image, lumina, sana, sd, sd3, sdxl
from tests.tiny_text import make_t5

KINDS = ("fp8", "int8", "nf4")
MAKE: dict[str, Callable[..., dict[str, Any]]] = {
    "flux": partial(flux.make, t5xxl_max_token_length=24), "lumina": lumina.make, "sd": sd.make, "sd3": sd3.make,
    "sdxl": sdxl.make, "anima": anima.make, "sana": sana.make, "hunyuan_image": hunyuan_image.make,
}  # fmt: skip
CAPTIONS = ["a photo of a cat", "red dog"]
# kind -> most relative error of what a whole tiny model predicts
PREDICTED = {"fp8": 0.1, "int8": 0.05, "nf4": 0.35}


def family_of(name: str, options: dict[str, Any]) -> ModelFamily:
    sheet = FAMILIES[name]
    values = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return open_family(sheet, sheet.option_groups["model"](**values))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFamily]:
    made: dict[str, dict[str, Any]] = {}

    def get(name: str, **more: Any) -> ModelFamily:
        if name not in made:
            made[name] = MAKE[name](tmp_path_factory.mktemp(name))
        return family_of(name, made[name] | more)

    return get


def quant_layers(module: nn.Module) -> dict[str, QuantLinear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, QuantLinear)}


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded(family: Callable[..., ModelFamily], name: str, kind: Any) -> None:
    """Every Linear of a block holds what its weight gives, everything else is as without: denoiser and encoders."""
    own = family(name)
    pairs = [[own.load_denoiser(torch.float32, "cpu", storage=storage) for storage in ("plain", kind)]]
    for encoder in own.encoders:
        load = own.load_text_encoder
        pairs.append([load(encoder, torch.float32, "cpu", storage=storage) for storage in ("plain", kind)])
    for plain, small in pairs:
        layers, names = quant_layers(small), quantised_names(plain)
        names += [n for n, m in plain.named_modules() if n.endswith(".DenseReluDense.wo")]  # of T5: a way of their own
        assert set(layers) == set(names) and names
        for path, layer in layers.items():
            expected = quantised(plain.get_submodule(path).weight, kind)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(layer.tensors, expected))
            assert layer.weight.dtype == torch.float32 and not layer.training
        others = dict(small.named_parameters())
        for path, parameter in plain.named_parameters():
            if path.removesuffix(".weight") not in layers:
                assert torch.equal(others[path], parameter), path
        assert not any(p.requires_grad for p in small.parameters())
        assert not any(t.is_meta for t in (*small.parameters(), *small.buffers()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_file_s_precision_is_quantised(
    family: Callable[..., ModelFamily], kind: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Not what the computation's dtype would leave of it. Without a dtype each layer computes in the file's."""
    source = family("flux").options.pretrained_model_name_or_path
    path = tmp_path / "m.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(source).items()}, path)
    halves, exact = family("flux", pretrained_model_name_or_path=path), family("flux")
    for own, asked, wanted in ((halves, torch.float32, torch.float32), (halves, None, dtype), (exact, dtype, dtype)):
        small = quant_layers(own.load_denoiser(asked, "cpu", storage=kind))
        plain = own.load_denoiser(None, "cpu")
        for name, layer in small.items():
            assert layer.weight.dtype == wanted
            assert torch.equal(layer.stored, quantised(plain.get_submodule(name).weight, kind).data), name


@pytest.mark.parametrize("storage", ["plain", "half", *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_empty_model_is_the_loaded_one_without_memory(
    family: Callable[..., ModelFamily], storage: Any, dtype: torch.dtype
) -> None:
    part = family("flux").parts.denoiser
    described = []
    for module in (part.load(dtype, "cpu", storage=storage), part.empty(dtype, storage)):
        tensors = (*module.named_parameters(), *module.named_buffers())
        described.append({name: (tensor.shape, tensor.dtype) for name, tensor in tensors})
    assert described[0] == described[1]


def test_missing_weights_are_named(family: Callable[..., ModelFamily], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = load_file(family("flux").options.pretrained_model_name_or_path)
    del tensors["double_blocks.1.img_attn.qkv.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"1 weights of the .* are missing"):
        family("flux", pretrained_model_name_or_path=path).load_denoiser(torch.float32, "cpu", storage="int8")


# ---- memory ---------------------------------------------------------------------------------------------------------


class Copies(WeightFile):
    """A file whose tensors are read into memory, as they are for another device: no mapping hides a second copy."""

    def __init__(self, file: WeightFile) -> None:
        self.path, self.shapes, self.is_float8, self._file = file.path, file.shapes, file.is_float8, file

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return self._file.tensor(name, dtype, device).clone()

    def release(self) -> None:
        self._file.release()


class LiveBytes(TorchDispatchMode):
    """The most bytes that the storages of all tensors had at a time that were made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_never_two_copies(family: Callable[..., ModelFamily], kind: Any, tmp_path: Path) -> None:
    """At the peak there is what is kept, and one tensor on its way with what quantising it needs."""
    path = tmp_path / "m.safetensors"
    tensors = flux.published_denoiser(flux.tiny_denoiser("dev", single=14))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    whole, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    del tensors
    part = family("flux", pretrained_model_name_or_path=path).parts.denoiser
    part = replace(part, file=Copies(part.file))
    with LiveBytes() as live:
        denoiser = part.load(torch.float32, "cpu", storage=kind)
    kept = sum(t.nbytes for t in (*denoiser.parameters(), *denoiser.buffers()))
    print(f"{kind}: file {whole / 1e6:.1f} MB, kept {kept / 1e6:.1f} MB, peak {live.peak / 1e6:.1f} MB")
    assert live.peak <= kept + 3 * largest < 0.5 * whole
    with LiveBytes() as plain:
        part.load(torch.float32, "cpu")
    assert plain.peak >= whole  # the meter sees a whole copy


# ---- files in fp8 ---------------------------------------------------------------------------------------------------


def fp8_file(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """A published file in 8 bits: blocks' matrices, or everything where nothing is scaled."""
    if how in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if how == "e4m3" else torch.float8_e5m2
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if how == "tensor" else {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "_blocks." not in name:
            found[name] = tensor.bfloat16()
            continue
        scale = tensor.abs().amax(1) / 448 if how == "row" else tensor.abs().max() / 448
        found[name] = (tensor / (scale[:, None] if how == "row" else scale)).to(torch.float8_e4m3fn)
        ending = "scale_weight" if how == "tensor" else "weight_scale"
        found[f"{name.removesuffix('weight')}{ending}"] = scale
    return found


@pytest.mark.parametrize("how", ["e4m3", "e5m2", "tensor", "row"])
def test_fp8_files_are_used_as_they_are(family: Callable[..., ModelFamily], how: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = fp8_file(load_file(family("flux").options.pretrained_model_name_or_path), how)
    save_file(tensors, path)
    own = family("flux", pretrained_model_name_or_path=path)
    small, plain = own.load_denoiser(torch.float32, "cpu", storage="fp8"), own.load_denoiser(torch.float32, "cpu")
    layers = quant_layers(small)
    fused = torch.cat([layers[f"transformer_blocks.1.attn.to_{part}"].stored.view(torch.uint8) for part in "qkv"])
    assert torch.equal(fused, tensors["double_blocks.1.img_attn.qkv.weight"].view(torch.uint8))
    output = layers["single_transformer_blocks.0.proj_out"]
    stored = tensors["single_blocks.0.linear2.weight"]
    assert output.stored.dtype == stored.dtype
    assert torch.equal(output.stored.view(torch.uint8), stored.view(torch.uint8))
    for name, layer in layers.items():  # scale included, the weight is the one that a plain model has
        torch.testing.assert_close(layer.weight, plain.get_submodule(name).weight, rtol=1e-6, atol=0)
    again = own.load_denoiser(torch.float32, "cpu", storage="int8")
    layer = quant_layers(again)["single_transformer_blocks.0.proj_out"]
    wanted = quantised(plain.get_submodule("single_transformer_blocks.0.proj_out").weight, "int8")
    assert torch.equal(layer.stored, wanted.data)


def test_what_a_file_has_in_fp8(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    matrix, rows = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.rand(6)
    tensors = {
        "a.weight": matrix, "a.weight_scale": torch.tensor(0.5), "b.weight": matrix, "b.weight_scale": rows,
        "c.weight": matrix, "d.weight": torch.randn(6, 4), "e.weight": matrix, "e.weight_scale": torch.rand(3),
        "a.bias": matrix[0].clone(),
    }  # fmt: skip
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    file = open_weights(path)
    scales = {"a.weight": torch.full((6,), 0.5), "b.weight": rows, "c.weight": torch.ones(6)}
    for name, expected in scales.items():
        found = file.stored(name)
        assert found is not None and torch.equal(found[1], expected)
        assert torch.equal(found[0].view(torch.uint8), matrix.view(torch.uint8))
    assert all(file.stored(name) is None for name in ("d.weight", "e.weight", "a.bias"))


def test_halves_that_change_places_take_their_scales_along(tmp_path: Path) -> None:
    """SD3 writes (shift, scale) where diffusers' modules have (scale, shift), once inside a block."""
    options = sd3.make(tmp_path / "sd3", layout="single")
    own = family_of("sd3", options)
    path = Path(own.options.pretrained_model_name_or_path)
    tensors = load_file(path)
    found = dict(tensors)
    for name, tensor in tensors.items():
        if "joint_blocks." in name and tensor.ndim == 2:
            scale = tensor.float().abs().amax(1) / 448
            found[name] = (tensor.float() / scale[:, None]).to(torch.float8_e4m3fn)
            found[f"{name}_scale"] = scale
    save_file(found, path)
    own = family_of("sd3", options)
    small, plain = own.load_denoiser(torch.float32, "cpu", storage="fp8"), own.load_denoiser(torch.float32, "cpu")
    for name, layer in quant_layers(small).items():
        assert layer.stored.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(layer.weight, plain.get_submodule(name).weight, rtol=1e-6, atol=0)
    last = max(int(name.split(".")[1]) for name in quant_layers(small))
    own_bytes = quant_layers(small)[f"transformer_blocks.{last}.norm1_context.linear"].stored.view(torch.uint8)
    moved = found[next(n for n in found if n.endswith(f"joint_blocks.{last}.context_block.adaLN_modulation.1.weight"))]
    assert torch.equal(torch.cat(own_bytes.chunk(2)[::-1]), moved.view(torch.uint8))


# ---- what is computed -----------------------------------------------------------------------------------------------


def encode(own: ModelFamily) -> Cond:
    encoders = {name: own.load_text_encoder(name, torch.float32, "cpu") for name in own.encoders}
    with torch.no_grad():
        return own.encode_text(own.tokenize(CAPTIONS), encoders)


def predict(own: ModelFamily, denoiser: nn.Module, cond: Cond, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        x = torch.randn(2, own.latent.channels, 8, 8, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0.3, 0.9]) if own.name not in ("sd", "sdxl") else torch.tensor([300, 900])
        cond = {name: c.to(dtype) if c.is_floating_point() else c for name, c in cond.items()}
        return own.predict(denoiser, x.to(dtype), t, cond, None).float()


@pytest.mark.parametrize("name", MAKE)
def test_error_of_a_prediction(family: Callable[..., ModelFamily], name: str) -> None:
    own = family(name)
    cond = encode(own)
    exact = predict(own, own.load_denoiser(torch.float32, "cpu"), cond)

    def error(dtype: torch.dtype, storage: Any) -> float:
        found = predict(own, own.load_denoiser(dtype, "cpu", storage=storage), cond, dtype)
        result = ((found - exact).norm() / exact.norm()).item()
        print(f"{name} {storage} {dtype}: relative error of the prediction {result:.4f}")
        return result

    rounding = error(torch.bfloat16, "plain")
    for kind in KINDS:
        assert 0 < error(torch.float32, kind) < PREDICTED[kind]
        assert 0 < error(torch.bfloat16, kind) < PREDICTED[kind] + rounding
    plain = own.load_denoiser(torch.float32, "cpu")
    assert quantise(plain, "fp8") > 0
    loaded = own.load_denoiser(torch.float32, "cpu", storage="fp8")
    assert torch.equal(predict(own, plain, cond), predict(own, loaded, cond))


@pytest.mark.parametrize("kind", KINDS)
def test_t5_in_float16_does_not_overflow(kind: Any, tmp_path: Path) -> None:
    """Its feed-forward layers exceed float16, as the real one's do."""
    made = make_t5(tmp_path)
    for name, factor in (("wi_1", 30), ("wo", 5e4)):
        made.module.get_submodule(f"encoder.block.0.layer.1.DenseReluDense.{name}").weight.data *= factor
    save_file({name: t.half().clone() for name, t in made.module.state_dict().items()}, made.path)
    part, ids = t5_encoder(made.path, option="--t5xxl").part, torch.arange(8)[None]
    with torch.no_grad():
        exact = part.load(torch.float32, "cpu")(ids).last_hidden_state
        for dtype in (torch.float16, torch.float32):
            module = part.load(dtype, "cpu", storage=kind)
            assert isinstance(module.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo"), QuantLinear)
            found = module(ids).last_hidden_state.float()
            assert (found - exact).norm() / exact.norm() < 2 * PREDICTED[kind]


@pytest.mark.parametrize("name", ["flux", "sd"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_learns(family: Callable[..., ModelFamily], name: str, kind: Any) -> None:
    own = family(name)
    denoiser = own.load_denoiser(torch.float32, "cpu", storage=kind)
    before = {path: tensor.clone() for path, tensor in denoiser.state_dict().items()}
    cond = encode(own)
    torch.manual_seed(0)
    network = load_network_module(own.sheet.default_network).create_network(1.0, 4, 4, None, [], denoiser)
    network.attach(train_denoiser=True, train_text_encoder=False)
    x, target = (torch.randn(2, own.latent.channels, 8, 8) for _ in range(2))
    t = torch.tensor([0.3, 0.9]) if name == "flux" else torch.tensor([300, 900])
    optimizer = torch.optim.AdamW(network.param_groups(learning_rate=1e-2))
    losses = []
    for _ in range(12):
        loss = (own.predict(denoiser, x, t, cond, None) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{name} {kind}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(tensor, before[path]) for path, tensor in denoiser.state_dict().items())
