# SPDX-License-Identifier: Apache-2.0
r"""Encode the pictures of a training run before it, into the cache on disk that the run will use.

    accelerate launch tools/cache_latents.py --flux --config_file flux_lora.toml
    python tools/cache_latents.py --sdxl --dataset_config dataset.toml --mixed_precision bf16 \
        --pretrained_model_name_or_path model.safetensors

Give the options of the training, which is then started with --cache_latents_to_disk. Several processes share the work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.log import get_logger  # noqa: E402
from tools import caching  # noqa: E402

log = get_logger()


def fill(run: caching.CacheRun) -> None:
    """Encode the missing latents. The VAE is loaded only if there are any."""
    latents = run.caches.latents
    assert latents is not None
    jobs = run.caches.latent_jobs()
    own = len(latents.missing(jobs))
    missing = run.in_all(own)
    log.info(f"{len(jobs)} latents are needed, {len(jobs) - missing} of them are there")
    if own:
        run.caches.fill_latents(run.family.load_vae(run.dtype, run.device))
    log.info("done: train with --cache_latents_to_disk and the same --mixed_precision")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    cached = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": False}
    return caching.run(argv, fill, "cache_latents.py", __doc__ or "", **cached)


if __name__ == "__main__":
    sys.exit(main())
