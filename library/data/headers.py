# SPDX-License-Identifier: Apache-2.0
"""Size, alpha channel and orientation of a picture from its first few bytes, and whether the file is whole.

png, jpeg, webp and bmp are read here, without decoding: a few KB of the start, a few bytes of the end. Everything else,
and all that looks odd, is decoded once by PIL. Sources: PNG specification (third edition) 5 and 11.3; ITU T.81 B.1;
WebP container specification; EXIF 2.32 4.6 (orientation, tag 0x0112).
"""

from __future__ import annotations

import io
import os
import re
import struct
from typing import NamedTuple

from PIL import Image

from library.data.images import ALPHA_MODES, DAMAGED, register_reader
from library.errors import UserError

HEAD_BYTES = 4096
MAX_SIDE = 65535
MAX_PIXELS = 2 * (1 << 30) // 12  # 179 million, what PIL agrees to decode

ALPHA = 1  # flag: the picture has an alpha channel or a transparent colour
TURNED = 2  # flag: EXIF orientation other than 1; sd-scripts' caches, which ignore it, then belong to another picture


class Header(NamedTuple):
    """What a file says of itself. width and height are after EXIF orientation; problem is "" for a good file."""

    width: int
    height: int
    flags: int = 0
    problem: str = ""


class _Source:
    """Random access to a file whose first bytes are in memory."""

    def __init__(self, handle: int, head: bytes, size: int) -> None:
        self.handle, self.head, self.size = handle, head, size

    def at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer at the end of the file."""
        if offset + count <= len(self.head) or len(self.head) >= self.size:
            return self.head[offset : offset + count]
        os.lseek(self.handle, offset, os.SEEK_SET)
        return os.read(self.handle, count)

    def tail(self, count: int) -> bytes:
        if len(self.head) >= self.size:
            return self.head[-count:]
        return self.at(max(self.size - count, 0), count)


def read_header(path: str, handle: int, size: int) -> Header:
    """The header of the picture file `path` of `size` bytes, just opened as `handle`. What is wrong with the picture
    stands in `problem`. Raises OSError when the file cannot be read."""
    return _read(path, _Source(handle, os.read(handle, HEAD_BYTES), size), path)


def header_of(path: str, data: bytes) -> Header:
    """The same for a picture in memory, all bytes of which are `data`."""
    return _read(path, _Source(-1, data, len(data)), io.BytesIO(data))


def _read(path: str, source: _Source, file: str | io.BytesIO) -> Header:
    """file: what PIL opens where the format is not read here."""
    if source.size == 0:
        return _broken("is empty (0 bytes)")
    try:
        parse = _PARSERS.get(source.head[:2])
        found = parse(source) if parse else None
    except (IndexError, struct.error):
        found = None  # the file ended inside its header; PIL says what is wrong with it
    if found is None or (not found.problem and (found.width < 1 or found.height < 1)):
        found = _decode(path, source.head, file)
    return _checked(found)


def _broken(problem: str) -> Header:
    return Header(0, 0, 0, problem)


def _checked(header: Header) -> Header:
    width, height, _, problem = header
    if problem or (width <= MAX_SIDE and height <= MAX_SIDE and width * height <= MAX_PIXELS):
        return header
    return header._replace(
        problem=f"is {width}x{height} pixels: more than {MAX_SIDE:,} on a side or {MAX_PIXELS:,} in all"
    )


def _upright(width: int, height: int, orientation: int, alpha: bool) -> Header:
    """Orientations 5 to 8 swap the sides."""
    flags = (ALPHA if alpha else 0) | (TURNED if orientation != 1 else 0)
    return Header(height, width, flags) if orientation >= 5 else Header(width, height, flags)


# ---- orientation --------------------------------------------------------------------------------------------------

_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")


def _exif_orientation(tiff: bytes) -> int | None:
    """Tag 0x0112 of the first directory of a TIFF block; None when it is not there or the block is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for offset in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, offset)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def _xmp_orientation(packet: bytes) -> int | None:
    found = _XMP_ORIENTATION.search(packet)
    value = int(found[1]) if found else 0
    return value if 1 <= value <= 8 else None


# ---- formats: a parser returns None where it is not sure, and PIL decodes the file ----------------------------------

# Marker, length and, in a frame header, precision, height and width: one call is quicker than picking out the bytes
_JPEG_SEGMENT = struct.Struct(">HHBHH")
_JPEG_APP1 = 0xFFE1  # Exif or XMP
_JPEG_FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
_JPEG_OTHERS = frozenset({0xFFC4, 0xFFC8, 0xFFCC, *range(0xFFDB, 0xFFFF)}) - {_JPEG_APP1}


