"""The bootstrap's decisions, without installing anything: pip and venv are replaced by notes of what would be done."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture
def listening() -> Iterator[Callable[[str], int]]:
    """Listens on a free port of an address, to the end of the test; skips where the machine has no such address."""
    with contextlib.ExitStack() as stack:

        def listen(host: str) -> int:
            probe = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            try:
                probe.bind((host, 0))
            except OSError as error:
                pytest.skip(f"{host} is no address of this machine: {error}")
            probe.listen()
            return probe.getsockname()[1]

        yield listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_main_refuses_a_port_in_use_and_no_other(listening, monkeypatch, capsys, host: str) -> None:
    monkeypatch.setattr(start, "_environment", lambda *_: Path("python"))
    monkeypatch.setattr(start, "_serve", lambda *_: 0)
    serve = ["start.py", "serve", "--studies", "x", "--host", host, "--port"]
    monkeypatch.setattr(start.sys, "argv", [*serve, str(listening(host))])
    assert start.main() == 2
    assert f"of {host}: Address already in use. Choose others with --port" in capsys.readouterr().err
    monkeypatch.setattr(start.sys, "argv", [*serve, "0"])  # a port that is free
    assert start.main() == 0


def test_port_in_use_on_ipv4_is_free_on_ipv6_and_not_under_a_name_of_both(listening, monkeypatch) -> None:
    listening("::1")
    port = listening("127.0.0.1")
    assert start._why_not_listen("::1", port) == ""
    both = [*socket.getaddrinfo("::1", port, 0, socket.SOCK_STREAM), *socket.getaddrinfo("127.0.0.1", port, 0, 1)]
    monkeypatch.setattr(start.socket, "getaddrinfo", lambda *_: both)
    assert start._why_not_listen("localhost", port) == "Address already in use"


def test_address_of_another_machine_or_of_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start._why_not_listen("192.0.2.7", 0) == "Cannot assign requested address"
    assert start._why_not_listen("host.invalid", 0) != ""
    lost = [*socket.getaddrinfo("192.0.2.7", 0, 0, 1), *socket.getaddrinfo("127.0.0.1", 0, 0, 1)]
    monkeypatch.setattr(start.socket, "getaddrinfo", lambda *_: lost)
    assert start._why_not_listen("name-of-two", 0) == ""  # the server passes over the one it does not have


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("box", "http://box:8000"),
    ],
)
def test_url_is_one_that_a_browser_takes(host: str, url: str) -> None:
    assert start._url(host, 8000) == url


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


@pytest.mark.parametrize("port", ["-1", "70000", "http"])
def test_port_that_is_none_is_told(port: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["start.py", "demo", "--port", port])
    with pytest.raises(SystemExit):
        start.main()
    assert "--port: expected a number up to 65535" in capsys.readouterr().err


def test_host_that_is_no_name_is_told() -> None:
    assert start._why_not_listen("x" * 70 + ".org", 8000) != ""
