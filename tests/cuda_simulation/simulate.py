# SPDX-License-Identifier: Apache-2.0
"""Turns the simulated card on, for this process and for the Python processes that it starts.

`simulate()` itself is quick: the card is loaded when torch is imported, by an import hook, so that processes that do
not import torch pay nothing. Child processes find `site/sitecustomize.py` on PYTHONPATH, which calls it again; they
take the built library from the environment, not from a cache folder that a test may have changed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from tests.cuda_simulation.build import CannotSimulate, build
from tests.cuda_simulation.preload import load

VARIABLE = "TRAINYARD_SIMULATED_CARD"  # the built library; set in processes that have the card
SITE = Path(__file__).with_name("site")


def simulate() -> None:
    """Give this process, and those it starts, a simulated card. Raises CannotSimulate where that cannot be."""
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    if "torch" in sys.modules:
        raise CannotSimulate("the simulated card has to be there before torch is imported")
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = str(build())
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(SITE) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *paths])
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # often empty on machines without a card, which would hide this one
    os.environ.pop("ACCELERATE_USE_CPU", None)
    sys.meta_path.insert(0, Finder(Path(os.environ[VARIABLE])))


def is_simulated() -> bool:
    """True when "cuda" is the simulated card in this process."""
    return VARIABLE in os.environ


# ---- the import hook ------------------------------------------------------------------------------------------------


class Finder(MetaPathFinder):
    """Acts around the import of two packages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.busy = False  # looking for the package that it was asked for

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.busy or name not in ("torch", "bitsandbytes"):
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = Around(spec.loader, self.torch if name == "torch" else bitsandbytes)
        return spec

    @contextlib.contextmanager
    def torch(self, folder: Path) -> Iterator[None]:
        """The card's library is loaded before torch is, and its functions are there after."""
        card = load(self.path, folder / "lib")
        yield
        from tests.cuda_simulation.install import install

        install(card)


@contextlib.contextmanager
def bitsandbytes(folder: Path) -> Iterator[None]:
    """It chooses its kernels when it is imported: those of the CPU."""
    from tests.cuda_simulation.install import hidden

    with hidden():
        yield


class Around(Loader):
    """Another loader, with something done around the run of a package."""

    def __init__(self, loader: Loader, within: Callable[[Path], AbstractContextManager[None]]) -> None:
        self.loader, self.within = loader, within

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None and module.__file__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        with self.within(Path(module.__file__).parent):
            self.loader.exec_module(module)
