"""Background scores of a store that grows while versions come and files change. Everything runs on ``tiny``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.active import scorer as module
from lib.active.evidence import Evidence
from lib.active.scorer import Case, Scorer
from lib.active.sight import Sight
from lib.assisted import AssistedEngine
from lib.data.volume import load_volume
from lib.engine import Engine
from lib.errors import CapacityError
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


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was prepared, in order, without the work."""
    found: list[str] = []
    monkeypatch.setattr(Scorer, "_prepare", lambda _, image: found.append(image))
    return found


class Slow:
    """Stands for :class:`Sight`: evidence that takes as many groups of slices as the test lets it."""

    started: list[int]
    enough: threading.Event

    def __init__(self, *facts: Any) -> None:
        self._between = facts[-1]
        self.started.append(1)

    def evidence(self, *, with_answer: bool) -> Evidence:
        while not self.enough.wait(0.01):
            self._between()
        return Evidence(None, None, torch.zeros(2))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Slow]]:
    Slow.started, Slow.enough = [], threading.Event()
    monkeypatch.setattr(module, "Sight", Slow)
    yield Slow
    Slow.enough.set()


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


def test_former_scores_are_forgotten_once_the_new_ones_have_caught_up(made, assisted, store: Store) -> None:
    add_version(assisted.store, assisted.engine)
    training = threading.Event()
    scorer = made(resting=training.is_set)
    until(lambda: answered(scorer, "v0001", "img1", "img2") and "img0" in scorer.scores([]).known)
    add_version(assisted.store, assisted.engine, noise=0.05)
    until(lambda: answered(scorer, "v0002", "img1", "img2") and "img0" in scorer.scores([]).known)
    training.set()  # nothing is scored
    os.utime(store.folder / "img1.nii.gz", ns=(1, 1))
    until(lambda: "img1" not in scorer.scores([]).known)
    assert scorer.scores(["img1", "img2"]).version == "v0002"


@pytest.mark.parametrize("former", [None, "v0001"])
def test_former_scores_count_after_a_restart_too(made, assisted: AssistedEngine, store: Store, former) -> None:
    if former:
        add_version(assisted.store, assisted.engine)
    first = made()
    first.prepare([])
    until(lambda: len(first.scores([]).known) == 3)
    first.close()
    live = add_version(assisted.store, assisted.engine, noise=0.05).name
    again = AssistedEngine(Engine(assisted.engine.settings), ROW, assisted.store, ("object",))
    training = threading.Event()
    training.set()
    second = Scorer(again, store.cases, store.fetch, most=100, fetches=0, resting=training.is_set)
    second.start()
    until(lambda: second.scores([]).version == live and second.waiting() == 0)
    found = second.scores(["img1", "img2"])
    assert found.version == former and len(found.known) == 3
    training.clear()
    until(lambda: answered(second, live, "img1", "img2"))
    second.close()


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


def test_all_clients_images_are_prepared_in_the_middle_of_a_scoring(made, slow, monkeypatch, store: Store) -> None:
    done, asked = list[str](), threading.Event()

    def prepare(_: Scorer, image: str) -> None:
        done.append(image)
        assert asked.wait(PATIENCE_S)

    monkeypatch.setattr(Scorer, "_prepare", prepare)
    scorer = made()
    scorer.prepare([])
    until(lambda: bool(slow.started))
    scorer.prepare(["ann's", "ann's next"])
    until(lambda: done == ["ann's"])
    scorer.prepare(["bob's", "bob's next"])
    asked.set()
    until(lambda: len(done) == 4)
    assert done == ["ann's", "bob's", "bob's next", "ann's next"]
    assert len(slow.started) == 1 and not scorer.scores(store.names).known  # the scoring still runs
    slow.enough.set()
    until(lambda: len(scorer.scores(store.names).known) == 3)
    assert len(slow.started) == 3  # and did not begin again


def test_an_image_asked_for_while_the_store_is_listed_is_prepared_before_all_scoring(
    made, store: Store, assisted, prepared, slow
) -> None:
    add_version(assisted.store, assisted.engine)
    listing, go_on, cases = threading.Event(), threading.Event(), store.cases

    def listed() -> list[Case]:
        listing.set()
        assert go_on.wait(PATIENCE_S)
        return cases()

    store.cases = listed  # type: ignore[method-assign]
    scorer = made()
    assert listing.wait(PATIENCE_S)
    scorer.prepare(["img1", "img2"])
    go_on.set()
    until(lambda: prepared == ["img1", "img2"])


def test_the_newest_hand_outs_are_prepared_and_all_before_what_is_likely_next(made, assisted, prepared) -> None:
    clients = range(10)
    with assisted.engine.foreground():  # nothing is prepared meanwhile
        scorer = made(most=0)
        for n in clients:
            scorer.prepare([f"image {n}", f"next {n}"])
    until(lambda: scorer.waiting() == 0)
    assert prepared == [f"image {n}" for n in reversed(clients)] + [f"next {n}" for n in (9, 8, 7, 6, 5, 4)]
    assert len(prepared) == module.MOST_WANTED


