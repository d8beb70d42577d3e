"""The record of a saved label: who, how long, what was changed of which answer, and what the store then holds."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import LabelNotFoundException

from infers.answers import PREFIX, Answers, together
from infers.base import BY_SLICE
from infers.records import USER, Records
from lib.data.volume import load_volume
from lib.errors import VolumeError
from lib.provenance import Kind, Provenance
from tests.cases import LABELS, draw
from tests.serving import ROOT

AFFINE = np.diag([1.0, 1.0, 5.0, 1.0])
INFO = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(LABELS, start=1)], "client_id": "anna"}
NUMBERS = {name: n for n, name in enumerate(LABELS, start=1)}


class Clock:
    """Seconds since 1970; stands still until told."""

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
    return Records(load_volume, lambda: {"sam2rad": "v0007"}, clock=clock)


@pytest.fixture
def answer(records: Records, store: LocalDatastore, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The server's inference: asked, answered, and the file removed as after sending."""

    def answered(voxels: np.ndarray, prompts: int = 0, dimension: int = 3, **reply: Any) -> dict[str, Any]:
        request = {"image": "case0", "model": "sam2rad", "client_id": "anna"} | reply.pop("request", {})
        records.asked(request)
        file = tmp_path / "answer.nii.gz"
        nib.save(nib.Nifti1Image(voxels.astype(np.uint8), AFFINE), file)
        record = Provenance.answered(prompts=prompts, task="sam2rad", method="sam2rad", version="v0007")
        params = {"label_names": NUMBERS, "provenance": record.to_json(), **reply}
        result = {"file": str(file), "label": str(file), "params": params}
        if request.get("save_label"):
            info = {"model": "sam2rad", "params": params}
            result["label"] = store.save_label("case0", str(file), request.get("label_tag", "original"), info)
        records.answered(store, request, result, dimension)
        file.unlink()
        return params

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


@pytest.fixture
def put(store: LocalDatastore, records: Records, save) -> Callable[..., dict[str, Any]]:
    """Saves as the wrapped server does: the record is made before."""

    def described(voxels: np.ndarray, tag: str = "final", user: Any = None, **info: Any) -> dict[str, Any]:
        record = records.describe(store, "case0", {**INFO, **info}, user).to_json()
        return save(voxels, tag, **info, provenance=record)

    return described


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
    store.save_label("case0", str(file), "original", {"params": {"label_names": NUMBERS}, "provenance": made})
    found = save(truth)
    assert (found["kind"], found["version"], found["changed"]["since"]) == ("SEMIAUTOMATIC", "v0003", "original")
    assert found["changed"]["dice"] == {"big": 1.0, "small one": 0.0}
    assert store.get_label_info("case0", "original")["provenance"] == made


@pytest.mark.parametrize("labels", [(), LABELS, ("background", *LABELS)])
def test_label_without_names_counts_by_the_numbers_of_the_answer(save, answer, records, labels) -> None:
    records._labels = labels
    answer(draw(0)[1])
    found = save(draw(0)[1], label_info=[])
    assert found["changed"] == {"since": "answer", "dice": dict.fromkeys(LABELS, 1.0), "voxels": 0}


def test_label_without_names_counts_by_the_servers_labels_first(save, answer, records) -> None:
    records._labels = LABELS
    truth = draw(0)[1]
    answer(truth == 2, label_names={LABELS[1]: 1})
    assert save(truth, label_info=[])["changed"]["dice"] == {LABELS[1]: 1.0}


def test_label_without_names_keeps_the_numbers_whatever_the_names_order(save, answer) -> None:
    answer(draw(0)[1], label_names={"z": 1, "a": 2})
    assert save(draw(0)[1], label_info=[])["changed"]["dice"] == {"a": 1.0, "z": 1.0}


def test_label_without_names_is_not_compared_with_answers_of_other_numbers(save, answer) -> None:
    for n, name in enumerate(LABELS, start=1):
        answer(draw(0)[1] == n, label_names={name: 1})
    found = save(draw(0)[1], label_info=[])
    assert (found["kind"], found["changed"]) == ("SEMIAUTOMATIC", None)
    assert save(draw(0)[1])["changed"]["dice"] == dict.fromkeys(LABELS, 1.0)


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


