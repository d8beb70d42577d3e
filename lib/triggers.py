"""When a scheduled training is due and what holds it up: pure functions of the rules, the record and the facts.

A trigger makes a training *pending*; it stays so, over refusals and restarts, until one starts. Times are aware and in
the server's zone. Thread-safe: nothing is kept here. Left out: clocks, threads and files (:mod:`trainers.schedule`,
:mod:`lib.schedule_record`), and stopping a training when the allowed hours end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Optional

from lib.schedule_record import Record, Run, Status
from lib.train_rules import Rules, elapsed, later

FIRST_BACKOFF_MIN, LONGEST_BACKOFF_MIN = 10.0, 24 * 60.0
_NOTHING = timedelta(0)
KILLED_WAIT = timedelta(minutes=1)  # what killed the process may be about to end the server too
GIVE_UP_AFTER = 5  # failures in a row
MISSED_AFTER = timedelta(minutes=2)  # a due time that is noticed later was missed, not just looked at late
STUCK_AFTER = timedelta(minutes=2)  # submitted and no process by then: upstream could not start one


@dataclass(frozen=True)
class Job:
    """A training as MONAI Label's own list of tasks shows it.

    Args:
        id: upstream's.
        options: of the request, those that the trainer knows.
        pid: of its process, 0 as long as there is none.
        born: when that process was created, which tells it from a later one of the same number.
    """

    id: str
    options: Mapping[str, Any]
    pid: int = 0
    born: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What the scheduler sees at one moment.

    Args:
        now: aware, in the server's zone.
        labels: final labels, an opaque key per case to a stamp that changes when it is saved; None where the store
            does not answer.
        job: the newest training of the scheduled model since the server started.
        version: of the last training that ended well, as its trainer reports it.
        status: how the training on record stands; ``RUNNING`` without one.
        busy: whether any training is running or about to.
        idle_s: seconds since somebody used the server.
        paused: whether a person paused the schedule.
    """

    now: datetime
    labels: Optional[Mapping[str, str]] = None
    job: Optional[Job] = None
    version: Optional[str] = None
    status: Status = Status.RUNNING
    busy: bool = False
    idle_s: float = math.inf
    paused: bool = False


@dataclass(frozen=True)
class Start:
    """A training to ask for now."""

    why: str
    options: Mapping[str, Any]


def step(rules: Rules, record: Record, facts: Facts) -> tuple[Record, Optional[Start]]:
    """One look: takes up what happened, what is due, and decides.

    Args:
        rules: of the server.
        record: of the last look.
        facts: of now.

    Returns:
        The new record, and what to start, if anything. Call :func:`started` or :func:`refused` with the outcome.
    """
    if facts.paused != record.paused:
        record = replace(record, paused=facts.paused).logged(facts.now, "paused" if facts.paused else "resumed")
    record = _due(rules, _observed(record, facts), facts)
    if not record.pending:
        return record, None
    why_not, _ = blocked(rules, record, facts)
    if why_not:
        return record.logged(facts.now, f"waits: {why_not}"), None
    same = record.run is not None and "resume" in record.pending and facts.labels == record.seen
    options = record.run.options if same and record.run else rules.options  # with other labels it could not go on
    return record, Start(", ".join(describe(rules, key) for key in record.pending), options)


def started(record: Record, facts: Facts, start: Start, job_id: str) -> Record:
    """The record after MONAI Label took the training."""
    run = Run(job_id, "schedule", facts.now, start.why, dict(start.options), facts.version)
    begun = replace(record, run=run, pending={}, seen=dict(facts.labels or {}), last_start=facts.now, not_before=None)
    return begun.logged(facts.now, f"started: {start.why}")


def refused(record: Record, facts: Facts) -> Record:
    """The record after MONAI Label refused; what was pending still is."""
    return record.logged(facts.now, "refused by MONAI Label, another training is running; tried again")


def new_labels(record: Record, labels: Mapping[str, str]) -> int:
    """Cases whose final label is new or was saved again since the last training started."""
    run = record.run
    known = run.labels if run and run.is_open and run.labels is not None else record.seen
    return sum(known.get(case) != stamp for case, stamp in labels.items())


def describe(rules: Rules, key: str) -> str:
    """A pending reason in words."""
    return {
        "at": f"train_at {rules.at}",
        "labels": f"train_after {rules.after}",
        "resume": "a training was cut off",
        "retry": "the last training failed",
    }.get(key, key)


def blocked(rules: Rules, record: Record, facts: Facts) -> tuple[Optional[str], Optional[datetime]]:
    """What keeps a pending training from starting, and until when where that is known; (None, None): nothing."""
    now, interval = facts.now, timedelta(minutes=rules.interval_min)
    last, resuming = record.last_start, "resume" in record.pending
    if facts.paused:
        return "paused", None
    if facts.busy or (record.run and record.run.is_open):
        return "another training is running", None
    if facts.labels is None:
        return "the datastore does not answer", None
    if not rules.allowed(now):
        return f"outside the allowed hours {rules.hours}", rules.opens(now)
    # a clock that was set back must not hold it up, and going on with a training is no new one
    if record.not_before and _NOTHING < elapsed(now, record.not_before) <= timedelta(minutes=LONGEST_BACKOFF_MIN):
        return f"the last training failed, not before {_clock(record.not_before)}", record.not_before
    if last and not resuming and _NOTHING <= elapsed(last, now) < interval:
        end = later(last, interval)
        return f"less than {rules.interval_min:g} minutes after the last start, not before {_clock(end)}", end
    if facts.idle_s < 60 * rules.idle_min:
        return f"somebody used the server in the last {rules.idle_min:g} minutes", None
    return None, None


