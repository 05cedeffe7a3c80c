# SPDX-License-Identifier: Apache-2.0
"""The data sheet of an architecture: what is known of it without loading anything. Imports no torch.

Each room below library/families has one, `SHEET` in its `__init__.py`. Everything that is written per architecture
follows from the sheets: option groups of the scripts, detection of files, which --network_module fits, metadata,
docs/options.md, the table in the README, the recipes in configs/memory and the jobs of the GPU benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from library.families.recipes import BenchmarkJob, MemoryRecipe

# adapter kinds that are made for every architecture, and those of U-Nets
EVERYWHERE = {kind: f"networks.{kind}" for kind in ("lora_fa", "dylora", "loha", "lokr")}
OF_UNETS = {kind: f"networks.{kind}" for kind in ("lora", "oft", "control_net_lllite")} | EVERYWHERE


@dataclass(frozen=True)
class ModelFacts:
    """What the metadata of saved files say about the base model."""

    base_model_version: str  # ss_base_model_version: "sd_v1"
    architecture: str  # modelspec.architecture without "/lora": "stable-diffusion-v1"
    implementation: str  # modelspec.implementation of adapter files
    prediction_type: str | None  # modelspec.prediction_type: "epsilon", "v"
    checkpoint_implementation: str | None = None  # modelspec.implementation of checkpoints, where it differs


@dataclass(frozen=True)
class PreviewDefaults:
    """What a prompt of a preview means where it says nothing, and which of its fields the family makes use of."""

    steps: int = 30
    scale: float = 7.5  # classifier-free guidance; 1 turns it off
    guidance: float | None = None  # embedded guidance, of distilled models
    size: int = 512  # pixels of a side where the dataset has no size
    cfg_trunc_ratio: float | None = None  # classifier-free guidance only at noise levels above 1 - this
    renorm_cfg: float | None = None  # most that guidance may lengthen a prediction
    honoured: tuple[str, ...] = ()  # of library.sampling.preview.SPECIAL_FIELDS


@dataclass(frozen=True)
class Variant:
    """One of the published models of an architecture, which a family tells apart by its options and its files."""

    facts: ModelFacts
    preview: PreviewDefaults = PreviewDefaults()


@dataclass(frozen=True)
class FileMarks:
    """How the files of an architecture are recognised."""

    called: str  # with its article, before the word "checkpoint": "an SDXL"
    # tensor names without prefix, or starts of them that end with a dot: one is enough. Published and diffusers names
    tensors: tuple[str, ...]
    pipelines: tuple[str, ...] = ()  # starts of `_class_name` in model_index.json
    # completes "<file> is ..." for a file in which nothing is recognised
    unknown: str = "a file of unknown names: it has no denoiser inside"


@dataclass(frozen=True)
class Sheet:
    """What is known of an architecture before a file is opened."""

    name: str  # in the registry, and that of its room: "sdxl"
    title: str  # as users call the models that its scripts train: "Stable Diffusion XL"
    path: str  # "module:Class" of its ModelFamily
    option_groups: Mapping[str, type]  # groups of a method's options that it replaces by its own: "model" at least
    files: FileMarks
    networks: Mapping[str, str]  # kind of adapters -> the --network_module for these models
    variants: Mapping[str, Variant]
    adapter_prefixes: Mapping[str, str]  # text encoder -> what its names in adapter files begin with: "lora_te1"
    bucket_step: int  # sides of pictures are multiples of it, in pixels

    # who starts it
    scripts: Mapping[str, str] = field(default_factory=dict)  # method of library.cli -> script
    family_option: str | None = None  # model option whose value is the name of the family that the scripts train
    scripts_of: str | None = None  # the family whose scripts train it, by their `family_option`

    # what its options and files are like
    token_option: str = "--max_token_length"  # the option that limits the length of captions
    formats: tuple[str, ...] = ("safetensors",)  # of --save_model_as, in which checkpoints can be written
    lora_format: str = "kohya"  # the --lora_format of a run that gives none
    side_endings: tuple[str, ...] = ()  # of files that are written beside a checkpoint: "_clip_l"
    # text encoders whose adapters are trained only when this --network_args key is True: too large to train unasked.
    # Empty: they are never trained
    asked_encoders: Mapping[str, str] = field(default_factory=dict)

    # pages and recipes
    models: str = ""  # in the README's table: "SD3, SD3.5 medium and large"; empty: those of `scripts_of`
    page: str = ""  # "docs/sd3.md"
    recipes: Mapping[str, str] = field(default_factory=dict)  # method -> "configs/sd3_lora.toml"
    memory_recipes: Mapping[str, MemoryRecipe] = field(default_factory=dict)  # name in configs/memory -> recipe
    benchmarks: Mapping[str, BenchmarkJob] = field(default_factory=dict)  # name -> job of benchmarks/gpu

    @property
    def default_network(self) -> str:
        """The --network_module of a run that gives none."""
        return self.networks["lora"]
