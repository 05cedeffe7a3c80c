# SPDX-License-Identifier: Apache-2.0
"""Configurations of Nerogar/OneTrainer: JSON files, with the concepts inside or in a file that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.text_files import read_json
from library.values import shown
from tools.other_trainers import keys
from tools.other_trainers.keys import Draft, by_hand, carried, idle, lost

TITLE = "OneTrainer"
FILE = "a configuration's `.json`; that of the concepts is found through it"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "STABLE_DIFFUSION_15": ("sd", {}),
    "STABLE_DIFFUSION_20": ("sd", {"v2": True, "v_parameterization": True}),
    "STABLE_DIFFUSION_20_BASE": ("sd", {"v2": True}),
    "STABLE_DIFFUSION_21": ("sd", {"v2": True, "v_parameterization": True}),
    "STABLE_DIFFUSION_21_BASE": ("sd", {"v2": True}),
    "STABLE_DIFFUSION_XL_10_BASE": ("sdxl", {}),
    "STABLE_DIFFUSION_3": ("sd3", {}),
    "STABLE_DIFFUSION_35": ("sd3", {}),
    "FLUX_DEV_1": ("flux", {}),
    "CHROMA_1": ("flux", {"model_type": "chroma"}),
    "SANA": ("sana", {}),
}
SCHEDULES = {"CONSTANT": "constant_with_warmup", "LINEAR": "linear", "COSINE": "cosine",
             "COSINE_WITH_RESTARTS": "cosine_with_restarts"}  # fmt: skip
LOOK = "a matter of the program alone"

OPTIONS = {
    "training_method": by_hand("the script"),
    "model_type": by_hand("the script"),
    "base_model_name": carried("pretrained_model_name_or_path"),
    "output_model_destination": by_hand("--output_dir, --output_name"),
    "output_dtype": carried("save_precision", convert=keys.save_precision),
    "output_model_format": idle("safetensors"),
    "concepts": by_hand("subsets"),
    "concept_file_name": by_hand("subsets"),
    "batch_size": by_hand("batch_size"),
    "gradient_accumulation_steps": carried("gradient_accumulation_steps", 1),
    "learning_rate": carried("learning_rate", 3e-6),
    "learning_rate_scheduler": by_hand("--lr_scheduler"),
    "learning_rate_warmup_steps": carried("lr_warmup_steps", 200),
    "learning_rate_cycles": by_hand("--lr_scheduler_num_cycles"),
    "learning_rate_scaler": lost("rates are not multiplied: give the product as --learning_rate"),
    "epochs": carried("max_train_epochs", 100),
    "resolution": by_hand("resolution; one dataset for each"),
    "aspect_ratio_bucketing": by_hand("enable_bucket"),
    "latent_caching": by_hand("--cache_latents"),
    "train_dtype": carried("mixed_precision", "fp16", keys.PRECISIONS),
    "weight_dtype": idle("frozen weights have the dtype of --mixed_precision, unless they are kept in fewer bits"),
    "unet": by_hand("--unet_lr"),
    "prior": by_hand("--unet_lr, --base_quant"),
    "transformer": by_hand("--unet_lr, --base_quant"),
    "text_encoder": by_hand("--network_train_unet_only, --text_encoder_lr"),
    "text_encoder_2": by_hand("--text_encoder_lr"),
    "text_encoder_3": idle("it does not learn"),
    "vae": idle("its dtype: see --no_half_vae"),
    "ema": by_hand("--ema_decay"),
    "ema_decay": by_hand("--ema_decay"),
    "ema_update_step_interval": lost("the average follows every step"),
    "gradient_checkpointing": by_hand("--gradient_checkpointing"),
    "peft_type": by_hand("--network_module"),
    "lora_model_name": carried("network_weights"),
    "lora_rank": carried("network_dim", 16),
    "lora_alpha": carried("network_alpha", 1.0),
    "lora_weight_dtype": idle("adapters are trained in 32 bits"),
    "lora_decompose": lost("see docs/adapters.md for DoRA"),
    "lora_layers": idle("layers are chosen in --network_args"),
    "lora_layer_preset": idle("layers are chosen in --network_args"),
    "layer_filter": lost("layers are chosen in --network_args; see the architecture's page"),
    "layer_filter_preset": idle("of layer_filter"),
    "dropout_probability": carried("network_dropout"),
    "optimizer": by_hand("--optimizer_type, --optimizer_args"),
    "clip_grad_norm": carried("max_grad_norm", 1.0),
    "loss_weight_fn": by_hand("--min_snr_gamma, --debiased_estimation_loss"),
    "loss_weight_strength": by_hand("--min_snr_gamma"),
    "mse_strength": by_hand("--loss_type"),
    "mae_strength": by_hand("--loss_type"),
    "log_cosh_strength": lost("no counterpart; see --loss_type"),
    "offset_noise_weight": carried("noise_offset"),
    "perturbation_noise_weight": carried("ip_noise_gamma"),
    "rescale_noise_scheduler_to_zero_terminal_snr": carried("zero_terminal_snr"),
    "force_v_prediction": carried("v_parameterization"),
    "timestep_distribution": by_hand("--timestep_sampling"),
    "noising_weight": by_hand("--sigmoid_scale"),
    "noising_bias": lost("the middle of the noise levels moves by --discrete_flow_shift"),
    "timestep_shift": by_hand("--discrete_flow_shift"),
    "dynamic_timestep_shifting": by_hand("--timestep_sampling flux_shift"),
    "min_noising_strength": by_hand("--min_timestep"),
    "max_noising_strength": by_hand("--max_timestep"),
    "masked_training": carried("masked_loss"),
    "normalize_masked_area_loss": carried("masked_loss_normalize"),
    "masked_prior_preservation_weight": carried("masked_prior_weight"),
    "unmasked_probability": lost("a mask always counts"),
    "unmasked_weight": lost("black does not train here; see --masked_prior_weight"),
    "seed": carried("seed"),
    "save_every": by_hand("--save_every_n_epochs, --save_every_n_steps"),
    "save_every_unit": by_hand("--save_every_n_epochs, --save_every_n_steps"),
    "sample_after": by_hand("--sample_every_n_epochs"),
    "sample_definition_file_name": lost("write the prompts into a file for --sample_prompts"),
    "backup_after": by_hand("--save_state_every_minutes"),
    "backup_after_unit": by_hand("--save_state_every_minutes"),
    "compile": carried("compile"),
    **{name: idle(LOOK) for name in (
        "__version", "debug_mode", "debug_dir", "workspace_dir", "cache_dir", "tensorboard", "tensorboard_expose",
        "validation", "dataloader_threads", "train_device", "temp_device", "only_cache", "cloud", "secrets",
        "optimizer_defaults", "rolling_backup", "rolling_backup_count", "backup_before_save", "samples",
        "clear_cache_before_training", "sample_image_format", "attention_mechanism", "save_filename_prefix",
        "include_train_config", "fallback_train_dtype", "samples_to_tensorboard", "sample_after_unit",
        "non_ema_sampling", "continue_last_backup", "layer_offload_fraction", "sample_skip_first", "embedding",
        "additional_embeddings", "embedding_weight_dtype", "bundle_additional_embeddings", "loss_scaler")},
}  # fmt: skip
CONCEPT = {
    "path": carried("image_dir"),
    "name": idle("the name of a part"),
    "enabled": by_hand("num_repeats"),
    "type": by_hand("is_reg"),
    "balancing": by_hand("num_repeats"),
    "balancing_strategy": by_hand("num_repeats"),
    "loss_weight": lost("parts count by num_repeats here"),
    "text": by_hand("caption_extension, class_tokens, shuffle_caption, keep_tokens"),
    "image": by_hand("flip_aug, random_crop"),
    "include_subdirectories": lost("give each folder as a subset"),
    **{name: idle(LOOK) for name in ("seed", "image_variations", "text_variations", "concept_stats")},
}
TABLES = {"": OPTIONS, "concepts.": CONCEPT}


def is_mine(document: Any) -> bool:
    """Whether a document is a configuration of this trainer."""
    return isinstance(document, dict) and {"base_model_name", "model_type"} <= document.keys()


def read(document: dict[str, Any], path: Path, dataset: Path | None) -> Draft:
    """The draft of a configuration. dataset: the file of the concepts, where it is not inside or named."""
    draft = Draft(path)
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise draft.wrong("model_type", f"{shown(kind)} is not trained here; there are {', '.join(MODELS)}")
    draft.family, more = MODELS[kind]
    draft.options |= more
    method = document.get("training_method", "FINE_TUNE")
    if method not in ("LORA", "FINE_TUNE"):
        raise draft.wrong("training_method", f"{shown(method)} is not converted; there are LORA, FINE_TUNE")
    draft.method = "network" if method == "LORA" else "finetune"
    draft.carry(OPTIONS, document)
    _places(draft, document)
    _adapter(draft, document)
    _learning(draft, document)
    _noise(draft, document)
    _concepts(draft, document, dataset)
    return draft


def _places(draft: Draft, document: dict[str, Any]) -> None:
    place = Path(document.get("output_model_destination") or "models/model.safetensors")
    draft.put("output_dir", str(place.parent), "output_model_destination")
    draft.put("output_name", place.stem, "output_model_destination")
    every, unit = document.get("save_every"), document.get("save_every_unit", "NEVER")
    if every and unit in ("EPOCH", "STEP"):
        draft.put(f"save_every_n_{unit.lower()}s", every, "save_every")
    if document.get("backup_after") and document.get("backup_after_unit", "MINUTE") == "MINUTE":
        draft.put("save_state_every_minutes", document["backup_after"], "backup_after")


def _adapter(draft: Draft, document: dict[str, Any]) -> None:
    if draft.method == "network":
        kind = str(document.get("peft_type", "LORA")).lower()
        keys.network_of(draft, {"oft_2": "oft"}.get(kind, kind), "peft_type")
        encoder = keys.table_at(draft, document, "text_encoder")
        learns = encoder.get("train", True) and draft.family in ("sd", "sdxl")
        draft.put("network_train_unet_only", not learns, "text_encoder.train")
        if learns and encoder.get("learning_rate"):
            draft.put("text_encoder_lr", [encoder["learning_rate"]], "text_encoder.learning_rate")
    else:
        for name in ("network_dim", "network_alpha"):
            draft.options.pop(name, None)
    part = next((name for name in ("transformer", "prior", "unet") if document.get(name)), "unet")
    denoiser = keys.table_at(draft, document, part)
    if denoiser.get("learning_rate"):
        draft.put("unet_lr", denoiser["learning_rate"], f"{part}.learning_rate")
    stored = {"NFLOAT_4": ("base_quant", "nf4"), "INT_8": ("base_quant", "int8"), "FLOAT_8": ("fp8_base_unet", True)}
    if denoiser.get("weight_dtype") in stored:
        draft.put(*stored[denoiser["weight_dtype"]], f"{part}.weight_dtype")


def _learning(draft: Draft, document: dict[str, Any]) -> None:
    schedule = document.get("learning_rate_scheduler", "CONSTANT")
    if schedule in SCHEDULES:
        draft.put("lr_scheduler", SCHEDULES[schedule], "learning_rate_scheduler")
    else:
        draft.lose("learning_rate_scheduler", f"{shown(schedule)} has no counterpart here")
    optimizer = keys.table_at(draft, document, "optimizer")
    settings = {name: optimizer[name] for name in ("weight_decay", "eps") if optimizer.get(name) is not None}
    if optimizer.get("beta1") is not None and optimizer.get("beta2") is not None:
        settings["betas"] = [optimizer["beta1"], optimizer["beta2"]]
    keys.put_optimizer(draft, optimizer.get("optimizer", "ADAMW"), settings, "optimizer.optimizer")
    if document.get("ema", "OFF") != "OFF":
        draft.put("ema_decay", document.get("ema_decay", 0.999), "ema_decay")
    draft.put("gradient_checkpointing", document.get("gradient_checkpointing", "ON") != "OFF", "gradient_checkpointing")
    if document.get("gradient_checkpointing") == "CPU_OFFLOADED":
        draft.put("cpu_offload_checkpointing", True, "gradient_checkpointing")
    weight = document.get("loss_weight_fn", "CONSTANT")
    if weight == "MIN_SNR_GAMMA":
        draft.put("min_snr_gamma", document.get("loss_weight_strength", 5.0), "loss_weight_strength")
    elif weight == "DEBIASED_ESTIMATION":
        draft.put("debiased_estimation_loss", True, "loss_weight_fn")
    elif weight != "CONSTANT":
        draft.lose("loss_weight_fn", f"{shown(weight)} has no counterpart here")
    if document.get("mae_strength") and not document.get("mse_strength"):
        draft.put("loss_type", "l1", "mae_strength")
    if document.get("latent_caching", True):
        draft.put("cache_latents", True, "latent_caching")
        draft.put("cache_latents_to_disk", True, "latent_caching")


def _noise(draft: Draft, document: dict[str, Any]) -> None:
    for name, option in (("min_noising_strength", "min_timestep"), ("max_noising_strength", "max_timestep")):
        if document.get(name) not in (None, 0.0 if option == "min_timestep" else 1.0):
            draft.put(option, round(1000 * float(document[name])), name)
    kind = document.get("timestep_distribution", "UNIFORM")
    if draft.family in ("sd", "sdxl"):
        if kind != "UNIFORM":
            draft.lose("timestep_distribution", f"{shown(kind)}: timesteps are drawn evenly")
        return
    if kind not in ("UNIFORM", "LOGIT_NORMAL"):
        draft.lose("timestep_distribution", f"{shown(kind)} has no counterpart here; LOGIT_NORMAL is used")
    shift = float(document.get("timestep_shift", 1.0))
    keys.put_sampling(
        draft, "timestep_distribution", uniform=kind == "UNIFORM", shift=shift if shift != 1 else None,
        by_size=bool(document.get("dynamic_timestep_shifting")),
        steepness=1.0 + float(document.get("noising_weight", 0.0)),
    )  # fmt: skip
    if draft.family == "flux":
        draft.put("guidance_scale", 1.0, "(its value)")


def _concepts(draft: Draft, document: dict[str, Any], dataset: Path | None) -> None:
    concepts = document.get("concepts")
    if dataset is not None or not concepts:
        name = dataset or Path(document.get("concept_file_name") or "training_concepts/concepts.json")
        beside = draft.path.parent / name.name
        concepts = read_json(name if name.is_file() else beside, "concept_file_name")
    items = keys.tables_at(draft, {"concepts": concepts}, "concepts")
    subsets = [_subset(draft, item) for item in items if item.get("enabled", True)]
    sizes = [int(text) for text in str(document.get("resolution", 512)).replace(" ", "").split(",") if text.isdecimal()]
    if not sizes:
        raise draft.wrong("resolution", f"expects sizes such as 512 or 512,768, got {shown(document['resolution'])}")
    for side in sizes:
        table: dict[str, Any] = {"resolution": side, "batch_size": document.get("batch_size", 1)}
        if document.get("aspect_ratio_bucketing", True):
            table |= {"enable_bucket": True, "bucket_reso_steps": 64, "min_bucket_reso": min(256, side // 2),
                      "max_bucket_reso": keys.longest_side(side, 4.0)}  # fmt: skip
        draft.datasets.append({**table, "subsets": [dict(subset) for subset in subsets]})


def _subset(draft: Draft, item: dict[str, Any]) -> dict[str, Any]:
    subset = draft.carried_values(CONCEPT, item, "concepts.")
    text, image = keys.table_at(draft, item, "text"), keys.table_at(draft, item, "image")
    if text.get("prompt_source", "sample") == "sample":
        subset["caption_extension"] = ".txt"
    else:
        draft.lose(
            "concepts.text.prompt_source",
            f"{shown(text['prompt_source'])}: captions are text files beside the pictures",
        )
    if text.get("enable_tag_shuffling"):
        subset |= {"shuffle_caption": True, "keep_tokens": text.get("keep_tags_count", 1)}
    if image.get("enable_random_flip"):
        subset["flip_aug"] = True
    repeats = float(item.get("balancing", 1.0))
    subset["num_repeats"] = max(1, round(repeats))
    if item.get("balancing_strategy", "REPEATS") != "REPEATS" or repeats != round(repeats):
        draft.change("concepts.balancing", f"{repeats} is num_repeats {subset['num_repeats']}")
    if item.get("type") == "PRIOR_PREDICTION" or item.get("type") == "VALIDATION":
        draft.lose("concepts.type", f"{shown(item['type'])} has no counterpart here")
    return subset
