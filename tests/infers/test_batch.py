"""Batch pre-annotation: what is asked of the server, what is left alone, and a real server that is stopped half-way."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import nibabel as nib
import numpy as np
import pytest
import requests
from monailabel.config import settings as upstream
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import MONAILabelException

from infers.batch import BatchTask, giving_way
from lib.assisted import AssistedEngine
from lib.engine import Engine
from lib.types import Click, UserPrompts
from tests.cases import LABELS, ROW, add_version, draw, settings, store_at
from tests.serving import Server, post_infer, running_server

MODELS = {"sam": {}, "sam2rad": {"version_live": "v0003"}, "other": {"version_live": None}}


class FakeServer:
    """Answers like ours: ``/info/``, and ``/infer/`` with 400 for the images in ``bad``."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.info: Any = {"models": MODELS}
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, outer.info)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                (part,) = BytesParser().parsebytes(head + body).get_payload()
                url = urlparse(self.path)
                image = parse_qs(url.query)["image"][0]
                outer.asked.append((url.path, image, json.loads(part.get_payload())))
                self._answer(*((400, {"detail": "holes"}) if image in outer.bad else (200, {"version": "v0003"})))

            def _answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def images(self) -> list[str]:
        """Asked for so far."""
        return [image for _, image, _ in self.asked]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    server = FakeServer()
    monkeypatch.setattr(upstream, "MONAI_LABEL_SERVER_PORT", server.http.server_address[1])
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def store(tmp_path: Path) -> LocalDatastore:
    """Images a to e; the files are never opened."""
    for name in "abcde":
        (tmp_path / f"{name}.nii.gz").write_bytes(b"image")
    return LocalDatastore(str(tmp_path), extensions=["*.nii.gz", "*.nrrd"])


def keep(store: LocalDatastore, image: str, tag: str, info: dict[str, Any]) -> None:
    """A label in the store."""
    file = Path(store._datastore_path) / "made.nrrd.tmp.nrrd"
    file.write_bytes(b"label")
    store.save_label(image, str(file), tag, info)
    file.unlink()


def run(store: LocalDatastore, **request: Any) -> dict[str, int]:
    """A batch as the child process runs it."""
    return BatchTask(lambda: False)({"model": "sam2rad", "images": "all", **request}, store, lambda *_: None)


def test_batch_asks_for_every_image_and_passes_the_models_options_on(fake: FakeServer, store: LocalDatastore) -> None:
    sent_by_default = {"device": "cuda", "multi_gpu": True, "gpus": "all", "logging": "WARNING", "max_workers": 1}
    found = run(store, **sent_by_default, save_label=True, label_tag="original", max_batch_size=0, window="brain")
    assert found == {"done": 5, "skipped": 0, "failed": 0}
    assert fake.images() == list("abcde")
    path, _, params = fake.asked[0]
    assert path == "/infer/sam2rad"
    assert params == {"window": "brain", "label_tag": "original", "save_label": True, "batch": True}


def test_batch_reports_a_bad_image_and_goes_on(
    fake: FakeServer, store: LocalDatastore, caplog: pytest.LogCaptureFixture
) -> None:
    fake.bad = {"b"}
    with caplog.at_level(logging.INFO, "infers.batch"):
        assert run(store) == {"done": 4, "skipped": 0, "failed": 1}
    assert fake.images() == list("abcde")
    assert "image 2 of the sorted list failed and is passed over: holes" in caplog.text
    assert re.search(r"5 of 5, 1 failed; \d+\.\d s each, 0 s left", caplog.text)
    assert not re.search(r"\b[abcde]\.nii|image [abcde]\b", caplog.text)  # places, no identifiers


MADE = {"model": "sam2rad", "params": {"version": "v0003", "label_names": {"x": 1}}}


@pytest.mark.parametrize(
    ("info", "redo", "asked"),
    [
        (MADE, False, False),
        (MADE, True, True),
        ({**MADE, "params": {"version": "v0002"}}, False, True),  # an older version's
        ({**MADE, "model": "other"}, False, True),
        ({"label_info": [{"name": "x", "idx": 1}]}, False, False),  # a person's, or nobody knows whose
        ({"label_info": [{"name": "x", "idx": 1}]}, True, False),
        ({"model": "sam", "params": {}}, False, False),  # saved from clicks
        ({}, False, False),
    ],
)
def test_batch_keeps_this_versions_labels_and_those_no_model_made(
    fake: FakeServer, store: LocalDatastore, info: dict[str, Any], redo: bool, asked: bool
) -> None:
    keep(store, "c", "original", dict(info))
    found = run(store, redo=redo)
    assert ("c" in fake.images()) is asked
    assert found == {"done": 4 + asked, "skipped": 1 - asked, "failed": 0}


