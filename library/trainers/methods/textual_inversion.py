# SPDX-License-Identifier: Apache-2.0
"""Textual inversion: the models stay as they are, and the text encoders learn one word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from library.data.captions import possible_texts
from library.data.records import CaptionRules, SubsetConfig
from library.data.scan import DatasetScan, Scan, SubsetScan
from library.errors import UserError, first_names
from library.families.family import ModelFamily
from library.io.checkpoint import save_tensors
from library.learning import Learning, Models, Trainables
from library.log import get_logger
from library.memory.choice import MemoryChoice
from library.trainers.method import Method
from library.trainers.methods.textual_inversion_options import TextualInversionOptions
from library.trainers.settings import saved_dtype
from library.types import Position
from library.weights.embedding_files import published_rows, read_rows
from library.weights.new_tokens import NewRows, NewWord, first_rows, table_of, word_pattern

log = get_logger()

# In the manner of the method's paper: short sentences in which everything but the word varies. The wording is ours.
OBJECT_SENTENCES = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a picture of a {}",
    "a picture of the {}",
    "an image of a {}",
    "a snapshot of a {}",
    "a snapshot of the {}",
    "a close photo of a {}",
    "a close photo of the {}",
    "a photo of a {} from afar",
    "a bright picture of a {}",
    "a bright picture of the {}",
    "a dim picture of a {}",
    "a dim picture of the {}",
    "a sharp photo of a {}",
    "a blurry photo of the {}",
    "a photo of a big {}",
    "a photo of a little {}",
    "a photo of a beautiful {}",
    "a photo of a strange {}",
    "a photo of an old {}",
    "a photo of a new {}",
    "a cut-out photo of a {}",
    "a drawing of a {}",
    "a drawing of the {}",
)
STYLE_SENTENCES = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "an image in the style of {}",
    "a drawing in the style of {}",
    "an artwork in the style of {}",
    "a scene in the style of {}",
    "a bright painting in the style of {}",
    "a dim painting in the style of {}",
    "a beautiful painting in the style of {}",
    "a strange painting in the style of {}",
    "a big painting in the style of {}",
    "a little painting in the style of {}",
    "a detail of a painting in the style of {}",
    "a fine picture in the style of {}",
    "a plain picture in the style of {}",
)


class TextualInversionMethod(Method[TextualInversionOptions]):
    """Trains the token embeddings of one word, in every text encoder of the model."""

    project = "textual_inversion"
    learns_edits = False

    def __init__(self, family: ModelFamily, options: TextualInversionOptions) -> None:
        super().__init__(family, options)
        # the word's tokens in each text encoder, and the rows of --weights: set by `check_word`
        self.words: dict[str, NewWord] = {}
        self.given: dict[str, Tensor] | None = None

    # ---- checks -----------------------------------------------------------------------------------------------------

    def checks(self) -> list[Callable[[], None]]:
        return [self.check_rate, self.check_word]

    def check_rate(self) -> None:
        """Something learns."""
        if self.options.optimizer.learning_rate == 0:
            raise UserError("nothing learns: --learning_rate is 0")

    def check_word(self) -> None:
        """Raises UserError if the model already has the word, or does not know --init_word."""
        options = self.options.word
        assert options.token_string is not None
        self.words = self.family.add_word(options.token_string, options.num_vectors_per_token, options.init_word)
        self.given = read_rows(Path(options.weights), self.words) if options.weights else None
        for count in {len(word.like) for word in self.words.values()}:
            if count > 1 and count != options.num_vectors_per_token:
                which = "the first of them are used" if count > options.num_vectors_per_token else "they are repeated"
                log.warning(
                    f"--init_word '{options.init_word}' is {count} tokens, --num_vectors_per_token is "
                    f"{options.num_vectors_per_token}: {which}"
                )

    def with_captions(self, found: Scan) -> Scan:
        """Check that captions contain the word; with a template, replace them by its sentences, drawn at each use."""
        options = self.options.word
        assert options.token_string is not None
        check_subsets(found)
        if options.use_object_template or options.use_style_template:
            sentences = OBJECT_SENTENCES if options.use_object_template else STYLE_SENTENCES
            return with_sentences(found, [sentence.format(options.token_string) for sentence in sentences])
        check_captions(found, options.token_string)
        return found

    # ---- what learns ------------------------------------------------------------------------------------------------

    def learning(self) -> Learning:
        return Learning(frozenset(self.family.encoders))

    def build(self, models: Models, choice: MemoryChoice, *, files: bool = True) -> Trainables:
        rows = {name: self.new_rows(models.encoders[name], name, word) for name, word in self.words.items()}
        rate = self.options.optimizer.learning_rate
        return Trainables(
            module=nn.ModuleDict(rows),
            groups=[{"params": [own.weight], "lr": rate, "name": name} for name, own in rows.items()],
            modules={name: [own.weight] for name, own in rows.items()},
            state=partial(state_of, rows),
            load=partial(load_state, rows),
            write=partial(self.write, rows),
            kind="TextualInversion",
            encoders=self.learning().encoders,
        )

    def new_rows(self, encoder: nn.Module, name: str, word: NewWord) -> NewRows:
        """Install the word's rows in one encoder."""
        embedding = table_of(encoder)
        start = first_rows(embedding, word) if self.given is None else self.given[name]
        return NewRows(embedding, start)

    def write(self, rows: Mapping[str, NewRows], path: Path, metadata: dict[str, str], position: Position) -> None:
        """Write the word's rows under their published names."""
        dtype = saved_dtype(self.options.save)
        save_tensors(path, published_rows(state_of(rows)), metadata, dtype=dtype, hashes=False)


