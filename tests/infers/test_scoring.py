"""The scoring methods on a store of labelled phantoms: what they find, what they write, what they leave alone."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import MONAILabelException

from infers import scoring
from infers.dicom_store import DicomStore
from infers.pacs import PacsError
from infers.scoring import AgreementScoring, QualityScoring, StoreScoring
from infers.stored import stored_map
from lib.dicom_seg import write_seg
from lib.provenance import Change, Kind, Provenance
from lib.quality.checks import LabelMap
from tests.cases import LABELS, draw
from tests.pacs import write_series
from tests.phantoms import ellipsoid

AFFINE = np.diag([1.0, 1.0, 5.0, 1.0])
NAMES = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(LABELS, start=1)]}


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Nine images."""
    folder = tmp_path / "studies"
    folder.mkdir()
    for n in range(9):
        nib.save(nib.Nifti1Image(draw(n)[0], AFFINE), folder / f"case{n}.nii.gz")
    return folder


@pytest.fixture
def store(studies: Path) -> LocalDatastore:
    return LocalDatastore(str(studies))


@pytest.fixture
def save(store: LocalDatastore, tmp_path: Path) -> Callable[..., None]:
    def saved(case: int, voxels: np.ndarray, tag: str = "final", info: Any = NAMES, affine: Any = AFFINE) -> None:
        file = tmp_path / "label.nii.gz"
        nib.save(nib.Nifti1Image(voxels, affine), file)
        store.save_label(f"case{case}", str(file), tag, json.loads(json.dumps(info)))

    return saved