@pytest.mark.parametrize("handed", [{"client_id": "admin"}, {"client_id": ""}, {}])
def test_time_of_clients_without_a_name_counts_from_the_hand_out_too(save, store, handed) -> None:
    store.update_image_info("case0", {"strategy": {"mix": {"ts": 900, **handed}}})
    assert save(draw(0)[1], client_id="berta")["seconds_spent"] is None
    assert save(draw(0)[1], client_id=None)["seconds_spent"] == 100.0


@pytest.mark.parametrize("pauses, wanted", [((0,), 120), ((3.5 * 3600,), 720), ((5 * 3600,), 720), ((700, 90), 810)])
def test_long_pause_counts_as_ten_minutes(put, answer, clock, pauses, wanted) -> None:
    answer(draw(0)[1])
    for pause in pauses:
        clock.now += pause
        answer(draw(0)[1])
    clock.now += 120
    assert put(draw(0)[1])["seconds_spent"] == wanted


def test_hand_out_of_long_ago_and_a_clock_put_back_count_for_nothing(put, answer, store, clock) -> None:
    store.update_image_info("case0", {"strategy": {"mix": {"ts": 900, "client_id": "anna"}}})
    clock.now += 5 * 3600
    assert put(draw(0)[1])["seconds_spent"] is None
    answer(draw(0)[1])
    clock.now -= 3600
    assert put(draw(0)[1])["seconds_spent"] is None


@pytest.mark.parametrize("client", ["anna", None])
@pytest.mark.parametrize("option", ["save", "save_label"])
def test_answer_that_the_server_keeps_ends_the_time_of_work(keep, answer, clock, client, option) -> None:
    for pause in (60, 3600, 5 * 3600):
        answer(draw(0)[1], request={"client_id": client})
        clock.now += 30
        assert keep(option, client_id=client)["seconds_spent"] == 30.0
        clock.now += pause


def test_time_before_a_kept_answer_does_not_count_twice(keep, put, answer, clock) -> None:
    answer(draw(0)[1])
    clock.now += 100
    assert keep("save")["seconds_spent"] == 100.0
    clock.now += 5
    answer(draw(0)[1])
    clock.now += 10
    assert put(draw(0)[1])["seconds_spent"] == 10.0


