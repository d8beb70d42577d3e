"""The gate against a real server: what loses a label is stored and not live, may be promoted, and is rolled back.

The live version is taught one of two labels and its successor the other, so that the mean rises while a label is lost;
the labels of the validation cases become complete in between, so that the live version has to be scored again. ``tiny``
and phantoms: two trainings of seconds, most of the time is imports in the server and in the training children.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

from tests.cases import LABELS, draw, write_case
from tests.labelling import ask, save_labels, train, upload
from tests.serving import ROOT, Server, running_server

CASES = [f"c{n}" for n in range(6)]
BIG, SMALL = 1, 2
QUICK = {"preset": "full", "steps": 25, "batch": 4, "views": 2, "lr": 2e-3, "backbone_lr": 2e-3, "patience": 9}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("gate")
    studies = scratch / "studies"
    studies.mkdir()
    conf = {"backbone": "tiny", "labels": ",".join(LABELS), "prefetch": "false"}
    with running_server(studies, scratch, conf=conf) as running:
        yield running


def label(server: Server, folder: Path, cases: Sequence[str], numbers: Sequence[int]) -> None:
    """Saves final labels with these classes alone."""
    files = []
    for case in cases:
        _, classes = draw(int(case[1:]))
        file = folder / f"{case}.nii.gz"
        shown = np.where(np.isin(classes, numbers), classes, 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(shown, np.diag([1.0, 1.0, 5.0, 1.0])), file)
        files.append(file)
    save_labels(server, files, LABELS)


def state(server: Server) -> Path:
    return server.studies / ".autosam"


def versions(server: Server, *command: str) -> str:
    line = [sys.executable, "-m", "lib.versions", "--state", str(state(server)), *command]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def page(server: Server, method: str = "sam2rad", **query: str) -> requests.Response:
    return requests.get(f"{server.url}/versions/{method}/report.html", params=query, timeout=60)


def assert_same(one: tuple[np.ndarray, dict[str, Any]], other: tuple[np.ndarray, dict[str, Any]], name: str) -> None:
    assert one[1]["version"] == other[1]["version"] == name
    np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lost_label_blocks_promotion_and_rollback_answers_as_before(server: Server, tmp_path: Path) -> None:
    upload(server, [write_case(tmp_path / "images", case, int(case[1:])).image for case in CASES])
    assert page(server).status_code == 400 and "Train one" in page(server).json()["detail"]

    label(server, tmp_path, CASES, [SMALL])
    first = train(server, **QUICK, epochs=5)[-1]
    assert first["version"] == "v0001" and first["live"] is True, first
    before = ask(server, tmp_path, "sam2rad", "c0")

    pinned = json.loads((state(server) / "sam2rad" / "versions" / "v0001" / "version.json").read_text())["split"]
    parts = {part: [case for case in CASES if pinned[case] == part] for part in ("train", "val")}
    label(server, tmp_path, parts["val"], [BIG, SMALL])
    label(server, tmp_path, parts["train"], [BIG])
    second = train(server, **QUICK, epochs=8)[-1]
    assert (second["version"], second["live"]) == ("v0002", False), second
    assert "beats" in second["reason"] and "but small one drops from" in second["reason"], second
    assert server.info()["train_stats"]["sam2rad"]["reason"] == second["reason"]
    assert_same(ask(server, tmp_path, "sam2rad", "c0"), before, "v0001")

    shown = page(server)
    assert shown.status_code == 200 and shown.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert "sam2rad v0002" in shown.text and "but small one drops from" in shown.text
    assert shown.text == (state(server) / second["report"]).read_text()
    assert "v0002 was not live then" in shown.text and "v0001 was live then" in page(server, version="v0001").text
    for wrong in (page(server, version="v0009"), page(server, version="../v0001"), page(server, "Sam")):
        assert wrong.status_code == 400 and "xpected" in wrong.json()["detail"]

    assert "v0002 is live" in versions(server, "promote", "v0002", "--reason", "test")
    after = ask(server, tmp_path, "sam2rad", "c0")
    assert after[1]["version"] == "v0002" and not np.array_equal(after[0], before[0])
    assert "v0001 is live" in versions(server, "rollback", "--reason", "test")
    assert_same(ask(server, tmp_path, "sam2rad", "c0"), before, "v0001")
    history = (state(server) / "sam2rad" / "history.jsonl").read_text().splitlines()
    decisions = [json.loads(line)["decision"] for line in history]
    assert decisions == ["promoted", "refused", "promoted", "rolled back"]
    assert not any(case in server.log for case in ("c0.nii", "worst-1"))
