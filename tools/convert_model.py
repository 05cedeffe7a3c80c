# SPDX-License-Identifier: Apache-2.0
r"""Write a Stable Diffusion 1.x, 2.x or XL model in another form: single file <-> diffusers folder.

    python tools/convert_model.py model.safetensors model_folder --use_safetensors
    python tools/convert_model.py model_folder model.safetensors --save_precision_as fp16
    python tools/convert_model.py model.ckpt model.safetensors

A name with an ending (.safetensors, .ckpt) is a single file, one without is a folder. Weights keep their numbers to
the bit where their precision stays.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.cli import guarded  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.families.registry import FAMILIES, family_class  # noqa: E402
from library.log import get_logger, setup_logging  # noqa: E402
from library.options import at_least, option, resolve, specs  # noqa: E402

FILE_ENDINGS = (".safetensors", ".ckpt")
PRECISIONS = ("no", "fp16", "bf16", "float")
LINEAR = "always so where the source has linear layers there, as the published models do"
# Metadata that depend on the exact tensors of the source
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
FOLDERS = {True: "diffusers_safetensors", False: "diffusers"}  # --use_safetensors -> kind of folder
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZERS = ("tokenizer", "tokenizer_2")

log = get_logger()


def _metadata(value: Any) -> str:
    """Check that a value is a Python dict of texts. Raises ValueError."""
    try:
        found = ast.literal_eval(str(value))
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(item, str) for pair in found.items() for item in pair):
        raise ValueError(f"""expects texts such as {{"modelspec.title": "my model"}}, got '{value}'""")
    return str(value)


@dataclass(frozen=True)
class ConversionOptions:
    """What to convert."""

    model_to_load: str | None = option(None, help="Model to read: file, diffusers folder or hub id.", path=True)
    model_to_save: str | None = option(None, help="File (.safetensors, .ckpt) or diffusers folder to write.", path=True)
    v1: bool = option(False, help="The model is Stable Diffusion 1.x; without any of the three it is found out.")
    v2: bool = option(False, help="The model is Stable Diffusion 2.x.")
    sdxl: bool = option(False, help="The model is Stable Diffusion XL.")
    v_parameterization: bool = option(
        False, help="The model predicts v: a folder says so, of a single file nothing is known."
    )
    fp16: bool = option(False, help="The same as --save_precision_as fp16.")
    bf16: bool = option(False, help="The same as --save_precision_as bf16.")
    float: bool = option(False, help="The same as --save_precision_as float.")
    save_precision_as: str = option("no", help="Precision of the weights; no: as they are.", choices=PRECISIONS)
    epoch: int = option(0, help="Epochs that a .ckpt says the model was trained for.", check=at_least(0))
    global_step: int = option(0, help="Steps that a .ckpt says the model was trained for.", check=at_least(0))
    metadata: str | None = option(
        None, help="""Metadata for a .safetensors file, as {"name": "value"}; they win over the source's.""",
        parse=_metadata,
    )  # fmt: skip
    variant: str | None = option(None, help="Read these files of a folder: fp16 for *.fp16.safetensors.")
    reference_model: str | None = option(
        None, help="Diffusers folder or hub id whose scheduler and tokenizer a new folder gets.", path=True
    )
    use_safetensors: bool = option(False, help="Weights of a folder as .safetensors, not as .bin.")
    tokenizer_cache_dir: str | None = option(None, help="Folder that keeps tokenizers, as in training.", path=True)
    unet_use_linear_projection: bool = option(False, help="Linear layers in the U-Net's attention.", answer=LINEAR)

    @property
    def precision(self) -> str:
        """One of PRECISIONS."""
        return next((name for name in PRECISIONS[1:] if vars(self)[name]), self.save_precision_as)

    @property
    def to_file(self) -> bool:
        return bool(Path(self.model_to_save or "").suffix)

    def problems(self) -> Iterator[str]:
        """Missing options and invalid combinations, one line each."""
        for name in ("model_to_load", "model_to_save"):
            if vars(self)[name] is None:
                yield f"--{name} is needed"
        kinds = [f"--{name}" for name in ("v1", "v2", "sdxl") if vars(self)[name]]
        if len(kinds) > 1:
            yield f"{' and '.join(kinds)}: give one of them"
        asked = {name for name in PRECISIONS[1:] if vars(self)[name] or self.save_precision_as == name}
        if len(asked) > 1:
            yield f"several precisions are asked for ({', '.join(sorted(asked))}): give one"
        if self.model_to_save and self.to_file and Path(self.model_to_save).suffix not in FILE_ENDINGS:
            yield f"--model_to_save {self.model_to_save}: a file must end with {' or '.join(FILE_ENDINGS)}"
        if self.model_to_save and self.model_to_load:
            yield from self._target_problems(Path(self.model_to_load), Path(self.model_to_save))

    def _target_problems(self, source: Path, target: Path) -> Iterator[str]:
        if source.resolve() == target.resolve():
            yield f"--model_to_save {target} is --model_to_load itself: give another name"
        ending = target.suffix if self.to_file else "a folder"
        if self.metadata and ending != ".safetensors":
            yield f"--metadata: {ending} has no place for them; save as .safetensors"
        if (self.epoch or self.global_step) and ending != ".ckpt":
            yield f"--epoch and --global_step: {ending} has no place for them; save as .ckpt"
        if self.to_file:
            for name in ("reference_model", "use_safetensors"):
                if vars(self)[name]:
                    yield f"--{name} has no effect on a single file"
        if self.variant and source.is_file():
            yield f"--variant has no effect on a single file: {source}"


