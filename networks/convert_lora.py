# SPDX-License-Identifier: Apache-2.0
r"""Write a LoRA file in another format: kohya, comfy or peft.

    python networks/convert_lora.py --src lora.safetensors --dst lora_peft.safetensors --to peft

Architecture and format of --src are found from its keys. Which program reads which format: docs/lora_formats.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.formats.peft_folder import PEFT_FILES
from library.adapters.surgery.tool_options import needed
from library.byte_paths import plain_path
from library.cli import run_tool
from library.errors import UserError, retold
from library.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from library.adapters.formats.architecture import Architecture, PublishedLayer, Tables

PRECISIONS = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Header entries that describe the scale of the tensors in the source's format
OF_ONE_FORMAT = ("lora_alphas", "lora_adapter_metadata")
# What stands before a weight in the files that people have
DENOISER_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
ENCODER_PREFIXES = ("", "cond_stage_model.transformer.", "model.")


@dataclass(frozen=True)
class ConvertOptions:
    """The files and the format."""

    src: str | None = option(
        None, help="LoRA file to read, in any of the three formats, or a folder of PEFT.", path=True
    )
    dst: str | None = option(None, help="File to write (.safetensors).", path=True)
    to: str | None = option(None, help="Format to write.", choices=("kohya", "comfy", "peft"))
    save_precision: str | None = option(
        None, help="Precision of the weights in the new file; without it they keep theirs.", choices=tuple(PRECISIONS)
    )
    base_model: tuple[str, ...] = option(
        (),
        help="Files (.safetensors) with the base model's weights; only DoRA to or from comfy needs them, and LoRAs "
        "whose layers have names of several architectures.",
        path=True,
    )

    def problems(self) -> Iterator[str]:
        """Options that are missing or would destroy a file."""
        yield from needed(self, "src", "dst", "to")
        if self.dst is not None and Path(self.dst).suffix != ".safetensors":
            yield f"--dst {self.dst}: the file must end with .safetensors"
        if self.src and self.dst:
            source = Path(self.src).resolve()
            if Path(self.dst).resolve() in (source, *(source / name for name in PEFT_FILES)):
                yield f"--dst {self.dst} is --src itself: give another file"


@dataclass(frozen=True)
class ConvertLoraOptions:
    """All options of this script."""

    convert: ConvertOptions = field(default_factory=ConvertOptions)


def convert_file(options: ConvertOptions) -> None:
    """Read, convert, write whole or not at all. Raises UserError for what cannot be converted."""
    import torch

    from library.adapters.formats import conversion
    from library.families.adapters import adapter_tables
    from library.io.checkpoint import in_precision, save_tensors

    assert options.src and options.dst and options.to
    if Path(options.dst).is_dir():
        raise UserError(f"--dst {options.dst} is a folder; give a file")
    tables = adapter_tables()
    source, metadata = conversion.read_tensors(options.src), conversion.read_metadata(options.src)
    with retold(lambda line: f"{options.src}: {line}"):
        with ExitStack() as files:
            base = BaseWeights(options.base_model, files)
            alphas, among = conversion.alphas_in(metadata), architectures(source, tables, base)
            tensors = conversion.to_kohya(source, tables, alphas=alphas, among=among)
            layers = conversion.layers_in(tensors, tables) if options.base_model else {}
            norms = conversion.dora_norms(tensors, lambda name: base.weight(layers[name]), tables) if layers else None
        if options.save_precision:
            dtype = getattr(torch, PRECISIONS[options.save_precision])
            weights = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
            tensors |= in_precision(weights, dtype, options.dst)
        result = conversion.convert(tensors, options.to, tables, norms=norms)
    kept = {key: value for key, value in metadata.items() if key not in OF_ONE_FORMAT}
    Path(options.dst).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(options.dst, result, {**kept, **conversion.header(tensors, options.to, tables)})


def architectures(tensors: Mapping[str, Tensor], tables: Tables, base: BaseWeights) -> list[Architecture] | None:
    """The architectures that the file can be for: where several have its layers, what the base model has most of."""
    from library.adapters.formats.conversion import layers_in
    from library.adapters.formats.recognition import architectures_of, format_of, require_one

    if format_of(tensors, tables) == "kohya":
        return None
    found = architectures_of(tensors, tables)
    if len(found) > 1:  # what no architecture can have is said first
        having = {a: sum(base.has(layer) for layer in layers_in(tensors, [a]).values()) for a in found}
        found = [architecture for architecture in found if having[architecture] == max(having.values())]
    advice = f"give --base_model, a file of {' or '.join(architecture.title for architecture in found)}"
    require_one(tensors, tables, found, advice)
    return found


class BaseWeights:
    """Weights of a base model by layer, from one or several files in published names or in those of diffusers."""

    def __init__(self, paths: Sequence[str], files: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.sources: dict[str, Any] = {}
        for path in paths:
            try:
                file = files.enter_context(safe_open(files.enter_context(plain_path(path)), "pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"--base_model {path}: not a readable .safetensors file ({error})") from None
            self.sources |= dict.fromkeys(file.keys(), file)

    def has(self, layer: PublishedLayer) -> bool:
        """Whether the files have the layer under its published name."""
        return any(f"{path}.weight" in self.sources for path in self._paths(layer))

    def _paths(self, layer: PublishedLayer) -> list[str]:
        prefixes = (
            (*ENCODER_PREFIXES, layer.comfy.removesuffix(layer.published)) if layer.encoder else DENOISER_PREFIXES
        )
        return [prefix + layer.published for prefix in prefixes]

    def weight(self, layer: PublishedLayer) -> Tensor | None:
        """The weight of a `PublishedLayer`, rows as published; None when no file has it."""
        import torch

        for path in self._paths(layer):
            found = self._read(path)
            if found is not None:
                return found
        parts = [self._read(path.partition(".")[2]) for path in layer.parts]
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            return None
        whole = torch.cat(there)
        swaps = whole.dim() == 2 and layer.swaps(*whole.shape)
        return torch.cat(whole.chunk(2)[::-1]) if swaps else whole

    def _read(self, path: str) -> Tensor | None:
        """A weight in float32, times the scale that fp8 files have beside it."""
        if f"{path}.weight" not in self.sources:
            return None
        weight = self.sources[f"{path}.weight"].get_tensor(f"{path}.weight").float()
        for name in (f"{path}.scale_weight", f"{path}.weight_scale"):
            if name in self.sources:
                weight = weight * self.sources[name].get_tensor(name).float()
        return weight


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    act = lambda options: convert_file(options.convert)
    return run_tool(ConvertLoraOptions, act, argv, "convert_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
