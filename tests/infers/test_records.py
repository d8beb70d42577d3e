"""The record of a saved label: who, how long, what was changed of which answer, and what the store then holds."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore

from infers.answers import Answers, together
from infers.records import Records
from lib.data.volume import load_volume
from lib.errors import VolumeError
from lib.provenance import Kind, Provenance
from tests.cases import LABELS, draw

AFFINE = np.diag([1.0, 1.0, 5.0, 1.0])
INFO = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(LABELS, start=1)], "client_id": "anna"}
NUMBERS = {name: n for n, name in enumerate(LABELS, start=1)}


class Clock:
    """Stands still until told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> LocalDatastore:
    folder = tmp_path / "studies"
    folder.mkdir()
    for n in range(2):
        nib.save(nib.Nifti1Image(draw(n)[0], AFFINE), folder / f"case{n}.nii.gz")
    return LocalDatastore(str(folder))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(clock: Clock) -> Records:
    return Records(load_volume, lambda: {"sam2rad": "v0007"}, clock)


@pytest.fixture
def answer(records: Records, tmp_path: Path) -> Callable[..., None]:
    """The server's inference: asked, answered, and the file removed as after sending."""

    def answered(voxels: np.ndarray, prompts: int = 0, dimension: int = 3, **reply: Any) -> None:
        request = {"image": "case0", "model": "sam2rad", "client_id": "anna"} | reply.pop("request", {})
        records.asked(request)
        file = tmp_path / "answer.nii.gz"
        nib.save(nib.Nifti1Image(voxels.astype(np.uint8), AFFINE), file)
        record = Provenance.answered(prompts=prompts, task="sam2rad", method="sam2rad", version="v0007")
        params = {"label_names": NUMBERS, "provenance": record.to_json(), **reply}
        records.answered(request, {"file": str(file), "params": params}, dimension)
        file.unlink()

    return answered


