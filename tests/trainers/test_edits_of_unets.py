# SPDX-License-Identifier: Apache-2.0
"""--task edit with SD 1.x and SDXL (InstructPix2Pix): the step, files of both methods, tools, previews, bad input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.families.sd.editing import without_some
from library.sampling.preview import Previewer, PreviewModels
from library.sampling.prompts import Prompt
from library.stopping import StopRequest
from library.trainers.checks import check
from library.types import Batch
from library.weights.weight_files import open_weights
from networks.convert_lora import main as convert_lora
from networks.extract_lora_from_models import main as extract_lora
from networks.merge_lora import main as merge_lora
from networks.resize_lora import main as resize_lora
from tests.families import sd, sdxl
from tests.trainers.finetune_runs import finetune
from tests.trainers.helpers import (
    Run,
    assert_same_run,
    make_method,
    make_pictures,
    micro_generator,
    randomized,
    subset,
    train,
    write_dataset,
)
from tools.convert_model import main as convert_model

FIRST = {"sd": "lora_unet_conv_in", "sdxl": "lora_unet_input_blocks_0_0"}
MAKE = {"sd": sd.make, "sdxl": sdxl.make}
LOSS = {"sd": sd.loss, "sdxl": sdxl.loss}
KERNEL = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True)
class Ground:
    """A tiny model of a family in both layouts, and pairs to learn from."""

    family: str
    folder: Path  # diffusers
    file: Path  # published names
    data: Path
    references: Path
    room: Path

    @property
    def options(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "network_module": None,
            "task": "edit",
            "pretrained_model_name_or_path": self.folder,
        }

    def train(self, folder: Path, **values: Any) -> Run:
        return train(None, self.data, folder, **{**self.options, **values})


@pytest.fixture(scope="module", params=FIRST)
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return ground_of(request.param, tmp_path_factory.mktemp(request.param))


def ground_of(family: str, room: Path) -> Ground:
    folder = MAKE[family](room / "model")["pretrained_model_name_or_path"]
    file = MAKE[family](room / "single", layout="single")["pretrained_model_name_or_path"]
    pictures, references = make_pictures(room / "pictures", 2), make_pictures(room / "references", 4)
    data = write_dataset(room / "pairs.toml", subset(pictures, conditioning_data_dir=str(references)))
    return Ground(family, folder, file, data, references, room)


@pytest.fixture(scope="module")
def trained(ground: Ground) -> Path:
    """The LoRA of two steps, all of its matrices far from zero."""
    run = ground.train(ground.room / "lora", max_train_steps=2)
    assert run.metadata["ss_task"] == "edit"
    weights = randomized(run.weights)
    weights[f"{FIRST[ground.family]}.diff"][:, :4] = 0
    save_file(weights, ground.room / "trained.safetensors", run.metadata)
    return ground.room / "trained.safetensors"


def opened(ground: Ground, model: Path, **options: Any) -> Any:
    return method_of(ground, model, **options).family


def method_of(ground: Ground, model: Path, **options: Any) -> Any:
    values = {"pretrained_model_name_or_path": model, "output_dir": "x", "dataset_config": ground.data, **options}
    return make_method("network", values, family=ground.family)


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def prediction(family: Any, x: Tensor, reference: Tensor | None) -> Tensor:
    """What a family's denoiser predicts without text."""
    batch = Batch(["a", "b"], ["", ""], torch.ones(2), references=() if reference is None else (reference,))
    for name in ("original_sizes", "crop_top_lefts", "target_sizes"):
        setattr(batch, name, torch.full((2, 2), 64.0))
    denoiser = family.load_denoiser(torch.float32, "cpu")
    with torch.no_grad():
        return family.predict(denoiser, x, torch.tensor([10, 700]), family.blank_cond(2), batch)


# ---- the step -------------------------------------------------------------------------------------------------------


