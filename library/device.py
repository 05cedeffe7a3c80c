# SPDX-License-Identifier: Apache-2.0
"""The accelerator of a run (processes, devices, precision) and device functions. Takes plain values, not options."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.device_report import report_device, unused_card
from library.errors import UserError, raise_problems
from library.log import get_logger
from library.machine import System, main_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CARDS = ("cuda", "xpu")  # kinds of devices with memory of their own; a Mac's GPU ("mps") shares the host's
M_MMAP_THRESHOLD = -3  # a parameter of glibc's mallopt
# Texts in torch's RuntimeErrors for out of memory, besides torch.OutOfMemoryError
OUT_OF_MEMORY = (
    "out of memory",  # "CUDA error: out of memory", "MPS backend out of memory", "HIP out of memory"
    "cudaErrorMemoryAllocation",
    "STATUS_ALLOC_FAILED",  # CUBLAS_, CUDNN_, CUSOLVER_, HIPBLAS_
    "unable to find an engine to execute this computation",  # cuDNN, where the workspace of every engine is too large
    "Unable to find a valid cuDNN algorithm",
    "OUT_OF_DEVICE_MEMORY",  # Intel's UR_RESULT_ERROR_... and ZE_RESULT_ERROR_...
    "OUT_OF_HOST_MEMORY",
    "DefaultCPUAllocator: can't allocate memory",  # main memory
    "DefaultCPUAllocator: not enough memory",  # the same on Windows
)
NEEDS_LESS = (
    "give --vram_budget with the memory of the card, such as 12GB, and the run chooses what fits; "
    "--gradient_checkpointing, --fp8_base, --blocks_to_swap, caches, --optimizer_type AdamW8bit, a smaller "
    "--train_batch_size or --resolution need less"
)
LAUNCH_KINDS = {  # variables by which `accelerate launch` says what its configuration asks for
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Settings of `accelerate launch` for which the scripts have options -> (neutral value, option)
LAUNCH_OPTIONS = {
    "GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient_accumulation_steps"),
    "GRADIENT_CLIPPING": ("none", "--max_grad_norm"),
    "DYNAMO_BACKEND": ("no", "--compile"),
}
MASTER_WEIGHTS = "fp16_master_weights_and_grads"  # a key of DeepSpeed's configuration, not of accelerate's plugin


@dataclass(frozen=True)
class DistributedSettings:
    """Settings for several processes."""

    timeout_minutes: int | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)  # arguments of accelerate's DeepSpeedPlugin
    batch_size: int = 1  # per device; required by DeepSpeed


def make_accelerator(mixed_precision: str, settings: DistributedSettings) -> Accelerator:
    """Create the accelerator and log its device. Raises UserError when the machine does not support the settings."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    if mixed_precision == "fp16" and not accelerator_present():
        problem = "--mixed_precision fp16 needs a GPU; on the CPU use --mixed_precision bf16 or no"
        card = unused_card()
        raise UserError([problem, card] if card else problem)
    _check_mac(mixed_precision)
    handlers: list[Any] = []
    if settings.timeout_minutes:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=settings.timeout_minutes)))
    plugin = _deepspeed_plugin(settings.deepspeed, settings.batch_size) if settings.deepspeed else None
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=not accelerator_present(),  # otherwise torchrun's processes could not communicate without a GPU
        kwargs_handlers=handlers,
        deepspeed_plugin=plugin,
        # the trainer accumulates; a number given to `accelerate launch` would only divide every loss
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",  # --compile does it, block by block
    )
    if accelerator.is_main_process:
        for level, line in overridden(mixed_precision):
            get_logger().log(level, line)
        report_device(accelerator.device, processes=accelerator.num_processes, mixed_precision=mixed_precision)
    return accelerator


