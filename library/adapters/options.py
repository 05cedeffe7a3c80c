# SPDX-License-Identifier: Apache-2.0
"""The keys of --network_args, each a dataclass field like any other option, and how they are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import raise_problems, unknown
from library.log import get_logger
from library.options import at_least, between, convert, option, positive, specs

# Options of `BlockOptions` that an adapter file decides itself
SIZES_BY_BLOCK = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
PRESETS = ("cosine", "sine", "linear", "reverse_linear", "zeros")


def comma_list(kind: type) -> Any:
    """A parser of `1,2,3` (or a list) into a tuple of `kind`; empty items are 0."""

    def parse(value: Any) -> tuple[Any, ...]:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(item.strip() or 0 if isinstance(item, str) else item, kind) for item in items)

    return parse


def lr_weights(value: Any) -> str | tuple[float, ...]:
    """`1,0.5,...` as numbers, or a curve's name with an optional "+base", which stays text."""
    text = value.strip() if isinstance(value, str) else value
    if not isinstance(text, str) or "," in text:
        return comma_list(float)(text)
    name, _, base = text.partition("+")
    if name.strip() not in PRESETS:
        raise ValueError(f"expects one value per block (1,1,0.5,...) or one of {', '.join(PRESETS)}, got '{text}'")
    if base:
        convert(base, float)
    return text


def rank_list(count: int) -> Callable[[Any], tuple[int, ...]]:
    """A parser of exactly `count` ranks, `4,4,0` or `[4,4,0]`."""

    def parse(value: Any) -> tuple[int, ...]:
        found = comma_list(int)(value.strip().strip("[]") if isinstance(value, str) else value)
        if len(found) != count:
            raise ValueError(f"needs {count} values, got {len(found)}")
        return tuple(int(rank) for rank in found)

    return parse


def block_ranges(value: Any) -> tuple[tuple[int, int], ...] | None:
    """`0-3,7` as ((0, 3), (7, 7)); `none` as (); `all` as None."""
    text = ",".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value).strip()
    if text in ("all", "none"):
        return None if text == "all" else ()
    found = []
    for item in text.split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
        if first > last:
            raise ValueError(f"expects all, none, or numbers and ranges such as 0-3,7; got '{item.strip()}'")
        found.append((first, last))
    return tuple(found)


def patterns(kind: type) -> Callable[[Any], tuple[tuple[re.Pattern[str], Any], ...]]:
    """A parser of `regex=value,regex=value` with values of `kind`, which must not be negative."""

    def parse(value: Any) -> tuple[tuple[re.Pattern[str], Any], ...]:
        found = []
        for pair in str(value).split(","):
            pattern, equals, number = pair.strip().rpartition("=")
            if not equals:
                raise ValueError(f"expects regex=value,regex=value, got '{pair.strip()}'")
            try:
                found.append((re.compile(pattern), convert(number, kind)))
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
            if found[-1][1] < 0:
                raise ValueError(f"must not be below 0, got {pair.strip()}")
        return tuple(found)

    return parse


@dataclass(frozen=True)
class BlockOptions:
    """Which layers get an adapter, how large it is and how fast it learns, by block."""

    conv_dim: int | None = option(
        None, help="Rank for 3x3 convolutions, which get adapters then; 0: for the other layers beside them only.",
        check=at_least(0),
    )  # fmt: skip
    conv_alpha: float | None = option(None, help="Alpha for 3x3 convolutions (1 when only conv_dim is given).")
    block_dims: tuple[int, ...] | None = option(
        None, help="Rank per U-Net block, with commas; 0 leaves a block out.", parse=comma_list(int), check=at_least(0)
    )
    block_alphas: tuple[float, ...] | None = option(
        None, help="Alpha per U-Net block, with commas.", parse=comma_list(float)
    )
    conv_block_dims: tuple[int, ...] | None = option(
        None, help="Rank of 3x3 convolutions per U-Net block.", parse=comma_list(int), check=at_least(0)
    )
    conv_block_alphas: tuple[float, ...] | None = option(
        None, help="Alpha of 3x3 convolutions per U-Net block.", parse=comma_list(float)
    )
    down_lr_weight: str | tuple[float, ...] | None = option(
        None, help="Learning-rate factors of the down blocks: numbers with commas, or a curve such as sine+0.25.",
        parse=lr_weights,
    )  # fmt: skip
    mid_lr_weight: tuple[float, ...] | None = option(
        None, help="Learning-rate factors of the middle block.", parse=comma_list(float)
    )
    up_lr_weight: str | tuple[float, ...] | None = option(
        None, help="Learning-rate factors of the up blocks, written as for down_lr_weight.", parse=lr_weights
    )
    block_lr_zero_threshold: float | None = option(None, help="Factors up to this value count as 0: no adapter there.")
    train_norm: bool = option(False, help="Also train scale and shift of the norms inside the adapted layers.")

    @property
    def has_lr_weights(self) -> bool:
        return any(w is not None for w in (self.down_lr_weight, self.mid_lr_weight, self.up_lr_weight))

    def problems(self) -> Iterator[str]:
        if self.block_lr_zero_threshold is not None and not self.has_lr_weights:
            yield "block_lr_zero_threshold has no effect without down_lr_weight, mid_lr_weight or up_lr_weight"
        if self.conv_alpha is not None and self.conv_dim is None and self.conv_block_dims is None:
            yield "conv_alpha has no effect without conv_dim"
        if self.conv_block_alphas is not None and self.conv_dim is None and self.conv_block_dims is None:
            yield "conv_block_alphas has no effect without conv_dim or conv_block_dims"