def _observed(record: Record, facts: Facts) -> Record:
    """Takes up the end of the training on record and a start by hand."""
    run, job = record.run, facts.job
    if run and run.is_open:
        stuck = facts.status is Status.SUBMITTED and not facts.busy and elapsed(run.started, facts.now) > STUCK_AFTER
        status = Status.ERROR if stuck else facts.status
        if not status.is_open:
            record = _ended(record, replace(run, status=status), facts.now)
        elif job and job.id == run.id and job.pid and not run.pid:
            record = replace(record, run=replace(run, pid=job.pid, born=job.born))
    if job and (record.run is None or record.run.id != job.id):
        held = {key: since for key, since in record.pending.items() if key != "at"}  # answered, if it ends well
        by_hand = Run(
            job.id, "hand", facts.now, "by hand", dict(job.options), facts.version, job.pid, job.born,
            labels=None if facts.labels is None else dict(facts.labels), held=held,
        )  # fmt: skip
        pending = {key: since for key, since in record.pending.items() if key not in held}
        record = replace(record, run=by_hand, pending=pending).logged(facts.now, "started by hand")
    return record


def _ended(record: Record, run: Run, now: datetime) -> Record:
    """A training that failed or was cut off becomes pending again, after a time that doubles with every failure."""
    record = replace(record, run=run).logged(now, _END[run.status])
    if run.status not in (Status.DONE, Status.GONE):
        record = replace(record, pending={**run.held, **record.pending})
    elif run.labels is not None:  # answered; what was cut off is gone on with
        record = replace(record, seen=run.labels)
    if run.status is Status.DONE:
        return replace(record, failures=0, not_before=None)
    again = run.status is Status.GONE or (run.by == "schedule" and run.status in (Status.ERROR, Status.KILLED))
    if not again:
        return record
    failures = record.failures + 1
    if failures >= GIVE_UP_AFTER:
        text = f"{failures} failures in a row: given up until the next trigger"
        return replace(record, failures=failures, not_before=later(now, _backoff(failures))).logged(now, text)
    cut_off = run.status in (Status.GONE, Status.KILLED)  # goes on where it was, the first time at once
    wait = max(_backoff(failures - cut_off), KILLED_WAIT if run.status is Status.KILLED else timedelta(0))
    pending = {**record.pending, "resume" if cut_off else "retry": now}
    return replace(record, failures=failures, not_before=later(now, wait), pending=pending)


_END = {
    Status.DONE: "the training ended",
    Status.ERROR: "the training failed; train_stats says why",
    Status.STOPPED: "the training was stopped by hand",
    Status.KILLED: "the training's process was killed",
    Status.GONE: "the server ended during a training",
}


def _backoff(failures: int) -> timedelta:
    """10 minutes, 20, 40, up to a day; nothing before the first failure."""
    minutes = min(FIRST_BACKOFF_MIN * 2 ** min(failures - 1, 20), LONGEST_BACKOFF_MIN) if failures > 0 else 0.0
    return timedelta(minutes=minutes)


def _due(rules: Rules, record: Record, facts: Facts) -> Record:
    """What the triggers make pending, less what has become pointless."""
    now, labels = facts.now, facts.labels
    pending = {
        k: since for k, since in record.pending.items() if (k != "at" or rules.at) and (k != "labels" or rules.after)
    }
    record = replace(record, pending=pending)
    if record.at != rules.at or record.at_checked is None or elapsed(now, record.at_checked) > _NOTHING:
        record = replace(record, at=rules.at, at_checked=now)
    due = rules.next_at(record.at_checked.astimezone(now.tzinfo))  # type: ignore[union-attr]
    if due and elapsed(due, now) >= _NOTHING:
        late = ", late: the server was not running then" if elapsed(due, now) > MISSED_AFTER else ""
        record = replace(record, at_checked=now, pending={**record.pending, "at": record.pending.get("at", now)})
        record = record.logged(now, f"due: {describe(rules, 'at')}{late}")
    if labels is None:
        return record
    if rules.after and "labels" not in record.pending and new_labels(record, labels) >= rules.after:
        record = replace(record, pending={**record.pending, "labels": now}).logged(
            now, f"due: {describe(rules, 'labels')}"
        )
    return _without_pointless(record, labels, now)


def _without_pointless(record: Record, labels: Mapping[str, str], now: datetime) -> Record:
    """Drops a due time where no label has changed: there is nothing new to learn from."""
    if set(record.pending) != {"at"}:
        return record
    ended_well = record.run is not None and record.run.status is Status.DONE
    if labels and not (ended_well and labels == record.seen):
        return record
    reason = "no final label changed since the last training" if labels else "there is no final label yet"
    return replace(record, pending={}).logged(now, f"not started: {reason}")


def _clock(moment: datetime) -> str:
    return moment.strftime("%a %H:%M")
