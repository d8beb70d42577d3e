"""The training loop on phantoms with ``tiny``: it learns, resumes to the step, stops early and keeps the best."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lib import train_loop
from lib.data.samples import TrainingCase
from lib.engine import Engine
from lib.errors import ConfigError
from lib.train_data import Batches, all_slices
from lib.train_loop import BEST, PROGRESS, STATE, Run, fit, read_best
from tests.cases import LABELS, cases, learned, recipe, settings


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(settings(tmp_path_factory.mktemp("engine")))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingCase]:
    return cases(tmp_path_factory.mktemp("cases"), 3)


@pytest.fixture
def make(engine: Engine, found: list[TrainingCase]) -> Callable[..., Run]:
    """A run as a new process would build it."""

    def build(folder: Path, seed: int = 1, **changes: Any) -> Run:
        chosen = recipe(**{"epochs": 2, "steps": 4, **changes})
        model = learned(engine, chosen.preset, seed)
        return Run(model, Batches(model, all_slices(found[:2]), chosen), found[2:], LABELS, chosen, folder)

    return build


def kill_at(step: int, entries: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    def report(entry: dict[str, Any]) -> None:
        entries.append(entry)
        if entry["step"] == step:
            raise KilledError

    return report


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.parametrize("preset", ["frozen", "full"])
def test_fit_lowers_the_loss(make, tmp_path: Path, preset: str) -> None:
    losses: dict[int, float] = {}
    run = make(tmp_path, preset=preset, epochs=1, steps=40)
    before = {k: t.clone() for k, t in run.model.trained().items()}  # they are the live ones
    fit(run, lambda entry: losses.update({entry["step"]: entry["loss"]}))
    assert sorted(losses) == list(range(1, 41))
    first, last = ([losses[n] for n in part] for part in (range(1, 6), range(36, 41)))
    assert sum(last) < 0.9 * sum(first)
    after = run.model.trained()
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == ({"method"} if preset == "frozen" else {"method", "backbone"})


@pytest.mark.parametrize("preset", ["frozen", "full"])
@pytest.mark.parametrize("save_s", [-1.0, 1e9])
def test_fit_killed_run_goes_on_to_the_same_end(make, tmp_path: Path, monkeypatch, preset: str, save_s: float) -> None:
    """With a state after every step it goes on at the next one, else at the epoch; the end is the same."""
    whole = make(tmp_path / "a", preset=preset, epochs=3)
    wanted = fit(whole)
    monkeypatch.setattr(train_loop, "SAVE_S", save_s)
    seen: list[dict[str, Any]] = []
    with pytest.raises(KilledError):
        fit(make(tmp_path / "b", preset=preset, epochs=3), kill_at(6, seen))
    for name in (STATE, BEST, PROGRESS):
        (tmp_path / "b" / f"{name}.part").write_bytes(b"cut off")
    rest: list[dict[str, Any]] = []
    second = make(tmp_path / "b", seed=99, preset=preset, epochs=3)  # what it begins with must not matter
    got = fit(second, rest.append)
    assert rest[0]["step"] == (7 if save_s < 0 else 5)
    assert rest[0]["total_time"] > seen[3]["total_time"]
    assert got == wanted
    assert same(second.model.trained(), whole.model.trained())
    states = [torch.load(tmp_path / n / STATE, weights_only=True) for n in "ab"]
    assert same(states[0]["model"], states[1]["model"])
    assert states[0]["scheduler"] == states[1]["scheduler"]


def test_fit_killed_before_validation_still_validates_that_epoch(make, tmp_path: Path, monkeypatch) -> None:
    wanted = fit(make(tmp_path / "a", epochs=1))
    monkeypatch.setattr(train_loop, "SAVE_S", -1.0)
    with pytest.raises(KilledError):
        fit(make(tmp_path / "b", epochs=1), kill_at(4, []))
    rest: list[dict[str, Any]] = []
    assert fit(make(tmp_path / "b", epochs=1), rest.append) == wanted
    assert rest[0]["step"] == 4


@pytest.mark.parametrize("cut", [b"", b"half", b"PK\x03\x04"])
def test_fit_starts_anew_where_the_state_cannot_be_read(make, tmp_path: Path, cut: bytes) -> None:
    with pytest.raises(KilledError):
        fit(make(tmp_path), kill_at(6, []))
    (tmp_path / STATE).write_bytes(cut)
    rest: list[dict[str, Any]] = []
    fit(make(tmp_path), rest.append)
    assert rest[0]["step"] == 1


def test_fit_killed_while_saving_leaves_the_state_before(make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train_loop, "SAVE_S", -1.0)
    save, calls = torch.save, []

    def cut(state: Any, file: Any) -> None:
        calls.append(file)
        if len(calls) == 3:
            file.write(b"half")
            raise KilledError
        save(state, file)

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KilledError):
        fit(make(tmp_path))
    monkeypatch.setattr(torch, "save", save)
    assert torch.load(tmp_path / STATE, weights_only=True)["trainer"]["iteration"] == 2
    rest: list[dict[str, Any]] = []
    fit(make(tmp_path), rest.append)
    assert rest[0]["step"] == 3


def test_fit_finished_run_is_not_trained_again(make, tmp_path: Path) -> None:
    first = make(tmp_path)
    wanted = fit(first)
    again, seen = make(tmp_path, seed=5), []
    assert fit(again, seen.append) == wanted
    assert seen == []
    assert same(first.model.trained(), again.model.trained())


def test_fit_ends_when_the_minutes_are_over(make, tmp_path: Path, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(train_loop.time, "monotonic", lambda: clock[0])
    seen: list[dict[str, Any]] = []

    def second_per_step(entry: dict[str, Any]) -> None:
        if not seen or entry["step"] > seen[-1]["step"]:
            clock[0] += 1.0
        seen.append(entry)

    run = make(tmp_path, epochs=50, steps=4, minutes=0.1)
    best = fit(run, second_per_step)
    assert seen[-1]["step"] == 6, "six seconds at a second a step, in the middle of the second epoch"
    assert 1 <= best["epoch"] <= 2
    assert seen[0]["time_left_s"] <= 6.0
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert state["optimiser"]["param_groups"][0]["lr"] < 0.2 * run.recipe.lr, "the rate has fallen with the time"
    again: list[dict[str, Any]] = []
    assert fit(make(tmp_path, epochs=50, steps=4, minutes=0.1), again.append) == best
    assert again == [], "a resumed run has no time left"


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Dice of the epochs to come, taken from the front."""
    planned: list[float] = []
    monkeypatch.setattr(train_loop, "case_dice", lambda *_: [planned.pop(0)] * 2)
    return planned


