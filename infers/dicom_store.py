"""The datastore of a PACS: series in as files and NIfTI, final labels out as DICOM SEG and back.

Upstream's DICOMweb datastore with our own reader and writer: an image is ``<cache>/<uid>.nii.gz``, for clients that
download it, beside the folder ``<cache>/<uid>`` with the series, which our engine reads. A final label is the newest
DICOM SEG in the PACS that refers to the image and fits it; saving adds a series and replaces none, so nothing a person
stored is lost. Other tags stay on this server. Thread-safe, also against the server's children on the same cache: one
lock file per series, files appear under their name only when complete, and a child writes nothing that the server reads
(:meth:`DicomStore.only_read`). A series is downloaded once. Left out: removing anything from the PACS, adding images to
it, a limit of the cache's size.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Optional

import nibabel as nib
import numpy as np
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException

from infers.base import told
from infers.local_store import LocalStore, entry
from infers.pacs import Kept, Pacs, is_uid
from lib.data.samples import LabelledCase, labels_of, load_case, named_values
from lib.data.volume import load_volume
from lib.data.write import write_mask
from lib.dicom_seg import read_seg, write_seg
from lib.errors import VolumeError
from lib.provenance import Kind, Provenance
from lib.told import check_told
from lib.types import Volume

logger = logging.getLogger(__name__)
FINAL = DefaultLabelTag.FINAL.value
LIST_S = 15.0  # how old the lists of series may be
PARTS = ".parts"  # locks, and what is not complete yet
UNREADABLE = ".unreadable"  # an empty file for every DICOM SEG that does not fit its image
INFO = {
    "StudyDate": "00080020",
    "StudyTime": "00080030",
    "Modality": "00080060",
    "RetrieveURL": "00081190",
    "PatientID": "00100020",
    "StudyInstanceUID": "0020000D",
}


class DicomStore(LocalStore, DICOMWebDatastore):
    """Images and labels of a PACS.

    Args:
        pacs: where they are.
        cache: folder for what was downloaded, one folder per address inside; None means the user's cache.
    """

    def __init__(self, pacs: Pacs, cache: Optional[str] = None) -> None:
        age = min(LIST_S, settings.MONAI_LABEL_DICOMWEB_CACHE_EXPIRY)
        self._pacs = pacs
        self._images, self._segs = Kept(pacs.images, age), Kept(self._candidates, age)
        self._refused: set[str] = set()
        self._unreadable: set[str] = set()
        super().__init__(client=pacs.client, search_filter={}, cache_path=cache)
        self._root = Path(self._datastore.image_path()).resolve()
        _keep_private(self._root)
        for name in (PARTS, UNREADABLE):
            (self._root / name).mkdir(exist_ok=True)

    def only_read(self) -> None:
        """Makes this the store of a child process: what it learns stays with it, so that the server alone writes.

        Its file of the store would be as old as the child, and drafts that were saved since would be gone.
        """
        super().only_read()
        self._segs.forget()

    def _reconcile_datastore(self) -> None:
        """Upstream's without its writing, as every child begins with it; final labels are the PACS's alone."""
        with self._index_lock:
            self._remove_parts()
            self._remove_non_existing()
            self._add_non_existing_images()
            for folder in Path(self._datastore.label_path(None)).iterdir():
                if folder.is_dir() and folder.name != FINAL:
                    self._add_non_existing_labels(folder.name)

    def _candidates(self) -> dict[str, list[str]]:
        """Images to their DICOM SEG series, newest first, without those that turned out to be unreadable.

        A child tries them all again, so that a training tells of each and a new version of this program may read it.
        """
        bad = self._unreadable if self._is_child else {*os.listdir(self._root / UNREADABLE)}
        left = {image: [s for s in segs if s not in bad] for image, segs in self._pacs.segmentations().items()}
        return {image: segs for image, segs in left.items() if segs}

    def list_images(self) -> list[str]:
        """Series with images."""
        return list(self._images.now())

    def get_labeled_images(self, label_tag: Optional[str] = None, labels: Optional[list[str]] = None) -> list[str]:
        """Images that a DICOM SEG refers to, but for those whose every SEG turned out to be unreadable."""
        segs = self._segs.now()
        return [image for image in self.list_images() if image in segs]

    def get_unlabeled_images(self, label_tag: Optional[str] = None, labels: Optional[list[str]] = None) -> list[str]:
        """Images without one, but for those that turned out to be unreadable: nobody is offered them twice."""
        done = {*self.get_labeled_images(), *self._refused}
        return [image for image in self.list_images() if image not in done]

    def status(self) -> dict[str, Any]:
        """Counts as of the last question; a click asks for them too and does not wait for the PACS."""
        images, segs = self._images.soon(), self._segs.soon()
        done = sum(image in segs for image in images)
        drafts = {tag: len(self._datastore.filter_by_tag(tag)) for tag in self._datastore.tags() - {FINAL}}
        return {"total": len(images), "completed": done, "label_tags": {**drafts, **({FINAL: done} if done else {})}}

    def get_image_uri(self, image_id: str) -> str:
        """Path of the image as NIfTI; the series lies beside it. Downloads it if it is not here.

        Raises:
            ImageNotFoundException: for a series that the PACS does not have.
            MONAILabelException: where the PACS is away, or the series cannot be read; the message says why.
        """
        if not is_uid(image_id):
            raise ImageNotFoundException("Expected the SeriesInstanceUID of an image. Choose the image again.")
        image = self._root / f"{image_id}.nii.gz"
        if not self._is_here(image_id):
            with self._alone(image_id) as scratch:
                self._fetch(image_id, scratch)
                if not image.exists():
                    self._convert(image_id, image, scratch)
            self._register(image_id)
        return str(image)

    def _is_here(self, image_id: str) -> bool:
        """Whether series and NIfTI are here, and the store knows what OHIF needs of it.

        Upstream's store knows a file that a child downloaded, but nothing about it.
        """
        known = self._datastore.objects.get(image_id)
        files = (self._root / f"{image_id}.nii.gz").exists() and (self._root / image_id).is_dir()
        return files and known is not None and "SeriesInstanceUID" in known.image.info

    @contextmanager
    def _alone(self, series: str) -> Iterator[Path]:
        """One thread or process at a time per series, with an empty folder on the cache's own disk."""
        with FileLock(self._root / PARTS / f"{series}.lock"):
            scratch = self._root / PARTS / series
            shutil.rmtree(scratch, ignore_errors=True)  # of a download that was killed
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _fetch(self, series: str, scratch: Path) -> None:
        folder = self._root / series
        if not folder.exists():
            part = scratch / "series"
            part.mkdir()
            self._pacs.download(series, part)
            os.replace(part, folder)

    def _convert(self, image_id: str, image: Path, scratch: Path) -> None:
        part = scratch / image.name
        try:
            with told():
                _write_nifti(load_volume(self._root / image_id), part)
        except MONAILabelException:
            self._refused.add(image_id)
            raise
        os.replace(part, image)

    def _register(self, image_id: str) -> None:
        info = self._dicom_info(image_id)
        with self._index_lock:
            known = self._datastore.objects.get(image_id)
            model = ImageLabelModel(image=DataModel(info=info, ext=".nii.gz"), labels=known.labels if known else {})
            with entry(self._datastore.objects, image_id, model):
                self._update_datastore_file()

    def _dicom_info(self, series_id: str) -> dict[str, Any]:
        """What OHIF needs to open the next sample."""
        facts, info = self._pacs.facts(series_id), {"SeriesInstanceUID": series_id}
        for name, tag in INFO.items():
            info[name] = str((facts.get(tag, {}).get("Value") or ["UNK"])[0])
        return info

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """A final label becomes a new DICOM SEG series in the PACS; another tag stays here.

        Args:
            image_id: SeriesInstanceUID.
            label_filename: a label map on the image's grid.
            label_tag: ``final`` or another.
            label_info: what the client says about it; ``label_info`` inside names the values, and ``provenance`` is a
                record of :class:`lib.provenance.Provenance`; without it a person at the client made the label.
            label_id: upstream's, not used.

        Returns:
            The image's id, which is the label's too.

        Raises:
            MONAILabelException: for an empty label or one on another grid, before anything is stored.
        """
        with told():
            check_told(label_info)
        image = self.get_image_uri(image_id)
        if label_tag != FINAL:
            return LocalStore.save_label(self, image_id, label_filename, label_tag, label_info)
        with told(), tempfile.TemporaryDirectory(dir=self._root / PARTS) as scratch:
            record = label_info.get("provenance")
            source = Provenance(kind=Kind.MANUAL) if record is None else Provenance.from_json(record)
            labels, names = _read_label(Path(image), Path(label_filename), label_info)
            file = write_seg(self._root / image_id, labels, names, Path(scratch) / "label.dcm", source)
            series = self._pacs.store(file)
        self._segs.forget()
        self._keep(image_id, labels, names, {**label_info, "provenance": source.to_json()}, series)
        return image_id

    def _keep(
        self, image_id: str, labels: np.ndarray, names: Mapping[str, int], info: Mapping[str, Any], series: str
    ) -> None:
        """The local copy of a final label, which training reads; a child's does not replace the server's."""
        ext = f".{series}.nii.gz" if self._is_child else ".nii.gz"
        name = f"{image_id}{ext}"
        facts = {"label_info": [{"name": name, "idx": n} for name, n in names.items()], "SeriesInstanceUID": series}
        with tempfile.TemporaryDirectory(dir=self._root / PARTS) as scratch:
            copy = Path(scratch) / name
            write_mask(load_volume(self.get_image_uri(image_id)), labels, copy, np.uint16)
            model = DataModel(info={**info, **facts, "ts": int(time.time()), "name": name}, ext=ext)
            place = Path(self._datastore.label_path(FINAL)) / name
            with self._index_lock, entry(self._datastore.objects[image_id].labels, FINAL, model):
                self._write_list(lambda: os.replace(copy, place))

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """Tags of the image's labels; final only where the PACS holds one that we can read."""
        local = {tag: image_id for tag in super().get_labels_by_image_id(image_id) if tag != FINAL}
        try:
            return {**local, FINAL: image_id} if self._final(image_id) else local
        except MONAILabelException as error:
            logger.warning("A final label of the PACS is passed over: %s", error.msg)
            return local

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        """The image's id where it has such a label, else an empty text; only a final one is asked of the PACS."""
        if tag == FINAL:
            return super().get_label_by_image_id(image_id, tag)
        return image_id if self._datastore.label(image_id, tag) else ""

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """Path of a label, or an empty text where there is none."""
        if label_tag == FINAL and not self._final(label_id):
            return ""
        return LocalDatastore.get_label_uri(self, label_id, label_tag)

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known about a label; ``label_info`` inside names its values."""
        if label_tag == FINAL and not self._final(label_id):
            return {}
        return LocalDatastore.get_label_info(self, label_id, label_tag)

    def _final(self, image_id: str) -> bool:
        """Whether the image has a final label that can be read; the newest such one is then here.

        Raises:
            MONAILabelException: where the PACS does not hand one over: an older one would pass for the newest.
        """
        for series in self._segs.now().get(image_id, ()):
            self.get_image_uri(image_id)
            mine = self._datastore.label(image_id, FINAL)
            if mine is not None and mine.info.get("SeriesInstanceUID") == series:
                return True
            with told():
                if self._bring(image_id, series):
                    return True
        return False

    def _bring(self, image_id: str, series: str) -> bool:
        """Downloads a final label; False where it cannot be read, which is remembered."""
        mark = self._root / UNREADABLE / series
        with self._alone(series) as scratch:
            self._pacs.download(series, scratch)
            try:
                labels, names, kinds = read_seg(_only_file(scratch), self._root / image_id)
            except VolumeError as error:
                logger.warning("A final label of the PACS is passed over: %s", error)
                mark.touch()
                self._unreadable.add(series)
                self._segs.forget()
                return False
            mark.unlink(missing_ok=True)
            self._keep(image_id, labels, names, {"kinds": {name: kind.value for name, kind in kinds.items()}}, series)
        return True

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Paths of images and their final labels."""
        labelled = [i for i in self.get_labeled_images() if FINAL in self.get_labels_by_image_id(i)]
        found = [{"image": self.get_image_uri(i), "label": self.get_label_uri(i, FINAL)} for i in labelled]
        if full_path:
            return found
        return [{key: os.path.relpath(path, self._root) for key, path in one.items()} for one in found]

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> NoReturn:
        """Refused."""
        raise _refusal("Images come into a PACS by its own means. Send the series to it.")

    def remove_image(self, image_id: str) -> NoReturn:
        """Refused."""
        raise _refusal("Expected to remove nothing from the PACS. Remove the series there.")

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Removes a label that is only here; a final one is refused."""
        if label_tag == FINAL:
            raise _refusal("Expected to remove nothing from the PACS. Remove the segmentation series there.")
        LocalDatastore.remove_label(self, label_id, label_tag)


def _keep_private(folder: Path) -> None:
    """For the server's user alone: whole DICOM files lie there."""
    try:
        folder.chmod(0o700)
    except OSError as error:
        logger.warning("The folder of downloaded series stays readable for others: %s", type(error).__name__)


def _refusal(sentence: str) -> MONAILabelException:
    return MONAILabelException(MONAILabelError.INVALID_INPUT, sentence)


def _write_nifti(volume: Volume, path: Path) -> None:
    """The image for clients that download it; whole numbers stay whole, colours stay colours."""
    voxels = volume.array
    if volume.is_rgb:
        voxels = np.ascontiguousarray(voxels).view([(c, "u1") for c in "RGB"])[..., 0]
    elif np.array_equal(short := voxels.astype(np.int16), voxels):
        voxels = short
    image = nib.Nifti1Image(voxels, volume.affine)
    image.set_sform(volume.affine, code="scanner")
    image.set_qform(volume.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _read_label(image: Path, label: Path, info: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, int]]:
    """A client's label map, ``(I, J, K)`` uint8 with the numbers of the names beside it.

    Raises:
        VolumeError: where it is empty, on another grid, or has values without a name.
    """
    case = LabelledCase("", image, label, named_values(info))
    names = labels_of([case])
    return load_case(case, names).target, {name: number for number, name in enumerate(names, start=1)}


def _only_file(folder: Path) -> Path:
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise VolumeError(f"Expected one segmentation object per series; received {len(files)}. Keep one of them.")
    return files[0]
