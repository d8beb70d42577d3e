"""The record of how a label came about: JSON and back, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from lib.errors import ConfigError
from lib.provenance import Change, Kind, Provenance
from lib.types import Window, WindowSource

FULL = Provenance(
    kind=Kind.SEMIAUTOMATIC,
    task="sam2rad_edit",
    method="sam2rad",
    version="v0003",
    backbone="compact",
    weights_id="5f3a",
    prompts=7,
    window=Window(-160.5, 239.5, WindowSource.DICOM),
    created=datetime(2026, 3, 1, 12, 30, 5, 7, tzinfo=UTC),
)


SAVED = replace(
    FULL,
    prompts=0,
    window=Window(1.0, 2.0, WindowSource.REQUEST, (Window(3.0, 4.0),)),
    saved=True,
    user="anna",
    declared=True,
    seconds_spent=12.5,
    changed=Change("answer", {"liver": 0.98}, 120),
    live={"sam2rad": "v0003"},
)


@pytest.mark.parametrize(
    "record", [FULL, SAVED, Provenance(kind=Kind.MANUAL), Provenance.answered(prompts=0, task="sam")]
)
def test_json_gives_an_equal_record(record):
    assert Provenance.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record


def test_json_is_plain():
    assert FULL.to_json() == {
        "kind": "SEMIAUTOMATIC", "task": "sam2rad_edit", "method": "sam2rad", "version": "v0003",
        "backbone": "compact", "weights_id": "5f3a", "prompts": 7,
        "window": {"lo": -160.5, "hi": 239.5, "source": "dicom"}, "created": "2026-03-01T12:30:05.000007+00:00",
        "saved": False, "user": "", "declared": False, "seconds_spent": None, "changed": None, "live": {},
        "asked": None,
    }  # fmt: skip


@pytest.mark.parametrize("prompts, kind", [(0, Kind.AUTOMATIC), (1, Kind.SEMIAUTOMATIC), (12, Kind.SEMIAUTOMATIC)])
def test_answer_without_a_prompt_is_automatic(prompts, kind):
    assert Provenance.answered(prompts=prompts).kind is kind
    assert Provenance.answered(prompts=prompts).asked is True


def test_label_by_hand_says_only_that_no_model_was_asked():
    assert [Provenance(kind=Kind.MANUAL, asked=asked).asked for asked in (False, None)] == [False, None]
    with pytest.raises(ConfigError, match="asked: expected none or what fits MANUAL, received True"):
        Provenance(kind=Kind.MANUAL, asked=True)


def test_time_is_kept_in_utc():
    there = datetime(2026, 3, 1, 14, tzinfo=timezone(timedelta(hours=2)))
    assert Provenance(kind=Kind.MANUAL, created=there).to_json()["created"] == "2026-03-01T12:00:00.000000+00:00"
    assert abs(Provenance(kind=Kind.MANUAL).created - datetime.now(UTC)) < timedelta(seconds=5)


def test_older_record_takes_the_defaults():
    assert Provenance.from_json({"kind": "MANUAL", "created": "2026-03-01T12:00:00+00:00"}).prompts == 0


@pytest.mark.parametrize(
    "change, text",
    [
        ({"kind": "GUESSED"}, "'GUESSED' is not a valid Kind"),
        ({"kind": "AUTOMATIC"}, "prompts: expected a count that fits AUTOMATIC, received 7"),
        ({"prompts": 0}, "prompts: expected a count that fits SEMIAUTOMATIC, received 0"),
        ({"prompts": -1}, "count of at least 0"),
        ({"prompts": True}, "prompts: expected a whole number, received True"),
        ({"prompts": "7"}, "prompts: expected a whole number, received '7'"),
        ({"task": None}, "task: expected text, received None"),
        ({"created": "yesterday"}, "Invalid isoformat"),
        ({"created": "2026-03-01T12:00:00"}, "created: expected a time with zone"),
        ({"created": 5}, "expected the fields of a record"),
        ({"window": {"lo": 1}}, "'hi'"),
        ({"window": [1, 2]}, "expected the fields of a record"),
        ({"user": None}, "user: expected text, received None"),
        ({"seconds_spent": -1}, "seconds_spent: expected seconds or none"),
        ({"seconds_spent": float("nan")}, "seconds_spent: expected seconds or none"),
        ({"live": "v0003"}, "live: expected versions by method"),
        ({"changed": 0.9}, "changed: expected a change or none"),
        ({"changed": {"since": "answer"}}, "missing 2 required"),
        ({"changed": {"since": "ever", "dice": {}, "voxels": 0}}, "changed since: expected one of"),
        ({"changed": {"since": "answer", "dice": {"a": "1"}, "voxels": 0}}, "changed dice: expected Dice"),
        ({"changed": {"since": "answer", "dice": {}, "voxels": -1}}, "changed voxels: expected a count"),
        ({"asked": False}, "asked: expected none or what fits SEMIAUTOMATIC, received False"),
        ({"asked": 1}, "asked: expected"),
        ({"promts": 3}, "unknown key 'promts'.*prompts"),
    ],
)
def test_malformed_record_is_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        Provenance.from_json({**FULL.to_json(), **change})


def test_label_that_a_person_saved_needs_no_prompt():
    assert SAVED.prompts == 0 and SAVED.kind is Kind.SEMIAUTOMATIC
    with pytest.raises(ConfigError, match="a count that fits AUTOMATIC"):
        replace(SAVED, kind=Kind.AUTOMATIC)


@pytest.mark.parametrize("values", [None, [], "AUTOMATIC"])
def test_other_json_is_refused(values):
    with pytest.raises(ConfigError, match="expected a mapping"):
        Provenance.from_json(values)


def test_kind_is_needed():
    with pytest.raises(ConfigError, match="kind"):
        Provenance.from_json({})
