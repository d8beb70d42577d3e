"""3D Slicer's MONAI Label module without its windows: Slicer's own scene, volumes, markups and segmentations.

:class:`SlicerModule` does to a server what the buttons of the unmodified module do, with Slicer's core as packaged for
Python (``slicer-core``): which file goes where, RAS to IJK by the volume node's own matrices, replies imported as
segments, segments exported as labels. Where the module does something odd (an ``idx`` that is no voxel value, two
corners for a ROI), so does this. Left out: everything that only windows decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.parse import quote_plus

import numpy as np
import pytest
import requests

from tests.serving import Server

sc = pytest.importorskip("slicer_core", reason="needs 3D Slicer's core: pip install -r requirements-dev.txt")
vtk = pytest.importorskip("vtk", reason="comes with slicer-core")
from vtk.util import numpy_support  # noqa: E402

SCRIBBLES = ("foreground_scribbles", "background_scribbles")
Ras = Sequence[float]


def matrix_of(node: Any) -> np.ndarray:
    """``(4, 4)`` voxel to RAS mm of a volume node."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])


def voxels_of(node: Any) -> np.ndarray:
    """``(I, J, K)`` voxels of a volume node."""
    image = node.GetImageData()
    return numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1]).T


def grid_node(scene: Any, shape: Sequence[int], affine: np.ndarray) -> Any:
    """A volume node without a file: a grid of voxels at its place."""
    image = vtk.vtkImageData()
    image.SetDimensions(*shape)
    image.AllocateScalars(vtk.VTK_SHORT, 1)
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy([float(v) for v in affine.ravel()])
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    node.SetAndObserveImageData(image)
    node.SetIJKToRASMatrix(matrix)
    return node


def points_ijk(scene: Any, volume: Any, points_ras: Iterable[Ras]) -> list[list[int]]:
    """Control points of a markup as the module sends them."""
    markup = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    for point in points_ras:
        markup.AddControlPoint(*[float(v) for v in point])
    places = [markup.GetNthControlPointPosition(n) for n in range(markup.GetNumberOfControlPoints())]
    scene.RemoveNode(markup)
    return [_to_ijk(volume, place) for place in places]


def roi_ijk(scene: Any, volume: Any, centre_ras: Ras, size_mm: Ras) -> list[int]:
    """A ROI as the module sends it: two opposite corners of the RAS box, one pair per voxel axis, in any order."""
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    roi.SetCenter(*centre_ras)
    roi.SetSize(*size_mm)
    centre, size = [0.0] * 3, roi.GetSize()
    roi.GetCenter(centre)
    scene.RemoveNode(roi)
    low, high = ([c + sign * s / 2 for c, s in zip(centre, size)] for sign in (-1, 1))
    return [v for pair in zip(_to_ijk(volume, low), _to_ijk(volume, high)) for v in pair]


def _to_ijk(volume: Any, point_ras: Ras) -> list[int]:
    matrix = vtk.vtkMatrix4x4()
    volume.GetRASToIJKMatrix(matrix)
    return [round(v) for v in matrix.MultiplyDoublePoint([*point_ras, 1.0])[:3]]


def _string_array(values: Iterable[str]) -> Any:
    array = vtk.vtkStringArray()
    for value in values:
        array.InsertNextValue(value)
    return array