@pytest.fixture
def keep(store: LocalDatastore, records: Records, answer, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Asks for an answer that the server keeps: by our option ``save`` or by MONAI Label's own."""

    def kept(option: str, tag: str = "original", **request: Any) -> dict[str, Any]:
        request = {"label_tag": tag, option: True, **request}
        reply = answer(draw(0)[1], request=request)
        if option == "save":
            file = tmp_path / "kept.nii.gz"
            nib.save(nib.Nifti1Image(draw(0)[1], AFFINE), file)
            asked = {"image": "case0", "client_id": "anna", **request}
            record = records.kept(store, asked, reply["provenance"])
            store.save_label("case0", str(file), tag, {"model": "sam2rad", "params": reply, "provenance": record})
            records.saved(store, "case0")
        return store.get_label_info("case0", tag)["provenance"]

    return kept


@pytest.mark.parametrize("option", ["save", "save_label"])
def test_record_of_a_kept_answer_is_beside_its_label(keep, store, option) -> None:
    found = keep(option, tag="first_guess")
    assert Provenance.from_json(found).kind is Kind.AUTOMATIC
    assert (found["user"], found["declared"], found["saved"], found["seconds_spent"]) == ("anna", True, False, 0.0)
    assert found["live"] == {"sam2rad": "v0007"}
    assert (store.get_label_info("case0", "first_guess")["params"]["label_names"], found["task"]) == (
        NUMBERS,
        "sam2rad",
    )


def test_what_is_said_slice_by_slice_is_not_kept_in_the_list_of_labels(answer, store) -> None:
    """MONAI Label writes the whole list at every hand-out: tables of a thousand drafts took three seconds."""
    tables = {name: {"liver": {str(k): 0.5 for k in range(200)}} for name in BY_SLICE}
    told = answer(draw(0)[1], request={"save_label": True}, version="v0007", **tables)
    kept = store.get_label_info("case0", "original")["params"]
    assert set(tables) <= set(told) and not set(tables) & set(kept)
    assert (kept["version"], kept["label_names"]) == ("v0007", NUMBERS)


def test_label_of_a_batch_has_a_record_and_no_time(keep, answer, save, store, clock) -> None:
    store.update_image_info("case0", {"strategy": {"mix": {"ts": 900, "client_id": "admin"}}})
    answer(draw(0)[1], request={"client_id": None})
    found = keep("save_label", batch=True, client_id=None)
    assert (found["user"], found["seconds_spent"], found["live"]) == ("", None, {"sam2rad": "v0007"})
    clock.now += 50
    assert save(draw(0)[1], client_id=None)["seconds_spent"] == 150.0  # a batch ends nobody's work


def test_kept_label_that_is_gone_before_it_has_its_record_harms_nothing(answer, store, monkeypatch, caplog) -> None:
    monkeypatch.setattr(store, "update_label_info", _gone)
    assert answer(draw(0)[1], request={"save_label": True})["provenance"]["user"] == "anna"
    assert "cannot be completed: no such label" in caplog.text


def _gone(*_: Any) -> None:
    raise LabelNotFoundException("no such label")


def test_answers_count_for_who_asked(put, answer, records, store) -> None:
    answer(draw(0)[1], prompts=20)
    found = put(draw(0)[1], client_id="bob")
    assert (found["kind"], found["prompts"], found["task"], found["changed"]) == ("MANUAL", 0, "", None)
    found = put(draw(0)[1])
    assert (found["kind"], found["prompts"], found["user"]) == ("SEMIAUTOMATIC", 20, "anna")
    assert put(draw(0)[1], client_id="bob")["kind"] == "MANUAL"


def test_answers_of_an_authenticated_user_count_whatever_the_client_calls_itself(put, answer) -> None:
    answer(draw(0)[1], prompts=3, request={"client_id": "slicer-1", USER: "Dr. Berta"})
    assert put(draw(0)[1], client_id="slicer-1")["kind"] == "MANUAL"
    found = put(draw(0)[1], user="Dr. Berta", client_id="slicer-2")
    assert (found["prompts"], found["user"], found["declared"]) == (3, "Dr. Berta", False)


def test_answers_count_again_for_a_label_that_is_corrected_soon(put, answer, clock) -> None:
    answer(draw(0)[1], prompts=20)
    for _ in range(2):
        clock.now += 1800
        assert put(draw(0)[1])["prompts"] == 20
    clock.now += 1800
    answer(draw(0)[1], prompts=5, label_names={"big": 1})
    clock.now += 7200
    assert put(draw(0)[1])["prompts"] == 25  # work on this label goes on
    clock.now += 7200
    found = put(draw(0)[1])
    assert (found["kind"], found["asked"]) == ("MANUAL", None)  # by hand, or out of the label of before
    clock.now += 7200
    answer(draw(0)[1], prompts=1)
    assert put(draw(0)[1])["prompts"] == 1


def test_draft_by_hand_is_no_label_of_the_model(put, store, clock) -> None:
    clock.now += 5 * 3600  # long after the start
    assert put(np.roll(draw(0)[1], 2, axis=0), "original")["kind"] == "MANUAL"
    found = put(draw(0)[1])
    assert (found["kind"], found["task"], found["changed"], found["asked"]) == ("MANUAL", "", None, False)


def test_draft_with_a_strange_record_is_another_programs(put, store, tmp_path: Path) -> None:
    file = tmp_path / "draft.nii.gz"
    nib.save(nib.Nifti1Image(draw(0)[1], AFFINE), file)
    store.save_label("case0", str(file), "original", {"model": "theirs", "provenance": {"who": "knows"}})
    found = put(draw(0)[1])
    assert (found["kind"], found["task"], found["asked"]) == ("SEMIAUTOMATIC", "theirs", None)


def test_whether_a_model_was_asked_is_not_known_after_a_start(put, answer, store, clock) -> None:
    assert put(draw(0)[1])["asked"] is None  # the server runs since now
    clock.now += 60
    store.update_image_info("case0", {"strategy": {"mix": {"ts": int(clock.now), "client_id": "berta"}}})
    store.remove_label("case0", "final")
    assert put(draw(0)[1], client_id="berta")["asked"] is False  # who was handed the image after the start
    store.remove_label("case0", "final")
    clock.now += 5 * 3600
    assert put(draw(0)[1], client_id="carla")["asked"] is False
    answer(draw(0)[1], request={"client_id": "carla"})
    found = put(draw(0)[1], client_id="carla")
    assert (found["kind"], found["asked"]) == ("SEMIAUTOMATIC", True)
    assert put(draw(0)[1], client_id="berta")["asked"] is None  # it may be carla's label, corrected


@pytest.mark.parametrize("answered", [{"file": "uncertainty"}, {"label_names": {}}])
def test_whether_a_model_was_asked_is_not_known_without_its_answer(put, answer, clock, answered) -> None:
    clock.now += 5 * 3600
    answer(draw(0)[1], **answered)
    found = put(draw(0)[1])
    assert (found["kind"], found["asked"]) == ("MANUAL", None)


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


def test_answer_that_the_server_keeps_is_the_authenticated_users(store, records) -> None:
    request = {"image": "case0", "client_id": "anna", USER: "Dr. Berta"}
    found = records.kept(store, request, Provenance.answered(prompts=2).to_json())
    assert (found["user"], found["declared"]) == ("Dr. Berta", False)


@pytest.mark.parametrize("user", [None, "", 5, ["x"]])
def test_strange_user_is_nobody(store, records, user) -> None:
    request = {"image": "case0", "client_id": 7, USER: user}
    records.asked(request)
    found = records.kept(store, request, Provenance.answered(prompts=2).to_json())
    assert (found["user"], found["declared"]) == ("", False)


def test_comparison_is_with_the_answers_at_the_save(store, records, answer, tmp_path, monkeypatch) -> None:
    truth = draw(0)[1]
    answer(truth)
    hold = threading.Event()
    real = Records._change
    monkeypatch.setattr(Records, "_change", lambda self, *args: hold.wait(30) and real(self, *args))
    monkeypatch.setattr(records._answers, "_limit", 1)
    file = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(truth, AFFINE), file)
    store.save_label("case0", str(file), "final", dict(INFO))
    done = records.saved(store, "case0", wait_s=0.01)
    answer(np.zeros_like(truth))  # a further click, and one on another image, for which the first one must go
    answer(truth, request={"image": "case1"})
    hold.set()
    done.result(30)
    change = store.get_label_info("case0", "final")["provenance"]["changed"]
    assert change == {"since": "answer", "dice": dict.fromkeys(LABELS, 1.0), "voxels": 0}