@dataclass(frozen=True)
class ConvertModelOptions:
    """All options of this script."""

    convert: ConversionOptions = field(default_factory=ConversionOptions)


# ---- the source -----------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """Detect "v1", "v2" or "sdxl" from names and shapes. Raises UserError for other architectures."""
    from library.families.detect import architecture, context_dim
    from library.families.sd.names import OPEN_CLIP_PREFIX
    from library.families.sd.parts import CONTEXT_DIMS
    from library.weights.loading import read_json
    from library.weights.weight_files import open_weights

    if path.is_dir():
        unet = read_json(path / "unet" / "config.json")
        width = unet.get("cross_attention_dim", 0)
        return "sdxl" if unet.get("addition_embed_type") == "text_time" else f"v{CONTEXT_DIMS.get(width, 1)}"
    shapes = open_weights(path).shapes
    other = architecture(shapes)
    if other is not None and other.name not in ("sd", "sdxl"):
        raise UserError(f"{path} is of another architecture ({other.name}): only SD 1.x, 2.x and XL are converted")
    if other is not None and other.name == "sdxl":
        return "sdxl"
    if any(name.startswith(OPEN_CLIP_PREFIX) for name in shapes):
        return "v2"
    return f"v{CONTEXT_DIMS.get(context_dim(shapes) or 0, 1)}"


def edits(path: Path) -> bool:
    """Whether the U-Net of a model reads a picture to edit."""
    from library.families.sd.names import UNET_PREFIX
    from library.weights.grown_input import EDIT_CHANNELS
    from library.weights.loading import read_json
    from library.weights.weight_files import open_weights

    if path.is_dir():
        return read_json(path / "unet" / "config.json").get("in_channels") == EDIT_CHANNELS
    shape = open_weights(path).shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", ())
    return len(shape) == 4 and shape[1] == EDIT_CHANNELS


