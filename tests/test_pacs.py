"""A server on a real PACS: images in, DICOM SEG out and back. Skips without Orthanc."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelException

from infers.dicom_store import DicomStore
from infers.pacs import Kept, PacsError
from infers.pacs import Pacs as Remote
from lib.data.dicom import patient_key
from lib.data.samples import patient_of, usable_cases
from lib.data.volume import load_volume
from lib.dicom_seg import read_seg, write_seg
from lib.provenance import Kind, Provenance
from tests.conftest import TILT
from tests.pacs import Pacs, Series, put_label, random_version, running_pacs, write_series
from tests.phantoms import ellipsoid
from tests.serving import Server, affine_of, dice, ohif_click, post_infer, read_mask, running_server, save
from trainers.adapt import stored_cases

LABELS = ("big", "small one")


def oblique(spacing: tuple[float, float, float]) -> np.ndarray:
    """Voxel to RAS, tilted, with slices along the normal."""
    affine = np.eye(4)
    affine[:3, :3] = TILT @ np.diag([-spacing[0], -spacing[1], spacing[2]])
    affine[:3, 3] = [31.7, -12.3, 101.1]
    return affine


def lopsided(shape: tuple[int, int, int], radii: tuple[float, float, float]) -> np.ndarray:
    """An ellipsoid away from the middle, so that no flip goes unseen."""
    return np.roll(ellipsoid(shape, radii), (5, -4, 2), axis=(0, 1, 2))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Series]:
    """What lies in the PACS: two images that can be segmented and one with missing slices."""
    folder = tmp_path_factory.mktemp("series")
    truth = lopsided((64, 56, 16), (15, 12, 4))
    made = {
        "mr": write_series(folder / "mr", truth, oblique((0.8, 0.8, 4.0)), seed=1),
        "ct": write_series(folder / "ct", truth, np.diag([-1.0, -1.0, 3.0, 1.0]), modality="CT", seed=2),
        "gap": write_series(folder / "gap", truth, np.diag([-1.0, -1.0, 3.0, 1.0]), seed=3),
    }
    for k in (6, 7):
        (made["gap"].folder / f"{k:03d}.dcm").unlink()
    return made


def write_report(path: Path, study: str) -> Path:
    """An object of the study that is no image."""
    report = pydicom.dcmread(path)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.SOPInstanceUID = report.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    report.SeriesInstanceUID, report.StudyInstanceUID, report.Modality = pydicom.uid.generate_uid(), study, "SR"
    del report.PixelData
    target = path.with_name("report.sr")
    report.save_as(target)
    return target


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory, series: dict[str, Series]) -> Iterator[Pacs]:
    with running_pacs(tmp_path_factory.mktemp("pacs") / "orthanc") as running:
        for one in series.values():
            running.upload(one.folder.glob("*.dcm"))
        report = write_report(series["ct"].folder / "000.dcm", series["ct"].study)
        running.upload([report])
        report.unlink()
        yield running


@pytest.fixture(scope="module")
def server(pacs: Pacs, tmp_path_factory: pytest.TempPathFactory, backbone: str) -> Iterator[Server]:
    """A server with an untrained version, which is enough to be asked."""
    scratch = tmp_path_factory.mktemp("pacs_server")
    random_version(scratch / "state", backbone, LABELS)
    conf = {"backbone": backbone, "state_dir": str(scratch / "state")}
    with running_server(pacs.dicomweb, scratch, conf=conf) as running:
        yield running


@pytest.fixture
def clean(pacs: Pacs) -> Iterator[Pacs]:
    """The PACS without segmentations."""
    yield pacs
    for uid in pacs.series():
        pacs.delete(uid)


@pytest.fixture
def store(clean: Pacs, tmp_path: Path) -> DicomStore:
    """A store in this process on a cache of its own."""
    return DicomStore(Remote(clean.dicomweb), str(tmp_path / "cache"))


def write_label(store: DicomStore, image: str, voxels: np.ndarray, path: Path, shift: float = 0.0) -> str:
    """A label map as a client sends it."""
    affine = nib.load(store.get_image_uri(image)).affine.copy()
    affine[0, 3] += shift
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), affine), path)
    return str(path)


def test_every_image_is_listed_and_nothing_else(store: DicomStore, series: dict[str, Series]) -> None:
    assert set(store.list_images()) == {one.uid for one in series.values()}
    assert store.status() == {"total": 3, "completed": 0, "label_tags": {}}


@pytest.mark.parametrize("modalities, names", [(("MR",), {"mr", "gap"}), (("ct", "US"), {"ct"}), (("SEG",), set())])
def test_modalities_narrow_the_list(
    pacs: Pacs, series: dict[str, Series], modalities: tuple[str, ...], names: set[str]
) -> None:
    assert set(Remote(pacs.dicomweb, modalities).images()) == {series[name].uid for name in names}


def test_image_is_our_own_reading_of_the_series(store: DicomStore, series: dict[str, Series]) -> None:
    for name in ("mr", "ct"):
        path = store.get_image_uri(series[name].uid)
        assert path.endswith(f"{series[name].uid}.nii.gz")
        read, image = load_volume(series[name].folder), nib.load(path)
        np.testing.assert_array_equal(np.asarray(image.dataobj), read.array)
        np.testing.assert_allclose(image.affine, read.affine, rtol=1e-6, atol=1e-4)
        assert load_volume(path).content_hash == read.content_hash
        np.testing.assert_array_equal(load_volume(path).affine, read.affine)  # of the series, not of the NIfTI


@pytest.mark.parametrize("image", ["1.2.3.4", "labels", "..", "", "1.2/../../x", "1." * 40 + "1"])
def test_unknown_image_is_not_found(store: DicomStore, image: str) -> None:
    with pytest.raises(ImageNotFoundException):
        store.get_image_uri(image)


def test_unreadable_series_is_told_and_not_offered_again(store: DicomStore, series: dict[str, Series]) -> None:
    gap = series["gap"].uid
    assert gap in store.get_unlabeled_images()
    with pytest.raises(MONAILabelException, match="slices are missing") as caught:
        store.get_image_uri(gap)
    assert gap not in str(caught.value.msg)
    assert set(store.get_unlabeled_images()) == {series["mr"].uid, series["ct"].uid}
    assert gap in store.list_images()


def test_two_at_once_download_once(
    store: DicomStore, series: dict[str, Series], monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads, real = [], store._pacs.download
    monkeypatch.setattr(store._pacs, "download", lambda *how: (downloads.append(how), real(*how))[1])
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(store.get_image_uri(series["mr"].uid))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and len(downloads) == 1


def test_download_that_breaks_off_is_not_taken_for_the_series(
    store: DicomStore, series: dict[str, Series], monkeypatch: pytest.MonkeyPatch
) -> None:
    uid, real = series["mr"].uid, store._pacs.client.iter_series

    def half(*where: str) -> Iterator[Any]:
        for n, instance in enumerate(real(*where)):
            if n == 5:
                raise requests.ConnectionError
            yield instance

    monkeypatch.setattr(store._pacs.client, "iter_series", half)
    with pytest.raises(PacsError, match="received none"):
        store.get_image_uri(uid)
    monkeypatch.setattr(store._pacs.client, "iter_series", lambda *where: list(real(*where))[:5])
    with pytest.raises(PacsError, match="Expected 16 objects of the series; received 5"):
        store.get_image_uri(uid)
    monkeypatch.undo()
    left = store._root / ".parts" / uid / "series"  # as a killed server leaves it
    left.mkdir(parents=True)
    (left / "1.dcm").write_bytes(b"half")
    assert nib.load(store.get_image_uri(uid)).shape == (64, 56, 16)


def test_final_label_goes_to_the_pacs_and_comes_back(
    store: DicomStore, clean: Pacs, series: dict[str, Series], tmp_path: Path
) -> None:
    mr = series["mr"]
    voxels = mr.label() * 7
    voxels[0, 0, 0] = 3
    info = {"label_info": [{"name": "liver", "idx": 7}, {"name": "Größe", "idx": 3}, {"name": "absent", "idx": 9}]}
    assert store.save_label(mr.uid, write_label(store, mr.uid, voxels, tmp_path / "l.nii.gz"), "final", info) == mr.uid
    (uid,) = clean.series()
    (seg,) = clean.datasets(uid)
    names = [str(segment.SegmentLabel) for segment in seg.SegmentSequence]
    assert names == ["Größe", "liver", "absent"]
    assert {segment.SegmentAlgorithmType for segment in seg.SegmentSequence} == {"MANUAL"}
    assert store.status() == {"total": 3, "completed": 1, "label_tags": {"final": 1}}  # at once, not in two hours
    assert mr.uid not in store.get_unlabeled_images()
    other = DicomStore(Remote(clean.dicomweb), str(tmp_path / "other"))  # such as another server
    for one in (store, other):
        assert one.get_label_by_image_id(mr.uid, "final") == mr.uid
        back = np.asarray(nib.load(one.get_label_uri(mr.uid, "final")).dataobj)
        np.testing.assert_array_equal(back == 2, voxels == 7)
        np.testing.assert_array_equal(back == 1, voxels == 3)
        named = one.get_label_info(mr.uid, "final")["label_info"]
        assert named == [{"name": name, "idx": n} for n, name in enumerate(names, 1)]
    assert [Path(one["label"]).exists() for one in other.datalist()] == [True]


def test_saving_twice_adds_a_series_and_the_newest_counts(
    store: DicomStore, clean: Pacs, series: dict[str, Series], tmp_path: Path
) -> None:
    mr = series["mr"]
    first = mr.label()
    second = np.roll(first, 3, axis=0)
    for voxels in (first, second):
        info = {"label_info": [{"name": "liver", "idx": 1}]}
        store.save_label(mr.uid, write_label(store, mr.uid, voxels, tmp_path / "l.nii.gz"), "final", info)
    assert len(clean.series()) == 2
    other = DicomStore(Remote(clean.dicomweb), str(tmp_path / "other"))
    for one in (store, other):
        np.testing.assert_array_equal(np.asarray(nib.load(one.get_label_uri(mr.uid, "final")).dataobj), second)
        assert one.get_labeled_images() == [mr.uid]
    for uid in clean.series():
        clean.delete(uid)
    other._segs.forget()
    assert other.get_label_uri(mr.uid, "final") == "" and other.get_labels_by_image_id(mr.uid) == {}


def test_cases_to_train_on_carry_their_patient_and_not_its_name(
    store: DicomStore, clean: Pacs, series: dict[str, Series], tmp_path: Path
) -> None:
    for name in ("mr", "ct"):
        one = series[name]
        file = write_label(store, one.uid, one.label(), tmp_path / f"{name}.nii.gz")
        store.save_label(one.uid, file, "final", {"label_info": [{"name": "liver", "idx": 1}]})
    cases, left_out = usable_cases(stored_cases(store)[0], ["liver"])
    assert {c.case: c.patient for c in cases} == {
        series[name].uid: patient_key(series[name].folder) for name in ("mr", "ct")
    }
    assert left_out == [] and len({c.patient for c in cases}) == 2
    assert all("phantom" not in patient_of(c) and c.case not in patient_of(c) for c in cases)


def test_seg_of_another_grid_is_passed_over(
    store: DicomStore, clean: Pacs, series: dict[str, Series], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mr, ct = series["mr"], series["ct"]
    file = write_seg(ct.folder, ct.label(), {"liver": 1}, tmp_path / "seg.dcm", Provenance(kind=Kind.MANUAL))
    seg = pydicom.dcmread(file)
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = mr.uid  # claims the other series
    seg.save_as(file)
    clean.upload([file])
    assert store.get_label_by_image_id(mr.uid, "final") == ""
    assert "passed over" in caplog.text and mr.uid not in caplog.text
    assert mr.uid in store.get_unlabeled_images()
    child = DicomStore(store._pacs, str(tmp_path / "cache"))
    child.only_read()
    cases, missing = stored_cases(child)
    assert cases == [] and missing[0].startswith("1 final labels could not be read from the PACS")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda voxels: voxels * 0, "no labelled voxel"),
        (lambda voxels: voxels[:-1], r"image's grid \(64, 56, 16\); received \(63, 56, 16\)"),
        (lambda voxels: voxels * 2, "unknown values 2"),
    ],
)
def test_wrong_label_is_refused_before_anything_is_stored(
    store: DicomStore, clean: Pacs, series: dict[str, Series], tmp_path: Path, change: Any, text: str
) -> None:
    mr = series["mr"]
    file = write_label(store, mr.uid, change(mr.label()), tmp_path / "l.nii.gz")
    with pytest.raises(MONAILabelException, match=text):
        store.save_label(mr.uid, file, "final", {"label_info": [{"name": "liver", "idx": 1}]})
    file = write_label(store, mr.uid, mr.label(), tmp_path / "l.nii.gz", shift=1.0)
    with pytest.raises(MONAILabelException, match="1 mm away"):
        store.save_label(mr.uid, file, "final", {"label_info": [{"name": "liver", "idx": 1}]})
    assert clean.series() == []


def test_pacs_is_only_read_and_added_to(store: DicomStore, series: dict[str, Series]) -> None:
    for call in (
        lambda: store.add_image(series["mr"].uid, "x.nii.gz", {}),
        lambda: store.remove_image(series["mr"].uid),
        lambda: store.remove_label(series["mr"].uid, "final"),
    ):
        with pytest.raises(MONAILabelException):
            call()


def test_kept_value_is_renewed_when_old_and_survives_a_pacs_that_is_away() -> None:
    answers: list[Any] = [1, 2, PacsError("away"), 3]

    def fetch() -> int:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    young, old = Kept(fetch, 3600), Kept(fetch, -1)
    assert (young.now(), young.now(), young.soon()) == (1, 1, 1)
    assert old.now() == 2
    with pytest.raises(PacsError):
        old.now()
    assert old.soon() in (2, 3)
    young.forget()
    answers[:] = [4]
    assert young.soon() == 4


def test_click_on_a_series(server: Server, series: dict[str, Series], tmp_path: Path) -> None:
    for name in ("mr", "ct"):
        one = series[name]
        params = {"label": "liver", "foreground": [one.centre], "background": []}
        path = save(ohif_click(server, "sam", one.uid, **params), tmp_path / f"{name}.nrrd")
        assert dice(read_mask(path), one.truth) > 0.7
        np.testing.assert_allclose(affine_of(path), load_volume(one.folder).affine, atol=1e-9)


@pytest.mark.parametrize("image", ["1.2.3.4", "labels", "%2e%2e"])
def test_unknown_series_is_404(server: Server, image: str) -> None:
    answer = post_infer(server, "sam", image, {"foreground": [[1, 1, 1]]})
    assert answer.status_code == 404 and answer.json()["detail"]
    assert requests.get(f"{server.url}/datastore/image", params={"image": image}, timeout=60).status_code == 404


def test_unreadable_series_is_told_to_the_client(server: Server, series: dict[str, Series]) -> None:
    answer = post_infer(server, "sam", series["gap"].uid, {"foreground": [[1, 1, 1]]})
    assert answer.status_code == 400 and "slices are missing" in answer.json()["detail"]


@pytest.mark.parametrize("more", [{}, {"label_info": [{"name": "other"}]}])
def test_answer_as_dicom_seg(
    server: Server, clean: Pacs, series: dict[str, Series], tmp_path: Path, more: dict[str, Any]
) -> None:
    mr = series["mr"]
    params = {"label": "liver", "foreground": [mr.centre], **more}
    answer = post_infer(server, "sam", mr.uid, params, output="dicom_seg")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/dicom"
    (tmp_path / "seg.dcm").write_bytes(answer.content)
    labels, names, kinds = read_seg(tmp_path / "seg.dcm", mr.folder)
    assert (names, kinds) == ({"liver": 1}, {"liver": Kind.SEMIAUTOMATIC})
    mask = read_mask(save(ohif_click(server, "sam", mr.uid, **params), tmp_path / "mask.nrrd"))
    np.testing.assert_array_equal(labels, mask)
    assert clean.series() == []  # only answered


@pytest.mark.parametrize(  # each holds what the one before it left: the server knows that label for 15 s more
    "model, image, kind",
    [("sam2rad", "mr", "AUTOMATIC"), ("sam2rad_edit", "mr", "SEMIAUTOMATIC"), ("sam", "ct", "SEMIAUTOMATIC")],
)
def test_answer_is_kept_as_dicom_seg(
    server: Server, clean: Pacs, series: dict[str, Series], model: str, image: str, kind: str
) -> None:
    one = series[image]
    prompts: dict[str, Any] = {
        "sam": {"foreground": [one.centre], "label": "liver"},
        "sam2rad": {},
        "sam2rad_edit": {"big": [one.centre], "small one": []},
    }[model]
    answer = post_infer(server, model, one.uid, {**prompts, "save": "final"}, output="json")
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    assert reply["saved"] == "final"
    (seg,) = clean.datasets(clean.series()[0])
    assert {segment.SegmentAlgorithmType for segment in seg.SegmentSequence} == {kind}
    assert [str(s.SegmentLabel) for s in seg.SegmentSequence] == list(reply["label_names"])
    assert server.info()["datastore"]["completed"] == 1


def test_draft_stays_on_the_server(server: Server, clean: Pacs, series: dict[str, Series], tmp_path: Path) -> None:
    mr = series["mr"]
    params = {"label": "liver", "foreground": [mr.centre], "save": "draft"}
    kept = read_mask(save(ohif_click(server, "sam", mr.uid, **params), tmp_path / "mask.nrrd"))
    assert clean.series() == []
    where = {"label": mr.uid, "tag": "original"}
    answer = requests.get(f"{server.url}/datastore/label", params=where, timeout=60)
    np.testing.assert_array_equal(read_mask(save(answer, tmp_path / "draft.nrrd")), kept)
    info = requests.get(f"{server.url}/datastore/label/info", params=where, timeout=60).json()
    assert info["provenance"]["kind"] == "SEMIAUTOMATIC" and info["label_info"] == [{"name": "liver", "idx": 1}]


def test_slicer_saves_into_the_pacs(server: Server, clean: Pacs, series: dict[str, Series], tmp_path: Path) -> None:
    ct = series["ct"]
    assert ohif_click(server, "sam", ct.uid, label="spleen", foreground=[ct.centre]).status_code == 200
    affine = load_volume(ct.folder).affine
    nib.save(nib.Nifti1Image(ct.label(), affine), tmp_path / "label.nii.gz")
    assert put_label(server.url, ct.uid, tmp_path / "label.nii.gz", {"spleen": 1}).status_code == 200
    (seg,) = clean.datasets(clean.series()[0])
    (segment,) = seg.SegmentSequence
    assert (segment.SegmentAlgorithmType, segment.SegmentedPropertyTypeCodeSequence[0].CodeValue) == (
        "SEMIAUTOMATIC",  # the model had answered about this image
        "78961009",
    )
    assert server.info()["datastore"]["completed"] == 1
    train = requests.get(f"{server.url}/datastore/", params={"output": "train"}, timeout=60).json()
    assert [ct.uid in one["label"] for one in train] == [True]
    nib.save(nib.Nifti1Image(ct.label() * 0, affine), tmp_path / "empty.nii.gz")
    answer = put_label(server.url, ct.uid, tmp_path / "empty.nii.gz", {"spleen": 1})
    assert answer.status_code == 400 and "no labelled voxel" in answer.json()["detail"]
    assert len(clean.series()) == 1


@pytest.mark.slow  # 40 s on one busy core, most of it the start of the batch's process
def test_batch_leaves_drafts_on_the_server(server: Server, clean: Pacs, series: dict[str, Series]) -> None:
    url = f"{server.url}/batch/infer"
    assert requests.post(f"{url}/sam2rad?images=all", json={"label_tag": "batch"}, timeout=60).ok
    end = time.monotonic() + 300
    while (state := requests.get(url, timeout=60).json())["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < end
        time.sleep(0.3)
    text = "\n".join(state["details"])
    assert state["status"] == "DONE", text
    assert "3 of 3, 1 failed" in text and "slices are missing" in text  # the series with a gap
    assert not any(one.uid in text for one in series.values())
    found = requests.get(f"{server.url}/datastore/?output=all", timeout=60).json()["objects"]
    assert {series[name].uid for name in ("mr", "ct")} == {uid for uid, o in found.items() if "batch" in o["labels"]}
    assert clean.series() == []


def test_pacs_away_is_told_and_the_server_lives(
    tmp_path_factory: pytest.TempPathFactory, series: dict[str, Series], backbone: str
) -> None:
    folder = tmp_path_factory.mktemp("away")
    with running_pacs(folder / "orthanc") as pacs:
        for name in ("mr", "ct"):
            pacs.upload(series[name].folder.glob("*.dcm"))
        with running_server(pacs.dicomweb, folder / "server", conf={"backbone": backbone}) as server:
            click = {"foreground": [series["mr"].centre]}
            assert post_infer(server, "sam", series["mr"].uid, click).status_code == 200
            pacs.process.terminate()
            pacs.process.wait(timeout=20)
            answer = post_infer(server, "sam", series["ct"].uid, click)
            assert answer.status_code == 500 and "Expected an answer of the PACS" in answer.json()["detail"]
            assert post_infer(server, "sam", series["mr"].uid, click).status_code == 200  # it is here
            assert server.info()["datastore"]["total"] == 2
