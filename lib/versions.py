"""Trained versions of one learning method: stored whole, promoted by a gate, rolled back. No torch on import.

A store is the folder ``<state_dir>/<method>``: ``versions/<name>/`` holds ``version.json`` and ``model.safetensors``,
``live.json`` names the version in use, ``history.jsonl`` has a line for every decision; ``runs/`` belongs to training.
Versions are written beside and renamed, ``live.json`` is replaced, so a crash or a full disk leaves neither halves nor
another live version. A decision is recorded before it takes effect: a crash in between leaves a line that reading
recognises, because every line names what was live before it. Safe for several threads and processes (a lock file);
readers take no lock. Left out: scoring, and what a model's tensors mean. Case names stay out of logs and messages.

    python -m lib.versions --state DIR list | show NAME | promote NAME | rollback   [--method sam2rad] [--reason TEXT]
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Optional, Union
from uuid import uuid4

from filelock import FileLock, Timeout

from lib.config import from_mapping
from lib.errors import AppError, ConfigError, WeightsError
from lib.plugins import did_you_mean
from lib.weights import file_digest

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MODEL, VERSION, LIVE, HISTORY = "model.safetensors", "version.json", "live.json", "history.jsonl"
PART = ".part-"
LOCK_TIMEOUT_S = 60.0  # the lock is held for some small files and, on promotion, one digest
STALE_S = 24 * 3600.0  # what a killed writer left is older than any writer runs
TRAIN = "train"  # the part of ``Trained.split`` whose cases gave gradients

_NAME = re.compile(r"v[0-9]{4,9}")
_METHOD = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Decision(StrEnum):
    """What a line of the history records."""

    PROMOTED = "promoted"
    REFUSED = "refused"
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training knows about its result.

    Args:
        backbone: name of the backbone's row.
        backbone_digest: ``weights_id`` of the frozen backbone; the tensors fit no other.
        labels: names of the classes; the position is the class number inside the model.
        recipe: training configuration, as JSON values.
        split: case name to part; the part ``train`` gave gradients.
        metrics: ``mean_dice``, ``dice`` by label and ``cases`` on pinned validation; NaN becomes None.
        parent: the version that was live when this one was trained.

    Raises:
        ConfigError: for an empty or malformed field.
    """

    backbone: str
    backbone_digest: str
    labels: tuple[str, ...]
    recipe: dict[str, Any]
    split: dict[str, str]
    metrics: dict[str, Any]
    parent: Optional[str] = None

    def __post_init__(self) -> None:
        for key in ("backbone", "backbone_digest"):
            _check(isinstance(getattr(self, key), str) and bool(getattr(self, key)), key, "a text", getattr(self, key))
        named = isinstance(self.labels, tuple) and all(isinstance(label, str) and label for label in self.labels)
        _check(named and len(set(self.labels)) == len(self.labels) > 0, "labels", "distinct names", self.labels)
        for key in ("recipe", "split", "metrics"):
            _check(isinstance(getattr(self, key), dict), key, "a mapping", type(getattr(self, key)).__name__)
        _check(all(isinstance(part, str) for part in self.split.values()), "split", "case to part", "other values")
        mean = self.metrics.get("mean_dice", "nothing")
        _check(mean is None or (isinstance(mean, Real) and not isinstance(mean, bool)), "mean_dice", "a number", mean)
        _check(self.parent is None or _matches(_NAME, self.parent), "parent", "a name like v0001", self.parent)