def state_of(rows: Mapping[str, NewRows]) -> dict[str, Tensor]:
    """Encoder -> rows (count, width). The tensors share memory with the parameters."""
    return {name: own.weight.detach() for name, own in rows.items()}


def load_state(rows: Mapping[str, NewRows], tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_of`, whose names and shapes `tensors` must have."""
    for name, value in state_of(rows).items():
        value.copy_(tensors[name])


# ---- captions -------------------------------------------------------------------------------------------------------


def check_subsets(found: Scan) -> None:
    """Raises UserError for settings of subsets without meaning here; warns about pictures that teach nothing."""
    problems = []
    for subset in {id(subset.config): subset.config for subset in found.subsets}.values():
        rules = subset.captions
        for name in ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"):
            if vars(rules)[name]:
                problems.append(f"{subset.name}: {name} leaves out the new word, which then learns nothing: remove it")
        if subset.custom_attributes.get("diff_output_preservation"):
            problems.append(
                f"{subset.name}: custom_attributes.diff_output_preservation has no meaning in textual inversion, which "
                "changes no output but that for the new word"
            )
    if problems:
        raise UserError(dict.fromkeys(problems))
    idle = [subset.config.name for subset in found.subsets if subset.config.is_reg]
    if idle:
        log.warning(f"regularisation pictures teach a new word nothing: {first_names(idle)} only takes time")


def check_captions(found: Scan, word: str) -> None:
    """Raises UserError if no caption contains the word; warns about those that lack it."""
    pattern = word_pattern(word)
    samples = [s for dataset in found.datasets for s in dataset.samples if not s.subset.is_reg]
    without = [
        s.path
        for s in samples
        if not any(pattern.search(text) for text in possible_texts(s.caption, s.subset.captions))
    ]
    ways = "put it where what it stands for is named, or give --use_object_template or --use_style_template"
    if len(without) == len(samples) and any(s.caption for s in samples):
        raise UserError(f"--token_string {word}: none of the {len(samples)} captions has this word: {ways}")
    if without:
        log.warning(
            f"{len(without)} captions lack the word {word} and teach it nothing ({first_names(without)}): {ways}"
        )


def with_sentences(found: Scan, sentences: Sequence[str]) -> Scan:
    """The same pictures with these sentences as lines of their caption; every use draws one."""
    caption = "\n".join(sentences)
    datasets = []
    for dataset in found.datasets:
        subsets = [
            subset if subset.config.is_reg else _with_caption(subset, caption, CaptionRules(enable_wildcard=True))
            for subset in dataset.subsets
        ]
        config = replace(dataset.config, subsets=tuple(subset.config for subset in subsets))
        datasets.append(DatasetScan(config, tuple(subsets)))
    return Scan(tuple(datasets))


def _with_caption(subset: SubsetScan, caption: str, rules: CaptionRules) -> SubsetScan:
    config: SubsetConfig = replace(subset.config, captions=rules)
    samples = (replace(sample, caption=caption, subset=config) for sample in subset.samples)
    return replace(subset, config=config, samples=tuple(samples), without_caption=(), empty_caption=())
