"""``python -m lib.versions --state DIR list|show|promote|rollback|report|prune``: versions by hand."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Optional

from lib.errors import AppError, ConfigError
from lib.versions.record import Version
from lib.versions.report import write_report
from lib.versions.store import VersionStore, open_store

COMMANDS = ("list", "show", "promote", "rollback", "report", "prune")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command; returns the exit status, 2 for a refusal."""
    parser = argparse.ArgumentParser(prog="python -m lib.versions", description="Trained versions of a method.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("name", nargs="?", default="", help="version, for show, promote and report (else the newest)")
    parser.add_argument("--state", type=Path, required=True, help="the studies' .autosam folder")
    parser.add_argument("--method", default="sam2rad")
    parser.add_argument("--reason", default="by hand", help="for the history; no patient data")
    parser.add_argument("--keep", type=int, default=0, help="versions that prune keeps")
    given = parser.parse_intermixed_args(arguments)
    try:
        sys.stdout.write(_run(open_store(given.state, given.method), given))
    except AppError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _run(store: VersionStore, given: argparse.Namespace) -> str:
    command, name = given.command, given.name
    if name and command in ("list", "rollback", "prune"):
        raise ConfigError(f"{command} takes no name, received {name!r}. Use `promote NAME` to choose a version.")
    if command == "list":
        return _table(store)
    if command == "show":
        return _details(store.get(name), live=store.live_name() == name)
    if command == "report":
        return f"{write_report(store, name or _newest(store))}\n"
    if command == "prune":
        return f"Deleted: {', '.join(store.prune(given.keep)) or 'none'}.\n"
    version = store.promote(name, given.reason) if command == "promote" else store.rollback(given.reason)
    return f"{version.method} {version.name} is live.\n"


def _newest(store: VersionStore) -> str:
    versions = store.list()
    if not versions:
        raise ConfigError(f"Expected a version of {store.method} to report on, but none is stored. Train one first.")
    return versions[-1].name


def _table(store: VersionStore) -> str:
    versions, live = store.list(), store.live_name()
    if not versions:
        return f"No version of {store.method} in {store.folder} yet.\n"
    lines = [f"{'name':10s} {'live':4s} {'created':25s} {'Dice':6s} {'cases':5s} labels"]
    for v in versions:
        mark = "*" if v.name == live else ""
        lines.append(f"{v.name:10s} {mark:4s} {v.created:25s} {_dice(v):6s} {v.trained_on:<5d} {', '.join(v.labels)}")
    return "\n".join(lines) + "\n"


def _details(version: Version, *, live: bool) -> str:
    """Everything but case names, so that the output may be sent to somebody."""
    metrics = {**version.metrics, "cases": len(version.metrics.get("cases") or ())}
    hidden = {"split": dict(Counter(version.split.values())), "metrics": metrics}
    return json.dumps({**asdict(version), **hidden, "live": live}, indent=1, ensure_ascii=False) + "\n"


def _dice(version: Version) -> str:
    return "-" if version.mean_dice is None else f"{version.mean_dice:.4f}"


if __name__ == "__main__":
    sys.exit(main())