@pytest.mark.parametrize(
    ("most", "done"), [(2, 2), (" 2 ", 2), (9, 5), (0, 5), ("0", 5), ("00", 5), ("", 5), (None, 5)]
)
def test_batch_of_at_most_so_many_images(fake: FakeServer, store: LocalDatastore, most: Any, done: int) -> None:
    assert run(store, max_batch_size=most) == {"done": done, "skipped": 0, "failed": 0}


@pytest.mark.parametrize(
    ("redo", "asked"),
    [("false", False), ("no", False), (0, False), ("", False), (None, False), ("True", True), (1, True)],
)
def test_batch_redo_is_read_as_a_switch(fake: FakeServer, store: LocalDatastore, redo: Any, asked: bool) -> None:
    keep(store, "c", "original", dict(MADE))
    run(store, redo=redo)
    assert ("c" in fake.images()) is asked


def test_batch_under_another_tag_does_not_look_at_original(fake: FakeServer, store: LocalDatastore) -> None:
    keep(store, "c", "original", dict(MADE))
    assert run(store, label_tag="second-reader")["done"] == 5


@pytest.mark.parametrize(("images", "expected"), [("labeled", "d"), ("unlabeled", "abce"), ("all", "abcde")])
def test_batch_images_are_chosen_by_their_final_label(
    fake: FakeServer, store: LocalDatastore, images: str, expected: str
) -> None:
    keep(store, "d", "final", {"label_info": []})
    run(store, images=images)
    assert fake.images() == list(expected)


def test_batch_in_parts_goes_on_where_it_was(fake: FakeServer, store: LocalDatastore) -> None:
    assert run(store, max_batch_size=2) == {"done": 2, "skipped": 0, "failed": 0}
    for image in fake.images():
        keep(store, image, "original", dict(MADE))
    assert run(store, max_batch_size=2) == {"done": 2, "skipped": 2, "failed": 0}
    assert fake.images() == list("abcd")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"model": "sam"}, r"a live version, one of \['sam2rad'\]; received 'sam'"),
        ({"model": "other"}, "Train first"),
        ({"label_tag": "final"}, "label_tag: expected a tag for unchecked results"),
        ({"label_tag": ["original"]}, "label_tag: expected"),
        *[
            ({"max_batch_size": value}, "max_batch_size: expected a whole number, 0 for all images, received")
            for value in (-1, "-1", "abc", 2.5, True, False, [2], "1_0")
        ],
        *[({"redo": value}, "redo: expected true or false, received") for value in ("maybe", 2, ["true"], {})],
    ],
)
def test_batch_refuses_before_it_asks_for_an_image(
    fake: FakeServer, store: LocalDatastore, request_: dict[str, Any], words: str
) -> None:
    with pytest.raises(MONAILabelException) as error:
        run(store, **request_)
    assert re.search(words, error.value.msg)
    assert fake.asked == []


def test_batch_inside_the_server_is_refused(store: LocalDatastore) -> None:
    with pytest.raises(MONAILabelException) as error:
        BatchTask(lambda: True)({"model": "sam2rad"}, store, lambda *_: None)
    assert "run_sync: expected false" in error.value.msg


def test_batch_fails_where_every_image_does(fake: FakeServer, store: LocalDatastore) -> None:
    fake.bad = set("abcde")
    with pytest.raises(MONAILabelException) as error:
        run(store)
    assert "All 5 images failed" in error.value.msg


