# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the data, said all at once before any model is loaded: problems stop the run, warnings do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

from library.data.buckets import BucketManager
from library.data.captions import lost_choices, possible_texts
from library.data.inventory import counted, find_duplicates
from library.data.parts import MUCH_CAPPED, MUCH_CROPPED, DatasetStats
from library.data.records import BucketRules, DatasetConfig, Sample, SubsetConfig
from library.data.references import equal_pairs
from library.data.scan import Scan, SubsetScan
from library.data.shards.samples import ShardSamples
from library.errors import first_names
from library.values import text_problem


@dataclass(frozen=True)
class Report:
    """What was found, one line each. Problems keep a run from starting."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check(scan: Scan) -> Report:
    """Report on a scan: unreadable pictures and captions, empty folders, missing captions, shared stems."""
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
    checked = isinstance(subset.samples, ShardSamples)  # when they were indexed
    wrong = [] if checked else [(sample.path, text_problem(sample.caption)) for sample in subset.samples]
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
            looked_for = "" if subset.config.shard_pattern else f" ({subset.config.caption_extension})"
            kind = f"no caption{looked_for} and no class_tokens: they get an empty one"
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
    in_files = () if isinstance(subset.samples, ShardSamples) else subset.samples
    if equal := equal_pairs(in_files):
        kind = "the same file as the reference picture: nothing is to be changed"
        yield _line(name, equal, "pictures are", "picture is", kind)
    if subset.inventory is not None:
        yield from subset.inventory.warnings(subset.config)


def _line(where: str, names: Sequence[str], many: str, one: str, rest: str) -> str:
    """`folder: 12 pictures have <rest>: a.png, b.png, c.png and 9 more`"""
    subject = one if len(names) == 1 else many
    return f"{where}: {len(names)} {subject} {rest}: {first_names(names)}"


def _has_own_words(config: SubsetConfig) -> bool:
    """Whether every caption has words: prefix and suffix are put around empty ones, too."""
    return bool(config.captions.caption_prefix or config.captions.caption_suffix)


def _no_caption_at_all(scan: Scan) -> Iterator[str]:
    empty = 0
    for subset in scan.subsets:
        if _has_own_words(subset.config) or any(sample.caption for sample in subset.samples):
            return
        empty += len(subset.samples)
    if any(subset.config.shard_pattern for subset in scan.subsets):
        names = first_names([subset.config.name for subset in scan.subsets])
        yield f"none of the {empty} pictures has a caption: add captions to {names}, or class_tokens"
        return
    endings = sorted({subset.config.caption_extension for subset in scan.subsets})
    found = {ending for subset in scan.subsets if subset.inventory for ending in subset.inventory.unread_endings}
    beside = f"; beside them lie {', '.join(sorted(found))} files" if found else ""
    yield (
        f"none of the {empty} pictures has a caption: add caption files ({', '.join(endings)} is looked for; "
        f"see caption_extension) or class_tokens{beside}"
    )


def _repeated_folders(index: int, config: DatasetConfig) -> Iterator[str]:
    names = [subset.name for subset in config.subsets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"datasets[{index}]: {name} stands in {names.count(name)} subsets: its pictures are used by each of them"


# ---- checks that need to know the model ---------------------------------------------------------------------------


MOST_FOLDERS = 20  # that are described one by one


def folder_lines(scan: Scan) -> Iterator[str]:
    """What is in each folder and where its captions come from, for the plan of the run."""
    described: set[str] = set()
    rest = 0
    for subset in scan.subsets:
        if subset.inventory is None:
            continue
        if len(described) == MOST_FOLDERS:
            rest += 1
            continue
        line = f"{subset.config.name}: {subset.inventory.line(subset.config, find_duplicates(subset.samples))}"
        if line not in described:
            described.add(line)
            yield line
    if rest:
        yield f"and {counted(rest, 'more folder')}"


MOST_NAMES = 10  # in a line
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
    uses: dict[str, list[str]] = {}  # picture -> its long texts; a picture may stand in several datasets
    for sample in samples:
        texts = possible_texts(sample.caption, sample.subset.captions)
        long_texts = [text for text in texts if len(text.encode()) > limit]
        if long_texts:
            uses.setdefault(sample.path, []).extend(long_texts)
    distinct = dict.fromkeys(text for texts in uses.values() for text in texts)
    counted = sorted(distinct, key=len, reverse=True)[:most]
    counts = dict(zip(counted, count_tokens(counted))) if counted else {}
    longest = {path: max(counts.get(text, 0) for text in texts) for path, texts in uses.items()}
    long = [f"{path} ({count} tokens)" for path, count in longest.items() if count > limit]
    if not long:
        return None
    subject = "1 caption is" if len(long) == 1 else f"{len(long)} captions are"
    note = f"see {option}"
    if len(counted) < len(distinct):
        subject, note = f"at least {subject}", f"the {len(counted)} longest were counted; {note}"
    return f"{subject} longer than {limit} tokens and will be cut ({note}): {first_names(long)}"


def choices_never_trained(samples: Sequence[Sample], variants: int) -> str | None:
    """One line on captions of which cached text outputs, so many variants of each, cannot hold every choice."""
    found = {s.path: lost_choices(s.caption, s.subset.captions, variants) for s in samples}
    lost = [f"{path} ({count} choices)" for path, count in found.items() if count]
    if not lost:
        return None
    subject = "1 caption has a wildcard" if len(lost) == 1 else f"{len(lost)} captions have wildcards"
    return (
        f"{subject} of more choices than are kept where captions are cached; the others are never trained "
        f"(see --caption_variants): {first_names(lost, MOST_NAMES)}"
    )


# ---- checks that need to know splits and buckets ------------------------------------------------------------------


def split_warnings(where: str, config: DatasetConfig, stats: DatasetStats) -> Iterator[str]:
    """What validation_split does to a dataset that is probably not meant. where: what the lines begin with."""
    if stats.unsplit:
        names = first_names([f"{name} ({count})" for name, count in stats.unsplit], MOST_NAMES)
        fewest = min(count for _, count in stats.unsplit)
        end = "" if stats.validation_images else ", so that there is no validation"
        yield (
            f"{where}: validation_split {config.validation_split:g} holds out no picture of {names}{end}: each subset "
            f"is split by itself; {1 / fewest:.2g} would hold out one of {fewest}"
        )
    if stats.untrained:
        names = first_names(stats.untrained, MOST_NAMES)
        yield f"{where}: validation_split {config.validation_split:g} holds out every picture of {names}"
    if stats.held_elsewhere:
        held = stats.held_elsewhere
        subject = "1 picture is" if len(held) == 1 else f"{len(held)} pictures are"
        names = first_names(held, MOST_NAMES)
        yield f"{where}: {subject} not trained, as another subset or dataset holds out the same for validation: {names}"


def bucket_warnings(where: str, rules: BucketRules, stats: DatasetStats) -> Iterator[str]:
    """What the sizes of a dataset take from its pictures, and buckets without effect."""
    if stats.capped:
        names, limit = first_names(stats.capped, MOST_NAMES), f"max_bucket_reso = {rules.max_bucket_reso}"
        yield f"{where}: {_number(stats.capped)} more than {MUCH_CAPPED:.0%} of the area to {limit}: {names}"
    if stats.cropped:
        names = first_names(stats.cropped, MOST_NAMES)
        advice = "cut them, or see min_ and max_bucket_reso" if rules.enable_bucket else "see enable_bucket"
        yield f"{where}: {_number(stats.cropped)} more than {MUCH_CROPPED:.0%} to the crop ({advice}): {names}"
    size, *others = BucketManager(rules).predefined or [(0, 0)] * 2
    if rules.enable_bucket and not others:
        limits = "min_bucket_reso, max_bucket_reso and bucket_reso_steps"
        yield f"{where}: enable_bucket: no effect, {limits} leave only the size {size[0]}x{size[1]}"


def idle_bucket_options(configs: Sequence[DatasetConfig]) -> Iterator[str]:
    """Settings of buckets that do nothing, where there are no buckets or pictures keep their own size."""
    given = [(c.buckets, f.name) for c in configs for f in fields(BucketRules) if vars(c.buckets)[f.name] != f.default]
    without = [name for rules, name in given if not rules.enable_bucket and name != "resolution"]
    limits = ("min_bucket_reso", "max_bucket_reso")
    free = [name for rules, name in given if rules.enable_bucket and rules.bucket_no_upscale and name in limits]
    for names, reason in ((without, "without enable_bucket"), (free, "with bucket_no_upscale")):
        if names:
            yield f"{', '.join(dict.fromkeys(names))}: no effect {reason}"


def _number(names: Sequence[str]) -> str:
    """`1 picture loses`, `12 pictures lose`"""
    return "1 picture loses" if len(names) == 1 else f"{len(names)} pictures lose"