@pytest.fixture
def run(store: LocalDatastore, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def ran(kind: type[StoreScoring] = QualityScoring, labels: tuple[str, ...] = (), **request: Any) -> dict[str, Any]:
        method = kind(tmp_path / "state", labels, lambda: False)
        counts = method({"method": method.name, "gpus": "all", **request}, store)
        found = json.loads((tmp_path / "state" / f"{method.name}.json").read_text())
        assert found["summary"] == counts
        return found

    return ran


def reasons(found: dict[str, Any]) -> dict[str, list[str]]:
    """Checks by case, of those that have any, in the list's order."""
    return {c["case"]: [r["check"] for r in c["reasons"]] for c in found["cases"] if c["reasons"]}


def test_good_labels_are_not_remarkable(save, run) -> None:
    for n in range(9):
        save(n, draw(n)[1])
    found = run()
    assert reasons(found) == {}
    assert found["summary"] == {"cases": 9, "left_out": 0, "to_look_at": 0, "checks": {}}


def test_defects_are_ranked_with_reasons_and_weights(save, run, studies: Path) -> None:
    for n in range(9):
        voxels = draw(n)[1]
        if n == 1:
            voxels[:] = 0
        if n == 2:
            voxels[:, :, 2] = 0
        if n == 3:
            voxels[1, 1, 0] = 1
        if n == 4:
            voxels[0, 0, 0] = 9
        if n == 6:
            voxels[voxels == 2] = 0
        save(n, voxels, affine=np.diag([1.0, 1.0, 4.0, 1.0]) if n == 5 else AFFINE)
    (studies / "labels" / "final" / "case7.nii.gz").write_bytes(b"")
    found = run(rules={"island_share": 0.2, "majority": 0.8})
    told = reasons(found)
    assert list(told)[:2] == ["case5", "case7"]
    assert told["case1"] == ["empty"] and "gap" in told["case2"] and "islands" in told["case3"]
    assert "unknown" in told["case4"] and told["case5"] == ["grid"] and told["case7"] == ["unreadable"]
    scores = [c["score"] for c in found["cases"]]
    assert scores == sorted(scores, reverse=True) and [c["rank"] for c in found["cases"]] == list(range(1, 10))
    for case in found["cases"]:
        assert case["score"] == pytest.approx(sum(r["weight"] for r in case["reasons"]), abs=0.01)
        assert all(r["reason"].endswith(".") and case["case"] not in r["reason"] for r in case["reasons"])


def test_labels_of_the_model_are_looked_at_where_no_final_one_is(save, run) -> None:
    bad = draw(0)[1]
    bad[1, 1, 0] = 1
    save(0, bad, "original", {"params": {"label_names": {"big": 1, "small one": 2}}})
    save(1, bad, "original")
    save(1, draw(1)[1])
    save(2, draw(2)[1], "draft_of_mine")
    found = run()
    assert {c["case"]: c["tag"] for c in found["cases"]} == {"case0": "original", "case1": "final"}
    assert reasons(found)["case0"] == ["islands"]
    assert {c["case"]: c["tag"] for c in run(y="draft_of_mine")["cases"]}["case2"] == "draft_of_mine"


def test_disagreement_with_the_model_counts_by_its_size(save, run) -> None:
    for n, moved in ((0, 0), (1, 3), (2, 12)):
        save(n, draw(n)[1])
        save(n, np.roll(draw(n)[1], moved, axis=0), "original", {"label_names": {"big": 1, "small one": 2}})
    found = run(rules={"majority": 1.0})
    weights = {
        c["case"]: sum(r["weight"] for r in c["reasons"] if r["check"] == "disagreement") for c in found["cases"]
    }
    assert weights["case2"] > weights["case1"] >= weights["case0"] == 0
    same = next(c for c in found["cases"] if c["case"] == "case0")
    assert (same["dice"], same["dice_of"]) == ({"big": 1.0, "small one": 1.0}, "label")


def corrected(dice: dict[str, float], since: str = "answer") -> dict[str, Any]:
    """What the store keeps of a label that a person made of a model's answer in Slicer."""
    change = Change(since, dice, 7)
    return {**NAMES, "provenance": Provenance(kind=Kind.SEMIAUTOMATIC, saved=True, changed=change).to_json()}


def test_record_stands_in_for_a_model_label_that_was_not_stored(save, run) -> None:
    for n in range(3):
        save(n, draw(n)[1], info=corrected({"big": 0.4, "small one": 0.9}))
    save(1, draw(1)[1], "original", {"label_names": {"big": 1, "small one": 2}})
    save(3, draw(3)[1], info={**NAMES, "provenance": {"kind": "nonsense"}})
    save(4, draw(4)[1], info=corrected({"big": float("inf")}))
    found = {c["case"]: c for c in run()["cases"]}
    said = "big: Dice 0.40 with what the model had said when the label was saved."
    assert [r["reason"] for r in found["case0"]["reasons"]] == [said]
    assert found["case0"]["score"] == pytest.approx(5 * 0.6)
    assert {case: one["dice_of"] for case, one in found.items()} == {
        "case0": "record", "case1": "label", "case2": "record", "case3": "", "case4": "record",
    }  # fmt: skip
    assert not found["case1"]["reasons"] and found["case1"]["dice"]["big"] == 1.0
    assert found["case4"]["dice"] == {}
    assert run(y_pred="second_reader")["cases"][0]["dice_of"] == ""  # the record is about no second reader


def test_names_exchanged_against_the_models_label_are_told(save, run) -> None:
    right = draw(0)[1]
    save(0, np.array([0, 2, 1], np.uint8)[right])
    save(0, right, "original", {"label_names": {"big": 1, "small one": 2}})
    assert "Names are exchanged: big and small one lie" in str(run()["cases"])


def test_background_is_no_structure(save, run) -> None:
    """Clients offer the name for clicks on what is none of the labels; training takes it for nothing."""
    for n in range(9):
        voxels = draw(n)[1]
        save(n, voxels)
        voxels[voxels == 0] = 3
        if n == 4:
            save(n, voxels, info={"label_info": [*NAMES["label_info"], {"name": "background", "idx": 3}]})
    assert reasons(run()) == {}


def missing_file(lost: str, store: Any, image: str, tag: str, *more: Any) -> LabelMap:
    """A label file that another process takes away while we look at it."""
    if (image, tag) == (lost, "final"):
        raise FileNotFoundError(2, "No such file or directory", f"/studies/labels/{image}.nii.gz")
    return stored_map(store, image, tag, *more)


def no_memory(*_: Any, **__: Any) -> None:
    raise MemoryError("Unable to allocate 80 GiB")


def test_what_fails_with_one_case_is_a_line_of_it_without_paths(save, run, monkeypatch) -> None:
    for n in range(3):
        save(n, draw(n)[1])
        save(n, draw(n)[1], "original")
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "stored_map", partial(missing_file, "case1"))
        found, agreed = run(), run(AgreementScoring)
    assert reasons(found) == {"case1": ["unreadable"]} and set(agreed["left_out"]) == {"case1"}
    for text in (found["cases"][0]["reasons"][0]["reason"], agreed["left_out"]["case1"]):
        assert "FileNotFoundError" in text and text.endswith(".") and "/" not in text and "case1" not in text
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "agreement", no_memory)
        patch.setattr(scoring, "check_map", no_memory)
        assert set(run(AgreementScoring)["left_out"]) == {"case0", "case1", "case2"}
        assert {check for case in reasons(run()).values() for check in case} == {"unreadable"}


