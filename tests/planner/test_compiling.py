# SPDX-License-Identifier: Apache-2.0
"""--compile auto: blocks are compiled on a card, and where the run is long enough; the reason is one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.planner import compiling
from library.planner.case import case_of
from library.planner.compiling import SECONDS_OF_COMPILING, kinds, with_compilation
from library.planner.planned import Planned
from tests.families import CASES
from tests.trainers.helpers import DEFAULTS, make_pictures, make_trainer, planned_of, subset, write_dataset

CARD = torch.device("cuda")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """A LoRA run of a tiny FLUX.1. There is a compiler for every device: it needs none."""
    folder = tmp_path_factory.mktemp("auto")
    case = CASES["flux"]
    own = {
        "dataset_config": write_dataset(folder / "data.toml", subset(make_pictures(folder / "pictures", 2))),
        "output_dir": folder / "out", "compile": "auto", "dynamo_backend": "aot_eager", "cache_latents": True,
        "cache_text_encoder_outputs": True, "network_train_unet_only": True,
    }  # fmt: skip
    return planned_of(make_trainer({**DEFAULTS, **case.make(folder / "model"), **case.options, **own}, family="flux"))


def decided(planned: Planned, caplog: pytest.LogCaptureFixture, batches: int = 10**12, graphs: int = 1,
            forbidden: str | None = None) -> tuple[bool, str]:  # fmt: skip
    """Whether it is compiled, and the line about it."""
    caplog.clear()
    with caplog.at_level("INFO"):
        found = with_compilation(planned, batches=batches, graphs=graphs, forbidden=forbidden)
    assert replace(found, choice=planned.choice) == planned
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("--compile auto: ")]
    return found.choice.compiled, line


def test_where_nothing_is_compiled(planned: Planned, caplog: pytest.LogCaptureFixture) -> None:
    assert not planned.choice.compiled
    start = "--compile auto: nothing is compiled: "
    assert decided(planned, caplog) == (False, f"{start}this run has no GPU (--compile compiles all the same)")
    reason = "--shard_base does not work with it"
    assert decided(replace(planned, device=CARD), caplog, forbidden=reason) == (False, start + reason)
    triton = replace(planned, device=CARD, memory=replace(planned.memory, dynamo_backend="inductor"))
    if not torch.cuda.is_available():
        assert decided(triton, caplog) == (False, f"{start}this machine has no Triton")


def test_long_runs_are_compiled(
    planned: Planned, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the number of batches on that saves as much as compiling each kind of block at each size takes."""
    case = case_of(planned)  # takes seconds
    monkeypatch.setattr(compiling, "case_of", lambda planned: case)
    monkeypatch.setattr(compiling, "is_card", lambda device: True)
    assert kinds(planned) == 2  # double and single blocks
    answers = {count: decided(planned, caplog, batches=count) for count in (10, 10**12)}
    assert not answers[10][0] and answers[10**12][0]
    assert answers[10][1].startswith("--compile auto: nothing is compiled: 10 batches save about 0 s (")
    cost = f"compiling takes about {2 * SECONDS_OF_COMPILING:.0f} s"
    assert answers[10][1].endswith(cost) and answers[10**12][1].endswith(cost)
    low, high = 10, 10**12
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(planned, caplog, batches=middle)[0] else (middle, high)
    assert not decided(planned, caplog, batches=high, graphs=2)[0]
    assert decided(planned, caplog, batches=2 * high, graphs=2)[0]
