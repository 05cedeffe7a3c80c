# SPDX-License-Identifier: Apache-2.0
"""Jobs of ostris/ai-toolkit: YAML or JSON files with `config.process`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.values import shown
from tools.other_trainers import keys
from tools.other_trainers.keys import Draft, by_hand, carried, idle, lost

TITLE = "ai-toolkit"
FILE = "a job's `.yaml` or `.json`"

# arch -> family, further options
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd", {}),
    "sd2": ("sd", {"v2": True}),
    "sd15": ("sd", {}),
    "sdxl": ("sdxl", {}),
    "sd3": ("sd3", {}),
    "flux": ("flux", {}),
    "flux_kontext": ("flux", {"model_type": "kontext", "task": "edit"}),
    "chroma": ("flux", {"model_type": "chroma"}),
    "lumina2": ("lumina", {}),
    "flux2": ("flux2", {}),
    "flux2_klein_4b": ("flux2", {}),
    "flux2_klein_9b": ("flux2", {}),
}
OLD = {"is_v2": "sd2", "is_v3": "sd3", "is_xl": "sdxl", "is_flux": "flux", "is_lumina2": "lumina2"}

PLACE = "a matter of the program alone"
PROCESS = {
    "type": by_hand("must be sd_trainer, or diffusion_trainer of the interface"),
    "training_folder": carried("output_dir", "output"),
    "performance_log_every": idle(PLACE),
    "device": idle("accelerate chooses the device"),
    "sqlite_db_path": idle(PLACE),
    "trigger_word": by_hand("caption_prefix", "it is put before each caption, also where [trigger] stands"),
    "network": by_hand("the table below; without it, all weights are trained"),
    "save": by_hand("the table below"),
    "datasets": by_hand("the table below"),
    "train": by_hand("the table below"),
    "model": by_hand("the table below"),
    "sample": by_hand("the table below"),
    "logging": by_hand("the table below"),
}
LOGGING = {
    "log_every": idle("every step is logged"),
    "use_ui_logger": idle(PLACE),
    "verbose": idle(PLACE),
    "use_wandb": by_hand("--log_with wandb"),
    "project_name": carried("log_tracker_name"),
    "run_name": carried("wandb_run_name"),
}
NETWORK = {
    "type": by_hand("--network_module"),
    "linear": carried("network_dim"),
    "rank": carried("network_dim"),
    "linear_alpha": by_hand("--network_alpha"),
    "alpha": by_hand("--network_alpha"),
    "conv": by_hand("--network_args conv_dim="),
    "conv_alpha": by_hand("--network_args conv_alpha="),
    "dropout": carried("network_dropout"),
    "lokr_full_rank": by_hand("--network_dim"),
    "lokr_factor": by_hand("--network_args factor="),
    "transformer_only": idle("adapters are on the model's blocks; see the architecture's page"),
    "network_kwargs": lost("layers are chosen in --network_args; see the architecture's page"),
}
SAVE = {
    "dtype": carried("save_precision", "fp16", keys.save_precision),
    "save_every": carried("save_every_n_steps", 1000),
    "max_step_saves_to_keep": by_hand("--save_last_n_steps"),
    "save_format": lost("the file's names are chosen by --lora_format"),
    "push_to_hub": by_hand("--huggingface_repo_id"),
    "hf_repo_id": by_hand("--huggingface_repo_id"),
    "hf_private": by_hand("--huggingface_repo_visibility"),
}
DATASET = {
    "folder_path": carried("image_dir"),
    "dataset_path": carried("image_dir"),
    "caption_ext": carried("caption_extension", ".txt", keys.dotted),
    "default_caption": carried("class_tokens"),
    "caption_dropout_rate": carried("caption_dropout_rate"),
    "token_dropout_rate": carried("caption_tag_dropout_rate"),
    "shuffle_tokens": carried("shuffle_caption"),
    "keep_tokens": carried("keep_tokens"),
    "cache_latents": by_hand("--cache_latents"),
    "cache_latents_to_disk": by_hand("--cache_latents_to_disk"),
    "cache_text_embeddings": by_hand("--cache_text_encoder_outputs"),
    "resolution": by_hand("resolution; one dataset for each"),
    "buckets": by_hand("enable_bucket"),
    "bucket_tolerance": by_hand("bucket_reso_steps"),
    "num_repeats": carried("num_repeats", 1),
    "is_reg": carried("is_reg"),
    "flip_x": carried("flip_aug"),
    "flip_y": lost("pictures are mirrored to the side alone"),
    "random_crop": carried("random_crop"),
    "random_scale": lost("no counterpart"),
    "square_crop": lost("leave enable_bucket out for squares"),
    "alpha_mask": carried("alpha_mask"),
    "mask_path": carried("conditioning_data_dir"),
    "mask_min_value": lost("black does not train here; see --masked_prior_weight"),
    "invert_mask": lost("white trains here; invert the files"),
    "control_path": by_hand("conditioning_data_dir, conditioning_data_dirs"),
    "control_path_1": by_hand("conditioning_data_dirs"),
    "control_path_2": by_hand("conditioning_data_dirs"),
    "control_path_3": by_hand("conditioning_data_dirs"),
    "network_weight": carried("network_multiplier"),
    "loss_multiplier": lost("datasets count by num_repeats here"),
    "trigger_word": carried("caption_prefix", changed=PROCESS["trigger_word"].changed),
    "num_workers": idle("the number of processes is chosen"),
    "num_frames": idle("there are no videos here"),
    "shrink_video_to_frames": idle("there are no videos here"),
    "do_i2v": idle("there are no videos here"),
    "fps": idle("there are no videos here"),
}
TRAIN = {
    "batch_size": by_hand("batch_size"),
    "steps": carried("max_train_steps", 1000),
    "gradient_accumulation_steps": carried("gradient_accumulation_steps"),
    "gradient_accumulation": carried("gradient_accumulation_steps"),
    "train_unet": by_hand("--network_train_text_encoder_only"),
    "train_text_encoder": by_hand("--network_train_unet_only"),
    "gradient_checkpointing": carried("gradient_checkpointing", True),
    "noise_scheduler": idle("the architecture has its own"),
    "optimizer": by_hand("--optimizer_type"),
    "optimizer_params": by_hand("--optimizer_args"),
    "lr": carried("learning_rate", 1e-6, float),
    "unet_lr": carried("unet_lr", convert=float),
    "text_encoder_lr": by_hand("--text_encoder_lr"),
    "lr_scheduler": carried("lr_scheduler"),
    "lr_scheduler_params": by_hand("--lr_warmup_steps, --lr_scheduler_num_cycles"),
    "max_grad_norm": carried("max_grad_norm", 1.0),
    "timestep_type": by_hand("--timestep_sampling"),
    "linear_timesteps": lost("no weights by the noise level of this kind; see --weighting_scheme"),
    "linear_timesteps2": lost("no weights by the noise level of this kind; see --weighting_scheme"),
    "content_or_style": by_hand("--min_timestep, --max_timestep"),
    "min_denoising_steps": carried("min_timestep"),
    "max_denoising_steps": carried("max_timestep"),
    "ema_config": by_hand("--ema_decay"),
    "dtype": carried("mixed_precision", "no", keys.PRECISIONS),
    "min_snr_gamma": carried("min_snr_gamma"),
    "noise_offset": carried("noise_offset"),
    "reg_weight": carried("prior_loss_weight", 1.0),
    "loss_type": by_hand("--loss_type"),
    "skip_first_sample": by_hand("--sample_at_first"),
    "force_first_sample": idle(PLACE),
    "disable_sampling": by_hand("--sample_prompts"),
    "xformers": idle("torch's own attention is used"),
    "sdp": idle("torch's own attention is used"),
    "unload_text_encoder": carried("cache_text_encoder_outputs"),
    "cache_text_embeddings": carried("cache_text_encoder_outputs"),
    "bypass_guidance_embedding": by_hand("--guidance_scale"),
    "diff_output_preservation": lost("no counterpart; see --masked_prior_weight and regularisation pictures"),
    "diff_output_preservation_multiplier": idle("of diff_output_preservation"),
    "diff_output_preservation_class": idle("of diff_output_preservation"),
    "blank_prompt_preservation": lost("no counterpart; see regularisation pictures"),
    "blank_prompt_preservation_multiplier": idle("of blank_prompt_preservation"),
    "switch_boundary_every": idle("for models in two stages"),
    "inverted_mask_prior": by_hand("--masked_prior_weight"),
    "inverted_mask_prior_multiplier": by_hand("--masked_prior_weight"),
    "prompt_dropout_prob": by_hand("caption_dropout_rate"),
}
MODEL = {
    "name_or_path": carried("pretrained_model_name_or_path"),
    "arch": by_hand("the script"),
    **{name: by_hand("the script") for name in OLD},
    "is_v_pred": carried("v_parameterization"),
    "vae_path": by_hand("--vae, or --ae"),
    "te_name_or_path": lost("text encoders have options by name; see the architecture's page"),
    "extras_name_or_path": idle("parts come from the model, or from options of their own"),
    "dtype": idle("of the frozen model, which has that of --mixed_precision"),
    "quantize": by_hand("--fp8_base_unet"),
    "quantize_te": by_hand("--fp8_base"),
    "qtype": by_hand("--fp8_base_unet, --base_quant"),
    "qtype_te": by_hand("--fp8_base"),
    "low_vram": idle("see --vram_budget"),
    "compile": carried("compile"),
    "attn_masking": carried("apply_t5_attn_mask"),
    "lora_path": by_hand("--base_weights"),
    "assistant_lora_path": lost("no adapter is taken off for previews; merge it with networks/merge_lora.py"),
    "inference_lora_path": lost("previews have no adapter of their own"),
    "layer_offloading": lost("see --blocks_to_swap auto"),
    "layer_offloading_text_encoder_percent": idle("of layer_offloading"),
    "layer_offloading_transformer_percent": idle("of layer_offloading"),
    "model_kwargs": idle("of single models"),
}
SAMPLE = {
    "sampler": idle("see --sample_sampler"),
    "sample_every": carried("sample_every_n_steps", 100),
    "prompts": by_hand("--sample_prompts"),
    "samples": by_hand("--sample_prompts"),
    **{name: by_hand("a prompt's own option") for name in (
        "width", "height", "neg", "seed", "walk_seed", "guidance_scale", "sample_steps")},
    "sample_start_step": idle(PLACE),
    "format": idle("previews are png"),
    "num_frames": idle("there are no videos here"),
    "fps": idle("there are no videos here"),
}  # fmt: skip
TABLES = {
    "": PROCESS, "model.": MODEL, "network.": NETWORK, "train.": TRAIN, "datasets.": DATASET, "save.": SAVE,
    "sample.": SAMPLE, "logging.": LOGGING,
}  # fmt: skip


def is_mine(document: Any) -> bool:
    """Whether a document is a job of this trainer."""
    return isinstance(document, dict) and isinstance(document.get("config"), dict) and "process" in document["config"]


def read(document: dict[str, Any], path: Path, dataset: Path | None) -> Draft:
    """The draft of a job. dataset: not used, a job holds its own."""
    draft = Draft(path)
    config = document["config"]
    process, *more = keys.tables_at(draft, config, "process")
    if more:
        draft.lose("config.process", f"only the first of {1 + len(more)} processes is converted")
    if process.get("type") not in ("sd_trainer", "diffusion_trainer", "ui_trainer"):
        raise draft.wrong("process.type", f"{shown(process.get('type'))} is not a training of a model or adapter")
    model = keys.table_at(draft, process, "model", needed=True)
    _architecture(draft, model)
    draft.put("output_name", str(config.get("name", "last")), "config.name")
    draft.carry(PROCESS, process)
    train = keys.table_at(draft, process, "train", needed=True)
    _model(draft, model, train)
    _network(draft, keys.table_at(draft, process, "network"))
    _train(draft, train)
    _save(draft, keys.table_at(draft, process, "save"))
    for item in keys.tables_at(draft, process, "datasets"):
        _dataset(draft, item, process, train)
    _previews(draft, keys.table_at(draft, process, "sample"), process, train)
    logging = keys.table_at(draft, process, "logging")
    if logging.get("use_wandb"):
        draft.carry(LOGGING, logging, "logging.")
        draft.put("log_with", "wandb", "logging.use_wandb")
    return draft


def _architecture(draft: Draft, model: dict[str, Any]) -> None:
    arch = model.get("arch") or next((name for key, name in OLD.items() if model.get(key)), "sd1")
    name = str(arch).partition(":")[0]
    if name not in MODELS:
        raise draft.wrong("model.arch", f"{shown(arch)} is not trained here; there are {', '.join(MODELS)}")
    draft.family, more = MODELS[name]
    for option, value in more.items():
        draft.put(option, value, "model.arch")


def _model(draft: Draft, model: dict[str, Any], train: dict[str, Any]) -> None:
    draft.carry(MODEL, model, "model.")
    if model.get("vae_path"):
        option = "ae" if draft.family in ("flux", "flux2", "lumina") else "vae"
        draft.put(option, model["vae_path"], "model.vae_path")
    if model.get("quantize"):
        stored = str(model.get("qtype", "qfloat8")).partition("|")[0]
        four = stored in ("uint4", "qint4", "int4", "uint3", "uint2")
        option, value = (
            ("base_quant", "nf4") if four else ("base_quant", "int8") if "int8" in stored else ("fp8_base_unet", True)
        )
        draft.put(option, value, "model.qtype")
        draft.change("model.qtype", f"{stored} of another package is --{option} here")
    if model.get("lora_path"):
        draft.put("base_weights", [model["lora_path"]], "model.lora_path")
    if draft.family == "flux":
        guidance = 1.0
        draft.put("guidance_scale", guidance, "(its value)")
    if draft.family not in ("sd", "sdxl"):
        _noise(draft, train)


def _noise(draft: Draft, train: dict[str, Any]) -> None:
    kind = train.get("timestep_type", "sigmoid")
    if kind == "shift":
        keys.put_sampling(draft, "train.timestep_type", by_size=True)
        return
    if kind not in ("sigmoid", "linear"):
        draft.lose("train.timestep_type", f"{shown(kind)} weighs the noise levels in its own way; sigmoid is used")
    keys.put_sampling(draft, "train.timestep_type", uniform=kind == "linear")


def _network(draft: Draft, network: dict[str, Any]) -> None:
    if not network:
        draft.method = "finetune"
        return
    draft.carry(NETWORK, network, "network.")
    kind = str(network.get("type", "lora")).lower()
    keys.network_of(draft, "lora" if kind in ("locon", "lora") else kind, "network.type")
    alpha = network.get("linear_alpha", network.get("alpha", 1.0))
    draft.put("network_alpha", alpha, "network.linear_alpha")
    args = []
    if network.get("conv") and draft.family in ("sd", "sdxl"):
        args += [f"conv_dim={network['conv']}", f"conv_alpha={network.get('conv_alpha', network['conv'])}"]
    elif network.get("conv"):
        draft.lose("network.conv", "this architecture has no convolutions with adapters")
    if kind == "lokr":
        args.append(f"factor={network.get('lokr_factor', -1)}")
        if network.get("lokr_full_rank"):
            draft.put("network_dim", 100_000, "network.lokr_full_rank")
            draft.put("network_alpha", 100_000, "network.lokr_full_rank")
    if args:
        draft.put("network_args", args, "network.conv")


def _train(draft: Draft, train: dict[str, Any]) -> None:
    draft.carry(TRAIN, train, "train.")
    if draft.method == "network":
        draft.put("network_train_unet_only", not train.get("train_text_encoder", False), "train.train_text_encoder")
        if train.get("train_text_encoder") and train.get("text_encoder_lr") is not None:
            draft.put("text_encoder_lr", [float(train["text_encoder_lr"])], "train.text_encoder_lr")
    settings = keys.table_at(draft, train, "optimizer_params")
    keys.put_optimizer(draft, train.get("optimizer", "adamw"), settings, "train.optimizer")
    ema = keys.table_at(draft, train, "ema_config")
    if ema.get("use_ema"):
        draft.put("ema_decay", ema.get("ema_decay", 0.999), "train.ema_config")
    losses = {"mse": "l2", "mae": "l1"}
    kind = train.get("loss_type", "mse")
    if kind in losses:
        draft.put("loss_type", losses[kind], "train.loss_type")
    else:
        draft.lose("train.loss_type", f"{shown(kind)} has no counterpart here")
    if train.get("content_or_style", "balanced") != "balanced":
        draft.lose("train.content_or_style", "no counterpart; see --min_timestep, --max_timestep, --weighting_scheme")
    if train.get("inverted_mask_prior"):
        weight = train.get("inverted_mask_prior_multiplier", 0.5)
        draft.put("masked_prior_weight", weight, "train.inverted_mask_prior_multiplier")
    if train.get("max_denoising_steps") == 999:  # the last one, which is 1000, itself excluded, here
        draft.options.pop("max_timestep", None)


def _save(draft: Draft, save: dict[str, Any]) -> None:
    draft.carry(SAVE, save, "save.")
    every = draft.options.get("save_every_n_steps")
    kept = save.get("max_step_saves_to_keep", 5)
    if isinstance(every, int) and isinstance(kept, int) and kept > 0:
        draft.put("save_last_n_steps", every * (kept - 1), "save.max_step_saves_to_keep")
    if save.get("push_to_hub"):
        draft.put("huggingface_repo_id", save.get("hf_repo_id"), "save.hf_repo_id")
        visible = "private" if save.get("hf_private") else "public"
        draft.put("huggingface_repo_visibility", visible, "save.hf_private")


def _dataset(draft: Draft, item: dict[str, Any], process: dict[str, Any], train: dict[str, Any]) -> None:
    subset = draft.carried_values(DATASET, item, "datasets.")
    word = process.get("trigger_word")
    if word and "caption_prefix" not in subset:
        subset["caption_prefix"] = f"{word} "
        draft.change("trigger_word", PROCESS["trigger_word"].changed)
    if train.get("prompt_dropout_prob"):
        subset.setdefault("caption_dropout_rate", train["prompt_dropout_prob"])
    _references(draft, item, subset)
    if item.get("mask_path") or item.get("alpha_mask"):
        draft.put("masked_loss", True, "datasets.mask_path")
    for key in ("cache_latents", "cache_latents_to_disk"):
        if item.get(key):
            draft.put(key, True, f"datasets.{key}")
    if item.get("cache_text_embeddings"):
        draft.put("cache_text_encoder_outputs", True, "datasets.cache_text_embeddings")
    step = item.get("bucket_tolerance", 64)
    for side in keys.numbers(draft, item.get("resolution", 512), "datasets.resolution"):
        table: dict[str, Any] = {"resolution": side, "batch_size": train.get("batch_size", 1)}
        if item.get("buckets", True):
            table |= {
                "enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": step,
                "min_bucket_reso": min(256, side // 2), "max_bucket_reso": keys.longest_side(side, 4.0, step),
            }  # fmt: skip
        draft.datasets.append({**table, "subsets": [dict(subset)]})


def _references(draft: Draft, item: dict[str, Any], subset: dict[str, Any]) -> None:
    paths = item.get("control_path") or [item[f"control_path_{n}"] for n in (1, 2, 3) if item.get(f"control_path_{n}")]
    folders = paths if isinstance(paths, list) else [paths]
    if not folders:
        return
    draft.put("task", "edit", "datasets.control_path")
    if len(folders) == 1:
        subset["conditioning_data_dir"] = folders[0]
    else:
        subset["conditioning_data_dirs"] = folders


def _previews(draft: Draft, sample: dict[str, Any], process: dict[str, Any], train: dict[str, Any]) -> None:
    items = sample.get("samples") or [{"prompt": text} for text in sample.get("prompts") or ()]
    if not items or train.get("disable_sampling"):
        return
    draft.carry(SAMPLE, sample, "sample.")
    draft.put("sample_at_first", not train.get("skip_first_sample", False), "train.skip_first_sample")
    for number, item in enumerate(items):
        guidance = "g" if draft.family in ("flux", "flux2") else "l"
        draft.prompts.append(_prompt(sample | item, str(process.get("trigger_word") or ""), number, guidance))


def _prompt(values: dict[str, Any], word: str, number: int, guidance: str) -> str:
    """A line of a file of prompts. guidance: the inline option of the guidance scale."""
    text, *flags = str(values.get("prompt", "")).replace("[trigger]", word).split(" --")
    seed = values.get("seed", 0) + (number if values.get("walk_seed") else 0)
    words = [text.strip(), f"--w {values.get('width', 512)} --h {values.get('height', 512)} --d {seed}"]
    words.append(f"--s {values.get('sample_steps', 20)} --{guidance} {values.get('guidance_scale', 7)}")
    pictures = [flag.split(" ", 1)[1].strip() for flag in flags if flag.startswith("ctrl_img") and " " in flag]
    pictures += [values[key] for key in ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3") if values.get(key)]
    words += [f"--ref {picture}" for picture in pictures]
    if values.get("neg"):
        words.append(f"--n {values['neg']}")
    return " ".join(words)
