# SPDX-License-Identifier: Apache-2.0
"""Presets of the kohya_ss GUI: JSON files whose keys are sd-scripts' options, with some of the program's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.cli import option_groups
from library.families.registry import FAMILIES
from library.foreign_keys import FOREIGN_KEYS
from library.options import specs
from library.values import shown
from tools.other_trainers import keys
from tools.other_trainers.keys import Draft, Key, by_hand, carried, idle, lost

TITLE = "kohya_ss (GUI)"
FILE = "a preset's `.json`"
OWN = "of the program alone"

KEYS = {
    "LoRA_type": by_hand("--network_module"),
    "epoch": carried("max_train_epochs"),
    "max_train_epochs": carried("max_train_epochs"),
    "max_train_steps": by_hand("--max_train_steps"),
    "stop_text_encoder_training": lost("text encoders learn to the end, or not at all"),
    "optimizer": by_hand("--optimizer_type"),
    "optimizer_args": by_hand("--optimizer_args"),
    "lr_scheduler_args": by_hand("--lr_scheduler_args"),
    "additional_parameters": lost("add its options to the command"),
    "extra_accelerate_launch_args": idle(OWN),
    "lr_warmup": by_hand("--lr_warmup_steps"),
    "lr_warmup_steps": carried("lr_warmup_steps"),
    "max_resolution": by_hand("--resolution"),
    "sdxl": by_hand("the script"), "flux1_checkbox": by_hand("the script"), "sd3_checkbox": by_hand("the script"),
    "v2": carried("v2"),
    "conv_dim": by_hand("--network_args conv_dim="), "conv_alpha": by_hand("--network_args conv_alpha="),
    "factor": by_hand("--network_args factor="),
    "min_snr_gamma": carried("min_snr_gamma"),
    "ae": carried("ae"), "clip_l": carried("clip_l"), "t5xxl": carried("t5xxl"), "clip_g": carried("clip_g"),
    "flux1_clip_l": carried("clip_l"), "flux1_t5xxl": carried("t5xxl"),
    "xformers": idle("torch's own attention is used"),
    "model_list": idle(OWN), "gpu_ids": idle(OWN), "main_process_port": idle(OWN), "num_processes": idle(OWN),
    "num_machines": idle(OWN), "multi_gpu": idle(OWN), "num_cpu_threads_per_process": idle(OWN),
    "sample_prompts": by_hand("--sample_prompts"),
    "vae_batch_size": carried("vae_batch_size"),
    "cache_latents": carried("cache_latents"),
    "train_batch_size": carried("train_batch_size"),
    "bucket_reso_steps": carried("bucket_reso_steps"),
}  # fmt: skip
TABLES = {"": KEYS}
KINDS = {"standard": "lora", "flux1": "lora", "sd3": "lora", "kohya locon": "lora", "kohya dylora": "dylora",
         "lycoris/loha": "loha", "lycoris/lokr": "lokr", "lycoris/locon": "lora"}  # fmt: skip


def is_mine(document: Any) -> bool:
    """Whether a document is a preset of this program."""
    return isinstance(document, dict) and "LoRA_type" in document


def read(document: dict[str, Any], path: Path, dataset: Path | None) -> Draft:
    """The draft of a preset. dataset: a dataset file in place of the preset's folders."""
    draft = Draft(path)
    flux = document.get("flux1_checkbox") or document.get("LoRA_type") == "Flux1"
    draft.family = (
        "flux" if flux else "sd3" if document.get("sd3_checkbox") else "sdxl" if document.get("sdxl") else "sd"
    )
    draft.carry({**_same(draft), **KEYS}, {name: value for name, value in document.items() if value not in ("", None)})
    for name, value in [*draft.options.items()]:
        if value in (0, False, [], ()) and name not in ("max_data_loader_n_workers", "max_grad_norm", "seed"):
            del draft.options[name]  # the program writes each of its fields
    kind = str(document["LoRA_type"]).lower()
    if kind not in KINDS:
        raise draft.wrong(
            "LoRA_type", f"{shown(document['LoRA_type'])} has no counterpart; there are {', '.join(KINDS)}"
        )
    keys.network_of(draft, KINDS[kind], "LoRA_type")
    _settings(draft, document, kind)
    if dataset is None and not draft.options.get("train_data_dir") and not draft.options.get("dataset_config"):
        raise draft.wrong("train_data_dir", "is missing: the folder of the pictures")
    if dataset is not None:
        draft.put("dataset_config", str(dataset), "--dataset")
        draft.options.pop("train_data_dir", None)
    return draft


def _same(draft: Draft) -> dict[str, Key]:
    """The keys that are sd-scripts' options: ours, or named as those of other scripts."""
    ours = specs(option_groups("network", draft.family))
    others = {name: idle(f"not an option of {FAMILIES[draft.family].title}") for name in FOREIGN_KEYS}
    return others | {name: carried(name) for name in ours}


def _settings(draft: Draft, document: dict[str, Any], kind: str) -> None:
    if document.get("max_train_steps"):
        draft.put("max_train_steps", document["max_train_steps"], "max_train_steps")
        draft.options.pop("max_train_epochs", None)
    size = document.get("max_resolution")
    if size:
        draft.put("resolution", size, "max_resolution")
    args = str(document.get("optimizer_args") or "").split()
    keys.put_optimizer(draft, document.get("optimizer", "AdamW"), {}, "optimizer")
    if args:
        draft.put("optimizer_args", args, "optimizer_args")
    if document.get("lr_scheduler_args"):
        draft.put("lr_scheduler_args", str(document["lr_scheduler_args"]).split(), "lr_scheduler_args")
    if document.get("lr_warmup") and not document.get("lr_warmup_steps"):
        draft.put("lr_warmup_steps", float(document["lr_warmup"]) / 100, "lr_warmup")
        if document.get("lr_scheduler", "constant") == "constant":
            draft.put("lr_scheduler", "constant_with_warmup", "lr_scheduler")
    network = []
    if "locon" in kind or (kind.startswith("lycoris") and draft.family in ("sd", "sdxl")):
        network += [f"{name}={document[name]}" for name in ("conv_dim", "conv_alpha") if document.get(name)]
    if kind == "lycoris/lokr" and document.get("factor"):
        network.append(f"factor={document['factor']}")
    if network:
        draft.put("network_args", network, "conv_dim")
    prompts = str(document.get("sample_prompts") or "").strip()
    draft.prompts += [line for line in prompts.splitlines() if line.strip()]
