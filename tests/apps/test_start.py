"""The bootstrap's decisions, without installing anything: pip and venv are replaced by notes of what would be done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apps.autosam_label import start
from tests.serving import ROOT


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``start`` created and installed, in order."""
    notes: list[str] = []

    def create(folder: Path, with_pip: bool, clear: bool) -> None:
        assert with_pip
        assert clear
        (Path(folder) / "bin").mkdir(parents=True, exist_ok=True)
        (Path(folder) / "bin" / "python").unlink(missing_ok=True)
        (Path(folder) / "bin" / "python").symlink_to(sys.executable)
        (Path(folder) / "pyvenv.cfg").touch()
        (Path(folder) / start.INSTALLING).unlink(missing_ok=True)
        notes.append("create")

    monkeypatch.setattr(start.venv, "create", create)
    monkeypatch.setattr(start, "_install", lambda python, requirements: notes.append(requirements))
    return notes


def test_environment_is_made_once_and_the_tests_one_serves_the_server(done, tmp_path: Path) -> None:
    python = start._environment(tmp_path / "env", "requirements-dev.txt")
    assert python == tmp_path / "env" / "bin" / "python"
    start._environment(tmp_path / "env", "requirements-dev.txt")
    start._environment(tmp_path / "env", "requirements.txt")
    assert done == ["create", "requirements-dev.txt"]


def test_environment_for_the_server_is_extended_for_tests(done, tmp_path: Path) -> None:
    start._environment(tmp_path / "env", "requirements.txt")
    start._environment(tmp_path / "env", "requirements-dev.txt")
    assert done == ["create", "requirements.txt", "requirements-dev.txt"]


def test_environment_changed_pins_are_installed(done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start._environment(tmp_path / "env", "requirements.txt")
    monkeypatch.setattr(start, "_digest", lambda requirements: "other pins")
    start._environment(tmp_path / "env", "requirements.txt")
    assert done == ["create", "requirements.txt", "requirements.txt"]


def test_environment_interrupted_installation_starts_anew(
    done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(python: Path, requirements: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(start, "_install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start._environment(tmp_path / "env", "requirements.txt")
    start._environment(tmp_path / "env", "requirements.txt")
    assert done == ["create", "create", "requirements.txt"]


def test_environment_failed_pip_is_tried_again_on_top(done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(python: Path, requirements: str) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    with monkeypatch.context() as patch:
        patch.setattr(start, "_install", failed)
        with pytest.raises(SystemExit):
            start._environment(tmp_path / "env", "requirements.txt")
    start._environment(tmp_path / "env", "requirements.txt")
    assert done == ["create", "requirements.txt"]


def test_environment_never_clears_a_folder_that_is_none(done, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        start._environment(tmp_path, "requirements.txt")
    assert (tmp_path / "thesis.txt").exists()
    assert "is not a Python environment" in capsys.readouterr().err


def test_main_refuses_other_pythons_by_name(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(start.sys, "version_info", (3, 13, 0))
    assert start.main() == 2
    assert "needs Python 3.11 or 3.12, this is 3.13" in capsys.readouterr().err


def test_pins_cover_the_steps_and_every_runtime_line() -> None:
    """The steps name packages whose pins must exist, and a line without ``==`` would escape them."""
    pins = start._pins()
    assert {"setuptools", "numpy", "torch", "torchvision", "sam2"} <= set(pins)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))


def test_child_environment_keeps_byte_code_and_finds_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    env = start._child_environment(Path("/env/bin/python"))
    assert "PYTHONDONTWRITEBYTECODE" not in env
    assert env["PYTHONPATH"].split(":") == [str(ROOT), "/elsewhere"]
    assert env["PATH"].startswith("/env/bin:")
