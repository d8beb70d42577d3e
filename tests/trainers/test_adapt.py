"""The train task on upstream's local store: what it takes, what it refuses, what goes live and what survives a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import MONAILabelException

from infers.local_store import LocalStore
from lib import train_loop, train_step
from lib.errors import WeightsError
from lib.evaluate import evaluate
from lib.learned import Learned
from lib.train_loop import Run
from lib.versions.store import VersionStore
from tests.cases import LABELS, ROW, draw, settings, store_at, write_case
from tests.dicom_files import save as save_series
from tests.dicom_files import series
from trainers import adapt
from trainers.adapt import AdaptTask, stored_cases

SHORT = {"preset": "frozen", "epochs": 1, "steps": 2, "batch": 4, "views": 1, "client_id": "someone"}
INFO = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(LABELS, 1)], "model": "sam2rad_edit"}


class KilledError(Exception):
    """Stands for the end of the training child."""


class World:
    """A store of upstream's, the task and its versions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.studies = folder, folder / "studies"
        self.studies.mkdir()
        self.versions: VersionStore = store_at(folder)
        self.task = self.new_task()

    def new_task(self, **conf: str) -> AdaptTask:
        return AdaptTask(ROW, settings(self.folder, **conf), self.folder / "state")

    def add(self, name: str, seed: int, classes: np.ndarray | None = None, info: dict[str, Any] | None = INFO) -> None:
        """An image with a final label, saved as the server saves it."""
        case = write_case(self.folder / "new", name, seed, classes)
        (self.studies / case.image.name).write_bytes(case.image.read_bytes())
        self.store().save_label(name, str(case.label), "final", json.loads(json.dumps(info)))

    def fill(self, count: int = 4) -> World:
        for n in range(count):
            self.add(f"c{n}", n)
        return self

    def store(self) -> LocalDatastore:
        return LocalDatastore(str(self.studies), extensions=["*.nii.gz"], auto_reload=False)

    def train(self, **request: Any) -> dict[str, Any]:
        return self.task({**SHORT, **request}, self.store())

    def files(self) -> dict[str, bytes]:
        """All that decides what answers."""
        folder = self.versions.folder
        found = [folder / "live.json", folder / "history.jsonl", *folder.glob("versions/*/*")]
        return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.exists()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the mean Dice that the next trainings reach."""
    reached: list[float] = []
    fit = adapt.fit
    monkeypatch.setattr(adapt, "fit", lambda *a: {**fit(*a), "mean_dice": reached[-1]})
    return reached.append


# from the store


@pytest.mark.parametrize("kind", [LocalDatastore, LocalStore])
def test_training_child_does_not_watch_the_store(world: World, monkeypatch, kind: type[LocalDatastore]) -> None:
    monkeypatch.setattr("os.nice", lambda _: 0)
    child = kind(str(world.studies), extensions=["*.nii.gz"], auto_reload=True)
    monkeypatch.setattr(adapt, "stored_cases", lambda _: 1 / child._observer.is_alive())
    with pytest.raises(ZeroDivisionError):
        AdaptTask(ROW, settings(world.folder), world.folder / "state", lambda: True)({}, child)


def test_training_child_leaves_the_servers_list_alone(world: World, monkeypatch) -> None:
    """Labels come and go in the folder while it trains; the list it began with is older than what the server saved."""
    monkeypatch.setattr("os.nice", lambda _: 0)
    world.fill(1)
    server, child = (LocalStore(str(world.studies), extensions=["*.nii.gz"]) for _ in range(2))

    def meanwhile(_: Any) -> None:
        server.update_label_info("c0", "final", {"provenance": "somebody's"})
        (world.studies / "labels" / "final" / "c0.nii.gz").rename(world.folder / "away.nii.gz")
        child.refresh()
        raise KilledError

    monkeypatch.setattr(adapt, "stored_cases", meanwhile)
    with pytest.raises(KilledError):
        AdaptTask(ROW, settings(world.folder), world.folder / "state", lambda: True)({}, child)
    listed = json.loads((world.studies / "datastore_v2.json").read_text())["objects"]["c0"]["labels"]
    assert listed["final"]["info"]["provenance"] == "somebody's"


def test_stored_cases_are_images_with_a_final_label(world: World) -> None:
    world.fill(2)
    (world.studies / "unlabelled.nii.gz").write_bytes((world.studies / "c0.nii.gz").read_bytes())
    (world.studies / "guessed.nii.gz").write_bytes((world.studies / "c0.nii.gz").read_bytes())
    world.store().save_label("guessed", str(world.folder / "new" / "labels_in" / "c0.nii.gz"), "original", dict(INFO))
    found, missing = stored_cases(world.store())
    assert missing == [] and [c.case for c in found] == ["c0", "c1"]
    assert all(c.image.is_file() and c.label.parent.name == "final" for c in found)
    assert found[0].values == dict(enumerate(LABELS, 1))


def test_labels_that_the_pacs_keeps_back_are_named_where_too_few_are_left(world: World, monkeypatch) -> None:
    monkeypatch.setattr(adapt, "stored_cases", lambda _: ([], ["3 final labels could not be read from the PACS."]))
    with pytest.raises(MONAILabelException) as refused:
        world.train()
    assert "no final labels found" in str(refused.value.msg) and "3 final labels could not" in str(refused.value.msg)


def test_config_offers_the_default_first(world: World) -> None:
    config = world.task.config()
    assert config["preset"] == ["auto", "frozen", "adapters", "full"]
    assert config["start"] == ["live", "new"]
    assert all(config[key] == getattr(ROW.recipe, key) for key in ("epochs", "loss", "lr", "patience"))
    json.dumps(world.task.info())


# bad input


def other_grid(world: World) -> None:
    image = nib.load(world.folder / "new" / "labels_in" / "c0.nii.gz")
    small = nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine)
    nib.save(small, world.studies / "labels" / "final" / "c0.nii.gz")


def moved(world: World) -> None:
    image = nib.load(world.folder / "new" / "labels_in" / "c0.nii.gz")
    affine = image.affine.copy()
    affine[0, 3] = 30
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), world.studies / "labels" / "final" / "c0.nii.gz")


def broken_image(world: World) -> None:
    (world.studies / "c0.nii.gz").write_bytes(b"no image" * 20)


def empty_label_file(world: World) -> None:
    (world.studies / "labels" / "final" / "c0.nii.gz").write_bytes(b"")


UNUSABLE: list[tuple[Callable[[World], None], str]] = [
    (other_grid, r"label on its image's grid \(32, 36, 6\); received \(31, 36, 6\)"),
    (moved, "same shape 30 mm away"),
    (lambda w: w.add("c0", 0, draw(0)[1] * 7), r"unknown values 7, 14"),
    (lambda w: w.add("c0", 0, np.zeros_like(draw(0)[1])), "no labelled voxel"),
    (broken_image, "Case 1 of [24] is left out"),
    (empty_label_file, "empty file of 0 bytes"),
]


@pytest.mark.parametrize(("spoil", "words"), UNUSABLE)
def test_unusable_case_leaves_too_few_and_the_message_says_which_and_how_many(world: World, spoil, words: str) -> None:
    spoil(world.fill(2))
    with pytest.raises(MONAILabelException, match=words) as caught:
        world.train()
    assert "2 final labels found, 1 usable, of 1 patient." in str(caught.value)
    assert "c0" not in str(caught.value)  # no identifier
    assert world.task.stats() == {"error": caught.value.msg}
    assert world.files() == {}


@pytest.mark.parametrize(("spoil", "words"), UNUSABLE)
def test_run_goes_on_with_the_usable_cases(world: World, spoil, words: str) -> None:
    spoil(world.fill(4))
    assert world.train()["version"] == "v0001"
    (sentence,) = world.task.stats()["left_out"]
    assert sentence.startswith("Case 1 of 4 is left out: ")
    assert set(world.versions.get("v0001").split) == {"c1", "c2", "c3"}


@pytest.mark.parametrize("gone", ["c0.nii.gz", "labels/final/c0.nii.gz"])
def test_run_goes_on_where_a_file_vanished(world: World, gone: str) -> None:
    """Between the store's list and the reading, as on a share; a store that is opened anew drops such a case itself."""
    store = world.fill(4).store()
    (world.studies / gone).unlink()
    assert world.task(SHORT, store)["version"] == "v0001"
    assert len(world.task.stats()["left_out"]) == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no final labels found, 0 usable, of 0 patients. Save final labels for more patients."),
        (["c0"], "1 final label found, 1 usable, of 1 patient. Save final labels for more patients."),
        (["p1_frame01", "p1_frame12"], "2 final labels found, 2 usable, of 1 patient."),
    ],
)
@pytest.mark.parametrize("labels", ["", "big, small one"])
def test_too_few_patients_are_counted(world: World, names: list[str], words: str, labels: str) -> None:
    for n, name in enumerate(names):
        world.add(name, n)
    if not names:
        (world.studies / "c0.nii.gz").write_bytes(write_case(world.folder / "new", "c0", 0).image.read_bytes())
    task = world.new_task(**({"labels": labels} if labels else {}))
    with pytest.raises(MONAILabelException) as caught:
        task(SHORT, world.store())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"epochs": "many"}, "epochs: expected a whole number, received 'many'"),
        ({"lr": 0}, "lr: expected a number above 0"),
        ({"preset": "huge"}, "preset: expected one of"),
        ({"loss": "dice"}, "loss: expected one of"),
        ({"augment": "wild"}, "augment: expected one of"),
    ],
)
def test_wrong_option_is_named(world: World, request_: dict[str, Any], words: str) -> None:
    with pytest.raises(MONAILabelException, match=words):
        world.fill(2).train(**request_)
    assert words.split(":")[0] in world.task.stats()["error"]
    assert world.files() == {}


