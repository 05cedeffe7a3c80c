# SPDX-License-Identifier: Apache-2.0
"""Configurations of tdrussell/diffusion-pipe: a TOML file, and the one of the dataset that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.options import read_toml
from library.values import shown
from tools.other_trainers import keys
from tools.other_trainers.keys import Draft, by_hand, carried, idle, lost

TITLE = "diffusion-pipe"
FILE = "its `.toml`; the dataset's is found through it"
BUCKET_STEP = 32

# type -> family, further options
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": ("sdxl", {}),
    "flux": ("flux", {}),
    "chroma": ("flux", {"model_type": "chroma"}),
    "flux2": ("flux2", {}),
    "lumina_2": ("lumina", {}),
    "sd3": ("sd3", {}),
    "hunyuan_image": ("hunyuan_image", {}),
    "anima": ("anima", {}),
}
# family -> their key of a part -> our option
PARTS: dict[str, dict[str, str]] = {
    "sdxl": {"vae_path": "vae"},
    "flux": {"vae_path": "ae", "clip_path": "clip_l", "t5_path": "t5xxl"},
    "flux2": {"vae_path": "ae", "text_encoder_path": "text_encoder", "llm_path": "text_encoder"},
    "lumina": {"vae_path": "ae", "llm_path": "gemma2"},
    "sd3": {"vae_path": "vae", "clip_path": "clip_l", "t5_path": "t5xxl"},
    "hunyuan_image": {"vae_path": "vae", "text_encoder_path": "text_encoder", "byt5_path": "byt5"},
    "anima": {"vae_path": "vae", "llm_path": "qwen3"},
}
# family -> folder of a diffusers pipeline -> our option, for a denoiser that is a file of its own
FOLDERS: dict[str, dict[str, str]] = {
    "flux": {"vae": "ae", "text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "sd3": {"vae": "vae", "text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
}

EVAL = "pictures for validation are a share of the dataset here: see --validation_split"
VIDEO = "there are no videos here"
LAYERS = "a model is not divided by layers here; see docs/many_cards.md"

MAIN = {
    "output_dir": carried("output_dir"),
    "dataset": by_hand("--dataset_config"),
    "eval_datasets": lost(EVAL),
    "epochs": by_hand("--max_train_epochs"),
    "max_steps": by_hand("--max_train_steps"),
    "micro_batch_size_per_gpu": by_hand("batch_size"),
    "image_micro_batch_size_per_gpu": by_hand("batch_size"),
    "pipeline_stages": by_hand("--shard_base"),
    "gradient_accumulation_steps": carried("gradient_accumulation_steps", 1),
    "gradient_clipping": carried("max_grad_norm", 1.0),
    "warmup_steps": carried("lr_warmup_steps", 0),
    "lr_scheduler": carried("lr_scheduler"),
    "force_constant_lr": by_hand("--learning_rate"),
    "blocks_to_swap": carried("blocks_to_swap"),
    "pseudo_huber_c": lost("its formula differs from --loss_type huber"),
    "eval_every_n_epochs": idle(EVAL),
    "eval_every_n_steps": idle(EVAL),
    "eval_every_n_examples": idle(EVAL),
    "eval_before_first_step": idle(EVAL),
    "eval_micro_batch_size_per_gpu": idle(EVAL),
    "image_eval_micro_batch_size_per_gpu": idle(EVAL),
    "eval_gradient_accumulation_steps": idle(EVAL),
    "disable_block_swap_for_eval": idle(EVAL),
    "save_every_n_epochs": carried("save_every_n_epochs"),
    "save_every_n_steps": carried("save_every_n_steps"),
    "save_every_n_examples": lost("saves are every so many steps or epochs here"),
    "checkpoint_every_n_epochs": by_hand("--save_state", "states are written with every save here"),
    "checkpoint_every_n_minutes": carried("save_state_every_minutes"),
    "activation_checkpointing": by_hand("--gradient_checkpointing"),
    "reentrant_activation_checkpointing": idle("never needed here"),
    "upload_hf_from_epoch": lost("every save is uploaded here"),
    "huggingface_repo": carried("huggingface_repo_id"),
    "partition_method": idle(LAYERS),
    "partition_split": idle(LAYERS),
    "save_dtype": carried("save_precision", convert=keys.save_precision),
    "caching_batch_size": carried("vae_batch_size"),
    "map_num_proc": idle("the number of processes is chosen"),
    "compile": carried("compile"),
    "steps_per_print": idle("progress is always shown"),
    "logging_steps": idle("every step is logged"),
    "video_clip_mode": idle(VIDEO),
    "x_axis_examples": idle("a matter of the curves alone"),
    "resume_from_checkpoint": lost("states of other programs cannot be continued"),
    "uncond_fraction": by_hand("caption_dropout_rate"),
    "model": by_hand("the table below"),
    "adapter": by_hand("the table below; without it, all weights are trained"),
    "optimizer": by_hand("the table below"),
    "monitoring": by_hand("the table below"),
}

MODEL = {
    "type": by_hand("the script"),
    "diffusers_path": by_hand("--pretrained_model_name_or_path"),
    "checkpoint_path": by_hand("--pretrained_model_name_or_path"),
    "transformer_path": by_hand("--pretrained_model_name_or_path"),
    "ckpt_path": by_hand("--pretrained_model_name_or_path"),
    "vae_path": by_hand("--vae, or --ae"),
    "llm_path": by_hand("the option of the text encoder"),
    "text_encoder_path": by_hand("--text_encoder"),
    "byt5_path": by_hand("--byt5"),
    "clip_path": by_hand("--clip_l"),
    "t5_path": by_hand("--t5xxl"),
    "dtype": by_hand("--mixed_precision"),
    "transformer_dtype": by_hand("--fp8_base_unet, or --base_quant nf4"),
    "timestep_sample_method": by_hand("--timestep_sampling"),
    "sigmoid_scale": by_hand("--sigmoid_scale"),
    "shift": by_hand("--discrete_flow_shift"),
    "flux_shift": by_hand("--timestep_sampling flux_shift"),
    "lumina_shift": by_hand("--timestep_sampling flux_shift"),
    "guidance": by_hand("--guidance_scale"),
    "bypass_guidance_embedding": lost("guidance is always given to a model that has it"),
    "v_pred": carried("v_parameterization"),
    "min_snr_gamma": carried("min_snr_gamma"),
    "debiased_estimation_loss": carried("debiased_estimation_loss"),
    "unet_lr": carried("unet_lr"),
    "text_encoder_1_lr": by_hand("--text_encoder_lr"),
    "text_encoder_2_lr": by_hand("--text_encoder_lr"),
    "llm_adapter_lr": carried("llm_adapter_lr"),
}

ADAPTER = {
    "type": by_hand("--network_module"),
    "rank": carried("network_dim"),
    "dtype": idle("adapters are trained in 32 bits, unless --full_bf16 is given"),
    "dropout": carried("network_dropout"),
    "decompose_factor": by_hand("--network_args factor="),
    "rank_dropout": by_hand("--network_args rank_dropout="),
    "init_from_existing": by_hand("--network_weights"),
    "fuse_adapters": by_hand("--base_weights"),
}

OPTIMIZER = {
    "type": by_hand("--optimizer_type"),
    "lr": carried("learning_rate"),
    "gradient_release": by_hand("--fused_backward_pass"),
    "betas": by_hand("--optimizer_args betas="),
    "weight_decay": by_hand("--optimizer_args weight_decay="),
    "eps": by_hand("--optimizer_args eps="),
    "stabilize": idle("a setting of one package"),
}

MONITORING = {
    "enable_wandb": by_hand("--log_with wandb"),
    "wandb_api_key": lost("a secret stays out of files: set WANDB_API_KEY"),
    "wandb_tracker_name": carried("log_tracker_name"),
    "wandb_run_name": carried("wandb_run_name"),
}

RATIOS = "buckets follow the pictures' own shapes here"
DATASET = {
    "resolutions": by_hand("resolution; one dataset for each"),
    "enable_ar_bucket": carried("enable_bucket", False),
    "min_ar": by_hand("max_bucket_reso", RATIOS),
    "max_ar": by_hand("max_bucket_reso", RATIOS),
    "num_ar_buckets": idle(RATIOS),
    "ar_buckets": lost(RATIOS),
    "size_buckets": lost(RATIOS),
    "frame_buckets": idle(VIDEO),
    "cache_shuffle_num": by_hand("shuffle_caption"),
    "cache_shuffle_delimiter": by_hand("caption_separator"),
    "shuffle_tags": carried("shuffle_caption"),
    "skip_empty_caption": idle("pictures without captions are named at the start"),
    "caption_prefix": carried("caption_prefix"),
    "num_repeats": by_hand("num_repeats"),
    "directory": by_hand("subsets"),
}
DIRECTORY = {
    "path": carried("image_dir"),
    "num_repeats": carried("num_repeats", 1),
    "mask_path": carried("conditioning_data_dir"),
    "control_path": carried("conditioning_data_dir"),
    "caption_prefix": carried("caption_prefix"),
    "shuffle_tags": carried("shuffle_caption"),
    "enable_ar_bucket": lost("it is a key of the whole dataset here"),
    "resolutions": lost("it is a key of the whole dataset here"),
    "ar_buckets": lost(RATIOS),
    "min_ar": idle(RATIOS),
    "max_ar": idle(RATIOS),
    "num_ar_buckets": idle(RATIOS),
    "frame_buckets": idle(VIDEO),
    "size_buckets": lost(RATIOS),
}
TABLES = {
    "": MAIN, "model.": MODEL, "adapter.": ADAPTER, "optimizer.": OPTIMIZER, "monitoring.": MONITORING,
    "(dataset) ": DATASET, "directory.": DIRECTORY,
}  # fmt: skip


def is_mine(document: Any) -> bool:
    """Whether a document is a configuration of this trainer."""
    return isinstance(document, dict) and isinstance(document.get("model"), dict) and "dataset" in document


def read(document: dict[str, Any], path: Path, dataset: Path | None) -> Draft:
    """The draft of a configuration. dataset: the dataset's file, where it is not the one that `document` names."""
    draft = Draft(path)
    model = keys.table_at(draft, document, "model", needed=True)
    kind = model.get("type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise draft.wrong("model.type", f"{shown(kind)} is not trained here; there are {', '.join(MODELS)}")
    draft.family, more = MODELS[kind]
    draft.options |= more
    draft.carry(MAIN, document)
    _length(draft, document)
    _model(draft, model)
    _adapter(draft, document)
    _optimizer(draft, keys.table_at(draft, document, "optimizer", needed=True), document)
    _memory(draft, document)
    monitoring = keys.table_at(draft, document, "monitoring")
    if monitoring.get("enable_wandb"):
        draft.carry(MONITORING, monitoring, "monitoring.")
        draft.put("log_with", "wandb", "monitoring.enable_wandb")
    _dataset(draft, document, dataset or _dataset_path(draft, document))
    return draft


def _length(draft: Draft, document: dict[str, Any]) -> None:
    if document.get("max_steps"):
        draft.put("max_train_steps", document["max_steps"], "max_steps")
        if document.get("epochs"):
            draft.change("epochs", "max_steps alone ends the run here")
    elif document.get("epochs"):
        draft.put("max_train_epochs", document["epochs"], "epochs")
    if document.get("warmup_steps") and document.get("lr_scheduler", "constant") == "constant":
        draft.put("lr_scheduler", "constant_with_warmup", "lr_scheduler")


def _model(draft: Draft, model: dict[str, Any]) -> None:
    draft.carry(MODEL, model, "model.")
    places = ("transformer_path", "checkpoint_path", "diffusers_path", "ckpt_path")
    given = [name for name in places if model.get(name)]
    if not given:
        raise draft.wrong("model", f"names no model: one of {', '.join(places)} is needed")
    draft.put("pretrained_model_name_or_path", model[given[0]], f"model.{given[0]}")
    if given[0] == "transformer_path" and model.get("diffusers_path"):
        for folder, option in FOLDERS.get(draft.family, {}).items():
            if not (option == "clip_l" and draft.options.get("model_type") == "chroma"):
                draft.put(option, f"{str(model['diffusers_path']).rstrip('/')}/{folder}", "model.diffusers_path")
        if draft.options.get("model_type") == "chroma":
            draft.options.pop("t5xxl")
            draft.put("t5xxl", f"{str(model['diffusers_path']).rstrip('/')}/text_encoder_2", "model.diffusers_path")
    for name, option in PARTS[draft.family].items():
        if model.get(name):
            draft.put(option, model[name], f"model.{name}")
    draft.put("mixed_precision", keys.PRECISIONS(model.get("dtype", "bfloat16")), "model.dtype")
    _stored(draft, model.get("transformer_dtype"))
    _noise(draft, model)


def _stored(draft: Draft, stored: Any) -> None:
    if str(stored).startswith("float8"):
        draft.put("fp8_base_unet", True, "model.transformer_dtype")
    elif stored == "nf4":
        draft.put("base_quant", "nf4", "model.transformer_dtype")
    elif stored not in (None, "bfloat16"):
        draft.lose("model.transformer_dtype", f"{shown(stored)} has no counterpart here")


def _noise(draft: Draft, model: dict[str, Any]) -> None:
    if draft.family == "sdxl":
        rates = [model.get(f"text_encoder_{number}_lr") for number in (1, 2)]
        if None not in rates:
            draft.put("text_encoder_lr", rates, "model.text_encoder_1_lr")
        elif rates != [None, None]:
            draft.lose("model.text_encoder_1_lr", "give both rates, or none")
        return
    keys.put_sampling(
        draft, "model.timestep_sample_method", uniform=model.get("timestep_sample_method") == "uniform",
        shift=model.get("shift"), by_size=bool(model.get("flux_shift") or model.get("lumina_shift")),
        steepness=model.get("sigmoid_scale", 1.0),
    )  # fmt: skip
    if draft.family in ("flux", "flux2", "hunyuan_image"):
        draft.put("guidance_scale", model.get("guidance", 1.0), "model.guidance")


def _adapter(draft: Draft, document: dict[str, Any]) -> None:
    adapter = keys.table_at(draft, document, "adapter")
    if not adapter:
        draft.method = "finetune"
        return
    draft.carry(ADAPTER, adapter, "adapter.")
    kind = str(adapter.get("type", "lora"))
    keys.network_of(draft, kind, "adapter.type")
    if adapter.get("rank") is not None:
        rank = int(min(adapter["rank"], 100_000)) if isinstance(adapter["rank"], (int, float)) else adapter["rank"]
        draft.put("network_dim", rank, "adapter.rank")
        draft.put("network_alpha", rank, "adapter.rank (alpha equals it there)")
    names = {"decompose_factor": "factor", "rank_dropout": "rank_dropout"}
    args = [f"{ours}={adapter[name]}" for name, ours in names.items() if adapter.get(name) is not None]
    if args:
        draft.put("network_args", args, "adapter.decompose_factor")
    if adapter.get("init_from_existing"):
        file = f"{adapter['init_from_existing']}/adapter_model.safetensors"
        draft.put("network_weights", file, "adapter.init_from_existing")
    fused = adapter.get("fuse_adapters")
    if fused:
        draft.put("base_weights", [item["path"] for item in fused], "adapter.fuse_adapters")
        draft.put("base_weights_multiplier", [item.get("weight", 1.0) for item in fused], "adapter.fuse_adapters")
    if draft.family != "sdxl":
        draft.put("network_train_unet_only", True, "adapter (text encoders are not trained there)")


def _optimizer(draft: Draft, optimizer: dict[str, Any], document: dict[str, Any]) -> None:
    known = {name: value for name, value in optimizer.items() if name in OPTIMIZER}
    draft.carry(OPTIMIZER, known, "optimizer.")
    settings = {
        name: value for name, value in optimizer.items() if name not in ("type", "lr", "gradient_release", "stabilize")
    }
    keys.put_optimizer(draft, optimizer.get("type", "adamw"), settings, "optimizer.type")
    if document.get("force_constant_lr"):
        draft.put("learning_rate", document["force_constant_lr"], "force_constant_lr")
        draft.put("lr_scheduler", "constant", "force_constant_lr")
    if draft.method == "finetune":
        draft.put("full_bf16", True, "model.dtype (all weights are kept in it there)")
        if optimizer.get("gradient_release"):
            draft.put("fused_backward_pass", True, "optimizer.gradient_release")
            draft.put("max_grad_norm", 0.0, "optimizer.gradient_release")


def _memory(draft: Draft, document: dict[str, Any]) -> None:
    kept = document.get("activation_checkpointing")
    if kept:
        draft.put("gradient_checkpointing", True, "activation_checkpointing")
    if kept == "unsloth":
        draft.put("cpu_offload_checkpointing", True, "activation_checkpointing")
    if document.get("checkpoint_every_n_epochs"):
        draft.put("save_state", True, "checkpoint_every_n_epochs")
        draft.change("checkpoint_every_n_epochs", MAIN["checkpoint_every_n_epochs"].changed)
    if document.get("pipeline_stages", 1) != 1:
        draft.lose("pipeline_stages", f"{LAYERS}, --shard_base")
    draft.put("cache_latents", True, "(always so there)")
    draft.put("cache_latents_to_disk", True, "(always so there)")
    if draft.family != "sdxl":
        draft.put("cache_text_encoder_outputs", True, "(always so there)")
        draft.put("cache_text_encoder_outputs_to_disk", True, "(always so there)")


def _dataset_path(draft: Draft, document: dict[str, Any]) -> Path:
    """The dataset's file: as it is written, from here or from the configuration's folder."""
    name = document.get("dataset")
    if not isinstance(name, str):
        raise draft.wrong("dataset", f"expects the name of a TOML file, got {shown(name)}")
    beside = draft.path.parent / Path(name).name
    return beside if not Path(name).is_file() and beside.is_file() else Path(name)


def _dataset(draft: Draft, document: dict[str, Any], path: Path) -> None:
    table = read_toml(path, "dataset")
    values = draft.carried_values(DATASET, table, "(dataset) ") | {"caption_extension": ".txt"}
    values["bucket_reso_steps"] = BUCKET_STEP if draft.family != "sdxl" else 64
    shuffles = table.get("cache_shuffle_num", 0)
    if shuffles:
        values["shuffle_caption"] = True
        draft.put("caption_variants", shuffles, "(dataset) cache_shuffle_num")
    separator = str(table.get("cache_shuffle_delimiter", ", ")).strip()
    if (shuffles or table.get("shuffle_tags")) and separator:
        values["caption_separator"] = separator
    if table.get("uncond_fraction") or document.get("uncond_fraction"):
        values["caption_dropout_rate"] = document["uncond_fraction"]
    subsets = [_subset(draft, item, table) for item in keys.tables_at(draft, table, "directory")]
    ratio = max([1.0, *(float(table[name]) for name in ("max_ar",) if name in table),
                 *(1 / float(table[name]) for name in ("min_ar",) if table.get(name))])  # fmt: skip
    for side in _sides(draft, table):
        sized = {"resolution": side, "batch_size": _batch(draft, document, side)}
        if values.get("enable_bucket"):
            square = side if isinstance(side, int) else round((side[0] * side[1]) ** 0.5)
            sized["max_bucket_reso"] = keys.longest_side(square, ratio, values["bucket_reso_steps"])
            sized["min_bucket_reso"] = min(256, square // 2)
        draft.datasets.append({**values, **sized, "subsets": [dict(subset) for subset in subsets]})


def _sides(draft: Draft, table: dict[str, Any]) -> list[Any]:
    sides = table.get("resolutions")
    if not isinstance(sides, list) or not sides:
        raise draft.wrong("(dataset) resolutions", f"expects a list of sizes, got {shown(sides)}")
    return sides


def _subset(draft: Draft, item: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    repeats = {"num_repeats": table["num_repeats"]} if "num_repeats" in table else {}
    subset = draft.carried_values(DIRECTORY, repeats | item, "directory.")
    if item.get("mask_path"):
        draft.put("masked_loss", True, "directory.mask_path")
    if item.get("control_path"):
        draft.put("task", "edit", "directory.control_path")
        if draft.family == "flux":
            draft.put("model_type", "kontext", "directory.control_path")
        draft.change("directory.control_path", "a control picture keeps its own shape here instead of the target's")
    return subset


def _batch(draft: Draft, document: dict[str, Any], side: Any) -> Any:
    """Pictures in a batch, which may depend on the resolution."""
    size = document.get("image_micro_batch_size_per_gpu", document.get("micro_batch_size_per_gpu", 1))
    if not isinstance(size, list):
        return size
    try:
        return dict(size)[side]
    except (TypeError, ValueError, KeyError):
        raise draft.wrong("micro_batch_size_per_gpu", f"has no size of a batch for resolution {side}") from None