@pytest.fixture
def save(store: LocalDatastore, records: Records, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def saved(voxels: np.ndarray, tag: str = "final", **info: Any) -> dict[str, Any]:
        file = tmp_path / "label.nii.gz"
        nib.save(nib.Nifti1Image(voxels.astype(np.uint8), AFFINE), file)
        store.save_label("case0", str(file), tag, json.loads(json.dumps({**INFO, **info})))
        done = records.saved(store, "case0")
        if done is not None:
            done.result(30)
        found = store.get_label_info("case0", tag)["provenance"]
        assert Provenance.from_json(found).to_json() == found
        return found

    return saved


def test_label_that_no_model_touched_is_manual(save) -> None:
    found = save(draw(0)[1])
    assert (found["kind"], found["saved"], found["changed"], found["seconds_spent"]) == ("MANUAL", True, None, None)
    assert (found["user"], found["declared"], found["live"]) == ("anna", True, {"sam2rad": "v0007"})
    assert (found["version"], found["prompts"]) == ("", 0)


def test_label_after_an_answer_tells_the_version_and_what_was_changed(save, answer, clock) -> None:
    truth = draw(0)[1]
    answer(np.roll(truth, 2, axis=0), prompts=3)
    clock.now += 42
    found = save(truth)
    assert (found["kind"], found["version"], found["prompts"], found["seconds_spent"]) == (
        "SEMIAUTOMATIC", "v0007", 3, 42.0,
    )  # fmt: skip
    change = found["changed"]
    assert change["since"] == "answer" and change["voxels"] == int((truth != np.roll(truth, 2, axis=0)).sum())
    wanted = {
        name: 2 * ((truth == n) & (np.roll(truth, 2, axis=0) == n)).sum() / (2 * (truth == n).sum())
        for name, n in NUMBERS.items()
    }
    assert change["dice"] == pytest.approx(wanted, abs=1e-3)


def test_answer_that_was_saved_as_it_is_was_looked_at(save, answer) -> None:
    answer(draw(0)[1])
    found = save(draw(0)[1])
    assert (found["kind"], found["prompts"]) == ("SEMIAUTOMATIC", 0)
    assert found["changed"] == {"since": "answer", "dice": dict.fromkeys(LABELS, 1.0), "voxels": 0}


def test_stored_label_of_the_model_counts_where_no_answer_is_remembered(save, store, tmp_path: Path) -> None:
    truth = draw(0)[1]
    file = tmp_path / "draft.nii.gz"
    nib.save(nib.Nifti1Image(np.where(truth == 2, 0, truth).astype(np.uint8), AFFINE), file)
    made = Provenance.answered(prompts=0, task="sam2rad", version="v0003").to_json()
    store.save_label("case0", str(file), "original", {"params": {"label_names": NUMBERS, "provenance": made}})
    found = save(truth)
    assert (found["kind"], found["version"], found["changed"]["since"]) == ("SEMIAUTOMATIC", "v0003", "original")
    assert found["changed"]["dice"] == {"big": 1.0, "small one": 0.0}
    assert "provenance" not in store.get_label_info("case0", "original")  # only what was saved gets one


def test_answers_for_one_structure_after_the_other_add_up(save, answer) -> None:
    truth = draw(0)[1]
    answer(truth == 1, prompts=2, label_names={"big": 1})
    answer(np.zeros_like(truth), prompts=5, label_names={"small one": 1})
    answer(truth == 2, prompts=6, label_names={"small one": 1})  # a further click
    found = save(truth)
    assert found["changed"]["voxels"] == 0 and found["prompts"] == 8


def test_answers_about_single_slices_add_up(save, answer) -> None:
    truth = draw(0)[1]
    for k in range(1, 5):
        slice_only = np.zeros_like(truth)
        slice_only[:, :, k] = truth[:, :, k] == 1
        answer(slice_only, prompts=1, dimension=2, label_names={"big": 1}, prompted=[k])
    found = save(truth)
    assert found["changed"]["dice"] == {"big": 1.0} and found["prompts"] == 4
    answer(np.zeros_like(truth), label_names={"big": 1})  # the whole volume again
    assert save(truth)["changed"]["dice"] == {"big": 0.0}


@pytest.mark.parametrize("request_", [{"batch": True}, {"image": "/tmp/x.nii.gz"}, {"image": "case1"}])
def test_answers_that_nobody_saw_do_not_count(save, answer, request_) -> None:
    answer(draw(0)[1], request=request_)
    assert save(draw(0)[1])["kind"] == "MANUAL"


def test_answers_about_other_structures_do_not_count(save, answer, store, tmp_path: Path) -> None:
    answer(draw(0)[1], label_names={"lung": 1})
    assert save(draw(0)[1])["kind"] == "MANUAL"
    file = tmp_path / "draft.nii.gz"
    nib.save(nib.Nifti1Image(draw(0)[1], AFFINE), file)
    store.save_label("case0", str(file), "original", {"params": {"label_names": {"lung": 1}}})
    assert save(draw(0)[1])["kind"] == "MANUAL"
    assert save(draw(0)[1], label_info=[])["kind"] == "SEMIAUTOMATIC"  # who knows


def test_map_of_uncertainty_is_no_answer(save, answer) -> None:
    answer(draw(0)[1], file="uncertainty")
    assert save(draw(0)[1])["kind"] == "MANUAL"


def test_time_counts_from_the_hand_out_to_this_client(save, answer, store, clock) -> None:
    store.update_image_info("case0", {"strategy": {"mix": {"ts": 900, "client_id": "anna"}}})
    answer(draw(0)[1])
    clock.now += 60
    assert save(draw(0)[1])["seconds_spent"] == 160.0
    clock.now += 60
    assert save(draw(0)[1])["seconds_spent"] is None  # nobody knows when this work began
    assert save(draw(0)[1], client_id="berta")["seconds_spent"] is None
    answer(draw(0)[1])
    clock.now += 5 * 3600
    assert save(draw(0)[1])["seconds_spent"] is None  # it was left open


def test_authenticated_user_is_not_declared(store, records) -> None:
    found = records.describe(store, "case0", {"client_id": "anna"}, "Dr. Berta")
    assert (found.user, found.declared) == ("Dr. Berta", False)
    assert records.describe(store, "case0", {}).declared is False
    assert len(records.describe(store, "case0", {"client_id": "x" * 5000}).user) == 100


def test_answer_that_the_server_keeps_has_a_user_and_stays_what_it_was(store, records, clock) -> None:
    request = {"image": "case0", "client_id": "anna"}
    records.asked(request)
    clock.now += 7
    made = Provenance.answered(prompts=2, task="sam").to_json()
    found = records.kept(store, request, made)
    assert {k: v for k, v in found.items() if made[k] != v} == {
        "user": "anna", "declared": True, "seconds_spent": 7.0, "live": {"sam2rad": "v0007"},
    }  # fmt: skip


def test_long_comparison_holds_nobody_up_and_a_later_save_wins(store, records, answer, tmp_path, monkeypatch) -> None:
    answer(draw(0)[1])
    hold = threading.Event()
    real = Records._change
    monkeypatch.setattr(Records, "_change", lambda self, *args: hold.wait(30) and real(self, *args))
    file = tmp_path / "label.nii.gz"
    pending = []
    for voxels in (draw(1)[1], draw(0)[1]):
        nib.save(nib.Nifti1Image(voxels, AFFINE), file)
        store.save_label("case0", str(file), "final", dict(INFO))
        pending.append(records.saved(store, "case0", wait_s=0.01))
    assert store.get_label_info("case0", "final")["provenance"]["changed"] is None
    hold.set()
    for done in pending:
        done.result(30)
    assert store.get_label_info("case0", "final")["provenance"]["changed"]["voxels"] == 0


def test_label_that_cannot_be_compared_keeps_its_record(save, answer, caplog) -> None:
    answer(draw(0)[1])
    with caplog.at_level(logging.WARNING):
        found = save(draw(0)[1][:-1])
    assert found["kind"] == "SEMIAUTOMATIC" and found["changed"] is None
    assert "on its image's grid" in caplog.text and "case0" not in caplog.text


def test_answers_forget_the_oldest_images_and_their_files(tmp_path: Path) -> None:
    answers, file = Answers(limit_bytes=25), tmp_path / "a.nrrd"
    file.write_bytes(b"x" * 10)
    for image in ("a", "b", "a", "c"):
        answers.add(image, file, {1: "big"}, Provenance.answered(prompts=0), None)
    assert answers.of("b") == {} and answers.of("a") and answers.of("c")
    (folder,) = {a.file.parent for a in answers.of("a").values()}
    assert len(list(folder.iterdir())) == 2
    big = tmp_path / "big.nrrd"
    big.write_bytes(b"x" * 100)
    answers.add("d", big, {1: "big"}, Provenance.answered(prompts=0), None)
    assert answers.of("a") == {} and answers.of("d")  # what was asked for last always stays


def test_together_says_why_an_answer_cannot_be_read(store, tmp_path: Path) -> None:
    answers, file = Answers(), tmp_path / "a.nii.gz"
    file.write_bytes(b"nonsense" * 50)
    answers.add("case0", file, {1: "big"}, Provenance(kind=Kind.AUTOMATIC), None)
    with pytest.raises(VolumeError):
        together(answers.of("case0"), load_volume(store.get_image_uri("case0")))


def test_save_stands_whatever_becomes_of_its_record(records, store, save, caplog, monkeypatch) -> None:
    save(draw(0)[1])
    monkeypatch.setattr(store, "get_labels_by_image_id", _away)
    with caplog.at_level(logging.WARNING):
        assert records.saved(store, "case0") is None
    assert "cannot be completed: OSError" in caplog.text and "/x" not in caplog.text


def _away(_: str) -> dict[str, str]:
    raise OSError("/x")
