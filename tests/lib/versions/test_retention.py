"""Which versions may go, and that they go whole: the record, the run, the report, with a line in the history."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Optional

import pytest

from lib.errors import WeightsError
from lib.versions import store as versions
from lib.versions.__main__ import main
from lib.versions.record import Version
from lib.versions.retention import expired
from lib.versions.store import VersionStore
from tests.lib.test_versions import fill, scored, write


def stored(*dice: Optional[float]) -> list[Version]:
    facts: dict[str, Any] = {"method": "sam2rad", "created": "2026-01-01T00:00:00+00:00", "sha256": "0" * 64}
    return [Version(**vars(scored(d)) | facts | {"name": f"v{n:04d}"}) for n, d in enumerate(dice, start=1)]


LOW = [0.1] * 6
# Dice of v0001 and up, numbers that were live, keep, numbers that go
TABLE = [
    ([], [], 1, []),
    (LOW, [], 1, [1, 2, 3, 4, 5]),  # the newest of equals is the best
    (LOW, [], 3, [1, 2, 3]),
    (LOW, [], 6, []),
    (LOW, [], 100, []),
    (LOW, [1], 1, [2, 3, 4, 5]),  # old and live
    (LOW, [1, 2, 3], 1, [1, 4, 5]),  # one to roll back to
    (LOW, [1, 2, 3], 2, [4]),
    (LOW, [1, 4, 2], 1, [1, 3, 5]),  # v0004 is what a rollback finds
    (LOW, [1, 2, 1], 1, [3, 4, 5]),
    (LOW, [9, 2], 1, [1, 3, 4, 5]),  # v0009 is gone already
    ([0.1, 0.9, 0.1, 0.1, 0.1], [], 1, [1, 3, 4]),  # the best
    ([0.1, 0.9, 0.9, 0.1, 0.1], [], 1, [1, 2, 4]),
    ([None, None, None], [], 1, [1, 2]),  # no best
]


@pytest.mark.parametrize(("dice", "trail", "keep", "gone"), TABLE)
def test_expired_table(dice, trail, keep, gone) -> None:
    found = expired(stored(*dice), [f"v{n:04d}" for n in trail], keep)
    assert found == [f"v{n:04d}" for n in gone]


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    found = VersionStore(tmp_path / ".autosam" / "sam2rad")
    fill(found, 4)
    for name in ("v0001", "v0002", "v0004"):
        (found.folder / "runs" / name).mkdir(parents=True)
        (found.folder / "runs" / name / "worst-1.png").write_bytes(b"image")
        (found.folder / "reports").mkdir(exist_ok=True)
        for suffix in ("html", "json"):
            (found.folder / "reports" / f"{name}.{suffix}").write_text("x")
    return found


def test_prune_takes_run_and_report_along_and_says_so_in_the_history(store) -> None:
    assert store.prune(1) == ["v0001", "v0002"]
    for folder, left in (("versions", ["v0003", "v0004"]), ("runs", ["v0004"])):
        assert sorted(p.name for p in (store.folder / folder).iterdir()) == left
    assert sorted(p.name for p in (store.folder / "reports").iterdir()) == ["v0004.html", "v0004.json"]
    lines = store.history()[-2:]
    assert [(line["decision"], line["version"], line["previous"]) for line in lines] == [
        ("deleted", "v0001", "v0004"),
        ("deleted", "v0002", "v0004"),
    ]
    assert lines[0]["reason"] == "Among 4 versions, 1 are kept."
    assert store.live_name() == "v0004" and store.predecessor() == "v0003"
    assert store.rollback("worse").name == "v0003"


def test_name_of_a_pruned_version_is_not_used_again(store) -> None:
    store.add(write, scored(0.9))
    shutil.rmtree(store.folder / "versions" / "v0005")  # the highest number is in the history alone
    store.add(write, scored(0.9))
    store.prune(1)
    assert store.add(write, scored(0.5)).name == "v0006"


def test_interrupted_deletion_leaves_no_half_version(store, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(versions.shutil, "rmtree", _fail)
        with pytest.raises(WeightsError, match="Permission denied"):
            store.prune(1)
    assert [v.name for v in store.list()] == ["v0002", "v0003", "v0004"]
    assert store.live_name() == "v0004"
    assert store.prune(1) == ["v0002"]


def _fail(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--keep", "2"], 0, "Deleted: v0001.\n"),
        (["--keep", "9"], 0, "Deleted: none.\n"),
        ([], 2, "Expected to keep 1 or more versions, received 0"),
        (["v0001", "--keep", "2"], 2, "takes no name"),
    ],
)
def test_command_line_prunes(store, capsys, arguments, status, text) -> None:
    assert main(["--state", str(store.folder.parent), "prune", *arguments]) == status
    caught = capsys.readouterr()
    assert text in (caught.err if status else caught.out)
    assert ("v0001" in [v.name for v in store.list()]) is (text != "Deleted: v0001.\n")