def test_loss_that_is_no_number_reaches_the_client(world: World, monkeypatch) -> None:
    monkeypatch.setattr(train_step, "step_loss", lambda *_: (torch.zeros(()), {"loss": float("nan")}))
    with pytest.raises(MONAILabelException, match="loss became nan in step 1"):
        world.fill(2).train()
    assert "smaller lr" in world.task.stats()["error"]
    assert world.files() == {}


def test_series_of_one_patient_are_never_on_both_sides(world: World) -> None:
    """Six patients of two series each, whose identifier the split does not keep."""
    patients = {f"c{n}": f"patient-{n // 2}" for n in range(12)}
    for n, (case, patient) in enumerate(patients.items()):
        world.add(case, n)
        save_series(world.studies / case, series(PatientID=patient))
    world.train(steps=1)
    (version,) = world.versions.list()
    parts = {
        patient: {version.split[case] for case in patients if patients[case] == patient}
        for patient in patients.values()
    }
    assert len(version.split) == 12 and all(len(part) == 1 for part in parts.values())
    assert set.union(*parts.values()) == {"train", "val"}
    stored = (world.versions.folder / "split.json").read_text()
    assert len(json.loads(stored)["patients"]) == 6 and "patient-" not in stored


# what goes live


def test_first_version_that_learned_something_goes_live(world: World) -> None:
    done = world.fill(4).train(preset="full", epochs=3, steps=25, lr=2e-3, backbone_lr=2e-3)
    live = world.versions.live()
    assert done["live"] and live is not None and live.name == done["version"] == "v0001"
    assert (live.labels, live.backbone, live.backbone_digest) == (LABELS, "tiny", "random-0")
    assert live.mean_dice is not None and live.mean_dice > 0.1
    assert set(live.split.values()) == {"train", "val"} and len(live.split) == 4
    pairs = live.metrics["calibration"]  # raw quality and Dice, no case names
    assert set(pairs) == set(LABELS) and {len(p) for p in pairs.values()} == {len(live.metrics["cases"])}
    assert live.recipe["preset"] == "full" and live.recipe["options"] == ROW.options
    stats = world.task.stats()
    keys = {"epoch", "total_epochs", "best_metric", "total_time", "version", "live", "reason", "left_out"}
    assert keys <= set(stats)
    assert stats["epoch"] == stats["total_epochs"] == 3 and stats["live"] is True and "error" not in stats
    json.dumps(stats, allow_nan=False)
    runs = world.versions.folder / "runs"
    assert [p.name for p in runs.iterdir()] == ["v0001"]
    kept = {"progress.json", "tensorboard", "comparison.json", "worst.json", "worst-1.png"}
    assert {p.name for p in (runs / "v0001").iterdir()} == kept


