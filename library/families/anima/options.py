# SPDX-License-Identifier: Apache-2.0
"""Options of Anima: which files make the model, what its text encoder reads, the rates of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.families.finetune_options import FineTuneOptions
from library.families.options import FlowModelOptions
from library.objectives.flow_options import SampledFlowOptions
from library.options import at_least, option, positive

TOKEN_LENGTH = 512  # as long as the text that the transformer reads
RATES = tuple(f"{part}_lr" for part in ("llm_adapter", "self_attn", "cross_attn", "mlp", "mod"))
NOT_FOR_NETWORKS = "for full training; a network takes learning rates by layer: --network_args network_reg_lrs"


@dataclass(frozen=True)
class AnimaOptions(FlowModelOptions):
    """Anima."""

    cached_texts_stay: ClassVar[bool] = True
    qwen3: str | None = option(
        None, help="Qwen3-0.6B: file, transformers folder or hub id. Without it, that of the model.", path=True
    )
    llm_adapter_path: str | None = option(
        None, help="File or folder of the LLM adapter (text conditioner). Without it, that of the model.", path=True
    )
    t5_tokenizer_path: str | None = option(None, help="Folder of T5's tokenizer. Without it, see the page.", path=True)
    qwen3_max_token_length: int = option(
        TOKEN_LENGTH, help="Longest caption in tokens of Qwen3; what is longer is cut.", check=at_least(1, 8192),
        zero_is_unset=True,
    )  # fmt: skip
    t5_max_token_length: int = option(
        TOKEN_LENGTH, help="Longest caption in tokens of T5, end token included; what is longer is cut.",
        check=at_least(2, 8192), zero_is_unset=True,
    )  # fmt: skip
    attn_mode: str | None = option(
        None, help="Kernels of attention.", choices=("torch", "xformers", "flash", "sageattn", "sdpa"),
        answer="attention goes through PyTorch, which takes its flash kernels wherever they fit; no package is needed",
    )  # fmt: skip
    split_attn: bool = option(
        False, help="Compute attention sample by sample.",
        answer="PyTorch's attention keeps no scores, so that splitting a batch saves no memory",
    )  # fmt: skip
    unsloth_offload_checkpointing: bool = option(
        False, help="Keep the inputs of recomputed blocks in main memory.",
        answer="--cpu_offload_checkpointing does its job, and copies while the card computes",
    )  # fmt: skip
    vae_chunk_size: int | None = option(
        None, help="Size of the VAE's pieces.", check=at_least(1), zero_is_unset=True,
        answer="pictures go through the VAE whole, which computes them as one frame: that takes a third of the memory",
    )  # fmt: skip
    vae_disable_cache: bool = option(
        False, help="Keep no earlier frames in the VAE.", answer="always so: a picture is one frame"
    )
    clip_skip: int | None = option(
        None, help="Not for this model.", answer="there is no CLIP here; Qwen3's last layer is always used"
    )
    max_token_length: int | None = option(
        None, help="Not for this model.", answer="--qwen3_max_token_length and --t5_max_token_length are the limits"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.attn_mode == "sageattn":
            yield "--attn_mode sageattn: SageAttention has no backward pass, so nothing would learn; leave it out"


@dataclass(frozen=True)
class AnimaFlowOptions(SampledFlowOptions):
    """How Anima is trained: which noise levels are drawn, how the loss is weighted."""

    timestep_sampling: str = option(
        "sigmoid", help="How noise levels are drawn; sigmoid and shift are usual.",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    )  # fmt: skip
    discrete_flow_shift: float = option(
        1.0, help="Shift of the sigma and shift samplings; above 1 draws more noise.", check=positive
    )
    model_prediction_type: str = option(
        "raw", help="What the loss compares: raw counts all noise levels alike, sigma_scaled counts noisy ones more.",
        choices=("raw", "additive", "sigma_scaled"),
    )  # fmt: skip

    @property
    def weights_loss(self) -> bool:
        """--weighting_scheme weights the loss of every form of the prediction, as in sd-scripts."""
        return True


@dataclass(frozen=True)
class AnimaFineTuneOptions(FineTuneOptions):
    """Learning rates of the parts of Anima; 0: the part stays as it is."""

    llm_adapter_lr: float | None = option(
        None, help="Learning rate of the LLM adapter, which stays as it is without one.", check=at_least(0)
    )
    self_attn_lr: float | None = option(
        None, help="Learning rate of self-attention; --learning_rate without one.", check=at_least(0)
    )
    cross_attn_lr: float | None = option(
        None, help="Learning rate of the attention to the text; --learning_rate without one.", check=at_least(0)
    )
    mlp_lr: float | None = option(
        None, help="Learning rate of the MLPs; --learning_rate without one.", check=at_least(0)
    )
    mod_lr: float | None = option(
        None, help="Learning rate of the modulations; --learning_rate without one.", check=at_least(0)
    )
