# SPDX-License-Identifier: Apache-2.0
"""Common part of cache_latents.py and cache_text_encoder_outputs.py: options and preparation of a training run.

Both accept every option of the training scripts, so that a --config_file can be used for both. Options of saving,
optimizer and network have no effect. Caching itself is the code of the training, library.trainers.caching.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from library.cli import guarded, option_groups
from library.errors import UserError
from library.families.registry import FAMILIES, misfit, open_family, with_scripts
from library.io.options import SaveOptions
from library.log import get_logger, is_main_process, setup_logging
from library.options import Resolved, build_parser, group_types, option, resolve, specs
from library.trainers.options import TrainerOptions
from tools.make_options_doc import SCRIPTS

DEFAULT_FAMILY = "sd"

log = get_logger()


# ---- options --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolOptions:
    """Which architecture the caches are for, and what the tools have besides."""

    architecture: str | None = option(
        None, help=f"Architecture of the model (default: {DEFAULT_FAMILY}).", choices=tuple(with_scripts())
    )
    control_images: bool = option(
        False,
        help="conditioning_data_dir holds control images: the training is sdxl_train_control_net_lllite.py.",
    )
    skip_existing: bool = option(
        False, help="Leave out what is there.", answer="always so: only what is missing or has changed is encoded"
    )


def _with_switches() -> type:
    """`ToolOptions` with a switch for each architecture: --sdxl, --flux ..."""
    fields: list[Any] = [
        (name, bool, option(False, help=f"The same as --architecture {name}.")) for name in with_scripts()
    ]
    names = {"__doc__": ToolOptions.__doc__}
    return dataclasses.make_dataclass("ArchitectureOptions", fields, bases=(ToolOptions,), namespace=names, frozen=True)


ArchitectureOptions: Any = _with_switches()


@dataclass(frozen=True)
class FutureSaveOptions(SaveOptions):
    """How the training will save: without effect here, and nothing of it is needed."""

    save_model_as: str = option("safetensors", help="Format of the result of the training.")

    def problems(self) -> Iterator[str]:
        return iter(())


@dataclass(frozen=True)
class MethodOptions:
    """What single training scripts have besides: taken, and without effect here."""


@dataclass(frozen=True)
class CachingOptions(TrainerOptions):
    """All options of the training scripts, and the architecture."""

    save: FutureSaveOptions
    method: MethodOptions
    architecture: ArchitectureOptions


def option_groups_of(family: str) -> dict[str, type]:
    """The option groups that an architecture replaces in `CachingOptions`."""
    groups = dict(FAMILIES[family].option_groups)
    own = specs(group_types(CachingOptions, groups))
    methods = ["network", *(method for method, name in SCRIPTS.values() if name == family)]
    others = {n: s for method in methods for n, s in specs(option_groups(method, family)).items() if n not in own}
    fields: list[Any] = [
        (name, spec.hint, dataclasses.field(default=spec.default, metadata={"option": spec.info}))
        for name, spec in others.items()
    ]
    made = dataclasses.make_dataclass("MethodOptions", fields, frozen=True)
    made.__doc__ = MethodOptions.__doc__
    return {**groups, "method": made}


def chosen_family(options: Any) -> str:
    """The architecture given by `ArchitectureOptions`. Raises UserError when there are several."""
    named = [name for name in with_scripts() if vars(options)[name]]
    named += [options.architecture] if options.architecture else []
    if len(set(named)) > 1:
        raise UserError(f"--{' and --'.join(named)}: give one architecture")
    return named[0] if named else DEFAULT_FAMILY


def read_options(argv: Sequence[str], *, prog: str, description: str) -> tuple[str, Resolved]:
    """(architecture, options). The architecture is read first, since it determines which options exist."""
    found = specs({"architecture": ArchitectureOptions})
    words = [word for word in argv if word not in ("-h", "--help")]
    given = vars(build_parser(found, prog, "").parse_known_args(words)[0])
    try:
        family = chosen_family(ArchitectureOptions(**{name: found[name].read(value) for name, value in given.items()}))
    except ValueError as error:
        raise UserError(f"--architecture {error}") from None
    try:
        resolved = resolve(CachingOptions, option_groups_of(family), argv, prog=prog, description=description)
    except UserError as error:
        others = ", ".join(f"--{name}" for name in with_scripts() if name != DEFAULT_FAMILY)
        hint = f"no architecture is given, so Stable Diffusion 1.x / 2.x is meant; for others add {others}"
        named = given.keys() & {"architecture", *with_scripts()}
        raise UserError(error.problems if named else [*error.problems, hint]) from None
    if resolved.options.config.output_config:
        raise UserError("--output_config: let the training script write the file")
    if chosen_family(resolved.options.architecture) != family:
        raise UserError("the architecture cannot stand in --config_file: give it on the command line")
    return family, resolved


# ---- the run --------------------------------------------------------------------------------------------------------


def run(argv: Sequence[str] | None, fill: Callable[[CacheRun], None], prog: str, about: str, **cached: bool) -> int:
    """Read the options, prepare the datasets and call `fill`, which encodes. Returns 0, or 2 for bad input.

    argv: None when the tool was started as a script. about: its description. cached: fields of CacheOptions to set.
    """
    words = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _run(words, fill, prog, inspect.cleandoc(about), cached))


def _run(
    words: Sequence[str], fill: Callable[[CacheRun], None], prog: str, description: str, cached: Mapping[str, bool]
) -> int:
    name, resolved = read_options(words, prog=prog, description=description)
    options = resolved.options
    logging = options.logging
    setup_logging(level=logging.console_log_level, file=logging.console_log_file, simple=logging.console_log_simple)
    for line in resolved.answers:
        if line.startswith("--skip_existing"):  # the other lines concern the training
            log.info(line)
    nothing = {"cache_latents": False, "cache_text_encoder_outputs": False}
    options = replace(options, cache=replace(options.cache, **nothing, **cached))
    from library.trainers.caching import filled_by_all

    prepared = CacheRun(open_family(FAMILIES[name], options.model), options)
    with filled_by_all(prepared.caches):
        fill(prepared)
    prepared.accelerator.end_training()
    return 0


class CacheRun:
    """The caches of the training run that these options describe."""

    def __init__(self, family: Any, options: CachingOptions) -> None:
        """Reads and checks everything. Raises UserError with all mistakes at once, before a model is loaded."""
        from library.data.lint import folder_lines
        from library.device import DistributedSettings, indexed, make_accelerator
        from library.sampling.prompts import load_prompts
        from library.sampling.references import texts_of
        from library.trainers.caching import Caches
        from library.trainers.checks import Checks, data_warnings, scan_datasets, training_data
        from library.trainers.resume import run_seed
        from library.trainers.settings import compute_dtype
        from library.weights.quick_import import import_diffusers

        checks = Checks()
        checks.run(family.check)
        checks.run(family.check_weights)
        file = options.sample.sample_prompts
        prompts = (checks.run(lambda: load_prompts(file)) if file else None) or ()
        control = checks.run(lambda: has_control_images(family.name, options)) or False
        found = checks.run(lambda: scan_datasets(family, options, control=control))
        data = (
            checks.run(lambda: training_data(found, options, run_seed(options, None), family.references))
            if found
            else None
        )
        checks.finish()
        assert found is not None and data is not None
        for line in folder_lines(found) if is_main_process() else ():
            log.info(line)
        warnings = data_warnings(family, found, data, cached=options.cache.texts)
        for line in (*warnings, *seed_warnings(options, data.stats())):
            log.warning(line)
        timeout = DistributedSettings(timeout_minutes=options.distributed.ddp_timeout)
        self.accelerator = make_accelerator(options.precision.mixed_precision, timeout)
        self.family, self.data, self.device = family, data, indexed(self.accelerator.device)
        self.dtype = compute_dtype(options.precision)
        size = found.datasets[0].config.buckets.resolution
        texts = texts_of(prompts, family.references, size, family.latent.factor)
        import_diffusers()
        self.caches = Caches(family, options, data, self.dtype, learning=(), more_texts=texts)

    def in_all(self, count: int) -> int:
        """The sum of a number over all processes."""
        from accelerate.utils import gather_object

        return sum(gather_object([count]))


def has_control_images(family: str, options: Any) -> bool:
    """Whether the training uses control images. Raises UserError for a network module of another family."""
    from library.families.adapters import load_network_module

    module = options.method.network_module
    problem = None if module is None else misfit(family, module)
    if problem is not None:
        raise UserError(problem)
    return options.architecture.control_images or (module is not None and load_network_module(module).conditioned)


def seed_warnings(options: TrainerOptions, stats: Sequence[Any]) -> Iterator[str]:
    """Warn that the training may hold out other pictures for validation and find some of its own not encoded."""
    held_out = any(dataset.validation_images for dataset in stats)
    if held_out and options.train.seed is None and options.data.validation_seed is None:
        yield (
            "pictures held out for validation depend on the seed: give the same --validation_seed here and in the "
            "training, or it may have a few pictures left to encode"
        )
