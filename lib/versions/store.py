"""Trained versions of one learning method: stored whole, promoted by a gate, rolled back. No torch on import.

A store is the folder ``<state_dir>/<method>``: ``versions/<name>/`` holds ``version.json`` and ``model.safetensors``,
``live.json`` names the version in use, ``history.jsonl`` has a line for every decision; ``runs/`` belongs to training,
``reports/`` to :mod:`lib.versions.report`, and both lose a version's part when it is deleted.
Versions are written beside and renamed, ``live.json`` is replaced, so a crash or a full disk leaves neither halves nor
another live version. A decision is recorded before it takes effect: a crash in between leaves a line that reading
recognises, because every line names what was live before it. Safe for several threads and processes (a lock file);
readers take no lock. Left out: scoring, and what a model's tensors mean. Case names stay out of logs and messages.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional
from uuid import uuid4

from filelock import FileLock, Timeout

from lib.config import from_mapping
from lib.errors import AppError, ConfigError, WeightsError
from lib.plugins import did_you_mean
from lib.versions.files import MODEL, Content, check_digest, explained, read_text, sync_folder, write_model, write_text
from lib.versions.record import NAME, VERSION, Trained, Version, check_method, check_name, matches, plain
from lib.versions.retention import expired
from lib.weights import file_digest

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LIVE, HISTORY = "live.json", "history.jsonl"
RUNS, REPORTS = "runs", "reports"
PART = ".part-"
LOCK_TIMEOUT_S = 60.0  # the lock is held for some small files and, on promotion, one digest
STALE_S = 24 * 3600.0  # what a killed writer left is older than any writer runs


class Decision(StrEnum):
    """What a line of the history records."""

    PROMOTED = "promoted"
    REFUSED = "refused"
    ROLLED_BACK = "rolled back"
    DELETED = "deleted"


NOT_LIVE = (Decision.REFUSED, Decision.DELETED)  # what did not change which version is live

Versions = list[Version]  # the store's method ``list`` hides the type inside the class


Names = list[str]


class VersionStore:
    """The versions of one method.

    Args:
        folder: ``<state_dir>/<method>``; it may not exist yet. For a method name from outside use :func:`open_store`.

    Raises:
        ConfigError: if the folder's name is not a method's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.method = check_method(folder.name)
        self._versions = folder / "versions"

    def list(self) -> Versions:
        """Complete versions, oldest first; half-written and damaged folders are left out."""
        found = []
        for name in self._names():
            try:
                found.append(self.get(name))
            except AppError as error:
                logger.warning("Version %s of %s is left out: %s", name, self.method, error)
        return found

    def get(self, name: str) -> Version:
        """One version by name.

        Raises:
            ConfigError: for a malformed or unknown name.
            WeightsError: if its ``version.json`` is missing, damaged or another version's.
        """
        known = self._names()
        if check_name(name) not in known:
            raise ConfigError(
                f"Expected a version of {self.method} out of {known}, received {name!r}.{did_you_mean(name, known)}"
            )
        version = Version.from_json(read_text(self._versions / name / VERSION) or "", f"{name}/{VERSION}")
        if (version.method, version.name) != (self.method, name):
            raise WeightsError(
                f"Expected {self.method} {name}, but its {VERSION} is of {version.method} {version.name}: folders were "
                "renamed or mixed. Restore their names or delete this one."
            )
        return version

    def live_name(self) -> Optional[str]:
        """Name of the version in use, or None before the first promotion.

        Raises:
            WeightsError: if ``live.json`` is damaged.
        """
        text = read_text(self.folder / LIVE)
        try:
            return None if text is None else check_name(json.loads(text)["version"])
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            raise WeightsError(
                f"{LIVE} of {self.method} is damaged ({error}). Delete it and promote a version by name."
            ) from error

    def live(self) -> Optional[Version]:
        """The version in use, or None before the first promotion.

        Raises:
            WeightsError: if ``live.json`` is damaged or the version it names is missing or damaged.
        """
        name = self.live_name()
        try:
            return self.get(name) if name else None
        except ConfigError as error:
            raise WeightsError(f"The live version is missing. {error} Roll back or promote another one.") from error

    def live_stamp(self) -> Optional[tuple[int, int, int]]:
        """A value that differs after every change of the live version, for one stat call; None before the first."""
        with explained():
            try:
                found = (self.folder / LIVE).stat()
            except FileNotFoundError:
                return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def add(self, content: Content, trained: Trained) -> Version:
        """Stores a new version under the next free name; the live version stays what it is.

        Args:
            content: tensors, or a function that writes a safetensors file to the path it is given.
            trained: what training knows about it.

        Raises:
            ConfigError: if ``trained`` holds something other than JSON values.
            WeightsError: if the files cannot be written, or ``content`` wrote no readable tensors.
        """
        facts = plain(asdict(trained))
        part = self._versions / f"{PART}{uuid4().hex}"
        try:
            with explained():
                part.mkdir(parents=True)
                write_model(content, part / MODEL)
                facts |= {"method": self.method, "created": now(), "sha256": file_digest(part / MODEL)}
                with self._locked():
                    version = self._publish(part, facts)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # gone after success
        logger.info("Stored version %s of %s", version.name, self.method)
        return version

    def promote(self, name: str, reason: str) -> Version:
        """Makes a version live, after checking its digest; nothing happens if it is live already.

        Args:
            name: of a stored version.
            reason: a sentence for the history, without patient data.

        Raises:
            ConfigError: for a malformed or unknown name.
            WeightsError: if the version is damaged or the folder cannot be written.
        """
        with self._locked():
            version, before = self.get(name), self.live_name()
            if name != before:
                self._switch(Decision.PROMOTED, version, before, reason)
        return version

    def refuse(self, name: str, reason: str) -> None:
        """Records that a version was not promoted; arguments and errors as for :meth:`promote`."""
        with self._locked():
            self._record(Decision.REFUSED, self.get(name), self.live_name(), reason)

    def rollback(self, reason: str) -> Version:
        """Makes the version live that was live before; again goes further back.

        Raises:
            WeightsError: if no earlier live version is left, or it is damaged.
        """
        with self._locked():
            before, target = self.live_name(), self.predecessor()
            if target is None:
                raise WeightsError(
                    f"Expected an earlier live version of {self.method} to return to, but {before or 'none'} is live "
                    f"and none before it is left. Promote one by name; stored are {[v.name for v in self.list()]}."
                )
            version = self.get(target)
            self._switch(Decision.ROLLED_BACK, version, before, reason)
        return version

    def predecessor(self) -> Optional[str]:
        """What :meth:`rollback` would return to: the last version that was live before, is not now and still exists."""
        trail, stored = self._trail(), {version.name for version in self.list()}
        return next((name for name in reversed(trail[:-1]) if name in stored and name != trail[-1]), None)

    def history(self) -> Sequence[dict[str, Any]]:
        """Decisions, oldest first: ``time``, ``decision``, ``version``, ``previous``, ``reason`` and ``scores``."""
        lines = (read_text(self.folder / HISTORY) or "").split("\n")
        return [line for line in map(_decision, lines) if line]

    def tensors(self, version: Version) -> dict[str, Tensor]:
        """The tensors of a version on the CPU, after checking their digest.

        Raises:
            WeightsError: if the file is missing or not the one that was stored.
        """
        from safetensors.torch import load

        with explained():  # read once, so that what was checked is what is loaded
            data = (self._versions / version.name / MODEL).read_bytes()
        check_digest(version, hashlib.sha256(data).hexdigest())
        return load(data)

    def prune(self, keep: int) -> Names:
        """Deletes old versions with their runs and reports, and what killed writers left.

        Args:
            keep: how many stay, 1 or more; which ones says :func:`lib.versions.retention.expired`.

        Returns:
            names of the deleted versions.

        Raises:
            ConfigError: for ``keep`` below 1.
            WeightsError: if ``live.json`` is damaged or the folder cannot be written.
        """
        if keep < 1:
            raise ConfigError(f"Expected to keep 1 or more versions, received {keep}.")
        with self._locked():
            live, stored = self.live_name(), self.list()
            old = expired(stored, self._trail(), keep)
            for version in (v for v in stored if v.name in old):
                self._delete(version)
                # afterwards, because deleting makes the room that a full disk lacks for the line
                self._record(Decision.DELETED, version, live, f"Among {len(stored)} versions, {keep} are kept.")
            for part in self._versions.glob(f"{PART}*"):
                with suppress(FileNotFoundError):  # its writer was just done
                    if time.time() - part.stat().st_mtime > STALE_S:
                        shutil.rmtree(part)
        return old

    def _names(self) -> Names:
        with explained():
            found = os.listdir(self._versions) if self._versions.is_dir() else []
        return sorted((name for name in found if matches(NAME, name)), key=number_of)

    def _publish(self, part: Path, facts: dict[str, Any]) -> Version:
        known = [*self._names(), *(line["version"] for line in self.history())]  # a deleted name is not used again
        number = max(map(number_of, known), default=0)
        while True:
            number += 1
            version = from_mapping(Version, {**facts, "name": f"v{number:04d}"}, VERSION)
            write_text(part / VERSION, version.to_json())
            sync_folder(part)
            try:
                os.rename(part, self._versions / version.name)
            except OSError as error:  # a file system whose locks do not hold
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                continue
            sync_folder(self._versions)
            return version

    def _delete(self, version: Version) -> None:
        gone = self._versions / f"{PART}{uuid4().hex}"
        os.rename(self._versions / version.name, gone)  # vanishes at once, whatever happens to the deletion
        shutil.rmtree(gone)
        shutil.rmtree(self.folder / RUNS / version.name, ignore_errors=True)
        for report in (self.folder / REPORTS).glob(f"{version.name}.*"):
            report.unlink(missing_ok=True)

    def _switch(self, decision: Decision, version: Version, before: Optional[str], reason: str) -> None:
        check_digest(version, file_digest(self._versions / version.name / MODEL))
        self._record(decision, version, before, reason)
        fresh, stamp = self.folder / f"{LIVE}.part", self.live_stamp()
        write_text(fresh, json.dumps({"version": version.name}))
        # within one tick of the file system's clock two files may share inode and time
        newer = max(time.time_ns(), (stamp[0] if stamp else 0) + 1)
        os.utime(fresh, ns=(newer, newer))
        os.replace(fresh, self.folder / LIVE)
        sync_folder(self.folder)
        logger.info("%s of %s is live, before it was %s", version.name, self.method, before)

    def _record(self, decision: Decision, version: Version, before: Optional[str], reason: str) -> None:
        scores = {key: version.metrics.get(key) for key in ("mean_dice", "dice")}
        with suppress(AppError):  # the version before may be damaged, which is no reason to keep it
            scores["previous_mean_dice"] = self.get(before).mean_dice if before else None
        line = {"time": now(), "decision": decision, "version": version.name, "previous": before}
        text = json.dumps({**line, "reason": reason, "scores": scores}, ensure_ascii=False)
        held = read_text(self.folder / HISTORY) or ""
        with (self.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(("" if held.endswith("\n") or not held else "\n") + text + "\n")  # a full disk cuts lines short
            file.flush()
            os.fsync(file.fileno())

    def _trail(self) -> tuple[str, ...]:
        """Names that were live one after the other, the live one last, without those that were rolled back."""
        trail: tuple[str, ...] = ()
        for line in self.history():
            if line["decision"] in NOT_LIVE:
                continue
            trail = _ending_in(trail, line["previous"])
            back = line["decision"] == Decision.ROLLED_BACK
            trail = _ending_in(trail[:-1], line["version"]) if back else (*trail, line["version"])
        return _ending_in(trail, self.live_name())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(self.folder / ".lock", timeout=LOCK_TIMEOUT_S):
                    yield
            except Timeout as error:
                raise WeightsError(
                    f"Another process holds {self.folder / '.lock'} for more than {LOCK_TIMEOUT_S:.0f} s. Let it "
                    "finish or end it, then try again."
                ) from error


def open_store(state_dir: Path, method: str) -> VersionStore:
    """The store of a method whose name comes from outside.

    Raises:
        ConfigError: if ``method`` is not a plain module name.
    """
    return VersionStore(state_dir / check_method(method))


def now() -> str:
    """ISO time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def number_of(name: str) -> int:
    return int(name[1:])


def _ending_in(trail: tuple[str, ...], name: Optional[str]) -> tuple[str, ...]:
    """The trail cut or extended so that ``name`` is last: lines whose decision did not take effect drop out."""
    if name is None:
        return ()
    last = next((n for n in range(len(trail), 0, -1) if trail[n - 1] == name), 0)
    return trail[:last] if last else (*trail, name)


def _decision(text: str) -> Optional[dict[str, Any]]:
    """One line of the history, or None for one that was cut short."""
    try:
        line = json.loads(text)
        Decision(line["decision"])
        named = matches(NAME, line["version"]) and (line["previous"] is None or matches(NAME, line["previous"]))
        return line if named else None
    except (ValueError, TypeError, KeyError):
        return None
