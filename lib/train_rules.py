"""The settings of the training schedule, checked, and the times they mean. Pure functions of the moment asked about.

Due times follow cron: days of the week count from Sunday as 0, and two restricted day fields mean either; a time of day
that the clocks pass twice in a night is due the first time, and one that they leave out an hour later. Times are aware;
the moment's zone is the rules' zone. Left out: whether anything is to be done then (:mod:`lib.triggers`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Optional, Union

from lib.errors import ConfigError

if TYPE_CHECKING:
    from apscheduler.triggers.combining import OrTrigger
    from apscheduler.triggers.cron import CronTrigger

DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class Rules:
    """What ``--conf train_*`` asks for.

    Args:
        at: time of day, or five cron fields; empty: never.
        after: new or changed final labels that start a training; 0: never.
        interval_min: minutes from one scheduled start to the next.
        hours: allowed hours such as ``20:00-06:00``; empty: always.
        idle_min: minutes without an inference request, a next sample or a saved label before a start.
        limit_min: minutes that a scheduled training may take; 0: no limit.

    Raises:
        ConfigError: for a value of another form; the message names the setting.
    """

    at: str = ""
    after: int = 0
    interval_min: float = 0.0
    hours: str = ""
    idle_min: float = 0.0
    limit_min: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (
            ("train_after", self.after), ("train_min_interval", self.interval_min), ("train_idle", self.idle_min),
            ("train_minutes", self.limit_min),
        ):  # fmt: skip
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected a number of at least 0, received {value}.")
        if self.hours:
            _hours(self.hours)
        if self.at and self.next_at(datetime.now().astimezone()) is None:
            raise ConfigError(f"train_at: expected a time that comes again, received {self.at!r}, which never does.")

    @property
    def enabled(self) -> bool:
        """Whether any trigger is set."""
        return bool(self.at or self.after)

    @property
    def options(self) -> dict[str, float]:
        """What a scheduled training is asked for with."""
        return {"minutes": self.limit_min} if self.limit_min else {}

    def next_at(self, moment: datetime) -> Optional[datetime]:
        """The first due time of ``train_at`` after a moment, in its zone; None without one."""
        if not self.at:
            return None
        trigger, asked = _cron(self.at, moment), later(moment, timedelta(microseconds=1))
        while True:
            due = trigger.get_next_fire_time(None, asked)
            if due is not None and not _every_hour(self.at):
                due = due.replace(fold=0)
            if due is None or elapsed(moment, due) > timedelta(0):
                return due
            # a time that was there already, an hour ago on the same clock, or that the clocks leave out
            asked = later(asked.replace(second=0, microsecond=0), timedelta(minutes=1))

    def allowed(self, moment: datetime) -> bool:
        """Whether a training may start at this time of day; the end is not allowed any more."""
        if not self.hours:
            return True
        start, end = _hours(self.hours)
        clock = moment.time()
        return start <= clock < end if start < end else clock >= start or clock < end

    def opens(self, moment: datetime) -> datetime:
        """When the allowed hours start next."""
        start = _hours(self.hours)[0]
        opening = moment.replace(hour=start.hour, minute=start.minute, second=0, microsecond=0)
        return opening if opening > moment else opening + timedelta(days=1)


def elapsed(since: datetime, now: datetime) -> timedelta:
    """Time that really passed. Of two moments in one zone Python takes the difference of the clocks on the wall, which
    is an hour off in the two nights of a year in which they are changed."""
    return now.astimezone(UTC) - since.astimezone(UTC)


def later(moment: datetime, by: timedelta) -> datetime:
    """A moment that is really so much later, in the same zone."""
    return (moment.astimezone(UTC) + by).astimezone(moment.tzinfo)


def _hours(text: str) -> tuple[time, time]:
    parts = [_CLOCK.fullmatch(part.strip()) for part in str(text).split("-")]
    ends = [time(int(p[1]), int(p[2])) for p in parts if p]
    if len(parts) != 2 or len(ends) != 2 or ends[0] == ends[1]:
        raise ConfigError(f"train_hours: expected two different times such as 20:00-06:00, received {text!r}.")
    return ends[0], ends[1]


def _cron(text: str, moment: datetime) -> Union[CronTrigger, OrTrigger]:
    from apscheduler.triggers.combining import OrTrigger  # not at the top: bare machines import lib.config
    from apscheduler.triggers.cron import CronTrigger

    try:
        clock = _CLOCK.fullmatch(text)
        fields = [clock[2], clock[1], "*", "*", "*"] if clock else text.split()
        minute, hour, day, month, weekday = fields
        weekday = weekday if weekday.startswith("*") and "/" not in weekday else _weekdays(weekday)
        time_of_day = {"minute": minute, "hour": hour, "month": month, "timezone": moment.tzinfo}
        if day.startswith("*") or weekday == "*":
            return CronTrigger(day=day, day_of_week=weekday, **time_of_day)
        return OrTrigger([CronTrigger(day=day, **time_of_day), CronTrigger(day_of_week=weekday, **time_of_day)])
    except ValueError:
        raise ConfigError(
            f"train_at: expected a time such as 02:00 or five cron fields such as '0 2 * * 1-5', received {text!r}."
        ) from None


def _every_hour(text: str) -> bool:
    """Whether cron's hours are not chosen ones, so that an hour that comes twice counts twice."""
    return not _CLOCK.fullmatch(text) and text.split()[1].startswith("*")


def _weekdays(field: str) -> str:
    """Cron's days, Sunday being 0 and 7, as names: the library counts from Monday."""
    found: set[int] = set()
    for part in field.lower().split(","):
        days, _, every = part.partition("/")
        first, _, last = ("0-6" if days == "*" else days).partition("-")
        start, stop = _weekday(first), _weekday(last) if last else (6 if every else _weekday(first))
        if stop < start:
            stop += 7  # such as fri-mon
        found.update(day % 7 for day in range(start, stop + 1, int(every or 1)))
    return ",".join(DAYS[day] for day in sorted(found))


def _weekday(text: str) -> int:
    number = DAYS.index(text) if text in DAYS else int(text)
    if not 0 <= number <= 7:
        raise ValueError(text)
    return number