class SlicerModule:
    """One scene and one server.

    Args:
        server: to talk to.
        folder: for downloads and uploads.
        extension: the module's setting *File Extension*.
    """

    def __init__(self, server: Server, folder: Path, extension: str = ".nii.gz") -> None:
        self.server, self.folder, self.extension = server, folder, extension
        self.client = server.client(folder)
        self.info = self.client.info()
        self.scene = sc.vtkMRMLScene()
        self.logic = sc.vtkSlicerSegmentationsModuleLogic()
        self.logic.SetMRMLScene(self.scene)
        self.volume: Any = None
        self.node: Any = None
        self.sample: dict[str, Any] = {}
        self.reply: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    # -------------------------------------------------------------------------------------------------- images

    def load(self, path: Path, kind: str = "vtkMRMLScalarVolumeNode") -> Any:
        """A file as a volume node, not centred, as Slicer loads it."""
        node, storage = self.scene.AddNewNodeByClass(kind), sc.vtkMRMLVolumeArchetypeStorageNode()
        self.scene.AddNode(storage)
        storage.SetFileName(str(path))
        storage.SetCenterImage(0)
        assert storage.ReadData(node), "Slicer cannot read the file"
        return node

    def write(self, node: Any, name: str) -> Path:
        """A volume node as a file of the module's extension."""
        storage = sc.vtkMRMLVolumeArchetypeStorageNode()
        self.scene.AddNode(storage)
        storage.SetFileName(str(self.folder / f"{name}{self.extension}"))
        assert storage.WriteData(node), "Slicer cannot write the node"
        return self.folder / f"{name}{self.extension}"

    def next_sample(self, strategy: str) -> dict[str, Any]:
        """*Next Sample*, with the image downloaded as on another machine."""
        self.open_stored(self.client.next_sample(strategy, self.options("strategies", strategy)))
        return self.sample

    def open_stored(self, sample: Mapping[str, Any]) -> None:
        """Downloads an image of the store."""
        response = requests.get(f"{self.server.url}/datastore/image?image={quote_plus(sample['id'])}", timeout=60)
        response.raise_for_status()
        path = self.folder / sample["name"]
        path.write_bytes(response.content)
        self._open(path, dict(sample))

    def open_own(self, path: Path) -> None:
        """A file of the user's: written by Slicer and uploaded as a session before the first inference."""
        self._open(path, {"id": path.name.split(".")[0], "session": True})

    def _open(self, path: Path, sample: dict[str, Any]) -> None:
        self.volume, self.sample = self.load(path), sample
        self.node = self.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        self.node.SetReferenceImageGeometryParameterFromVolumeNode(self.volume)
        for label in self.info["labels"]:
            self.add_segment(label)

    def load_original(self) -> list[str]:
        """The label that a model left for this image, as *Next Sample* loads it; its names."""
        stored = self.client.datastore()["objects"][self.sample["id"]]["labels"]["original"]
        labels = list(stored["info"]["params"]["label_names"])
        self.show(self.client.download_label(self.sample["id"], "original"), labels)
        return labels

    # ------------------------------------------------------------------------------------------------ segments

    def add_segment(self, name: str) -> None:
        """An empty segment."""
        self.node.GetSegmentation().AddEmptySegment(name, name)

    def names(self) -> list[str]:
        """Of all segments, in their order."""
        segmentation = self.node.GetSegmentation()
        return [segmentation.GetNthSegment(n).GetName() for n in range(segmentation.GetNumberOfSegments())]

    def paint(self, name: str, mask: np.ndarray) -> None:
        """Voxels drawn by hand into a segment, on the volume's grid."""
        node = self.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
        node.SetAndObserveImageData(vtk.vtkImageData())
        node.CopyOrientation(self.volume)
        node.GetImageData().SetDimensions(*mask.shape)
        array = numpy_support.numpy_to_vtk(np.asfortranarray(mask, np.uint8).reshape(-1, order="F"), deep=True)
        node.GetImageData().GetPointData().SetScalars(array)
        assert self.logic.ImportLabelmapToSegmentationNode(node, self.node, _string_array([name]))

    def show(self, file: str, labels: Iterable[str]) -> None:
        """A label file into the segments of these names, value by value."""
        node = self.load(Path(file), "vtkMRMLLabelMapVolumeNode")
        names = [label for label in labels if label != "background"]
        assert self.logic.ImportLabelmapToSegmentationNode(node, self.node, _string_array(names))
        self.scene.RemoveNode(node)

    def exported(self, names: Iterable[str]) -> Any:
        """A label map node of these segments on the volume's grid, values from 1."""
        segmentation = self.node.GetSegmentation()
        ids = _string_array(segmentation.GetSegmentIdBySegmentName(name) for name in names)
        node = self.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
        assert self.logic.ExportSegmentsToLabelmapNode(self.node, ids, node, self.volume)
        return node

    def segment(self, name: str) -> np.ndarray:
        """``(I, J, K)`` bool voxels of a segment on the volume's grid."""
        return voxels_of(self.exported([name])) > 0

    # ------------------------------------------------------------------------------------------------ requests

    def options(self, section: str, name: str) -> dict[str, Any]:
        """The options table: the first of a list, or what was chosen."""
        config = self.info[section].get(name, {}).get("config", {})
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}

    def choose(self, model: str, key: str, value: Any) -> None:
        """A cell of the options table, typed or picked by the user, turned back into a value as the module does."""
        config = self.info["models"][model]["config"]
        old = config[key]
        if isinstance(old, list):
            old.remove(value)
            config[key] = [value, *old]
        else:
            config[key] = type(old)(value)

    def click(self, model: str, label: str, foreground: Iterable[Ras] = (), background: Iterable[Ras] = ()) -> None:
        """Points of a *deepgrow* model; its *2-D* kind sends the points of the last point's slice."""
        points = {"foreground": foreground, "background": background}
        sent = {key: points_ijk(self.scene, self.volume, value) for key, value in points.items()}
        if self.info["models"][model]["dimension"] == 2:
            last = (sent["foreground"] or sent["background"])[-1][2]
            sent = {key: [p for p in value if p[2] == last] for key, value in sent.items()}
        self.infer(model, {"label": label, **sent}, [label])

    def click_labels(self, model: str, current: str, landmarks: Mapping[str, Iterable[Ras]]) -> None:
        """Points of a *deepedit* model: landmarks of every segment that the server names, and no others."""
        segmentation = self.node.GetSegmentation()
        for name, places in landmarks.items():
            segment = segmentation.GetSegment(segmentation.GetSegmentIdBySegmentName(name))
            segment.SetTag("MONAILabel.ForegroundPoints", json.dumps(points_ijk(self.scene, self.volume, places)))
        self.infer(model, {**{n: self._landmarks(n) for n in self.info["labels"]}, "label": current}, None)

    def _landmarks(self, name: str) -> list[list[int]]:
        segmentation = self.node.GetSegmentation()
        segment, text = segmentation.GetSegment(segmentation.GetSegmentIdBySegmentName(name)), vtk.mutable("")
        found = segment is not None and segment.GetTag("MONAILabel.ForegroundPoints", text)
        return json.loads(str(text)) if found and str(text) else []

    def run(self, model: str) -> None:
        """*Run* of the automatic tab."""
        self.infer(model, {}, None)

    def scribble(self, model: str, label: str, roi: Sequence[int] = ()) -> None:
        """*Update* of the scribbles tab: all segments as a label map, the two layers among them."""
        names = self.names()
        file = self.write(self.exported(names), "scribbles")
        facts = {"label_info": [{"name": name, "id": n} for n, name in enumerate(names, 1)]}
        self.infer(model, {"roi": list(roi), "selected_label_name": label, **facts}, [label], file)

    def infer(
        self, model: str, params: dict[str, Any], labels: Optional[Iterable[str]], label_file: Optional[Path] = None
    ) -> None:
        """The request and what the module does with the reply; ``labels`` None takes the names of the reply."""
        self.asked = {**params, **self.options("models", model), "result_extension": ".nrrd", "result_dtype": "uint8"}
        label_in = None if label_file is None else str(label_file)
        file, self.reply = self.client.infer(
            model, self.sample["id"], dict(self.asked), label_in, session_id=self._session()
        )
        if labels is None:
            named = self.reply["label_names"]
            labels = sorted(named, key=named.__getitem__)
        self.show(file, labels)

    def _session(self) -> Optional[str]:
        if self.sample.get("session") and "session_id" not in self.sample:
            file = self.write(self.volume, "session")
            self.sample["session_id"] = self.client.create_session(str(file))["session_id"]
        return self.sample.get("session_id")

    def save(self) -> dict[str, Any]:
        """*Submit Label*: a user's own image is uploaded first; ``idx`` counts all segments, as in the module."""
        if self.sample.get("session"):
            self.client.upload_image(str(self.write(self.volume, "upload")), self.sample["id"])
        kept = [(n, name) for n, name in enumerate(self.names(), 1) if name not in ("background", *SCRIBBLES)]
        file = self.write(self.exported(name for _, name in kept), "submitted")
        info = {"label_info": [{"name": name, "idx": n} for n, name in kept]}
        return self.client.save_label(self.sample["id"], str(file), params=info)
