# SPDX-License-Identifier: Apache-2.0
r"""Print what a LoRA or model file says about itself. Only the header is read, whatever the size of the file.

python tools/show_metadata.py --model lora.safetensors
python tools/show_metadata.py --model lora.safetensors --top 50
python tools/show_metadata.py --model lora.safetensors --json > metadata.json
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.byte_paths import plain_path  # noqa: E402
from library.cli import guarded  # noqa: E402
from library.errors import UserError, nearest  # noqa: E402
from library.options import at_least, option, resolve  # noqa: E402
from library.text_files import parse_json  # noqa: E402

LONGEST = 300  # letters of a value that are shown; thumbnails are long
UNSET = "None"  # value of options that were not given
LISTED = ("ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_tag_frequency", "ss_bucket_info")  # as tables
TIMES = ("ss_training_started_at", "ss_training_finished_at")  # Unix seconds
# Group -> prefixes of its keys; a key belongs to the first group with a matching prefix
GROUPS = {
    "description": ("modelspec.",),
    "network": ("ss_network_",),
    "base model": ("ss_base_model", "ss_sd_model", "ss_new_sd_model", "ss_vae", "ss_new_vae", "ss_v2", "ss_clip_skip"),
    "datasets": (
        "ss_num_train_", "ss_num_reg_", "ss_num_val", "ss_resolution", "ss_enable_bucket", "ss_bucket_",
        "ss_min_bucket", "ss_max_bucket", "ss_shuffle_caption", "ss_keep_tokens", "ss_color_aug", "ss_flip_aug",
        "ss_random_crop", "ss_face_crop", "ss_caption_", "ss_batch_size", "ss_total_batch", "ss_resize_", *LISTED,
    ),
    "training": ("ss_",),
    "hashes": ("sshs_",),
}  # fmt: skip
OTHER = "other entries"


@dataclass(frozen=True)
class ShowOptions:
    """Which file, and how much of it."""

    model: str | None = option(None, help="File to look into (.safetensors).", path=True)
    json: bool = option(False, help="Print all entries as they are, as one JSON object.")
    top: int = option(
        20, help="How many tags of each folder are shown, the most frequent ones; 0: all.", check=at_least(0)
    )

    def problems(self) -> Iterator[str]:
        """What is missing."""
        if self.model is None:
            yield "--model is needed: the file to look into"


@dataclass(frozen=True)
class ShowMetadataOptions:
    """All options of this script."""

    show: ShowOptions = field(default_factory=ShowOptions)


@dataclass(frozen=True)
class FileHeader:
    """The content of a file's header."""

    metadata: Mapping[str, str]
    types: Mapping[str, int]  # dtype -> number of elements in all tensors of that dtype
    tensors: int


