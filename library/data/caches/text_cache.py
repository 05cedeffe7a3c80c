# SPDX-License-Identifier: Apache-2.0
"""Outputs of text encoders that are computed once: keyed by the caption and the weights of the encoder, and by the
content of the reference pictures that the encoder looks at.

Equal captions are kept once, without padding. An edited caption or picture or another encoder changes the key. Each
encoder has a cache of its own: only those with something left to encode are loaded, one after the other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from library.data.caches.latent_cache import sample_state
from library.data.caches.store import MemoryStore, PackedStore, TensorStore
from library.data.caches.store_writer import StoreWriter
from library.data.encoding import Text
from library.data.file_hashes import FileHashes
from library.errors import UserError, first_names
from library.log import get_logger, progress
from library.types import Cond

FORMAT = "texts-1"
log = get_logger()

EncodeTexts = Callable[[list[Text]], list[Cond]]  # one unpadded Cond per text


def text_store(cache_dir: str | None) -> TensorStore:
    """The store in `cache_dir`, or in memory where there is none."""
    return MemoryStore() if cache_dir is None else PackedStore(os.path.join(cache_dir, "texts"))


class TextCache:
    """Cached outputs of one text encoder; a `TextSource`.

    fingerprint: digest of the encoder's weights. settings: whatever else decides what it gives (tokenizer, clip_skip,
    max_token_length ...), as text. dtype: of the floating-point outputs that are kept; others stay as they are.
    skip_check: the index of the store is trusted. sees_references: the encoder looks at the pictures of a text.
    """

    def __init__(
        self, store: TensorStore, *, fingerprint: str, settings: str, dtype: torch.dtype, skip_check: bool = False,
        sees_references: bool = False,
    ) -> None:  # fmt: skip
        self.store, self.fingerprint, self.settings, self.dtype = store, fingerprint, settings, dtype
        self.skip_check, self.sees_references = skip_check, sees_references
        self.hashes = FileHashes(store, trust=skip_check)

    def get(self, text: Text) -> Cond:
        """The unpadded outputs for a text. Raises UserError when they are not there."""
        try:
            return self.store.get(self._key(text))
        except KeyError:
            reason = "its cached outputs are missing or damaged; start the run again and it is encoded again"
            raise UserError(f"caption '{text.caption}': {reason}") from None

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts that have to be encoded, once each: when there are none, no text encoder need be loaded."""
        keys = {self._key(text): text for text in texts}
        self.hashes.save()
        found = self.store.check(keys, quick=self.skip_check)
        damaged = [repr(text.caption) for key, text in keys.items() if key in found.damaged]
        if damaged:
            log.warning(f"{len(damaged)} cached captions are damaged and encoded again: {first_names(damaged)}")
        return [text for key, text in keys.items() if key in found.missing]

    def fill(
        self,
        texts: Iterable[Text],
        encode: EncodeTexts,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> int:
        """Encode what is missing, captions of similar length together; returns how many were.

        With several ranks each encodes its share of what goes to disk; call it on all ranks and wait for all before
        reading. Raises UserError naming captions whose outputs are not finite, or when there is no space.
        """
        share = sorted(set(texts), key=lambda text: text.order)
        todo = self.missing(share[rank::world] if self.store.shared else share)
        todo.sort(key=lambda text: (len(text.caption), text.order))
        if not todo:
            return 0
        with StoreWriter() as writer, progress(len(todo), "caching captions") as bar:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                for text, cond in zip(batch, encode(batch), strict=True):
                    writer.put(self.store, self._key(text), self._record(text.caption, cond))
                bar.advance(len(batch))
        return len(todo)

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        self.store.close()

    def _record(self, caption: str, cond: Cond) -> Cond:
        record: dict[str, Tensor] = {}
        for name, tensor in cond.items():
            tensor = tensor.detach()
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
                if not torch.isfinite(tensor).all():
                    raise UserError(f"caption '{caption}': the text encoder gives values that are not finite ({name})")
            record[name] = tensor.to("cpu")
        return record

    def _key(self, text: Text) -> bytes:
        parts = [FORMAT, self.fingerprint, self.settings, str(self.dtype), text.caption]
        for job in text.references if self.sees_references else ():
            parts += [str(job.bucket), self.hashes.digest(sample_state(job.sample)).hex()]
        return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=20).digest()


class TextCaches:
    """The caches of several encoders side by side; a `TextSource` that gives what all of them have for a text."""

    def __init__(self, parts: Mapping[str, TextCache]) -> None:
        self.parts = dict(parts)

    def get(self, text: Text) -> Cond:
        """The unpadded outputs for a text. Raises UserError when they are not there."""
        cond: Cond = {}
        for part in self.parts.values():
            cond |= part.get(text)
        return cond

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        for part in self.parts.values():
            part.close()
