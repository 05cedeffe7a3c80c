# SPDX-License-Identifier: Apache-2.0
"""What says that memory ran out, in the words of those who say it, and what is done then."""

from __future__ import annotations

import gc
import logging
import os
import weakref

import pytest
import torch

from library.device import fits, is_out_of_memory, overridden, reason_of
from library.errors import UserError

RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("CUDA driver error: cudaErrorMemoryAllocation"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.84 GB, max allowed: 18.13 GB). Tried to allocate 1 GB"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9"
    ),
    MemoryError(),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    UserError("out of memory in step 3"),  # said already
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert reason_of(error) and "\n" not in reason_of(error) and "enforce fail" not in reason_of(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_something_else_went_wrong(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        fits(lambda: (_ for _ in ()).throw(error))


def test_a_request_that_no_machine_can_meet() -> None:
    """torch's own error; what was there before it is free afterwards."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def action() -> None:
        tensor = torch.zeros(8)
        kept.append(weakref.ref(tensor))
        torch.empty(1 << 60, dtype=torch.uint8)

    gc.disable()
    try:
        assert not fits(action)
    finally:
        gc.enable()
    assert kept[0]() is None
    assert fits(lambda: None)


def test_settings_of_the_launcher_that_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    assert list(overridden("bf16")) == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert list(overridden("bf16")) == []
    ((level, line),) = overridden("no")
    assert level == logging.WARNING and "no is used, not accelerate's bf16; give --mixed_precision bf16" in line
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate says when nothing is asked for
    assert list(overridden("bf16")) == [(logging.INFO, "mixed precision: bf16 is used, not accelerate's no")]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    lines = [line for _, line in overridden("no")]
    assert lines == [
        "accelerate's gradient_accumulation_steps 4 is not used: give --gradient_accumulation_steps to the script",
        "accelerate's gradient_clipping 0.5 is not used: give --max_grad_norm to the script",
        "accelerate's dynamo_backend INDUCTOR is not used: give --compile to the script",
    ]
