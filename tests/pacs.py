"""A PACS for tests: DICOM series made from phantoms, and an Orthanc of its own on a free loopback port."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pydicom
import pytest
import requests
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

PLUGINS = Path("/usr/share/orthanc/plugins")
START_LIMIT_S = 60.0
STORAGE = {"CT": CTImageStorage, "MR": MRImageStorage}


@dataclass(frozen=True)
class Series:
    """A DICOM series on disk.

    Args:
        study: StudyInstanceUID.
        uid: SeriesInstanceUID, its id in a DICOMweb store.
        folder: of its files.
        truth: ``(I, J, K)`` bool, what a perfect segmentation finds, k along the slice normal.
    """

    study: str
    uid: str
    folder: Path
    truth: np.ndarray

    def label(self) -> np.ndarray:
        """The truth as a label map of 1."""
        return self.truth.astype(np.uint8)

    @property
    def centre(self) -> list[int]:
        """A voxel inside the truth."""
        return [round(v) for v in np.argwhere(self.truth).mean(0)]


AIR = -1024  # of CT, stored as 0


def write_series(
    folder: Path, truth: np.ndarray, affine: np.ndarray, *, modality: str = "MR", seed: int = 0,
    values: Optional[np.ndarray] = None,
) -> Series:  # fmt: skip
    """One file per k of a phantom, instance numbers against the slice normal.

    Args:
        folder: new.
        truth: ``(I, J, K)`` bool.
        affine: voxel index to RAS mm; columns at right angles, right-handed in LPS.
        modality: MR or CT; CT values are rescaled.
        seed: of the patient and the noise.
        values: ``(I, J, K)`` intensities; without them bright inside ``truth``, and noise.
    """
    folder.mkdir(parents=True)
    if values is None:
        values = np.where(truth, 190, 80) + np.random.default_rng(seed).normal(0, 6, truth.shape)
    stored = np.clip(values - (AIR if modality == "CT" else 0), 0, None).astype(np.uint16)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(0))
    uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
    uids["FrameOfReferenceUID"] = generate_uid()
    for k in range(truth.shape[2]):
        slice_ = _slice(stored[:, :, k].T, modality, seed, **uids)
        slice_.ImageOrientationPatient = [f"{v:.10g}" for v in (lps[:3, :2] / spacing[:2]).T.ravel()]
        slice_.ImagePositionPatient = [f"{v:.10g}" for v in lps[:3, 2] * k + lps[:3, 3]]
        slice_.PixelSpacing = [f"{v:.10g}" for v in (spacing[1], spacing[0])]
        slice_.SliceThickness = slice_.SpacingBetweenSlices = f"{spacing[2]:.10g}"
        slice_.InstanceNumber = truth.shape[2] - k
        slice_.save_as(folder / f"{k:03d}.dcm", write_like_original=False)
    return Series(uids["StudyInstanceUID"], uids["SeriesInstanceUID"], folder, truth)


def _slice(pixels: np.ndarray, modality: str, seed: int, **uids: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = STORAGE[modality], generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    found.is_little_endian, found.is_implicit_VR = True, False
    values: dict[str, Any] = {
        "SOPClassUID": STORAGE[modality], "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "Modality": modality,
        "PatientID": f"phantom{seed}", "PatientName": f"Phantom^{seed}", "PatientBirthDate": "", "PatientSex": "O",
        "StudyID": "1", "StudyDate": "20240102", "StudyTime": "030405", "AccessionNumber": "",
        "ReferringPhysicianName": "", "Manufacturer": "generated", "SeriesNumber": 1, "PositionReferenceIndicator": "",
        "SeriesDescription": f"phantom {modality}", "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
        "PatientPosition": "HFS", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16,
        "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "Rows": pixels.shape[0], "Columns": pixels.shape[1],
        "WindowCenter": 60, "WindowWidth": 400, **uids,
    }  # fmt: skip
    for name, value in values.items():
        setattr(found, name, value)
    if modality == "CT":
        found.RescaleSlope, found.RescaleIntercept = 1, AIR
    found.PixelData = np.ascontiguousarray(pixels, "<u2").tobytes()
    return found


@dataclass(frozen=True)
class Pacs:
    """A running Orthanc.

    Args:
        root: of its own REST interface, without a slash at its end.
        process: the server.
    """

    root: str
    process: subprocess.Popen

    @property
    def dicomweb(self) -> str:
        """What ``--studies`` takes."""
        return f"{self.root}/dicom-web"

    def upload(self, files: Iterable[Path]) -> None:
        """Stores DICOM files."""
        for file in files:
            requests.post(f"{self.root}/instances", data=file.read_bytes(), timeout=60).raise_for_status()

    def series(self, modality: str = "SEG") -> list[str]:
        """SeriesInstanceUIDs of a modality."""
        found = requests.get(f"{self.dicomweb}/series", params={"Modality": modality}, timeout=60)
        found.raise_for_status()
        return [one["0020000E"]["Value"][0] for one in (found.json() if found.content else [])]

    def datasets(self, series: str) -> list[pydicom.Dataset]:
        """All objects of a series."""
        from io import BytesIO

        query = {"Level": "Series", "Query": {"SeriesInstanceUID": series}, "Expand": True}
        found = requests.post(f"{self.root}/tools/find", json=query, timeout=60).json()
        urls = [f"{self.root}/instances/{instance}/file" for one in found for instance in one["Instances"]]
        return [pydicom.dcmread(BytesIO(requests.get(url, timeout=60).content)) for url in urls]

    def delete(self, series: str) -> None:
        """Removes a series."""
        query = {"Level": "Series", "Query": {"SeriesInstanceUID": series}}
        for one in requests.post(f"{self.root}/tools/find", json=query, timeout=60).json():
            requests.delete(f"{self.root}/series/{one}", timeout=60).raise_for_status()


def put_label(url: str, image: str, file: Path, names: Mapping[str, int], tag: str = "final") -> requests.Response:
    """Slicer's *Submit label*.

    Args:
        url: of MONAI Label's server.
        image: SeriesInstanceUID.
        file: a label map.
        names: value by name.
        tag: ``final`` or another.
    """
    info = [{"name": name, "idx": number} for name, number in names.items()]
    form = {"label": (file.name, file.read_bytes()), "params": (None, json.dumps({"label_info": info}))}
    return requests.put(f"{url}/datastore/label", params={"image": image, "tag": tag}, files=form, timeout=120)


def why_no_orthanc() -> Optional[str]:
    """The reason to skip, or None."""
    if shutil.which("Orthanc") is None:
        return "Orthanc is not installed (Debian: apt-get install orthanc orthanc-dicomweb)"
    if not (PLUGINS / "libOrthancDicomWeb.so").exists():
        return "Orthanc's DICOMweb plugin is not installed (Debian: apt-get install orthanc-dicomweb)"
    return None


@contextmanager
def running_pacs(folder: Path) -> Iterator[Pacs]:
    """Starts Orthanc with its own configuration and storage and ends it; skips the test where there is none.

    Args:
        folder: new, for storage, configuration and log.
    """
    reason = why_no_orthanc()
    if reason:
        pytest.skip(reason)
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "orthanc.json"
    config.write_text(json.dumps(_configuration(folder, port)))
    with open(folder / "orthanc.log", "wb") as log:
        process = subprocess.Popen(["Orthanc", str(config)], cwd=folder, stdout=log, stderr=log)
    try:
        _wait(process, f"http://127.0.0.1:{port}", folder / "orthanc.log")
        yield Pacs(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def _configuration(folder: Path, port: int) -> dict[str, Any]:
    return {
        "Name": "tests",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": port,
        "RemoteAccessAllowed": False,  # this, and no bind address, keeps it local
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "Plugins": [str(PLUGINS / "libOrthancDicomWeb.so")],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }


def _wait(process: subprocess.Popen, root: str, log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"Orthanc ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            if requests.get(f"{root}/dicom-web/series", timeout=10).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.2)
    raise RuntimeError(f"Orthanc did not answer in {START_LIMIT_S} s:\n{log.read_text()[-2000:]}")


def random_version(state: Path, backbone: str, labels: tuple[str, ...]) -> None:
    """A live version of sam2rad that has learned nothing: enough to be listed, asked and stored."""
    import torch

    from lib.config import method_row
    from lib.engine import Engine
    from lib.learned import Learned
    from lib.settings import AppSettings
    from lib.versions.record import Trained
    from lib.versions.store import open_store

    torch.manual_seed(1)
    row, warm = method_row("sam2rad"), Engine(AppSettings.from_conf({"backbone": backbone, "prefetch": "false"})).warm()
    store = open_store(state, row.name)
    facts = Trained(
        backbone=backbone, backbone_digest=warm.weights_id, labels=labels,
        recipe={"preset": "frozen", "options": row.options}, split={"a": "train", "b": "val"},
        metrics={"mean_dice": 0.1, "dice": dict.fromkeys(labels, 0.1), "cases": {}},
    )  # fmt: skip
    version = store.add(Learned(row, warm, len(labels), "frozen").trained(), facts)
    store.promote(version.name, "test")
