# SPDX-License-Identifier: Apache-2.0
"""Captions: the raw text of a picture and the rules of its subset become the text of one training step.

Everything is a pure function of its arguments; the draws come from an explicit `random.Random` in a fixed order:
dropout, line, wildcards (left to right), shuffle, tag dropout (left to right).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

from library.data.records import CaptionRules
from library.rng import python_rng

# Stand for the escaped braces "{{" and "}}" while wildcards are replaced; no text file has these control characters.
OPEN, CLOSE = "\x01", "\x02"
WILDCARD = re.compile(r"\{([^}]+)\}")
JOINT = ", "  # between tokens of a caption that was taken apart, whatever caption_separator is


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
    lines = text.split("\n")
    caption = rng.choice(lines) if rules.enable_wildcard and len(lines) > 1 else lines[0]
    # After the choice of the line: every line of a multi-line caption gets its prefix and suffix.
    if rules.caption_prefix:
        caption = f"{rules.caption_prefix} {caption}"
    if rules.caption_suffix:
        caption = f"{caption} {rules.caption_suffix}"
    if rules.enable_wildcard:
        caption = _replace_wildcards(caption, rng)
    if rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0:
        caption = _rearrange(caption, rules, rng, step=step, total_steps=total_steps)
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.caption_separator)
    return caption


def _replace_wildcards(caption: str, rng: random.Random) -> str:
    """`{a|b}` becomes one of its alternatives, `{{` and `}}` become braces."""
    caption = caption.replace("{{", OPEN).replace("}}", CLOSE)
    caption = WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), caption)
    return caption.replace(OPEN, "{").replace(CLOSE, "}")


def _rearrange(caption: str, rules: CaptionRules, rng: random.Random, *, step: int, total_steps: int) -> str:
    """Warm-up, shuffle and dropout of the free tokens; the kept ones stay in front and at the end."""
    front, free, end = _split_tokens(caption, rules)
    free = free[: _warm_tokens(len(free), rules, step=step, total_steps=total_steps)]
    if rules.shuffle_caption:
        rng.shuffle(free)
    if rules.caption_tag_dropout_rate > 0:
        free = [token for token in free if rng.random() >= rules.caption_tag_dropout_rate]
    return JOINT.join(front + free + end)


def _split_tokens(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """(kept in front, free, kept at the end). keep_tokens_separator, where a caption has it, outranks keep_tokens."""
    marker = rules.keep_tokens_separator
    if marker and marker in caption:
        parts = [*caption.split(marker, 2), ""]
        front, free, end = ([t.strip() for t in p.split(rules.caption_separator) if t.strip()] for p in parts[:3])
        return front, free, end
    tokens = [token.strip() for token in caption.strip().split(rules.caption_separator)]
    keep = max(rules.keep_tokens, 0)
    return tokens[:keep], tokens[keep:], []


def _warm_tokens(count: int, rules: CaptionRules, *, step: int, total_steps: int) -> int:
    """How many of `count` free tokens are used: from token_warmup_min linearly to all at token_warmup_step."""
    last = rules.token_warmup_step
    if last < 1:
        last = math.floor(last * total_steps)
    if step >= last:
        return count
    return math.floor(step * ((count - rules.token_warmup_min) / last)) + rules.token_warmup_min


def _has_variants(rules: CaptionRules) -> bool:
    """True when captions that are not dropped differ from draw to draw."""
    return rules.shuffle_caption or rules.enable_wildcard or rules.caption_tag_dropout_rate > 0


# ---- cached text-encoder outputs ----------------------------------------------------------------------------------


def uncacheable(rules: CaptionRules) -> str | None:
    """Why outputs of the text encoders cannot be cached under these rules, in one line; None when they can."""
    if rules.token_warmup_step > 0:
        return "token_warmup_step changes captions with every step: do not cache text encoder outputs, or set it to 0"
    return None


def caption_variants(text: str, rules: CaptionRules, n: int, seed_parts: Sequence[int | str]) -> list[str]:
    """The `n` texts that stand for the caption where text outputs are cached (one, where nothing varies).

    Dropout of the whole caption is not among them: the empty text is cached once, and drawn at its exact rate.
    """
    return [caption_variant(text, rules, k, seed_parts) for k in range(n if _has_variants(rules) else 1)]


def caption_variant(text: str, rules: CaptionRules, k: int, seed_parts: Sequence[int | str]) -> str:
    """Variant `k` of `caption_variants`, without making the others."""
    return compose(text, rules, python_rng(*seed_parts, "variant", k), step=0, total_steps=0)


def cached_caption(
    text: str, rules: CaptionRules, n: int, seed_parts: Sequence[int | str], rng: random.Random, *, epoch: int
) -> str:
    """`final_caption` where text outputs are cached: "" or one of `caption_variants`, chosen by `rng`."""
    if is_dropped(rules, rng, epoch=epoch):
        return ""
    return caption_variant(text, rules, rng.randrange(n) if _has_variants(rules) else 0, seed_parts)


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
    """(train, validation) after a seeded shuffle: the first ceil(n (1 - split)) and the last round(n split).

    The two may share one entry (n = 13, split 0.2: 11 and 3); this is how existing runs were split, and it is kept.
    """
    items = list(range(count_or_names)) if isinstance(count_or_names, int) else list(count_or_names)
    random.Random(seed).shuffle(items)
    count = len(items)
    return items[: math.ceil(count * (1 - split))], items[count - round(count * split) :]
