# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the data, said all at once before any model is loaded: problems stop the run, warnings do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from library.data.records import DatasetConfig, Sample, SubsetConfig
from library.data.scan import Scan, SubsetScan
from library.errors import first_names
from library.values import text_problem


@dataclass(frozen=True)
class Report:
    """One line each. `UserError(report.problems)` is how a run ends that cannot start."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check(scan: Scan) -> Report:
    """The judgement on a scan: unreadable pictures and captions, empty folders, missing captions, shared stems."""
    problems: dict[str, None] = {}  # each line once, though datasets may share a folder
    warnings: dict[str, None] = {}
    for subset in scan.subsets:
        problems.update(dict.fromkeys(subset_problems(subset)))
        warnings.update(dict.fromkeys(subset_warnings(subset)))
    if not problems:
        problems.update(dict.fromkeys(_no_caption_at_all(scan)))
    for index, dataset in enumerate(scan.datasets):
        warnings.update(dict.fromkeys(_repeated_folders(index, dataset.config)))
    return Report(tuple(problems), tuple(warnings))


def subset_problems(subset: SubsetScan) -> Iterator[str]:
    """Why this subset cannot be trained on."""
    yield from subset.problems
    wrong = [(sample.path, text_problem(sample.caption)) for sample in subset.samples]
    broken = [path for path, problem in wrong if problem]
    if broken:
        reason = next(problem for _, problem in wrong if problem)
        yield f"{subset.config.name}: captions of {len(broken)} pictures: {reason}: {first_names(broken)}"
    if not subset.samples and not subset.problems:
        yield f"{subset.config.name}: no picture found (png, jpg, webp, bmp, avif, jxl); it holds {subset.contents}"


def subset_warnings(subset: SubsetScan) -> Iterator[str]:
    """What is probably not meant; one line each."""
    name = subset.config.name
    if not _has_own_words(subset.config):
        if subset.without_caption:
            kind = f"no caption ({subset.config.caption_extension}) and no class_tokens: they get an empty one"
            yield _line(name, subset.without_caption, "pictures have", "picture has", kind)
        if subset.empty_caption:
            kind = "an empty caption and no class_tokens"
            yield _line(name, subset.empty_caption, "pictures have", "picture has", kind)
    if subset.shared_stems:
        names = [" + ".join(group) for group in subset.shared_stems]
        yield f"{name}: pictures of one stem share a caption ({len(names)} times): {first_names(names)}"
    if subset.unused_masks:
        masks = subset.config.conditioning_data_dir or ""
        kind = "control image" if any(sample.control_path for sample in subset.samples) else "mask"
        yield _line(masks, subset.unused_masks, f"{kind}s have", f"{kind} has", "no picture of the same name")


def _line(where: str, names: Sequence[str], many: str, one: str, rest: str) -> str:
    """`folder: 12 pictures have <rest>: a.png, b.png, c.png and 9 more`"""
    subject = one if len(names) == 1 else many
    return f"{where}: {len(names)} {subject} {rest}: {first_names(names)}"


def _has_own_words(config: SubsetConfig) -> bool:
    """Prefix and suffix are put around an empty caption too, so that it is none."""
    return bool(config.captions.caption_prefix or config.captions.caption_suffix)


def _no_caption_at_all(scan: Scan) -> Iterator[str]:
    empty = 0
    for subset in scan.subsets:
        if _has_own_words(subset.config) or any(sample.caption for sample in subset.samples):
            return
        empty += len(subset.samples)
    endings = sorted({subset.config.caption_extension for subset in scan.subsets})
    yield (
        f"none of the {empty} pictures has a caption: add caption files ({', '.join(endings)} is looked for; "
        "see caption_extension) or class_tokens"
    )


def _repeated_folders(index: int, config: DatasetConfig) -> Iterator[str]:
    names = [subset.name for subset in config.subsets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"datasets[{index}]: {name} stands in {names.count(name)} subsets: its pictures are used by each of them"


# ---- checks that need to know the model ---------------------------------------------------------------------------


MOST_COUNTED = 10_000  # captions; tokenizing takes about 0.2 ms each


def smaller_than_bucket(enlarged: Sequence[str]) -> str | None:
    """One line on the pictures that must be enlarged: `DatasetStats.upscaled` of all datasets."""
    if not enlarged:
        return None
    subject = "1 picture is" if len(enlarged) == 1 else f"{len(enlarged)} pictures are"
    return f"{subject} smaller than their bucket and will be enlarged (see bucket_no_upscale): {first_names(enlarged)}"


def longer_than_limit(
    samples: Sequence[Sample],
    count_tokens: Callable[[list[str]], Sequence[int]],
    limit: int,
    *,
    option: str = "--max_token_length",
    most: int = MOST_COUNTED,
) -> str | None:
    """One line on the captions of more than `limit` tokens. Of very many captions the `most` longest are counted.

    count_tokens: texts -> number of tokens of each, without start, end and padding. A token stands for one byte at
    least, so that short captions need no counting.
    """
    uses = dict.fromkeys((sample.path, _longest_form(sample)) for sample in samples)  # also once for several datasets
    texts = dict.fromkeys(text for _, text in uses if len(text.encode()) > limit)
    counted = sorted(texts, key=len, reverse=True)[:most]
    counts = dict(zip(counted, count_tokens(counted))) if counted else {}
    long = [f"{path} ({counts[text]} tokens)" for path, text in uses if counts.get(text, 0) > limit]
    if not long:
        return None
    subject = "1 caption is" if len(long) == 1 else f"{len(long)} captions are"
    note = f"see {option}"
    if len(counted) < len(texts):
        subject, note = f"at least {subject}", f"the {len(counted)} longest were counted; {note}"
    return f"{subject} longer than {limit} tokens and will be cut ({note}): {first_names(long)}"


def _longest_form(sample: Sample) -> str:
    """The longest line of the caption with prefix and suffix."""
    rules = sample.subset.captions
    line = max(sample.caption.split("\n"), key=len) if rules.enable_wildcard else sample.caption
    return " ".join(part for part in (rules.caption_prefix, line, rules.caption_suffix) if part)