def read_header(path: Path) -> FileHeader:
    """Read the header of a .safetensors file. Raises UserError for other files."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"--model: {path} {'is a folder' if path.is_dir() else 'does not exist'}{_similar(path)}")
    types: Counter[str] = Counter()
    try:
        with plain_path(path) as readable, safe_open(readable, "np") as file:
            names = list(file.keys())
            for name in names:
                part = file.get_slice(name)
                count = 1
                for side in part.get_shape():
                    count *= side
                types[part.get_dtype()] += count
            return FileHeader(file.metadata() or {}, types, len(names))
    except (OSError, SafetensorError) as error:
        raise UserError(f"--model: {path} is no readable .safetensors file ({error})") from None


def _similar(path: Path) -> str:
    names = [entry.name for entry in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
    hint = nearest(path.name, names)
    return f". Did you mean {path.parent / hint}?" if hint else ""


# ---- text -----------------------------------------------------------------------------------------------------------


def lines(path: Path, header: FileHeader, *, top: int) -> Iterator[str]:
    """The lines to print."""
    contents = ", ".join(f"{count:,} numbers in {kind}" for kind, count in header.types.items())
    yield f"{path.name}: {path.stat().st_size:,} bytes, {header.tensors} tensors, {contents or 'no numbers'}"
    if not header.metadata:
        yield "no metadata"
        return
    unset = [key for key, value in header.metadata.items() if value == UNSET]
    for title, keys in grouped({k: v for k, v in header.metadata.items() if v != UNSET}).items():
        yield ""
        yield title
        tables = [key for key in keys if key in LISTED]
        short = {_short(key): shown(key, header.metadata[key]) for key in keys if key not in LISTED}
        width = max(map(len, short), default=0)
        yield from (f"  {name:{width}}  {value}" for name, value in short.items())
        for key in tables:
            yield from table_lines(key, header.metadata[key], top)
    if unset:
        yield ""
        yield f"{len(unset)} further options were not set; --json shows all"


def grouped(metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """Group -> its sorted keys, without empty groups."""
    found: dict[str, list[str]] = {title: [] for title in (*GROUPS, OTHER)}
    for key in sorted(metadata):
        title = next((title for title, starts in GROUPS.items() if key.startswith(starts)), OTHER)
        found[title].append(key)
    return {title: keys for title, keys in found.items() if keys}


def _short(key: str) -> str:
    return key.removeprefix("modelspec.").removeprefix("ss_")


def shown(key: str, value: str) -> str:
    """A value on one line."""
    if key in TIMES:
        try:
            return f"{datetime.fromtimestamp(float(value)):%Y-%m-%d %H:%M:%S}"
        except (ValueError, OverflowError, OSError):
            pass  # shown unchanged
    line = " ".join(value.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ... ({len(value):,} letters)"


def table_lines(key: str, text: str, top: int) -> Iterator[str]:
    """The lines of a table that is stored as JSON. Invalid tables are shown unchanged."""
    try:
        yield from [*TABLES[key](parse_json(text), top)]
    except (ValueError, TypeError, AttributeError, KeyError):
        yield f"  {_short(key)}  {shown(key, text)}"


def dataset_lines(datasets: Any, top: int) -> Iterator[str]:
    """Lines for ss_datasets: each dataset with its subsets."""
    for number, dataset in enumerate(datasets, start=1):
        width, height = dataset["resolution"]
        yield (
            f"  dataset {number}: {dataset['num_train_images']} pictures with repeats, {width}x{height}, "
            f"batch size {dataset['batch_size_per_device']}"
        )
        for share, (width, height), *batch in dataset.get("resolution_schedule", ()):
            yield f"    from {share:.0%} of the run: {width}x{height}" + "".join(f", batch size {n}" for n in batch)
        for subset in dataset["subsets"]:
            folder = subset.get("image_dir") or subset.get("metadata_file")
            kind = ", regularisation" if subset.get("is_reg") else ""
            yield f"    {folder}: {subset['img_count']} pictures, repeated {subset['num_repeats']} times{kind}"
        yield from (f"  {line}" for line in bucket_lines(dataset.get("bucket_info"), top))


def folder_lines(folders: Any, top: int) -> Iterator[str]:
    """Lines for ss_dataset_dirs: the folders of the pictures."""
    for name, facts in folders.items():
        yield f"  folder {name}: {facts['img_count']} pictures, repeated {facts['n_repeats']} times"


def bucket_lines(info: Any, top: int) -> Iterator[str]:
    """Lines for ss_bucket_info: the number of pictures of each size."""
    for bucket in ((info or {}).get("buckets") or {}).values():
        width, height = bucket["resolution"]
        yield f"  size {width}x{height}: {bucket['count']} pictures with repeats"


def tag_lines(folders: Any, top: int) -> Iterator[str]:
    """Lines for ss_tag_frequency: the most frequent tags of each folder."""
    for name, tags in folders.items():
        frequent = Counter({tag.strip(): count for tag, count in tags.items()}).most_common(top or None)
        more = f", the first {len(frequent)}" if len(frequent) < len(tags) else ""
        yield f"  {len(tags)} tags in {name}{more}:"
        width = max((len(f"{count:,}") for _, count in frequent), default=0)
        yield from (f"    {count:>{width},}  {tag}" for tag, count in frequent)


TABLES = {
    "ss_datasets": dataset_lines,
    "ss_dataset_dirs": folder_lines,
    "ss_reg_dataset_dirs": folder_lines,
    "ss_bucket_info": bucket_lines,
    "ss_tag_frequency": tag_lines,
}


def show(options: ShowOptions) -> None:
    """Print the metadata as text or as JSON."""
    assert options.model is not None
    path = Path(options.model)
    header = read_header(path)
    if options.json:
        print(json.dumps(dict(header.metadata), indent=4, sort_keys=True, ensure_ascii=False))
        return
    for line in lines(path, header, top=options.top):
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""

    def action() -> int:
        words = sys.argv[1:] if argv is None else argv
        description = inspect.cleandoc(__doc__ or "")
        show(resolve(ShowMetadataOptions, {}, words, prog="show_metadata.py", description=description).options.show)
        return 0

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
