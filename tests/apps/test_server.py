"""The wrapper of the server in one process: what runs beside the event loop, and how a broken system is told."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient

from apps.autosam_label import server

MODULES = (
    "apps.autosam_label.server",
    *(f"monailabel.endpoints.{n}" for n in ("activelearning", "datastore", "infer")),
)


class Slow:
    """An app on a PACS: says which thread waits for it."""

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def answer(*_: Any, **__: Any) -> Any:
            self.waiting.append(threading.current_thread().name)
            return {"id": "case"} if name == "next_sample" else {}

        return answer

    def datastore(self) -> Slow:
        return self


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Slow:
    made = Slow()
    for module in MODULES:
        monkeypatch.setattr(f"{module}.app_instance", lambda: made)
    return made


@pytest.fixture
def client(app: Slow) -> TestClient:
    return TestClient(server.app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/activelearning/mix"), ("GET", "/datastore/"), ("GET", "/datastore/?output=train")],
)
def test_what_may_wait_for_a_pacs_waits_in_a_thread_of_its_own(client, app: Slow, method: str, path: str) -> None:
    answer = client.request(method, path, json={"client_id": "anna"} if method == "POST" else None)
    assert answer.status_code == 200, answer.text
    assert app.waiting and all(name.startswith("AnyIO worker") for name in app.waiting)


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EACCES, 500)])
def test_system_error_is_told_without_the_files_name(
    client, app: Slow, monkeypatch, caplog, number: int, status: int
) -> None:
    def fails(_: Any) -> None:
        raise OSError(number, "no more", "/studies/Doe^Jane.nii.gz")

    monkeypatch.setattr(app, "infer", fails, raising=False)
    answer = client.post("/infer/sam?image=case", data={"params": "{}"})
    assert answer.status_code == status
    assert "no more" in answer.json()["detail"] and "Doe" not in answer.text
    assert "no more" in caplog.text and "test_server.py" in caplog.text and "Doe" not in caplog.text


@pytest.mark.parametrize("depth", [3, 100_000])
def test_parameters_that_cannot_be_read_are_told(client, depth: int) -> None:
    answer = client.post("/infer/sam?image=case", data={"params": "[" * depth})
    assert answer.status_code == 400 and "not JSON" in answer.json()["detail"]


def test_training_options_that_are_no_object_are_told(client, app: Slow, monkeypatch) -> None:
    monkeypatch.setattr(app, "info", lambda: {"trainers": {"sam2rad": {}}}, raising=False)
    answer = client.post("/train/", json={"sam2rad": [5]})
    assert answer.status_code == 400 and answer.json()["detail"].startswith("sam2rad: expected an object of options")
