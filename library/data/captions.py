# SPDX-License-Identifier: Apache-2.0
"""Captions: the raw text of a picture and the rules of its subset become the text of one training step.

Everything is a pure function of its arguments; the draws come from an explicit `random.Random` in a fixed order:
dropout, line, wildcards (left to right), shuffle, tag dropout (left to right). The functions of this file are the only
ones that know what the marks of a caption mean: whoever wants the words of one asks here.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from library.data.records import CaptionRules
from library.rng import python_rng

# Stand for the escaped braces "{{" and "}}" while wildcards are replaced; no text file has these control characters.
OPEN, CLOSE = "\x01", "\x02"
WILDCARD = re.compile(r"\{([^}]+)\}")
TOGETHER = "\x03"  # stands for secondary_separator while a caption is apart: caption_separator may be a piece of it
UNMERGED = 16  # beginnings of texts that are followed, for each text that is wanted: some end as the same text
MOST_TEXTS = 32  # of one line, where only the words count

Parts = list[str]  # of a caption: what stood between its separators
Chances = dict[str, float]  # text -> its probability


def caption_of(text: str, *, enable_wildcard: bool) -> str:
    """The caption in a caption file: its first line, or with wildcards all lines that are not empty."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if enable_wildcard:
        return "\n".join(stripped for line in text.split("\n") if (stripped := line.strip()))
    return text.split("\n", 1)[0].strip()


def final_caption(
    text: str, rules: CaptionRules, rng: random.Random, *, epoch: int, step: int, total_steps: int
) -> str:
    """The caption of one sample in one step. `epoch` counts from 1, `step` (optimizer steps) from 0.

    A whole-caption dropout gives "". Otherwise: line, prefix and suffix, wildcards, token warm-up, shuffle, tag
    dropout, secondary separator.
    """
    if is_dropped(rules, rng, epoch=epoch):
        return ""
    return compose(text, rules, rng, step=step, total_steps=total_steps)


def is_dropped(rules: CaptionRules, rng: random.Random, *, epoch: int) -> bool:
    """True when the whole caption is left out: by chance, or in every n-th epoch (epochs count from 1)."""
    by_chance = rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate
    every = rules.caption_dropout_every_n_epochs
    return by_chance or (every > 0 and epoch % every == 0)


def compose(text: str, rules: CaptionRules, rng: random.Random, *, step: int, total_steps: int) -> str:
    """The caption when it is not dropped."""
    lines = _lines(text, rules)
    caption = _framed(rng.choice(lines) if len(lines) > 1 else lines[0], rules)
    if rules.enable_wildcard:
        pieces = _wildcard_pieces(caption)
        caption = "".join(rng.choice(piece) if index % 2 else piece[0] for index, piece in enumerate(pieces))

    def drawn(free: Parts) -> Parts:
        return _draw_parts(free[: _warm_parts(len(free), rules, step=step, total_steps=total_steps)], rules, rng)

    return _arranged(caption, rules, drawn)


# ---- its steps ----------------------------------------------------------------------------------------------------


def _lines(text: str, rules: CaptionRules) -> list[str]:
    """The lines of a caption, one of which is chosen."""
    lines = text.split("\n")
    return lines if rules.enable_wildcard else lines[:1]


def _framed(line: str, rules: CaptionRules) -> str:
    """A line with prefix and suffix: every line of a caption of many lines gets them."""
    before = f"{rules.caption_prefix} " if rules.caption_prefix else ""
    return f"{before}{line} {rules.caption_suffix}" if rules.caption_suffix else f"{before}{line}"


def _wildcard_pieces(caption: str) -> list[list[str]]:
    """A caption cut at its wildcards: the odd pieces are the choices of one each, the even ones the text between them.

    `{a|b}` is a wildcard, `{{` and `}}` are braces.
    """
    pieces = WILDCARD.split(caption.replace("{{", OPEN).replace("}}", CLOSE))
    pieces = [piece.replace(OPEN, "{").replace(CLOSE, "}") for piece in pieces]
    return [piece.split("|") if index % 2 else [piece] for index, piece in enumerate(pieces)]


