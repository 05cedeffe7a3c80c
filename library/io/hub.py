# SPDX-License-Identifier: Apache-2.0
"""Upload of saves to a Hugging Face repository and download of states. A failed upload is only a warning."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.io.options import HubOptions
from library.io.state import MANIFEST
from library.log import get_logger

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = get_logger()


def connect(token: str | None) -> HfApi:
    """The Hugging Face hub. The token is kept in this object only, not in the environment or a file."""
    from huggingface_hub import HfApi

    return HfApi(token=token)


def hide(text: str, token: str | None) -> str:
    """`text` on one line, with the token masked."""
    line = " ".join(text.split())[:300]
    return line.replace(token, "***") if token else line


# ---- upload ---------------------------------------------------------------------------------------------------------


class Uploader:
    """Uploads files and folders one by one; with --async_upload in a background thread. Close it at the end."""

    def __init__(self, options: HubOptions, hub: HfApi | None = None) -> None:
        assert options.huggingface_repo_id, "an uploader needs --huggingface_repo_id"
        self.options = options
        self.repo_id, self.repo_type = options.huggingface_repo_id, options.huggingface_repo_type or "model"
        self.hub = hub if hub is not None else connect(options.huggingface_token)
        self.worker = ThreadPoolExecutor(1, "upload") if options.async_upload else None
        self.running: dict[Path, Future[None]] = {}
        self.repo_ready = False

    def upload(self, path: str | Path) -> None:
        """Upload a file, or a folder with its content, under its own name."""
        path = Path(path)
        if self.worker is None:
            return self._try(path)
        self.release(path)
        self.running[path] = self.worker.submit(self._try, path)

    def release(self, path: str | Path) -> None:
        """Wait until `path` is not being uploaded. Call it before the path is removed or rewritten."""
        future = self.running.pop(Path(path), None)
        if future is not None:
            future.result()

    def close(self) -> None:
        """Wait for all uploads to finish."""
        if self.worker is not None:
            if any(not f.done() for f in self.running.values()):
                log.info(f"waiting for uploads to {self.repo_id}")
            self.worker.shutdown(wait=True)
            self.running.clear()

    def _try(self, path: Path) -> None:
        try:
            self._upload(path)
        except Exception as error:  # network, permissions, quota ...: the file is on disk, and the training goes on
            reason = hide(f"{type(error).__name__}: {error}", self.options.huggingface_token)
            log.warning(f"upload of {path.name} to {self.repo_id} failed, the file stays on disk: {reason}")

    def _upload(self, path: Path) -> None:
        if not self.repo_ready:
            private = self.options.huggingface_repo_visibility != "public"
            self.hub.create_repo(self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True)
            self.repo_ready = True
        place, repo, kind = self.path_in_repo(path.name), self.repo_id, self.repo_type
        if path.is_dir():
            self.hub.upload_folder(folder_path=str(path), path_in_repo=place, repo_id=repo, repo_type=kind)
        else:
            self.hub.upload_file(path_or_fileobj=str(path), path_in_repo=place, repo_id=repo, repo_type=kind)

    def path_in_repo(self, name: str) -> str:
        """Path in the repository of a save with this name."""
        folder = (self.options.huggingface_path_in_repo or "").strip("/")
        return f"{folder}/{name}" if folder else name


# ---- download -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubFolder:
    """A folder on the hub: `user/name/folder[:revision[:type]]`."""

    repo_id: str
    path: str
    revision: str | None = None
    repo_type: str = "model"


def read_hub_folder(text: str) -> HubFolder:
    """Parse --resume with --resume_from_huggingface. Raises UserError."""
    place, *rest = text.split(":")
    parts = [part for part in place.split("/") if part]
    if len(parts) < 3 or len(rest) > 2:
        expected = "user/name/folder[:revision[:type]]"
        raise UserError(f"--resume: with --resume_from_huggingface expects {expected}, got '{text}'")
    revision = rest[0] or None if rest else None
    repo_type = rest[1] if len(rest) == 2 else "model"
    if repo_type not in ("model", "dataset", "space"):
        raise UserError(f"--resume: '{repo_type}' is not one of model, dataset, space")
    return HubFolder("/".join(parts[:2]), "/".join(parts[2:]), revision, repo_type)


def download_state(text: str, token: str | None, hub: HfApi | None = None) -> Path:
    """Download the state folder that `text` names. Returns the local folder. Raises UserError."""
    wanted = read_hub_folder(text)
    hub = hub if hub is not None else connect(token)
    try:
        root = hub.snapshot_download(
            wanted.repo_id, repo_type=wanted.repo_type, revision=wanted.revision, allow_patterns=[f"{wanted.path}/*"]
        )
    except Exception as error:
        raise UserError(
            f"--resume: cannot download {text}: {hide(f'{type(error).__name__}: {error}', token)}"
        ) from None
    folder = Path(root) / wanted.path
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--resume: {wanted.repo_id} has no state folder {wanted.path}")
    return folder
