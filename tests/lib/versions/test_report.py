"""Reports: what they say, that they are whole in themselves and escape everything, and what is missing does no harm."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.errors import ConfigError, WeightsError
from lib.versions import report
from lib.versions.__main__ import main
from lib.versions.curves import HEIGHT, WIDTH, Curves, drawing, read_curves
from lib.versions.report import keep_comparison, report_file, write_report
from lib.versions.store import VersionStore
from tests.lib.test_versions import TRAINED, write

NASTY = "<script>alert('x')</script> & \"q\""
PNG = b"\x89PNG picture"


def trained(**cases: dict[str, float]) -> Any:
    """Two labels, Dice by case."""
    rows = list(cases.values())
    dice = {k: sum(row[k] for row in rows) / len(rows) for k in ("RV", "LV")}
    mean = sum(dice.values()) / 2
    return replace(TRAINED, metrics={"mean_dice": mean, "dice": dice, "cases": cases, "epoch": 2})


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """Two versions; the second was refused, and its run left all that a report may show."""
    found = VersionStore(tmp_path / "state" / "sam2rad")
    found.add(write, trained(a={"RV": 0.6, "LV": 0.8}, b={"RV": 0.7, "LV": 0.9}))
    found.promote("v0001", "the first")
    found.add(write, trained(a={"RV": 0.9, "LV": 0.5}, b={"RV": 0.8, "LV": 0.6}, c={"RV": 0.9, "LV": 0.9}))
    found.refuse("v0002", f"LV drops {NASTY}")
    run = found.folder / "runs" / "v0002"
    (run / "tensorboard").mkdir(parents=True)
    curves(run / "tensorboard")
    again = {"a": {"RV": 0.5, "LV": 0.7}, "b": {"RV": 0.7, "LV": 0.9}, "c": {"RV": 0.3, "LV": 0.9}}
    keep_comparison(run, "v0001", {"mean_dice": 2 / 3, "dice": {"RV": 0.5, "LV": 2.5 / 3}, "cases": again})
    (run / "progress.json").write_text(json.dumps({"total_epochs": 2, "total_steps": 4, "total_time": 90.0}))
    (run / "worst-1.png").write_bytes(PNG)
    shown = {"file": "worst-1.png", "case": f"b {NASTY}", "label": "LV", "dice": 0.6, "axis": "k", "slice": 7}
    (run / "worst.json").write_text(json.dumps([shown]))
    return found


def curves(folder: Path) -> None:
    """Event files of a run that was killed in its second epoch and went on: step 3 is written twice."""
    from torch.utils.tensorboard import SummaryWriter

    for steps, dice in ({1: 4.0, 2: 2.0, 3: 9.0}, {1: 0.25}), ({3: 1.0, 4: 0.5}, {2: 0.5}):
        with SummaryWriter(str(folder)) as writer:
            for step, value in steps.items():
                writer.add_scalar("loss", value, step)
            for epoch, value in dice.items():
                writer.add_scalar("val_mean_dice", value, epoch)


def written(store: VersionStore, name: str = "v0002") -> tuple[dict[str, Any], str]:
    page = write_report(store, name)
    return json.loads(page.with_suffix(".json").read_text()), page.read_text()


# --- what it says


def test_report_compares_with_what_was_live_as_scored_again(store) -> None:
    facts, page = written(store)
    assert (facts["version"], facts["live"], facts["parent"]) == ("v0002", False, None)
    assert facts["decision"]["decision"] == "refused" and facts["decision"]["reason"].startswith("LV drops")
    assert facts["before"] == {"version": "v0001", "mean_dice": pytest.approx(2 / 3)}  # and not the 0.75 of its own day
    assert [(row["label"], row["now"], row["before"]) for row in facts["by_label"]] == [
        ("RV", pytest.approx(2.6 / 3), 0.5),
        ("LV", pytest.approx(2 / 3), pytest.approx(2.5 / 3)),
    ]
    assert [(row["case"], row["mean"], row["change"]) for row in facts["cases"]] == [
        ("a", pytest.approx(0.7), pytest.approx(0.1)),
        ("b", pytest.approx(0.7), pytest.approx(-0.1)),
        ("c", pytest.approx(0.9), pytest.approx(0.3)),
    ]
    for text in ("-0.167", "+0.367", "0.867", "v0001 on the same cases", "best epoch 2", "1.5 minutes"):
        assert text in page, text


def test_report_compares_versions_on_the_cases_in_common(store) -> None:
    store.add(write, trained(b={"RV": 0.1, "LV": 0.2}, other={"RV": 0.9, "LV": 0.9}))
    first, second, third = written(store)[0]["versions"]
    assert (first["cases_in_common"], first["scored_again"], first["live"]) == (3, True, True)
    assert first["change"] == pytest.approx(0.1)
    assert (second["name"], second["change"]) == ("v0002", None)
    assert (third["cases_in_common"], third["scored_again"]) == (1, False)
    assert third["change"] == pytest.approx(0.7 - 0.15)


def test_report_has_the_history_and_the_decision_of_the_first_day(store) -> None:
    store.promote("v0002", "we want it")
    facts, page = written(store)
    assert facts["live"] is True and facts["decision"]["decision"] == "refused"
    assert [line["decision"] for line in facts["history"]] == ["promoted", "refused", "promoted"]
    assert "v0002 was live then" in page and "we want it" in page


def test_page_is_whole_in_itself_and_escapes_every_text(store) -> None:
    _, page = written(store)
    assert base64.b64encode(PNG).decode() in page
    assert "<script" not in page.lower() and "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)[\w/.]""", page)
    assert "http" not in page.replace("http-equiv", "")


