"""What a finished training decides and leaves: the gate by class, today's score of the live version, report, retention.

The trainings here are not run: the reached Dice is given, so that every case of the gate can be met on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.errors import WeightsError
from lib.train_loop import Run
from lib.versions.store import VersionStore
from tests.cases import LABELS, draw
from tests.trainers.test_adapt import World
from trainers import adapt

Reached = Callable[..., None]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).fill(4)


def scores(cases: Any, dice: Mapping[str, float]) -> dict[str, Any]:
    """The same Dice on every case."""
    mean = sum(dice.values()) / len(dice)
    return {"mean_dice": mean, "dice": dict(dice), "cases": {c.case: dict(dice) for c in cases}}


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Reached:
    """Sets the Dice by label that the next training reaches, and the live version's on that day."""

    def now(new: tuple[float, ...], live: tuple[float, ...] = ()) -> None:
        def fit(run: Run, report: Any) -> dict[str, Any]:
            run.model.eval()
            return scores(run.validation, dict(zip(run.labels, new)))

        monkeypatch.setattr(adapt, "fit", fit)
        monkeypatch.setattr(
            adapt, "evaluate", lambda model, cases, labels, features, own=None: scores(cases, dict(zip(labels, live)))
        )

    return now


def report_of(world: World, name: str) -> dict[str, Any]:
    return json.loads((world.versions.folder / "reports" / f"{name}.json").read_text())


# --- the gate


# what the challenger reaches, what the live version does, --conf, live, words
DECISIONS = [
    ((0.9, 0.79), (0.7, 0.8), {}, True, "beats"),
    ((0.9, 0.77), (0.7, 0.8), {}, False, "but small one drops from 0.8000 to 0.7700, more than the 0.02 that a class"),
    ((0.9, 0.77), (0.7, 0.8), {"gate_tolerance": "0.05"}, True, "beats"),
    ((0.9, 0.79), (0.7, 0.8), {"gate_tolerance": "0"}, False, "small one drops"),
    ((0.7, 0.8), (0.7, 0.8), {}, False, "does not beat"),
]


@pytest.mark.parametrize(("new", "live", "conf", "won", "words"), DECISIONS)
def test_class_that_drops_blocks_promotion_even_if_the_mean_rises(
    world: World, reached: Reached, new, live, conf, won, words
) -> None:
    reached((0.5, 0.5))
    world.train()
    before = world.files()
    reached(new, live)
    world.task = world.new_task(**conf)
    done = world.train()
    assert done["live"] is won and words in done["reason"]
    assert world.versions.live_name() == ("v0002" if won else "v0001")
    assert world.versions.history()[-1]["decision"] == ("promoted" if won else "refused")
    assert world.versions.history()[-1]["reason"] == done["reason"] == world.task.stats()["reason"]
    assert (world.files()["live.json"] == before["live.json"]) is not won


def test_stored_score_of_the_live_version_is_never_used(world: World, reached: Reached) -> None:
    reached((0.99, 0.99))
    world.train()
    reached((0.5, 0.5), live=(0.4, 0.4))  # labels were corrected since
    done = world.train()
    assert done["live"] and "beats 0.4000" in done["reason"]
    assert report_of(world, "v0002")["before"] == {"version": "v0001", "mean_dice": pytest.approx(0.4)}


def test_live_version_is_scored_on_the_cases_and_labels_of_today(world: World, reached: Reached, monkeypatch) -> None:
    reached((0.5, 0.5))
    world.train()
    old = {case for case, part in world.versions.get("v0001").split.items() if part == "val"}
    for n in range(4, 14):
        world.add(f"c{n}", n)
    corrected = np.flip(draw(99)[1], 0)
    for case in old:
        world.add(case, int(case[1:]), corrected)
    seen: dict[str, np.ndarray] = {}

    def spy(model: Any, cases: Any, labels: Any, features: Any, own: Any = None) -> dict[str, Any]:
        seen.update({c.case: c.target for c in cases})
        return scores(cases, dict.fromkeys(labels, 0.4))

    reached((0.5, 0.5))
    monkeypatch.setattr(adapt, "evaluate", spy)
    world.train()
    today = {case for case, part in world.versions.get("v0002").split.items() if part == "val"}
    assert set(seen) == today > old
    assert all(np.array_equal(seen[case], corrected) for case in old)


def test_renamed_label_counts_as_one_that_the_live_version_does_not_know(world: World, reached: Reached) -> None:
    reached((0.9, 0.9))
    world.train()
    renamed = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(("large", LABELS[1]), start=1)]}
    for n in range(4):
        world.add(f"c{n}", n, info=renamed)
    reached((0.5, 0.9), live=(0.0, 0.9))
    done = world.train()
    assert done["live"] and done["reason"].endswith("No longer a label: big.")
    assert world.versions.get("v0002").labels == ("large", LABELS[1])


# --- the report


def test_report_is_written_and_named(world: World, reached: Reached) -> None:
    reached((0.5, 0.7))
    world.train()
    reached((0.6, 0.8), live=(0.5, 0.7))
    done = world.train()
    assert done["report"] == world.task.stats()["report"] == "sam2rad/reports/v0002.html"
    page = (world.versions.folder.parent / done["report"]).read_text()
    facts = report_of(world, "v0002")
    assert facts["decision"]["decision"] == "promoted" and facts["before"]["version"] == "v0001"
    assert [row["change"] for row in facts["cases"]] == pytest.approx([0.1] * len(facts["cases"]))
    assert len(facts["pictures"]) == len(facts["cases"]) == page.count("data:image/png;base64,") > 0


FAILURES = [
    ("keep_comparison", OSError("/studies/anna.nii.gz")),
    ("keep_worst", MemoryError()),
    ("write_report", RuntimeError("anna")),
]


@pytest.mark.parametrize(("broken", "error"), FAILURES)
def test_report_that_fails_harms_nothing(world: World, reached: Reached, monkeypatch, caplog, broken, error) -> None:
    def fail(*_: Any) -> None:
        raise error

    reached((0.5, 0.5))
    monkeypatch.setattr(adapt, broken, fail)
    done = world.train()
    assert done["live"] and done["report"] is None
    stats = world.task.stats()
    assert stats["live"] is True and stats["report"] is None and "error" not in stats
    assert "The report of v0001 was not written" in caplog.text and "anna" not in caplog.text


# --- retention


@pytest.mark.parametrize(("keep", "left"), [("1", [1, 4]), ("0", [1, 2, 3, 4])])
def test_old_versions_go_after_a_training(world: World, reached: Reached, keep: str, left: list[int]) -> None:
    world.task = world.new_task(keep_versions=keep)
    reached((0.9, 0.9))
    world.train()
    for _ in range(3):
        reached((0.5, 0.5), live=(0.9, 0.9))
        assert not world.train()["live"]
    names = [f"v{n:04d}" for n in left]
    assert [v.name for v in world.versions.list()] == names
    assert sorted(p.name for p in (world.versions.folder / "runs").iterdir()) == names
    assert sorted(p.stem for p in (world.versions.folder / "reports").glob("*.html")) == names
    gone = [line["version"] for line in world.versions.history() if line["decision"] == "deleted"]
    assert sorted(gone + names) == ["v0001", "v0002", "v0003", "v0004"]
    assert world.versions.live_name() == "v0001"


def test_deletion_that_fails_harms_nothing(world: World, reached: Reached, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise WeightsError("Check the folder's permissions.")

    reached((0.5, 0.5))
    monkeypatch.setattr(VersionStore, "prune", fail)
    assert world.train()["live"] and "error" not in world.task.stats()
