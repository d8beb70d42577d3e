"""What the schedule remembers: through the file and back, bounded, and harmless when damaged."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lib.schedule_record import FILE, LOG_LINES, Line, Record, Run, Status, is_paused, load, save, set_paused

NOW = datetime(2026, 3, 2, 14, tzinfo=UTC)
FULL = Record(
    at="02:00", at_checked=NOW, pending={"at": NOW}, seen={"ab12": "1-2"},
    run=Run("id", "hand", NOW, "by hand", {"epochs": 3}, "v0001", 7, 1.5, Status.STOPPED), last_start=NOW, failures=2,
    not_before=NOW, paused=True, log=(Line(NOW, NOW, 3, "waits: paused"),),
)  # fmt: skip


@pytest.mark.parametrize("record", [Record(), FULL])
def test_record_comes_back_as_it_was(tmp_path: Path, record: Record) -> None:
    save(tmp_path / "new", record)
    assert load(tmp_path / "new") == record
    assert [p.name for p in (tmp_path / "new").iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"at": 1}', '{"run": 5, "pending": {}, "log": []}'])
def test_damaged_file_starts_anew_and_is_told(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_text(text)
    assert load(tmp_path) == Record()
    assert "damaged" in caplog.text


def test_file_of_another_release_starts_anew(tmp_path: Path) -> None:
    save(tmp_path, FULL)
    values = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**values, "unknown": 1}))
    assert load(tmp_path) == Record()


def test_kill_while_writing_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, FULL)

    def cut_off(path: Path, text: str) -> None:
        path.write_text(text[:20])
        raise OSError("disk full")

    monkeypatch.setattr("lib.schedule_record.write_text", cut_off)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, Record())
    assert load(tmp_path) == FULL


def test_equal_decisions_in_a_row_are_one_line_and_the_log_is_bounded() -> None:
    record = Record()
    for n in range(3):
        record = record.logged(NOW + timedelta(seconds=n), "waits: paused")
    assert record.log == (Line(NOW, NOW + timedelta(seconds=2), 3, "waits: paused"),)
    for n in range(2 * LOG_LINES):
        record = record.logged(NOW, f"decision {n}")
    assert len(record.log) == LOG_LINES
    assert record.log[-1].what == f"decision {2 * LOG_LINES - 1}"
    assert record.lines[-1] == {"time": NOW.isoformat(), "last": NOW.isoformat(), "count": 1, "what": "decision 99"}


def test_another_count_alone_is_not_worth_a_write() -> None:
    assert not FULL.logged(NOW, "waits: paused").differs(FULL)
    assert FULL.logged(NOW, "resumed").differs(FULL)
    assert FULL.logged(NOW, "resumed").news(FULL) == ["resumed"]


def test_pause_is_a_switch_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "not yet"
    assert not is_paused(folder)
    set_paused(folder, False)
    for paused in (True, True, False, False):
        set_paused(folder, paused)
        assert is_paused(folder) is paused
