"""Background scores of a store that grows while versions come and files change. Everything runs on ``tiny``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lib.active import scorer as module
from lib.active.scorer import Case, Scorer
from lib.assisted import AssistedEngine
from lib.engine import Engine
from tests.cases import ROW, add_version, settings, store_at, write_case

PATIENCE_S = 240.0


class Store:
    """Images of a folder; ``img0`` is labelled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.absent, self.fetched = folder, list[str](), list[str]()
        self.names = [self.add(f"img{n}", n) for n in range(3)]

    def add(self, name: str, seed: int) -> str:
        write_case(self.folder, name, seed)
        return name

    def cases(self) -> list[Case]:
        here = sorted(p.name.split(".")[0] for p in self.folder.glob("*.nii.gz"))
        found = [Case(n, self.folder / f"{n}.nii.gz", n == "img0") for n in here if n not in self.absent]
        return [*found, *(Case(n, None, False) for n in self.absent)]

    def fetch(self, name: str) -> str:
        if name in self.absent:
            self.fetched.append(name)
            self.absent.remove(name)
        return str(self.folder / f"{name}.nii.gz")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


@pytest.fixture
def assisted(tmp_path: Path) -> AssistedEngine:
    return AssistedEngine(Engine(settings(tmp_path)), ROW, store_at(tmp_path), ("object",))


@pytest.fixture
def made(assisted: AssistedEngine, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scorer]]:
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    found: list[Scorer] = []

    def make(most: int = 100, fetches: int = 0, **more: Any) -> Scorer:
        found.append(Scorer(assisted, store.cases, store.fetch, most=most, fetches=fetches, **more))
        found[-1].start()
        return found[-1]

    yield make
    for one in found:
        one.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.02)


def answered(scorer: Scorer, version: str | None, *images: str) -> bool:
    """Whether these images have an answer's scores under a version."""
    found = scorer.scores(images)
    return found.version == version and all(i in found.known and found.known[i].predicted is not None for i in images)


def test_a_fresh_server_does_nothing_until_somebody_asks(made, assisted: AssistedEngine, store: Store) -> None:
    scorer = made()
    time.sleep(0.5)
    assert scorer.scores(store.names).known == {} and assisted.engine.info()["weights_id"] is None
    scorer.prepare(["img1"])
    until(lambda: len(scorer.scores(store.names).known) == 3)
    found = scorer.scores(store.names)
    assert found.version is None and {known.predicted for known in found.known.values()} == {None}


def test_scores_follow_version_files_and_new_images(made, assisted: AssistedEngine, store: Store) -> None:
    add_version(assisted.store, assisted.engine)
    scorer = made()
    until(lambda: answered(scorer, "v0001", "img1", "img2"))
    until(lambda: "img0" in scorer.scores(store.names).known)
    first = scorer.scores(store.names)
    assert first.known["img0"].predicted is None and not first.calibrated  # labelled: an embedding is enough
    store.add("img3", 3)
    until(lambda: answered(scorer, "v0001", "img3"))
    write_case(store.folder, "img1", 17)
    os.utime(store.folder / "img1.nii.gz", ns=(1, 1))
    was = first.known["img1"].predicted
    until(lambda: answered(scorer, "v0001", "img1") and scorer.scores(["img1"]).known["img1"].predicted != was)
    add_version(assisted.store, assisted.engine, noise=0.05)
    until(lambda: answered(scorer, "v0002", "img1", "img2", "img3"))
    assert scorer.scores(["img1"]).known["img1"].predicted != was


def test_former_scores_count_until_the_new_ones_cover_as_much(made, assisted: AssistedEngine, store: Store) -> None:
    add_version(assisted.store, assisted.engine)
    scorer = made()
    until(lambda: answered(scorer, "v0001", "img1", "img2"))
    with assisted.engine.foreground():  # nothing is scored meanwhile
        add_version(assisted.store, assisted.engine, noise=0.05)
        time.sleep(0.3)
        assert scorer.scores(["img1", "img2"]).version == "v0001"
    until(lambda: scorer.scores(["img1", "img2"]).version == "v0002")


