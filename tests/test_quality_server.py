"""Uncertainty, provenance and scoring over REST, on a real server with a version of ``tiny``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
import requests

from lib.engine import Engine
from lib.provenance import Provenance
from tests.cases import LABELS, add_version, draw, settings, store_at
from tests.labelling import ask
from tests.serving import Server, running_server

AFFINE = np.diag([1.0, 1.0, 5.0, 1.0])
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On four images, with a live version."""
    folder = tmp_path_factory.mktemp("quality")
    studies = folder / "studies"
    studies.mkdir()
    for n in range(4):
        nib.save(nib.Nifti1Image(draw(n)[0], AFFINE), studies / f"c{n}.nii.gz")
    add_version(store_at(folder), Engine(settings(folder / "here")))
    conf = {"backbone": "tiny", "state_dir": str(folder / "state")}
    with running_server(studies, folder / "home", conf=conf) as running:
        yield running


def put(server: Server, folder: Path, case: str, voxels: np.ndarray, tag: str = "final", **more: Any) -> Any:
    """Saves a label as Slicer does."""
    file = folder / "label.nii.gz"
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), AFFINE), file)
    info = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(LABELS, start=1)], "client_id": "tester"}
    with file.open("rb") as body:
        form = {"label": (file.name, body), "params": (None, json.dumps({**info, **more}))}
        return requests.put(f"{server.url}/datastore/label?image={case}&tag={tag}", files=form, timeout=60)


def info_of(server: Server, case: str, tag: str = "final") -> dict[str, Any]:
    """What the store says of a label."""
    return requests.get(f"{server.url}/datastore/label/info?label={case}&tag={tag}", timeout=60).json()


def changed(server: Server, case: str) -> dict[str, Any]:
    """The record of a label once the comparison is done."""
    end = time.monotonic() + 60
    while info_of(server, case)["provenance"]["changed"] is None and time.monotonic() < end:
        time.sleep(0.2)
    return info_of(server, case)["provenance"]


def test_saved_label_gets_the_record_of_how_it_came_about(server: Server, tmp_path: Path) -> None:
    answer, reply = ask(server, tmp_path, "sam2rad", "c0", client_id="tester")
    forged = Provenance.answered(prompts=0, user="somebody else").to_json()
    edited = answer.copy()
    edited[:, :, 3] = draw(0)[1][:, :, 3]
    assert put(server, tmp_path, "c0", edited, provenance=forged, model="sam2rad").json()["label"] == "c0"
    found = changed(server, "c0")
    assert (found["kind"], found["version"], found["saved"]) == ("SEMIAUTOMATIC", "v0001", True)
    assert (found["user"], found["declared"], found["live"]) == ("tester", True, {"sam2rad": "v0001"})
    assert found["window"]["lo"] == reply["window"]["lo"] and found["seconds_spent"] >= 0
    assert found["changed"]["since"] == "answer" and found["changed"]["voxels"] == int((edited != answer).sum())
    assert info_of(server, "c0")["label_info"][0] == {"name": "big", "idx": 1}
    assert put(server, tmp_path, "c1", draw(1)[1]).ok
    assert info_of(server, "c1")["provenance"]["kind"] == "MANUAL"


@pytest.mark.parametrize(
    "query, more, text", [("../x", {}, "tag: expected up to 64 letters"), ("/x", {}, "tag: expected")]
)
def test_label_is_saved_inside_the_store_only(server: Server, tmp_path: Path, query: str, more: Any, text: str) -> None:
    response = put(server, tmp_path, "c0", draw(0)[1], query, **more)
    assert response.status_code == 400 and text in response.json()["detail"]


def test_wrong_save_is_told(server: Server) -> None:
    form = {"label": ("x.nii.gz", b"x"), "params": (None, "[")}
    response = requests.put(f"{server.url}/datastore/label?image=c0", files=form, timeout=60)
    assert response.status_code == 400 and "not JSON" in response.json()["detail"]
    assert (
        requests.put(f"{server.url}/datastore/label?image=no", files={"label": ("x.nii.gz", b"x")}).status_code == 404
    )


def test_uncertainty_reaches_a_client_as_numbers_and_as_map(server: Server, tmp_path: Path) -> None:
    _, reply = ask(server, tmp_path, "sam2rad", "c2", uncertainty="slices")
    assert set(reply["uncertainty"]) == set(LABELS) and set(reply["review"]) <= set(LABELS)
    percent, reply = ask(server, tmp_path, "sam2rad", "c2", uncertainty="map", save="draft")
    assert reply["saved"] == "uncertainty" and reply["cache"]["automatic_hits"] == 1 and 25 < percent.max() <= 100
    stored = requests.get(f"{server.url}/datastore/label?label=c2&tag=uncertainty", timeout=60)
    (tmp_path / "map.nrrd").write_bytes(stored.content)
    np.testing.assert_array_equal(nrrd.read(str(tmp_path / "map.nrrd"))[0], percent)
    tags = requests.get(f"{server.url}/datastore/?output=all", timeout=60).json()["objects"]["c2"]["labels"]
    assert set(tags) == {"uncertainty"}  # neither a final label nor one of the model


@pytest.mark.timeout(900)
def test_scoring_in_its_own_process_harms_nothing_and_is_shown(server: Server, tmp_path: Path) -> None:
    assert requests.get(f"{server.url}/quality/quality", timeout=60).status_code == 404
    bad = draw(3)[1]
    bad[1, 1, 0] = 1
    assert put(server, tmp_path, "c3", bad).ok
    assert requests.post(f"{server.url}/activelearning/random", json={"client_id": "tester"}, timeout=60).ok
    assert requests.get(f"{server.url}/scoring/", timeout=60).status_code == 404  # a next sample starts none
    assert requests.post(f"{server.url}/scoring/quality", json={}, timeout=60).ok
    assert requests.post(f"{server.url}/scoring/quality?run_sync=true", json={}, timeout=60).status_code in (400, 429)
    saved = 0
    end = time.monotonic() + LIMIT_S
    while (task := requests.get(f"{server.url}/scoring/", timeout=60).json())["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < end
        assert put(server, tmp_path, "c0", draw(0)[1], "mine", count=saved).ok
        saved += 1
        time.sleep(0.5)
    assert task["status"] == "DONE", task["details"]
    assert info_of(server, "c0", "mine")["count"] == saved - 1  # what was saved meanwhile is not overwritten
    shown = server.info()["scoring"]["quality"]
    assert shown["url"] == "/quality/quality" and shown["to_look_at"] >= 1
    page = requests.get(f"{server.url}{shown['url']}", timeout=60)
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in str(page.headers)
    assert "c3" in page.text and "island" in page.text
    found = requests.get(f"{server.url}/quality/quality?output=json", timeout=60).json()
    assert found["summary"]["cases"] == shown["cases"] >= 1
    assert any(c["case"] == "c3" and "islands" in [r["check"] for r in c["reasons"]] for c in found["cases"])
    assert not any(f"c{n}." in line or f"'c{n}'" in line for line in task["details"] for n in range(4))
