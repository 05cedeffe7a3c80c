# SPDX-License-Identifier: Apache-2.0
"""What becomes of another trainer's keys: the rows of its tables, and the draft that they fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError, nearest
from library.values import shown

Convert = Callable[[Any], Any]
UNSET: tuple[Any, ...] = (None, False, 0, "", "none", "None", [], {})  # values with which a key asks for nothing


@dataclass(frozen=True)
class Key:
    """One key of another trainer."""

    ours: str = ""  # our option or dataset key; what of ours takes its place, for a key that a function reads
    default: Any = None  # the other trainer's value where the file leaves the key out
    convert: Convert | None = None  # raises ValueError with the reason why a value cannot be carried over
    changed: str = ""  # how the meaning changes
    lost: str = ""  # why the key is not carried over
    idle: str = ""  # why the key need not be carried over
    by_hand: bool = False  # read by a function of the trainer's module


def carried(ours: str, default: Any = None, convert: Convert | None = None, changed: str = "") -> Key:
    """A key that has a counterpart."""
    return Key(ours=ours, default=default, convert=convert, changed=changed)


def by_hand(ours: str, changed: str = "") -> Key:
    """A key that a function of the trainer's module reads."""
    return Key(ours=ours, by_hand=True, changed=changed)


def lost(why: str) -> Key:
    """A key without counterpart. It is named where it asks for something."""
    return Key(lost=why)


def idle(why: str) -> Key:
    """A key that changes nothing in what is learned, or whose behaviour is always so here."""
    return Key(idle=why)


Table = Mapping[str, Key]


@dataclass
class Draft:
    """A converted run that is being filled."""

    path: Path  # the file that is converted
    family: str = ""  # of library.families.registry
    method: str = "network"
    options: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)  # tables of our dataset file
    prompts: list[str] = field(default_factory=list)  # lines of a file of preview prompts
    origin: dict[str, str] = field(default_factory=dict)  # our option -> the key that it comes from
    not_carried: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def put(self, option: str, value: Any, key: str) -> None:
        """Set an option. key: the other trainer's, for messages."""
        self.options[option] = value
        self.origin[option] = key

    def lose(self, key: str, why: str) -> None:
        """Name a key that is not carried over."""
        self.not_carried.append(f"{key}: {why}")

    def change(self, key: str, how: str) -> None:
        """Name a value whose meaning changes."""
        self.changes.append(f"{key}: {how}")

    def wrong(self, key: str, what: str) -> UserError:
        """The error for a value without which nothing can be converted."""
        return UserError(f"{self.path}: {key}: {what}")

    def carry(self, table: Table, values: Mapping[str, Any], where: str = "") -> None:
        """Carry the keys of one table of options over, and write their defaults where they are left out.

        where: what stands before the keys in messages, such as `train.`.
        """
        self.options.update(self.carried_values(table, values, where))

    def carried_values(self, table: Table, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Our names and values for one table of keys; what cannot be carried over is named."""
        found: dict[str, Any] = {}
        for name, value in values.items():
            row = table.get(name)
            if row is None:
                hint = nearest(name, table)
                self.lose(where + name, f"not a known key{f' (nearest: {hint})' if hint else ''}")
            elif row.lost and value not in UNSET:
                self.lose(where + name, row.lost)
            elif not (row.lost or row.idle or row.by_hand or value is None):
                self._carry_one(found, row, where + name, value)
        for name, row in table.items():
            if row.default is not None and values.get(name) is None and not row.by_hand:
                found.setdefault(row.ours, row.default)
                self.origin.setdefault(row.ours, f"{where}{name} (its default)")
        return found

    def _carry_one(self, found: dict[str, Any], row: Key, key: str, value: Any) -> None:
        try:
            found[row.ours] = row.convert(value) if row.convert else value
        except (TypeError, ValueError) as error:
            self.lose(key, str(error))
            return
        self.origin[row.ours] = key
        if row.changed and value not in UNSET:
            self.change(key, row.changed)


# ---- conversions of values ------------------------------------------------------------------------------------------


def one_of(names: Mapping[Any, Any]) -> Convert:
    """The conversion by a table of words, whatever their case."""

    def convert(value: Any) -> Any:
        word = value.lower() if isinstance(value, str) else value
        try:
            return names[word]
        except (KeyError, TypeError):
            raise ValueError(f"{shown(value)} has no counterpart here") from None

    return convert


PRECISIONS = one_of(
    dict.fromkeys(("bf16", "bfloat16", "bfloat_16"), "bf16")
    | dict.fromkeys(("fp16", "float16", "float_16"), "fp16")
    | dict.fromkeys(("no", "fp32", "float32", "float_32", "float"), "no")
)


def save_precision(value: Any) -> str:
    """The word of --save_precision for another trainer's number format."""
    found: str = PRECISIONS(value)
    return "float" if found == "no" else found


def dotted(value: Any) -> str:
    """A suffix with its dot."""
    return value if str(value).startswith(".") else f".{value}"


def truth(value: Any) -> bool:
    """A switch that may be written as text."""
    if isinstance(value, str):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"expects true or false, got {shown(value)}")
        return value.lower() in ("true", "1", "yes")
    return bool(value)


