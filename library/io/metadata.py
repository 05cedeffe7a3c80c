# SPDX-License-Identifier: Apache-2.0
"""Metadata of saved files: ss_* facts about the training, modelspec.* (sai_model_spec 1.0.1) and hashes.

Every value is a text: `str()` of the Python value, or JSON for tables. Of files and folders only base names are
included, and no secret options. Specification of modelspec.*: https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from library.errors import UserError
from library.io.options import THUMBNAIL_TYPES, MetadataOptions
from library.io.tensor_file import data_chunks, header_bytes, stream_digest

VERSION = "0.1.0"  # of this program
SPEC_VERSION = "1.0.1"
LEGACY_START, LEGACY_LENGTH = 1 << 20, 1 << 16

# Options whose values are in the metadata, as ss_<name>. Methods without the option leave the key out.
OPTION_NAMES = (
    "adaptive_noise_scale", "cache_latents", "caption_dropout_every_n_epochs", "caption_dropout_rate",
    "caption_tag_dropout_rate", "clip_skip", "debiased_estimation_loss", "face_crop_aug_range", "fp8_base",
    "fp8_base_unet", "full_fp16", "gradient_accumulation_steps", "gradient_checkpointing", "huber_c", "huber_scale",
    "huber_schedule", "ip_noise_gamma", "ip_noise_gamma_random_strength", "learning_rate", "loss_type", "lowram",
    "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "max_token_length", "max_validation_steps", "min_snr_gamma",
    "mixed_precision", "multires_noise_discount", "multires_noise_iterations", "network_dropout", "noise_offset",
    "noise_offset_random_strength", "output_name", "prior_loss_weight", "resize_interpolation", "scale_weight_norms",
    "text_encoder_lr", "training_comment", "unet_lr", "v2", "validate_every_n_epochs", "validate_every_n_steps",
    "validation_seed", "validation_split", "zero_terminal_snr",
    # options that only some architectures have
    "apply_lg_attn_mask", "apply_t5_attn_mask", "discrete_flow_shift", "guidance_scale", "logit_mean", "logit_std",
    "mode_scale", "model_prediction_type", "model_type", "sigmoid_scale", "timestep_sampling", "weighting_scheme",
)  # fmt: skip
OTHER_KEYS = {"debiased_estimation_loss": "ss_debiased_estimation"}  # option -> its key where that is another
# Keys that --no_metadata keeps because readers and the merge tools need them.
MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_task",
)

# ---- facts from the trainer ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SubsetFacts:
    """Facts about one folder or metadata file of pictures. Field names are keys of ss_datasets."""

    source: str  # folder or metadata file; only the base name is written
    img_count: int
    num_repeats: int
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    resize_interpolation: str | None = None
    class_tokens: str | None = None
    is_reg: bool = False

    def row(self, is_dreambooth: bool) -> dict[str, Any]:
        """The subset's entry in ss_datasets."""
        row = {k: v for k, v in asdict(self).items() if k not in ("source", "class_tokens", "is_reg")}
        if is_dreambooth:
            return row | {"image_dir": base_name(self.source), "class_tokens": self.class_tokens, "is_reg": self.is_reg}
        return row | {"metadata_file": base_name(self.source)}


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about one dataset. Image counts include repeats; sizes are (width, height) in pixels."""

    is_dreambooth: bool
    batch_size: int
    num_train_images: int
    num_reg_images: int
    resolution: tuple[int, int]
    enable_bucket: bool
    min_bucket_reso: int | None
    max_bucket_reso: int | None
    bucket_no_upscale: bool
    subsets: tuple[SubsetFacts, ...]
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # folder -> tag -> count
    buckets: tuple[tuple[tuple[int, int], int], ...] = ()  # (size, images with repeats)
    mean_img_ar_error: float | None = None
    resolution_schedule: Sequence[Sequence[Any]] = ()  # (share of the run, (width, height), batch size if another one)
    resize_interpolation: str | None = None

    def bucket_info(self) -> dict[str, Any] | None:
        """The value of ss_bucket_info, None without buckets."""
        if not self.enable_bucket:
            return None
        rows = {str(i): {"resolution": list(size), "count": count} for i, (size, count) in enumerate(self.buckets)}
        return {"buckets": rows, "mean_img_ar_error": self.mean_img_ar_error}

    def row(self) -> dict[str, Any]:
        """The dataset's entry in ss_datasets."""
        return {
            "is_dreambooth": self.is_dreambooth,
            "batch_size_per_device": self.batch_size,
            "num_train_images": self.num_train_images,
            "num_reg_images": self.num_reg_images,
            "resolution": list(self.resolution),
            "enable_bucket": self.enable_bucket,
            "min_bucket_reso": self.min_bucket_reso,
            "max_bucket_reso": self.max_bucket_reso,
            "tag_frequency": named_tags(self.tag_frequency),
            "bucket_info": self.bucket_info(),
            "resize_interpolation": self.resize_interpolation,
            "subsets": [subset.row(self.is_dreambooth) for subset in self.subsets],
            **({"resolution_schedule": self.resolution_schedule} if self.resolution_schedule else {}),
        }


