# SPDX-License-Identifier: Apache-2.0
"""Uploads to, and downloads from, a hub that answers on this machine (real huggingface_hub over HTTP)."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.io.hub import HubFolder, Uploader, download_state, read_hub_folder
from library.io.options import HubOptions

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_secretsecretsecret"
COMMIT = "0" * 40


class FakeHub(BaseHTTPRequestHandler):
    """The few answers of the hub's HTTP interface that an upload of small files and a download need."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub: Any = self.server
        hub.seen.append((self.path, self.headers.get("Authorization"), body))
        if hub.broken:
            return self.answer(403, {"error": f"no rights for {TOKEN}"})
        if self.path.endswith("/repos/create"):
            return self.answer(200, {"url": f"{hub.url}/me/it", "id": "me/it", "name": "me/it"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            plan = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            return self.answer(200, {"files": plan})
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    hub.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self.answer(
                200, {"commitUrl": f"{hub.url}/me/it/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
            )
        self.answer(404, {})

    def do_GET(self) -> None:
        hub: Any = self.server
        hub.seen.append((self.path, self.headers.get("Authorization"), b""))
        if "/resolve/" in self.path:
            return self.content(body=True)
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": "1" * 40} for path, data in hub.files.items()
            ]
            return self.answer(200, entries)
        siblings = [{"rfilename": path} for path in hub.files]
        self.answer(
            200, {"id": "me/it", "modelId": "me/it", "sha": COMMIT, "siblings": siblings, "tags": [], "private": True}
        )

    def do_HEAD(self) -> None:
        self.content(body=False)

    def content(self, *, body: bool) -> None:
        hub: Any = self.server
        data = hub.files[self.path.split("/resolve/")[1].split("/", 1)[1].split("?")[0]]
        self.send_response(200)
        for key, value in {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hash(data)}"',
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def answer(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.seen, server.files, server.broken = [], {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import logging, sys
from pathlib import Path
from library.errors import UserError
from library.io.hub import Uploader, download_state
from library.io.options import HubOptions
logging.basicConfig(format="%(message)s")
what, folder, token = sys.argv[1:4]
options = HubOptions(
    "me/it", huggingface_token=token, huggingface_path_in_repo="runs/", huggingface_repo_visibility="public",
    async_upload=what == "async",
)
if what == "down":
    try:
        print("got", download_state(sys.argv[4], token))
    except UserError as error:
        print("refused", error)
else:
    uploader = Uploader(options)
    uploader.upload(Path(folder) / "a.safetensors")
    uploader.upload(Path(folder) / "a-state")
    uploader.release(Path(folder) / "a-state")
    uploader.close()
    print("done")
"""


def run(hub: Any, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    place = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    env = {**os.environ, **place, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


def some_saves(folder: Path) -> None:
    (folder / "a-state").mkdir()
    (folder / "a.safetensors").write_bytes(b"weights")
    (folder / "a-state" / "manifest.json").write_bytes(b"{}")
    (folder / "a-state" / "optimizer.pt").write_bytes(b"moments")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_files_and_folders_arrive(hub: Any, tmp_path: Path, mode: str) -> None:
    some_saves(tmp_path)
    done = run(hub, tmp_path, mode, str(tmp_path), TOKEN)
    assert done.stdout == "done\n", done.stderr
    assert hub.files == {
        "runs/a.safetensors": b"weights",
        "runs/a-state/manifest.json": b"{}",
        "runs/a-state/optimizer.pt": b"moments",
    }
    assert {authorization for _, authorization, _ in hub.seen} == {f"Bearer {TOKEN}"}
    created = [json.loads(body) for path, _, body in hub.seen if path.endswith("/repos/create")]
    assert len(created) == 1 and created[0]["name"] == "it" and created[0]["organization"] == "me"
    assert created[0].get("private") is False or created[0].get("visibility") == "public"
    assert TOKEN not in done.stderr + done.stdout
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_a_failing_upload_is_a_warning_without_the_token(hub: Any, tmp_path: Path) -> None:
    some_saves(tmp_path)
    hub.broken = True
    done = run(hub, tmp_path, "async", str(tmp_path), TOKEN)
    assert done.stdout == "done\n" and done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if "upload of" in line]
    assert len(lines) == 2 and "upload of a.safetensors to me/it failed, the file stays on disk" in lines[0]
    assert TOKEN not in done.stderr


def test_a_state_comes_back(hub: Any, tmp_path: Path) -> None:
    hub.files = {"runs/a-state/manifest.json": b"{}", "runs/a-state/optimizer.pt": b"moments", "other.bin": b"x"}
    done = run(hub, tmp_path, "down", "", TOKEN, "me/it/runs/a-state:main")
    assert done.stdout.startswith("got "), done.stdout + done.stderr
    folder = Path(done.stdout.split(" ", 1)[1].strip())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"manifest.json": b"{}", "optimizer.pt": b"moments"}
    assert not (folder.parents[1] / "other.bin").exists()
    done = run(hub, tmp_path, "down", "", TOKEN, "me/it/runs/b-state")
    assert done.stdout == "refused --resume: me/it has no state folder runs/b-state\n"


def test_the_form_of_a_hub_folder() -> None:
    assert read_hub_folder("me/it/a/b-state") == HubFolder("me/it", "a/b-state")
    assert read_hub_folder("me/it/b:v1") == HubFolder("me/it", "b", "v1")
    assert read_hub_folder("me/it/b:v1:dataset") == HubFolder("me/it", "b", "v1", "dataset")
    assert read_hub_folder("me/it/b::dataset") == HubFolder("me/it", "b", None, "dataset")
    for bad in ("me/it", "b-state", "me/it/b:1:dataset:x", "me/it/b:v1:thing"):
        with pytest.raises(UserError, match="--resume"):
            read_hub_folder(bad)


class SlowHub:
    """Notes what is called and waits with each upload until it may go on."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.go = threading.Event()

    def create_repo(self, repo_id: str, **kwargs: Any) -> None:
        self.calls.append(("create", f"{repo_id} private={kwargs['private']}"))

    def upload_file(self, **kwargs: Any) -> None:
        self.go.wait(10)
        self.calls.append(("file", kwargs["path_in_repo"]))

    def upload_folder(self, **kwargs: Any) -> None:
        self.calls.append(("folder", kwargs["path_in_repo"]))

    def snapshot_download(self, repo_id: str, **kwargs: Any) -> str:
        raise ConnectionError(f"cannot reach\nthe hub with {TOKEN}")


def test_background_uploads_do_not_hold_the_training_up_and_are_waited_for(tmp_path: Path) -> None:
    some_saves(tmp_path)
    slow = SlowHub()
    uploader = Uploader(HubOptions("me/it", async_upload=True), slow)
    uploader.upload(tmp_path / "a.safetensors")
    uploader.upload(tmp_path / "a-state")
    assert ("file", "a.safetensors") not in slow.calls  # and yet we are here
    slow.go.set()
    uploader.close()
    assert slow.calls == [("create", "me/it private=True"), ("file", "a.safetensors"), ("folder", "a-state")]


def test_a_failing_download_is_one_line_without_the_token() -> None:
    with pytest.raises(UserError) as caught:
        download_state("me/it/a-state", TOKEN, SlowHub())
    line = str(caught.value)
    assert line == "--resume: cannot download me/it/a-state: ConnectionError: cannot reach the hub with ***"


def test_a_name_that_vanished_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowHub()
    slow.go.set()
    slow.upload_file = lambda **kwargs: Path(kwargs["path_or_fileobj"]).read_bytes()  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "trainyard"):
        Uploader(HubOptions("me/it"), slow).upload(tmp_path / "gone.safetensors")
    assert "upload of gone.safetensors to me/it failed" in caplog.text
