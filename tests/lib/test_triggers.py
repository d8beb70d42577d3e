"""Decisions of the schedule on a fast clock: what makes a training due, what holds it up, what survives a failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Optional
from zoneinfo import ZoneInfo

import pytest

from lib.schedule_record import Record, Status
from lib.train_rules import Rules
from lib.triggers import Facts, Job, Start, new_labels, refused, started, step

MONDAY = datetime(2026, 3, 2, 14, tzinfo=ZoneInfo("Europe/Berlin"))


def labels(*cases: str) -> dict[str, str]:
    """Final labels; ``b2`` is case b, saved the second time."""
    return {case[0]: case for case in cases}


@dataclass
class World:
    """A server that only has a clock and a list of trainings."""

    rules: Rules
    now: datetime = MONDAY
    record: Record = field(default_factory=Record)
    facts: Facts = field(default_factory=lambda: Facts(MONDAY, labels={}))
    starts: list[Start] = field(default_factory=list)

    def look(self, minutes: float = 0, refuse: bool = False, **facts: Any) -> Optional[Start]:
        """One look, so many minutes later; what it started."""
        self.now += timedelta(minutes=minutes)
        self.facts = replace(self.facts, now=self.now, **facts)
        self.record, start = step(self.rules, self.record, self.facts)
        if start is not None and refuse:
            self.record = refused(self.record, self.facts)
        elif start is not None:
            self.starts.append(start)
            name = f"job{len(self.starts)}"
            self.record = started(self.record, self.facts, start, name)
            self.facts = replace(self.facts, job=Job(name, start.options), status=Status.RUNNING)
        return start

    def ends(self, status: Status = Status.DONE, minutes: float = 1) -> Optional[Start]:
        """The training ends; what that look started."""
        return self.look(minutes, status=status)

    @property
    def said(self) -> list[str]:
        return [line.what for line in self.record.log]


# triggers


def test_labels_start_when_there_are_enough() -> None:
    world = World(Rules(after=2))
    assert world.look(labels=labels("a1")) is None
    assert world.look(labels=labels("a1", "b1")) == Start("train_after 2", {})
    assert world.said == ["due: train_after 2", "started: train_after 2"]
    assert world.ends() is None
    assert world.look(labels=labels("a1", "b1", "c1")) is None
    assert world.look(labels=labels("a1", "b1", "c1", "d1")) is not None


COUNTS = [
    ((), (), 0),
    ((), ("a1", "b1"), 2),  # saved before the schedule was switched on: they count
    (("a1",), ("a1",), 0),
    (("a1",), ("a2",), 1),  # corrected since
    (("a1",), ("a3", "b1"), 2),  # saved twice counts once
    (("a1", "b1"), ("a1",), 0),  # removed
]


@pytest.mark.parametrize(("seen", "now", "expected"), COUNTS)
def test_new_labels_table(seen: tuple[str, ...], now: tuple[str, ...], expected: int) -> None:
    assert new_labels(Record(seen=labels(*seen)), labels(*now)) == expected


def test_labels_saved_during_a_training_count_for_the_next() -> None:
    world = World(Rules(after=1))
    assert world.look(labels=labels("a1"))
    world.look(1, labels=labels("a1", "b1"))
    assert world.said[-1] == "waits: another training is running"
    assert world.ends() == Start("train_after 1", {})


def test_time_starts_once_a_day() -> None:
    world = World(Rules(at="02:00"))
    assert world.look(labels=labels("a1")) is None
    assert world.look(12 * 60 - 1) is None
    assert world.look(1) == Start("train_at 02:00", {})
    assert world.look(1) is None
    assert world.ends() is None
    assert world.look(24 * 60 - 3, labels=labels("a1", "b1")) is None
    assert world.look(1) is not None
    assert len(world.starts) == 2


def test_time_missed_while_the_server_was_down_is_one_training() -> None:
    world = World(Rules(at="02:00"))
    world.look(labels=labels("a1"))
    assert world.look(5 * 24 * 60) is not None
    assert "due: train_at 02:00, late: the server was not running then" in world.said
    world.ends()
    assert world.look(60, labels=labels("a1", "b1")) is None


def test_missed_time_waits_for_the_allowed_hours() -> None:
    world = World(Rules(at="02:00", hours="20:00-06:00"))
    world.look(labels=labels("a1"))
    assert world.look(24 * 60) is None
    assert world.said[-1] == "waits: outside the allowed hours 20:00-06:00"
    assert world.look(6 * 60) is not None


def test_another_time_of_day_misses_nothing() -> None:
    world = World(Rules(at="02:00"))
    world.look(labels=labels("a1"))
    world.rules = Rules(at="13:00")
    assert world.look(24 * 60) is None  # 13:00 has passed, but that was not the rule then
    assert world.look(23 * 60) is not None


POINTLESS = [
    (Status.DONE, ("a1",), "not started: no final label changed since the last training"),
    (Status.DONE, (), "not started: there is no final label yet"),
    (Status.DONE, ("a1", "b1"), None),
    (Status.DONE, ("a2",), None),
    (Status.STOPPED, ("a1",), None),
]


@pytest.mark.parametrize(("status", "now", "said"), POINTLESS)
def test_time_without_changed_labels_starts_nothing(status: Status, now: tuple[str, ...], said: Optional[str]) -> None:
    world = World(Rules(at="02:00"))
    world.look(labels=labels("a1"))
    assert world.look(12 * 60)
    world.ends(status)
    start = world.look(24 * 60, labels=labels(*now))
    assert (start is None) == (said is not None)
    assert said is None or (world.said[-1] == said and not world.record.pending)


def test_limit_of_time_is_passed_on() -> None:
    world = World(Rules(after=1, limit_min=5))
    assert world.look(labels=labels("a1")) == Start("train_after 1", {"minutes": 5})


def test_both_triggers_are_one_training() -> None:
    world = World(Rules(at="02:00", after=1, hours="02:00-06:00"))
    world.look(labels=labels("a1"))
    assert world.look(12 * 60) == Start("train_after 1, train_at 02:00", {})
    assert world.ends() is None


def test_trigger_that_was_switched_off_is_not_pending_any_more() -> None:
    world = World(Rules(after=1, at="02:00"))
    world.look(labels=labels("a1"), paused=True)
    assert world.record.pending
    world.rules = Rules(at="02:00")
    assert world.look(paused=False) is None
    assert not world.record.pending


# what holds it up

HELD = [
    ({"paused": True}, {"paused": False}, 0, "waits: paused"),
    ({"busy": True}, {"busy": False}, 0, "waits: another training is running"),
    ({"idle_s": 599}, {"idle_s": 600}, 0, "waits: somebody used the server in the last 10 minutes"),
    ({"now": MONDAY.replace(hour=19, minute=59)}, {}, 1, "waits: outside the allowed hours 20:00-06:00"),
]


@pytest.mark.parametrize(("held", "free", "minutes", "said"), HELD)
def test_held_up_is_kept_and_told_and_started_later(
    held: Mapping[str, Any], free: Mapping[str, Any], minutes: float, said: str
) -> None:
    world = World(Rules(after=1, hours="20:00-06:00", idle_min=10), now=MONDAY.replace(hour=22))
    world.now = held.get("now", world.now)
    rest = {key: value for key, value in held.items() if key != "now"}
    for _ in range(3):
        assert world.look(labels=labels("a1"), **rest) is None
    assert world.said[-1] == said and world.record.log[-1].count == 3
    assert list(world.record.pending) == ["labels"]
    assert world.look(minutes, **free) == Start("train_after 1", {})


def test_interval_counts_from_the_last_scheduled_start() -> None:
    world = World(Rules(after=1, interval_min=60))
    assert world.look(labels=labels("a1"))
    assert world.ends(minutes=5) is None
    assert world.look(54, labels=labels("a1", "b1")) is None
    assert "less than 60 minutes after the last start, not before Mon 15:00" in world.said[-1]
    assert world.look(1) is not None


def test_clock_set_back_does_not_hold_up() -> None:
    world = World(Rules(after=1, at="02:00", interval_min=60))
    assert world.look(labels=labels("a1"))
    world.ends()
    assert world.look(-30 * 24 * 60, labels=labels("a1", "b1")) is not None
    world.ends()
    assert world.look(12 * 60, labels=labels("c1")) is not None


def test_failure_while_the_clock_was_far_ahead_does_not_hold_up() -> None:
    world = World(Rules(after=1))
    world.look(10 * 365 * 24 * 60, labels=labels("a1"))
    world.ends(Status.ERROR)
    assert world.look(-10 * 365 * 24 * 60) == Start("the last training failed", {})


BERLIN = ZoneInfo("Europe/Berlin")
AUTUMN = datetime(2026, 10, 24, 23, 30, tzinfo=UTC)  # half an hour before the clocks show two o'clock the first time
SPRING = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)  # half an hour before they show three instead of two


def look_at(world: World, moment: datetime, **facts: Any) -> Optional[Start]:
    """As :meth:`World.look`, at a moment on the clocks of Berlin."""
    world.now = moment.astimezone(BERLIN)
    return world.look(**facts)


@pytest.mark.parametrize("status", [Status.DONE, Status.STOPPED])
def test_hour_that_comes_twice_is_one_due_time(status: Status) -> None:
    world = World(Rules(at="02:00"), now=AUTUMN.astimezone(BERLIN))
    world.look(labels=labels("a1"))
    starts = [look_at(world, AUTUMN + timedelta(minutes=m), status=status) for m in range(1, 24 * 60)]
    assert [m for m, start in enumerate(starts, 1) if start] == [30]
    assert world.said == ["due: train_at 02:00", "started: train_at 02:00", world.said[-1]]
    assert look_at(world, AUTUMN + timedelta(hours=25, minutes=30), labels=labels("a1", "b1"))  # two the next night


def test_hour_that_the_clocks_leave_out_is_due_once() -> None:
    world = World(Rules(at="02:30"), now=SPRING.astimezone(BERLIN))
    world.look(labels=labels("a1"))
    starts = [look_at(world, SPRING + timedelta(minutes=m), status=Status.DONE) for m in range(1, 20 * 60)]
    assert len([start for start in starts if start]) == 1 and "late" not in str(world.said)


def test_interval_is_of_real_minutes_when_the_clocks_are_changed() -> None:
    world = World(Rules(after=1, interval_min=60), now=AUTUMN.astimezone(BERLIN))
    assert world.look(labels=labels("a1"))
    world.ends(minutes=1)
    assert look_at(world, AUTUMN + timedelta(minutes=59), labels=labels("a1", "b1")) is None
    assert look_at(world, AUTUMN + timedelta(minutes=60)) is not None


def test_refused_start_is_tried_again() -> None:
    world = World(Rules(after=1))
    for _ in range(2):
        assert world.look(labels=labels("a1"), refuse=True) is not None
    assert world.said == ["due: train_after 1", "refused by MONAI Label, another training is running; tried again"]
    assert world.look() is not None
    assert len(world.starts) == 1 and not world.record.pending


def test_silent_store_starts_nothing() -> None:
    world = World(Rules(at="02:00"))
    world.look(labels=None)
    assert world.look(12 * 60) is None
    assert world.said[-1] == "waits: the datastore does not answer"
    assert world.look(1, labels=labels("a1")) is not None


# by hand


def test_training_by_hand_answers_the_labels_and_not_the_time() -> None:
    world = World(Rules(at="02:00", after=2, hours="20:00-06:00"))
    world.look(12 * 60 - 1, paused=True, labels=labels("a1", "b1"))
    world.look(1, labels=labels("a1", "b1"))
    assert set(world.record.pending) == {"labels", "at"}
    world.look(job=Job("x", {"epochs": 1}), busy=True, paused=False)
    assert set(world.record.pending) == {"at"}
    assert new_labels(world.record, labels("a1", "b1")) == 0 and world.record.last_start is None
    assert world.look(5, status=Status.DONE, busy=False) is None
    assert world.record.seen == labels("a1", "b1")
    assert world.said[-1] == "not started: no final label changed since the last training"


@pytest.mark.parametrize("status", [Status.ERROR, Status.KILLED, Status.STOPPED])
def test_training_by_hand_that_ends_badly_is_its_starters_matter(status: Status) -> None:
    world = World(Rules(after=5))
    world.look(job=Job("x", {}), busy=True)
    assert world.look(5, status=status, busy=False) is None
    assert not world.record.pending and world.record.failures == 0


@pytest.mark.parametrize("status", [Status.ERROR, Status.KILLED, Status.STOPPED])
def test_training_by_hand_that_ends_badly_answers_nothing(status: Status) -> None:
    world = World(Rules(after=2))
    world.look(labels=labels("a1", "b1"), paused=True)
    since = world.record.pending["labels"]
    world.look(1, job=Job("x", {"epochs": 1}), busy=True, paused=False)
    assert not world.record.pending and new_labels(world.record, labels("a1", "b1")) == 0
    assert new_labels(world.record, labels("a2", "b1", "c1")) == 2  # labels saved meanwhile count
    assert world.look(5, status=status, busy=False) == Start("train_after 2", {})
    assert world.record.run.why == "train_after 2" and since < world.now  # type: ignore[union-attr]


def test_training_by_hand_keeps_a_retry_only_if_it_fails() -> None:
    for status, expected in ((Status.ERROR, {"retry"}), (Status.DONE, set())):
        world = World(Rules(after=1))
        assert world.look(labels=labels("a1"))
        assert world.ends(Status.ERROR, 0) is None and set(world.record.pending) == {"retry"}
        world.look(1, job=Job("x", {}), busy=True, status=Status.RUNNING)
        assert not world.record.pending
        world.look(1, status=status, busy=False, paused=True)
        assert set(world.record.pending) == expected


def test_stopped_training_is_not_started_again() -> None:
    world = World(Rules(after=1))
    assert world.look(labels=labels("a1"))
    assert world.ends(Status.STOPPED) is None
    assert world.look(24 * 60) is None
    assert world.look(labels=labels("a1", "b1")) is not None


# failures


def test_failures_are_tried_again_ever_later_and_given_up() -> None:
    world = World(Rules(after=1))
    assert world.look(labels=labels("a1"))
    for minutes in (10, 20, 40, 80):
        assert world.ends(Status.ERROR, 0) is None
        assert "the last training failed, not before" in world.said[-1]
        assert world.look(minutes - 1) is None
        assert world.look(1) == Start("the last training failed", {})
    assert world.ends(Status.ERROR, 0) is None
    assert world.said[-1] == "5 failures in a row: given up until the next trigger"
    assert world.look(7 * 24 * 60) is None
    assert len(world.starts) == 5
    assert world.look(labels=labels("a1", "b1")) is not None  # the next trigger
    assert world.ends(Status.ERROR) is None and not world.record.pending
    assert world.look(labels=labels("a1", "b1", "c1")) is None  # and not at once
    assert "not before" in world.said[-1]
    assert world.look(6 * 60) is not None
    world.ends()
    assert world.record.failures == 0


def test_killed_training_goes_on_soon_and_then_ever_later() -> None:
    world = World(Rules(after=1, interval_min=600))
    assert world.look(labels=labels("a1"))
    assert world.ends(Status.KILLED, 0) is None
    assert world.look(1) == Start("a training was cut off", {})
    assert world.ends(Status.KILLED, 0) is None
    assert world.look(9) is None
    assert world.look(1) is not None


def test_training_that_the_servers_end_cut_off_goes_on_with_its_options() -> None:
    world = World(Rules(after=5))
    world.look(job=Job("x", {"epochs": 3}, 77, 1.0), busy=True, labels=labels("a1"))
    assert (world.record.run.pid, world.record.run.born) == (77, 1.0)  # type: ignore[union-attr]
    assert world.look(job=None, status=Status.GONE, busy=False) == Start("a training was cut off", {"epochs": 3})
    assert "the server ended during a training" in world.said


def test_training_cut_off_before_new_labels_is_a_new_one() -> None:
    world = World(Rules(after=5))
    world.look(job=Job("x", {"epochs": 3}), busy=True, labels=labels("a1"))
    assert world.look(job=None, status=Status.GONE, busy=False, labels=labels("a1", "b1")) == Start(
        "a training was cut off", {}
    )


def test_training_that_outlived_its_server_is_waited_for() -> None:
    world = World(Rules(after=1))
    assert world.look(labels=labels("a1"))
    assert world.look(1, job=None, labels=labels("a1", "b1")) is None
    assert world.said[-1] == "waits: another training is running"
    assert world.ends() is not None


def test_process_of_a_started_training_is_remembered() -> None:
    world = World(Rules(after=1))
    assert world.look(labels=labels("a1"))
    world.look(job=Job("job1", {}, 77, 1.5))
    assert (world.record.run.pid, world.record.run.born) == (77, 1.5)  # type: ignore[union-attr]


def test_training_that_upstream_never_starts_counts_as_failed() -> None:
    world = World(Rules(after=1))
    assert world.look(labels=labels("a1"))
    assert world.look(1, status=Status.SUBMITTED) is None and world.record.run.is_open  # type: ignore[union-attr]
    assert world.look(2) is None
    assert world.record.failures == 1
    assert world.look(10) is not None