def open_family(options: ConversionOptions, path: Path, reference: Path | None) -> Any:
    """The family of the model at `path`, its headers read, with the scheduler that a new folder gets."""
    from library.weights.loading import read_json

    kind = next((name for name in ("v1", "v2", "sdxl") if vars(options)[name]), None) or kind_of(path)
    sheet = FAMILIES["sdxl" if kind == "sdxl" else "sd"]
    is_v = options.v_parameterization or predicts_v(path) or (reference is not None and predicts_v(reference))
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path),
        "tokenizer_cache_dir": options.tokenizer_cache_dir,
        "v_parameterization": is_v,
        "task": "edit" if edits(path) else None,
    }
    if kind != "sdxl":
        values["v2"] = kind == "v2"
    opened = family_class(sheet)(sheet.option_groups["model"](**values))
    scheduler = read_json(reference / SCHEDULER) if reference else opened.parts.scheduler
    prediction = "v_prediction" if is_v else "epsilon"
    opened.parts = replace(opened.parts, scheduler={**scheduler, "prediction_type": prediction})
    return opened


def predicts_v(path: Path) -> bool:
    """Whether the model declares v-prediction: in a folder's scheduler configuration, or by an empty tensor (SDXL)."""
    from library.families.sdxl.parts import V_MARK
    from library.weights.loading import read_json
    from library.weights.weight_files import open_weights

    if path.is_file():
        return V_MARK in open_weights(path).shapes
    file = path / SCHEDULER
    return file.is_file() and read_json(file).get("prediction_type") == "v_prediction"


