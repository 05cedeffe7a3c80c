# SPDX-License-Identifier: Apache-2.0
"""Cache of text encoder outputs, keyed by the caption, the weights of the encoder, and the content of the reference
pictures that the encoder looks at.

Equal captions are stored once, without padding. Editing a caption or picture, or using another encoder, changes the
key. Each encoder has its own cache: only encoders with something left to encode are loaded, one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from library.data.caches.latent_cache import sample_state
from library.data.caches.share import ALL, Share
from library.data.caches.store import MemoryStore, PackedStore, TensorStore
from library.data.caches.store_index import megabytes
from library.data.caches.store_writer import StoreWriter
from library.data.encoding import Text
from library.data.file_hashes import FileHashes
from library.errors import UserError, first_names
from library.log import get_logger, progress
from library.types import Cond

FORMAT = "texts-1"
WINDOW = 100_000  # texts that are in memory at once
log = get_logger()

EncodeTexts = Callable[[list[Text]], list[Cond]]  # one unpadded Cond per text


def text_store(folder: str | None, share: Share = ALL) -> TensorStore:
    """The store in `folder`; None: in memory."""
    return MemoryStore() if folder is None else PackedStore(folder, share)


class TextCache:
    """Cached outputs of one text encoder; a `TextSource`.

    fingerprint: digest of the encoder's weights. settings: everything else that determines its output (tokenizer,
    clip_skip, max_token_length ...), as text. dtype: of the stored floating-point outputs; others keep theirs.
    skip_check: trust the index of the store. sees_references: the encoder looks at the pictures of a text.
    """

    def __init__(
        self, store: TensorStore, *, fingerprint: str, settings: str, dtype: torch.dtype, skip_check: bool = False,
        sees_references: bool = False,
    ) -> None:  # fmt: skip
        self.store, self.fingerprint, self.settings, self.dtype = store, fingerprint, settings, dtype
        self.skip_check, self.sees_references = skip_check, sees_references
        self.hashes = FileHashes(store, trust=skip_check)

    def get(self, text: Text) -> Cond:
        """The unpadded outputs for a text. Raises UserError if they are missing."""
        try:
            return self.store.get(self._key(text))
        except KeyError:
            reason = "its cached outputs are missing or damaged; start the run again and it is encoded again"
            raise UserError(f"caption '{text.caption}': {reason}") from None

    def missing(self, texts: Iterable[Text]) -> list[Text]:
        """The texts that must be encoded, each once. If there are none, the text encoder need not be loaded."""
        return [text for window in _windows(texts) for text in self._missing_in(window, quick=self.skip_check)]

    def is_missing_any(self, texts: Iterable[Text]) -> bool:
        """Whether `missing` would return any."""
        return any(self._missing_in(window, quick=self.skip_check) for window in _windows(texts))

    def lacking(self, texts: Iterable[Text], *, quick: bool = True) -> tuple[int, int]:
        """(texts without a record, total). quick: look at the index only."""
        counts = [(len(self._missing_in(window, quick=quick)), len(window)) for window in _windows(texts)]
        return sum(lacks for lacks, _ in counts), sum(count for _, count in counts)

    def _missing_in(self, texts: Iterable[Text], *, quick: bool) -> list[Text]:
        keys = {self._key(text): text for text in texts}
        self.hashes.save()
        found = self.store.check(keys, quick=quick)
        damaged = [repr(text.caption) for key, text in keys.items() if key in found.damaged]
        if damaged:
            log.warning(f"{len(damaged)} cached captions are damaged and encoded again: {first_names(damaged)}")
        return [text for key, text in keys.items() if key in found.missing]

    def fill(self, texts: Iterable[Text], encode: EncodeTexts, *, batch_size: int) -> int:
        """Encode what is missing, captions of similar length together, and return the number of texts encoded.

        texts: this process's share. It is iterated several times, so that millions of texts need not be in memory. Wait
        for all processes before reading. Raises UserError naming captions whose outputs are not finite, and for a full
        disk.
        """
        count = 0
        for window in _windows(texts):
            todo = self._missing_in(window, quick=self.skip_check)
            todo.sort(key=lambda text: (len(text.caption), text.order))
            if not todo:
                continue
            batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
            with StoreWriter() as writer, progress(len(todo), "caching captions") as bar:
                if not count:  # those in the middle are of usual length
                    middle = batches.pop(len(batches) // 2)
                    size = self._encode(middle, encode, writer, bar) / len(middle)
                    self._announce(size, texts, window, len(todo))
                for batch in batches:
                    self._encode(batch, encode, writer, bar)
            count += len(todo)
        return count

    def _encode(self, batch: list[Text], encode: EncodeTexts, writer: StoreWriter, bar: progress) -> int:
        """Encode a batch and hand it to the writer. Returns its size in bytes."""
        size = 0
        for text, cond in zip(batch, encode(batch), strict=True):
            record = self._record(text.caption, cond)
            writer.put(self.store, self._key(text), record)
            size += sum(tensor.nbytes for tensor in record.values())
        bar.advance(len(batch))
        return size

    def _announce(self, size: float, texts: Iterable[Text], window: Sequence[Text], missing: int) -> None:
        """Log how much will be written. size: bytes per text. missing: number of texts to encode in the first `window`.

        Raises UserError if the disk has less free.
        """
        all_texts = len(window) if len(window) < WINDOW else sum(1 for _ in texts)
        wanted = round(missing / len(window) * all_texts) * self.store.share.world
        total = f"{wanted * size / 1e9:,.1f} GB" if wanted * size >= 1e9 else megabytes(round(wanted * size))
        log.info(f"{self.settings}: about {wanted} texts are encoded and take {total}")
        self.store.require_space(round(wanted * size / self.store.share.world))

    def close(self) -> None:
        """Close the files; they are reopened on use."""
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


def _windows(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """The texts in lists of WINDOW (the last one shorter), each without duplicates."""
    window: dict[Text, None] = {}
    for text in texts:
        window[text] = None
        if len(window) == WINDOW:
            yield list(window)
            window = {}
    if window:
        yield list(window)


class TextCaches:
    """The caches of several encoders; a `TextSource` that merges their outputs for a text."""

    def __init__(self, parts: Mapping[str, TextCache]) -> None:
        self.parts = dict(parts)

    def get(self, text: Text) -> Cond:
        """The unpadded outputs for a text. Raises UserError if they are missing."""
        cond: Cond = {}
        for part in self.parts.values():
            cond |= part.get(text)
        return cond

    def close(self) -> None:
        """Close the files; they are reopened on use."""
        for part in self.parts.values():
            part.close()
