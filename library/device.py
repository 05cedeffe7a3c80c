# SPDX-License-Identifier: Apache-2.0
"""The accelerator of a run (processes, devices, precision) and small device facts. Takes plain values, no options."""

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
from library.errors import UserError
from library.log import get_logger
from library.machine import System, main_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CARDS = ("cuda", "xpu")  # kinds of devices with memory of their own; a Mac's GPU ("mps") shares the host's
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
# What torch's RuntimeErrors say where memory ran out, besides torch.OutOfMemoryError
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
# Settings by which it tells what the scripts have options for -> (what means nothing, the option)
LAUNCH_OPTIONS = {
    "GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient_accumulation_steps"),
    "GRADIENT_CLIPPING": ("none", "--max_grad_norm"),
    "DYNAMO_BACKEND": ("no", "--compile"),
}
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
    """The accelerator; logs what it computes on. Raises UserError where the machine cannot do what was asked for."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    if mixed_precision == "fp16" and not accelerator_present():
        problem = "--mixed_precision fp16 needs a GPU; on the CPU use --mixed_precision bf16 or no"
        card = unused_card()
        raise UserError([problem, card] if card else problem)
    _check_mac(mixed_precision)
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
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=not accelerator_present(),  # else processes of torchrun would not see each other on a machine without a GPU
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
    """Raises UserError where accelerate's configuration asks for what the training does not do.

    accelerate tells its configuration in the environment, and would train otherwise without a word.
    """
    asked = [kind for name, kind in LAUNCH_KINDS.items() if os.environ.get(name, "").lower() in ("true", "1")]
    if "DeepSpeed" in asked and deepspeed:
        asked.remove("DeepSpeed")
    problems = [
        f"accelerate's configuration asks for {kind}{' and --deepspeed is not given' if kind == 'DeepSpeed' else ''}: "
        "several GPUs train with copies of the model here; start with `accelerate launch --multi_gpu`, or with one "
        "process, or answer no to it in `accelerate config`"
        for kind in asked
    ]
    if problems:
        raise UserError(problems)


def overridden(mixed_precision: str) -> Iterator[tuple[int, str]]:
    """(level, line) of each setting of `accelerate launch` that is not used, because the script has an option for it.

    accelerate reports "no" where nothing was asked for, which is not a choice of the user.
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
    """Raises UserError where a Mac's system or torch cannot compute so on its GPU."""
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
    if not accelerator_present():  # accelerate would train without it
        raise UserError("--deepspeed needs a GPU, and torch sees none: leave it out")
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(**{k: v for k, v in arguments.items() if k != MASTER_WEIGHTS})
    if plugin.deepspeed_config.get("zero_optimization", {}).get("stage") == 3:  # of accelerate's configuration
        raise UserError("DeepSpeed's configuration file asks for ZeRO stage 3: each save would lack weights; give 2")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size  # it sees no loader to take it from
    if arguments.get(MASTER_WEIGHTS):
        plugin.deepspeed_config.setdefault("fp16", {})[MASTER_WEIGHTS] = True
    return plugin


def accelerator_present() -> bool:
    """True when torch sees a GPU of any kind."""
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def is_card(device: torch.device) -> bool:
    """Whether `device` has memory of its own.

    Then torch counts what is taken of it, and copies to and from page-locked main memory go on while the host does
    other things.
    """
    return device.type in CARDS