def test_new_channels_change_nothing_at_first(ground: Ground) -> None:
    plain, edit = opened(ground, ground.folder), opened(ground, ground.file, task="edit")
    edit.check_weights()
    before, after = prediction(plain, noise(1), None), prediction(edit, noise(1), 9 * noise(2))
    assert float((before - after).abs().max()) <= 1e-6
    assert edit.empty_denoiser().config.in_channels == 8 and edit.grows_input and not plain.grows_input


def test_one_step_equals_the_literal_reference(ground: Ground, trained: Path, tmp_path: Path) -> None:
    run = ground.train(tmp_path, network_weights=trained, keep_gradients=True, max_train_steps=1, learning_rate=1e-30)
    adapters = {key: value.requires_grad_() for key, value in load_file(trained).items()}
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    assert len(batch.reference_pixels) == 1
    loss = LOSS[ground.family](ground.options, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {key: value.grad for key, value in adapters.items() if value.grad is not None and "alpha" not in key}
    found, first = dict(run.trainer.gradients[0]), FIRST[ground.family]
    own, whole = found.pop(f"{first}.new"), expected.pop(f"{first}.diff")
    largest = max(float(grad.abs().max()) for grad in expected.values())
    assert float((own - whole[:, 4:]).abs().max()) < 1e-5 * float(whole.abs().max())
    assert float(whole[:, 4:].abs().max()) > 1e-3 * float(whole.abs().max())
    assert max(float((found[key] - grad).abs().max()) for key, grad in expected.items()) < 1e-5 * largest


# ---- files ----------------------------------------------------------------------------------------------------------


def tool(main: Any, **values: Any) -> None:
    words = [word for name, value in values.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]
    assert main(words) == 0


def test_a_merged_checkpoint_reads_eight_channels(ground: Ground, trained: Path, tmp_path: Path) -> None:
    """It predicts what the base model does with the LoRA on it, and the difference to the base is the LoRA again."""
    merged, name, adapter = tmp_path / "merged.safetensors", FIRST[ground.family], tmp_path / "adapter.safetensors"
    # the tools know the published layouts only, and the tiny SD 1.x has other blocks on the way up
    save_file({key: value for key, value in load_file(trained).items() if "_up_blocks_" not in key}, adapter)
    tool(merge_lora, sd_model=ground.file, models=adapter, save_to=merged, ratios=0.5)
    kernel, diff = load_file(merged)[KERNEL], load_file(trained)[f"{name}.diff"]
    assert torch.equal(kernel, sd.wider(load_file(ground.file)[KERNEL]) + 0.5 * diff)
    opened(ground, merged, task="edit", tokenizer_cache_dir=tmp_path).check_weights()
    tool(extract_lora, model_org=ground.file, model_tuned=merged, save_to=tmp_path / "again.safetensors", dim=4)
    again = load_file(tmp_path / "again.safetensors")
    assert torch.allclose(again[f"{name}.diff"], 0.5 * diff, atol=1e-7)
    with pytest.raises(UserError, match=r"is an edit model \(8 input channels\): add --task edit"):
        opened(ground, merged).check()


def test_the_tools_keep_the_new_channels(ground: Ground, trained: Path, tmp_path: Path) -> None:
    key = f"{FIRST[ground.family]}.diff"
    diff = load_file(trained)[key]
    tool(resize_lora, model=trained, save_to=tmp_path / "small.safetensors", new_rank=1)
    assert torch.equal(load_file(tmp_path / "small.safetensors")[key], diff)
    domain = {name: value for name, value in load_file(trained).items() if name != key}
    save_file(domain, tmp_path / "domain.safetensors")
    tool(
        merge_lora, models=[tmp_path / "domain.safetensors", trained], ratios=[1, 0.25],
        save_to=tmp_path / "both.safetensors",
    )  # fmt: skip
    assert torch.equal(load_file(tmp_path / "both.safetensors")[key], 0.25 * diff)
    assert open_weights(tmp_path / "both.safetensors").metadata["ss_task"] == "edit"
    tool(convert_lora, src=trained, dst=tmp_path / "comfy.safetensors", to="comfy")
    comfy = load_file(tmp_path / "comfy.safetensors")
    assert torch.equal(comfy["diffusion_model.input_blocks.0.0.diff"], diff)
    tool(convert_lora, src=tmp_path / "comfy.safetensors", dst=tmp_path / "back.safetensors", to="kohya")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(trained).keys()


@pytest.fixture(scope="module")
def tuned(ground: Ground) -> Path:
    """The folder that full training writes."""
    options = {name: value for name, value in ground.options.items() if name != "network_module"}
    finetune(ground.data, ground.room / "full", save_model_as="diffusers_safetensors", **options)
    return ground.room / "full" / "x"


def test_full_training_saves_what_diffusers_edits_with(ground: Ground, tuned: Path, tmp_path: Path) -> None:
    """A preview of the saved model is the picture that diffusers' pipeline makes of it."""
    import diffusers

    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tuned, safety_checker=None)
    name = (
        "StableDiffusionXLInstructPix2PixPipeline"
        if ground.family == "sdxl"
        else "StableDiffusionInstructPix2PixPipeline"
    )
    assert type(pipeline).__name__ == name and pipeline.unet.config.in_channels == 8
    assert float(pipeline.unet.conv_in.weight[:, 4:].abs().max()) > 0
    family, reference = opened(ground, tuned, task="edit"), ground.references / "p00.png"
    prompt = Prompt(
        "a red star", 64, 64, 5, 4, 6.0, negative_prompt="blue", references=(str(reference),), image_scale=1.3
    )
    options = method_of(ground, tuned).options
    objective = family.objective(options.objective, options.loss)
    previewer = Previewer(family, objective, [prompt], output_dir=tmp_path, output_name="x")
    encoders = {name: family.load_text_encoder(name, torch.float32, "cpu") for name in family.encoders}
    models = PreviewModels(family.load_denoiser(torch.float32, "cpu"), family.load_vae(torch.float32, "cpu"), encoders)
    (ours,) = previewer.render(models, step=1, epoch=None, device="cpu", dtype=torch.float32)
    sampler = previewer._sampler(prompt)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(sampler.scheduler.config)
    start = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        prompt.prompt, image=Image.open(reference).convert("RGB"), num_inference_steps=4, guidance_scale=6.0,
        image_guidance_scale=1.3, negative_prompt="blue", latents=start, output_type="np",
    ).images[0]  # fmt: skip
    difference = np.abs(np.asarray(ours.image, dtype=float) - 255 * theirs)
    assert difference.max() < 1.01, difference.max()
    assert "Image CFG scale: 1.3" in str(Image.open(ours.path).info["parameters"])