def test_made_again_it_is_the_same(store, monkeypatch) -> None:
    monkeypatch.setattr(report, "now", lambda: "2026-01-01T00:00:00+00:00")
    first = written(store)
    assert written(store) == first and "written at 2026-01-01T00:00:00+00:00" in first[1]
    assert not list((store.folder / "reports").glob("*.part"))


MISSING = ["tensorboard", "comparison.json", "progress.json", "worst.json", "worst-1.png", "."]


@pytest.mark.parametrize("gone", MISSING)
def test_what_is_gone_is_left_out(store, gone: str) -> None:
    path = store.folder / "runs" / "v0002" / gone
    path.rename(store.folder / "away")
    facts, page = written(store)
    assert ("<svg" in page) is (gone not in ("tensorboard", "."))
    assert ("<img" in page) is (gone not in ("worst.json", "worst-1.png", "."))
    assert ("on the same cases" in page) is (gone not in ("comparison.json", "."))
    assert len(facts["cases"]) == 3 and "Refused" in page


@pytest.mark.parametrize("file", ["comparison.json", "progress.json", "worst.json"])
def test_file_that_was_cut_short_is_left_out(store, file: str) -> None:
    (store.folder / "runs" / "v0002" / file).write_text('{"cut')
    assert "Refused" in written(store)[1]


def test_picture_outside_the_run_is_not_embedded(store) -> None:
    (store.folder / "secret.png").write_bytes(b"secret")
    shown = {"file": "../../secret.png", "case": "a", "label": "LV", "dice": 0.1, "axis": "k", "slice": 1}
    (store.folder / "runs" / "v0002" / "worst.json").write_text(json.dumps([shown]))
    assert base64.b64encode(b"secret").decode() not in written(store)[1]


def test_version_without_dice_by_case_has_a_report(store) -> None:
    store.add(write, TRAINED)  # its cases hold numbers
    store.add(write, replace(TRAINED, metrics={"mean_dice": None}))
    for name in ("v0003", "v0004"):
        facts, page = written(store, name)
        assert facts["cases"] == [] and "No Dice by case was kept." in page
    assert "–" in page


def test_incumbent_that_could_not_answer_is_not_shown(store) -> None:
    keep_comparison(store.folder / "runs" / "v0002", "v0001", None)
    facts, page = written(store)
    assert facts["before"] is None and "on the same cases" not in page


def test_full_disk_leaves_the_old_report(store, monkeypatch) -> None:
    first = written(store)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "replace_text", fail)
        with pytest.raises(WeightsError, match="No space left"):
            write_report(store, "v0002")
    page = store.folder / "reports" / "v0002.html"
    assert page.read_text() == first[1]


# --- curves


def test_curves_average_steps_and_take_the_later_of_two(store) -> None:
    found = read_curves(store.folder / "runs" / "v0002" / "tensorboard", 2)
    assert found == Curves([(1.0, 3.0), (2.0, 0.75)], [(1.0, 0.25), (2.0, 0.5)])


@pytest.mark.parametrize("make", [False, True])
def test_curves_of_no_run_are_empty(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "tensorboard"
    if make:
        folder.mkdir()
    assert read_curves(folder, 2) == Curves([], [])


@pytest.mark.parametrize(
    ("curve", "points"),
    [
        ([(1.0, 0.0), (2.0, 1.0), (3.0, 0.5)], f"0.0,{HEIGHT} {WIDTH / 2},0.0 {WIDTH},{HEIGHT / 2}"),
        ([(1.0, 0.5)], f"0.0,{HEIGHT}"),
        ([(1.0, 0.5), (2.0, 0.5)], f"0.0,{HEIGHT} {WIDTH},{HEIGHT}"),
        ([(1.0, float("nan")), (2.0, 1.0)], f"0.0,{HEIGHT}"),
    ],
)
def test_drawing_puts_the_lowest_at_the_bottom(curve, points: str) -> None:
    found = drawing(curve)
    assert found is not None and found.points == points


def test_drawing_of_nothing_is_none() -> None:
    assert drawing([]) is None and drawing([(1.0, float("nan"))]) is None


# --- finding it


def test_report_file_is_the_one_asked_for_or_the_newest(store) -> None:
    for name in ("v0002", "v0001"):
        write_report(store, name)
    (store.folder / "reports" / "v9999x.html").write_text("no report")
    assert report_file(store).name == "v0002.html" and report_file(store, "v0001").name == "v0001.html"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", r"with a report out of \[\], received none"),
        ("v0009", "received v0009"),
        ("../../x", "a name like v0001"),
        ("v0001.html", "a name like v0001"),
    ],
)
def test_report_file_refuses_what_is_not_there(store, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        report_file(store, name)


@pytest.mark.parametrize(("name", "file"), [([], "v0002.html"), (["v0001"], "v0001.html")])
def test_command_line_writes_the_report(store, capsys, name, file) -> None:
    assert main(["--state", str(store.folder.parent), "report", *name]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == store.folder / "reports" / file and page.is_file()


def test_command_line_without_a_version_says_so(tmp_path: Path, capsys) -> None:
    assert main(["--state", str(tmp_path), "report"]) == 2
    assert "none is stored. Train one first." in capsys.readouterr().err
