"""Which answers may become the final label of an image, in a folder of files and in a PACS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore

from infers.dicom_store import DicomStore
from infers.pacs import Pacs
from infers.saving import FINAL, FinalLabels
from lib.data.volume import load_volume
from lib.errors import PromptError
from tests.pacs import running_pacs, write_series
from tests.phantoms import ellipsoid

SHAPE = (12, 10, 4)
OFFERED = ("liver", "spleen")
Put = Callable[..., None]


@pytest.fixture
def store(tmp_path: Path) -> LocalDatastore:
    """A volume and a picture of one slice."""
    rng = np.random.default_rng(0)
    for name, shape in (("case", SHAPE), ("flat", (12, 10, 1))):
        nib.save(nib.Nifti1Image(rng.normal(100, 20, shape).astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    return LocalDatastore(str(tmp_path), auto_reload=False)


@pytest.fixture
def put(store: LocalDatastore, tmp_path_factory: pytest.TempPathFactory) -> Put:
    """Saves a final label with these values, named or not."""

    def label(values: tuple[int, ...], names: Optional[Mapping[str, int]] = None, shape: Any = SHAPE) -> None:
        voxels = np.zeros(shape, np.uint8)
        for value in values:
            voxels[value] = value
        file = tmp_path_factory.mktemp("label") / "case.nii.gz"
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
        info = [{"name": name, "idx": value} for name, value in (names or {}).items()]
        store.save_label("case", str(file), FINAL, {"label_info": info})

    return label


def check(store: Datastore, *names: str, image: str = "case", dimension: int = 3) -> None:
    FinalLabels(load_volume, OFFERED).check(store, image, names, dimension)


def test_first_label_may_be_of_anything(store: LocalDatastore) -> None:
    check(store, "liver")
    check(store, "liver", image="flat", dimension=2)


def test_slice_is_no_final_label_of_a_volume(store: LocalDatastore) -> None:
    with pytest.raises(PromptError, match=r"all 4 slices.*received one of a 2-D model.*Save it as draft"):
        check(store, "liver", dimension=2)


# values in the stored label, their names, structures of the answer, those it would lose
LABELS = [
    ((1,), {"liver": 1}, ("liver",), []),
    ((1, 2), {"liver": 1, "spleen": 2}, ("liver",), ["spleen"]),
    ((1, 2), {"liver": 2, "spleen": 1}, ("liver",), ["spleen"]),
    ((1, 2), {"liver": 1, "spleen": 2}, ("spleen", "liver"), []),
    ((1, 2), {"liver": 1, "spleen": 2}, ("kidney",), ["liver", "spleen"]),
    ((1,), {"liver": 1, "spleen": 2}, ("liver",), []),  # Slicer names segments that nobody has drawn
    ((1, 3), {"liver": 1, "background": 3}, ("liver",), []),
    ((1, 2), {}, ("liver",), ["spleen"]),  # a file without names counts by the offered labels
    ((1, 5), {}, ("liver",), ["label_5"]),
    ((1, 5), {"liver": 1}, ("liver",), ["label_5"]),
    ((), {"liver": 1}, ("spleen",), []),
]


@pytest.mark.parametrize(("values", "names", "answered", "lost"), LABELS)
def test_answer_holds_what_the_final_label_holds(
    store: LocalDatastore, put: Put, values: Any, names: Any, answered: Any, lost: list[str]
) -> None:
    put(values, names)
    if not lost:
        check(store, *answered)
        return
    with pytest.raises(PromptError) as error:
        check(store, *answered)
    assert f"received one with {sorted(answered)}, without {lost}. Save it as draft" in str(error.value)


def test_label_that_cannot_be_read_is_not_replaced(store: LocalDatastore, put: Put) -> None:
    put((1,), {"liver": 1}, shape=(9, 9, 9))
    with pytest.raises(PromptError, match=r"that can be read, so that nothing of it is lost\. .*image's grid"):
        check(store, "liver")


def test_newest_segmentation_of_a_pacs_counts(tmp_path: Path) -> None:
    series = write_series(tmp_path / "mr", ellipsoid((24, 20, 6), (6, 5, 2)), np.diag([-1.0, -1.0, 3.0, 1.0]))
    with running_pacs(tmp_path / "orthanc") as pacs:
        pacs.upload(series.folder.glob("*.dcm"))
        store = DicomStore(Pacs(pacs.dicomweb), str(tmp_path / "cache"))
        check(store, "liver", image=series.uid)
        labels = series.label()
        labels[0] = 2
        nib.save(nib.Nifti1Image(labels, load_volume(series.folder).affine), tmp_path / "label.nii.gz")
        info = {"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}
        store.save_label(series.uid, str(tmp_path / "label.nii.gz"), FINAL, info)
        elsewhere = DicomStore(Pacs(pacs.dicomweb), str(tmp_path / "other cache"))  # knows what the PACS says
        for one in (store, elsewhere):
            check(one, "liver", "spleen", image=series.uid)
            with pytest.raises(PromptError, match=r"without \['spleen'\]"):
                check(one, "liver", image=series.uid)
