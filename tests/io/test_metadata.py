# SPDX-License-Identifier: Apache-2.0
"""Keys, values and hashes equal those that sd-scripts 0.10.1 wrote in real runs (tests/data_files/io)."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.io.checkpoint import save_tensors
from library.io.metadata import (
    OPTION_NAMES,
    DatasetFacts,
    NetworkFacts,
    RunFacts,
    SpecFacts,
    SubsetFacts,
    base_name,
    build_metadata,
    file_facts,
    legacy_hash,
    model_hash,
    tensor_hashes,
)
from library.io.options import MetadataOptions

DATA = Path(__file__).resolve().parents[1] / "data_files" / "io"
RUNS: dict[str, dict[str, str]] = json.loads((DATA / "metadata_runs.json").read_text())["runs"]
HASHES = json.loads((DATA / "hashes.json").read_text())

SWITCHES = (
    "cache_latents", "debiased_estimation_loss", "fp8_base", "fp8_base_unet", "full_fp16", "gradient_checkpointing",
    "ip_noise_gamma_random_strength", "lowram", "noise_offset_random_strength", "v2", "zero_terminal_snr",
)  # fmt: skip
# Values that today's program gets from its parser in these runs; everything else is None, False or listed per run.
FLOW = (  # options that train_network.py has not
    "apply_lg_attn_mask", "apply_t5_attn_mask", "discrete_flow_shift", "guidance_scale", "logit_mean", "logit_std",
    "mode_scale", "model_prediction_type", "model_type", "sigmoid_scale", "timestep_sampling", "weighting_scheme",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    **{name: None for name in OPTION_NAMES if name not in FLOW},
    **dict.fromkeys(SWITCHES, False),
    "caption_dropout_every_n_epochs": 0, "caption_dropout_rate": 0.0, "caption_tag_dropout_rate": 0.0,
    "gradient_accumulation_steps": 1, "huber_c": 0.1, "huber_scale": 1.0, "huber_schedule": "snr",
    "learning_rate": 0.001, "loss_type": "l2", "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_grad_norm": 1.0,
    "mixed_precision": "no", "multires_noise_discount": 0.3, "prior_loss_weight": 1.0, "validation_split": 0.0,
}  # fmt: skip
TAGS = {"sks dog": 4, "tag0": 1, "common tag": 4, "tag1": 1, "tag2": 1, "tag3": 1}
DOGS = SubsetFacts("/home/somebody/data/3_sks dog", 4, 3)
MODEL_FILE = {
    "ss_sd_model_name": "big.safetensors",
    "ss_sd_model_hash": "f397d797",
    "ss_new_sd_model_hash": "8999345409ce2b43a202aac3a9ab6a0249dfe8475486d20a26948c85ee8ab2b8",
}
SD1 = SpecFacts("stable-diffusion-v1/lora", "diffusers", "epsilon", (64, 64), "1.2.3")


def dataset(**changes: Any) -> DatasetFacts:
    known = DatasetFacts(
        is_dreambooth=True,
        batch_size=2,
        num_train_images=12,
        num_reg_images=0,
        resolution=(64, 64),
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=128,
        bucket_no_upscale=False,
        subsets=(DOGS,),
        tag_frequency={"/home/somebody/data/3_sks dog": TAGS},
        buckets=(((64, 64), 12),),
        mean_img_ar_error=0.25,
    )
    return replace(known, **changes)


def run(options: dict[str, Any], datasets: tuple[DatasetFacts, ...], **changes: Any) -> RunFacts:
    known = RunFacts(
        options=DEFAULTS | options,
        base_model_version="sd_v1",
        datasets=datasets,
        from_dataset_config=False,
        network=NetworkFacts("networks.lora", 4, 1, {}),
        optimizer="torch.optim.adamw.AdamW",
        num_epochs=1,
        max_train_steps=1,
        num_batches_per_epoch=6,
        num_processes=1,
        seed=42,
        session_id=1,
        started_at=1795164581.5,
        files=MODEL_FILE,
    )
    return replace(known, **changes)


def dirs_mode() -> tuple[RunFacts, SpecFacts, MetadataOptions, dict[str, Any]]:
    facts = run(
        {"output_name": "dbmode", "min_snr_gamma": 5.0},
        (dataset(),),
        network=NetworkFacts("networks.lora", 4, 2.0, {"conv_dim": "2"}),
        max_train_steps=4,
    )
    return facts, SD1, MetadataOptions(), {"step": 4, "epoch": 1}


def config_mode() -> tuple[RunFacts, SpecFacts, MetadataOptions, dict[str, Any]]:
    common = {"shuffle_caption": True, "keep_tokens": 1}
    subsets = (
        SubsetFacts("C:\\Users\\somebody\\3_sks dog", 4, 2, **common),  # type: ignore[arg-type]
        SubsetFacts("/x/1_dog/", 4, 1, class_tokens="dog", is_reg=True, **common),  # type: ignore[arg-type]
    )
    one = dataset(
        num_train_images=8, num_reg_images=4, subsets=subsets, buckets=(((64, 64), 16),),
        tag_frequency={"C:\\Users\\somebody\\3_sks dog": TAGS, "/x/1_dog/": {"dog": 4}},
    )  # fmt: skip
    options = {"output_name": "tomlmode", "clip_skip": 2, "training_comment": "hello", "min_timestep": 100}
    metadata = MetadataOptions(metadata_author="me", metadata_usage_hint="hint")
    facts = run(options, (one,), from_dataset_config=True, num_batches_per_epoch=8)
    return facts, replace(SD1, resolution=(512, 512)), metadata, {"step": 1, "epoch": 1}


def json_mode() -> tuple[RunFacts, SpecFacts, MetadataOptions, dict[str, Any]]:
    one = dataset(
        is_dreambooth=False, batch_size=1, num_train_images=4, subsets=(SubsetFacts("/x/meta.json", 4, 1),),
        buckets=(((64, 64), 4),), tag_frequency={"/x/meta.json": {k: v for k, v in TAGS.items() if k != "sks dog"}},
    )  # fmt: skip
    return (
        run({"output_name": "ftmode"}, (one,), num_batches_per_epoch=4),
        SD1,
        MetadataOptions(),
        {"step": 1, "epoch": 1},
    )


def minimum_mode() -> tuple[RunFacts, SpecFacts, MetadataOptions, dict[str, Any]]:
    facts = run({"output_name": "nometa"}, (dataset(),), network=NetworkFacts("networks.lora", 4, 1, {"conv_dim": "2"}))
    return facts, SD1, MetadataOptions(), {"step": 1, "epoch": 1, "minimum": True}


def v2_mode() -> tuple[RunFacts, SpecFacts, MetadataOptions, dict[str, Any]]:
    one = dataset(batch_size=1, tag_frequency={"3_sks dog": {"sks dog": 4}})
    facts = run({"output_name": "v2mode", "v2": True}, (one,), base_model_version="sd_v2_v", num_batches_per_epoch=12)
    spec = replace(SD1, architecture="stable-diffusion-v2-768-v/lora", prediction_type="v")
    return facts, spec, MetadataOptions(), {"step": 1, "epoch": 1}


CASES = {
    "sd1_dirs_mode": dirs_mode,
    "sd1_dataset_config_mode": config_mode,
    "sd1_finetuning_json_mode": json_mode,
    "sd1_no_metadata": minimum_mode,
    "sd2_v_unet_only": v2_mode,
}
# Different in every run, or about who wrote the file.
OWN = ("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date", "sshs_model_hash",
       "sshs_legacy_hash", "modelspec.implementation_version")  # fmt: skip
JSON_KEYS = (
    "ss_datasets",
    "ss_tag_frequency",
    "ss_dataset_dirs",
    "ss_reg_dataset_dirs",
    "ss_bucket_info",
    "ss_network_args",
)


def test_tags_of_every_folder_are_counted_once() -> None:
    """Two folders of one name are two folders; one folder in two datasets is one."""
    first = dataset(tag_frequency={"/a/girl": {"sks": 3, "red": 1}, "/b/girl": {"sks": 2}})
    other = dataset(tag_frequency={"/a/girl": {"sks": 3, "blue": 2}, "/c/girl": {"hat": 1}})
    metadata = build_metadata(
        run({}, (first, other), from_dataset_config=True), SD1, MetadataOptions(), step=1, epoch=1, now=0.0
    )
    assert json.loads(metadata["ss_tag_frequency"]) == {"girl": {"sks": 5, "red": 1, "blue": 2, "hat": 1}}
    assert json.loads(metadata["ss_datasets"])[0]["tag_frequency"] == {"girl": {"sks": 5, "red": 1}}


@pytest.mark.parametrize("case", CASES)
def test_metadata_of_a_real_run(case: str) -> None:
    facts, spec, options, moment = CASES[case]()
    ours = build_metadata(facts, spec, options, now=1795164650.25, **moment)
    theirs = RUNS[case]
    ours_all = {**ours, **tensor_hashes({"a": torch.ones(2)}, ours)}
    assert ours_all.keys() == theirs.keys()
    for key in theirs.keys() - set(OWN):
        assert ours[key] == theirs[key], key
    assert all(isinstance(value, str) for value in ours.values())
    assert ours["modelspec.implementation_version"] == "trainyard/1.2.3"
    assert ours["modelspec.date"] == datetime.fromtimestamp(1795164650).isoformat()
    if not moment.get("minimum"):
        assert ours["ss_training_finished_at"] == "1795164650.25"
    assert "somebody" not in json.dumps(ours)


def test_the_modelspec_group_is_complete(tmp_path: Path) -> None:
    picture = tmp_path / "t.png"
    picture.write_bytes(b"\x89PNG pretend")
    given = {
        "title": "T", "author": "A", "description": "D", "license": "L", "tags": "x, y", "usage_hint": "U",
        "merged_from": "M", "trigger_phrase": "P", "preprocessor": "R", "is_negative_embedding": "false",
    }  # fmt: skip
    options = MetadataOptions(**{f"metadata_{k}": v for k, v in given.items()}, metadata_thumbnail=str(picture))
    facts = run({"min_timestep": None, "max_timestep": 900, "clip_skip": 1}, (dataset(),))
    ours = build_metadata(facts, SD1, options, step=1, epoch=0, now=0.0)
    for key, value in given.items():
        assert ours[f"modelspec.{key}"] == value
    assert ours["modelspec.thumbnail"] == "data:image/png;base64," + base64.b64encode(b"\x89PNG pretend").decode()
    assert ours["modelspec.timestep_range"] == "0,900" and ours["modelspec.encoder_layer"] == "1"
    assert str(tmp_path) not in json.dumps(ours)
    again = replace(options, metadata_thumbnail="data:image/png;base64,AAAA")
    assert build_metadata(facts, SD1, again, step=1, epoch=0, now=0.0)["modelspec.thumbnail"].endswith(",AAAA")
    with pytest.raises(UserError, match="cannot read"):
        build_metadata(facts, SD1, replace(options, metadata_thumbnail="gone.png"), step=1, epoch=0, now=0.0)


def test_keys_that_depend_on_the_run() -> None:
    flow = replace(SD1, prediction_type=None)
    facts = run(
        {"output_name": None, "unet_lr": 1e-4, "text_encoder_lr": (1e-5, 2e-5)}, (dataset(enable_bucket=False),)
    )
    options = {k: v for k, v in facts.options.items() if k != "scale_weight_norms"}
    facts = replace(facts, options={**options, "guidance_scale": 3.5}, num_processes=2)
    ours = build_metadata(facts, flow, MetadataOptions(), step=1, epoch=0, now=7.0)
    assert "modelspec.prediction_type" not in ours and "ss_scale_weight_norms" not in ours
    assert ours["modelspec.title"] == "LoRA@7.0" and ours["ss_guidance_scale"] == "3.5"
    assert ours["ss_text_encoder_lr"] == "[1e-05, 2e-05]" and ours["ss_bucket_info"] == "null"
    assert ours["ss_total_batch_size"] == "4"


def test_a_folder_in_two_datasets_counts_its_tags_once() -> None:
    two = (dataset(), dataset(resolution=(128, 128)))
    ours = build_metadata(run({}, two, from_dataset_config=True), SD1, MetadataOptions(), step=1, epoch=0, now=0.0)
    assert json.loads(ours["ss_tag_frequency"]) == {"3_sks dog": TAGS}
    assert ours["ss_num_train_images"] == "24"
    assert [d["resolution"] for d in json.loads(ours["ss_datasets"])] == [[64, 64], [128, 128]]


def test_base_names() -> None:
    assert [base_name(p) for p in ("/a/b", "a/b/", "C:\\x\\y z", "org/name", "b", "\\\\host\\s\\f.json")] == [
        "b", "b", "y z", "name", "b", "f.json",
    ]  # fmt: skip


# ---- hashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(HASHES["tiny"]))
def test_hashes_of_small_files(name: str, tmp_path: Path) -> None:
    metadata = HASHES["tiny"][name]["metadata"]
    plain = {k: v for k, v in metadata.items() if not k.startswith("sshs_")}
    path = save_tensors(tmp_path / name, load_file(str(DATA / name)), plain)
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == metadata
    assert len(path.read_bytes()) == len((DATA / name).read_bytes())


def large_tensors() -> dict[str, torch.Tensor]:
    return {
        "b.lora_down.weight": (torch.arange(300000, dtype=torch.float32) * 0.001).reshape(300, 1000),
        "a.lora_up.weight": (torch.arange(200000, dtype=torch.float32).reshape(1000, 200) / 7).to(torch.float16),
        "a.alpha": torch.tensor(4.0),
    }


@pytest.mark.parametrize("case", ["no_meta", "ss_meta"])
def test_hashes_of_a_file_above_one_mebibyte(case: str) -> None:
    expected = HASHES["large"][case]
    found = tensor_hashes(large_tensors(), expected["metadata"])
    assert found == {key: expected[key] for key in ("sshs_model_hash", "sshs_legacy_hash")}


def test_hashes_of_files_on_disk(tmp_path: Path) -> None:
    expected = HASHES["large"]["file_saved_with_ss_seed_only"]
    path = save_tensors(tmp_path / "big.safetensors", large_tensors(), {"ss_seed": "1"}, hashes=False)
    assert legacy_hash(path) == expected["model_hash"]
    assert model_hash(path) == expected["calculate_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_facts("sd_model", str(path)) == MODEL_FILE
    assert file_facts("vae", str(tmp_path)) == {
        "ss_vae_name": tmp_path.name, "ss_vae_hash": "IsADirectory", "ss_new_vae_hash": "IsADirectory",
    }  # fmt: skip
    assert file_facts("sd_model", "org/name") == {"ss_sd_model_name": "org/name"}
