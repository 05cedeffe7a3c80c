# SPDX-License-Identifier: Apache-2.0
"""The data sheet of an architecture: facts that need no loaded model. Imports no torch.

Each package below library/families has one, `SHEET` in its `__init__.py`. Everything specific to an architecture
follows from its sheet: the scripts' option groups, detection of files, which --network_module fits, metadata,
docs/options.md, the table in the README, the recipes in configs/memory and the jobs of the GPU benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from library.families.recipes import BenchmarkJob, MemoryRecipe

# kinds of adapters for every architecture, and those for U-Nets
EVERYWHERE = {kind: f"networks.{kind}" for kind in ("lora_fa", "dylora", "loha", "lokr")}
OF_UNETS = {kind: f"networks.{kind}" for kind in ("lora", "oft", "control_net_lllite")} | EVERYWHERE


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the base model for the metadata of saved files."""

    base_model_version: str  # ss_base_model_version: "sd_v1"
    architecture: str  # modelspec.architecture without "/lora": "stable-diffusion-v1"
    implementation: str  # modelspec.implementation of adapter files
    prediction_type: str | None  # modelspec.prediction_type: "epsilon", "v"
    checkpoint_implementation: str | None = None  # modelspec.implementation of checkpoints, where it differs


@dataclass(frozen=True)
class PreviewDefaults:
    """Defaults for prompts of previews, and the optional fields of a prompt that the family uses."""

    steps: int = 30
    scale: float = 7.5  # classifier-free guidance; 1 turns it off
    guidance: float | None = None  # embedded guidance, of distilled models
    size: int = 512  # pixels of a side if the dataset gives no size
    cfg_trunc_ratio: float | None = None  # classifier-free guidance only at noise levels above 1 - this
    renorm_cfg: float | None = None  # largest factor by which guidance may lengthen a prediction
    honoured: tuple[str, ...] = ()  # of library.sampling.preview.SPECIAL_FIELDS


@dataclass(frozen=True)
class Variant:
    """A published model of an architecture. The family tells which one it is from its options and files."""

    facts: ModelFacts
    preview: PreviewDefaults = PreviewDefaults()


@dataclass(frozen=True)
class FileMarks:
    """How the files of an architecture are recognised."""

    called: str  # with its article, before the word "checkpoint": "an SDXL"
    # tensor names without prefix, or beginnings of names that end with a dot, published and of diffusers; one is enough
    tensors: tuple[str, ...]
    pipelines: tuple[str, ...] = ()  # beginnings of `_class_name` in model_index.json
    # completes "<file> is ..." if nothing in the file is recognised
    unknown: str = "a file of unknown names: it has no denoiser inside"


@dataclass(frozen=True)
class Sheet:
    """Facts about an architecture that are known before a file is opened."""

    name: str  # in the registry, and of its package: "sdxl"
    title: str  # for users: "Stable Diffusion XL"
    path: str  # "module:Class" of its ModelFamily
    option_groups: Mapping[str, type]  # option groups of a method that it replaces with its own: at least "model"
    files: FileMarks
    networks: Mapping[str, str]  # kind of adapters -> the --network_module for these models
    variants: Mapping[str, Variant]
    adapter_prefixes: Mapping[str, str]  # text encoder -> prefix of its names in adapter files: "lora_te1"
    bucket_step: int  # pixels; sides of pictures are multiples of it

    # scripts
    scripts: Mapping[str, str] = field(default_factory=dict)  # method of library.cli -> script
    family_option: str | None = None  # model option with which the scripts train other families, by their names
    scripts_of: str | None = None  # family whose scripts train this one, with their `family_option`

    # options and files
    token_option: str = "--max_token_length"  # the option that limits the length of captions
    formats: tuple[str, ...] = ("safetensors",)  # of --save_model_as, in which checkpoints can be written
    lora_format: str = "kohya"  # default of --lora_format
    side_endings: tuple[str, ...] = ()  # of files that are written beside a checkpoint: "_clip_l"
    # text encoder -> the --network_args key that must be True to train its adapters: it is too large to train by
    # default. Empty key: its adapters are never trained
    asked_encoders: Mapping[str, str] = field(default_factory=dict)

    # pages and recipes
    models: str = ""  # in the README's table: "SD3, SD3.5 medium and large"; empty if `scripts_of` lists them
    page: str = ""  # "docs/sd3.md"
    recipes: Mapping[str, str] = field(default_factory=dict)  # method -> "configs/sd3_lora.toml"
    memory_recipes: Mapping[str, MemoryRecipe] = field(default_factory=dict)  # name in configs/memory -> recipe
    benchmarks: Mapping[str, BenchmarkJob] = field(default_factory=dict)  # name -> job of benchmarks/gpu

    @property
    def default_network(self) -> str:
        """The default of --network_module."""
        return self.networks["lora"]
