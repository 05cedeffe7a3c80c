# SPDX-License-Identifier: Apache-2.0
"""The options of textual inversion. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from library.data.options import CacheOptions, DataOptions
from library.io.options import SaveOptions, name_problems
from library.options import Idle, at_least, option, refused
from library.trainers.options import TrainerOptions

NO_TEXT_CACHE = "the text encoder's outputs change with every step, because it learns a word"
NO_DROPOUT = "a caption without the new word teaches it nothing"
# What captions are taken apart at: parts, weights in brackets, {a|b}, and lines
TAKEN = "()[]{},\\\n\r"


@dataclass(frozen=True)
class WordOptions:
    """The new word, and what it begins as."""

    token_string: str | None = option(None, help="The new word, as it stands in the captions.")
    init_word: str | None = option(None, help="Word (or words) of the model that the new one begins as.")
    num_vectors_per_token: int = option(1, help="Number of vectors that the word is made of.", check=at_least(1, 225))
    weights: str | None = option(None, help="Start from this textual inversion file.", path=True)
    use_object_template: bool = option(False, help='Replace all captions by sentences like "a photo of a <word>".')
    use_style_template: bool = option(
        False, help='Replace all captions by sentences like "a painting in the style of <word>".'
    )

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense, one line each."""
        word = self.token_string
        if not word or not word.strip():
            yield "--token_string is missing: give the new word, as it stands in the captions"
        elif word != word.strip():
            yield f"--token_string '{word}': leave out the spaces around it"
        elif set(word) & set(TAKEN):
            bad = " ".join(sorted({c for c in word if c in TAKEN and c.isprintable()}))
            yield f"--token_string {word!r}: brackets, commas and line ends mean something in captions; leave out {bad}"
        if self.init_word and self.weights:
            yield Idle("--init_word has no effect with --weights: give one of them")
        if self.use_object_template and self.use_style_template:
            yield "--use_object_template and --use_style_template: give one of them"


@dataclass(frozen=True)
class WordDataOptions(DataOptions):
    """Where the pictures are and what happens to them. Most are the fallback of the same key of --dataset_config."""

    caption_dropout_rate: float = option(0.0, help="Not for textual inversion.", check=refused(NO_DROPOUT))
    caption_dropout_every_n_epochs: int = option(0, help="Not for textual inversion.", check=refused(NO_DROPOUT))
    caption_tag_dropout_rate: float = option(0.0, help="Not for textual inversion.", check=refused(NO_DROPOUT))


@dataclass(frozen=True)
class WordCacheOptions(CacheOptions):
    """What is computed once and kept: pictures only."""

    cache_text_encoder_outputs: bool = option(False, help="Not for textual inversion.", check=refused(NO_TEXT_CACHE))
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="Not for textual inversion.", check=refused(NO_TEXT_CACHE)
    )


@dataclass(frozen=True)
class WordSaveOptions(SaveOptions):
    """Where, when and how the vectors are written. 0 means the same as not given."""

    save_model_as: str = option("pt", choices=("ckpt", "pt", "safetensors"), help="File type of the result.")


@dataclass(frozen=True)
class TextualInversionOptions(TrainerOptions):
    """Textual inversion."""

    data: WordDataOptions
    cache: WordCacheOptions
    save: WordSaveOptions
    word: WordOptions

    def __post_init__(self) -> None:
        """Programs that use the file take its name for the word, which need not be a file name."""
        if self.save.output_name is None and self.word.token_string and not any(name_problems(self.word.token_string)):
            object.__setattr__(self, "save", replace(self.save, output_name=self.word.token_string))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.loss.masked_prior_weight:
            yield "--masked_prior_weight has no meaning in textual inversion, which changes no model: leave it out"
        if self.save.output_name is None and self.word.token_string:
            yield f"--output_name is missing: '{self.word.token_string}', which it would be, is not a plain file name"
