# SPDX-License-Identifier: Apache-2.0
r"""Encode the captions of a training run before it, into the cache on disk that the run will use.

    accelerate launch tools/cache_text_encoder_outputs.py --flux --config_file flux_lora.toml
    python tools/cache_text_encoder_outputs.py --sd3 --dataset_config dataset.toml --mixed_precision bf16 \
        --pretrained_model_name_or_path sd3.5_medium.safetensors --clip_l clip_l.safetensors \
        --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors --cache_dir cache

Give the options of the training, which is then started with --cache_text_encoder_outputs_to_disk. Prompts of
--sample_prompts are encoded too. Text encoders are loaded one after the other; several processes share the work.
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
    """Encode the missing captions. A text encoder is loaded only if it has any."""
    from library.device import free_memory

    caches = run.caches
    assert caches.texts is not None
    own = {name: part.lacking(caches.wanted(name), quick=part.skip_check) for name, part in caches.texts.parts.items()}
    for name, (missing, needed) in own.items():
        there = run.in_all(needed) - run.in_all(missing)
        log.info(f"{name}: {run.in_all(needed)} texts are needed, {there} of them are there")
    for name, (missing, _) in own.items():
        if missing:
            encoder = run.family.load_text_encoder(name, run.dtype, run.device, storage="half")
            caches.fill_texts(name, encoder)
            del encoder
            free_memory()
    log.info("done: train with --cache_text_encoder_outputs_to_disk and the same --mixed_precision")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    cached = {"cache_latents_to_disk": False, "cache_text_encoder_outputs_to_disk": True}
    return caching.run(argv, fill, "cache_text_encoder_outputs.py", __doc__ or "", **cached)


if __name__ == "__main__":
    sys.exit(main())