@dataclass(frozen=True, kw_only=True)
class Version(Trained):
    """One stored version: what training knew and what the store adds.

    Args:
        name: ``v0001`` and up.
        method: the learning method; the store's folder name.
        created: ISO time in UTC.
        sha256: digest of ``model.safetensors``.

    Raises:
        ConfigError: for an empty or malformed field.
    """

    name: str
    method: str
    created: str
    sha256: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)
        _check(_matches(_METHOD, self.method), "method", "a module name", self.method)
        _check(_matches(_SHA256, self.sha256), "sha256", "64 hex digits", self.sha256)
        _check(_is_time(self.created), "created", "an ISO time with zone", self.created)

    @property
    def mean_dice(self) -> Optional[float]:
        """Mean Dice on pinned validation; None where it could not be computed."""
        return self.metrics["mean_dice"]

    @property
    def trained_on(self) -> int:
        """Number of cases that gave gradients."""
        return sum(part == TRAIN for part in self.split.values())

    def to_json(self) -> str:
        """The text of ``version.json``; NaN and infinity become null.

        Raises:
            ConfigError: if a field holds something other than JSON values.
        """
        return json.dumps(_plain(asdict(self)), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = VERSION) -> Version:
        """The version that :meth:`to_json` wrote.

        Args:
            text: content of a ``version.json``.
            where: its place, for messages.

        Raises:
            WeightsError: if the text is not JSON, or a field is missing, unknown or malformed.
        """
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(values, dict):
                raise ConfigError(f"expected a mapping, received {type(values).__name__}.")
            return from_mapping(cls, values, where)
        except (ValueError, ConfigError) as error:
            raise WeightsError(f"{where} is damaged: {error} Restore the folder from a copy or delete it.") from error


