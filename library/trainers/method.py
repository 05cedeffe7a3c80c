# SPDX-License-Identifier: Apache-2.0
"""A method of training: which weights learn, how they are built, and what is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

from library.data.scan import Scan
from library.families.family import ModelFamily
from library.io.checkpoint import EXTENSIONS
from library.learning import Learning, Models, Trainables
from library.memory.choice import MemoryChoice
from library.trainers.options import TrainerOptions

Options = TypeVar("Options", bound=TrainerOptions, covariant=True)


class Method(ABC, Generic[Options]):
    """The method of one run, on one family and with one user's options.

    A new method answers `learning` and `build`; the other four have defaults.
    """

    project: ClassVar[str]  # name of the log's project where none is given

    def __init__(self, family: ModelFamily, options: Options) -> None:
        self.family, self.options = family, options

    @abstractmethod
    def learning(self) -> Learning:
        """Which models learn. Known when the family's files are checked."""

    @abstractmethod
    def build(self, models: Models, choice: MemoryChoice, *, files: bool = True) -> Trainables:
        """Attach or choose what learns; everything else in `models` is frozen already.

        files: False where only sizes matter, and files of weights to start from are not read.
        """

    def checks(self) -> list[Callable[[], None]]:
        """What is checked before a model is loaded; each raises UserError."""
        return []

    def with_captions(self, found: Scan) -> Scan:
        """The datasets with the captions that the method wants. Raises UserError where it cannot learn from them."""
        return found

    @property
    def extension(self) -> str:
        """File ending of the saves; empty where each is a folder."""
        return EXTENSIONS[self.options.save.save_model_as]

    def explained(self, error: Exception) -> str | None:
        """One line for an error that third-party code of the method raised; None for any other error."""
        return None
