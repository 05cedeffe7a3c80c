# SPDX-License-Identifier: Apache-2.0
"""Configurations of kohya-ss/musubi-tuner: a TOML file of arguments or a command, and the dataset's TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.options import read_toml
from library.values import shown
from tools.other_trainers import keys
from tools.other_trainers.keys import Draft, by_hand, carried, idle, lost

TITLE = "musubi-tuner"
FILE = "the `.toml` of its `--config_file`, or a file with the command; the dataset's is found through it"
BUCKET_STEP = 16
ATTENTION = "torch's own attention is used"

# beginning of the script's name, or network module -> family, further options
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux_kontext": ("flux", {"model_type": "kontext", "task": "edit"}),
    "flux_2": ("flux2", {}),
}
MODULES = {"networks.lora_flux": "flux_kontext", "networks.lora_flux_2": "flux_2"}
SAME = """
output_dir output_name max_train_steps max_train_epochs max_data_loader_n_workers persistent_data_loader_workers
seed gradient_checkpointing gradient_accumulation_steps logging_dir log_with log_prefix log_tracker_name
wandb_run_name log_tracker_config log_config ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph
sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts optimizer_args lr_decay_steps
lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_scheduler_type
lr_scheduler_args blocks_to_swap compile sigmoid_scale logit_mean logit_std mode_scale min_timestep max_timestep
no_metadata network_weights network_dim network_dropout network_args training_comment dim_from_weights
scale_weight_norms base_weights base_weights_multiplier resume save_every_n_epochs save_every_n_steps
save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_state
save_state_on_train_end metadata_title metadata_author metadata_description metadata_license metadata_tags
huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility
save_state_to_huggingface resume_from_huggingface async_upload fp8_base split_attn save_precision full_bf16
""".split()  # noqa: SIM905 - a list literal would be eighty lines
ARGUMENTS = {
    **{name: carried(name) for name in SAME},
    "mixed_precision": carried("mixed_precision"),
    "learning_rate": carried("learning_rate", 2e-6),
    "max_grad_norm": carried("max_grad_norm", 1.0),
    "lr_scheduler": carried("lr_scheduler", "constant"),
    "lr_warmup_steps": carried("lr_warmup_steps", 0),
    "optimizer_type": by_hand("--optimizer_type"),
    "network_alpha": carried("network_alpha", 1.0),
    "timestep_sampling": by_hand("--timestep_sampling"),
    "discrete_flow_shift": by_hand("--discrete_flow_shift"),
    "weighting_scheme": carried("weighting_scheme", "none"),
    "guidance_scale": carried("guidance_scale", 1.0),
    "network_module": by_hand("--network_module"),
    "config_file": idle("its values are read"),
    "dataset_config": by_hand("--dataset_config"),
    "dit": carried("pretrained_model_name_or_path"),
    "vae": by_hand("--ae"),
    "text_encoder1": by_hand("--t5xxl"),
    "text_encoder2": by_hand("--clip_l"),
    "text_encoder": by_hand("--text_encoder"),
    "model_version": idle("read from the model's file"),
    "fp8_scaled": carried("fp8_base_unet", changed="--fp8_base_unet always has scales"),
    "fp8_t5": lost("see --fp8_base"),
    "fp8_text_encoder": lost("see --fp8_base"),
    "gradient_checkpointing_cpu_offload": carried("cpu_offload_checkpointing"),
    "sdpa": idle(ATTENTION), "flash_attn": idle(ATTENTION), "sage_attn": idle(ATTENTION),
    "xformers": idle(ATTENTION), "flash3": idle(ATTENTION),
    "compile_backend": idle("see --dynamo_backend"), "compile_mode": idle("see --compile"),
    "compile_dynamic": idle("see --compile"), "compile_fullgraph": idle("see --compile"),
    "compile_cache_size_limit": idle("see --compile"), "dynamo_backend": idle("see --compile"),
    "dynamo_mode": idle("see --compile"), "dynamo_fullgraph": idle("see --compile"),
    "dynamo_dynamic": idle("see --compile"), "cuda_allow_tf32": idle("a matter of speed"),
    "cuda_cudnn_benchmark": idle("a matter of speed"),
    "use_pinned_memory_for_block_swap": idle("always so"), "img_in_txt_in_offloading": idle("see --vram_budget"),
    "disable_numpy_memmap": idle("files are mapped"), "vae_dtype": idle("see --no_half_vae"),
    "preserve_distribution_shape": lost("noise levels are scaled into their range"),
    "num_timestep_buckets": lost("noise levels are drawn one by one"),
    "show_timesteps": idle("nothing is trained by it"),
    "metadata_reso": idle("taken from the dataset"), "metadata_arch": idle("taken from the model"),
    "wandb_api_key": lost("a secret stays out of files: set WANDB_API_KEY"),
    "huggingface_token": lost("a secret stays out of files: see `hf auth login`"),
}  # fmt: skip
DATASET = {
    "resolution": carried("resolution", [960, 544]),
    "batch_size": carried("batch_size", 1),
    "enable_bucket": carried("enable_bucket", False),
    "bucket_no_upscale": carried("bucket_no_upscale", False),
    "caption_extension": by_hand("caption_extension of the subset"),
    "num_repeats": by_hand("num_repeats of the subset"),
    "image_directory": by_hand("image_dir of the subset"),
    "image_jsonl_file": by_hand("metadata_file of the subset"),
    "control_directory": by_hand("conditioning_data_dir of the subset"),
    "cache_directory": by_hand("--cache_dir"),
    "multiple_target": lost("for a model that is not trained here"),
    "video_directory": lost("there are no videos here"),
    "video_jsonl_file": lost("there are no videos here"),
    "flux_kontext_no_resize_control": lost("a reference has the published size that is nearest in shape"),
    "no_resize_control": lost("a reference keeps its size up to the picture's area"),
    "control_resolution": lost("a reference keeps its size up to the picture's area"),
}
SUBSET = {
    "image_directory": carried("image_dir"),
    "image_jsonl_file": carried("metadata_file"),
    "control_directory": carried("conditioning_data_dir"),
    "caption_extension": carried("caption_extension"),
    "num_repeats": carried("num_repeats", 1),
}
TABLES = {"": ARGUMENTS, "(dataset) ": DATASET}


def is_mine(document: Any) -> bool:
    """Whether a document holds arguments of this trainer."""
    return isinstance(document, dict) and "dit" in flat(document)


def flat(document: dict[str, Any]) -> dict[str, Any]:
    """The arguments without the tables that they stand in."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def read(document: dict[str, Any], path: Path, dataset: Path | None, script: str = "") -> Draft:
    """The draft of a file of arguments or a command. script: the name of its script; dataset: the dataset's file."""
    draft = Draft(path)
    arguments = flat(document)
    _architecture(draft, script, arguments)
    draft.carry(ARGUMENTS, arguments)
    network = "network_module" in arguments
    draft.method = "network" if network else "finetune"
    if network:
        keys.network_of(draft, "lora", "network_module")
        draft.put("network_train_unet_only", True, "(text encoders are not trained there)")
    parts = {"flux": {"vae": "ae", "text_encoder1": "t5xxl", "text_encoder2": "clip_l"}}
    for name, option in parts.get(draft.family, {"vae": "ae", "text_encoder": "text_encoder"}).items():
        if arguments.get(name):
            draft.put(option, arguments[name], name)
    settings = draft.options.pop("optimizer_args", None)
    keys.put_optimizer(draft, arguments.get("optimizer_type") or "adamw", {}, "optimizer_type")
    if settings:
        draft.put("optimizer_args", settings, "optimizer_args")
    sampling = arguments.get("timestep_sampling", "sigma")
    draft.put("timestep_sampling", sampling, "timestep_sampling")
    draft.put("model_prediction_type", "raw", "(always so there)")
    if sampling in ("sigma", "shift"):
        draft.put("discrete_flow_shift", arguments.get("discrete_flow_shift", 1.0), "discrete_flow_shift")
    for option in ("latents", "text_encoder_outputs"):
        draft.put(f"cache_{option}", True, "(always so there)")
        draft.put(f"cache_{option}_to_disk", True, "(always so there)")
    _datasets(draft, arguments, dataset)
    return draft


