# SPDX-License-Identifier: Apache-2.0
"""Options of saving, states, file metadata and the Hugging Face hub. `--help` imports it, so it must not need torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.options import Idle, at_least, option, positive

LATEST = "latest"  # value of --resume: the newest state of this output_dir and output_name
AUTO = "auto"  # value of --resume: the same, or a new run when there is none
RESUME_IS_EXACT = "nothing left to do: --resume always continues exactly where the state was"


@dataclass(frozen=True)
class SaveOptions:
    """Where, when and how the trained weights are written. 0 means the same as not given."""

    output_dir: str | None = option(None, help="Folder for everything that the run writes.", path=True)
    output_name: str | None = option(None, help="File name of the result, without folder and ending.")
    save_precision: str | None = option(
        None, choices=("float", "fp16", "bf16"), help="Number format of the saved weights; not given: as trained."
    )
    save_every_n_epochs: int | None = option(None, check=at_least(0), help="Save after every so many epochs.")
    save_every_n_steps: int | None = option(None, check=at_least(0), help="Save after every so many optimizer steps.")
    save_n_epoch_ratio: int | None = option(None, check=at_least(0), help="Save about this many times in the run.")
    save_last_n_epochs: int | None = option(None, check=at_least(0), help="Keep only the newest so many epoch saves.")
    save_last_n_steps: int | None = option(
        None, check=at_least(0), help="Keep only the step saves that are at most so many steps old."
    )
    save_model_as: str = option("safetensors", choices=("ckpt", "pt", "safetensors"), help="File type of the result.")
    no_metadata: bool = option(False, help="Leave the training facts out of the file, except what readers need.")
    training_comment: str | None = option(None, help="A text of your own for the file's metadata.")

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense, one line each."""
        if not self.output_dir:
            yield "give --output_dir, the folder for everything that the run writes"
        yield from name_problems(self.output_name)
        if self.no_metadata and self.training_comment:
            yield Idle("--training_comment has no effect with --no_metadata, which leaves it out of the file")
        if self.save_n_epoch_ratio and self.save_every_n_epochs:
            yield "--save_n_epoch_ratio and --save_every_n_epochs both say when to save: give only one of them"
        if self.save_last_n_epochs and not (self.save_every_n_epochs or self.save_n_epoch_ratio):
            yield Idle("--save_last_n_epochs has no effect without --save_every_n_epochs")
        if self.save_last_n_steps and not self.save_every_n_steps:
            yield Idle("--save_last_n_steps has no effect without --save_every_n_steps")


def name_problems(name: str | None) -> Iterator[str]:
    """Why `name` cannot be a file name on every system, one line each."""
    if name is None:
        return
    bad = sorted({c for c in name if c in '/\\:*?"<>|' or ord(c) < 32})
    if bad:
        shown = " ".join(c if ord(c) >= 32 else repr(c) for c in bad)
        yield f"--output_name '{name}' is not a plain file name: leave out {shown} (folders belong into --output_dir)"
    elif not name.strip(". "):
        yield f"--output_name '{name}' is not a file name"
    elif len(name.encode()) > 200:
        yield f"--output_name is {len(name.encode())} bytes long; at most 200 leave room for step number and ending"


