"""Labelling session: where the annotator clicks, what each arm sends, how a killed bench goes on, and the tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import labelling_session, session_report
from bench.common import Report
from bench.labelling_session import Case, Progress, label_all, main, ordered, thinned, write_phantoms
from bench.session_annotator import MOST, Click, annotate, next_click
from bench.session_arms import ARMS, Clicked, Setting, limit_training
from lib.config import CONFIG_DIR, MethodRow, from_mapping, method_row, read_yaml

SHAPE = (20, 20, 9)
ISOTROPIC = (1.0, 1.0, 1.0)


def block(*ends: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*e) for e in ends)] = True
    return mask


BIG, SMALL = block((2, 9), (2, 9), (0, 7)), block((12, 15), (12, 15), (1, 4))
NOTHING = np.zeros(SHAPE, bool)
TARGETS = np.stack([BIG, SMALL])

# found, structures that count, spacing, expected voxel, structure, missing, what is there
CLICKS = [
    ((NOTHING, NOTHING), (0, 1), ISOTROPIC, (5, 5, 3), 0, True, 0),
    ((NOTHING, NOTHING), (1,), ISOTROPIC, (13, 13, 2), 1, True, 1),
    ((BIG, NOTHING), (0, 1), ISOTROPIC, (13, 13, 2), 1, True, 1),
    ((BIG | block((12, 19), (2, 9), (0, 7)), SMALL), (0, 1), ISOTROPIC, (15, 5, 3), 0, False, None),
    ((BIG | SMALL, SMALL), (0, 1), ISOTROPIC, (13, 13, 2), 0, False, 1),
    ((NOTHING, SMALL), (0, 1), (1.0, 1.0, 10.0), (5, 5, 0), 0, True, 0),  # in plane it is equally deep on every slice
]


@pytest.mark.parametrize(("found", "wrong", "spacing", "ijk", "structure", "missing", "there"), CLICKS)
def test_click_is_deepest_in_the_largest_error(found, wrong, spacing, ijk, structure, missing, there) -> None:
    click = next_click(TARGETS, np.stack(found), wrong, spacing, ())
    assert click == Click(ijk, structure, missing, there)


def test_click_is_never_repeated() -> None:
    found, clicked = np.stack([NOTHING, SMALL]), set()
    for _ in range(30):
        click = next_click(TARGETS, found, [0], ISOTROPIC, clicked)
        assert click is not None and click.ijk not in clicked and BIG[click.ijk]
        clicked.add(click.ijk)


def test_click_on_nothing_wrong_is_none() -> None:
    assert next_click(TARGETS, TARGETS, [0, 1], ISOTROPIC, ()) is None


def numbers() -> np.ndarray:
    return (BIG + 2 * SMALL).astype(np.uint8)


# answers after 0, 1, ... clicks; expected clicks, whether reached
SESSIONS = [
    ([TARGETS], 0, True),
    ([np.stack([BIG, NOTHING]), TARGETS], 1, True),
    ([TARGETS * 0, TARGETS * 0, np.stack([BIG, NOTHING]), TARGETS], 3, True),
    ([np.stack([BIG, NOTHING])] * 40, MOST, False),
]


@pytest.mark.parametrize(("answers", "clicks", "reached"), SESSIONS)
def test_annotator_stops_when_every_structure_is_good(answers, clicks: int, reached: bool) -> None:
    asked: list[int] = []

    def ask(made: Sequence[Click]) -> np.ndarray:
        asked.append(len(made))
        return answers[len(made)]

    outcome = annotate(numbers(), 2, ISOTROPIC, ask)
    assert (outcome.clicks, outcome.reached) == (clicks, reached)
    assert asked == list(range(clicks + 1))
    assert outcome.dice == ([1.0, 1.0] if reached else [1.0, 0.0])
    assert len(outcome.course) == clicks + 1 and outcome.course[-1] == np.mean(outcome.dice)
    assert outcome.proposed == [float(answers[0][n].sum() > 0) for n in (0, 1)]


class FakeSession:
    """Stands for a server that answers with the truth; keeps what it was asked."""

    def __init__(self, arm: str, live: str = "v1", offers: bool = True) -> None:
        self.arm, self.live, self.offers = ARMS[arm], live, offers
        self.setting = Setting("phantoms", ("one", "two"), 2, 1.0)
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def can(self, task: str) -> bool:
        return self.offers

    def infer(self, task: str, image: str, **prompts: Any) -> np.ndarray:
        self.asked.append((task, prompts))
        return numbers() if task != "sam" else SMALL.astype(np.uint8)


MADE = [Click((1, 1, 1), 0, True, 0), Click((2, 2, 2), 0, False, 1), Click((3, 3, 3), 1, False, None)]
LABELS_SENT = {"one": [(1, 1, 1)], "two": [(2, 2, 2)], "background": [(3, 3, 3)], "label": "two"}
SAM_SENT = {"label": "two", "foreground": [], "background": [(3, 3, 3)]}
SENT = [
    ("mix", [], ("sam2rad", {})),
    ("mix", MADE, ("sam2rad_edit", LABELS_SENT)),
    ("deepedit", [], ("deepedit_seg", {})),
    ("deepedit", MADE, ("deepedit", LABELS_SENT)),
    ("sam", MADE, ("sam", SAM_SENT)),
    ("sam", MADE[:2], ("sam", {"label": "one", "foreground": [(1, 1, 1)], "background": [(2, 2, 2)]})),
]


@pytest.mark.parametrize(("arm", "clicks", "request_sent"), SENT)
def test_arm_sends_what_slicer_would(arm: str, clicks: list[Click], request_sent) -> None:
    session = FakeSession(arm)
    found = Clicked(session, "image", SHAPE)(clicks)  # type: ignore[arg-type]
    assert session.asked == [request_sent]
    if arm != "sam":
        np.testing.assert_array_equal(found, TARGETS)
    else:
        np.testing.assert_array_equal(found[clicks[-1].structure], SMALL)
        assert not found[1 - clicks[-1].structure].any()


@pytest.mark.parametrize(
    ("arm", "live", "offers", "clicks"), [("mix", "", True, []), ("deepedit", "", False, MADE), ("sam", "", True, [])]
)
def test_arm_that_cannot_answer_shows_nothing(arm: str, live: str, offers: bool, clicks: list[Click]) -> None:
    session = FakeSession(arm, live, offers)
    assert not Clicked(session, "image", SHAPE)(clicks).any()  # type: ignore[arg-type]
    assert session.asked == []


def test_trainings_of_our_app_are_capped_by_its_recipe(tmp_path: Path) -> None:
    row = tmp_path / "sam2rad.yaml"
    row.write_text((CONFIG_DIR / "methods" / "sam2rad.yaml").read_text())
    for _ in range(2):  # a bench that goes on writes it again
        limit_training(row, Setting("acdc", ("a",), 8, 2.5, recipe=(("epochs", 3),)))
    recipe = from_mapping(MethodRow, {"name": "sam2rad", **read_yaml(row)}, "row").recipe
    assert recipe == replace(method_row("sam2rad").recipe, minutes=2.5, epochs=3)


def test_orders_are_random_and_opposite() -> None:
    cases = [Case(str(n), Path(), Path()) for n in range(9)]
    there, back = ([c.name for c in ordered(cases, order, 1).values()] for order in ("forward", "backward"))
    assert there == back[::-1] != sorted(there)
    assert sorted(there) == [c.name for c in cases]
    assert list(ordered(cases, "forward", 1)) == sorted(ordered(cases, "forward", 1))


@pytest.mark.parametrize(("count", "expected"), [(0, "abcde"), (9, "abcde"), (3, "ace"), (1, "a")])
def test_thinned_is_evenly_spread(count: int, expected: str) -> None:
    assert "".join(thinned("abcde", count)) == expected


class KilledError(Exception):
    """Stands for the end of the process."""


class FakeServer(FakeSession):
    """Hands out what has no label; a training is one line."""

    def __init__(self, folder: Path, log: list[str], die_at: str) -> None:
        super().__init__("mix")
        self.labels, self.images = folder / "labels.json", sorted(p.name[:8] for p in (folder / "studies").iterdir())
        self.log, self.die_at = log, die_at

    def note(self, what: str) -> None:
        if what == self.die_at:
            raise KilledError
        self.log.append(what)

    def saved(self) -> list[str]:
        return json.loads(self.labels.read_text()) if self.labels.exists() else []

    def next_sample(self) -> dict[str, Any]:
        left = [i for i in self.images if i not in self.saved()]
        return {"id": left[0]} if left else {}

    def on(self, image: str, shape: Sequence[int]) -> Any:
        self.note(f"open {image}")
        return lambda clicks: np.ones((2, *shape), bool)

    def save(self, image: str, label: Path) -> None:
        self.note(f"save {image}")
        self.labels.write_text(json.dumps([*self.saved(), image]))

    def train(self) -> dict[str, Any]:
        self.note("train")
        return {"by": "trigger", "status": "DONE", "minutes": 1}


WHOLE = ["open case_000", "save case_000", "open case_001", "save case_001", "train", "open case_002", "save case_002"]


@pytest.mark.parametrize("die_at", ["open case_001", "save case_001", "train", "save case_002"])
def test_killed_bench_goes_on_at_the_next_case(tmp_path: Path, monkeypatch, die_at: str) -> None:
    write_phantoms(tmp_path / "data", 3)
    cases = ordered(labelling_session.cases_of("phantoms", tmp_path / "data", 0), "forward", 1)
    log: list[str] = []
    planned = [die_at, ""]

    class Serving:
        def __init__(self, name: str, setting: Setting, folder: Path) -> None:
            self.server = FakeServer(folder, log, planned.pop(0))

        def __enter__(self) -> FakeServer:
            return self.server

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(labelling_session, "serving", Serving)
    setting, work = Setting("phantoms", ("one", "two"), 2, 1.0), tmp_path / "work"

    def go() -> Progress:
        progress = Progress(tmp_path / "state.json", {"setting": 1})
        label_all("mix", cases, setting, work, progress, "mix/forward")
        return progress

    with pytest.raises(KilledError):
        go()
    session = go().sessions["mix/forward"]
    assert log == WHOLE
    assert session["done"] and len(session["cases"]) == 3 and [t["labels"] for t in session["trainings"]] == [2]
    assert not work.exists()
    go()
    assert log == WHOLE, "a finished arm is not labelled again"


def test_progress_of_another_run_is_not_continued(tmp_path: Path) -> None:
    first = Progress(tmp_path / "state.json", {"seed": 1})
    first.session("mix/forward", tmp_path)["cases"].append({"case": "a"})
    first.save()
    assert Progress(tmp_path / "state.json", {"seed": 1}).session("mix/forward", tmp_path)["cases"]
    assert not Progress(tmp_path / "state.json", {"seed": 1}).session("mix/forward", tmp_path / "gone")["cases"]
    assert not Progress(tmp_path / "state.json", {"seed": 2}).sessions


def told(clicks: Sequence[int]) -> dict[str, Any]:
    rows = [
        {"case": f"c{n}", "clicks": c, "reached": c < MOST, "version": "", "proposed": [0.0]}
        for n, c in enumerate(clicks)
    ]
    return {"cases": rows, "trainings": [], "done": True}


def test_tables_compare_arms_over_the_same_cases(tmp_path: Path) -> None:
    sessions = {
        "mix/forward": told([20] * 10 + [4] * 10), "mix/backward": told([10] * 10 + [2] * 10),
        "sam/forward": told([20] * 20), "deepedit/forward": told([20] * 19 + [1]),
        "random/forward": {**told([1] * 20), "done": False},
    }  # fmt: skip
    verdicts = {v.what.split(" (")[0]: v for v in session_report.verdicts(
        {arm: session_report.clicks(sessions, arm) for arm in ("mix", "sam", "deepedit")}
    )}  # fmt: skip
    assert [round(v.measured, 3) for v in verdicts.values()] == [0.2, 0.45, 201.0]
    assert all(v.holds for v in verdicts.values())
    report = Report("Sessions", tmp_path / "out.md")
    session_report.tell("phantoms", sessions, list(ARMS), report)
    text = (tmp_path / "out.md").read_text()
    assert "| mix - sam      | -11.000" in text and "random" not in text.split("Limits")[0].split("session")[0]
    assert "- sam: 20; c0 (1)" in text and "- mix: 10; c0 (1)" in text


def test_quick_session_runs_against_the_real_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    assert main(["--quick", "--arms", "random", "--cases", "3", *folders]) == 0
    (state,) = (tmp_path / "results").glob("*.json")
    session = json.loads(state.read_text())["sessions"]["random/forward"]
    assert [c["case"] for c in session["cases"]] == ["phantom_0", "phantom_1", "phantom_2"]
    assert all(c["clicks"] == MOST or c["reached"] for c in session["cases"])
    assert any(sum(c["dice"]) > 0 for c in session["cases"])
    (training,) = session["trainings"]
    assert (training["labels"], training["by"], training["status"]) == (2, "trigger", "DONE")
    assert "random" in capsys.readouterr().out
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_deepedit_learns_and_answers_over_the_same_requests(tmp_path: Path) -> None:
    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    assert main(["--quick", "--arms", "deepedit", "--cases", "4", *folders]) == 0
    (state,) = (tmp_path / "results").glob("*.json")
    session = json.loads(state.read_text())["sessions"]["deepedit/forward"]
    assert [bool(c["version"]) for c in session["cases"]] == [False, False, True, True]
    assert (session["trainings"][0]["status"], session["trainings"][0]["by"]) == ("DONE", "bench")
    assert SimpleNamespace(**session["cases"][2]).clicks > 0
