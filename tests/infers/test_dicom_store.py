"""The datastore over a PACS that is a dictionary of folders; ``tests/test_pacs.py`` has a real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.interfaces.exception import MONAILabelException

from infers import local_store
from infers.batch import BatchTask
from infers.batch import Server as Asked
from infers.dicom_store import DicomStore
from infers.scoring import AgreementScoring
from lib.config import method_row
from lib.dicom_seg import write_seg
from lib.provenance import Kind, Provenance
from tests.cases import settings
from tests.pacs import Series, write_series
from tests.phantoms import ellipsoid
from trainers.adapt import AdaptTask, stored_cases

SHAPE = (24, 20, 6)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])
NAMES = {"label_info": [{"name": "liver", "idx": 1}]}


class Pacs:
    """Series in folders.

    Args:
        image: the only image.
    """

    def __init__(self, image: Series) -> None:
        self.client = SimpleNamespace(base_url="http://stub/dicom-web")
        self.folders, self.segs, self.downloads = {image.uid: image.folder}, [], []
        self.image, self.when_asked = image, lambda: None

    def add(self, folder: Path, *files: Path) -> str:
        """A segmentation of the image, newer than the others; its SeriesInstanceUID."""
        folder.mkdir()
        for file in files:
            shutil.copy(file, folder)
        self.segs.insert(0, f"1.{len(self.folders)}")
        self.folders[self.segs[0]] = folder
        return self.segs[0]

    def images(self) -> list[str]:
        return [self.image.uid]

    def segmentations(self) -> dict[str, list[str]]:
        return {self.image.uid: list(self.segs)} if self.segs else {}

    def facts(self, series: str) -> dict[str, Any]:
        return {}

    def download(self, series: str, folder: Path) -> None:
        self.downloads.append(series)
        for file in self.folders[series].iterdir():
            shutil.copy(file, folder)
        if series in self.segs:
            self.when_asked()


@pytest.fixture
def image(tmp_path: Path) -> Series:
    return write_series(tmp_path / "image", np.roll(ellipsoid(SHAPE, (6, 5, 2)), 2, axis=0), AFFINE, modality="CT")


@pytest.fixture
def pacs(image: Series) -> Pacs:
    return Pacs(image)


@pytest.fixture
def seg(image: Series, tmp_path: Path) -> Path:
    """The truth as DICOM SEG."""
    made = Provenance(kind=Kind.MANUAL)
    return write_seg(image.folder, image.label(), {"liver": 1}, tmp_path / "seg.dcm", made)


@pytest.fixture
def misfit(image: Series, tmp_path: Path) -> Path:
    """A DICOM SEG of another series."""
    other = write_series(tmp_path / "other", image.truth, AFFINE * 1.5, modality="CT", seed=7)
    made = Provenance(kind=Kind.MANUAL)
    return write_seg(other.folder, other.label(), {"liver": 1}, tmp_path / "misfit.dcm", made)


@pytest.fixture
def opened(pacs: Pacs, tmp_path: Path) -> Callable[[], DicomStore]:
    """Another store on the same cache, as another process has it."""
    return lambda: DicomStore(pacs, str(tmp_path / "cache"))


def label_of(store: DicomStore, image: str, tag: str = "final") -> np.ndarray:
    return np.asarray(nib.load(store.get_label_uri(image, tag)).dataobj)


def save_draft(store: DicomStore, image: Series, folder: Path) -> None:
    affine = nib.load(store.get_image_uri(image.uid)).affine
    nib.save(nib.Nifti1Image(image.label(), affine), folder / "draft.nii.gz")
    store.save_label(image.uid, str(folder / "draft.nii.gz"), "original", {**NAMES, "model": "sam2rad"})


def written(store: DicomStore, image: str) -> dict[str, Any]:
    """What the store's file says of the image's labels."""
    return json.loads((store._root / "datastore_v2.json").read_text())["objects"][image]["labels"]


@pytest.mark.parametrize("objects", ["misfit", "two"])
def test_newer_seg_that_cannot_be_read_gives_way_to_the_older_one(
    pacs: Pacs, image: Series, seg: Path, misfit: Path, tmp_path: Path, opened: Any, objects: str
) -> None:
    good = pacs.add(tmp_path / "good", seg)
    bad = pacs.add(tmp_path / "bad", *((seg, misfit) if objects == "two" else (misfit,)))
    store = opened()
    for _ in range(3):
        assert store.get_label_by_image_id(image.uid, "final") == image.uid
        np.testing.assert_array_equal(label_of(store, image.uid), image.label())
        store._segs.forget()
    assert pacs.downloads.count(bad) == pacs.downloads.count(good) == 1
    assert store.get_labeled_images() == [image.uid]
    assert [Path(one["label"]).exists() for one in store.datalist()] == [True]


def test_image_without_a_readable_seg_is_unlabelled_and_offered(
    pacs: Pacs, image: Series, misfit: Path, tmp_path: Path, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad = pacs.add(tmp_path / "bad", misfit)
    server, child = opened(), opened()
    assert server.get_unlabeled_images() == []  # nobody has looked yet
    child.only_read()
    cases, missing = stored_cases(child)
    assert cases == [] and missing[0].startswith("1 final labels could not be read from the PACS")
    assert "passed over" in caplog.text and bad not in caplog.text and image.uid not in caplog.text
    server._segs.forget()  # its list is old
    assert server.get_unlabeled_images() == [image.uid] and server.get_labeled_images() == []
    assert server.status()["completed"] == 0
    assert server.get_label_by_image_id(image.uid, "final") == ""
    assert pacs.downloads.count(bad) == 1


def test_child_tries_an_unreadable_seg_again_and_the_server_learns_of_it(
    pacs: Pacs, image: Series, seg: Path, misfit: Path, tmp_path: Path, opened: Any
) -> None:
    pacs.add(tmp_path / "bad", misfit)
    server, child = opened(), opened()
    assert server.get_label_uri(image.uid, "final") == ""
    shutil.copy(seg, tmp_path / "bad" / "misfit.dcm")  # in place of a program that has learned to read it
    assert server.get_label_uri(image.uid, "final") == ""
    child.only_read()
    assert child.get_label_uri(image.uid, "final")
    server._segs.forget()
    np.testing.assert_array_equal(label_of(server, image.uid), image.label())


def test_pacs_that_fails_hands_out_no_older_label(
    pacs: Pacs, image: Series, seg: Path, tmp_path: Path, opened: Any
) -> None:
    pacs.add(tmp_path / "old", seg)
    pacs.folders[pacs.add(tmp_path / "new", seg)] = tmp_path / "away"
    store = opened()
    with pytest.raises(FileNotFoundError):
        store.get_label_uri(image.uid, "final")
    assert store.get_labeled_images() == [image.uid]


def score(store: DicomStore, folder: Path, _: pytest.MonkeyPatch) -> None:
    assert AgreementScoring(folder, ("liver",), lambda: False)({}, store)["cases"] == 1


def batch(store: DicomStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asked, "tasks", lambda _: {"sam2rad": {"version_live": "v0001"}})
    monkeypatch.setattr(Asked, "label", lambda *_: "")
    store.only_read()
    store.get_label_uri(store.list_images()[0], "final")  # by whatever a batch asks for
    BatchTask(lambda: False)({"model": "sam2rad"}, store, lambda *_: None)


def train(store: DicomStore, folder: Path, _: pytest.MonkeyPatch) -> None:
    task = AdaptTask(method_row("sam2rad"), settings(folder), folder / "versions", lambda: True)
    with pytest.raises(MONAILabelException, match="case"):
        task({}, store)


@pytest.mark.parametrize("run", [score, batch, train])
def test_child_does_not_write_the_servers_file(
    pacs: Pacs, image: Series, seg: Path, tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.setattr("os.nice", lambda _: 0)
    server = opened()
    server.get_image_uri(image.uid)
    child = opened()
    save_draft(server, image, tmp_path)
    child.refresh()
    pacs.add(tmp_path / "seg", seg)

    def meanwhile() -> None:
        server.save_label(image.uid, str(tmp_path / "draft.nii.gz"), "second-reader", dict(NAMES))

    pacs.when_asked = meanwhile
    run(child, tmp_path / "state", monkeypatch)
    assert pacs.segs[0] in pacs.downloads
    assert written(server, image.uid).keys() == {"original", "second-reader"}
    assert all(label["info"]["label_info"] == NAMES["label_info"] for label in written(server, image.uid).values())
    np.testing.assert_array_equal(label_of(child, image.uid), image.label())


def test_childs_copy_of_a_label_does_not_replace_the_servers(
    pacs: Pacs, image: Series, seg: Path, tmp_path: Path, opened: Any
) -> None:
    pacs.add(tmp_path / "old", seg)
    server, child = opened(), opened()
    path = Path(server.get_label_uri(image.uid, "final"))
    before = path.read_bytes()
    moved = np.roll(image.label(), 1, axis=1)
    newer = write_seg(image.folder, moved, {"liver": 1}, tmp_path / "newer.dcm", Provenance(kind=Kind.MANUAL))
    pacs.add(tmp_path / "new", newer)
    child.only_read()
    np.testing.assert_array_equal(label_of(child, image.uid), moved)
    assert path.read_bytes() == before  # whose names the server knows
    server._segs.forget()
    np.testing.assert_array_equal(label_of(server, image.uid), moved)


def test_image_that_a_child_downloaded_is_known_to_the_server_with_its_study(
    pacs: Pacs, image: Series, opened: Any
) -> None:
    server, child = opened(), opened()
    child.only_read()
    child.get_image_uri(image.uid)
    server.refresh()
    server.get_image_uri(image.uid)
    assert server.get_image_info(image.uid)["SeriesInstanceUID"] == image.uid
    assert pacs.downloads == [image.uid]


def test_start_does_not_write_the_file(image: Series, tmp_path: Path, opened: Any) -> None:
    server = opened()
    save_draft(server, image, tmp_path)
    file = server._root / "datastore_v2.json"
    before = file.read_bytes()
    shutil.copy(tmp_path / "draft.nii.gz", server._root / "labels" / "original" / f"{image.uid}.nii")  # not known yet
    (server._root / "labels" / "original" / f"{image.uid}.nii.gz").unlink()
    opened()
    assert file.read_bytes() == before


def test_draft_is_looked_up_without_the_pacs(pacs: Pacs, image: Series, seg: Path, tmp_path: Path, opened: Any) -> None:
    pacs.add(tmp_path / "seg", seg)
    store = opened()
    assert store.get_label_by_image_id(image.uid, "original") == "" and pacs.downloads == []


def test_cache_is_for_the_servers_user_alone(opened: Any) -> None:
    assert opened()._root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("file", ["draft", "list"])
def test_full_disk_leaves_the_old_draft(
    image: Series, tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    store = opened()
    save_draft(store, image, tmp_path)
    label, known = label_of(store, image.uid, "original"), written(store, image.uid)
    fill, filled = local_store.fill, ["draft", "list"]

    def full(part: Path, *more: Any) -> None:
        fill(part, *more)
        if filled.pop(0) == file:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_store, "fill", full)
    nib.save(nib.Nifti1Image(image.label() * 0, np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(MONAILabelException, match="No space left"):
        store.save_label(image.uid, str(tmp_path / "empty.nii.gz"), "original", {})
    np.testing.assert_array_equal(label_of(store, image.uid, "original"), label)
    assert written(store, image.uid) == known
    assert store.get_label_info(image.uid, "original") == known["original"]["info"]
    assert not list(store._root.rglob("*.part"))
