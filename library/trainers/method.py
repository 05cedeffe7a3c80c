# SPDX-License-Identifier: Apache-2.0
"""Interface of a training method: which weights learn, how they are built, and what is saved."""

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

    A new method implements `learning` and `build`; the other methods have defaults.
    """

    project: ClassVar[str]  # default name of the project in the log
    learns_edits: ClassVar[bool] = True  # whether it can learn to edit pictures (--task edit)

    def __init__(self, family: ModelFamily, options: Options) -> None:
        self.family, self.options = family, options

    @abstractmethod
    def learning(self) -> Learning:
        """Which models learn. Called after the family's files are checked."""

    @abstractmethod
    def build(self, models: Models, choice: MemoryChoice, *, files: bool = True) -> Trainables:
        """Attach or select the weights that learn; everything else in `models` is frozen already.

        files: False if only sizes matter, and files with initial weights are not read.
        """

    def checks(self) -> list[Callable[[], None]]:
        """Checks that run before a model is loaded; each raises UserError."""
        return []

    def with_captions(self, found: Scan) -> Scan:
        """The datasets with the captions that the method uses. Raises UserError if it cannot learn from them."""
        return found

    @property
    def extension(self) -> str:
        """File ending of the saves; empty if each is a folder."""
        return EXTENSIONS[self.options.save.save_model_as]

    def explained(self, error: Exception) -> str | None:
        """One line for an error raised by third-party code of the method; None for any other error."""
        return None