def check_launch(*, deepspeed: bool) -> None:
    """Raises UserError when accelerate's configuration asks for a kind of training that is not supported.

    accelerate passes its configuration in the environment, and would apply it silently.
    """
    asked = [kind for name, kind in LAUNCH_KINDS.items() if os.environ.get(name, "").lower() in ("true", "1")]
    if "DeepSpeed" in asked and deepspeed:
        asked.remove("DeepSpeed")
    problems = []
    if "FSDP" in asked:
        asked.remove("FSDP")
        problems.append(
            "accelerate's configuration asks for FSDP: answer no to it in `accelerate config`, and give --shard_base, "
            "which splits the weights between the processes"
        )
    problems += [
        f"accelerate's configuration asks for {kind}{' and --deepspeed is not given' if kind == 'DeepSpeed' else ''}: "
        "several GPUs train with copies of the model here; start with `accelerate launch --multi_gpu`, or with one "
        "process, or answer no to it in `accelerate config`"
        for kind in asked
    ]
    raise_problems(problems)


def overridden(mixed_precision: str) -> Iterator[tuple[int, str]]:
    """(log level, line) for each setting of `accelerate launch` that is overridden by an option of the script.

    accelerate also reports "no" when the user chose nothing.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", mixed_precision).lower()
    if asked != mixed_precision:
        line = f"mixed precision: {mixed_precision} is used, not accelerate's {asked}"
        hint = f"; give --mixed_precision {asked} to the script to have that"
        yield (logging.INFO, line) if asked == "no" else (logging.WARNING, line + hint)
    for name, (nothing, option) in LAUNCH_OPTIONS.items():
        value = os.environ.get(f"ACCELERATE_{name}", nothing)
        if value.lower() not in (nothing, "none", "auto", ""):
            yield logging.WARNING, f"accelerate's {name.lower()} {value} is not used: give {option} to the script"


def _check_mac(mixed_precision: str) -> None:
    """Raises UserError when macOS or torch does not support this precision on a Mac's GPU."""
    if not torch.backends.mps.is_available():
        return
    if mixed_precision == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError("--mixed_precision bf16 needs macOS 14 or newer; use --mixed_precision no")
    if mixed_precision == "fp16" and torch.__version__ < "2.8":
        raise UserError(
            f"--mixed_precision fp16 needs torch 2.8 or newer on a Mac, this is {torch.__version__}; use bf16 or no"
        )


def _deepspeed_plugin(arguments: dict[str, Any], batch_size: int) -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--deepspeed: the package is not installed: pip install deepspeed (Linux with CUDA)")
    if not accelerator_present():  # accelerate would train without DeepSpeed
        raise UserError("--deepspeed needs a GPU, and torch sees none: leave it out")
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(**{k: v for k, v in arguments.items() if k != MASTER_WEIGHTS})
    if plugin.deepspeed_config.get("zero_optimization", {}).get("stage") == 3:  # set in accelerate's configuration
        raise UserError("DeepSpeed's configuration file asks for ZeRO stage 3: each save would lack weights; give 2")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size  # it gets no data loader to take it from
    if arguments.get(MASTER_WEIGHTS):
        plugin.deepspeed_config.setdefault("fp16", {})[MASTER_WEIGHTS] = True
    return plugin


def accelerator_present() -> bool:
    """Whether torch has a GPU of any kind."""
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def is_card(device: torch.device) -> bool:
    """Whether `device` has its own memory.

    Then torch counts the memory in use, and copies to and from page-locked main memory run asynchronously.
    """
    return device.type in CARDS