def without_rounding(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in main memory, in `dtype` where that changes no number; else as it is."""
    own = tensor.detach().cpu()
    return own if dtype is None or not torch.equal(own.to(dtype).to(own.dtype), own) else own.to(dtype)


def exact_float(device: torch.device) -> torch.dtype:
    """The longest floating-point dtype that every device of this kind computes with."""
    return torch.float32 if device.type in ("mps", "xpu") else torch.float64


def indexed(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cuda", which accelerate gives a process that is alone, as "cuda:0"."""
    return torch.empty(0, device=device).device


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
    empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps some hundred MB otherwise


def empty_cache() -> None:
    """Give the memory that torch keeps for later back to the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a card, a library on it, or torch's allocator of main memory had no more memory to give."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def reason_of(error: BaseException) -> str:
    """Why memory ran out, or anything else: the first sentence of an error's text."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of main memory"
    return (str(error) or type(error).__name__).partition("\n")[0].partition(". ")[0].rstrip(".")


def fits(action: Callable[[], None]) -> bool:
    """Run `action`. False where memory ran out in it; by then, what it had taken is free again."""
    try:
        action()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    free_memory()  # outside of the except clause: the error's frames hold tensors
    return False


def free_bytes(device: torch.device) -> int:
    """Memory that this process could take on `device` now, with what it has taken and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type == "xpu" and "mem_get_info" in dir(torch.xpu):  # not in torch 2.6
        with contextlib.suppress(RuntimeError):  # some drivers do not say it
            free, _ = torch.xpu.mem_get_info(device)
            return free + torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
    memory = main_memory(System.here()) if device.type == "cpu" else None
    if memory is not None and memory.free is not None:
        return memory.free
    raise UserError("how much memory is free is not known on this system: give --vram_budget")


def limit_memory(device: torch.device, limit: int) -> None:
    """From now on a card refuses this process more than `limit` bytes, as a smaller card would."""
    if device.type == "cuda":
        device = indexed(device)  # torch refuses one without index here
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    elif device.type == "mps":
        torch.mps.set_per_process_memory_fraction(min(1.0, limit / torch.mps.recommended_max_memory()))
    elif device.type == "xpu" and "set_per_process_memory_fraction" in dir(torch.xpu):  # not in torch 2.6
        total = torch.xpu.get_device_properties(device).total_memory
        torch.xpu.set_per_process_memory_fraction(min(1.0, limit / total), device)


def forget_peak(device: torch.device) -> None:
    """`peak_bytes` of a card counts from now on."""
    torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took of a card's memory at any moment. The host does not wait."""
    return torch.get_device_module(device).max_memory_allocated(device)


class HostCopy:
    """A tensor on its way to the host. From a card it comes while the host goes on; from elsewhere it is there."""

    def __init__(self, tensor: Tensor) -> None:
        asynchronous = is_card(tensor.device)
        try:
            self._tensor = tensor.detach().to("cpu", non_blocking=asynchronous)
        except RuntimeError:  # the system refuses to lock the memory where torch would copy it to
            self._tensor, asynchronous = tensor.detach().to("cpu"), False
        self._arrival = torch.get_device_module(tensor.device).Event() if asynchronous else None
        if self._arrival is not None:
            self._arrival.record()

    @property
    def ready(self) -> bool:
        """Whether `value` has nothing to wait for."""
        return self._arrival is None or self._arrival.query()

    def value(self) -> Tensor:
        """The tensor on the host; waits for it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensor


def return_large_blocks() -> None:
    """From now on glibc gives memory of tensors above 256 kB back as soon as they are freed.

    For training on the CPU with little memory, where weights and activations share it: left to itself, glibc raises
    the size from which it does so to 32 MB and keeps what a step has used. It takes time: a fifth of a step.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 18)


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """After it, torch's default generators of the CPU and of `device` go on as if nothing had been drawn in it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        yield


def on_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`, without the host waiting for the device.

    CUDA copies by itself only from page-locked memory; from any other memory, the host waits until the copy is staged.
    So it does where the system refuses to lock this memory.
    """
    there = torch.device(device)
    has_contents = type(values) is Tensor  # not a FakeTensor of the planner, which cannot be pinned
    if there.type == "cuda" and values.device.type == "cpu" and has_contents and not values.is_pinned():
        with contextlib.suppress(RuntimeError):
            values = values.pin_memory()
    return values.to(there, non_blocking=True)


def seed_everything(seed: int) -> None:
    """torch's default generators on every device: what dropout draws from."""
    torch.manual_seed(seed)
