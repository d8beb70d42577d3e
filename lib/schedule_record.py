"""What the training schedule remembers, as ``schedule.json`` in the folder of trained versions, and its pause switch.

The file is replaced as a whole by one writer, the scheduler. The switch is a file of its own, ``schedule.paused``, so
that a person can pause and resume from anywhere while the server writes the other. No patient data: cases are hashes,
the log holds only our own sentences. Times are aware. Left out: locks; records are values and change by replacement.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, Optional

from lib.versions.files import read_text, write_text

logger = logging.getLogger(__name__)
FILE, PAUSED = "schedule.json", "schedule.paused"
LOG_LINES = 50


class Status(StrEnum):
    """How a training stands, in MONAI Label's words and two of ours.

    ``KILLED``: its process ended and told nothing; ``GONE``: it was cut off by the end of the server.
    """

    SUBMITTED = "SUBMITTED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    ERROR = "ERROR"
    STOPPED = "STOPPED"
    KILLED = "KILLED"
    GONE = "GONE"

    @property
    def is_open(self) -> bool:
        """Whether it may still end well."""
        return self in (Status.SUBMITTED, Status.RUNNING)


@dataclass(frozen=True)
class Run:
    """The last training of the scheduled model.

    Args:
        id: MONAI Label's.
        by: ``schedule`` or ``hand``.
        started: when it was seen first.
        why: in words.
        options: of the request, so that the same can be asked for again.
        version: that the training before it ended with.
        pid: of its process, 0 where unknown.
        born: when that process was created, seconds since the epoch.
        labels: final ones when somebody started it by hand, see ``seen``; None otherwise and where they are unknown.
        held: what was due when somebody started it by hand; it is due again if that training fails.
        status: as seen last.
    """

    id: str
    by: str
    started: datetime
    why: str
    options: dict[str, Any] = field(default_factory=dict)
    version: Optional[str] = None
    pid: int = 0
    born: float = 0.0
    labels: Optional[dict[str, str]] = None
    held: dict[str, datetime] = field(default_factory=dict)
    status: Status = Status.RUNNING

    @property
    def is_open(self) -> bool:
        """Whether its end has not been seen."""
        return self.status.is_open


@dataclass(frozen=True)
class Line:
    """One decision; equal ones in a row are one line."""

    time: datetime
    last: datetime
    count: int
    what: str


@dataclass(frozen=True)
class Record:
    """Everything that survives a restart.

    Args:
        at: the ``train_at`` that ``at_checked`` belongs to.
        at_checked: up to when its due times are dealt with.
        pending: reason to the time since when a training is due.
        seen: final labels that a training by the schedule, or one by hand that ended well, started with; opaque key to
            stamp.
        run: the last training.
        last_start: of a training by the schedule.
        failures: in a row.
        not_before: no start before, after a failure.
        paused: as seen last.
        log: the last decisions, oldest first.
    """

    at: str = ""
    at_checked: Optional[datetime] = None
    pending: dict[str, datetime] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)
    run: Optional[Run] = None
    last_start: Optional[datetime] = None
    failures: int = 0
    not_before: Optional[datetime] = None
    paused: bool = False
    log: tuple[Line, ...] = ()

    def logged(self, now: datetime, what: str) -> Record:
        """The record with one more decision, counted on the last line where it says the same."""
        if self.log and self.log[-1].what == what:
            same = replace(self.log[-1], last=now, count=self.log[-1].count + 1)
            return replace(self, log=(*self.log[:-1], same))
        return replace(self, log=(*self.log, Line(now, now, 1, what))[-LOG_LINES:])

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log as JSON."""
        return [plain(asdict(line)) for line in self.log]

    def differs(self, older: Record) -> bool:
        """Whether there is more to keep than another count on the same line."""
        return replace(self, log=()) != replace(older, log=()) or bool(self.news(older))

    def news(self, older: Record) -> list[str]:
        """Decisions that an older record does not have yet."""
        known = {(line.time, line.what) for line in older.log}
        return [line.what for line in self.log if (line.time, line.what) not in known]


def plain(value: Any) -> Any:
    """Records as JSON values: times to the second in ISO 8601, statuses as words."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def save(folder: Path, record: Record) -> None:
    """Replaces the file atomically.

    Raises:
        OSError: if it cannot be written; the old one is whole then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.part"
    write_text(partial, json.dumps(plain(asdict(record)), indent=1))
    os.replace(partial, folder / FILE)


def load(folder: Path) -> Record:
    """The record of a folder; an empty one where there is none or it cannot be read.

    Raises:
        WeightsError: where the disk refuses to read.
    """
    text = read_text(folder / FILE)
    if text is None:
        return Record()
    try:
        return _record(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is damaged (%s); the schedule starts anew: all labels count.", FILE, type(error).__name__)
        return Record()


def is_paused(folder: Path) -> bool:
    """Whether a person paused the schedule of a folder."""
    return (folder / PAUSED).exists()


def set_paused(folder: Path, paused: bool) -> None:
    """Pauses or resumes; a server on the folder follows at its next look, seconds later.

    Raises:
        OSError: if the folder cannot be written.
    """
    if paused:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAUSED).touch()
    else:
        (folder / PAUSED).unlink(missing_ok=True)


def _record(values: dict[str, Any]) -> Record:
    kinds = {"at": str, "seen": dict, "pending": dict, "log": list, "failures": int, "paused": bool}
    if wrong := [key for key, kind in kinds.items() if not isinstance(values[key], kind)]:
        raise TypeError(f"{wrong}")
    run = values["run"]
    if run:
        run = Run(**{**run, **_times(run, "started"), "held": _moments(run.get("held", {}))})
    return Record(
        **{
            **values,
            **_times(values, "at_checked", "last_start", "not_before"),
            "pending": _moments(values["pending"]),
            "run": run and replace(run, status=Status(run.status)),
            "log": tuple(Line(**{**line, **_times(line, "time", "last")}) for line in values["log"]),
        }
    )


def _moments(values: dict[str, str]) -> dict[str, datetime]:
    return {key: datetime.fromisoformat(since) for key, since in values.items()}


def _times(values: dict[str, Any], *names: str) -> dict[str, Optional[datetime]]:
    return {name: values[name] and datetime.fromisoformat(values[name]) for name in names}