@dataclass(frozen=True)
class StateOptions:
    """The resumable state of a run: weights, optimizer, scheduler and position."""

    save_state: bool = option(False, help="Write a resumable state folder with every save.")
    save_state_on_train_end: bool = option(False, help="Write a resumable state folder when the training ends.")
    save_state_every_minutes: float | None = option(
        None,
        check=positive,
        zero_is_unset=True,
        help="Write a state when so many minutes have passed since the last one; of these only the newest is kept.",
    )
    save_last_n_epochs_state: int | None = option(
        None, check=at_least(0), help="As --save_last_n_epochs, for states; not given: the same number."
    )
    save_last_n_steps_state: int | None = option(
        None, check=at_least(0), help="As --save_last_n_steps, for states; not given: the same number."
    )
    resume: str | None = option(
        None,
        help="State folder to continue from; latest: the newest state; auto: that, or a start where there is none, and "
        "nothing where the run is finished.",
        path=True,
    )
    skip_until_initial_step: bool = option(False, help="Was needed to skip seen data.", answer=RESUME_IS_EXACT)
    initial_epoch: int | None = option(
        None, check=at_least(0), help="Count epochs from this number, 1 being the first, without loading a state."
    )
    initial_step: int | None = option(
        None, check=at_least(0), help="Count steps from this number, without loading a state."
    )

    @property
    def at_end(self) -> bool:
        """Whether a finished run writes its state. It tells --resume auto that nothing is left to do."""
        return self.save_state or self.save_state_on_train_end or self.resume == AUTO

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense, one line each."""
        if self.resume and (self.initial_epoch or self.initial_step):
            yield "--initial_epoch and --initial_step do not go with --resume: the state knows where it stopped"
        if self.initial_epoch and self.initial_step:
            yield "--initial_epoch and --initial_step both say where to start: give only one of them"
        for name, value in (("epochs", self.save_last_n_epochs_state), ("steps", self.save_last_n_steps_state)):
            if value and not self.save_state:
                yield Idle(f"--save_last_n_{name}_state has no effect without --save_state")


@dataclass(frozen=True)
class MetadataOptions:
    """What the file says about itself (modelspec.*)."""

    metadata_title: str | None = option(None, help="Title of the model; not given: --output_name.")
    metadata_author: str | None = option(None, help="Author of the model.")
    metadata_description: str | None = option(None, help="What the model is for.")
    metadata_license: str | None = option(None, help="License of the model.")
    metadata_tags: str | None = option(None, help="Tags of the model, separated by commas.")
    metadata_usage_hint: str | None = option(None, help="How to use the model.")
    metadata_thumbnail: str | None = option(
        None, help="Picture file, or a data: URL, to show with the model.", path=True
    )
    metadata_merged_from: str | None = option(None, help="Models that this one was merged from.")
    metadata_trigger_phrase: str | None = option(None, help="Words that call up what was trained.")
    metadata_preprocessor: str | None = option(None, help="Preprocessing that the model expects.")
    metadata_is_negative_embedding: str | None = option(None, help="Say true for an embedding of negative prompts.")

    def problems(self) -> Iterator[str]:
        """Thumbnails that cannot be read."""
        thumbnail = self.metadata_thumbnail
        if thumbnail and not thumbnail.startswith("data:"):
            if not Path(thumbnail).is_file():
                yield f"--metadata_thumbnail: there is no file {thumbnail}"
            elif Path(thumbnail).suffix.lower() not in THUMBNAIL_TYPES:
                yield f"--metadata_thumbnail: {thumbnail} is none of {', '.join(THUMBNAIL_TYPES)}"


THUMBNAIL_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}


@dataclass(frozen=True)
class HubOptions:
    """Upload of the saves to a Hugging Face repository."""

    huggingface_repo_id: str | None = option(None, help="Repository to upload to, as user/name.")
    huggingface_repo_type: str | None = option(
        None, choices=("model", "dataset", "space"), help="Kind of the repository; not given: model."
    )
    huggingface_path_in_repo: str | None = option(None, help="Folder inside the repository.")
    huggingface_token: str | None = option(
        None, help="Access token; not given: the one of `hf auth login`.", secret=True
    )
    huggingface_repo_visibility: str | None = option(
        None, choices=("public", "private"), help="Who sees a repository that the upload creates; not given: private."
    )
    save_state_to_huggingface: bool = option(False, help="Upload the state folders, too.")
    resume_from_huggingface: bool = option(
        False, help="Download the state: --resume is then user/name/folder[:revision[:type]]."
    )
    async_upload: bool = option(False, help="Upload in the background while the training goes on.")

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense, one line each."""
        repo = self.huggingface_repo_id
        if repo and len([part for part in repo.split("/") if part]) != 2:
            yield f"--huggingface_repo_id expects user/name, got '{repo}'"
        if not repo:
            for name in ("huggingface_path_in_repo", "save_state_to_huggingface", "async_upload"):
                if vars(self)[name]:
                    yield Idle(f"--{name} has no effect without --huggingface_repo_id")


def cross_problems(save: SaveOptions, state: StateOptions, hub: HubOptions) -> Iterator[str]:
    """Invalid combinations of options in several groups, one line each, for the `problems` of a method's options."""
    if state.save_last_n_epochs_state and not (save.save_every_n_epochs or save.save_n_epoch_ratio):
        yield Idle("--save_last_n_epochs_state has no effect without --save_every_n_epochs")
    if state.save_last_n_steps_state and not save.save_every_n_steps:
        yield Idle("--save_last_n_steps_state has no effect without --save_every_n_steps")
    if hub.save_state_to_huggingface and not (state.save_state or state.save_state_on_train_end):
        yield Idle("--save_state_to_huggingface has no effect without --save_state or --save_state_on_train_end")
    if hub.resume_from_huggingface and state.resume in (None, "", LATEST, AUTO):
        yield "--resume_from_huggingface needs --resume user/name/folder[:revision[:type]]"
