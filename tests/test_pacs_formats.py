"""Series in a real PACS that are more than one plain grey slice per file. Skips without Orthanc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import openjpeg
from pydicom.dataset import FileDataset
from pydicom.uid import CTImageStorage, JPEG2000Lossless, MRImageStorage, RLELossless

from infers.dicom_store import DicomStore
from infers.pacs import Pacs as Remote
from lib.data.volume import load_volume
from tests.dicom_files import STORED, compressed, enhanced, save, series
from tests.pacs import running_pacs

ORDER = (3, 0, 5, 1, 4, 2)


def rle() -> list[FileDataset]:
    found = series(StudyInstanceUID="1.2.1", SOPClassUID=CTImageStorage)
    for dataset in found:
        dataset.compress(RLELossless)
    return found


def jpeg_2000() -> list[FileDataset]:
    found = series(StudyInstanceUID="1.2.2", Modality="MR", SOPClassUID=MRImageStorage)
    for dataset, pixels in zip(found, STORED):
        dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
        compressed(dataset, [openjpeg.encode(pixels, bits_stored=16)], JPEG2000Lossless)
    return found


def many_frames() -> list[FileDataset]:
    return [enhanced(ORDER)]


def many_frames_compressed() -> list[FileDataset]:
    streams = [openjpeg.encode(STORED[k], bits_stored=16) for k in ORDER]
    return [compressed(enhanced(ORDER), streams, JPEG2000Lossless)]


KINDS: tuple[Callable[[], list[FileDataset]], ...] = (rle, jpeg_2000, many_frames, many_frames_compressed)


def test_every_kind_of_series_comes_out_of_the_pacs_voxel_by_voxel(tmp_path: Path) -> None:
    with running_pacs(tmp_path / "orthanc") as pacs:
        made = {}
        for kind in KINDS:
            datasets = kind()
            made[kind.__name__] = str(datasets[0].SeriesInstanceUID), save(tmp_path / kind.__name__, datasets)
            pacs.upload(made[kind.__name__][1].iterdir())
        store = DicomStore(Remote(pacs.dicomweb), str(tmp_path / "cache"))
        assert set(store.list_images()) == {uid for uid, _ in made.values()}
        for name, (uid, folder) in made.items():
            image, direct, here = (
                nib.load(store.get_image_uri(uid)),
                load_volume(folder),
                load_volume(store._root / uid),
            )
            np.testing.assert_array_equal(here.array, direct.array, err_msg=name)
            np.testing.assert_array_equal(np.asarray(image.dataobj), direct.array, err_msg=name)
            np.testing.assert_array_equal(here.affine, direct.affine, err_msg=name)
            assert here.content_hash == direct.content_hash, name
