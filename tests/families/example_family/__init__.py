# SPDX-License-Identifier: Apache-2.0
"""A small architecture that is not in the product: what docs/adding_an_architecture.md describes, step by step.

A transformer over picture and text tokens, trained with flow matching, in the latent space of SD's autoencoder.
"""

from __future__ import annotations

from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant
from tests.families.example_family.options import ExampleFlowOptions, ExampleOptions

SHEET = Sheet(
    name="example",
    title="Example 1",
    path="tests.families.example_family.model:Example",
    option_groups={"model": ExampleOptions, "objective": ExampleFlowOptions},
    files=FileMarks("an Example", tensors=("example_embedder.",), pipelines=("ExamplePipeline",)),
    networks={"lora": "networks.lora_example", **EVERYWHERE},
    variants={
        "example": Variant(
            ModelFacts("example1", "example-1", "https://example.org/example", prediction_type=None),
            PreviewDefaults(steps=2, scale=1.0, size=64),
        )
    },
    adapter_prefixes={"clip_l": "lora_te1"},
    bucket_step=16,
    scripts={"network": "example_train_network.py", "finetune": "example_train.py"},
)
