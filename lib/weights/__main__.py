"""``python -m lib.weights list | fetch NAME | verify``: manages weight files without starting the server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Optional

from lib.config import BackboneRow, backbone_names, backbone_row
from lib.errors import AppError, ConfigError
from lib.plugins import did_you_mean
from lib.weights import ensure, locate, verify, weights_dir


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lib.weights", description=__doc__)
    parser.add_argument("--weights-dir", default="", help="folder for weight files")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="backbones and whether their files are there")
    commands.add_parser("verify", help="check every file that is there")
    commands.add_parser("fetch", help="download one file").add_argument("name", help="backbone or file name")
    given = parser.parse_args(arguments)
    try:
        if given.command == "fetch":
            return _fetch(given.name, given.weights_dir)
        return _list(given.weights_dir, check=given.command == "verify")
    except AppError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _rows() -> list[BackboneRow]:
    rows = [backbone_row(name) for name in backbone_names()]
    return [row for row in rows if row.weights.file]


def _list(setting: str, *, check: bool) -> int:
    folder, failed = weights_dir(setting), 0
    sys.stdout.write(f"folder: {folder}\n")
    for row in _rows():
        path = locate(row.weights, folder)
        state = "present" if path.is_file() else "missing"
        if check and path.is_file():
            try:
                state = f"verified {verify(row.weights, path)[:12]}"
            except AppError as error:
                state, failed = f"WRONG: {error}", 1
        sys.stdout.write(f"{row.name:20s} {row.weights.file:28s} {state}\n")
    return failed


def _fetch(name: str, setting: str) -> int:
    rows = {key: row for row in _rows() for key in (row.name, row.weights.file)}
    if name not in rows:
        known = sorted(row.name for row in rows.values())
        raise ConfigError(f"Expected one of {sorted(set(known))}, received {name!r}.{did_you_mean(name, known)}")
    path = ensure(rows[name].weights, weights_dir(setting), progress=_show)
    sys.stdout.write(f"\n{path}\n")
    return 0


def _show(done: int, total: int) -> None:
    share = f" of {total / 1e6:.0f}" if total else ""
    sys.stderr.write(f"\r{done / 1e6:.0f}{share} MB")


if __name__ == "__main__":
    sys.exit(main())