def _draw_parts(free: Parts, rules: CaptionRules, rng: random.Random) -> Parts:
    """The free parts after shuffle and dropout."""
    free = list(free)
    if rules.shuffle_caption:
        rng.shuffle(free)
    if rules.caption_tag_dropout_rate > 0:
        free = [part for part in free if rng.random() >= rules.caption_tag_dropout_rate]
    return free


def _arranged(caption: str, rules: CaptionRules, order: Callable[[Parts], Parts]) -> str:
    """The caption as a text encoder reads it: its free parts as `order` gives them back, and none of our marks in it.

    A caption whose parts cannot move stays as it is written, but for its marks.
    """
    if not _has_parts(caption, rules):
        secondary = rules.secondary_separator
        return caption.replace(secondary, rules.caption_separator) if secondary else caption
    front, free, end = _split_parts(caption, rules)
    return _joined(front + order(free) + end, rules)


def _has_parts(caption: str, rules: CaptionRules) -> bool:
    """Whether a caption is split into parts: they may move or be dropped, or it has a keep_tokens_separator."""
    varies = rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0
    return varies or bool(rules.keep_tokens_separator and rules.keep_tokens_separator in caption)


def _split_parts(caption: str, rules: CaptionRules) -> tuple[Parts, Parts, Parts]:
    """(kept in front, free, kept at the end). keep_tokens_separator, where a caption has it, outranks keep_tokens.

    What stands behind a third mark is kept at the end, too.
    """
    marker, separator, secondary = rules.keep_tokens_separator, rules.caption_separator, rules.secondary_separator
    marked = bool(marker and marker in caption)
    pieces = caption.split(marker) if marked else [caption.strip()]
    if secondary and secondary not in separator:
        pieces = [piece.replace(secondary, TOGETHER) for piece in pieces]
    split = [[part.strip() for part in piece.split(separator)] for piece in pieces]
    if marked:
        front, free, *rest = ([part for part in parts if part] for parts in split)
        return front, free, [part for parts in rest for part in parts]
    (parts,) = split
    keep = max(rules.keep_tokens, 0)
    return parts[:keep], parts[keep:], []


def _joined(parts: Parts, rules: CaptionRules) -> str:
    """Parts as one text again: with the separator that they were split at, and a space behind it."""
    separator = rules.caption_separator
    joint = separator if separator[-1:].isspace() else f"{separator} "
    return joint.join(parts).replace(TOGETHER, separator)


def _warm_parts(count: int, rules: CaptionRules, *, step: int, total_steps: int) -> int:
    """How many of `count` free parts are used: from token_warmup_min linearly to all at token_warmup_step."""
    last = rules.token_warmup_step
    if last < 1:
        last = math.floor(last * total_steps)
    if step >= last:
        return count
    return math.floor(step * ((count - rules.token_warmup_min) / last)) + rules.token_warmup_min


# ---- cached text-encoder outputs ----------------------------------------------------------------------------------


def uncacheable(rules: CaptionRules) -> str | None:
    """Why outputs of the text encoders cannot be cached under these rules, in one line; None when they can."""
    if rules.token_warmup_step > 0:
        return "token_warmup_step changes captions with every step: do not cache text encoder outputs, or set it to 0"
    return None


class CachedLine(NamedTuple):
    """The cached texts of one line of a caption: all its outcomes, or a number of draws."""

    line: str
    weight: int  # how often it stands in the caption
    outcomes: Chances | int


def caption_variants(text: str, rules: CaptionRules, n: int, seed_parts: Sequence[int | str]) -> Chances:
    """The texts that stand for the caption where text outputs are cached, with their probabilities.

    All that it may become, where that is at most `n`; else `n` that hold every line (more, where there are more lines)
    and the choices of a wildcard as often as each other. Dropout of the whole caption is not among them: the empty text
    is cached once, and drawn at its exact rate.
    """
    found: Chances = defaultdict(float)
    lines = _cached_lines(text, rules, n)
    for line, weight, outcomes in lines:
        share = weight / sum(line.weight for line in lines)
        if isinstance(outcomes, int):
            draws = (_draw(line, rules, outcomes, k, seed_parts) for k in range(outcomes))
            outcomes = {draw: count / outcomes for draw, count in Counter(draws).items()}
        for variant, chance in outcomes.items():
            found[variant] += share * chance
    return dict(found)