@dataclass(frozen=True)
class LoraPlusOptions:
    """LoRA+ (arXiv:2402.12354): the up matrices learn faster."""

    loraplus_lr_ratio: float | None = option(
        None, help="Learning rate of the up matrices over that of the others.", check=positive
    )
    loraplus_unet_lr_ratio: float | None = option(None, help="The same for the U-Net only.", check=positive)
    loraplus_text_encoder_lr_ratio: float | None = option(None, help="The same for text encoders only.", check=positive)


@dataclass(frozen=True)
class DropoutOptions:
    """What is dropped at random in training."""

    dropout: float | None = option(
        None, help="Another name of --network_dropout: drop elements after the down matrix.", check=between(0, 0.999)
    )
    rank_dropout: float | None = option(None, help="Drop whole ranks, per sample.", check=between(0, 0.999))
    module_dropout: float | None = option(None, help="Drop whole adapters.", check=between(0, 0.999))


@dataclass(frozen=True)
class PatternOptions:
    """Ranks and learning rates by the names of layers in the file."""

    network_reg_dims: tuple[tuple[re.Pattern[str], int], ...] | None = option(
        None, help="regex=rank,regex=rank: the first that matches a layer's name sets its rank.", parse=patterns(int)
    )
    network_reg_lrs: tuple[tuple[re.Pattern[str], float], ...] | None = option(
        None, help="regex=rate,regex=rate: the first that matches a layer's name sets its learning rate.",
        parse=patterns(float),
    )  # fmt: skip
    verbose: bool = option(False, help="Log name, rank and alpha of every adapter.")


@dataclass(frozen=True)
class NoConvOptions:
    """Options without effect in models without 3x3 convolutions."""

    conv_dim: int | None = option(None, help="No effect: this model has no 3x3 convolutions.")
    conv_alpha: float | None = option(None, help="No effect: this model has no 3x3 convolutions.")

    def warn(self) -> None:
        """Warn about those that are given."""
        given = [name for name, value in vars(self).items() if value is not None]
        if given:
            get_logger().warning(
                "--network_args: %s: no effect, this model has no 3x3 convolutions", " and ".join(given)
            )


@dataclass(frozen=True)
class SplitOptions:
    """How layers that are fused in published files are adapted."""

    split_qkv: bool = option(
        False, help="An adapter of its own for each of q, k, v (and the MLP in one layer with it)."
    )


@dataclass(frozen=True)
class T5Options:
    """Whether the largest text encoder learns."""

    train_t5xxl: bool = option(False, help="Also train adapters of T5-XXL.")


@dataclass(frozen=True)
class NoDropoutOptions:
    """Dropout options of adapters that do not drop single elements."""

    dropout: float | None = option(None, help="No effect: these adapters do not drop elements.")
    module_dropout: float | None = option(None, help="Drop whole adapters.", check=between(0, 0.999))


def warn_dropout(module: str, *given: float | None) -> None:
    """Warn when --network_dropout is given to a module without it."""
    if any(given):
        get_logger().warning("--network_dropout: no effect, %s does not drop elements", module)


def finite(value: Any) -> Any:
    """Return `value`. Raises ValueError when it is, or contains, NaN or an infinity."""
    for item in value if isinstance(value, tuple) else (value,):
        curve_base = item.partition("+")[2] if isinstance(item, str) and item.startswith(PRESETS) else None
        number = item[-1] if isinstance(item, tuple) and item else float(curve_base) if curve_base else item
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"must be a finite number, got {number}")
    return value


def read_network_args(groups: Mapping[str, type], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read --network_args (texts or values) into one object per group. Raises UserError listing every mistake.

    An empty value (`conv_dim=`) counts as not given.
    """
    known = specs(groups)
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            problems.append(unknown("--network_args", key, known))
        elif value not in (None, ""):
            try:
                values[key] = finite(known[key].read(value))
            except (ValueError, OverflowError) as error:  # the latter of an infinite rank
                problems.append(f"--network_args: {key} {error}")
    built = {
        group: cls(**{key: value for key, value in values.items() if known[key].group == group})
        for group, cls in groups.items()
    }
    if not problems:
        for part in built.values():
            problems += [f"--network_args: {line}" for line in getattr(part, "problems", lambda: ())()]
    raise_problems(problems)
    return built
