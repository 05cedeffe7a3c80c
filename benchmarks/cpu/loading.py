# SPDX-License-Identifier: Apache-2.0
"""Loading a denoiser from a file: seconds and peak memory of four ways, and of quantising while loading.

    python tools/make_random_checkpoint.py --version 1 --layout both --output /tmp/sd15
    python tools/make_random_flux.py --double 1 --single 1 --t5_layers 1 --output /tmp/flux
    python benchmarks/cpu/loading.py --sd /tmp/sd15 --flux /tmp/flux

The U-Net of SD 1.5 in float16 (1.72 GB), and optionally a FLUX.1 of real width with few blocks in bfloat16. Every way
ends with a module in bfloat16 (quantised: its block matrices in fewer bits) whose numbers have all been read once, so
that a mapped file counts. Imports do not count. Each figure comes from a process of its own, the file is in the page
cache. "anonymous" is memory that the process has allocated, at its highest, above what it had before loading;
"resident" includes the mapped file, which the system can drop; "kept" is what is still allocated at the end. GB are
10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import GB, host_line, markdown, measure, quartiles

SAMPLE_SECONDS = 0.002
FIGURES = ("wall s", "CPU s", "anonymous GB", "resident GB", "kept GB")
STORAGES = {"quantised to fp8": "fp8", "quantised to int8": "int8", "quantised to nf4": "nf4"}
UNET_WAYS = ("initialised, then load_state_dict", "diffusers from_pretrained", "diffusers from_single_file")
OUR_WAYS = ("ours", *STORAGES)


# ---- one way, in a process of its own -------------------------------------------------------------------------------


def status(*names: str) -> list[int]:
    """Bytes of these lines of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return [1024 * int(lines[name].split()[0]) for name in names]


class Sampler(threading.Thread):
    """Watches the process's allocated and resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks, self._ended = [0, 0], threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.look()

    def look(self) -> None:
        self.peaks = [max(pair) for pair in zip(self.peaks, status("RssAnon", "VmRSS"))]

    def finish(self) -> list[int]:
        self._ended.set()
        self.join()
        self.look()
        return self.peaks


def measured(load: Callable[[], Any]) -> dict[str, float]:
    """FIGURES of one way."""
    import torch

    before = status("RssAnon", "VmRSS")
    sampler = Sampler()
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    module = load()
    with torch.no_grad():
        for tensor in module.state_dict().values():  # what was mapped is read now
            tensor.reshape(-1).view(torch.uint8)[::4096].sum()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peaks = sampler.finish()
    kept = status("RssAnon")[0] - before[0]
    values = (wall, cpu, *((peak - start) / GB for peak, start in zip(peaks, before)), kept / GB)
    return dict(zip(FIGURES, values))


def unet_loader(way: str, folder: Path) -> Callable[[], Any]:
    """How a way makes the U-Net of SD 1.5. Its imports are done here."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    from library.families.sd.parts import open_parts

    model: Any = UNet2DConditionModel
    unet, single = folder / "diffusers" / "unet", folder / "model.safetensors"

    def naive() -> Any:
        module = model.from_config(model.load_config(unet))
        module.load_state_dict(load_file(unet / "diffusion_pytorch_model.safetensors"))
        return module.to(torch.bfloat16)

    ways = {
        UNET_WAYS[0]: naive,
        UNET_WAYS[1]: lambda: model.from_pretrained(unet, torch_dtype=torch.bfloat16),
        UNET_WAYS[2]: lambda: model.from_single_file(
            str(single), config=str(folder / "diffusers"), subfolder="unet", torch_dtype=torch.bfloat16
        ),
    }
    return ways.get(way) or our_loader(way, lambda: open_parts(single, version=1, vae=None).unet)


def flux_loader(way: str, folder: Path) -> Callable[[], Any]:
    """The same of FLUX.1."""
    import torch
    from diffusers import FluxTransformer2DModel  # noqa: F401  # imports do not count
    from safetensors.torch import load_file

    from library.families.flux.parts import FLUX, open_denoiser
    from library.key_tables import read

    part = open_denoiser(folder / "flux.safetensors", FLUX)[0]

    def naive() -> Any:
        module = part.build()
        tensors = load_file(part.file.path)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        ours, wrong = read(tensors.__getitem__, part.file.shapes, part.rules(module), shapes, "")
        assert not wrong
        module.load_state_dict(ours)
        return module.to(torch.bfloat16)

    return naive if way == UNET_WAYS[0] else our_loader(way, lambda: part)


def our_loader(way: str, part: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    storage = STORAGES.get(way, "plain")
    if storage in ("int8", "nf4"):
        import bitsandbytes  # noqa: F401  # imports do not count
    return lambda: part().load(torch.bfloat16, "cpu", storage=storage)


LOADERS = {"unet": unet_loader, "flux": flux_loader}


# ---- all ways -------------------------------------------------------------------------------------------------------


def row(kind: str, folder: Path, way: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--kind", kind, "--folder", str(folder)]
    return json.loads(measure(command, threads).output.splitlines()[-1])


def table(kind: str, folder: Path, ways: Sequence[str], settings: argparse.Namespace) -> str:
    """Medians over the rounds, in which the ways alternate."""
    for path in folder.rglob("*.safetensors"):  # into the page cache
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}

    for _ in range(settings.rounds):
        for way in ways:
            found[way].append(row(kind, folder, way, settings.threads))
    cells = lambda rows: [f"{quartiles([r[name] for r in rows])[1]:.2f}" for name in FIGURES]
    return markdown((f"{kind}, {settings.rounds} round(s)", *FIGURES), [(way, *cells(found[way])) for way in ways])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", type=Path, help="folder that tools/make_random_checkpoint.py wrote, both layouts")
    parser.add_argument("--flux", type=Path, help="folder that tools/make_random_flux.py wrote")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    for name in ("way", "kind", "folder"):  # of one process
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.way:
        print(json.dumps(measured(LOADERS[settings.kind](settings.way, Path(settings.folder)))))
        return
    if not settings.sd and not settings.flux:
        parser.error("give --sd, --flux or both")
    print(host_line(), "\n")
    if settings.sd:
        print(table("unet", settings.sd, (*UNET_WAYS, *OUR_WAYS), settings), "\n", flush=True)
    if settings.flux:
        print(table("flux", settings.flux, (UNET_WAYS[0], *OUR_WAYS), settings))


if __name__ == "__main__":
    main()