def cached_caption(
    text: str, rules: CaptionRules, n: int, seed_parts: Sequence[int | str], rng: random.Random, *, epoch: int
) -> str:
    """`final_caption` where text outputs are cached: "" or one of `caption_variants`, without making the others."""
    if is_dropped(rules, rng, epoch=epoch):
        return ""
    lines = _cached_lines(text, rules, n)
    line, _, outcomes = rng.choices(lines, weights=[line.weight for line in lines])[0]
    if isinstance(outcomes, int):
        return _draw(line, rules, outcomes, rng.randrange(outcomes), seed_parts)
    return rng.choices(list(outcomes), weights=list(outcomes.values()))[0]


def lost_choices(text: str, rules: CaptionRules, n: int) -> int:
    """Size of the largest wildcard of which some choice is in none of `caption_variants`; 0 where each is in one."""
    found = 0
    for line, _, outcomes in _cached_lines(text, rules, n) if rules.enable_wildcard else ():
        if isinstance(outcomes, int):
            sizes = [len(piece) for piece in _wildcard_pieces(_framed(line, rules)) if len(set(piece)) > 1]
            found = max(found, *(size for size in sizes if size > outcomes), 0)
    return found


def _cached_lines(text: str, rules: CaptionRules, n: int) -> list[CachedLine]:
    lines = Counter(_lines(text, rules))
    known = {line: _outcomes(line, rules, n) for line in lines}
    whole = {variant for outcomes in known.values() for variant in outcomes or ()}
    if None not in known.values() and len(whole) <= n:
        return [CachedLine(line, lines[line], outcomes) for line, outcomes in known.items() if outcomes is not None]
    # those with few outcomes first: what they leave goes to the others
    sizes = {line: n + 1 if outcomes is None else len(outcomes) for line, outcomes in known.items()}
    found, left = [], n
    for place, line in enumerate(sorted(sizes, key=sizes.__getitem__)):
        share, outcomes = max(1, left // (len(sizes) - place)), known[line]
        kept = share if outcomes is None or len(outcomes) > share else outcomes
        found.append(CachedLine(line, lines[line], kept))
        left -= min(share, sizes[line])
    return found


def _draw(line: str, rules: CaptionRules, count: int, k: int, seed_parts: Sequence[int | str]) -> str:
    """Draw number `k` of `count` draws of what a line may become."""
    caption = _framed(line, rules)
    if rules.enable_wildcard:
        rng = python_rng(*seed_parts, "choices", line)
        caption = "".join(_spread(piece, count, rng)[k] for piece in _wildcard_pieces(caption))
    rng = python_rng(*seed_parts, "variant", line, k)
    return _arranged(caption, rules, lambda free: _draw_parts(free, rules, rng))


def _spread(choices: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` draws in which all choices come equally often, give or take one."""
    rounds, rest = divmod(count, len(choices))
    drawn = [*choices] * rounds + rng.sample(choices, rest)
    rng.shuffle(drawn)
    return drawn


# ---- the outcomes of one line -------------------------------------------------------------------------------------


def _outcomes(line: str, rules: CaptionRules, most: int) -> Chances | None:
    """All texts that a line may become; None where there are more than `most`."""
    framed = _framed(line, rules)
    captions = _worded(framed, most * UNMERGED) if rules.enable_wildcard else {framed: 1.0}
    if captions is None:
        return None
    found: Chances = defaultdict(float)
    for caption, chance in captions.items():
        texts = _arrangements(caption, rules, most)
        if texts is None:
            return None
        for text, share in texts.items():
            found[text] += chance * share
        if len(found) > most:
            return None
    return dict(found)


def _worded(caption: str, most: int) -> Chances | None:
    """All texts that a caption's wildcards may give; None where there are more than `most`."""
    found: Chances = {"": 1.0}
    for piece in _wildcard_pieces(caption):
        grown: Chances = defaultdict(float)
        for start, chance in found.items():
            for choice in piece:
                grown[start + choice] += chance / len(piece)
            if len(grown) > most:
                return None
        found = grown
    return found


def _arrangements(caption: str, rules: CaptionRules, most: int) -> Chances | None:
    """All texts that shuffle and dropout of parts may give; None where there are more than `most`."""
    if not _has_parts(caption, rules):
        return {_arranged(caption, rules, list): 1.0}
    front, free, end = _split_parts(caption, rules)
    rate = rules.caption_tag_dropout_rate
    if rate >= 1:
        free = []
    orders = _orders(free, most) if rules.shuffle_caption else {tuple(free): 1.0}
    found: Chances = defaultdict(float)
    for order, chance in (orders or {}).items():
        kept = _kept(order, rate, most)
        if kept is None:
            return None
        for parts, share in kept.items():
            found[_joined([*front, *parts, *end], rules)] += chance * share
    return None if orders is None else dict(found)


def _orders(parts: Parts, most: int) -> dict[tuple[str, ...], float] | None:
    """All orders of the parts, equally probable; None where there are more than `most`."""
    equal = Counter(parts)
    number = math.factorial(len(parts)) // math.prod(map(math.factorial, equal.values()))
    if number > most:
        return None
    found: dict[tuple[str, ...], float] = {(): 1 / number}
    for _ in parts:  # a dict and not a set: the order is the same in every process
        found = {(*start, part): 1 / number for start in found for part in equal - Counter(start)}
    return found


def _kept(parts: Sequence[str], rate: float, most: int) -> dict[tuple[str, ...], float] | None:
    """All sets of parts that dropout may leave; None where there are more than `most`."""
    if rate == 0:
        return {tuple(parts): 1.0}
    found: dict[tuple[str, ...], float] = {(): 1.0}
    for part in parts:
        grown: dict[tuple[str, ...], float] = defaultdict(float)
        for start, chance in found.items():
            grown[(*start, part)] += chance * (1 - rate)
            grown[start] += chance * rate
        if len(grown) > most:
            return None
        found = grown
    return found


# ---- where only the words count -----------------------------------------------------------------------------------


def possible_texts(text: str, rules: CaptionRules) -> list[str]:
    """The texts that a caption may become in training, with all their parts and these in the order of the file.

    One for each line and each combination of wildcards; of very many, as many as hold every choice of every wildcard.
    """
    if rules.caption_dropout_rate >= 1 or rules.caption_dropout_every_n_epochs == 1:
        return [""]  # no other is ever trained
    order: Callable[[Parts], Parts] = (lambda free: []) if rules.caption_tag_dropout_rate >= 1 else list
    lines = dict.fromkeys(_framed(line, rules) for line in _lines(text, rules))
    found = (_arranged(caption, rules, order) for line in lines for caption in _all_words(line, rules))
    return list(dict.fromkeys(found))


def _all_words(caption: str, rules: CaptionRules) -> Sequence[str]:
    """The caption with its wildcards replaced, in every way or in enough ways to hold each choice."""
    if not rules.enable_wildcard:
        return [caption]
    found = _worded(caption, MOST_TEXTS)
    if found is not None:
        return list(found)
    pieces = _wildcard_pieces(caption)
    return ["".join(piece[k % len(piece)] for piece in pieces) for k in range(max(map(len, pieces)))]


# ---- validation ---------------------------------------------------------------------------------------------------


def validation_rules(rules: CaptionRules) -> CaptionRules:
    """The rules of validation samples: everything that would make two validations differ is switched off.

    Wildcards stay on, because the text needs its braces replaced; their draws come from a fixed generator.
    """
    return replace(
        rules,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )


def split_validation(count_or_names: int | Sequence, split: float, seed: int) -> tuple[list, list]:
    """(train, validation) after a seeded shuffle: the last round(n split) are held out, and all others are trained."""
    items = list(range(count_or_names)) if isinstance(count_or_names, int) else list(count_or_names)
    random.Random(seed).shuffle(items)
    first = len(items) - round(len(items) * split)
    return items[:first], items[first:]
