# SPDX-License-Identifier: Apache-2.0
"""Commands of huggingface/diffusers' examples: train_dreambooth_lora_*.py and train_text_to_image_lora*.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.values import shown
from tools.other_trainers import keys
from tools.other_trainers.keys import Draft, by_hand, carried, idle, lost

TITLE = "diffusers' examples"
FILE = "a file with the command"

# script -> family, further options
SCRIPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "train_dreambooth_lora": ("sd", {}),
    "train_dreambooth_lora_sdxl": ("sdxl", {}),
    "train_dreambooth_lora_sd3": ("sd3", {}),
    "train_dreambooth_lora_flux": ("flux", {}),
    "train_dreambooth_lora_flux_kontext": ("flux", {"model_type": "kontext"}),
    "train_dreambooth_lora_flux2": ("flux2", {}),
    "train_dreambooth_lora_flux2_klein": ("flux2", {}),
    "train_dreambooth_lora_lumina2": ("lumina", {}),
    "train_dreambooth_lora_sana": ("sana", {}),
    "train_text_to_image_lora": ("sd", {}),
    "train_text_to_image_lora_sdxl": ("sdxl", {}),
}
LOADED = "data sets of the hub are not loaded: save it as a folder or parquet file, see docs/train_network.md"
SINGLE = "of one program's loader"

ARGUMENTS = {
    "pretrained_model_name_or_path": carried("pretrained_model_name_or_path"),
    "pretrained_vae_model_name_or_path": carried("vae"),
    "revision": lost("the newest of a hub id is taken; download another one"),
    "variant": idle("found by the names of the files"),
    "dataset_name": lost(LOADED),
    "dataset_config_name": lost(LOADED),
    "cache_dir": idle("see the HF_HOME variable"),
    "image_column": lost(LOADED),
    "caption_column": lost(LOADED),
    "instance_data_dir": by_hand("image_dir"),
    "train_data_dir": by_hand("image_dir and its metadata.jsonl"),
    "class_data_dir": by_hand("image_dir of a subset with is_reg"),
    "instance_prompt": by_hand("class_tokens"),
    "class_prompt": by_hand("class_tokens of the subset with is_reg"),
    "num_class_images": lost("pictures of the class are not made here: put them into the folder first"),
    "with_prior_preservation": by_hand("a subset with is_reg"),
    "prior_loss_weight": carried("prior_loss_weight"),
    "repeats": by_hand("num_repeats"),
    "max_sequence_length": by_hand("the option of the text encoder's length"),
    "complex_human_instruction": carried("complex_human_instruction"),
    "validation_prompt": by_hand("--sample_prompts"),
    "num_validation_images": by_hand("--sample_prompts"),
    "validation_epochs": by_hand("--sample_every_n_epochs"),
    "validation_images": lost("see --ref in --sample_prompts"),
    "rank": carried("network_dim", 4),
    "lora_alpha": by_hand("--network_alpha"),
    "lora_dropout": carried("network_dropout"),
    "lora_layers": lost("layers are chosen in --network_args; see the architecture's page"),
    "lora_blocks": lost("layers are chosen in --network_args; see the architecture's page"),
    "use_dora": by_hand("--network_args"),
    "output_dir": carried("output_dir"),
    "output_kohya_format": idle("that is --lora_format kohya, which most models have by default"),
    "seed": carried("seed"),
    "resolution": by_hand("resolution"),
    "center_crop": by_hand("random_crop"),
    "random_flip": by_hand("flip_aug"),
    "image_interpolation_mode": lost("see resize_interpolation"),
    "train_text_encoder": by_hand("--network_train_unet_only"),
    "train_batch_size": by_hand("batch_size"),
    "sample_batch_size": idle("pictures of the class are not made here"),
    "num_train_epochs": by_hand("--max_train_epochs"),
    "max_train_steps": carried("max_train_steps"),
    "max_train_samples": lost("all pictures are used"),
    "checkpointing_steps": by_hand("--save_every_n_steps, --save_state"),
    "checkpoints_total_limit": by_hand("--save_last_n_steps"),
    "resume_from_checkpoint": lost("states of other programs cannot be continued; ours: --resume latest"),
    "gradient_accumulation_steps": carried("gradient_accumulation_steps", 1),
    "gradient_checkpointing": carried("gradient_checkpointing"),
    "learning_rate": by_hand("--learning_rate"),
    "text_encoder_lr": by_hand("--text_encoder_lr"),
    "scale_lr": lost("rates are not multiplied: give the product as --learning_rate"),
    "lr_scheduler": carried("lr_scheduler", "constant"),
    "lr_warmup_steps": by_hand("--lr_warmup_steps"),
    "lr_num_cycles": carried("lr_scheduler_num_cycles"),
    "lr_power": carried("lr_scheduler_power"),
    "dataloader_num_workers": carried("max_data_loader_n_workers", 0),
    "guidance_scale": carried("guidance_scale"),
    "weighting_scheme": carried("weighting_scheme"),
    "logit_mean": carried("logit_mean"),
    "logit_std": carried("logit_std"),
    "mode_scale": carried("mode_scale"),
    "precondition_outputs": lost("no counterpart"),
    "snr_gamma": carried("min_snr_gamma"),
    "noise_offset": carried("noise_offset"),
    "prediction_type": by_hand("--v_parameterization"),
    "do_edm_style_training": lost("no counterpart"),
    "optimizer": by_hand("--optimizer_type"),
    "use_8bit_adam": by_hand("--optimizer_type AdamW8bit"),
    **{name: by_hand("--optimizer_args") for name in (
        "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "prodigy_beta3", "prodigy_decouple",
        "prodigy_use_bias_correction", "prodigy_safeguard_warmup")},
    "adam_weight_decay_text_encoder": lost("all weights have the same decay"),
    "max_grad_norm": carried("max_grad_norm", 1.0),
    "push_to_hub": by_hand("--huggingface_repo_id"),
    "hub_model_id": by_hand("--huggingface_repo_id"),
    "hub_token": lost("a secret stays out of files: see `hf auth login`"),
    "logging_dir": carried("logging_dir", "logs"),
    "report_to": by_hand("--log_with"),
    "allow_tf32": idle("a matter of speed"),
    "cache_latents": by_hand("--cache_latents"),
    "mixed_precision": carried("mixed_precision"),
    "prior_generation_precision": idle("pictures of the class are not made here"),
    "upcast_before_saving": by_hand("--save_precision float"),
    "offload": idle("parts leave the card as soon as they are done"),
    "local_rank": idle("accelerate's"),
    "tokenizer_name": idle(SINGLE),
    "tokenizer_max_length": by_hand("--max_token_length"),
    "text_encoder_use_attention_mask": idle(SINGLE),
    "pre_compute_text_embeddings": carried("cache_text_encoder_outputs"),
    "validation_scheduler": idle("see --sample_sampler"),
    "class_labels_conditioning": lost("no counterpart"),
    "enable_xformers_memory_efficient_attention": idle("torch's own attention is used"),
    "enable_npu_flash_attention": idle("torch's own attention is used"),
    "enable_vae_tiling": idle("see --vram_budget"),
    "enable_vae_slicing": idle("see --vram_budget"),
    "do_fp8_training": by_hand("--fp8_base_unet"),
    "aspect_ratio_buckets": lost("see enable_bucket: buckets follow the pictures' own shapes"),
    "system_prompt": carried("system_prompt"),
    "cond_image_column": lost(LOADED),
    "clip_skip": lost("its count begins at 0; see --clip_skip"),
    "debug_loss": idle("losses are logged"),
    "skip_final_inference": idle("previews are asked for by --sample_prompts"),
    "final_validation_prompt": lost("see --sample_prompts"),
    "remote_text_encoder": lost("captions are encoded here"),
    "bnb_quantization_config_path": lost("see --base_quant nf4"),
    "fsdp_text_encoder": idle("see --shard_base"),
    "no_center_crop": idle("the middle is cut by default"),
}  # fmt: skip
TABLES = {"": ARGUMENTS}
LENGTHS = {"flux": "t5xxl", "sd3": "t5xxl", "sana": "gemma2", "lumina": "gemma2", "flux2": "text_encoder"}


def is_mine(script: str) -> bool:
    """Whether a script is one of these examples."""
    return script.startswith(("train_dreambooth_lora", "train_text_to_image_lora"))


def read(values: dict[str, Any], path: Path, dataset: Path | None, script: str) -> Draft:
    """The draft of a command. values: its options; script: its name without the ending; dataset: not used."""
    draft = Draft(path)
    if script not in SCRIPTS:
        raise draft.wrong(f"{script}.py", f"trains no model that is trained here; there are {', '.join(SCRIPTS)}")
    draft.family, more = SCRIPTS[script]
    draft.options |= more
    plain = script.startswith("train_text_to_image")
    draft.carry(ARGUMENTS, values, "--")
    _length(draft, values, plain)
    _adapter(draft, values)
    _optimizer(draft, values, plain)
    _noise(draft, values, script)
    _saves(draft, values)
    _dataset(draft, values, plain)
    _previews(draft, values, plain)
    return draft


def _length(draft: Draft, values: dict[str, Any], plain: bool) -> None:
    if "max_train_steps" not in values:
        draft.put("max_train_epochs", values.get("num_train_epochs", 100 if plain else 1), "--num_train_epochs")
    warmup = values.get("lr_warmup_steps", 500)
    if values.get("lr_scheduler", "constant") != "constant":
        draft.put("lr_warmup_steps", warmup, "--lr_warmup_steps")
    if values.get("max_sequence_length") is not None and draft.family in LENGTHS:
        name = f"{LENGTHS[draft.family]}_max_token_length"
        draft.put(name, values["max_sequence_length"], "--max_sequence_length")


def _adapter(draft: Draft, values: dict[str, Any]) -> None:
    keys.network_of(draft, "lora", "--rank")
    own = "lora_alpha" in values or draft.family == "sana"
    draft.put("network_alpha", values.get("lora_alpha", 4 if own else values.get("rank", 4)), "--lora_alpha")
    if not own and draft.options["network_dim"] != 4:
        draft.change("--lora_alpha", "left out, it is the rank; it is 4 in newer versions of some scripts")
    if not values.get("train_text_encoder"):
        draft.put("network_train_unet_only", True, "--train_text_encoder")
    elif values.get("text_encoder_lr", 5e-6):
        draft.put("text_encoder_lr", [values.get("text_encoder_lr", 5e-6)], "--text_encoder_lr")
    if values.get("use_dora"):
        draft.lose("--use_dora", "see docs/adapters.md for DoRA")
    if values.get("do_fp8_training"):
        draft.put("fp8_base_unet", True, "--do_fp8_training")
        draft.change("--do_fp8_training", "the frozen weights are kept in 8 bits; products are computed in 16")
    draft.put("lora_format", "peft" if draft.family == "sana" else "kohya", "(file format)")


def _optimizer(draft: Draft, values: dict[str, Any], plain: bool) -> None:
    rate = 5e-4 if draft.family == "sd" and not plain else 1e-4
    draft.put("learning_rate", values.get("learning_rate", rate), "--learning_rate")
    decay = values.get("adam_weight_decay", 1e-2 if plain or draft.family == "sd" else 1e-4)
    settings: dict[str, Any] = {
        "betas": [float(values.get("adam_beta1", 0.9)), float(values.get("adam_beta2", 0.999))],
        "weight_decay": float(decay), "eps": float(values.get("adam_epsilon", 1e-8)),
    }  # fmt: skip
    name = str(values.get("optimizer", "AdamW")).lower()
    if name == "prodigy":
        settings |= {
            "decouple": keys.truth(values.get("prodigy_decouple", True)),
            "use_bias_correction": keys.truth(values.get("prodigy_use_bias_correction", True)),
            "safeguard_warmup": keys.truth(values.get("prodigy_safeguard_warmup", True)),
        }
    elif values.get("use_8bit_adam"):
        name = "adamw8bit"
    keys.put_optimizer(draft, name, settings, "--optimizer")


def _noise(draft: Draft, values: dict[str, Any], script: str) -> None:
    if draft.family in ("sd", "sdxl"):
        if values.get("prediction_type") == "v_prediction":
            draft.put("v_parameterization", True, "--prediction_type")
        return
    default = "logit_normal" if draft.family == "sd3" else "none"
    draft.options.setdefault("weighting_scheme", default)
    if draft.family == "sd3":
        draft.put("training_shift", 3.0, "(the scheduler's)")
        return
    shifts = {"sana": 3.0, "flux": 3.0, "flux2": 3.0, "lumina": 6.0}
    draft.put("timestep_sampling", "sigma", "(sigmas of the scheduler)")
    draft.put("discrete_flow_shift", shifts[draft.family], "(the scheduler's)")
    draft.change("--weighting_scheme", f"sigmas are shifted by {shifts[draft.family]}, the published scheduler's value")
    weighs = draft.options["weighting_scheme"] in ("sigma_sqrt", "cosmap")
    draft.put("model_prediction_type", "sigma_scaled" if weighs else "raw", "--weighting_scheme")
    if draft.family in ("flux", "flux2") and "guidance_scale" not in values:
        draft.put("guidance_scale", 3.5, "--guidance_scale")


def _saves(draft: Draft, values: dict[str, Any]) -> None:
    every = values.get("checkpointing_steps", 500)
    draft.put("save_every_n_steps", every, "--checkpointing_steps")
    draft.put("save_state", True, "--checkpointing_steps")
    if values.get("checkpoints_total_limit"):
        kept = int(every) * (int(values["checkpoints_total_limit"]) - 1)
        draft.put("save_last_n_steps", kept, "--checkpoints_total_limit")
    if values.get("report_to", "tensorboard") in ("tensorboard", "wandb", "all"):
        draft.put("log_with", values.get("report_to", "tensorboard"), "--report_to")
    else:
        draft.lose("--report_to", f"{shown(values['report_to'])} has no counterpart here; see --log_with")
    if values.get("push_to_hub") and values.get("hub_model_id"):
        draft.put("huggingface_repo_id", values["hub_model_id"], "--hub_model_id")
    elif values.get("push_to_hub"):
        draft.lose("--push_to_hub", "give --huggingface_repo_id USER/NAME")
    if values.get("upcast_before_saving"):
        draft.put("save_precision", "float", "--upcast_before_saving")
    if draft.family == "sana" or values.get("cache_latents"):
        draft.put("cache_latents", True, "--cache_latents")
    if draft.family not in ("sd", "sdxl") and not values.get("train_text_encoder"):
        draft.put("cache_text_encoder_outputs", True, "(always so there)")


def _dataset(draft: Draft, values: dict[str, Any], plain: bool) -> None:
    folder = values.get("train_data_dir" if plain else "instance_data_dir")
    if not folder:
        option = "--train_data_dir" if plain else "--instance_data_dir"
        raise draft.wrong(option, f"is missing; {LOADED}")
    subset: dict[str, Any] = {"image_dir": folder, "num_repeats": int(values.get("repeats", 1))}
    if plain:
        subset["metadata_file"] = f"{str(folder).rstrip('/')}/metadata.jsonl"
        draft.change(
            "--train_data_dir", "keys of metadata.jsonl are image_path and caption here, not file_name and text"
        )
    else:
        subset |= {"class_tokens": values.get("instance_prompt"), "caption_extension": ".none"}
    if values.get("random_flip"):
        subset["flip_aug"] = True
    if not values.get("center_crop") and not draft.options.get("cache_latents"):
        subset["random_crop"] = True
    elif not values.get("center_crop"):
        draft.change("--center_crop", "the middle is cut, since latents are cached")
    subsets = [{name: value for name, value in subset.items() if value is not None}]
    if values.get("with_prior_preservation"):
        subsets.append({"image_dir": values.get("class_data_dir"), "class_tokens": values.get("class_prompt"),
                        "caption_extension": ".none", "is_reg": True})  # fmt: skip
    size = values.get("resolution", 1024 if draft.family == "sdxl" else 512)
    batch = values.get("train_batch_size", 16 if plain else 4)
    draft.datasets.append({"resolution": size, "batch_size": batch, "enable_bucket": False, "subsets": subsets})


def _previews(draft: Draft, values: dict[str, Any], plain: bool) -> None:
    if not values.get("validation_prompt"):
        return
    for number in range(int(values.get("num_validation_images", 4))):
        draft.prompts.append(f"{values['validation_prompt']} --d {int(values.get('seed', 0)) + number}")
    draft.put("sample_every_n_epochs", values.get("validation_epochs", 1 if plain else 50), "--validation_epochs")
