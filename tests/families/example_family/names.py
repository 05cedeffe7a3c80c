# SPDX-License-Identifier: Apache-2.0
"""Weight names of the example: published names, where q, k and v are one layer, and those of our module."""

from __future__ import annotations

from library.key_tables import ModuleName, named, repeated

OUTSIDE = tuple(named(name, name) for name in ("example_embedder", "text_embedder", "time_embedder", "out"))
BLOCK = (
    named("blocks.{i}.qkv", "blocks.{i}.to_q", "blocks.{i}.to_k", "blocks.{i}.to_v"),
    named("blocks.{i}.proj", "blocks.{i}.to_out"),
    *(named(f"blocks.{{i}}.{name}", f"blocks.{{i}}.{name}") for name in ("mlp.0", "mlp.2", "scale", "norm1", "norm2")),
)


def example_names(blocks: int) -> list[ModuleName]:
    """The table for so many blocks."""
    return [*repeated(blocks, BLOCK), *OUTSIDE]
