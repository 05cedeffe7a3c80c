# SPDX-License-Identifier: Apache-2.0
"""The accelerator of a run (processes, devices, precision) and small device facts. Takes plain values, no options."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.util
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
MASTER_WEIGHTS = "fp16_master_weights_and_grads"  # a key of DeepSpeed's configuration, not of accelerate's plugin


@dataclass(frozen=True)
class DistributedSettings:
    """How several processes work together."""

    timeout_minutes: int | None = None
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)  # arguments of accelerate's DeepSpeedPlugin
    batch_size: int = 1  # per device; DeepSpeed wants to know it


def make_accelerator(mixed_precision: str, settings: DistributedSettings) -> Accelerator:
    """The accelerator. Raises UserError where the machine cannot do what was asked for."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    if mixed_precision == "fp16" and not accelerator_present():
        raise UserError("--mixed_precision fp16 needs a GPU; on the CPU use --mixed_precision bf16 or no")
    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=settings.gradient_as_bucket_view,
            static_graph=settings.static_graph,
            broadcast_buffers=False,
            # --clip_skip leaves the last layers of a text encoder without gradient
            find_unused_parameters=not settings.static_graph,
        )
    ]
    if settings.timeout_minutes:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=settings.timeout_minutes)))
    plugin = _deepspeed_plugin(settings.deepspeed, settings.batch_size) if settings.deepspeed else None
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=not accelerator_present(),  # else processes of torchrun would not see each other on a machine without a GPU
        kwargs_handlers=handlers,
        deepspeed_plugin=plugin,
        # the trainer accumulates; a number given to `accelerate launch` would only divide every loss
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def _deepspeed_plugin(arguments: dict[str, Any], batch_size: int) -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed: the package is not installed: pip install deepspeed (Linux with CUDA)")
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(**{k: v for k, v in arguments.items() if k != MASTER_WEIGHTS})
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size  # it sees no loader to take it from
    if arguments.get(MASTER_WEIGHTS):
        plugin.deepspeed_config.setdefault("fp16", {})[MASTER_WEIGHTS] = True
    return plugin


def accelerator_present() -> bool:
    """True when torch sees a GPU of any kind."""
    return torch.cuda.is_available() or torch.backends.mps.is_available() or _xpu_available()


def _xpu_available() -> bool:
    return torch.xpu.is_available() if "xpu" in dir(torch) else False


def unscale_half_gradients(scaler: torch.amp.GradScaler) -> None:
    """Let the scaler unscale fp16 gradients, which weights in fp16 have (--full_fp16): torch refuses them by itself."""
    refusing = scaler._unscale_grads_

    def unscale(optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        return refusing(optimizer, inv_scale, found_inf, True)

    scaler._unscale_grads_ = unscale  # type: ignore[method-assign]


def free_memory() -> None:
    """Give freed memory back to the device and to the system, after a model was dropped."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps some hundred MB otherwise


def free_bytes(device: torch.device) -> int:
    """Memory that this process could take on `device` now, with what it has taken and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    raise UserError("how much memory is free is not known on this system: give --vram_budget")


def limit_memory(device: torch.device, limit: int) -> None:
    """From now on a card refuses this process more than `limit` bytes, as a smaller card would."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def return_large_blocks() -> None:
    """From now on glibc gives memory of tensors above 256 kB back as soon as they are freed.

    For training on the CPU with little memory, where weights and activations share it: left to itself, glibc raises
    the size from which it does so to 32 MB and keeps what a step has used. It takes time: a fifth of a step.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 18)


def on_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`, without the host waiting for the device.

    CUDA copies by itself only from page-locked memory; from any other memory, the host waits until the copy is staged.
    """
    there = torch.device(device)
    has_contents = type(values) is Tensor  # not a FakeTensor of the planner, which cannot be pinned
    if there.type == "cuda" and values.device.type == "cpu" and has_contents and not values.is_pinned():
        values = values.pin_memory()
    return values.to(there, non_blocking=True)


def seed_everything(seed: int) -> None:
    """torch's default generators on every device: what dropout draws from."""
    torch.manual_seed(seed)