# Dice per epoch, patience, epochs run, best epoch
STOPS = [
    ([0.2, 0.5, 0.4, 0.3, 0.9], 2, 4, 2),
    ([0.2, 0.5, 0.5, 0.9, 0.1], 2, 5, 4),
    ([0.3, 0.2, 0.9, 0.9, 0.9], 1, 2, 1),
    ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 5, 5),
    ([0.0, 0.0, 0.0, 0.0, 0.0], 9, 5, 1),
]


@pytest.mark.parametrize(("dice", "patience", "epochs", "best"), STOPS)
def test_fit_stops_early_and_returns_the_best_epoch(make, tmp_path: Path, scores, dice, patience, epochs, best) -> None:
    scores += dice
    run = make(tmp_path, preset="frozen", epochs=5, steps=2, patience=patience)
    tensors: dict[int, dict[str, torch.Tensor]] = {}

    def report(entry: dict[str, Any]) -> None:  # the last report of an epoch comes after its validation
        tensors[entry["epoch"]] = {k: t.clone() for k, t in run.model.trained().items()}

    metrics = fit(run, report)
    assert len(scores) == 5 - epochs
    assert max(tensors) == epochs
    assert (metrics["epoch"], metrics["mean_dice"]) == (best, max(dice[:epochs]))
    assert same(run.model.trained(), tensors[best])
    assert read_best(tmp_path) == metrics
    assert not run.model.training
    others = [e for e in tensors if e != best]
    assert not any(same(tensors[e], tensors[best]) for e in others)


