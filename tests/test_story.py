"""The whole story through a real server: label, train, segment alone, correct together, train again, roll back.

A small part of the real hippocampus data with ``compact``: five to fifteen minutes. Skips without the data.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.data.split import hippocampus_split
from lib.prompts.simulate import next_click
from tests.labelling import ask, save_labels, train, upload
from tests.serving import ROOT, Server, dice, running_server

LABELS = ("anterior", "posterior")


@pytest.fixture(scope="module")
def cases(data_dir: Path) -> dict[str, list[str]]:
    """Ten cases to label and four that nobody labels."""
    parts = hippocampus_split(p.name for p in (data_dir / "hippocampus").glob("*.nii.gz"))
    return {"labelled": parts["adapt"][:10], "unseen": parts["test"][:4]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Iterator[Server]:
    """A server on an empty folder."""
    scratch = tmp_path_factory.mktemp("story")
    studies = scratch / "studies"
    studies.mkdir()
    with running_server(studies, scratch, conf={"backbone": "compact", "labels": ",".join(LABELS)}) as running:
        yield running


def truth(data_dir: Path, case: str) -> np.ndarray:
    """The expert's label map."""
    return np.asarray(nib.load(data_dir / "hippocampus" / "labels" / "final" / f"{case}.nii.gz").dataobj).astype(int)


def mean_dice(found: np.ndarray, true: np.ndarray) -> float:
    """Over the labels."""
    return float(np.mean([dice(found == n, true == n) for n in (1, 2)]))


def versions(server: Server, *command: str) -> str:
    """The command line of ``lib.versions`` on this server's studies."""
    state = str(server.studies / ".autosam")
    line = [sys.executable, "-m", "lib.versions", "--state", state, *command]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_story(server: Server, data_dir: Path, cases: dict[str, list[str]], tmp_path: Path) -> None:
    folder = data_dir / "hippocampus"
    upload(server, (folder / f"{case}.nii.gz" for case in cases["labelled"] + cases["unseen"]))
    save_labels(server, (folder / "labels" / "final" / f"{case}.nii.gz" for case in cases["labelled"]), LABELS)
    assert "sam2rad" not in server.info()["models"]  # nothing learned yet
    assert server.info()["models"]["sam2rad_edit"]["version_live"] is None

    progress = train(server, epochs=2, patience=5)
    steps = [p["step"] for p in progress if "step" in p]
    assert steps == sorted(steps) and steps[-1] > 0
    assert {"epoch", "total_epochs", "loss", "best_metric", "total_time", "time_left_s"} <= set(progress[-1])
    assert progress[-1]["version"] == "v0001" and progress[-1]["live"] is True
    shown = server.info()["models"]["sam2rad"]
    assert shown["labels"] == {"anterior": 1, "posterior": 2}
    first = {case: ask(server, tmp_path, "sam2rad", case) for case in cases["unseen"]}
    assert {reply["version"] for _, reply in first.values()} == {"v0001"}

    progress = train(server, epochs=14, patience=14, minutes=8)  # what comes first: processors differ
    assert progress[-1]["version"] == "v0002" and progress[-1]["live"] is True, progress[-1]
    second = {case: ask(server, tmp_path, "sam2rad", case) for case in cases["unseen"]}
    scores = {case: mean_dice(found, truth(data_dir, case)) for case, (found, _) in second.items()}
    print("autonomous Dice on unseen cases", {c: round(s, 3) for c, s in scores.items()})
    assert np.mean(list(scores.values())) >= 0.7

    worst = min(scores, key=scores.__getitem__)
    assert corrected(server, tmp_path, worst, second[worst][0], truth(data_dir, worst)) > scores[worst]
    untouched, _ = ask(server, tmp_path, "sam2rad_edit", worst)
    np.testing.assert_array_equal(untouched, second[worst][0])  # no click: the autonomous result

    assert "v0001" in versions(server, "rollback", "--reason", "test")
    for case, (before, _) in first.items():
        again, reply = ask(server, tmp_path, "sam2rad", case)
        assert reply["version"] == "v0001"
        np.testing.assert_array_equal(again, before)


def corrected(server: Server, folder: Path, case: str, found: np.ndarray, true: np.ndarray) -> float:
    """Dice after one click on the slice and label that are most wrong."""
    wrong = {
        (n, k): int(((found[:, :, k] == n) != (true[:, :, k] == n)).sum()) for n in (1, 2) for k in range(true.shape[2])
    }
    number, k = max(wrong, key=wrong.__getitem__)
    should, is_now = ((labels[:, :, k] == number).T for labels in (true, found))
    click = next_click(should, is_now)
    assert click is not None
    row, column, positive = click
    name = LABELS[number - 1]
    prompts = {name: [[column, row, k]]} if positive else {"negative": {name: [[column, row, k]]}}
    edited, reply = ask(server, folder, "sam2rad_edit", case, **prompts)
    assert k in reply["edited"][name]
    others = [z for z in range(true.shape[2]) if all(z not in slices for slices in reply["edited"].values())]
    np.testing.assert_array_equal(edited[:, :, others], found[:, :, others])
    return mean_dice(edited, true)