def without_rounding(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in main memory, converted to `dtype` if no number changes."""
    own = tensor.detach().cpu()
    return own if dtype is None or not torch.equal(own.to(dtype).to(own.dtype), own) else own.to(dtype)


def exact_float(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype that all devices of this type support."""
    return torch.float32 if device.type in ("mps", "xpu") else torch.float64


def indexed(device: torch.device) -> torch.device:
    """The device with its index, as on tensors: "cuda", which accelerate returns for a single process, is "cuda:0"."""
    return torch.empty(0, device=device).device


def unscale_half_gradients(scaler: torch.amp.GradScaler) -> None:
    """Make the scaler accept fp16 gradients, those of fp16 weights (--full_fp16), which torch refuses by default."""
    refusing = scaler._unscale_grads_

    def unscale(optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        return refusing(optimizer, inv_scale, found_inf, True)

    scaler._unscale_grads_ = unscale  # type: ignore[method-assign]


def free_memory() -> None:
    """Return freed memory to the device and the system. Call it after a model was dropped."""
    import gc

    gc.collect()
    empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise glibc keeps some hundred MB


def empty_cache() -> None:
    """Return the memory that torch caches to the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, a library on it, or main memory is out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def reason_of(error: BaseException) -> str:
    """The reason of an error, especially of one about memory: the first sentence of its text."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of main memory"
    return (str(error) or type(error).__name__).partition("\n")[0].partition(". ")[0].rstrip(".")


def fits(action: Callable[[], None]) -> bool:
    """Run `action`. Returns False when it runs out of memory, after freeing what it had allocated."""
    try:
        action()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    free_memory()  # not in the except clause, where the error's frames still hold tensors
    return False


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could use on `device` now, including cached memory. Raises UserError if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type == "xpu" and "mem_get_info" in dir(torch.xpu):  # not in torch 2.6
        with contextlib.suppress(RuntimeError):  # not supported by some drivers
            free, _ = torch.xpu.mem_get_info(device)
            return free + torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
    memory = main_memory(System.here()) if device.type == "cpu" else None
    if memory is not None and memory.free is not None:
        return memory.free
    raise UserError("how much memory is free is not known on this system: give --vram_budget")


def limit_memory(device: torch.device, limit: int) -> None:
    """Limit this process to `limit` bytes of the device's memory, like a smaller card."""
    if device.type == "cuda":
        device = indexed(device)  # torch requires an index here
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    elif device.type == "mps":
        torch.mps.set_per_process_memory_fraction(min(1.0, limit / torch.mps.recommended_max_memory()))
    elif device.type == "xpu" and "set_per_process_memory_fraction" in dir(torch.xpu):  # not in torch 2.6
        total = torch.xpu.get_device_properties(device).total_memory
        torch.xpu.set_per_process_memory_fraction(min(1.0, limit / total), device)


def forget_peak(device: torch.device) -> None:
    """Reset `peak_bytes` of a card."""
    torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory of tensors on a card, in bytes, since `forget_peak`. Does not wait for the device."""
    return torch.get_device_module(device).max_memory_allocated(device)


class HostCopy:
    """A copy of a tensor to the host: asynchronous from a card, immediate from other devices."""

    def __init__(self, tensor: Tensor) -> None:
        asynchronous = is_card(tensor.device)
        try:
            self._tensor = tensor.detach().to("cpu", non_blocking=asynchronous)
        except RuntimeError:  # the system refuses to pin the target memory
            self._tensor, asynchronous = tensor.detach().to("cpu"), False
        self._arrival = torch.get_device_module(tensor.device).Event() if asynchronous else None
        if self._arrival is not None:
            self._arrival.record()

    @property
    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._arrival is None or self._arrival.query()

    def value(self) -> Tensor:
        """The tensor on the host. Waits for the copy."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensor


def return_large_blocks() -> None:
    """Make glibc return the memory of tensors above 256 kB to the system as soon as they are freed.

    For training on the CPU with little memory. By default glibc raises this threshold to up to 32 MB and keeps the
    memory of a step. It costs about a fifth of a step's time.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 18)


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's default generators of the CPU and of `device` at the end of the context."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        yield


def on_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy `values` to `device` without making the host wait.

    CUDA copies asynchronously from page-locked memory only, so `values` is pinned first. If the system refuses that,
    the host waits until the copy is staged.
    """
    there = torch.device(device)
    has_contents = type(values) is Tensor  # not a FakeTensor of the planner, which cannot be pinned
    if there.type == "cuda" and values.device.type == "cpu" and has_contents and not values.is_pinned():
        with contextlib.suppress(RuntimeError):
            values = values.pin_memory()
    return values.to(there, non_blocking=True)


def seed_everything(seed: int) -> None:
    """Seed torch's default generators, which dropout uses, on every device."""
    torch.manual_seed(seed)