def _jpeg(source: _Source) -> Header | None:
    """Segments up to the frame header; the file must end with the end-of-image marker."""
    position = 2
    exif = xmp = None
    head, inside = source.head, len(source.head) - _JPEG_SEGMENT.size
    while True:
        if position <= inside:
            marker, length, _, height, width = _JPEG_SEGMENT.unpack_from(head, position)
        else:
            marker, length, _, height, width = _JPEG_SEGMENT.unpack(source.at(position, _JPEG_SEGMENT.size))
        if marker in _JPEG_FRAMES:
            break
        if marker == _JPEG_APP1:
            data = source.at(position + 4, length - 2)
            if data[:6] == b"Exif\0\0":
                exif = exif or _exif_orientation(data[6:])
            elif data[:5] == b"http:":
                xmp = xmp or _xmp_orientation(data)
        elif marker not in _JPEG_OTHERS:
            return None  # fill bytes, or a scan before the frame: legal or damaged, PIL knows
        position += 2 + length
    if source.tail(2) != b"\xff\xd9":
        return None
    return _upright(width, height, exif or xmp or 1, False)


def _png(source: _Source) -> Header | None:
    """Chunks up to the pixels, then the last one; the rest is walked only when the file does not end with IEND."""
    head = source.head
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        return None
    width, height, _, colour = struct.unpack_from(">IIBB", head, 16)
    alpha = colour in (4, 6)
    exif = xmp = None
    position, kind = 33, b""
    while kind != b"IDAT":
        length, kind = struct.unpack(">I4s", source.at(position, 8))
        if kind == b"tRNS":
            alpha = True
        elif kind == b"eXIf":
            exif = _exif_orientation(source.at(position + 8, length))
        elif kind in (b"iTXt", b"tEXt", b"zTXt") and source.at(position + 8, 20) == b"Raw profile type exi":
            return None
        elif kind == b"iTXt" and source.at(position + 8, 17) == b"XML:com.adobe.xmp":
            xmp = _xmp_orientation(source.at(position + 8, length))
        position += 12 + length
    end = source.tail(2048)
    if end[-8:-4] != b"IEND" or b"eXIf" in end or b"XML:com.adobe.xmp" in end:
        return None
    return _upright(width, height, exif or xmp or 1, alpha)


def _webp(source: _Source) -> Header | None:
    """RIFF chunks. The RIFF header says how long the file must be."""
    head = source.head
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if source.size < int.from_bytes(head[4:8], "little") + 8:
        return _broken("is truncated")
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return Header(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bits >> 28 & 1)
    if kind != b"VP8X":
        return None
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    orientation = _webp_orientation(source) if head[20] & 0x0C else 1
    return _upright(width, height, orientation, bool(head[20] & 0x10))


def _webp_orientation(source: _Source) -> int:
    position, exif, xmp = 12, None, None
    while position + 8 <= source.size:
        kind, length = struct.unpack("<4sI", source.at(position, 8))
        if kind == b"EXIF":
            data = source.at(position + 8, length)
            exif = _exif_orientation(data.removeprefix(b"Exif\0\0"))
        elif kind == b"XMP ":
            xmp = _xmp_orientation(source.at(position + 8, length))
        position += 8 + length + (length & 1)
    return exif or xmp or 1


def _bmp(source: _Source) -> Header | None:
    """Uncompressed Windows bitmaps; the size of the pixels follows from the header."""
    head = source.head
    offset, info = struct.unpack_from("<II", head, 10)
    if info < 40:
        return None
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", head, 18)
    if width < 1 or height == 0 or compression not in (0, 3):
        return None
    if source.size < offset + (width * bits + 31) // 32 * 4 * abs(height):
        return _broken("is truncated")
    alpha = bits == 32 and compression == 3 and info >= 56 and head[66:70] != b"\0\0\0\0"
    return Header(width, abs(height), ALPHA if alpha else 0)


_PARSERS = {b"\xff\xd8": _jpeg, b"\x89P": _png, b"RI": _webp, b"BM": _bmp}


# ---- everything else ----------------------------------------------------------------------------------------------


def _decode(path: str, head: bytes, file: str | io.BytesIO) -> Header:
    """The header as PIL reads it, which decodes the whole picture."""
    try:
        register_reader(path)
        with Image.open(file) as image:
            width, height = image.size
            orientation = _pil_orientation(image)
            alpha = image.mode in ALPHA_MODES or "transparency" in image.info
            header = _upright(width, height, orientation, alpha)
            if not _checked(header).problem:
                image.load()
            return header
    except UserError as error:
        return _broken(error.problems[0].removeprefix(f"{path}: "))
    except Image.UnidentifiedImageError:
        if head.startswith(b"version https://git-lfs"):
            return _broken("is a Git LFS pointer, not the picture: run git lfs pull")
        return _broken(f"is not a picture (it begins with {head[:12]!r})")
    except Image.DecompressionBombError:
        return _broken(f"is of absurd size: more than {MAX_PIXELS:,} pixels")
    except DAMAGED as error:
        return _broken(
            f"is truncated or damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        )


def _pil_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except DAMAGED:
        return 1  # a damaged EXIF block does not damage the picture
    return value if value in range(1, 9) else 1
