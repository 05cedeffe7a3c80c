# SPDX-License-Identifier: Apache-2.0
"""--debug_dataset: instead of training, write what it would see as picture sheets and captions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from library.data.dataset import TrainingData
from library.io.atomic import atomic_write
from library.log import get_logger
from library.sampling.preview import contact_sheet, to_image
from library.types import Batch

BATCHES_PER_SHEET = 4
SHEETS = 4

log = get_logger()


def write_dataset_sheets(data: TrainingData, folder: Path) -> list[Path]:
    """The first batches of each stage: `debug_dataset_000.png` ... and `debug_dataset.txt`, one line per sample."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = len(data.shares)
    each = -(-BATCHES_PER_SHEET * SHEETS // stages)  # the same number of batches of every resolution
    plans = [plan for stage in range(stages) for plan in data.plan_epoch(1, stage=stage)[:each]]
    lines: list[str] = []
    written: list[Path] = []
    for start in range(0, len(plans), BATCHES_PER_SHEET):
        batches = [data.load(plan, step=0) for plan in plans[start : start + BATCHES_PER_SHEET]]
        pictures = [picture for batch in batches for picture in batch_pictures(batch)]
        labels = [caption for batch in batches for caption in batch.captions]
        path = folder / f"debug_dataset_{start // BATCHES_PER_SHEET:03d}.png"
        sheet = contact_sheet(pictures, labels, columns=min(6, len(pictures)))
        atomic_write(path, partial(sheet.save, format="PNG"))
        written.append(path)
        lines += [f"{name}\t{caption}" for batch in batches for name, caption in zip(batch.names, batch.captions)]
    text = "\n".join(lines) + "\n"
    atomic_write(
        folder / "debug_dataset.txt",
        lambda temp: temp.write_text(text, encoding="utf-8", errors="backslashreplace"),
    )
    log.info(f"--debug_dataset: wrote {len(written)} sheets and debug_dataset.txt to {folder}; nothing was trained")
    return written


def batch_pictures(batch: Batch) -> list[Image.Image]:
    """The pictures of a batch, darkened where the mask excludes them from the loss."""
    assert batch.pixels is not None
    masks: list[Tensor | None] = list(batch.masks) if batch.masks is not None else [None] * batch.size
    return [to_image(_darkened(pixels, mask)) for pixels, mask in zip(batch.pixels, masks)]


def _darkened(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """Darken pixels (3 H W in [-1, 1]) where the mask (1 H W in [0, 1]) is low."""
    return pixels if mask is None else (pixels + 1) * (0.25 + 0.75 * mask) - 1
