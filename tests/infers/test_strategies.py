"""``next_sample`` as clients meet it: what is handed out to whom, what the reply says, and how fast."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException

from infers.strategies import Desk, stored
from lib.active.scorer import FORMULA, Scorer, Scores
from lib.active.selection import STRATEGIES, Known
from lib.active.store import CaseScore, ScoreStore, digest_of
from lib.assisted import AssistedEngine
from lib.engine import Engine
from tests.cases import ROW, settings, store_at, write_case
from tests.serving import Server, running_server

NAMES = ["a", "b", "c", "d"]
MANY = 1000
LIMIT_S = 0.2


@pytest.fixture
def datastore(tmp_path: Path) -> LocalDatastore:
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.nii.gz").write_bytes(b"never opened here")
    return LocalDatastore(str(folder))


@pytest.fixture
def assisted(tmp_path: Path) -> AssistedEngine:
    return AssistedEngine(Engine(settings(tmp_path)), ROW, store_at(tmp_path), ("object",))


def desk(assisted: AssistedEngine, datastore: LocalDatastore, monkeypatch: pytest.MonkeyPatch, **known: Known) -> Desk:
    """A desk whose scores are given; what it prepares is in ``prepared``."""
    found = Desk(assisted, settings(assisted.store.folder), lambda: datastore)
    prepared: list[list[str]] = []
    monkeypatch.setattr(Scorer, "scores", lambda *_: Scores("v0001" if known else None, True, known))
    monkeypatch.setattr(Scorer, "prepare", lambda _, images: prepared.append(list(images)))
    found.prepared = prepared  # type: ignore[attr-defined]
    return found


def known(predicted: float | None, disagreement: float | None, *embedding: float) -> Known:
    return Known(predicted, disagreement, np.array(embedding, np.float32))


KNOWN = {
    "a": known(0.9, 0.1, 1, 1), "b": known(0.3, 0.2, 0, 0), "c": known(0.5, 0.4, 1, 0.5), "d": known(0.8, 0.3, 9, 9),
}  # fmt: skip


def ask(desk: Desk, strategy: str, datastore: LocalDatastore, client: str | None = "ann") -> dict[str, Any]:
    """What upstream's endpoint calls and writes."""
    request = {"strategy": strategy, **({} if client is None else {"client_id": client})}
    reply = desk.strategies()[strategy](request, datastore)
    if reply:
        facts = {"ts": int(time.time()), "client_id": client or "admin"}
        datastore.update_image_info(reply["id"], {"strategy": {strategy: facts}})
    return reply or {}


def label(datastore: LocalDatastore, image: str, tmp_path: Path) -> None:
    file = tmp_path / "final.nii.gz"
    file.write_bytes(b"label")
    datastore.save_label(image, str(file), "final", {})


@pytest.mark.parametrize(
    ("strategy", "first"), [("predicted_dice", "b"), ("disagreement", "c"), ("diversity", "a"), ("mix", "c")]
)
def test_each_strategy_picks_by_its_score_and_says_so(assisted, datastore, monkeypatch, strategy, first) -> None:
    one = desk(assisted, datastore, monkeypatch, **KNOWN)
    reply = ask(one, strategy, datastore)
    facts = reply["selection"]
    assert reply["id"] == first
    assert (facts["asked"], facts["used"], facts["why"], facts["version"]) == (strategy, strategy, "", "v0001")
    assert (facts["scored"], facts["candidates"], facts["calibrated"]) == (4, 4, True)
    assert facts["predicted_dice"] == KNOWN[first].predicted and facts["disagreement"] == KNOWN[first].disagreement
    assert one.prepared[0][0] == first and len(one.prepared[0]) == 2  # type: ignore[attr-defined]


