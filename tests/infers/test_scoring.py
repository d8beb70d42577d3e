"""The scoring methods on a store of labelled phantoms: what they find, what they write, what they leave alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import MONAILabelException

from infers.scoring import AgreementScoring, QualityScoring, StoreScoring
from tests.cases import LABELS, draw

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
    assert found["summary"] == {"cases": 9, "to_look_at": 0, "checks": {}}


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
    assert next(c for c in found["cases"] if c["case"] == "case0")["dice"] == {"big": 1.0, "small one": 1.0}


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