def test_models_are_converted_with_all_channels(ground: Ground, tuned: Path, tmp_path: Path) -> None:
    """Folder to file to folder: the same U-Net, which both give the same predictions."""
    assert convert_model([str(tuned), str(tmp_path / "x.safetensors")]) == 0
    assert load_file(tmp_path / "x.safetensors")[KERNEL].shape == (32, 8, 3, 3)
    one, other = opened(ground, tuned, task="edit"), opened(ground, tmp_path / "x.safetensors", task="edit")
    assert not one.grows_input and not other.grows_input
    predictions = [prediction(family, noise(1), noise(2)) for family in (one, other)]
    assert torch.equal(*predictions) and not torch.equal(predictions[0], prediction(one, noise(1), noise(3)))


# ---- what learns ----------------------------------------------------------------------------------------------------

KINDS = {
    "lora": {"network_args": ["dora_wd=True", "conv_dim=2"]}, "lora_fa": {}, "dylora": {}, "loha": {}, "lokr": {},
    "oft": {"network_dim": 2, "network_alpha": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return ground_of("sd", tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapters_trains_the_new_channels(kind: str, small: Ground, tmp_path: Path) -> None:
    """... goes on from its file, and merges into the model."""
    module, key = f"networks.{kind}", "lora_unet_conv_in.diff"
    run = small.train(tmp_path / "first", network_module=module, max_train_steps=2, **KINDS[kind])
    diff = run.weights[key]
    assert diff.shape == (32, 8, 3, 3) and not diff[:, :4].any() and diff[:, 4:].all()
    more = small.train(
        tmp_path / "more", network_module=module, max_train_steps=1, learning_rate=1e-30, network_dim=None,
        network_alpha=None, network_weights=run.file, dim_from_weights=True, base_weights=[run.file],
    )  # fmt: skip
    assert torch.equal(more.weights[key], diff)
    kernel = more.trainer.models.denoiser.conv_in.weight
    assert torch.equal(kernel, sd.wider(load_file(small.file)[KERNEL]) + diff)


def test_resumed_training_is_the_same_to_the_bit(small: Ground, tmp_path: Path) -> None:
    """Pictures dropped at random, latents cached or not: the draws are keyed by the batch."""
    values = {"reference_dropout_rate": 0.5, "cache_latents": True, "save_state": True, "max_train_steps": 3}
    whole = small.train(tmp_path / "whole", **values)
    small.train(tmp_path / "parts", interrupt_in=2, **values)
    again = small.train(tmp_path / "parts", resume="latest", **values)
    assert_same_run(whole, again)
    fresh = small.train(tmp_path / "fresh", **{**values, "cache_latents": None})
    assert fresh.losses == pytest.approx(whole.losses, rel=1e-5)


def test_references_are_dropped_at_the_given_rates() -> None:
    """Of samples with a caption, and of those whose caption is dropped."""
    captions = ["make it red", ""] * 2000
    batch = Batch(captions, captions, torch.ones(4000), references=(torch.ones(4000, 4, 1, 1),))
    dropped = without_some(batch, 3, captioned=0.25, uncaptioned=0.5).references[0][:, 0, 0, 0] == 0
    rates = [float(dropped[start::2].float().mean()) for start in (0, 1)]
    assert rates == pytest.approx([0.25, 0.5], abs=0.03)
    assert without_some(batch, 3, captioned=0, uncaptioned=0) is batch


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "words": (
        "textual_inversion",
        {"token_string": "sks2", "init_word": "cat"},
        "this script does not teach a model",
    ),
    "LLLite": ("network", {"network_module": "networks.control_net_lllite"}, "which reads control images"),
    "texts": ("network", {"network_train_text_encoder_only": True}, "so the U-Net must learn"),
    "third party": ("network", {"network_module": "lycoris.kohya"}, "does not train this model's new channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_learn_edits_is_refused_before_loading(name: str, small: Ground, tmp_path: Path) -> None:
    method, values, line = BAD[name]
    own = {key: value for key, value in small.options.items() if key not in ("family", "network_module")}
    values = {**own, "dataset_config": small.data, "output_dir": tmp_path, "learning_rate": 1e-3, **values}
    with pytest.raises(UserError, match=line):
        check(make_method(method, values, family="sd"), StopRequest())


def test_files_and_options_of_edits_need_the_task(ground: Ground, trained: Path, tmp_path: Path) -> None:
    plain = {"task": None, "dataset_config": make_data(tmp_path), "network_weights": trained}
    with pytest.raises(UserError, match="is for editing pictures: add --task edit"):
        ground.train(tmp_path, **plain)
    with pytest.raises(UserError, match="--reference_dropout_rate has no effect without --task edit"):
        ground.train(tmp_path, task=None, reference_dropout_rate=0.1)
    if ground.family == "sdxl":
        options = {name: value for name, value in ground.options.items() if name != "network_module"}
        with pytest.raises(UserError, match="--block_lr: with --task edit the first input block must learn"):
            finetune(ground.data, tmp_path, block_lr=",".join(["1e-4", "0", *["1e-4"] * 21]), **options)


def make_data(folder: Path) -> Path:
    return write_dataset(folder / "plain.toml", subset(make_pictures(folder / "plain", 2)))