Versions = list[Version]  # the store's method ``list`` hides the type inside the class
Names = list[str]
Content = Union[Mapping[str, "Tensor"], Callable[[Path], None]]  # tensors, or what writes them to a safetensors file


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
        version = Version.from_json(_read_text(self._versions / name / VERSION) or "", f"{name}/{VERSION}")
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
        text = _read_text(self.folder / LIVE)
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
        with _files():
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
        facts = _plain(asdict(trained))
        part = self._versions / f"{PART}{uuid4().hex}"
        try:
            with _files():
                part.mkdir(parents=True)
                _write_model(content, part / MODEL)
                facts |= {"method": self.method, "created": _now(), "sha256": file_digest(part / MODEL)}
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
        lines = (_read_text(self.folder / HISTORY) or "").split("\n")
        return [line for line in map(_decision, lines) if line]

    def tensors(self, version: Version) -> dict[str, Tensor]:
        """The tensors of a version on the CPU, after checking their digest.

        Raises:
            WeightsError: if the file is missing or not the one that was stored.
        """
        from safetensors.torch import load

        with _files():  # read once, so that what was checked is what is loaded
            data = (self._versions / version.name / MODEL).read_bytes()
        _check_digest(version, hashlib.sha256(data).hexdigest())
        return load(data)

    def prune(self, keep: int) -> Names:
        """Deletes old versions and what killed writers left; never the live version or the one before it.

        Args:
            keep: so many of the newest versions stay in any case, 1 or more.

        Returns:
            names of the deleted versions.

        Raises:
            ConfigError: for ``keep`` below 1.
            WeightsError: if ``live.json`` is damaged or the folder cannot be written.
        """
        if keep < 1:
            raise ConfigError(f"Expected to keep 1 or more versions, received {keep}.")
        with self._locked():
            safe = {self.live_name(), self.predecessor()}
            old = [v.name for v in self.list()[:-keep] if v.name not in safe]
            for name in old:
                gone = self._versions / f"{PART}{uuid4().hex}"
                os.rename(self._versions / name, gone)  # vanishes at once, whatever happens to the deletion
                shutil.rmtree(gone)
            for part in self._versions.glob(f"{PART}*"):
                with suppress(FileNotFoundError):  # its writer was just done
                    if time.time() - part.stat().st_mtime > STALE_S:
                        shutil.rmtree(part)
        return old

    def _names(self) -> Names:
        with _files():
            found = os.listdir(self._versions) if self._versions.is_dir() else []
        return sorted((name for name in found if _matches(_NAME, name)), key=_number)

    def _publish(self, part: Path, facts: dict[str, Any]) -> Version:
        known = [*self._names(), *(line["version"] for line in self.history())]  # a deleted name is not used again
        number = max(map(_number, known), default=0)
        while True:
            number += 1
            version = from_mapping(Version, {**facts, "name": f"v{number:04d}"}, VERSION)
            _write_text(part / VERSION, version.to_json())
            _sync_folder(part)
            try:
                os.rename(part, self._versions / version.name)
            except OSError as error:  # a file system whose locks do not hold
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                continue
            _sync_folder(self._versions)
            return version

    def _switch(self, decision: Decision, version: Version, before: Optional[str], reason: str) -> None:
        _check_digest(version, file_digest(self._versions / version.name / MODEL))
        self._record(decision, version, before, reason)
        fresh, stamp = self.folder / f"{LIVE}.part", self.live_stamp()
        _write_text(fresh, json.dumps({"version": version.name}))
        # within one tick of the file system's clock two files may share inode and time
        newer = max(time.time_ns(), (stamp[0] if stamp else 0) + 1)
        os.utime(fresh, ns=(newer, newer))
        os.replace(fresh, self.folder / LIVE)
        _sync_folder(self.folder)
        logger.info("%s of %s is live, before it was %s", version.name, self.method, before)

    def _record(self, decision: Decision, version: Version, before: Optional[str], reason: str) -> None:
        scores = {key: version.metrics.get(key) for key in ("mean_dice", "dice")}
        with suppress(AppError):  # the version before may be damaged, which is no reason to keep it
            scores["previous_mean_dice"] = self.get(before).mean_dice if before else None
        line = {"time": _now(), "decision": decision, "version": version.name, "previous": before}
        text = json.dumps({**line, "reason": reason, "scores": scores}, ensure_ascii=False)
        held = _read_text(self.folder / HISTORY) or ""
        with (self.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(("" if held.endswith("\n") or not held else "\n") + text + "\n")  # a full disk cuts lines short
            file.flush()
            os.fsync(file.fileno())

    def _trail(self) -> tuple[str, ...]:
        """Names that were live one after the other, the live one last, without those that were rolled back."""
        trail: tuple[str, ...] = ()
        for line in self.history():
            if line["decision"] == Decision.REFUSED:
                continue
            trail = _ending_in(trail, line["previous"])
            back = line["decision"] == Decision.ROLLED_BACK
            trail = _ending_in(trail[:-1], line["version"]) if back else (*trail, line["version"])
        return _ending_in(trail, self.live_name())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _files():
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


def check_name(name: str) -> str:
    """``name`` if it is a version's; anything else, such as a path, is refused.

    Raises:
        ConfigError: for a malformed name.
    """
    _check(_matches(_NAME, name), "version", "a name like v0001", name)
    return name


def check_method(method: str) -> str:
    """``method`` if it can be a method's name; anything else, such as a path, is refused.

    Raises:
        ConfigError: for a malformed name.
    """
    _check(_matches(_METHOD, method), "method", "lower-case letters, digits and _", method)
    return method


def check_fits(version: Version, backbone_digest: str, labels: Optional[Sequence[str]] = None) -> None:
    """Refuses a version that was trained on another backbone or for other labels.

    Args:
        version: what shall be used.
        backbone_digest: ``weights_id`` of the loaded backbone.
        labels: names in the order that the caller will use, where that matters.

    Raises:
        WeightsError: if either differs.
    """
    if version.backbone_digest != backbone_digest:
        raise WeightsError(
            f"{version.method} {version.name} was trained on {version.backbone} with weights "
            f"{version.backbone_digest[:12]}, but those loaded are {backbone_digest[:12]}. Start the server with that "
            "backbone or train a new version."
        )
    if labels is not None and tuple(labels) != version.labels:
        raise WeightsError(
            f"{version.method} {version.name} knows the labels {', '.join(version.labels)} in this order, received "
            f"{', '.join(labels)}. Use these or train a new version."
        )


def beats(challenger: Mapping[str, Any], incumbent: Optional[Mapping[str, Any]]) -> tuple[bool, str]:
    """The gate: whether a new version may replace the live one, and why, in a sentence without case names.

    A strictly greater mean Dice wins; a mean that is None or not finite counts as 0 for the incumbent and never wins.

    Args:
        challenger: ``mean_dice``, ``dice`` by label and ``cases`` (names, or a mapping by name) of the new version.
        incumbent: the same of the live version, scored now; None where nothing is live.

    Raises:
        ConfigError: if the two were scored on other cases or labels, or ``mean_dice`` is missing.
    """
    new, count = _mean_dice(challenger), len(challenger.get("cases", ()))
    if incumbent is not None:
        _check_comparable(challenger, incumbent)
    old = _mean_dice(incumbent) if incumbent is not None else None
    if new is None:
        return False, f"The new version has no mean Dice on {count} cases, so it cannot win."
    won = new > (old or 0.0)
    if old is None:
        why = "nothing is live" if incumbent is None else "the live version has no score"
        return (
            won,
            f"Mean Dice {new:.4f} on {count} cases {'wins' if won else 'is too low'}: {why}, so above 0 is enough.",
        )
    verb = "beats" if won else "does not beat"
    return won, f"Mean Dice {new:.4f} {verb} {old:.4f} ({new - old:+.2g}) on the same {count} cases."


def _mean_dice(scores: Mapping[str, Any]) -> Optional[float]:
    if "mean_dice" not in scores:
        raise ConfigError(f"Expected scores with mean_dice, received {sorted(scores)}. Score the version again.")
    mean = scores["mean_dice"]
    return float(mean) if mean is not None and math.isfinite(mean) else None


def _check_comparable(challenger: Mapping[str, Any], incumbent: Mapping[str, Any]) -> None:
    for key in ("cases", "dice"):
        new, old = sorted(challenger.get(key, ())), sorted(incumbent.get(key, ()))
        if new != old:
            what = "cases" if key == "cases" else "labels"
            raise ConfigError(
                f"Expected both versions scored on the same {what}, received {len(new)} and {len(old)} with "
                f"{len(set(new) & set(old))} in common. Score both on the pinned validation {what}."
            )


def _check(good: bool, what: str, expected: str, received: Any) -> None:
    if not good:
        raise ConfigError(f"{what}: expected {expected}, received {received!r}.")


def _matches(pattern: re.Pattern[str], text: Any) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def _is_time(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _number(name: str) -> int:
    return int(name[1:])


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number.")


def _plain(value: Any) -> Any:
    """JSON values: tuples as lists, numpy's scalars as numbers, NaN and infinity as None."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    raise ConfigError(f"A version's fields hold JSON values with texts as keys, received {type(value).__name__}.")


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
        named = _matches(_NAME, line["version"]) and (line["previous"] is None or _matches(_NAME, line["previous"]))
        return line if named else None
    except (ValueError, TypeError, KeyError):
        return None


def _check_digest(version: Version, found: str) -> None:
    if found != version.sha256:
        raise WeightsError(
            f"{MODEL} of {version.method} {version.name} has SHA-256 {found[:12]}..., expected {version.sha256[:12]}..."
            ": the file was changed or cut short. Restore it from a copy, or promote another version and delete this "
            "one."
        )


def _write_model(content: Content, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        if callable(content):
            content(path)
        else:
            from safetensors.torch import save_file

            # clones, because the format refuses tensors that share memory
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in content.items()}, path)
        with safe_open(path, framework="np") as held:
            count = len(held.keys())
    except SafetensorError as error:  # also what a full disk raises
        raise WeightsError(f"Cannot store the tensors of a new version: {error}. Make room and try again.") from error
    if not count:
        raise WeightsError("Expected tensors for a new version, received none. Nothing was stored.")
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _read_text(path: Path) -> Optional[str]:
    with _files():
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # has no handle on folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"Cannot read or write a version: {error}. Nothing is left half-written. Make room or check the folder's "
            "permissions, then try again."
        ) from error


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command; returns the exit status, 2 for a refusal."""
    parser = argparse.ArgumentParser(prog="python -m lib.versions", description="Trained versions of a method.")
    parser.add_argument("command", choices=("list", "show", "promote", "rollback"))
    parser.add_argument("name", nargs="?", default="", help="version, for show and promote")
    parser.add_argument("--state", type=Path, required=True, help="the studies' .autosam folder")
    parser.add_argument("--method", default="sam2rad")
    parser.add_argument("--reason", default="by hand", help="for the history; no patient data")
    given = parser.parse_intermixed_args(arguments)
    try:
        sys.stdout.write(_run(open_store(given.state, given.method), given.command, given.name, given.reason))
    except AppError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _run(store: VersionStore, command: str, name: str, reason: str) -> str:
    if name and command in ("list", "rollback"):
        raise ConfigError(f"{command} takes no name, received {name!r}. Use `promote NAME` to choose a version.")
    if command == "list":
        return _table(store)
    if command == "show":
        return _details(store.get(name), live=store.live_name() == name)
    version = store.promote(name, reason) if command == "promote" else store.rollback(reason)
    return f"{version.method} {version.name} is live.\n"


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