@dataclass(frozen=True)
class NetworkFacts:
    """Facts about the adapters of a run."""

    module: str
    dim: int | float | None
    alpha: int | float | None
    args: Mapping[str, str]


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run for the metadata of its saves. Times are in Unix seconds."""

    options: Mapping[str, Any]  # name -> value, no secrets: library.options.changed_values(..., all_values=True)
    base_model_version: str  # "sd_v1"
    datasets: tuple[DatasetFacts, ...]
    from_dataset_config: bool  # --dataset_config; else the folder or metadata form of the command line
    network: NetworkFacts
    optimizer: str  # "torch.optim.adamw.AdamW(weight_decay=0.1)"
    num_epochs: int
    max_train_steps: int
    num_batches_per_epoch: int
    num_processes: int
    seed: int
    session_id: int
    started_at: float
    num_validation_images: int = 0
    files: Mapping[str, str] = field(default_factory=dict)  # ss_sd_model_name, ss_sd_model_hash ...: see file_facts


@dataclass(frozen=True)
class SpecFacts:
    """Facts for modelspec.* besides the --metadata_* options."""

    architecture: str  # "stable-diffusion-v1/lora"
    implementation: str  # "diffusers"
    prediction_type: str | None  # "epsilon", "v"; None leaves the key out
    resolution: tuple[int, int]  # (width, height) of the largest dataset
    version: str  # version of Trainyard
    kind: str = "LoRA"  # LoRA, TextualInversion, Checkpoint: for the title of a run without a name


# ---- the keys -----------------------------------------------------------------------------------------------------


def build_metadata(
    run: RunFacts,
    spec: SpecFacts,
    metadata: MetadataOptions,
    *,
    step: int,
    epoch: int,
    now: float,
    minimum: bool = False,
) -> dict[str, str]:
    """All metadata of one save, without the hashes of its tensors.

    step, epoch: optimizer steps done and epochs finished; now: Unix seconds of the save; minimum: --no_metadata.
    """
    given = [name for name in OPTION_NAMES if name in run.options]
    keys: dict[str, Any] = {OTHER_KEYS.get(name, f"ss_{name}"): run.options[name] for name in given}
    keys |= {"ss_task": run.options["task"]} if run.options.get("task") else {}
    keys |= {**_run_keys(run), **_network_keys(run), **_dataset_keys(run), **run.files}
    keys |= {"ss_steps": step, "ss_epoch": epoch, "ss_training_finished_at": now}
    if minimum:
        keys = {k: v for k, v in keys.items() if k in MINIMUM_KEYS}
    found = {k: _text(v) for k, v in keys.items()} | modelspec(run.options, spec, metadata, now=now)
    # names of folders may not be UTF-8, but the header of the file must be
    return {k: v.encode(errors="backslashreplace").decode() for k, v in found.items()}


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _run_keys(run: RunFacts) -> dict[str, Any]:
    return {
        "ss_session_id": run.session_id,
        "ss_training_started_at": run.started_at,
        "ss_base_model_version": run.base_model_version,
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_optimizer": run.optimizer,
        "ss_seed": run.seed,
        "ss_num_epochs": run.num_epochs,
        "ss_max_train_steps": run.max_train_steps,
        "ss_num_batches_per_epoch": run.num_batches_per_epoch,
        "ss_num_train_images": sum(d.num_train_images for d in run.datasets),
        "ss_num_reg_images": sum(d.num_reg_images for d in run.datasets),
        "ss_num_validation_images": run.num_validation_images,
    }


def _network_keys(run: RunFacts) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "ss_network_module": run.network.module,
        "ss_network_dim": run.network.dim,
        "ss_network_alpha": run.network.alpha,
    }
    if run.network.args:
        arguments = {"dropout": run.options.get("network_dropout"), **run.network.args}
        arguments["dropout"] = arguments.pop("dropout")
        keys["ss_network_args"] = json.dumps(arguments)
    return keys


def _dataset_keys(run: RunFacts) -> dict[str, Any]:
    trained: dict[str, Counter[str]] = {}  # a folder that several datasets use counts once
    folders: dict[bool, dict[str, dict[str, int]]] = {False: {}, True: {}}
    for dataset in run.datasets:
        for folder, counts in dataset.tag_frequency.items():
            trained[folder] = trained.get(folder, Counter()) | Counter(counts)
        for subset in dataset.subsets:
            name = base_name(subset.source)
            folders[subset.is_reg][name] = {"n_repeats": subset.num_repeats, "img_count": subset.img_count}
    tags = json.dumps(named_tags(trained))
    keys: dict[str, Any] = {"ss_tag_frequency": tags, "ss_dataset_dirs": json.dumps(folders[False])}
    if run.from_dataset_config:
        return keys | {"ss_datasets": json.dumps([dataset.row() for dataset in run.datasets])}
    return keys | {"ss_reg_dataset_dirs": json.dumps(folders[True])} | _single_dataset_keys(run)


def _single_dataset_keys(run: RunFacts) -> dict[str, Any]:
    """Keys of the folder form, where one dataset with equal subsets is all there is."""
    dataset, subset = run.datasets[0], run.datasets[0].subsets[0]
    accumulation = run.options.get("gradient_accumulation_steps", 1)
    return {
        "ss_batch_size_per_device": dataset.batch_size,
        "ss_total_batch_size": dataset.batch_size * run.num_processes * accumulation,
        "ss_resolution": str(tuple(dataset.resolution)),
        **({"ss_resolution_schedule": json.dumps(schedule)} if (schedule := dataset.resolution_schedule) else {}),
        "ss_color_aug": subset.color_aug,
        "ss_flip_aug": subset.flip_aug,
        "ss_random_crop": subset.random_crop,
        "ss_shuffle_caption": subset.shuffle_caption,
        "ss_keep_tokens": subset.keep_tokens,
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.min_bucket_reso,
        "ss_max_bucket_reso": dataset.max_bucket_reso,
        "ss_bucket_info": json.dumps(dataset.bucket_info()),
    }


def modelspec(options: Mapping[str, Any], spec: SpecFacts, metadata: MetadataOptions, *, now: float) -> dict[str, str]:
    """The modelspec.* keys. Raises UserError when the thumbnail cannot be read."""
    keys: dict[str, Any] = {name.removeprefix("metadata_"): value for name, value in vars(metadata).items()}
    keys |= {
        "sai_model_spec": SPEC_VERSION,
        "architecture": spec.architecture,
        "implementation": spec.implementation,
        "title": metadata.metadata_title or options.get("output_name") or f"{spec.kind}@{now}",
        "resolution": f"{spec.resolution[0]}x{spec.resolution[1]}",
        "date": datetime.fromtimestamp(int(now)).isoformat(),
        "implementation_version": f"trainyard/{spec.version}",
        "prediction_type": spec.prediction_type,
        "thumbnail": data_url(metadata.metadata_thumbnail) if metadata.metadata_thumbnail else None,
        "encoder_layer": options.get("clip_skip"),
        "timestep_range": _timestep_range(options),
    }
    return {f"modelspec.{k}": str(v) for k, v in keys.items() if v is not None}


def _timestep_range(options: Mapping[str, Any]) -> str | None:
    low, high = options.get("min_timestep"), options.get("max_timestep")
    if low is None and high is None:
        return None
    return f"{0 if low is None else low},{1000 if high is None else high}"


def data_url(thumbnail: str) -> str:
    """A picture file as a data URL, `data:image/png;base64,...`. A data URL is returned unchanged. Raises UserError."""
    if thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--metadata_thumbnail: cannot read {path}: {error.strerror}") from None
    kind = THUMBNAIL_TYPES.get(path.suffix.lower(), "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def named_tags(tag_frequency: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Tag frequency by base name of the folder: base name -> tag -> count. Equal base names are added up."""
    found: dict[str, Counter[str]] = {}
    for folder, counts in tag_frequency.items():
        found.setdefault(base_name(folder), Counter()).update(counts)
    return {name: dict(counts) for name, counts in found.items()}