def number_or_word(word: str) -> Any:
    """A word as a number or truth, where it is one."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word) if word.isascii() and "_" not in word else word
        except ValueError:
            continue
    return word


# ---- optimizers -----------------------------------------------------------------------------------------------------

# name in any of the trainers, in lower case -> ours
OPTIMIZER_NAMES = {
    "adam": "AdamW", "adamw": "AdamW", "adamw_optimi": "AdamW", "adamw_bf16": "AdamW", "optimi-adamw": "AdamW",
    "bnb-adamw": "AdamW", "adam8bit": "AdamW8bit", "adam8": "AdamW8bit", "adamw8": "AdamW8bit",
    "adamw8bit": "AdamW8bit", "adamw_8bit": "AdamW8bit", "bnb-adamw8bit": "AdamW8bit", "ao-adamw8bit": "AdamW8bit",
    "adamw8bitkahan": "AdamW8bitKahan", "bnb-adamw-paged": "PagedAdamW", "bnb-adamw8bit-paged": "PagedAdamW8bit",
    "pagedadamw8bit": "PagedAdamW8bit", "pagedadamw": "PagedAdamW", "pagedadamw32bit": "PagedAdamW32bit",
    "lion": "Lion", "lion_8bit": "Lion8bit", "lion8bit": "Lion8bit", "bnb-lion": "Lion", "bnb-lion8bit": "Lion8bit",
    "optimi-lion": "Lion", "bnb-lion8bit-paged": "PagedLion8bit", "pagedlion8bit": "PagedLion8bit",
    "sgdnesterov": "SGDNesterov", "sgdnesterov8bit": "SGDNesterov8bit",
    "prodigy": "Prodigy", "prodigyplusschedulefree": "ProdigyPlusScheduleFree",
    "prodigy_plus_schedule_free": "ProdigyPlusScheduleFree", "adafactor": "Adafactor", "came": "CAME",
    "muon": "Muon", "soap": "SOAP", "ademamix": "AdEMAMix", "ademamix8bit": "AdEMAMix8bit",
    "ademamix_8bit": "AdEMAMix8bit", "bnb-ademamix": "AdEMAMix", "bnb-ademamix8bit": "AdEMAMix8bit",
    "bnb-ademamix-paged": "PagedAdEMAMix", "bnb-ademamix8bit-paged": "PagedAdEMAMix8bit",
    "pagedademamix": "PagedAdEMAMix", "pagedademamix8bit": "PagedAdEMAMix8bit",
    "adamw_schedulefree": "AdamWScheduleFree", "schedule_free_adamw": "AdamWScheduleFree",
    "adamwschedulefree": "AdamWScheduleFree", "schedule_free_sgd": "SGDScheduleFree",
    "sgdschedulefree": "SGDScheduleFree", "radamschedulefree": "RAdamScheduleFree", "dadapt_adam": "DAdaptAdam",
    "dadaptadam": "DAdaptAdam", "dadaptation": "DAdaptation", "dadapt_lion": "DAdaptLion", "dadaptlion": "DAdaptLion",
    "dadapt_sgd": "DAdaptSGD", "dadapt_ada_grad": "DAdaptAdaGrad", "dadapt_adan": "DAdaptAdan",
}  # fmt: skip


def put_optimizer(draft: Draft, name: Any, settings: Mapping[str, Any], key: str) -> None:
    """Set the optimizer and its settings, or name it where there is none of its kind."""
    ours = OPTIMIZER_NAMES.get(str(name).lower())
    if ours is None:
        hint = "AdamW is used in its place; see --optimizer_type for the names here"
        draft.lose(key, f"{shown(name)} has no counterpart here: {hint}")
        ours, settings = "AdamW", {}
    draft.put("optimizer_type", ours, key)
    args = [f"{name}={setting(value)}" for name, value in settings.items() if value is not None]
    if args:
        draft.put("optimizer_args", args, key)


def setting(value: Any) -> str:
    """A setting's value as --optimizer_args writes it."""
    return repr(tuple(value) if isinstance(value, list) else value)