def test_progress_is_shown_while_it_trains(world: World, monkeypatch) -> None:
    seen: list[dict[str, Any]] = []
    tell = adapt._Training._tell
    monkeypatch.setattr(adapt._Training, "_tell", lambda t, e: (tell(t, e), seen.append(world.task.stats())))
    world.fill(4).train(epochs=2)
    assert "cases to train" in seen[0]["plan"] and "slices" in seen[0]["plan"]
    assert [s["step"] for s in seen if "step" in s][:3] == [1, 2, 2]
    assert all(s["plan"] == seen[0]["plan"] for s in seen if "step" in s and "version" not in s)
    assert seen[-1]["version"] == "v0001"


def test_refused_challenger_leaves_the_live_version_untouched(world: World, dice) -> None:
    dice(0.5)
    assert world.fill(4).train()["live"]
    before = world.files()
    dice(0.0)
    world.add("c4", 4)
    done = world.train()
    assert (done["version"], done["live"]) == ("v0002", False)
    assert "does not beat" in done["reason"]
    assert world.versions.live_name() == "v0001"
    after = world.files()
    assert all(after[name] == content for name, content in before.items() if name != "history.jsonl")
    assert [line["decision"] for line in world.versions.history()] == ["promoted", "refused"]
    assert world.versions.get("v0002").parent == "v0001"


