# SPDX-License-Identifier: Apache-2.0
"""The lock files: they hold what is pinned, for every Python and system, and a changed file is not installed."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from library.text_files import tomllib
from tests.setup.fakes import RealPip
from tools.lock_requirements import LOCKS, OF_TORCH, PYTHONS, SYSTEMS
from tools.setup.environment import ROOT, RUN, TEST, Record, install_locks
from tools.setup.torch_choice import BUILDS

MARKERS = {  # how Python names the systems
    "Linux x86_64": {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"},
    "Linux arm64": {"sys_platform": "linux", "platform_machine": "aarch64", "platform_system": "Linux"},
    "Windows x86_64": {"sys_platform": "win32", "platform_machine": "AMD64", "platform_system": "Windows"},
    "macOS arm64": {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin"},
}


def requirements(name: str) -> list[Requirement]:
    """The requirements of a file, without comments and hashes."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"\w", line)]


def versions(found: list[Requirement], system: str, python: str) -> dict[str, str]:
    """name -> version of the pins that hold for a system and a Python."""
    here = {**MARKERS[system], "python_version": python, "python_full_version": f"{python}.5"}
    pins = [(canonicalize_name(r.name), str(r.specifier)) for r in found if r.marker is None or r.marker.evaluate(here)]
    assert len(dict(pins)) == len(pins), "one version of each package"
    return dict(pins)


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_holds_the_pins_on_every_system(lock: str) -> None:
    pinned, locked = requirements(LOCKS[lock]), requirements(lock)
    for system in SYSTEMS:
        for python in PYTHONS:
            pins, has = versions(pinned, system, python), versions(locked, system, python)
            pins.pop("torch", None)
            assert pins.items() <= has.items()
            assert not [name for name in has if OF_TORCH.fullmatch(name)]
            if lock == TEST:
                assert versions(requirements(RUN), system, python).items() <= has.items()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_hashes_and_no_address_is_named(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\w)", text)[1:]
    assert len(entries) == len(requirements(lock)) > 50
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert "://" not in text and "--index" not in text


def test_the_pins_are_in_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]]
    allowed = {canonicalize_name(r.name): r for r in ranges}
    pins = [*requirements("requirements.txt"), *requirements("requirements-test.txt")]
    assert {canonicalize_name(r.name) for r in pins} == set(allowed)
    for pin in pins:
        version = str(pin.specifier).removeprefix("==")
        assert allowed[canonicalize_name(pin.name)].specifier.contains(version), pin
    assert project["requires-python"] == f">={PYTHONS[0]}"


def test_the_systems_that_are_locked_are_those_that_torch_is_chosen_for() -> None:
    assert set(SYSTEMS) == set(MARKERS) == {title for build in BUILDS for title in build.systems}


def write_wheel(folder: Path, code: str) -> str:
    """A package of one module; the hash of its file."""
    wheel = folder / "tiny_thing-1.0-py3-none-any.whl"
    info = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(zipfile.ZipInfo("tiny_thing.py"), code)
        file.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        file.writestr(
            zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    for name, value in {"TARGET": target, "NO_INDEX": 1, "FIND_LINKS": tmp_path, "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    environment = RealPip(tmp_path)
    environment.folder.mkdir()
    good = write_wheel(tmp_path, "x = 1\n")
    (tmp_path / RUN).write_text(f"tiny-thing==1.0 \\\n    --hash=sha256:{good}\n", encoding="utf-8")
    write_wheel(tmp_path, "x = 'not what was locked'\n")
    record = Record()
    with pytest.raises(SystemExit) as end:
        install_locks(environment, RUN, record)
    assert end.value.code == 1 and not target.exists() and record == Record() == environment.read_record()
    write_wheel(tmp_path, "x = 1\n")
    install_locks(environment, RUN, record)
    assert (target / "tiny_thing.py").read_text() == "x = 1\n"
    assert environment.read_record() == record != Record()