def test_scores_outlive_the_server(made, assisted: AssistedEngine, store: Store, monkeypatch) -> None:
    add_version(assisted.store, assisted.engine)
    first = made()
    until(lambda: answered(first, "v0001", "img1", "img2") and "img0" in first.scores([]).known)
    first.close()
    files = [p for p in (assisted.store.folder / "scores").rglob("*") if p.is_file()]
    assert files and not any(name in f"{p} {p.read_text()}" for p in files for name in store.names)
    monkeypatch.setattr(module, "Sight", None)  # to score anew would raise
    again = AssistedEngine(Engine(assisted.engine.settings), ROW, assisted.store, ("object",))
    second = Scorer(again, store.cases, store.fetch, most=100, fetches=0)
    second.start()
    until(lambda: answered(second, "v0001", "img1", "img2"))
    second.close()


def test_an_image_that_cannot_be_read_is_told_once_and_holds_nothing_up(made, assisted, store: Store, caplog) -> None:
    (store.folder / "miller.nii.gz").write_bytes(b"no image" * 99)
    add_version(assisted.store, assisted.engine)
    with caplog.at_level("INFO"):
        scorer = made()
        until(lambda: answered(scorer, "v0001", "img1", "img2") and bool(scorer.scores([]).unreadable))
        time.sleep(0.5)
    assert scorer.scores([]).unreadable == {"miller"}
    assert sum("cannot be scored" in line for line in caplog.messages) == 1 and "miller" not in caplog.text


def test_scoring_leaves_the_caches_alone_and_preparing_fills_them(made, assisted: AssistedEngine, store) -> None:
    add_version(assisted.store, assisted.engine)
    scorer = made()
    until(lambda: answered(scorer, "v0001", "img1", "img2"))
    assert assisted.engine.info()["cache"]["slices"] == 0
    scorer.prepare(["img1"])
    until(lambda: scorer.waiting() == 0 and assisted.engine.info()["cache"]["slices"] > 0)
    reply = assisted.segment(assisted.engine.open(store.folder / "img1.nii.gz"), {})
    assert reply.cache["automatic_hits"] == 1


@pytest.mark.parametrize(("fetches", "fetched"), [(0, []), (1, ["img2"])])
def test_a_pacs_is_asked_for_few_images_and_only_when_somebody_asked(made, store, assisted, fetches, fetched) -> None:
    add_version(assisted.store, assisted.engine)
    store.absent = ["img2"]
    scorer = made(fetches=fetches)
    until(lambda: answered(scorer, "v0001", "img1"))
    time.sleep(0.3)
    assert store.fetched == []
    scorer.prepare([])
    until(lambda: not fetched or answered(scorer, "v0001", "img2"))
    time.sleep(0.3)
    assert store.fetched == fetched


def test_nothing_is_scored_beside_a_training_but_images_are_prepared(made, assisted: AssistedEngine, store) -> None:
    add_version(assisted.store, assisted.engine)
    training = threading.Event()
    training.set()
    scorer = made(resting=training.is_set)
    scorer.prepare(["img1"])
    until(lambda: assisted.engine.info()["cache"]["slices"] > 0)
    until(lambda: scorer.waiting() == 0)
    assert not scorer.scores(store.names).known
    training.clear()
    until(lambda: answered(scorer, "v0001", "img1", "img2"))


def test_no_more_images_are_scored_than_wanted(made, assisted: AssistedEngine, store: Store) -> None:
    add_version(assisted.store, assisted.engine)
    scorer = made(most=1)
    until(lambda: sum(k.predicted is not None for k in scorer.scores(store.names).known.values()) == 1)
    time.sleep(0.5)
    assert sum(k.predicted is not None for k in scorer.scores(store.names).known.values()) == 1


def test_a_damaged_version_ends_nothing(made, assisted: AssistedEngine, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    add_version(assisted.store, assisted.engine)
    live = assisted.store.folder / "live.json"
    text = live.read_text()
    live.write_text("{")
    scorer = made()
    until(lambda: "background work failed" in caplog.text)
    live.write_text(text)
    until(lambda: answered(scorer, "v0001", "img1", "img2"))