def test_names_that_clients_show_begin_with_mix(assisted, datastore, monkeypatch) -> None:
    found = desk(assisted, datastore, monkeypatch).strategies()
    assert list(found) == ["mix", "predicted_dice", "disagreement", "diversity", "random", "first"]
    assert all(strategy.info()["description"] for strategy in found.values())
    assert list(Desk(None, settings(assisted.store.folder), lambda: datastore).strategies()) == ["random", "first"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fallbacks_are_visible(assisted, datastore, monkeypatch, strategy) -> None:
    facts = ask(desk(assisted, datastore, monkeypatch), strategy, datastore)["selection"]
    assert (facts["used"], facts["version"], facts["scored"]) == ("random", None, 0) and "scores yet" in facts["why"]
    plain = {name: known(None, None, *one.embedding) for name, one in KNOWN.items()}
    facts = ask(desk(assisted, datastore, monkeypatch, **plain), strategy, datastore, "bob")["selection"]
    assert facts["used"] == "diversity" and ("No trained version" in facts["why"]) == (strategy != "diversity")


def test_images_without_scores_come_after_those_with(assisted, datastore, monkeypatch) -> None:
    one = desk(assisted, datastore, monkeypatch, a=KNOWN["a"])
    assert ask(one, "mix", datastore, "x")["id"] == "a"
    assert ask(one, "mix", datastore, "y")["selection"]["used"] == "random"


@pytest.mark.parametrize("strategy", [*STRATEGIES, "random", "first"])
def test_no_image_is_handed_to_two_clients(assisted, datastore, monkeypatch, strategy) -> None:
    one = desk(assisted, datastore, monkeypatch, **KNOWN)
    given = [ask(one, strategy, datastore, f"client {n}")["id"] for n in range(4)]
    assert sorted(given) == NAMES
    with pytest.raises(MONAILabelException, match=r"Others are labelling all 4 images.*free in 60 minutes"):
        ask(one, strategy, datastore, "late")


def test_next_sample_again_gives_another_and_releases_the_former(assisted, datastore, monkeypatch) -> None:
    one = desk(assisted, datastore, monkeypatch, **KNOWN)
    given = [ask(one, "predicted_dice", datastore)["id"] for _ in range(5)]
    assert given[:4] == ["b", "c", "d", "a"] and given[4] == "b"  # all were passed over: the longest ago comes again
    assert ask(one, "predicted_dice", datastore, "bob")["id"] == "c"


def test_first_gives_the_same_until_it_is_labelled(assisted, datastore, monkeypatch, tmp_path: Path) -> None:
    one = desk(assisted, datastore, monkeypatch)
    assert [ask(one, "first", datastore)["id"] for _ in range(2)] == ["a", "a"]
    assert ask(one, "first", datastore, "bob")["id"] == "b"
    label(datastore, "a", tmp_path)
    assert ask(one, "first", datastore)["id"] == "c"


def test_a_client_without_a_name_is_never_left_without(assisted, datastore, monkeypatch) -> None:
    one = desk(assisted, datastore, monkeypatch, **KNOWN)
    given = [ask(one, "mix", datastore, None)["id"] for _ in range(5)]
    assert sorted(given[:4]) == NAMES and given[4] == given[0]


@pytest.mark.parametrize("strategy", ["first", "random"])
def test_clients_without_a_name_get_different_images_by_upstreams_strategies_too(
    assisted, datastore, monkeypatch, strategy
) -> None:
    one = desk(assisted, datastore, monkeypatch)
    given = [ask(one, strategy, datastore, None)["id"] for _ in range(3)]
    if strategy == "first":
        assert given == ["a", "b", "c"]
    assert [*sorted(given), ask(one, strategy, datastore, "bob")["id"]] == [*sorted(given), *(set(NAMES) - set(given))]
    assert len(set(given)) == 3
    again = [ask(one, strategy, datastore, None)["id"] for _ in range(4)]
    assert again == [*given, given[0]]  # nothing is free, and bob's stays his: the longest ago comes again
    with pytest.raises(MONAILabelException, match="Others are labelling all 4 images"):
        ask(one, strategy, datastore, "eve")


def test_a_client_without_a_name_gets_what_one_with_a_name_released(assisted, datastore, monkeypatch) -> None:
    one = desk(assisted, datastore, monkeypatch, **KNOWN)
    assert [ask(one, "predicted_dice", datastore)["id"] for _ in range(2)] == ["b", "c"]
    assert [ask(one, "first", datastore, None)["id"] for _ in range(4)] == ["a", "b", "d", "a"]


def test_leases_survive_a_restart(assisted, datastore, monkeypatch) -> None:
    first = desk(assisted, datastore, monkeypatch, **KNOWN)
    assert [ask(first, "predicted_dice", datastore, who)["id"] for who in ("ann", "bob")] == ["b", "c"]
    again = LocalDatastore(str(Path(datastore.get_image_uri("a")).parent))
    second = desk(assisted, again, monkeypatch, **KNOWN)
    assert ask(second, "predicted_dice", again, "eve")["id"] == "d"
    assert ask(second, "predicted_dice", again, "ann")["id"] == "a"  # hers is released, and she has seen it


@pytest.mark.parametrize("wrong", ["mix", ["mix"], {"mix": "yesterday"}, {"mix": {"ts": "noon"}}, None])
def test_hand_outs_that_a_client_wrote_wrongly_are_passed_over(assisted, datastore, monkeypatch, wrong) -> None:
    datastore.update_image_info("a", {"strategy": wrong})
    assert ask(desk(assisted, datastore, monkeypatch), "mix", datastore)["id"]
    datastore.update_image_info("a", {"strategy": wrong})
    assert ask(desk(assisted, datastore, monkeypatch), "random", datastore)["id"]


@pytest.mark.parametrize("client", ["ann", None])
@pytest.mark.parametrize("ahead_s", [0, 1000])  # a clock that was set back leaves times to come
def test_random_gives_the_last_image_again_at_once(
    assisted, datastore, monkeypatch, tmp_path: Path, client, ahead_s
) -> None:
    one = desk(assisted, datastore, monkeypatch)
    for name in NAMES[1:]:
        label(datastore, name, tmp_path)
    for _ in range(3):
        assert ask(one, "random", datastore, client)["id"] == "a"
        facts = {"ts": int(time.time()) + ahead_s, "client_id": client or "admin"}
        datastore.update_image_info("a", {"strategy": {"random": facts}})


def test_background_work_outlives_a_store_that_cannot_be_reached(assisted, monkeypatch) -> None:
    """As a PACS that restarts: the scores come when it is back."""
    asked, again = [], threading.Event()

    def away() -> Any:
        asked.append(1)
        if len(asked) > 1:
            again.set()
        raise MONAILabelException(MONAILabelError.SERVER_ERROR, "Expected the PACS to answer.")

    monkeypatch.setattr("lib.active.scorer.RETRY_S", 0.05)
    found = Desk(assisted, settings(assisted.store.folder), away)
    assert found.scorer is not None
    found.start()
    found.prepare([])  # somebody has asked: it scores without a version too
    assert again.wait(30), "it does not ask again"


def test_nothing_unlabelled_is_an_empty_reply(assisted, datastore, monkeypatch, tmp_path: Path) -> None:
    one = desk(assisted, datastore, monkeypatch, **KNOWN)
    for name in NAMES:
        label(datastore, name, tmp_path)
    assert ask(one, "mix", datastore) == {} == ask(one, "random", datastore)


def test_the_store_is_listed_with_what_is_labelled(datastore, tmp_path: Path) -> None:
    label(datastore, "b", tmp_path)
    assert [(c.image, c.labelled, c.path is not None) for c in sorted(stored(datastore), key=lambda c: c.image)] == [
        ("a", False, True), ("b", True, True), ("c", False, True), ("d", False, True),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- real server


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a thousand hard links of one image, all of which have scores."""
    scratch = tmp_path_factory.mktemp("many")
    studies = scratch / "studies"
    image = write_case(scratch / "one", "image", 1).image
    studies.mkdir()
    rng = np.random.default_rng(0)
    parts = ("random-0", "", FORMULA)
    key = f"plain-{hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()}"
    scores = ScoreStore(studies / ".autosam" / "sam2rad" / "scores")
    for number in range(MANY):
        file = studies / f"n{number:04d}.nii.gz"
        os.link(image, file)
        scores.write(key, digest_of(f"n{number:04d}", file), CaseScore({}, None, tuple(rng.normal(size=256).tolist())))
    with running_server(studies, scratch / "server", conf={"backbone": "tiny"}) as running:
        yield running


def own_share() -> float:
    """How much of a core this process gets now: the limit is for one that does nothing else."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.3:
        sum(range(1000))
    return min(1.0, (time.process_time() - cpu) / (time.perf_counter() - wall))


def post(server: Server, strategy: str, client: str) -> tuple[dict[str, Any], float]:
    start = time.perf_counter()
    response = requests.post(f"{server.url}/activelearning/{strategy}", json={"client_id": client}, timeout=60)
    spent = time.perf_counter() - start
    assert response.ok, response.text
    return response.json(), spent


def test_next_sample_answers_at_once_with_a_thousand_images(many: Server) -> None:
    reply, _ = post(many, "mix", "c0")
    end = time.monotonic() + 120
    while reply["selection"]["scored"] < MANY - 20:
        assert time.monotonic() < end, reply
        time.sleep(0.5)
        reply, _ = post(many, "mix", "c0")
    assert reply["selection"]["used"] == "diversity" and Path(reply["path"]).name == reply["name"]
    found = [post(many, "mix", f"client {n}") for n in range(20)]
    assert len({reply["id"] for reply, _ in found}) == 20
    times, share = sorted(spent for _, spent in found), own_share()
    print(f"next_sample with {MANY} images: median {times[10]:.3f}, least {times[0]:.3f} s with {share:.0%} of a core")
    assert times[len(times) // 2] < LIMIT_S / share


def test_every_client_sees_the_strategies(many: Server) -> None:
    assert next(iter(many.info()["strategies"])) == "mix"
