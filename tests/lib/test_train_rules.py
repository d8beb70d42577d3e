"""Settings of the schedule: which are refused with which words, and the times they mean. 2026-03-02 is a Monday."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from lib.errors import ConfigError
from lib.settings import AppSettings
from lib.train_rules import Rules

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> datetime:
    """Such as ``03-02 14:00``."""
    return datetime.fromisoformat(f"2026-{text}").replace(tzinfo=BERLIN)


NEXT = [
    ("02:00", "03-02 01:59", "03-02 02:00"),
    ("2:00", "03-02 02:00", "03-03 02:00"),  # strictly after
    ("02:00", "03-28 03:00", "03-29 03:00"),  # 02:00 does not exist that night
    ("* * * * *", "03-02 14:00", "03-02 14:01"),
    ("*/15 8-9 * * *", "03-02 09:46", "03-03 08:00"),
    ("0 2 * * 1-5", "03-06 12:00", "03-09 02:00"),  # Friday to Monday: cron counts days from Sunday
    ("0 2 * * mon-fri", "03-06 12:00", "03-09 02:00"),
    ("0 2 * * 0", "03-02 12:00", "03-08 02:00"),
    ("0 2 * * 7", "03-02 12:00", "03-08 02:00"),
    ("0 2 * * 6,0", "03-02 12:00", "03-07 02:00"),
    ("0 2 * * FRI-MON", "03-03 12:00", "03-06 02:00"),
    ("0 2 * * */2", "03-02 12:00", "03-03 02:00"),  # Sunday, Tuesday, Thursday, Saturday
    ("0 2 * * 1/3", "03-02 12:00", "03-05 02:00"),  # Monday and Thursday
    ("0 2 1 * *", "03-02 12:00", "04-01 02:00"),
    ("0 2 5 * 1", "03-02 12:00", "03-05 02:00"),  # the 5th or a Monday
    ("0 2 5 * 1", "03-05 12:00", "03-09 02:00"),
]


@pytest.mark.parametrize(("rule", "moment", "expected"), NEXT)
def test_next_at_table(rule: str, moment: str, expected: str) -> None:
    found = Rules(at=rule).next_at(at(moment))
    assert found is not None and found.timestamp() == at(expected).timestamp()


def test_next_at_without_a_time_is_none() -> None:
    assert Rules(after=5).next_at(at("03-02 12:00")) is None


ALLOWED = [
    ("", "03-02 12:00", True),
    ("20:00-06:00", "03-02 19:59", False),
    ("20:00-06:00", "03-02 20:00", True),
    ("20:00-06:00", "03-02 23:59", True),
    ("20:00-06:00", "03-02 05:59", True),
    ("20:00-06:00", "03-02 06:00", False),
    ("12:00 - 13:30", "03-02 13:29", True),
    ("12:00-13:30", "03-02 13:30", False),
    ("12:00-13:30", "03-02 00:00", False),
]


@pytest.mark.parametrize(("hours", "moment", "expected"), ALLOWED)
def test_allowed_table(hours: str, moment: str, expected: bool) -> None:
    assert Rules(hours=hours).allowed(at(moment)) is expected


@pytest.mark.parametrize(
    ("moment", "expected"),
    [("03-02 06:00", "03-02 20:00"), ("03-02 20:00", "03-03 20:00"), ("03-02 3:30", "03-02 20:00")],
)
def test_opens_table(moment: str, expected: str) -> None:
    assert Rules(hours="20:00-06:00").opens(at(moment.replace(" 3", " 03"))) == at(expected)


def test_enabled_by_either_trigger() -> None:
    assert [Rules().enabled, Rules(at="02:00").enabled, Rules(after=1).enabled, Rules(idle_min=5).enabled] == [
        False, True, True, False,
    ]  # fmt: skip


BAD = [
    ({"train_at": "25:00"}, r"train_at: expected a time such as 02:00 or five cron fields .*received '25:00'"),
    ({"train_at": "2am"}, "train_at: expected a time"),
    ({"train_at": "0 2 * *"}, "train_at: expected a time"),
    ({"train_at": "60 2 * * *"}, "train_at: expected a time"),
    ({"train_at": "0 2 * * 8"}, "train_at: expected a time"),
    ({"train_at": "0 2 * * moon"}, "train_at: expected a time"),
    ({"train_at": "0 2 * * 1/0"}, "train_at: expected a time"),
    ({"train_at": "0 2 31 2 *"}, "train_at: expected a time that comes again"),
    ({"train_after": "few"}, "train_after: expected a whole number, received 'few'"),
    ({"train_after": "-1"}, "train_after: expected a number of at least 0"),
    ({"train_min_interval": "-5"}, "train_min_interval: expected a number of at least 0"),
    ({"train_minutes": "-1"}, "train_minutes: expected a number of at least 0"),
    ({"train_idle": "nan"}, "train_idle: expected a number of at least 0"),
    ({"train_idle": "soon"}, "train_idle: expected a number, received 'soon'"),
    ({"train_hours": "night"}, "train_hours: expected two different times such as 20:00-06:00, received 'night'"),
    ({"train_hours": "20:00"}, "train_hours: expected two different times"),
    ({"train_hours": "20:00-20:00"}, "train_hours: expected two different times"),
    ({"train_hours": "20:00-24:00"}, "train_hours: expected two different times"),
]


@pytest.mark.parametrize(("conf", "words"), BAD)
def test_wrong_setting_is_named_at_start(conf: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AppSettings.from_conf(conf)


def test_settings_become_rules() -> None:
    conf = {"train_at": "02:00", "train_after": "5", "train_min_interval": "60", "train_hours": "20:00-06:00"}
    assert AppSettings.from_conf({**conf, "train_idle": "0.05", "train_minutes": "9"}).rules == Rules(
        "02:00", 5, 60.0, "20:00-06:00", 0.05, 9.0
    )
    assert not AppSettings.from_conf({}).rules.enabled
