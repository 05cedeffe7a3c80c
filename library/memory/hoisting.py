# SPDX-License-Identifier: Apache-2.0
"""Modulation hoisting: the Linears that all blocks apply to the time embedding are computed at the start of a pass.

FLUX.1 and SD3 modulate each block by `linear(silu(temb))`: a quarter to a third of all weights, each used on one vector
per sample. As long as nothing before temb learns, the results are constants of the pass. Here these weights are kept in
main memory and go through two buffers on the device right after the embedder has computed temb. The outputs are kept,
and each Linear returns its own when its block calls it. Adapters on such a Linear see its real input and add to the
kept output, so they train as usual. Adapters that read its weight (DoRA, OFT ...) cannot be used: it is NaN by then.

    hoisting = Hoisting(embedder, linears, device, blocks=family.blocks(denoiser))
    hoisting.install()
    BlockSwap(..., without=hoisting.tensors)  # if blocks are swapped as well

On a CUDA device weights are copied on one stream and used on another, in parallel with the blocks that already run;
each block waits only for its own outputs. Recomputation uses the outputs of the latest pass with gradient, even when
passes without gradient have run since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.checkpointing import ReplacedForwards
from library.memory.host_image import HostImage, tensors_of
from library.memory.pinning import Pinning
from library.memory.ring import Ring
from library.memory.slots import SLOTS


class ModulationOutputs:
    """The outputs of one Linear in the latest pass with gradient and in the latest pass without."""

    def __init__(self) -> None:
        self.with_gradient: Tensor | None = None
        self.without: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Replaces the Linear's `forward`. It is a method, so that equal blocks share one compiled graph."""
        value = self.with_gradient if torch.is_grad_enabled() else self.without
        assert value is not None, "the embedder has not run"
        return value


class Hoisting:
    """Hoists `linears`, in the order of execution, whose input is the silu of the output of `embedder`.

    blocks: the modules that call them; without them, everything after the embedder waits for all outputs. pinning: the
    run's, shared by all its users.
    """

    ring_class: ClassVar[type[Ring]] = Ring

    def __init__(
        self,
        embedder: nn.Module,
        linears: Sequence[nn.Linear],
        device: torch.device,
        *,
        blocks: Sequence[nn.Module] = (),
        pinning: Pinning | None = None,
    ) -> None:
        self.embedder, self.linears, self.device = embedder, list(linears), torch.device(device)
        self.pinning = pinning or Pinning(self.device)
        self.tensors = [tensor for linear in linears for tensor in tensors_of(linear)]
        inside = {id(module): block for block in blocks for module in block.modules()}
        # block -> its last Linear
        self._last_of = {inside[id(m)]: i for i, m in enumerate(self.linears) if id(m) in inside}
        self._waits_in_blocks = all(id(linear) in inside for linear in linears)
        self._kept = [ModulationOutputs() for _ in self.linears]
        self._images: list[HostImage] = []
        self._ring: Ring | None = None
        self._forwards = ReplacedForwards([])  # of the Linears
        self._handles: list[Any] = []
        self._stream: torch.cuda.Stream | None = None
        self._ready: dict[int, torch.cuda.Event] = {}

    # ---- life -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Move the weights to main memory and replace the Linears. Raises ValueError when one of the weights learns."""
        if any(tensor.requires_grad for tensor in self.tensors):
            raise ValueError("modulation weights that learn cannot be hoisted")
        on_cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_cuda else None
        self._forwards = ReplacedForwards(self.linears)
        for index, (linear, kept) in enumerate(zip(self.linears, self._kept)):
            image = HostImage(tensors_of(linear), self.pinning)
            image.point(image.at_home)
            self._images.append(image)
            self._forwards.replace(index, kept.forward)
        self._ring = self.ring_class(self._images, self.device, min(SLOTS, len(self._images)))
        self._handles = [self.embedder.register_forward_hook(self._compute)]
        if on_cuda:
            self._handles += [block.register_forward_pre_hook(self._wait) for block in self._last_of]

    def remove(self) -> None:
        """Undo `install`: the weights become ordinary tensors in main memory, and the Linears compute again."""
        self.home()
        for handle in self._handles:
            handle.remove()
        self._forwards.undo()
        for image in self._images:
            image.release()
        self._handles, self._images, self._ring = [], [], None
        self._kept = [ModulationOutputs() for _ in self.linears]

    def home(self) -> None:
        """Point every weight to its image, to read or write it. Waits for the device; the next pass goes on."""
        self.ring.vacate_all(lambda index: False)
        for image in self._images:
            image.point(image.at_home)

    @property
    def ring(self) -> Ring:
        """The buffers on the device."""
        assert self._ring is not None, "not installed"
        return self._ring

    # ---- a pass -----------------------------------------------------------------------------------------------------

    def _compute(self, embedder: nn.Module, args: Any, embedding: Tensor) -> None:
        """Compute all outputs for this embedding (B, width). Raises ValueError when it requires a gradient."""
        if embedding.requires_grad:
            raise ValueError("something learns before the modulations, so they cannot be hoisted")
        with_gradient = torch.is_grad_enabled()
        if self._stream is None:
            self._answer(embedding, with_gradient)
            return
        stream, current = self._stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        embedding.record_stream(stream)
        with torch.cuda.stream(stream):
            values = self._answer(embedding, with_gradient)
        for value in values:  # made on one stream and used on the other: the allocator must not reuse it too early
            value.record_stream(current)
        if not self._waits_in_blocks:
            current.wait_stream(stream)

    @torch.no_grad()
    def _answer(self, embedding: Tensor, with_gradient: bool) -> list[Tensor]:
        x, count, values = F.silu(embedding), len(self.linears), []
        last = set(self._last_of.values())
        for index, (own, kept) in enumerate(zip(self._forwards.before, self._kept)):
            self.ring.arrange([index, *([(index + 1) % count] if count > 1 else [])], lambda leaving: False)
            self.ring.use(index)
            value = own(x)
            if with_gradient:
                kept.with_gradient = value
            else:
                kept.without = value
            values.append(value)
            if self._stream is not None and index in last:
                self._ready[index] = self._stream.record_event()
        return values

    def _wait(self, block: nn.Module, args: Any) -> None:
        """Before a block: let the computation wait for its outputs."""
        torch.cuda.current_stream(self.device).wait_event(self._ready[self._last_of[block]])