def base_name(path: str) -> str:
    """The last part of a path of any operating system. Metadata never contains whole paths."""
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or path


# ---- hashes -------------------------------------------------------------------------------------------------------


def tensor_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sshs_model_hash and sshs_legacy_hash of an adapter file. tensors: in their final dtype.

    sshs_model_hash is the sha256 of all tensor data. sshs_legacy_hash is the first 8 digits of the sha256 of 64 KiB
    from offset 1 MiB in a file with these tensors and only the ss_* metadata.
    """
    digest = hashlib.sha256()
    window = bytearray()
    position = 0
    header = header_bytes(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    for chunk in itertools.chain([memoryview(header)], data_chunks(tensors)):
        if position:
            digest.update(chunk)
        start, end = LEGACY_START - position, LEGACY_START + LEGACY_LENGTH - position
        if end > 0 and start < len(chunk):
            window += chunk[max(start, 0) : end]
        position += len(chunk)
    return {"sshs_model_hash": digest.hexdigest(), "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8]}


def legacy_hash(path: str | Path) -> str:
    """The short hash of a checkpoint on disk: the first 8 digits of the sha256 of 64 KiB from offset 1 MiB."""
    with open(path, "rb") as file:
        file.seek(LEGACY_START)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]


def model_hash(path: str | Path) -> str:
    """The sha256 of a whole file."""
    with open(path, "rb") as file:
        return stream_digest(file)


def file_facts(kind: str, name: str) -> dict[str, str]:
    """Name and hashes of the model (`kind` "sd_model") or VAE ("vae") that a run starts from.

    Hashes of a folder are "IsADirectory"; a hub id has no hashes.
    """
    path = Path(name)
    if not path.exists():
        return {f"ss_{kind}_name": name}
    is_file = path.is_file()
    return {
        f"ss_{kind}_name": base_name(name),
        f"ss_{kind}_hash": legacy_hash(path) if is_file else "IsADirectory",
        f"ss_new_{kind}_hash": model_hash(path) if is_file else "IsADirectory",
    }
