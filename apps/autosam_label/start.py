"""One command from a fresh clone to a running server, and one to a tested tree. Standard library only.

    python3 apps/autosam_label/start.py demo                  installs, writes a small demo study, starts the server
    python3 apps/autosam_label/start.py serve --studies DIR   the same on your own images (or a DICOMweb address)
    python3 apps/autosam_label/start.py test [pytest args]    installs the development tools too and runs the tests

Everything is installed into ``.venv`` in the repository root. A stamp file holds the digest of what was asked for, so
an up-to-date environment costs nothing, and an installation that was interrupted is done again from the start.
"""

import argparse
import errno
import hashlib
import os
import socket
import subprocess
import sys
import venv
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "apps" / "autosam_label"
PYTHONS = ((3, 11), (3, 12))
INSTALLING = ".installing"
WELCOME = """Starting the server on {0}: 16 to 60 s until it answers, Ctrl-C ends it.
3D Slicer: extension MONAI Label, server {0}, Next Sample, then the points tab (SmartEdit).
OHIF: needs images behind DICOMweb: serve --studies http://HOST/dicom-web, then open {0}/ohif/"""


def main() -> int:
    """Runs one command and returns its exit code."""
    if sys.version_info[:2] not in PYTHONS:
        return _refuse_python()
    parser = _parser()
    args, rest = parser.parse_known_args()
    if rest and args.command != "test":
        parser.error("unrecognized arguments: " + " ".join(rest))
    if args.command == "test":
        python = _environment(args.venv, "requirements-dev.txt")
        return subprocess.call([str(python), "-m", "pytest", *rest], cwd=str(ROOT), env=_child_environment(python))
    wrong = _why_not_listen(args.host, args.port)
    if wrong:
        text = "Cannot listen on port {} of {}: {}. Choose others with --port and --host."
        return _fail(text.format(args.port, args.host, wrong))
    python = _environment(args.venv, "requirements.txt")
    studies = _demo_studies(python) if args.command == "demo" else args.studies
    return _serve(python, studies, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment's folder (default: .venv)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("demo", "serve"):
        command = commands.add_parser(name)
        command.add_argument(
            "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to your network"
        )
        command.add_argument("--port", type=_port, default=8000)
        command.add_argument("--conf", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
        if name == "serve":
            command.add_argument("--studies", required=True, help="folder of images, or a DICOMweb address")
    commands.add_parser("test", add_help=False)
    return parser


def _refuse_python() -> int:
    wanted = " or ".join("{}.{}".format(*v) for v in PYTHONS)
    found = "{}.{}".format(*sys.version_info[:2])
    return _fail("autosam_label needs Python {}, this is {}. Run it as: python3.11 {}".format(wanted, found, __file__))


def _say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def _fail(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 2


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("expected a number up to 65535, received {!r}".format(text))
    return int(text)


def _why_not_listen(host: str, port: int) -> str:
    """Why the server could not listen there, in the system's words; empty where it can.

    A name may stand for several addresses; the server takes those that the machine has, and none may be in use.
    """
    try:
        found = [_bind_error(*entry) for entry in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:  # the latter where a part of the name is too long
        return str(getattr(error, "strerror", "no such name"))
    used = [error for error in found if error and error.errno == errno.EADDRINUSE]
    error = used[0] if used else None if None in found else found[0]
    return str(error.strerror) if error else ""


def _bind_error(family: int, kind: int, protocol: int, _: str, address: tuple) -> Optional[OSError]:
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # as the server does: else it would meet those on IPv4 too
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _environment(folder: Path, requirements: str) -> Path:
    """The interpreter of an environment that satisfies ``requirements``; installs what is missing."""
    folder = folder.absolute()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, digest = folder / (".installed-" + requirements), _digest(requirements)
    if stamp.is_file() and stamp.read_text() == digest and not (folder / INSTALLING).exists():
        return python
    if not _usable(folder, python):
        _create(folder)
    (folder / INSTALLING).touch()
    try:
        _install(python, requirements)
    except subprocess.CalledProcessError:
        (folder / INSTALLING).unlink()  # pip itself gave up and cleaned up: the next run goes on from here
        sys.exit(_fail("The installation failed; see pip's message above. The same command tries again."))
    for name in {"requirements.txt", requirements}:  # the development file includes the other one
        (folder / (".installed-" + name)).write_text(_digest(name))
    (folder / INSTALLING).unlink()
    return python


def _create(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        sys.exit(_fail("{} exists and is not a Python environment; choose another folder with --venv.".format(folder)))
    _say("Creating {} ...".format(folder))
    try:
        venv.create(str(folder), with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(_fail("Cannot create it: {}. On Debian and Ubuntu: apt install python3-venv".format(error)))


def _digest(requirements: str) -> str:
    texts = [(ROOT / name).read_bytes() for name in sorted({"requirements.txt", requirements})]
    return hashlib.sha256(b"\0".join([*texts, repr(sys.version_info[:2]).encode()])).hexdigest()


def _usable(folder: Path, python: Path) -> bool:
    """Whether the environment can be built on: of this Python version, with pip, not left in mid-installation."""
    if (folder / INSTALLING).exists() or not python.exists():
        return False
    probe = "import pip, sys; sys.exit(sys.version_info[:2] != {!r})".format(tuple(sys.version_info[:2]))
    return subprocess.call([str(python), "-c", probe], stderr=subprocess.DEVNULL) == 0


def _install(python: Path, requirements: str) -> None:
    """Installs in three steps because sam2 comes as source only and asks for torch to build.

    In pip's isolated build environment that would fetch a second torch, 3 GB, so torch comes first and sam2 is built
    against it, without its optional CUDA extension.
    """
    _say("Installing {}: 4 to 9 minutes and 8 GB the first time ...".format(requirements))
    pins = _pins()
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    env = dict(_child_environment(python), SAM2_BUILD_CUDA="0")
    for step in (
        [pins["setuptools"], pins["numpy"], pins["torch"], pins["torchvision"]],
        ["--no-deps", "--no-build-isolation", pins["sam2"]],
        ["-r", str(ROOT / requirements)],
    ):
        subprocess.run([*pip, *step], check=True, env=env)


def _pins() -> dict:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {line.split("==")[0]: line.strip() for line in lines if "==" in line and not line.startswith("#")}


def _child_environment(python: Path) -> dict:
    """Ours, with the repository on the path and byte code kept: without it every start takes 30 s longer.

    OpenMP's threads spin while they wait, unless told not to; where anything else runs on the machine, a click then
    takes up to 40 times as long (measured with two threads on two cores, one of them busy).
    """
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONHOME")}
    env.setdefault("OMP_WAIT_POLICY", "passive")
    env["PATH"] = str(python.parent) + os.pathsep + env.get("PATH", "")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return env


def _demo_studies(python: Path) -> str:
    """The demo folder; written once, under a temporary name until it is whole."""
    studies, unfinished = ROOT / "demo" / "studies", ROOT / "demo" / "unfinished-{}".format(os.getpid())
    if not studies.is_dir():
        code = "import sys; from lib.data.phantom import write_demo_study; write_demo_study(sys.argv[1])"
        unfinished.mkdir(parents=True)
        subprocess.run([str(python), "-c", code, str(unfinished)], check=True, env=_child_environment(python))
        unfinished.rename(studies)
    return str(studies)


def _url(host: str, port: int) -> str:
    """The server's address for a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return "http://{}:{}".format("[{}]".format(host) if ":" in host else host, port)


def _serve(python: Path, studies: str, args: argparse.Namespace) -> int:
    command = [str(python), "-m", "monailabel.main", "start_server", "--app", str(APP), "--studies", studies]
    command += ["--host", args.host, "--port", str(args.port), "--uvicorn_app", "apps.autosam_label.server:app"]
    for pair in args.conf:
        command += ["--conf", *pair]
    _say(WELCOME.format(_url(args.host, args.port)))
    env = _child_environment(python)
    if os.name == "nt":
        return subprocess.call(command, env=env)
    os.execve(command[0], command, env)  # the server takes our place, so that signals reach it


if __name__ == "__main__":
    sys.exit(main())
