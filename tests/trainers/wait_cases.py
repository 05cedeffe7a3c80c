# SPDX-License-Identifier: Apache-2.0
"""Tiny runs of every family and of the options that touch a step, to count in how many steps the host waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.trainers.trainer import Trainer
from tests.families import CASES
from tests.trainers.helpers import Recorded, make_pictures, make_trainer, settle, subset, write_dataset

# The options with which a pass depends on how long each caption is. Chroma and Lumina have none: it always does.
MASKED: dict[str, dict[str, Any]] = {
    "sd1": {"no_token_padding": True},
    "sd2 v": {"no_token_padding": True, "max_token_length": 150},
    "sdxl": {"weighted_captions": True},
    "flux": {"apply_t5_attn_mask": True},
    "sd3": {"apply_t5_attn_mask": True, "apply_lg_attn_mask": True},
    "sd35": {"apply_t5_attn_mask": True},
}
COMMON: dict[str, Any] = {
    "output_name": "x", "seed": 7, "max_train_steps": 2, "max_data_loader_n_workers": 0, "learning_rate": 1e-3,
}  # fmt: skip
METHOD_VALUES: dict[str, dict[str, Any]] = {
    "network": {"network_dim": 4, "network_alpha": 2},
    "finetune": {"save_model_as": "safetensors"},
    "dreambooth": {"save_model_as": "safetensors"},
    "textual_inversion": {"token_string": "zapcat", "use_object_template": True, "save_model_as": "safetensors"},
    "lllite": {"network_dim": 4, "cond_emb_dim": 8},
}


@dataclass(frozen=True)
class WaitCase:
    """One run. `values` are options, many of them together where they have nothing to do with each other."""

    model: str  # of CASES
    values: dict[str, Any] = field(default_factory=dict)
    method: str = "network"
    data: str = "plain"  # of `Ground.data`
    deep: bool = False  # a model with enough blocks to swap some


def network(kind: str, *arguments: str, model: str = "sd1", **values: Any) -> WaitCase:
    return WaitCase(model, {"network_module": f"networks.{kind}", "network_args": [*arguments], **values})


BF16 = {"mixed_precision": "bf16", "full_bf16": True}
RUNS: dict[str, WaitCase] = {
    "everything of a LoRA": WaitCase(
        "sd1",
        {
            "gradient_checkpointing": True, "network_dropout": 0.1, "scale_weight_norms": 1.0, "ema_decay": 0.9,
            "network_args": ["rank_dropout=0.1", "module_dropout=0.1", "ggpo_sigma=0.03", "ggpo_beta=0.01"],
            "gradient_accumulation_steps": 2, "weighted_captions": True, "max_token_length": 150, "clip_skip": 2,
            "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        },
    ),
    "losses of SD 1": WaitCase(
        "sd1",
        {
            "loss_type": "huber", "min_snr_gamma": 5.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.1,
            "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.1,
            "ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True, "masked_loss": True,
            "masked_loss_normalize": True, "masked_prior_weight": 1.0,
        },
        data="controlled",
    ),
    "losses of SD 2": WaitCase(
        "sd2 v",
        {
            "loss_type": "smooth_l1", "huber_schedule": "exponential", "scale_v_pred_loss_like_noise_pred": True,
            "zero_terminal_snr": True, "multires_noise_iterations": 3,
        },
        data="kept",
    ),
    "prior preservation": WaitCase("sdxl", {"prior_loss_weight": 0.5, "multires_noise_iterations": 3}, data="kept"),
    "losses of FLUX": WaitCase(
        "flux",
        {
            "loss_type": "huber", "weighting_scheme": "sigma_sqrt",
            "huber_schedule": "constant", "model_prediction_type": "sigma_scaled", "ip_noise_gamma": 0.1,
            "masked_loss": True,
        },
        data="controlled",
    ),
    "draws of SD 3": WaitCase(
        "sd3",
        {
            "clip_l_dropout_rate": 0.5, "clip_g_dropout_rate": 0.5, "t5_dropout_rate": 0.5,
            "pos_emb_random_crop_rate": 0.5, "weighting_scheme": "logit_normal",
        },
    ),
    "positions of SD 3": WaitCase("sd3", {"enable_scaled_pos_embed": True, "network_args": ["train_t5xxl=True"]}),
    "saving memory": WaitCase(
        "flux",
        {
            "blocks_to_swap": 2, "hoist_modulation": True, "fp8_base": True, "network_train_unet_only": True,
            "gradient_checkpointing": True, "cpu_offload_checkpointing": True,
        },
        deep=True,
    ),
    "int8": WaitCase("sd1", {"base_quant": "int8", "blocks_to_swap": 2, "activation_budget": 0.5}),
    "dora": network("lora", "dora_wd=True", scale_weight_norms=1.0),
    "lora_fa": network("lora_fa"),
    "loha": network("loha", scale_weight_norms=1.0),
    "lokr": network("lokr", scale_weight_norms=1.0),
    "oft": network("oft"),
    "dylora": network("dylora", "unit=2"),
    "bf16": WaitCase("sd1", BF16),
    "full training": WaitCase("sdxl", {**BF16, "train_text_encoder": True}, "finetune"),
    "in the backward pass": WaitCase(
        "flux",
        {**BF16, "bf16_update": "kahan", "fused_backward_pass": True, "blocks_to_swap": 2},
        "finetune",
        deep=True,
    ),
    "groups in the backward pass": WaitCase("sd1", {"fused_optimizer_groups": 3}, "dreambooth"),
    "textual inversion": WaitCase("sdxl", method="textual_inversion"),
    "lllite": WaitCase("sdxl", method="lllite", data="controlled"),
}  # fmt: skip


class Ground:
    """Models and datasets below a folder, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models: dict[tuple[str, bool], dict[str, Any]] = {}
        self._data: dict[str, Path] = {}

    def model(self, name: str, *, deep: bool = False) -> dict[str, Any]:
        """The options that name a tiny model of CASES."""
        if (name, deep) not in self._models:
            case = CASES[name]
            make = case.make_deep if deep and case.make_deep is not None else case.make
            self._models[name, deep] = {**make(self.folder / f"{name} {deep}"), **case.options}
        return self._models[name, deep]

    def data(self, kind: str) -> Path:
        """A dataset of two batches.

        plain; controlled: with control images or masks; kept: with regularisation pictures, and some that learn what
        the untrained model says.
        """
        if kind not in self._data:
            pictures = make_pictures(self.folder / kind, 4)
            if kind == "controlled":
                masks = make_pictures(self.folder / "masks", 4)
                subsets = [subset(pictures, conditioning_data_dir=str(masks))]
            elif kind == "kept":
                more = make_pictures(self.folder / "more", 4, first=4)
                attributes = {"diff_output_preservation": True}
                subsets = [subset(pictures, custom_attributes=attributes), subset(more, is_reg=True)]
            else:
                subsets = [subset(pictures)]
            self._data[kind] = write_dataset(self.folder / f"{kind}.toml", *subsets)
        return self._data[kind]

    def values(self, case: WaitCase, output: Path) -> dict[str, Any]:
        """All options of a run."""
        own = {"dataset_config": self.data(case.data), "output_dir": output}
        return {
            **COMMON,
            **METHOD_VALUES[case.method],
            **self.model(case.model, deep=case.deep),
            **own,
            **case.values,
        }


def run_watched(
    watching: type[Trainer], case: WaitCase, values: Mapping[str, Any], *,
    before: Callable[[Recorded], None] | None = None, **attributes: Any,
) -> Recorded:  # fmt: skip
    """The finished run of the case's script, in the loop `watching`. before: looks at it before its first step."""
    family = CASES[case.model].family
    trainer = make_trainer(values, family=family, method=case.method, loop=watching, **attributes)
    trainer.before = before
    assert trainer.run() == 0
    settle()
    return trainer