def test_better_challenger_goes_live(world: World, dice) -> None:
    for reached, name in ((0.5, "v0001"), (0.9, "v0002")):  # the incumbent is scored anew, and is a poor one
        dice(reached)
        done = world.fill(4).train(seed=int(name[-1]))
        assert done["live"] and done["version"] == name
        assert world.versions.live_name() == name


def test_next_training_goes_on_from_the_live_version_unless_told_not_to(world: World, dice, monkeypatch) -> None:
    begun: list[dict[str, torch.Tensor]] = []
    fit = adapt.fit

    def begin(work: Run, *more: Any) -> dict[str, Any]:
        begun.append({name: tensor.clone() for name, tensor in work.model.trained().items()})
        return fit(work, *more)

    monkeypatch.setattr(adapt, "fit", begin)
    dice(0.5)
    world.fill(4).train()
    assert "Starts anew: no version is live." in world.task.stats()["plan"]
    world.add("c4", 4)
    dice(0.0)  # refused: the third begins with the first too
    world.train()
    assert "Goes on from v0001." in world.task.stats()["plan"]
    world.train(start="new")
    assert "Starts anew: the recipe says so." in world.task.stats()["plan"]
    first, second, third = begun
    live = world.versions.tensors(world.versions.get("v0001"))
    assert all(torch.equal(second[name], tensor) for name, tensor in live.items())
    assert all(torch.equal(third[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(second[name], tensor) for name, tensor in first.items())
    assert [world.versions.get(f"v000{n}").recipe["start"] for n in (1, 2, 3)] == ["new", "v0001", "new"]


def test_incumbent_is_compared_by_name_when_labels_are_added(world: World, dice, monkeypatch) -> None:
    only_big = {"label_info": INFO["label_info"][:1]}
    for n in range(4):
        world.add(f"c{n}", n, np.where(draw(n)[1] == 1, 1, 0).astype(np.uint8), only_big)
    dice(0.5)
    world.train()
    assert world.versions.get("v0001").labels == ("big",)
    asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def spy(model: Learned, cases: Any, labels: Any, features: Any, own: Any = None) -> dict[str, Any]:
        asked.append((tuple(labels), tuple(own)))
        return evaluate(model, cases, labels, features, own=own)

    monkeypatch.setattr(adapt, "evaluate", spy)
    dice(0.9)
    done = world.fill(4).train()
    assert asked == [(LABELS, ("big",))]
    assert done["live"] and "on the same" in done["reason"]
    assert world.versions.live().labels == LABELS  # type: ignore[union-attr]


def test_incumbent_of_another_backbone_does_not_stand_in_the_way(world: World, dice, monkeypatch) -> None:
    dice(0.9)
    world.fill(4).train()
    monkeypatch.setattr(adapt.Engine, "warm", _renamed(adapt.Engine.warm))
    dice(0.1)
    done = world.train()
    assert done["live"] and "v0001, which was live, belongs to another backbone, so above 0 is enough" in done["reason"]


@pytest.mark.parametrize("start", ["live", "new"])
def test_incumbent_that_does_not_load_any_more_stands_in_no_way(world: World, dice, monkeypatch, start: str) -> None:
    """A program of before had tensors of another form."""
    dice(0.9)
    world.fill(4).train()
    monkeypatch.setattr(VersionStore, "tensors", lambda store, version: {"other": torch.zeros(1)})
    dice(0.1)
    done = world.train(start=start)
    assert done["live"] and "v0001, which was live, does not load any more" in done["reason"]
    assert start == "new" or "Starts anew: v0001 does not load any more." in world.task.stats()["plan"]


def test_version_is_stored_whatever_happens_while_the_live_one_is_scored(world: World, dice, monkeypatch) -> None:
    dice(0.5)
    world.fill(4).train()
    dice(0.9)
    with monkeypatch.context() as patch:
        patch.setattr(adapt, "evaluate", _raise(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError):
            world.train(seed=5)
    assert [v.name for v in world.versions.list()] == ["v0001", "v0002"] and world.versions.live_name() == "v0001"
    monkeypatch.setattr(adapt, "evaluate", lambda model, cases, labels, *_, **__: _scored(cases, labels, 0.5))
    done = world.train(seed=5)
    assert done["version"] == "v0002" and done["live"], done  # and not once more as v0003


def test_run_whose_stored_version_was_deleted_stores_it_again(world: World, dice, monkeypatch) -> None:
    dice(0.9)
    with monkeypatch.context() as patch:
        patch.setattr(VersionStore, "promote", _raise(KilledError()))
        with pytest.raises(KilledError):
            world.fill(4).train()
    shutil.rmtree(world.versions.folder / "versions" / "v0001")
    assert world.train()["live"] and world.versions.live_name() is not None


def test_rollback_while_the_live_version_is_scored_is_not_overridden(world: World, dice, monkeypatch) -> None:
    for value in (0.3, 0.5):
        dice(value)
        world.fill(4).train(seed=int(10 * value))
    asked: list[str] = []

    def rolled_back(model: Any, cases: Any, labels: Any, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(world.versions.live_name())
        if len(asked) == 1:
            world.versions.rollback("by hand")
        return _scored(cases, labels, 0.4)

    monkeypatch.setattr(adapt, "evaluate", rolled_back)
    dice(0.9)
    assert "beats 0.4000" in world.train(seed=7)["reason"]
    assert asked == ["v0002", "v0001"]


def _scored(cases: Any, labels: Any, dice: float) -> dict[str, Any]:
    row = dict.fromkeys(labels, 0.0)
    return {"mean_dice": dice, "dice": row, "cases": {c.case: row for c in cases}}


def _renamed(warm: Callable) -> Callable:
    def other(engine: Any) -> Any:
        backbone = warm(engine)
        backbone.weights_id = "other"
        return backbone

    return other


# kills


def test_killed_training_leaves_what_is_live(world: World, dice, monkeypatch) -> None:
    dice(0.5)
    world.fill(4).train()
    before = world.files()
    monkeypatch.setattr(adapt, "fit", _raise(KilledError()))
    with pytest.raises(KilledError):
        world.train(seed=5)
    assert world.files() == before


def _raise(error: Exception) -> Callable:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("where", ["write_model", "file_digest", "write_text"])
def test_killed_while_storing_leaves_no_half_version_and_goes_on_without_training(
    world: World, monkeypatch, where: str
) -> None:
    from lib.versions import store as versions

    with monkeypatch.context() as patch:
        patch.setattr(versions, where, _raise(KilledError()))
        with pytest.raises(KilledError):
            world.fill(4).train()
    assert (world.versions.list(), world.versions.live_name()) == ([], None)
    monkeypatch.setattr(train_step, "step_loss", _raise(AssertionError("trained again")))
    assert world.train()["version"] == "v0001"
    assert [v.name for v in world.versions.list()] == ["v0001"]


def test_unforeseen_error_is_told_without_what_it_may_name(world: World, monkeypatch) -> None:
    monkeypatch.setattr(adapt, "fit", _raise(RuntimeError("out of memory at /studies/patient7")))
    with pytest.raises(RuntimeError, match="out of memory"):
        world.fill(4).train()
    assert world.task.stats()["error"] == "RuntimeError: the server's log says more."

    monkeypatch.setattr(adapt, "fit", lambda *_: pytest.fail(str(world.task.stats())))  # not before the next one fails
    with pytest.raises(pytest.fail.Exception) as found:
        world.train()
    assert "error" not in str(found.value) and "plan" in str(found.value)


def test_disk_too_full_for_the_error_does_not_hide_it(world: World, monkeypatch) -> None:
    monkeypatch.setattr(adapt, "write_json", _raise(OSError(28, "No space left on device")))
    with pytest.raises(MONAILabelException, match="labelled"):
        world.train()


def test_progress_names_so_many_of_what_is_left_out_and_no_more(world: World, dice, monkeypatch) -> None:
    monkeypatch.setattr(adapt, "LEFT_OUT_SHOWN", 1)
    dice(0.5)
    for n in range(3):
        world.add(f"wrong{n}", n, np.zeros((3, 3, 3), np.uint8))
    world.fill(4).train()
    left_out = world.task.stats()["left_out"]
    assert len(left_out) == 2 and left_out[1] == "2 more are left out; the server's log names them."


def test_full_disk_while_storing_is_told(world: World, monkeypatch) -> None:
    monkeypatch.setattr(VersionStore, "add", _raise(WeightsError("Make room and try again.")))
    with pytest.raises(MONAILabelException, match="Make room"):
        world.fill(4).train()
    stats = world.task.stats()
    assert stats["error"] == "Make room and try again." and stats["epoch"] == 1
    assert world.versions.live_name() is None


def test_killed_between_storing_and_promoting_leaves_the_old_one_live(world: World, dice, monkeypatch) -> None:
    dice(0.9)
    with monkeypatch.context() as patch:
        patch.setattr(VersionStore, "promote", _raise(KilledError()))
        with pytest.raises(KilledError):
            world.fill(4).train()
    assert [v.name for v in world.versions.list()] == ["v0001"] and world.versions.live_name() is None
    assert world.train()["live"]


def interrupted(world: World, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A training that is killed after a step."""
    tell = adapt._Training._tell

    def kill(training: Any, entry: dict[str, Any]) -> None:
        tell(training, entry)
        if entry.get("step") == step:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "SAVE_S", -1.0)
        patch.setattr(adapt._Training, "_tell", kill)
        with pytest.raises(KilledError):
            world.train(steps=5)


def first_step(world: World, monkeypatch: pytest.MonkeyPatch, **request: Any) -> int:
    seen: list[int] = []
    tell = adapt._Training._tell
    with monkeypatch.context() as patch:
        patch.setattr(adapt._Training, "_tell", lambda t, e: (tell(t, e), seen.append(e.get("step", 0))))
        world.train(**{"steps": 5, **request})
    return next(s for s in seen if s)


def test_killed_run_goes_on_with_the_same_cases(world: World, monkeypatch) -> None:
    interrupted(world.fill(4), monkeypatch, 3)
    assert first_step(world, monkeypatch) == 4
    assert first_step(world, monkeypatch) == 1  # that run is over, the next is a new one


def test_second_training_of_the_same_method_is_refused(world: World, dice, monkeypatch) -> None:
    """Such as one by hand while the one of a server that was killed still runs."""
    second: list[str] = []

    def meanwhile(*_: Any) -> Any:
        with pytest.raises(MONAILabelException) as refused:
            world.train()
        second.append(str(refused.value.msg))
        raise KilledError

    monkeypatch.setattr(adapt, "fit", meanwhile)
    with pytest.raises(KilledError):
        world.fill(4).train()
    assert "one training of sam2rad at a time" in second[0]


CHANGES: list[tuple[Callable[[World], Any], dict[str, Any]]] = [
    (lambda w: w.add("c9", 9), {}),  # another case
    (lambda w: w.add("c0", 0, np.flip(draw(0)[1], 0)), {}),  # a corrected label
    (lambda w: None, {"lr": 2 * ROW.recipe.lr}),
    (lambda w: None, {"preset": "full"}),
]


@pytest.mark.parametrize(("change", "request_"), CHANGES)
def test_killed_run_is_dropped_for_another_question(world: World, monkeypatch, change, request_) -> None:
    interrupted(world.fill(4), monkeypatch, 3)
    change(world)
    assert first_step(world, monkeypatch, **request_) == 1


@pytest.mark.parametrize("alone", [lambda: True, None])
def test_training_in_a_process_of_its_own_gives_way_to_clicks(world: World, monkeypatch, alone) -> None:
    steps: list[int] = []
    monkeypatch.setattr(os, "nice", steps.append)
    world.fill(2)
    world.task = AdaptTask(ROW, settings(world.folder), world.folder / "state", alone)
    world.train()
    assert steps == ([adapt.NICE] if alone else [])


def test_server_trains_nothing_itself(world: World) -> None:
    world.fill(2)
    world.task = AdaptTask(ROW, settings(world.folder), world.folder / "state", lambda: False)
    with pytest.raises(MONAILabelException) as refused:
        world.train()
    assert "run_sync: expected false" in str(refused.value.msg) and world.task.stats() == {}


def test_stats_without_a_run_and_with_a_broken_file_are_empty(world: World) -> None:
    assert world.task.stats() == {}
    world.versions.folder.mkdir(parents=True)
    (world.versions.folder / "progress.json").write_text("{")
    assert world.task.stats() == {}