# ---- noise levels ---------------------------------------------------------------------------------------------------


def put_sampling(draft: Draft, key: str, *, uniform: bool = False, shift: float | None = None, by_size: bool = False,
                 steepness: float = 1.0) -> None:  # fmt: skip
    """Set how a flow model's noise levels are drawn.

    uniform: evenly; otherwise as the sigmoid of a normal number times `steepness`. shift: a fixed factor. by_size: the
    factor follows the picture's size.
    """
    if draft.family == "sd3":
        draft.put("weighting_scheme", "uniform" if uniform else "logit_normal", key)
        if not uniform and steepness != 1:
            draft.put("logit_std", steepness, key)
        if shift:
            draft.put("training_shift", shift, key)
        if by_size:
            draft.lose(key, "SD3 has no shift by the picture's size here; see --training_shift")
        return
    sized = {"flux2": "flux2_shift", "sana": "", "sd3": ""}.get(draft.family, "flux_shift")
    if uniform and (shift or by_size):
        draft.lose(key, "a shift of evenly drawn noise levels is not available; they are drawn without it")
        shift, by_size = None, False
    if by_size and not sized:
        draft.lose(key, "a shift by the picture's size is not available for this model")
    sampling = "uniform" if uniform else sized if by_size and sized else "shift" if shift else "sigmoid"
    draft.put("timestep_sampling", sampling, key)
    draft.put("model_prediction_type", "raw", key)
    if sampling == "shift":
        draft.put("discrete_flow_shift", shift, key)
    if not uniform and steepness != 1:
        draft.put("sigmoid_scale", steepness, key)


# ---- what many have in common ---------------------------------------------------------------------------------------


def network_of(draft: Draft, kind: str, key: str) -> None:
    """Set --network_module for a kind of adapter. Raises UserError where the architecture has none of its kind."""
    from library.families.registry import FAMILIES

    networks = FAMILIES[draft.family].networks
    if kind not in networks:
        raise draft.wrong(key, f"{shown(kind)} has no counterpart here; there are {', '.join(networks)}")
    draft.put("network_module", networks[kind], key)


def table_at(draft: Draft, values: Mapping[str, Any], key: str, *, needed: bool = False) -> dict[str, Any]:
    """The table below a key; empty where there is none. Raises UserError for another value."""
    found = values.get(key)
    if found is None and not needed:
        return {}
    if not isinstance(found, dict):
        raise draft.wrong(key, f"expects a table of keys, got {shown(found)}")
    return found


def tables_at(draft: Draft, values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of tables below a key. Raises UserError for another value, and for an empty one."""
    found = values.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(item, dict) for item in found):
        raise draft.wrong(key, f"expects a list of tables, got {shown(found)}")
    return found


def numbers(draft: Draft, value: Any, key: str) -> list[int]:
    """The whole numbers of a value that is one or a list of them. Raises UserError."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, float)) or item != int(item) or item <= 0:
            raise draft.wrong(key, f"expects whole numbers above 0, got {shown(value)}")
    return [int(item) for item in items]


def longest_side(resolution: int, ratio: float = 2.0, step: int = 64) -> int:
    """The longest side of a bucket of this ratio with the area of a square of `resolution`, as a multiple of `step`."""
    return max(step, int(-(-resolution * ratio**0.5 // step) * step))