def test_agreement_lists_the_worst_first_and_says_what_it_left_out(save, run) -> None:
    for n, moved in ((0, 0), (1, 12)):
        save(n, draw(n)[1])
        save(n, np.roll(draw(n)[1], moved, axis=0), "original")
    save(2, draw(2)[1])
    save(3, draw(3)[1])
    save(3, draw(3)[1][:-1], "original")
    found = run(AgreementScoring)
    assert [c["case"] for c in found["cases"]] == ["case1", "case0"]
    assert found["cases"][1]["labels"]["big"] == {"dice": 1.0, "hd95_mm": 0.0, "mean_mm": 0.0}
    assert found["summary"]["left_out"] == 1 and "on its image's grid" in found["left_out"]["case3"]
    assert found["labels"]["big"]["cases"] == 2 and (found["y"], found["y_pred"]) == ("final", "original")
    assert run(AgreementScoring, y="original", y_pred="final")["cases"][0]["case"] == "case1"


def test_values_count_by_the_servers_labels_where_none_are_declared(save, run) -> None:
    voxels = draw(0)[1]
    voxels[0, 0, 0] = 3
    save(0, voxels, info={})
    assert "unknown" not in reasons(run()).get("case0", [])
    assert "unknown" in reasons(run(labels=LABELS))["case0"]


def test_page_stands_alone_and_escapes_what_people_typed(save, run, tmp_path: Path) -> None:
    info = {"label_info": [{"name": "<script>alert(1)</script>", "idx": 1}, {"name": "b&c", "idx": 2}]}
    bad = draw(0)[1]
    bad[1, 1, 0] = 1
    save(0, bad, info=info)
    save(0, draw(3)[1], "original", info)
    for kind, name in ((QualityScoring, "quality"), (AgreementScoring, "agreement")):
        run(kind)
        page = (tmp_path / "state" / f"{name}.html").read_text()
        assert "&lt;script&gt;" in page and "<script" not in page and "http" not in page and "case0" in page


def test_the_store_is_only_read_and_nothing_names_a_case(save, run, studies: Path, caplog, tmp_path: Path) -> None:
    for n in range(2):
        save(n, draw(n)[1])
    before = (studies / "datastore_v2.json").read_bytes()
    with caplog.at_level(logging.DEBUG, logger="infers.scoring"):
        run()
        run(AgreementScoring)
    assert (studies / "datastore_v2.json").read_bytes() == before
    assert caplog.records and not any("case" + str(n) in r.getMessage() for r in caplog.records for n in range(9))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "agreement.html", "agreement.json", "quality.html", "quality.json",
    ]  # fmt: skip


def test_info_follows_the_last_result(save, run, tmp_path: Path) -> None:
    method = QualityScoring(tmp_path / "state", (), lambda: True)
    assert set(method.info()) == {"description"}
    save(0, draw(0)[1])
    run()
    info = method.info()
    assert info["cases"] == 1 and info["url"] == "/quality/quality" and Path(info["report"]).is_file()
    (tmp_path / "state" / "quality.json").write_text("{")
    assert set(method.info()) == {"description"}


@pytest.mark.parametrize(
    "request_, text",
    [
        ({"rules": {"ilands": 1}}, "unknown key 'ilands'.*island"),
        ({"rules": 5}, "rules: expected a mapping"),
        ({"y": 5}, "y: expected a label tag such as final"),
    ],
)
def test_wrong_option_is_told(run, request_, text: str) -> None:
    with pytest.raises(MONAILabelException, match=text):
        run(**request_)


def test_server_does_not_stand_still_for_it(store, tmp_path: Path) -> None:
    with pytest.raises(MONAILabelException, match="run_sync: expected false"):
        QualityScoring(tmp_path, (), lambda: True)({}, store)


