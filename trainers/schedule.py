"""The training schedule: looks every few seconds, decides with :mod:`lib.triggers`, starts through MONAI Label's gate.

Threads: one daemon thread calls :meth:`Scheduler.tick` and is the only one that changes the record; a look that raises
is logged and the next one comes. When something is due is computed by APScheduler's triggers (:mod:`lib.train_rules`);
its job queue is not used, since it sleeps through a clock that is set back. Other threads only leave marks
(:meth:`Scheduler.used`, :meth:`Scheduler.saved`, the pause file) and read the record, which is a value. Nothing runs in
training children. Left out: stopping a training; ``DELETE /train/`` does that.

``python -m trainers.schedule pause|resume|status --state DIR`` works with and without a running server.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Optional

from lib.errors import AppError, ConfigError
from lib.schedule_record import FILE, Record, Status, is_paused, load, plain, save, set_paused
from lib.settings import STATE_FOLDER
from lib.train_rules import Rules, elapsed
from lib.triggers import Facts, blocked, describe, new_labels, refused, started, step
from trainers.gate import Gate

logger = logging.getLogger(__name__)
TICK_S = 5.0
LOOK_AGAIN = timedelta(minutes=1)  # at labels that were saved past this server


class Scheduler:
    """Starts trainings by the rules. Building one opens and starts nothing.

    Args:
        rules: when.
        folder: of trained versions; the record lies there.
        gate: to the server.
        now: the time, aware; the server's clock unless a test has another.
        tick_s: seconds from look to look.
    """

    def __init__(
        self, rules: Rules, folder: Path, *, gate: Gate, now: Optional[Callable[[], datetime]] = None,
        tick_s: float = TICK_S,
    ) -> None:  # fmt: skip
        self.rules, self.folder, self.gate = rules, folder, gate
        self._now, self._tick_s = now or _local_time, tick_s
        self._record = self._saved = Record()
        self._labels: Optional[dict[str, str]] = None
        self._looked: Optional[datetime] = None  # None: a label was saved since
        self._used = self._now()
        self._seen = Facts(self._used)
        self._stopped: Optional[threading.Event] = None  # of the thread; None: there is none

    def start(self) -> None:
        """Takes up the record and looks from now on; nothing where no trigger is set, or again.

        Raises:
            WeightsError: if the record cannot be read.
        """
        if not self.rules.enabled or self._stopped is not None:
            return
        self.restore()
        stopped = self._stopped = threading.Event()
        threading.Thread(target=self._look_until, args=(stopped,), daemon=True, name="schedule").start()

    def restore(self) -> None:
        """Takes up the record of the server before this one."""
        self._record = self._saved = load(self.folder)

    def stop(self) -> None:
        """Ends the thread, after the look that is under way."""
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            stopped.set()

    def used(self) -> None:
        """Somebody works on this server."""
        self._used = self._now()

    def saved(self) -> None:
        """A label was saved; which and under which tag, the store knows."""
        self._used, self._looked = self._now(), None

    def pause(self, paused: bool = True) -> None:
        """Starts nothing more until it is resumed; a training that runs goes on.

        Raises:
            OSError: if the folder cannot be written.
        """
        set_paused(self.folder, paused)

    def tick(self) -> None:
        """One look."""
        newer = self.gate.successor()
        if newer is not None:
            self._hand_over(newer)
            return
        facts = self._seen = self._facts()
        record, start = step(self.rules, self._record, facts)
        if start is not None:
            job = self.gate.start(start.options)
            record = started(record, facts, start, job) if job else refused(record, facts)
        self._keep(record)

    def view(self) -> dict[str, Any]:
        """What ``/info/`` shows."""
        record, now, run, labels = self._record, self._now(), self._record.run, self._labels
        facts = replace(self._seen, now=now, idle_s=self._idle_s(now), paused=is_paused(self.folder))
        why_not, until = blocked(self.rules, record, facts) if record.pending or facts.paused else (None, None)
        next_time = until if why_not else self.rules.next_at(now)
        return plain(
            {
                "enabled": self.rules.enabled,
                "paused": facts.paused,
                "model": self.gate.model,
                "next": next_time,
                "pending": [describe(self.rules, key) for key in record.pending],
                "waits_for": why_not if record.pending else None,
                "new_labels": None if labels is None else new_labels(record, labels),
                "last_training": run and {k: getattr(run, k) for k in ("by", "why", "started", "status")},
                "log": record.lines,
            }
        )

    def _facts(self) -> Facts:
        now, run = self._now(), self._record.run
        if self._looked is None or self._labels is None or abs(elapsed(self._looked, now)) >= LOOK_AGAIN:
            self._looked = now  # before: what is saved meanwhile is looked at again
            self._labels = self.gate.labels()
        return Facts(
            now,
            labels=self._labels,
            job=self.gate.newest(),
            version=self.gate.version(),
            status=self.gate.status(run) if run and run.is_open else Status.RUNNING,
            busy=self.gate.busy(),
            idle_s=self._idle_s(now),
            paused=is_paused(self.folder),
        )

    def _idle_s(self, now: datetime) -> float:
        if elapsed(self._used, now) < timedelta(0):  # the clock was set back
            self._used = now
        return elapsed(self._used, now).total_seconds()

    def _look_until(self, stopped: threading.Event) -> None:
        while not stopped.wait(self._tick_s):
            try:
                self.tick()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next look comes
                self._failed(error)

    def _keep(self, record: Record) -> None:
        for what in record.news(self._record):
            logger.info("schedule: %s", what)
        self._record = record
        if record.differs(self._saved):
            save(self.folder, record)
            self._saved = record

    def _failed(self, error: Exception) -> None:
        """A look raised; the next one comes. Its text may name files."""
        name = type(error).__name__
        logger.warning("schedule: a look failed (%s) and is tried again", name)
        self._record = self._record.logged(self._now(), f"a look failed ({name}) and is tried again")

    def _hand_over(self, newer: Scheduler) -> None:
        """The server loaded the app again, and does not tell the new one that it runs."""
        newer.start()
        self.stop()


def _local_time() -> datetime:
    """In the server's zone by name, which knows when its clocks change; by its offset of today where it has no name."""
    from tzlocal import get_localzone

    try:
        return datetime.now(get_localzone())
    except (KeyError, ValueError, OSError):  # TZ may be any rule that the system's C library reads
        return datetime.now().astimezone()


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command line; returns the exit status, 2 for a refusal."""
    parser = argparse.ArgumentParser(prog="python -m trainers.schedule", description="The training schedule.")
    parser.add_argument("command", choices=("pause", "resume", "status"))
    parser.add_argument("--state", type=Path, required=True, help="the studies' .autosam folder")
    given = parser.parse_args(arguments)
    try:
        _check_state(given.state)
        if given.command != "status":
            set_paused(given.state, given.command == "pause")
        sys.stdout.write(_told(given.state))
    except (AppError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _check_state(folder: Path) -> None:
    """A pause in another folder would stop nothing and say it did."""
    if not folder.is_dir():
        raise ConfigError("--state: expected the .autosam folder of the studies, received no folder. Check the path.")
    if folder.name != STATE_FOLDER and not (folder / FILE).exists():
        raise ConfigError(
            f"--state: expected {STATE_FOLDER} in the studies, or the server's state_dir, received a folder without "
            f"{FILE}. Check the path, or start a server with train_at or train_after first."
        )


def _told(folder: Path) -> str:
    record = load(folder)
    facts = {"paused": is_paused(folder), "pending": record.pending, "failures": record.failures}
    return json.dumps({**plain(facts), "log": record.lines}, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
