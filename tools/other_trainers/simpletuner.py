# SPDX-License-Identifier: Apache-2.0
"""Configurations of bghira/SimpleTuner: config.json, and the JSON file of data backends that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.text_files import read_json
from library.values import shown
from tools.other_trainers import keys
from tools.other_trainers.keys import Draft, by_hand, carried, idle, lost

TITLE = "SimpleTuner"
FILE = "its `config.json`; the one of the data backends is found through it"

# model_family -> family, further options
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("flux", {}),
    "flux2": ("flux2", {}),
    "chroma": ("flux", {"model_type": "chroma"}),
    "sd3": ("sd3", {}),
    "sdxl": ("sdxl", {}),
    "legacy": ("sd", {}),
    "sd1x": ("sd", {}),
    "sd2x": ("sd", {"v2": True}),
    "sana": ("sana", {}),
    "lumina2": ("lumina", {}),
}
SCHEDULES = {"sine": "cosine", **{name: name for name in (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")}}  # fmt: skip
PREVIEWS = "a prompt's own option"
BACKENDS = "the program's own; see docs/tools.md for caches"
STATES = "states of other programs cannot be continued; ours: --resume latest"

OPTIONS = {
    "pretrained_model_name_or_path": carried("pretrained_model_name_or_path"),
    "pretrained_transformer_model_name_or_path": by_hand("--pretrained_model_name_or_path"),
    "pretrained_vae_model_name_or_path": by_hand("--vae, or --ae"),
    "pretrained_t5_model_name_or_path": by_hand("--t5xxl"),
    "model_family": by_hand("the script"),
    "model_type": by_hand("the script; `full` trains all weights"),
    "model_flavour": by_hand("--model_type kontext, for the flavour kontext"),
    "lora_type": by_hand("--network_module"),
    "lycoris_config": by_hand("--network_module, --network_args"),
    "lora_rank": by_hand("--network_dim"),
    "lora_alpha": by_hand("--network_alpha"),
    "lora_dropout": by_hand("--network_dropout"),
    "lora_init_type": lost("adapters begin as kaiming-uniform and zeros"),
    "init_lora": carried("network_weights"),
    "flux_lora_target": by_hand("--network_args; see docs/flux.md for the layers"),
    "use_dora": lost("see docs/adapters.md for DoRA"),
    "data_backend_config": by_hand("--dataset_config"),
    "aspect_bucket_rounding": idle("buckets follow the pictures' own shapes"),
    "aspect_bucket_alignment": by_hand("bucket_reso_steps"),
    "minimum_image_size": lost("small pictures are enlarged; see bucket_no_upscale"),
    "resolution": by_hand("resolution"),
    "resolution_type": by_hand("resolution"),
    "seed": carried("seed"),
    "output_dir": carried("output_dir", "simpletuner-results"),
    "max_train_steps": by_hand("--max_train_steps"),
    "num_train_epochs": by_hand("--max_train_epochs"),
    "ignore_final_epochs": idle("steps alone end a run here"),
    "checkpointing_steps": carried("save_every_n_steps", 500),
    "checkpoint_step_interval": carried("save_every_n_steps"),
    "checkpoint_epoch_interval": carried("save_every_n_epochs"),
    "checkpoints_total_limit": by_hand("--save_last_n_steps"),
    "resume_from_checkpoint": idle(STATES),
    "push_to_hub": by_hand("--huggingface_repo_id"),
    "push_checkpoints_to_hub": idle("every save is uploaded"),
    "hub_model_id": by_hand("--huggingface_repo_id"),
    "tracker_project_name": carried("log_tracker_name"),
    "tracker_run_name": carried("wandb_run_name"),
    "report_to": by_hand("--log_with"),
    "logging_dir": carried("logging_dir", "logs"),
    "train_batch_size": by_hand("batch_size"),
    "gradient_checkpointing": carried("gradient_checkpointing", convert=keys.truth),
    "gradient_checkpointing_interval": by_hand("--activation_budget"),
    "gradient_accumulation_steps": carried("gradient_accumulation_steps", 1),
    "caption_dropout_probability": by_hand("caption_dropout_rate"),
    "mixed_precision": carried("mixed_precision", "bf16"),
    "optimizer": by_hand("--optimizer_type"),
    "optimizer_config": by_hand("--optimizer_args"),
    "optimizer_beta1": by_hand("--optimizer_args betas="),
    "optimizer_beta2": by_hand("--optimizer_args betas="),
    "learning_rate": carried("learning_rate", 4e-7, float),
    "text_encoder_lr": carried("text_encoder_lr"),
    "lr_scheduler": by_hand("--lr_scheduler"),
    "lr_warmup_steps": carried("lr_warmup_steps", 500),
    "lr_num_cycles": carried("lr_scheduler_num_cycles"),
    "lr_power": by_hand("--lr_scheduler_power"),
    "lr_end": lost("a schedule ends at 0, or by --lr_scheduler_min_lr_ratio"),
    "max_grad_norm": by_hand("--max_grad_norm"),
    "grad_clip_method": by_hand("--max_grad_norm"),
    "use_ema": by_hand("--ema_decay"),
    "ema_decay": by_hand("--ema_decay"),
    "ema_update_interval": lost("the average follows every step"),
    "ema_device": idle("it stays where the weights are"),
    "ema_cpu_only": idle("it stays where the weights are"),
    "ema_validation": idle("previews are of the average"),
    "snr_gamma": carried("min_snr_gamma"),
    "noise_offset": carried("noise_offset"),
    "offset_noise": idle("see --noise_offset"),
    "prediction_type": by_hand("--v_parameterization"),
    "flow_schedule_shift": by_hand("--discrete_flow_shift"),
    "flow_schedule_auto_shift": by_hand("--timestep_sampling flux_shift"),
    "flow_sigmoid_scale": by_hand("--sigmoid_scale"),
    "flow_use_uniform_schedule": by_hand("--timestep_sampling uniform"),
    "flow_use_beta_schedule": lost("noise levels are not drawn from a beta distribution; see --timestep_sampling"),
    "flux_schedule_shift": by_hand("--discrete_flow_shift"),
    "flux_schedule_auto_shift": by_hand("--timestep_sampling flux_shift"),
    "flux_guidance_mode": by_hand("--guidance_scale"),
    "flux_guidance_value": by_hand("--guidance_scale"),
    "flux_attention_masked_training": carried("apply_t5_attn_mask", convert=keys.truth),
    "flux_fast_schedule": lost("see docs/flux.md for schnell"),
    "base_model_precision": by_hand("--base_quant, --fp8_base_unet"),
    "base_model_default_dtype": idle("that of --mixed_precision"),
    "text_encoder_1_precision": idle("text encoders are cached"),
    "text_encoder_2_precision": idle("text encoders are cached"),
    "quantize_via": idle("a matter of speed"),
    "vae_batch_size": carried("vae_batch_size"),
    "attention_mechanism": idle("torch's own attention is used"),
    "allow_tf32": idle("a matter of speed"),
    "num_workers": idle("the number of processes is chosen"),
    "disable_benchmark": by_hand("--sample_at_first"),
    "user_prompt_library": by_hand("--sample_prompts"),
    "validation_prompt": by_hand("--sample_prompts"),
    "validation_steps": carried("sample_every_n_steps"),
    "validation_step_interval": carried("sample_every_n_steps"),
    "validation_epoch_interval": carried("sample_every_n_epochs"),
    **{f"validation_{name}": by_hand(PREVIEWS) for name in (
        "seed", "resolution", "guidance", "num_inference_steps", "negative_prompt")},
    **{f"validation_{name}": idle(PREVIEWS) for name in ("guidance_rescale", "torch_compile", "num_validation_images")},
    "compress_disk_cache": idle(BACKENDS), "vae_cache_scan_behaviour": idle(BACKENDS),
    "override_dataset_config": idle(BACKENDS), "dataloader_prefetch": idle(BACKENDS),
    "dataloader_prefetch_qlen": idle(BACKENDS), "data_backend_sampling": idle("each picture by its num_repeats"),
    "offload_during_startup": idle("parts leave the card as soon as they are done"),
}  # fmt: skip

BACKEND = {
    "id": idle("the name of a part"),
    "type": by_hand("local"),
    "dataset_type": by_hand("image, conditioning"),
    "disabled": by_hand("num_repeats"),
    "default": idle(BACKENDS),
    "instance_data_dir": carried("image_dir"),
    "caption_strategy": by_hand("caption_extension, class_tokens"),
    "instance_prompt": by_hand("class_tokens, caption_prefix"),
    "prepend_instance_prompt": by_hand("caption_prefix"),
    "only_instance_prompt": by_hand("class_tokens"),
    "repeats": by_hand("num_repeats", "one more: there, 0 is once"),
    "probability": lost("parts count by num_repeats here"),
    "resolution": by_hand("resolution"),
    "resolution_type": by_hand("resolution"),
    "crop": by_hand("enable_bucket"),
    "crop_aspect": by_hand("enable_bucket"),
    "crop_style": by_hand("random_crop"),
    "minimum_image_size": lost("small pictures are enlarged; see bucket_no_upscale"),
    "maximum_image_size": idle("pictures are made smaller in one step"),
    "target_downsample_size": idle("pictures are made smaller in one step"),
    "is_regularisation_data": carried("is_reg"),
    "is_regularization_data": carried("is_reg"),
    "conditioning_data": by_hand("conditioning_data_dir"),
    "conditioning_type": by_hand("masked_loss"),
    "conditioning": lost("conditioning pictures are not made here"),
    "cache_dir": idle(BACKENDS), "cache_dir_vae": idle(BACKENDS), "text_embeds": idle(BACKENDS),
    "image_embeds": idle(BACKENDS), "write_batch_size": idle(BACKENDS), "skip_file_discovery": idle(BACKENDS),
    "metadata_backend": idle(BACKENDS), "preserve_data_backend_cache": idle(BACKENDS),
    "vae_cache_clear_each_epoch": idle(BACKENDS), "ignore_epochs": idle(BACKENDS), "scan_for_errors": idle(BACKENDS),
    "hash_filenames": idle(BACKENDS),
}  # fmt: skip
TABLES = {"": OPTIONS, "(backend) ": BACKEND}


def plain(document: dict[str, Any]) -> dict[str, Any]:
    """The options without the dashes that may stand before them."""
    return {name.removeprefix("--"): value for name, value in document.items()}


def is_mine(document: Any) -> bool:
    """Whether a document is a configuration of this trainer."""
    return isinstance(document, dict) and "model_family" in plain(document)


def read(document: dict[str, Any], path: Path, dataset: Path | None) -> Draft:
    """The draft of a configuration. dataset: the file of data backends, where it is not the one that is named."""
    draft = Draft(path)
    values = plain(document)
    family = values.get("model_family")
    if not isinstance(family, str) or family not in MODELS:
        raise draft.wrong("model_family", f"{shown(family)} is not trained here; there are {', '.join(MODELS)}")
    draft.family, more = MODELS[family]
    draft.options |= more
    if str(values.get("model_flavour", "")).startswith("kontext"):
        draft.put("model_type", "kontext", "model_flavour")
    draft.carry(OPTIONS, values)
    _length(draft, values)
    _parts(draft, values)
    _adapter(draft, values)
    _optimizer(draft, values)
    _noise(draft, values)
    _records(draft, values)
    name = dataset or values.get("data_backend_config")
    if name is None:
        raise draft.wrong("data_backend_config", "is missing: the file of the data backends")
    beside = path.parent / Path(name).name
    backends = read_json(beside if not Path(name).is_file() and beside.is_file() else Path(name), "data_backend_config")
    _datasets(draft, backends, values)
    _previews(draft, values)
    return draft


def _length(draft: Draft, values: dict[str, Any]) -> None:
    if values.get("max_train_steps"):
        draft.put("max_train_steps", values["max_train_steps"], "max_train_steps")
    else:
        draft.put("max_train_epochs", values.get("num_train_epochs", 1), "num_train_epochs")
    schedule = values.get("lr_scheduler", "sine")
    if schedule not in SCHEDULES:
        draft.lose("lr_scheduler", f"{shown(schedule)} has no counterpart here; constant_with_warmup is used")
    elif schedule == "sine":
        draft.change("lr_scheduler", "sine, which rises again, is cosine here")
    draft.put("lr_scheduler", SCHEDULES.get(schedule, "constant_with_warmup"), "lr_scheduler")
    if schedule == "polynomial":
        draft.put("lr_scheduler_power", values.get("lr_power", 0.8), "lr_power")
    if schedule == "constant":
        draft.options.pop("lr_warmup_steps", None)


def _parts(draft: Draft, values: dict[str, Any]) -> None:
    if values.get("pretrained_transformer_model_name_or_path"):
        name = "pretrained_transformer_model_name_or_path"
        draft.put("pretrained_model_name_or_path", values[name], name)
    if values.get("pretrained_vae_model_name_or_path"):
        option = "ae" if draft.family in ("flux", "flux2", "lumina") else "vae"
        draft.put(option, values["pretrained_vae_model_name_or_path"], "pretrained_vae_model_name_or_path")
    if values.get("pretrained_t5_model_name_or_path"):
        draft.put("t5xxl", values["pretrained_t5_model_name_or_path"], "pretrained_t5_model_name_or_path")
    stored = str(values.get("base_model_precision", "no_change"))
    words = {"int8": ("base_quant", "int8"), "fp8": ("fp8_base_unet", True), "nf4": ("base_quant", "nf4"),
             "int4": ("base_quant", "nf4"), "int2": ("base_quant", "nf4")}  # fmt: skip
    found = next((row for start, row in words.items() if stored.startswith(start)), None)
    if found:
        draft.put(*found, "base_model_precision")
        draft.change("base_model_precision", f"{stored} of another package is --{found[0]} here")
    if values.get("gradient_checkpointing_interval") and draft.options.pop("gradient_checkpointing", False):
        share = round(1 - 1 / int(values["gradient_checkpointing_interval"]), 3)
        draft.put("activation_budget", str(share), "gradient_checkpointing_interval")


def _adapter(draft: Draft, values: dict[str, Any]) -> None:
    if values.get("model_type", "full") == "full":
        draft.method = "finetune"
        return
    rank = values.get("lora_rank", 16)
    alpha = values.get("lora_alpha") or rank
    kind, args = "lora", []
    if values.get("lora_type") == "lycoris":
        name = Path(values.get("lycoris_config", "config/lycoris_config.json"))
        beside = draft.path.parent / name.name
        settings = read_json(name if name.is_file() else beside, "lycoris_config")
        kind, rank = settings.get("algo", "lokr"), settings.get("linear_dim", 10000)
        alpha = settings.get("linear_alpha", 1)
        if "factor" in settings:
            args = [f"factor={settings['factor']}"]
        for key in settings.keys() - {"algo", "linear_dim", "linear_alpha", "factor", "multiplier"}:
            draft.lose(f"lycoris_config: {key}", "layers are chosen in --network_args; see docs/adapters.md")
    else:
        draft.put("network_dropout", values.get("lora_dropout", 0.1), "lora_dropout")
        if draft.family == "flux":
            draft.change("flux_lora_target", f"{values.get('flux_lora_target', 'all')}: all layers have adapters "
                         "here, see docs/flux.md for others")  # fmt: skip
    keys.network_of(draft, kind, "lora_type")
    draft.put("network_dim", rank, "lora_rank")
    draft.put("network_alpha", alpha, "lora_alpha")
    draft.put("network_train_unet_only", True, "(text encoders are not trained there)")
    if args:
        draft.put("network_args", args, "lycoris_config")


def _optimizer(draft: Draft, values: dict[str, Any]) -> None:
    settings = {}
    for item in str(values.get("optimizer_config") or "").split(","):
        name, equals, value = item.partition("=")
        if equals:
            settings[name.strip()] = keys.number_or_word(value.strip())
    betas = [values.get("optimizer_beta1"), values.get("optimizer_beta2")]
    if None not in betas:
        settings["betas"] = betas
    name = values.get("optimizer", "adamw_bf16")
    keys.put_optimizer(draft, name, settings, "optimizer")
    draft.put("max_grad_norm", values.get("max_grad_norm", 2.0), "max_grad_norm")
    if values.get("grad_clip_method", "value") == "value":
        draft.change("grad_clip_method", "gradients are cut by their norm here, not value by value")
    if name == "adamw_bf16" and draft.method == "finetune":
        draft.put("full_bf16", True, "optimizer")
    if keys.truth(values.get("use_ema", False)):
        draft.put("ema_decay", values.get("ema_decay", 0.995), "ema_decay")


def _noise(draft: Draft, values: dict[str, Any]) -> None:
    if draft.family in ("sd", "sdxl"):
        if values.get("prediction_type") == "v_prediction":
            draft.put("v_parameterization", True, "prediction_type")
        return
    shift = values.get("flow_schedule_shift", values.get("flux_schedule_shift", 3.0))
    keys.put_sampling(
        draft, "flow_schedule_shift", uniform=keys.truth(values.get("flow_use_uniform_schedule", False)),
        shift=float(shift), steepness=float(values.get("flow_sigmoid_scale", 1.0)),
        by_size=keys.truth(values.get("flow_schedule_auto_shift", values.get("flux_schedule_auto_shift", False))),
    )  # fmt: skip
    if draft.family in ("flux", "flux2"):
        draft.put("guidance_scale", values.get("flux_guidance_value", 1.0), "flux_guidance_value")
        if values.get("flux_guidance_mode", "constant") != "constant":
            draft.lose("flux_guidance_mode", "guidance is the same for all pictures")


def _records(draft: Draft, values: dict[str, Any]) -> None:
    draft.put("save_state", True, "checkpointing_steps")
    every, limit = draft.options.get("save_every_n_steps"), values.get("checkpoints_total_limit")
    if isinstance(every, int) and isinstance(limit, int) and limit > 0:
        draft.put("save_last_n_steps", every * (limit - 1), "checkpoints_total_limit")
    tracker = values.get("report_to", "wandb")
    if tracker in ("tensorboard", "wandb", "all"):
        draft.put("log_with", tracker, "report_to")
    elif tracker != "none":
        draft.lose("report_to", f"{shown(tracker)} has no counterpart here; see --log_with")
    if keys.truth(values.get("push_to_hub", False)):
        draft.lose("push_to_hub", "give --huggingface_repo_id USER/NAME")
    draft.put("cache_latents", True, "(always so there)")
    draft.put("cache_latents_to_disk", True, "(always so there)")
    draft.put("cache_text_encoder_outputs", True, "(always so there)")
    draft.put("cache_text_encoder_outputs_to_disk", True, "(always so there)")


def _datasets(draft: Draft, backends: Any, values: dict[str, Any]) -> None:
    items = keys.tables_at(draft, {"data_backend_config": backends}, "data_backend_config")
    folders = {item.get("id"): item for item in items}
    for item in items:
        kind = item.get("dataset_type", "image")
        if item.get("disabled") or kind in ("text_embeds", "image_embeds", "conditioning"):
            continue
        if item.get("type", "local") not in ("local", "parquet") or kind != "image":
            draft.lose(
                f"(backend) {item.get('id')}",
                "only folders of pictures on disk are converted; see docs/train_network.md",
            )
            continue
        draft.datasets.append(_dataset(draft, item, folders, values))
    if not draft.datasets:
        raise draft.wrong("data_backend_config", "holds no folder of pictures that can be converted")


def _dataset(
    draft: Draft, item: dict[str, Any], folders: dict[Any, dict[str, Any]], values: dict[str, Any]
) -> dict[str, Any]:
    subset = draft.carried_values(BACKEND, item, "(backend) ")
    subset |= _caption(draft, item) | {"num_repeats": int(item.get("repeats", 0)) + 1}
    subset["caption_dropout_rate"] = values.get("caption_dropout_probability") or 0.0
    if item.get("repeats"):
        draft.change("(backend) repeats", f"{item['repeats']} is num_repeats {subset['num_repeats']}: there, 0 is once")
    pair = folders.get(item.get("conditioning_data"))
    if pair is not None:
        subset["conditioning_data_dir"] = pair.get("instance_data_dir")
        masks = pair.get("conditioning_type") in ("mask", "segmentation")
        draft.put("masked_loss" if masks else "task", True if masks else "edit", "(backend) conditioning_data")
    side = item.get("resolution", values.get("resolution", 1024))
    kind = item.get("resolution_type", values.get("resolution_type", "pixel_area"))
    if kind == "area":  # megapixels
        side = round((float(side) * 1e6) ** 0.5 / 64) * 64
    elif kind == "pixel":
        draft.change(
            "(backend) resolution_type", "resolution is the side of a square of the same area, not the short side"
        )
    square = bool(item.get("crop")) and item.get("crop_aspect", "square") == "square"
    step = values.get("aspect_bucket_alignment", 64)
    table = {"resolution": int(side), "batch_size": values.get("train_batch_size", 4), "enable_bucket": not square}
    if not square:
        table |= {"bucket_reso_steps": step, "max_bucket_reso": keys.longest_side(int(side), 4.0),
                  "min_bucket_reso": min(256, int(side) // 2)}  # fmt: skip
    if item.get("crop") and item.get("crop_style", "random") == "random":
        draft.change("(backend) crop_style", "the middle is cut, since latents are cached")
    return {**table, "subsets": [subset]}


def _caption(draft: Draft, item: dict[str, Any]) -> dict[str, Any]:
    """What gives pictures their captions."""
    strategy, prompt = item.get("caption_strategy", "filename"), item.get("instance_prompt")
    if strategy == "instanceprompt" or item.get("only_instance_prompt"):
        return {"class_tokens": prompt, "caption_extension": ".none"}
    found = {"caption_extension": ".txt"}
    if strategy != "textfile":
        draft.lose("(backend) caption_strategy", f"{shown(strategy)}: captions are text files beside the pictures")
    if prompt and item.get("prepend_instance_prompt"):
        found["caption_prefix"] = f"{prompt} "
    return found


def _previews(draft: Draft, values: dict[str, Any]) -> None:
    prompts = [values["validation_prompt"]] if values.get("validation_prompt") else []
    name = values.get("user_prompt_library")
    if name:
        beside = draft.path.parent / Path(name).name
        library = read_json(Path(name) if Path(name).is_file() else beside, "user_prompt_library")
        prompts += library.values() if isinstance(library, dict) else []
    size = str(values.get("validation_resolution", 1024)).split(",")[0]
    width, _, height = size.partition("x")
    guidance = "g" if draft.family in ("flux", "flux2") else "l"
    tail = f"--w {width} --h {height or width} --d {values.get('validation_seed', 0)}"
    tail += (
        f" --s {values.get('validation_num_inference_steps', 30)} --{guidance} {values.get('validation_guidance', 7.5)}"
    )
    if values.get("validation_negative_prompt"):
        tail += f" --n {values['validation_negative_prompt']}"
    draft.prompts += [f"{prompt} {tail}" for prompt in prompts]
    if prompts:
        draft.put("sample_at_first", not keys.truth(values.get("disable_benchmark", False)), "disable_benchmark")
        if not {"sample_every_n_steps", "sample_every_n_epochs"} & draft.options.keys():
            draft.put("sample_every_n_steps", 100, "validation_steps (its default)")
