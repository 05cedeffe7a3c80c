# SPDX-License-Identifier: Apache-2.0
"""The options of the training loop, and the groups that make up each method's options. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from library.data.options import CacheOptions, DataOptions
from library.families.options import Answered, ModelOptions
from library.io.options import HubOptions, MetadataOptions, SaveOptions, StateOptions, cross_problems
from library.memory.options import MemoryOptions
from library.objectives.options import DDPMOptions, LossOptions
from library.optim.options import EmaOptions, OptimizerOptions, SchedulerOptions
from library.options import Choice, ConfigFileOptions, Idle, at_least, between, option, positive
from library.sampling.options import SampleOptions
from library.values import SEEDS, rate

ONLY_DEEPSPEED = (
    "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path",
    "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients",
)  # fmt: skip
MOST_RANKS = 100_000  # more than any layer has; some programs write it to ask for the full matrices of LoKr


@dataclass(frozen=True)
class TrainOptions:
    """How long and how to train."""

    max_train_steps: int = option(1600, help="Optimizer steps of the run.", check=positive, zero_is_unset=True)
    max_train_epochs: int | None = option(
        None, help="Epochs of the run; wins over --max_train_steps.", check=positive, zero_is_unset=True
    )
    max_train_minutes: float | None = option(
        None,
        help="Stop so many minutes after the start: the step is finished, the state saved, and the exit code is 3.",
        check=positive,
        zero_is_unset=True,
    )
    seed: int | None = option(
        None, help="Seed of every random draw; without it one is chosen and printed.", check=between(*SEEDS)
    )
    gradient_accumulation_steps: int = option(
        1, help="Batches whose gradients make one optimizer step.", check=positive
    )
    validate_every_n_steps: int | None = option(
        None, help="Validate every N optimizer steps.", check=positive, zero_is_unset=True
    )
    validate_every_n_epochs: int | None = option(
        None, help="Validate every N epochs (default: each).", check=positive, zero_is_unset=True
    )
    max_validation_steps: int | None = option(
        None, help="Validate on at most this many batches.", check=positive, zero_is_unset=True
    )


@dataclass(frozen=True)
class PrecisionOptions:
    """Dtypes, and what other programs have options for."""

    mixed_precision: str = option("no", help="Compute dtype.", choices=("no", "fp16", "bf16"))
    full_fp16: bool = option(False, help="Keep trained weights and gradients in fp16 too.")
    full_bf16: bool = option(False, help="Keep trained weights and gradients in bf16 too.")
    bf16_update: str | None = option(
        None,
        help="How weights in bf16 take in updates that are smaller than their last digit (with --full_bf16: "
        "stochastic): rounding at random, a sum that keeps what was cut, or plain rounding, which loses them.",
        choices=("stochastic", "kahan", "plain"),
    )
    sdpa: bool = option(False, help="Attention of torch.", answer="always used")
    xformers: bool = option(
        False, help="Attention of xformers.", answer="torch's own memory-efficient attention is used"
    )
    mem_eff_attn: bool = option(
        False, help="Memory-efficient attention.", answer="torch's own memory-efficient attention is used"
    )
    lowram: bool = option(
        False, help="Load to the GPU directly.", answer="always so: files are mapped, never copied to main memory"
    )
    highvram: bool = option(
        False, help="Keep more on the card.", answer="nothing to do: nothing is moved that still has work to do"
    )

    def problems(self) -> Iterator[str]:
        for name in ("fp16", "bf16"):
            if getattr(self, f"full_{name}") and self.mixed_precision != name:
                yield f"--full_{name} needs --mixed_precision {name}"
        if self.bf16_update and not self.full_bf16:
            yield Idle("--bf16_update has no effect without --full_bf16: weights are kept in float32")


@dataclass(frozen=True)
class DistributedOptions:
    """Several GPUs: `accelerate launch` starts the processes, these are its details."""

    shard_base: bool = option(
        False,
        help="Each process keeps only its share of the denoiser's weights (in full training also of gradients and "
        "optimizer states), and gathers a block at a time while it computes.",
    )
    ddp_timeout: int | None = option(
        None, help="Minutes to wait for the other processes.", check=positive, zero_is_unset=True
    )
    ddp_gradient_as_bucket_view: bool = option(
        False,
        help="DDP keeps gradients in its own buckets: less memory in full training. Adapters need no buckets.",
    )
    ddp_static_graph: bool = option(
        False, help="DDP assumes that every step of a full training uses the same weights, and need not look for them."
    )
    deepspeed: bool = option(False, help="Train with DeepSpeed (Linux, pip install deepspeed).")
    zero_stage: int = option(
        2, help="DeepSpeed: ZeRO stage, 0 to 2 (saves of stage 3 would lack weights).", check=between(0, 3)
    )
    offload_optimizer_device: str | None = option(
        None, help="DeepSpeed: where optimizer states go.", choices=("cpu", "nvme")
    )
    offload_optimizer_nvme_path: str | None = option(
        None, help="DeepSpeed: folder for optimizer states on NVMe.", path=True
    )
    offload_param_device: str | None = option(
        None, help="DeepSpeed: where parameters go (stage 3).", choices=("cpu", "nvme")
    )
    offload_param_nvme_path: str | None = option(None, help="DeepSpeed: folder for parameters on NVMe.", path=True)
    zero3_init_flag: bool = option(False, help="DeepSpeed stage 3: build the model already split.")
    zero3_save_16bit_model: bool = option(False, help="DeepSpeed stage 3: gather 16-bit weights when saving.")
    fp16_master_weights_and_gradients: bool = option(
        False, help="DeepSpeed: master weights in fp16 (stage 2, offload)."
    )

    @property
    def splits_states(self) -> bool:
        """Whether DeepSpeed splits the optimizer's states between the processes."""
        return self.deepspeed and self.zero_stage in (1, 2)

    def problems(self) -> Iterator[str]:
        used = [name for name in ONLY_DEEPSPEED if getattr(self, name)]
        if used and not self.deepspeed:
            yield Idle(f"--{used[0]} has no effect without --deepspeed")
        if self.deepspeed and self.zero_stage == 3:
            yield "--zero_stage 3 splits the weights between processes, and each save would lack most of them: give 2"
        for kind in ("optimizer", "param"):
            wants_nvme = getattr(self, f"offload_{kind}_device") == "nvme"
            if wants_nvme and not getattr(self, f"offload_{kind}_nvme_path"):
                yield f"--offload_{kind}_device nvme needs --offload_{kind}_nvme_path"