@pytest.mark.parametrize("ts", ["x", None, [1], float("nan"), float("inf"), 10**400, -5])
def test_time_that_a_client_wrote_is_passed_over(save, store, answer, ts) -> None:
    save(draw(0)[1], "original")
    store.update_label_info("case0", "original", {"ts": ts})
    store.update_image_info("case0", {"strategy": {"mix": {"ts": ts, "client_id": "anna"}}})
    answer(draw(0)[1])
    found = save(draw(0)[1])
    assert (found["kind"], found["seconds_spent"]) == ("SEMIAUTOMATIC", 0.0)


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


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch) -> Path:
    """A folder for temporary files of its own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_answers_forget_the_oldest_images_and_their_files(scratch, tmp_path: Path) -> None:
    answers, file = Answers(limit_bytes=25), tmp_path / "a.nrrd"
    file.write_bytes(b"x" * 10)
    for image in ("a", "b", "a", "c"):
        answers.add((image, "anna"), file, {1: "big"}, Provenance.answered(prompts=0), None)
    a, b, c, d = ((image, "anna") for image in "abcd")
    assert answers.of(b) == {} and answers.of(a) and answers.of(c) and answers.of(("a", "bob")) == {}
    assert not answers.is_complete(b) and answers.is_complete(a)
    (folder,) = (path for path in scratch.iterdir() if path.is_dir())
    assert len(list(folder.iterdir())) == 2
    big = tmp_path / "big.nrrd"
    big.write_bytes(b"x" * 100)
    held = answers.of(a)
    answers.add(d, big, {1: "big"}, Provenance.answered(prompts=0), None)
    assert answers.of(a) == {} and answers.of(d)  # what was asked for last always stays
    assert all(answer.file.exists() for answer in held.values()) and len(list(folder.iterdir())) == 2
    held.clear()
    assert len(list(folder.iterdir())) == 1
    answers.forget(b)
    assert answers.is_complete(b)
    del answers
    gc.collect()
    assert list(scratch.iterdir()) == []


def test_answers_go_on_in_a_new_folder_where_theirs_was_removed(scratch, tmp_path: Path) -> None:
    answers, file = Answers(), tmp_path / "a.nrrd"
    file.write_bytes(b"x")
    a, b = ("a", "anna"), ("b", "anna")
    answers.add(a, file, {1: "big"}, Provenance.answered(prompts=0), None)
    for folder in [path for path in scratch.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    answers.add(b, file, {1: "big"}, Provenance.answered(prompts=0), None)
    assert answers.of(a) == {} and not answers.is_complete(a)
    (kept,) = answers.of(b).values()
    assert kept.file.read_bytes() == b"x" and answers.is_complete(b)


def test_answer_that_cannot_be_kept_is_missed_and_nothing_else(answer, records, monkeypatch, caplog) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/tmp/Doe^Jane.nrrd")

    monkeypatch.setattr("infers.answers.os.link", full)
    monkeypatch.setattr("infers.answers.shutil.copyfile", full)
    answer(draw(0)[1])
    assert "No space left" in caplog.text and "Doe" not in caplog.text


ABANDONED = """
import os, sys
from pathlib import Path
from infers.answers import Answers
from lib.provenance import Provenance
answers = Answers()
answers.add(("a", ""), Path(sys.argv[1]), {1: "big"}, Provenance.answered(prompts=0), None)
os.kill(os.getpid(), 9)
"""


def test_answers_of_a_killed_server_go_and_those_of_a_running_one_stay(scratch, tmp_path: Path) -> None:
    file = tmp_path / "a.nrrd"
    file.write_bytes(b"x")
    env = {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "PATH": ""}
    assert subprocess.run([sys.executable, "-c", ABANDONED, str(file)], env=env).returncode == -9
    (left,) = (path for path in scratch.iterdir() if path.is_dir())
    assert left.name.startswith(PREFIX) and len(list(left.iterdir())) == 1
    (scratch / f"{PREFIX}link").symlink_to(tmp_path)
    first, second = Answers(), Answers()
    for answers in (first, second):
        answers.add(("a", ""), file, {1: "big"}, Provenance.answered(prompts=0), None)
    assert not left.exists() and file.exists()
    assert all(answer.file.exists() for one in (first, second) for answer in one.of(("a", "")).values())


def test_together_says_why_an_answer_cannot_be_read(store, tmp_path: Path) -> None:
    answers, file = Answers(), tmp_path / "a.nii.gz"
    file.write_bytes(b"nonsense" * 50)
    answers.add(("case0", ""), file, {1: "big"}, Provenance(kind=Kind.AUTOMATIC), None)
    with pytest.raises(VolumeError):
        together(answers.of(("case0", "")), load_volume(store.get_image_uri("case0")))


def test_save_stands_whatever_becomes_of_its_record(records, store, save, caplog, monkeypatch) -> None:
    save(draw(0)[1])
    monkeypatch.setattr(store, "get_labels_by_image_id", _away)
    with caplog.at_level(logging.WARNING):
        assert records.saved(store, "case0") is None
    assert "cannot be completed: OSError" in caplog.text and "/x" not in caplog.text


def _away(_: str) -> dict[str, str]:
    raise OSError("/x")