class Pacs:
    """Three series with a DICOM SEG each.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self.client = SimpleNamespace(base_url="http://stub/dicom-web")
        self.is_away, self.refused = False, ""
        self.after: Callable[[], None] = lambda: None  # a download
        self.folders: dict[str, Path] = {}
        self.segs: dict[str, list[str]] = {}
        for n in range(3):
            truth = np.roll(ellipsoid((24, 20, 6), (6, 5, 2)), n, axis=0)
            image = write_series(folder / f"image{n}", truth, np.diag([-1.0, -1.0, 3.0, 1.0]), modality="CT", seed=n)
            seg = folder / f"seg{n}"
            seg.mkdir()
            made = Provenance(kind=Kind.MANUAL)
            write_seg(image.folder, image.label(), {"liver": 1}, seg / "seg.dcm", made)
            self.folders |= {image.uid: image.folder, f"1.{n}": seg}
            self.segs[image.uid] = [f"1.{n}"]

    def _answer(self) -> None:
        if self.is_away:
            raise PacsError("Expected an answer of the PACS; received none.")

    def images(self) -> list[str]:
        self._answer()
        return list(self.segs)

    def segmentations(self) -> dict[str, list[str]]:
        self._answer()
        return dict(self.segs)

    def facts(self, series: str) -> dict[str, Any]:
        self._answer()
        return {}

    def download(self, series: str, folder: Path) -> None:
        self._answer()
        if series == self.refused:
            raise PacsError("Expected the PACS to answer; received status 500.")
        for file in self.folders[series].iterdir():
            shutil.copy(file, folder)
        self.after()


@pytest.fixture
def pacs(tmp_path: Path) -> Pacs:
    return Pacs(tmp_path)


@pytest.mark.parametrize("kind", [QualityScoring, AgreementScoring])
@pytest.mark.parametrize("downloads", [0, 1, 4])  # until it goes away
def test_pacs_that_goes_away_ends_the_run_and_leaves_the_last_list(
    pacs: Pacs, tmp_path: Path, kind: type[StoreScoring], downloads: int
) -> None:
    method = kind(tmp_path / "state", (), lambda: False)
    request = {"y_pred": "final"}
    counts = method(request, DicomStore(pacs, str(tmp_path / "first")))
    assert (counts["cases"], counts["left_out"]) == (3, 0)
    before = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    store = DicomStore(pacs, str(tmp_path / "second"))
    left = iter(range(downloads - 1, -1, -1))

    def counted() -> None:
        pacs.is_away = next(left) == 0

    pacs.is_away, pacs.after = downloads == 0, counted
    with pytest.raises(MONAILabelException) as told:
        method(request, store)
    assert told.value.msg == "Expected an answer of the PACS; received none."
    assert {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()} == before


def test_pacs_that_goes_away_after_the_list_was_made_ends_the_run_too(pacs: Pacs, tmp_path: Path, monkeypatch) -> None:
    """Then a label of the PACS is none for the store."""
    store = DicomStore(pacs, str(tmp_path / "cache"))
    checked = scoring.check_map

    def meanwhile(*args: Any) -> Any:
        pacs.is_away = True
        store._segs.forget()  # as after 15 s
        return checked(*args)

    monkeypatch.setattr(scoring, "check_map", meanwhile)
    with pytest.raises(MONAILabelException, match="received none"):
        QualityScoring(tmp_path / "state", (), lambda: False)({}, store)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("what", ["image", "segmentation"])
def test_what_the_pacs_refuses_is_not_looked_at_and_not_ranked(pacs: Pacs, tmp_path: Path, what: str) -> None:
    image = sorted(pacs.segs)[1]
    pacs.refused = image if what == "image" else pacs.segs[image][0]
    method = QualityScoring(tmp_path / "state", (), lambda: False)
    counts = method({}, DicomStore(pacs, str(tmp_path / "cache")))
    assert (counts["cases"], counts["left_out"], counts["checks"]) == (2, 1, {})
    found = json.loads((tmp_path / "state" / "quality.json").read_text())
    assert found["left_out"] == {image: "Expected the PACS to answer; received status 500."}
    page = (tmp_path / "state" / "quality.html").read_text()
    assert "Not looked at. Expected the PACS to answer; received status 500." in page and "MONAILabelError" not in page