def test_batch_says_so_when_the_server_is_away(store: LocalDatastore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MONAI_LABEL_SERVER_PORT", 9)
    with pytest.raises(MONAILabelException) as error:
        run(store)
    assert "it does not answer" in error.value.msg and "goes on where it was" in error.value.msg


@pytest.mark.parametrize("info", [{"detail": "no"}, [], {"models": None}])
def test_batch_says_so_when_something_else_answers(fake: FakeServer, store: LocalDatastore, info: Any) -> None:
    fake.info = info
    with pytest.raises(MONAILabelException, match=r"Expected a list of models at .*/info/; received status 200"):
        run(store)


def test_batch_does_not_watch_the_store(fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"image")
    watching = LocalDatastore(str(tmp_path), extensions=["*.nii.gz"], auto_reload=True)
    assert watching._observer.is_alive()
    run(watching)
    assert not watching._observer.is_alive()


# ------------------------------------------------------------------------------------------------------ clicks go first


@pytest.fixture
def assisted(tmp_path: Path) -> Iterator[tuple[AssistedEngine, Path]]:
    """A live version on ``tiny``, and an image."""
    engine = Engine(settings(tmp_path))
    add_version(store_at(tmp_path), engine)
    nib.save(nib.Nifti1Image(draw(5)[0], np.diag([1.0, 1.0, 5.0, 1.0])), tmp_path / "image.nii.gz")
    made = AssistedEngine(engine, ROW, store_at(tmp_path), LABELS)
    made.live()
    yield made, tmp_path / "image.nii.gz"
    engine._background.close()


def batch_of(assisted: AssistedEngine, image: Path) -> Callable[[], None]:
    """What the server does for one image of a batch."""

    def work() -> None:
        with giving_way(assisted.engine, {"batch": True}), assisted.engine.foreground():
            assisted.segment(assisted.engine.open(image), {})

    return work


def test_a_batchs_image_waits_while_somebody_clicks(assisted: tuple[AssistedEngine, Path]) -> None:
    made, image = assisted
    with made.engine.foreground():  # a click that lasts
        thread = threading.Thread(target=batch_of(made, image))
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()
        assert made.engine.info()["cache"]["slices"] == 0
    thread.join(60)
    assert not thread.is_alive()
    assert made.engine.info()["cache"]["slices"] == 6


def test_a_click_on_the_batchs_own_image_ends_both(assisted: tuple[AssistedEngine, Path]) -> None:
    """The click waits for the automatic result that the batch is making, so the batch may go on."""
    made, image = assisted
    click = {LABELS[0]: UserPrompts((Click((14, 14, 3)),))}
    with made.engine.foreground():
        thread = threading.Thread(target=batch_of(made, image))
        thread.start()
        thread.join(0.5)
        found: list[Any] = []
        second = threading.Thread(target=lambda: found.append(made.segment(made.engine.open(image), click)))
        second.start()
        second.join(60)
        assert found and found[0].edited
    thread.join(60)
    assert not thread.is_alive()


# -------------------------------------------------------------------------------------------------------- a real server


def labels_of(server: Server) -> dict[str, dict[str, Any]]:
    """What the store says of the labels under ``original``, by image."""
    objects = requests.get(f"{server.url}/datastore/?output=all", timeout=60).json()["objects"]
    return {image: o["labels"]["original"]["info"] for image, o in objects.items() if "original" in o["labels"]}


def status(server: Server) -> dict[str, Any]:
    """``GET /batch/infer``."""
    return requests.get(f"{server.url}/batch/infer", timeout=60).json()


def until(condition: Callable[[], bool], limit_s: float = 300.0) -> None:
    """Waits for it."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s"
        time.sleep(0.2)


@pytest.mark.timeout(900)
def test_batch_on_a_server_is_stopped_and_goes_on_beside_clicks(tmp_path: Path) -> None:
    studies, count = tmp_path / "studies", 40
    studies.mkdir()
    for n in range(count):
        nib.save(nib.Nifti1Image(draw(n)[0], np.diag([1.0, 1.0, 5.0, 1.0])), studies / f"c{n:02d}.nii.gz")
    (studies / "c07.nii.gz").write_bytes(b"no image")
    engine = Engine(settings(tmp_path / "here"))
    add_version(store_at(tmp_path), engine)
    conf = {"backbone": "tiny", "state_dir": str(tmp_path / "state")}
    with running_server(studies, tmp_path / "home", conf=conf) as server:
        url = f"{server.url}/batch/infer/sam2rad?images=all"
        assert requests.post(url, timeout=60).json()["status"] in ("SUBMITTED", "RUNNING")
        until(lambda: bool(labels_of(server)))
        stopped = requests.delete(f"{server.url}/batch/infer", timeout=60).json()
        assert stopped["status"] == "STOPPED"
        time.sleep(1)  # the image in hand is finished
        before = labels_of(server)
        assert 0 < len(before) < count - 1

        assert requests.post(url, timeout=60).ok
        clicks = 0
        while status(server)["status"] in ("SUBMITTED", "RUNNING"):
            click = {"foreground": [[14, 14, 3]], "result_write_to_file": False}
            assert post_infer(server, "sam", "c00", click).ok
            clicks += 1
            time.sleep(0.2)
        done = status(server)
        assert done["status"] == "DONE" and clicks > 0
        text = "\n".join(done["details"])
        assert f"{len(before)} of them kept" in text or len(done["details"]) == 20  # only the last lines are kept
        assert f"{count - len(before)} of {count - len(before)}, 1 failed" in text
        after = labels_of(server)
        assert len(after) == count - 1 and "c07" not in after
        assert {image: after[image]["ts"] for image in before} == {i: info["ts"] for i, info in before.items()}
        assert {info["params"]["version"] for info in after.values()} == {"v0001"}
        assert after["c03"]["params"]["label_names"] == {LABELS[0]: 1, LABELS[1]: 2}