def test_an_image_that_cannot_be_prepared_holds_up_no_other(made, assisted: AssistedEngine, store: Store) -> None:
    add_version(assisted.store, assisted.engine)
    (store.folder / "broken.nii.gz").write_bytes(b"no image" * 99)
    scorer = made(most=0)
    scorer.prepare(["broken", "img1"])
    until(lambda: scorer.waiting() == 0)
    assert assisted.segment(assisted.engine.open(store.folder / "img1.nii.gz"), {}).cache["automatic_hits"] == 1


def test_preparing_in_the_middle_of_a_scoring_is_as_preparing_at_any_time(made, assisted, store, monkeypatch) -> None:
    add_version(assisted.store, assisted.engine)
    plain, prepare, modes = Sight.features, Scorer._prepare, list[bool]()

    def features(sight: Sight, *args: Any) -> Any:
        if not modes:
            scorer.prepare(["img2"])
        return plain(sight, *args)

    def prepared(scorer: Scorer, image: str) -> None:
        modes.append(torch.is_inference_mode_enabled())
        prepare(scorer, image)

    monkeypatch.setattr(Sight, "features", features)
    monkeypatch.setattr(Scorer, "_prepare", prepared)
    scorer = made()
    until(lambda: answered(scorer, "v0001", "img1", "img2"))
    assert modes == [False]  # what is loaded or cached there is used elsewhere
    reply = assisted.segment(assisted.engine.open(store.folder / "img2.nii.gz"), {})
    assert reply.cache["automatic_hits"] == 1


def test_the_store_is_looked_at_while_a_list_is_being_scored(made, slow, store: Store, monkeypatch) -> None:
    events, cases = list[str](), store.cases

    def listed() -> list[Case]:
        events.append("look")
        return cases()

    def score(_: Slow, *, with_answer: bool) -> Evidence:
        events.append("score")
        time.sleep(2 * module.LOOK_S)
        return Evidence(None, None, torch.zeros(2))

    store.cases = listed  # type: ignore[method-assign]
    monkeypatch.setattr(Slow, "evidence", score)
    scorer = made()
    scorer.prepare([])
    until(lambda: len(scorer.scores(store.names).known) == 3)
    first, _, last = (place for place, event in enumerate(events) if event == "score")
    assert events[first:last].count("look") >= 2, events


@pytest.mark.parametrize("error", [CapacityError("too large now"), MemoryError(), RuntimeError("not enough memory")])
def test_a_passing_lack_of_memory_marks_no_image(made, assisted, store: Store, monkeypatch, error) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.3)
    tried, short = list[Path](), threading.Event()
    short.set()

    def load(path: Path) -> Any:
        if path.name.startswith("img1") and short.is_set():
            tried.append(path)
            raise error
        return load_volume(path)

    monkeypatch.setattr(module, "load_volume", load)
    add_version(assisted.store, assisted.engine)
    scorer = made()
    until(lambda: answered(scorer, "v0001", "img2") and len(tried) > 1)
    assert scorer.scores([]).unreadable == ({"img1"} if isinstance(error, CapacityError) else set())  # handed out last
    assert not [p for p in (assisted.store.folder / "scores").rglob("*.json") if '"embedding": []' in p.read_text()]
    short.clear()
    until(lambda: answered(scorer, "v0001", "img1"))
    assert not scorer.scores([]).unreadable


def test_an_image_that_could_not_be_scored_is_when_its_file_changes(made, assisted, store: Store, monkeypatch) -> None:
    tried, changed = list[Path](), 1

    def load(path: Path) -> Any:
        if path.name.startswith("img1") and path.stat().st_mtime_ns != changed:
            tried.append(path)
            raise RuntimeError
        return load_volume(path)

    monkeypatch.setattr(module, "load_volume", load)
    add_version(assisted.store, assisted.engine)
    scorer = made()
    until(lambda: answered(scorer, "v0001", "img2") and bool(tried))
    time.sleep(0.3)
    assert len(tried) == 1
    os.utime(store.folder / "img1.nii.gz", ns=(changed, changed))
    until(lambda: answered(scorer, "v0001", "img1"))


def test_a_damaged_score_is_made_again(made, assisted: AssistedEngine, store: Store) -> None:
    add_version(assisted.store, assisted.engine)
    first = made()
    until(lambda: answered(first, "v0001", "img1", "img2"))
    first.close()
    for file in (assisted.store.folder / "scores").rglob("*.json"):
        file.write_text('{"raw": [0.5], "disagreement": null, "embedding": [1], "content": ""}')
    again = AssistedEngine(Engine(assisted.engine.settings), ROW, assisted.store, ("object",))
    second = Scorer(again, store.cases, store.fetch, most=100, fetches=0)
    second.start()
    until(lambda: answered(second, "v0001", "img1", "img2"))
    second.close()


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
