# SPDX-License-Identifier: Apache-2.0
"""Full training as a LoRA: extract_lora_from_models.py misses exactly the singular values beyond its rank."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from networks import extract_lora_from_models
from tests.families.sdxl import POOLED, WIDTHS, single_file, tiny_modules
from tests.tiny import write_tokenizer
from tests.trainers.finetune_runs import finetune
from tests.trainers.helpers import make_pictures, subset, write_dataset

RANK = 64
UNET = "model.diffusion_model."
NOT_IN_BLOCKS = ("time_embed.", "label_emb.", "input_blocks.0.", "out.")


def make_base(folder: Path) -> Path:
    """A tiny SDXL in one file. No layer in its blocks is narrower than the rank, and not all are wider."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 64, 96),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(1, 1, 1),
            cross_attention_dim=sum(WIDTHS.values()),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + POOLED,
        )
    write_tokenizer(folder / "tokenizer")
    save_file(single_file({**tiny_modules(), "unet": unet}), folder / "base.safetensors")
    return folder / "base.safetensors"


def test_full_training_as_a_lora_misses_only_the_smallest_singular_values(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.toml", subset(make_pictures(tmp_path / "pictures", 2)))
    base, target = make_base(tmp_path), tmp_path / "lora.safetensors"
    finetune(data, tmp_path / "run", family="sdxl", pretrained_model_name_or_path=base, max_train_steps=3)
    tuned = tmp_path / "run" / "x.safetensors"
    words = ("--model_org", base, "--model_tuned", tuned, "--save_to", target, "--dim", RANK, "--conv_dim", RANK,
             "--clamp_quantile", 1)  # fmt: skip
    assert extract_lora_from_models.main([str(word) for word in words]) == 0

    before, after, lora = load_file(base), load_file(tuned), load_file(target)
    differences = {
        f"lora_unet_{path.removesuffix('.weight').replace('.', '_')}": (after[key] - before[key]).flatten(1).double()
        for key in before
        if (path := key.removeprefix(UNET)) != key and before[key].dim() > 1 and not path.startswith(NOT_IN_BLOCKS)
    }
    assert {key.partition(".")[0] for key in lora} == differences.keys()  # all layers, and none of a text encoder
    beyond = 0
    for name, difference in differences.items():
        up, down = (lora[f"{name}.lora_{side}.weight"].flatten(1).double() for side in ("up", "down"))
        assert len(down) == min(RANK, *difference.shape) and float(lora[f"{name}.alpha"]) == len(down)
        tail, whole = torch.linalg.svdvals(difference)[RANK:].norm(), float(difference.norm())
        assert whole > 0
        assert abs(float((up @ down - difference).norm() - tail)) < 1e-4 * whole, name
        beyond += float(tail) > 1e-2 * whole
    assert 20 < beyond < len(differences) - 20  # layers with something to miss, and layers without
