"""The wrapper's routes around the record of a label: no client writes one, and it names the authenticated user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.endpoints.user.auth import User

from apps.autosam_label import server
from infers.records import USER, Records
from lib.data.volume import load_volume
from tests.cases import draw

ROLES = ["monailabel-admin", "monailabel-reviewer", "monailabel-annotator", "monailabel-user"]


class App:
    """What the routes need of the app; ``asked`` is the last request for an inference."""

    asked: dict[str, Any] = {}

    def __init__(self, studies: Path) -> None:
        self._store = LocalDatastore(str(studies))
        self.records = Records(load_volume, dict)

    def datastore(self) -> LocalDatastore:
        return self._store

    def info(self) -> dict[str, Any]:
        return {}

    def describe(self, image: str, params: dict[str, Any], user: Any) -> dict[str, Any]:
        return self.records.describe(self._store, image, params, user).to_json()

    def on_save_label(self, image: str, label: str) -> None:
        self.records.saved(self._store, image)

    def infer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked = request
        return {"params": {}}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    folder = tmp_path / "studies"
    folder.mkdir()
    nib.save(nib.Nifti1Image(draw(0)[0], np.eye(4)), folder / "case.nii.gz")
    made = App(folder)
    for module in ("apps.autosam_label.server", "monailabel.endpoints.datastore", "monailabel.endpoints.infer"):
        monkeypatch.setattr(f"{module}.app_instance", lambda: made)
    return made


@pytest.fixture
def client(app: App) -> TestClient:
    return TestClient(server.app)


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    user = User(username="Dr. Berta", roles=ROLES)
    monkeypatch.setattr("monailabel.endpoints.user.auth.from_token", lambda _: user)


def saved(client: TestClient, app: App, tmp_path: Path, **params: Any) -> dict[str, Any]:
    """Saves a label as Slicer does; its record."""
    nib.save(nib.Nifti1Image(draw(0)[1], np.eye(4)), tmp_path / "label.nii.gz")
    with (tmp_path / "label.nii.gz").open("rb") as body:
        files = {"label": ("label.nii.gz", body)}
        answer = client.put("/datastore/label?image=case", files=files, data={"params": json.dumps(params)})
    assert answer.status_code == 200, answer.text
    return app.datastore().get_label_info("case", "final")["provenance"]


@pytest.mark.parametrize("route, field", [("label/info", "info"), ("updatelabelinfo", "params")])
def test_client_writes_about_a_label_what_it_likes_but_no_record(client, app, tmp_path, route, field) -> None:
    record = saved(client, app, tmp_path, client_id="anna", provenance={"user": "forged"})
    before = dict(app.datastore().get_label_info("case", "final"))
    told = {**before, "provenance": {**record, "user": "forged"}, "ts": "x", "reviewed": True}
    answer = client.put(f"/datastore/{route}?label=case&tag=final", data={field: json.dumps(told)})
    assert answer.status_code == 200, answer.text
    after = app.datastore().get_label_info("case", "final")
    assert (after["provenance"], after["ts"], after["reviewed"]) == (record, before["ts"], True)
    assert (record["user"], record["declared"]) == ("anna", True)
    assert saved(client, app, tmp_path, client_id="bob")["user"] == "bob"


@pytest.mark.parametrize("text", ["[", "[]", "5", "[" * 100_000])
def test_what_is_no_object_is_told(client, app, tmp_path, text) -> None:
    saved(client, app, tmp_path)
    for address in ("label/info?label=case&tag=final", "image/info?image=case"):
        answer = client.put(f"/datastore/{address}", data={"info": text})
        assert answer.status_code == 400 and "expected a JSON object" in answer.json()["detail"]
    answer = client.put("/datastore/image?image=x", files={"file": ("x.nii.gz", b"x")}, data={"params": text})
    assert answer.status_code == 400 and "expected a JSON object" in answer.json()["detail"]
    assert app.datastore().list_images() == ["case"]


def test_authenticated_user_of_an_inference_is_told_to_the_app(client, app, signed_in) -> None:
    params = json.dumps({USER: "forged", "client_id": "anna"})
    assert client.post("/infer/sam?image=case", data={"params": params}).status_code == 200
    assert (app.asked[USER], app.asked["client_id"]) == ("Dr. Berta", "anna")


def test_nobody_is_authenticated_by_a_parameter(client, app) -> None:
    params = json.dumps({USER: "forged", "client_id": "anna"})
    assert client.post("/infer/sam?image=case", data={"params": params}).status_code == 200
    assert app.asked[USER] is None


def test_saved_label_is_the_authenticated_users(client, app, tmp_path, signed_in) -> None:
    found = saved(client, app, tmp_path, client_id="anna", **{USER: "forged"})
    assert (found["user"], found["declared"]) == ("Dr. Berta", False)