def test_fit_stopped_early_and_killed_before_publishing_is_not_trained_on(make, tmp_path: Path, scores) -> None:
    scores += [0.5, 0.4, 0.9]
    wanted = fit(make(tmp_path, preset="frozen", epochs=3, patience=1))
    seen: list[dict[str, Any]] = []
    assert fit(make(tmp_path, preset="frozen", epochs=3, patience=1), seen.append) == wanted
    assert scores == [0.9] and seen == []


def test_fit_resumed_run_remembers_its_patience(make, tmp_path: Path, scores) -> None:
    scores += [0.5, 0.4, 0.3, 0.9]
    with pytest.raises(KilledError):
        fit(make(tmp_path, preset="frozen", epochs=4, steps=4, patience=2), kill_at(9, []))
    assert fit(make(tmp_path, preset="frozen", epochs=4, steps=4, patience=2))["epoch"] == 1
    assert scores == [0.9]


def test_fit_tells_progress(make, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    metrics = fit(make(tmp_path, epochs=2, steps=6), seen.append)
    keys = {"epoch", "total_epochs", "step", "total_steps", "loss", "best_metric", "total_time", "time_left_s"}
    assert all(set(entry) == keys for entry in seen)
    assert [e["step"] for e in seen] == [*range(1, 7), 6, *range(7, 13), 12]  # and after every validation
    assert (seen[0]["epoch"], seen[0]["total_epochs"], seen[0]["total_steps"]) == (1, 2, 12)
    assert seen[0]["best_metric"] is None
    assert seen[0]["time_left_s"] > 0 and seen[-1]["time_left_s"] == 0
    assert all(a["total_time"] <= b["total_time"] for a, b in pairwise(seen))
    assert json.loads((tmp_path / PROGRESS).read_text()) == seen[-1]
    assert seen[-1]["best_metric"] == metrics["mean_dice"]
    assert set(metrics) == {"mean_dice", "dice", "cases", "epoch"} and list(metrics["cases"]) == ["c2"]
    assert not list(tmp_path.glob("*.part"))


def test_fit_writes_curves_for_tensorboard(make, tmp_path: Path) -> None:
    fit(make(tmp_path, epochs=1))
    curves = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
    assert b"val_mean_dice" in curves
    assert curves.count(b"loss") >= 4


def test_fit_loss_that_is_no_number_says_what_to_do(make, tmp_path: Path) -> None:
    run = make(tmp_path)
    with torch.no_grad():
        run.model.method.queries.fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"loss became nan in step 1\. Train again with a smaller lr"):
        fit(run)
    assert not (tmp_path / BEST).exists()


def test_fit_unknown_loss_is_named(make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss: expected one of"):
        fit(make(tmp_path, loss="dice"))


@pytest.mark.parametrize(
    ("count", "batch", "steps", "expected"), [(10, 4, 0, 20), (100, 4, 0, 25), (101, 4, 0, 26), (9, 4, 7, 7)]
)
def test_steps_per_epoch(make, tmp_path: Path, count: int, batch: int, steps: int, expected: int) -> None:
    run = make(tmp_path, batch=batch, steps=steps)
    run.batches.slices = (run.batches.slices * 40)[:count]
    assert run.steps == expected


def test_frozen_training_leaves_the_backbone_of_plain_sam_alone(make, engine: Engine, tmp_path: Path) -> None:
    before = {k: t.clone() for k, t in engine.warm().state_dict().items()}  # type: ignore[attr-defined]
    for preset in ("frozen", "adapters", "full"):
        fit(make(tmp_path / preset, preset=preset, epochs=1, steps=2))
    after = engine.warm().state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[k], after[k]) for k in before)