@dataclass(frozen=True)
class LoggingOptions:
    """Messages and training curves."""

    console_log_level: str | None = option(
        None, help="Least level of the messages shown.", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )
    console_log_file: str | None = option(
        None, help="Write the messages to this file instead of the terminal.", path=True
    )
    console_log_simple: bool = option(False, help="Messages without time and level.")
    logging_dir: str | None = option(None, help="Folder for the training curves.", path=True)
    log_with: str | None = option(
        None,
        help="Program for the curves (default with --logging_dir: tensorboard).",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(None, help="Put before the name of the run's log folder.")
    log_tracker_name: str | None = option(None, help="Name of the project in the log.")
    wandb_run_name: str | None = option(None, help="Name of the run in wandb.")
    log_tracker_config: str | None = option(None, help="TOML file with settings of the log program.", path=True)
    wandb_api_key: str | None = option(None, help="Key of wandb; better set WANDB_API_KEY.", secret=True)
    log_config: bool = option(False, help="Write all options into the log.")

    def problems(self) -> Iterator[str]:
        if self.log_with in ("tensorboard", "all") and self.logging_dir is None:
            yield f"--log_with {self.log_with} needs --logging_dir"


@dataclass(frozen=True)
class NetworkOptions:
    """The adapter network (LoRA) and its learning rates."""

    network_module: str | None = option(None, help="Module of the network, e.g. networks.lora or lycoris.kohya.")
    network_dim: int | None = option(None, help="Rank of the network.", check=between(1, MOST_RANKS))
    network_alpha: float = option(
        1.0, help="Strength: the network's output is scaled by alpha / rank.", check=at_least(0)
    )
    network_dropout: float | None = option(
        None, help="Share of activations dropped inside the network.", check=between(0, 1)
    )
    network_args: tuple[str, ...] = option((), help="More arguments of the network, as key=value.")
    network_weights: str | None = option(None, help="Start from this network file.", path=True)
    dim_from_weights: bool = option(False, help="Take ranks and alphas from --network_weights.")
    network_train_unet_only: bool = option(False, help="Train the denoiser's part only.")
    network_train_text_encoder_only: bool = option(False, help="Train the text encoder's part only.")
    unet_lr: float | None = option(None, help="Learning rate of the denoiser's part.", check=rate)
    text_encoder_lr: tuple[float, ...] | None = option(
        None, help="Learning rate of the text encoder's part (one value, or one per encoder).", check=rate
    )
    scale_weight_norms: float | None = option(
        None, help="Scale weights down to this norm after each step.", check=positive, zero_is_unset=True
    )
    lora_format: str | None = option(
        None,
        help="Names of the tensors in the file: kohya (A1111/Forge, ComfyUI, this program), comfy (ComfyUI) or "
        "peft (diffusers). Without it kohya; for SANA peft, where that has names for the network.",
        choices=("kohya", "comfy", "peft"),
    )
    base_weights: tuple[str, ...] | None = option(
        None, help="Network files to merge into the model before training.", path=True
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, help="Strength of each of --base_weights (default 1)."
    )

    def problems(self) -> Iterator[str]:
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            yield "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train: give one"
        if self.dim_from_weights and not self.network_weights:
            yield Idle("--dim_from_weights has no effect without --network_weights")
        if self.base_weights_multiplier and not self.base_weights:
            yield Idle("--base_weights_multiplier has no effect without --base_weights")
        if self.base_weights_multiplier and self.base_weights:
            given, needed = len(self.base_weights_multiplier), len(self.base_weights)
            if given > needed:
                yield f"--base_weights_multiplier has {given} values for {needed} files of --base_weights"
        for item in self.network_args:
            if "=" not in item:
                yield f"--network_args: '{item}' is not key=value"
        keys = Counter(item.partition("=")[0] for item in self.network_args)
        for key in [key for key, times in keys.items() if times > 1]:
            values = " and ".join(item for item in self.network_args if item.partition("=")[0] == key)
            yield f"--network_args: {key} is given twice: {values}"


@dataclass(frozen=True)
class TrainerOptions:
    """The options of every method."""

    config: ConfigFileOptions
    model: ModelOptions
    data: DataOptions
    cache: CacheOptions
    train: TrainOptions
    objective: DDPMOptions
    loss: LossOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    ema: EmaOptions
    precision: PrecisionOptions
    memory: MemoryOptions
    distributed: DistributedOptions
    save: SaveOptions
    state: StateOptions
    sample: SampleOptions
    logging: LoggingOptions
    metadata: MetadataOptions
    hub: HubOptions

    @property
    def bf16_update(self) -> str:
        """How weights in bf16 are updated: "stochastic", "kahan" or "plain"."""
        if not self.precision.full_bf16 or self.distributed.deepspeed:  # DeepSpeed keeps float32 weights by itself
            return "plain"
        return self.precision.bf16_update or ("kahan" if self.optimizer.kahan else "stochastic")

    def choices(self) -> Iterator[Choice]:
        """Values for options that were not given."""
        return self.model.choices()

    def problems(self) -> Iterator[str]:
        """Combinations of options of several groups that make no sense."""
        yield from cross_problems(self.save, self.state, self.hub)
        if self.optimizer.kahan and self.precision.bf16_update not in (None, "kahan"):
            yield (
                f"--optimizer_type {self.optimizer.name} keeps what rounding cuts off: leave --bf16_update "
                f"{self.precision.bf16_update} out"
            )
        if self.memory.plan and self.state.resume:
            yield "--plan looks at a run from its start: leave out --resume, what a step takes is the same"
        if self.distributed.deepspeed and (
            self.state.save_state or self.state.save_state_on_train_end or self.state.resume
        ):
            yield from self._unsaved_by_deepspeed()

    def _unsaved_by_deepspeed(self) -> Iterator[str]:
        """What --save_state and --resume do not find in DeepSpeed."""
        start, distributed = "--save_state and --resume with --deepspeed", self.distributed
        if not distributed.splits_states:
            yield f"{start} need --zero_stage 1 or 2"
        if distributed.offload_optimizer_device:
            yield f"{start} do not work with --offload_optimizer_device, which replaces the optimizer: leave it out"
        if self.precision.mixed_precision == "fp16":
            yield f"{start} need --mixed_precision bf16 or no: DeepSpeed keeps the loss scale of fp16 to itself"


@dataclass(frozen=True)
class NetworkTrainerOptions(TrainerOptions):
    """LoRA and every other adapter."""

    network: NetworkOptions
    answered: Answered

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        written, names = self.save.save_model_as, self.network.lora_format
        if names not in (None, "kohya") and written not in (None, "safetensors"):
            yield f"--lora_format {names} needs --save_model_as safetensors: {written} has no place for alpha"

    def choices(self) -> Iterator[Choice]:
        """Cached captions and adapters of the text encoder exclude each other. As in other programs, caching wins."""
        yield from super().choices()
        network = self.network
        if self.cache.texts and self.model.cached_texts_stay and network.text_encoder_lr is None and not (
            network.network_train_unet_only or network.network_train_text_encoder_only
        ):  # fmt: skip
            line = (
                "--network_train_unet_only is chosen: with --cache_text_encoder_outputs the text encoder does not learn"
            )
            yield Choice("network_train_unet_only", True, line)