def _architecture(draft: Draft, script: str, arguments: dict[str, Any]) -> None:
    name = script or MODULES.get(str(arguments.get("network_module")), "")
    found = next((row for start, row in SCRIPTS.items() if name.startswith(start)), None)
    if found is None:
        told = script or arguments.get("network_module")
        raise draft.wrong(
            "network_module", f"{shown(told)} is of no model that is trained here (FLUX.1 Kontext, FLUX.2)"
        )
    draft.family, more = found
    for option, value in more.items():
        draft.put(option, value, "the script")


def _datasets(draft: Draft, arguments: dict[str, Any], dataset: Path | None) -> None:
    name = dataset or arguments.get("dataset_config")
    if name is None:
        raise draft.wrong("dataset_config", "is missing: the file of the dataset")
    beside = draft.path.parent / Path(name).name
    table = read_toml(beside if not Path(name).is_file() and beside.is_file() else Path(name), "dataset_config")
    general = keys.table_at(draft, table, "general")
    edits = False
    for item in keys.tables_at(draft, table, "datasets"):
        own = general | item
        values = draft.carried_values(DATASET, own, "(dataset) ") | {"bucket_reso_steps": BUCKET_STEP}
        if own.get("enable_bucket"):
            side = own.get("resolution", [960, 544])
            square = round((side[0] * side[-1]) ** 0.5) if isinstance(side, list) else int(side)
            values |= {"max_bucket_reso": keys.longest_side(square, 4.0), "min_bucket_reso": min(256, square // 2)}
        if own.get("cache_directory"):
            draft.put("cache_dir", own["cache_directory"], "(dataset) cache_directory")
        subset = draft.carried_values(SUBSET, {key: value for key, value in own.items() if key in SUBSET})
        edits |= "conditioning_data_dir" in subset or "metadata_file" in subset
        draft.datasets.append({**values, "subsets": [subset]})
    if edits:
        draft.put("task", "edit", "(dataset) control_directory")
    else:
        draft.options.pop("task", None)