def located_source(options: ConversionOptions, reference: Path | None, temporary: Path) -> Path:
    """Path of the model to read, with the weights of --variant and the tokenizers of --reference_model.

    temporary: an empty folder, used for links when one of these is given.
    """
    from library.weights.loading import PIPELINE_FILES, locate

    weights = [f"{part}/*.safetensors" for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    path = locate(options.model_to_load or "", "--model_to_load", (*PIPELINE_FILES, *weights))
    if options.variant:
        if not path.is_dir():
            raise UserError(f"--variant has no effect on a single file: {path}")
        link_variant(path, options.variant, temporary)
    if reference is None:
        return temporary if options.variant else path
    if path.is_file():
        (temporary / path.name).symlink_to(path.absolute())
    elif not options.variant:
        for part in path.iterdir():
            (temporary / part.name).symlink_to(part.absolute())
    for name in TOKENIZERS:
        place = temporary / name
        if place.is_symlink():
            place.unlink()
        elif place.is_dir():
            shutil.rmtree(place)
        if (reference / name).is_dir():
            place.symlink_to((reference / name).absolute())
    return temporary / path.name if path.is_file() else temporary


def link_variant(path: Path, variant: str, place: Path) -> None:
    """Fill `place` with links to a folder, in which the weights of one variant have the usual names.

    `unet/diffusion_pytorch_model.fp16.safetensors` becomes `unet/diffusion_pytorch_model.safetensors`.
    """
    found = 0
    for source in path.glob("*/*"):
        words = source.name.split(".")
        if words[-1] in ("safetensors", "bin") or words[-2:] == ["index", "json"]:
            if variant not in words:
                continue
            words.remove(variant)
            found += 1
        (place / source.parent.name).mkdir(exist_ok=True)
        (place / source.parent.name / ".".join(words)).symlink_to(source.absolute())
    if not found:
        raise UserError(f"--variant {variant}: {path} has no weights of that name (unet/*.{variant}.safetensors)")
    if (path / "model_index.json").is_file():
        (place / "model_index.json").symlink_to((path / "model_index.json").absolute())


def located_reference(name: str) -> Path:
    """The folder of --reference_model. Raises UserError if it does not exist or lacks scheduler or tokenizer."""
    from library.weights.loading import HUB_ID

    path = Path(name).expanduser()
    if not path.exists() and HUB_ID.fullmatch(name):
        path = download_reference(name)
    missing = [part for part in (SCHEDULER, "tokenizer") if not (path / part).exists()]
    if missing:
        raise UserError(f"--reference_model: {name} is not a diffusers folder: {' and '.join(missing)} missing there")
    return path


def download_reference(name: str) -> Path:
    """Download scheduler and tokenizers of a hub repository, without weights. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=[SCHEDULER, *(f"{part}/*" for part in TOKENIZERS)]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise UserError(f"--reference_model: {name} does not exist here, and the hub cannot be reached") from None
    except (HfHubHTTPError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--reference_model: the hub does not give {name}: {reason}") from None


# ---- the result -----------------------------------------------------------------------------------------------------


def convert(options: ConversionOptions) -> None:
    """Read headers, check, and write the model atomically. Raises UserError and SaveError."""
    from library.device import DTYPES
    from library.io.checkpoint import CheckpointForm
    from library.weights.quick_import import import_diffusers

    assert options.model_to_save is not None
    target = Path(options.model_to_save)
    check_target(target, to_file=options.to_file)
    import_diffusers()
    with tempfile.TemporaryDirectory() as temporary:
        reference = located_reference(options.reference_model) if options.reference_model else None
        family = open_family(options, located_source(options, reference, Path(temporary)), reference)
        kind = target.suffix[1:] if options.to_file else FOLDERS[options.use_safetensors]
        if not options.to_file:
            family.check()  # checks the tokenizer, which a file does not contain
        family.check_weights()
        dtype = None if options.precision == "no" else DTYPES[options.precision]
        target.parent.mkdir(parents=True, exist_ok=True)
        form = CheckpointForm(kind, options.epoch, options.global_step, dtype, header(options))
        family.save(family.load_denoiser(None, "cpu"), {}, target, form)
    log.info(f"wrote {target}")


def check_target(target: Path, *, to_file: bool) -> None:
    """Raises UserError when the target is something else than a model, which must not be overwritten."""
    from library.io.checkpoint import MODEL_INDEX

    if to_file and target.is_dir():
        raise UserError(f"--model_to_save {target} is a folder; give a file")
    if to_file or not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--model_to_save {target} is a file; a folder (a name without ending) is written here")
    if any(target.iterdir()) and not (target / MODEL_INDEX).is_file():
        raise UserError(f"--model_to_save {target} is a folder of other things: give another name")


def header(options: ConversionOptions) -> dict[str, str]:
    """Metadata of the new file: those of the source file, without its hashes, and --metadata."""
    from library.weights.weight_files import SafetensorsFile, open_weights

    source = Path(options.model_to_load or "")
    file = open_weights(source) if source.suffix == ".safetensors" and source.is_file() else None
    own = file.metadata if isinstance(file, SafetensorsFile) else {}
    kept = {key: value for key, value in own.items() if key not in HASHES}
    return {**kept, **(ast.literal_eval(options.metadata) if options.metadata else {})}


# ---- the command line -----------------------------------------------------------------------------------------------


def with_flags(words: Sequence[str]) -> list[str]:
    """Add the flags of source and target to `source target --v2` or `--v2 source target`, as sd-scripts takes them."""
    flags = [i for i, word in enumerate(words) if word.startswith("--")]
    first = flags[0] if flags else len(words)
    start = 0
    if first != 2 and flags:
        known = specs({"convert": ConversionOptions})
        last = known.get(words[flags[-1]][2:])
        start = flags[-1] + (1 if last is not None and last.hint is bool else 2)
    names = words[start : start + 2]
    if len(names) != 2 or (start and start + 2 != len(words)):
        return list(words)
    rest = [*words[:start], *words[start + 2 :]]
    return ["--model_to_load", names[0], "--model_to_save", names[1], *rest]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""

    def action() -> int:
        words = with_flags(sys.argv[1:] if argv is None else argv)
        description = inspect.cleandoc(__doc__ or "")
        found = resolve(ConvertModelOptions, {}, words, prog="convert_model.py", description=description)
        setup_logging(level=None, file=None, simple=True)
        for line in found.answers:
            log.info(line)
        convert(found.options.convert)
        return 0

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
