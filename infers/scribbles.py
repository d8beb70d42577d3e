"""Scribbles that arrive as a label map, from the scribbles panels of 3D Slicer and OHIF or from a client of one's own.

Slicer uploads *all* segments: its two scribble layers, and the segmentation so far; ``label_info`` names the values.
Frame: voxel indices of the stored array. Thread-safe: no state. The only file ever opened is one that the server itself
put away. Left out: upstream's habit to fill everything outside ``roi`` with background; a ROI is a box prompt here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from lib.data.readers import read_nifti, read_nrrd, suffix_of
from lib.data.samples import BACKGROUND
from lib.errors import PromptError
from lib.types import Index, Stroke

# Slicer's and OHIF's names for the two layers of their scribbles panels.
FOREGROUND_LAYER, BACKGROUND_LAYER = "foreground_scribbles", "background_scribbles"
MAP_READERS = {".nii": read_nifti, ".nii.gz": read_nifti, ".nrrd": read_nrrd}


def scribble_prompts(
    array: np.ndarray, names: Mapping[int, str], *, current: str, labels: Sequence[str]
) -> dict[str, tuple[Stroke, ...]]:
    """The strokes of a label map, one per segment and label.

    Where ``foreground_scribbles`` or ``background_scribbles`` is among the names, the map comes from a scribbles panel:
    these two layers belong to the current label, and all else in it is the segmentation so far and no prompt. Otherwise
    every segment called like a label is a positive stroke of it, and ``background`` a negative one of all labels.

    Args:
        array: ``(I, J, K)`` values of segments; values without a name are passed over.
        names: of the segments, by value.
        current: the label that is being edited.
        labels: names that the model knows.

    Returns:
        Strokes by label; only labels that have some.
    """
    meaning: dict[str, tuple[Sequence[str], bool]] = {name: ((name,), True) for name in labels}
    meaning[BACKGROUND] = (labels, False)
    layers = {FOREGROUND_LAYER: ((current,), True), BACKGROUND_LAYER: ((current,), False)}
    meaning = dict(layers) if set(layers) & set(names.values()) else meaning
    found: dict[str, tuple[Stroke, ...]] = {}
    for value, name in sorted(names.items()):
        owners, positive = meaning.get(name, ((), True))
        voxels = np.argwhere(array == value) if owners else np.empty((0, 3), np.int64)
        for owner in owners if len(voxels) else ():
            found[owner] = (*found.get(owner, ()), Stroke(voxels, positive))
    return found


def uploaded_file(label: Any) -> Optional[Path]:
    """The file of a request's ``label``, or None where that is a name or a file the server did not put away itself.

    Upstream writes a label file that is uploaded under a name of its ``tempfile`` module and puts this path into
    ``label``. A client that sends ``label`` among its parameters overwrites it, with a name or with any path of the
    server; so a path counts only where it is a file directly in the folder for temporary files, links resolved, whose
    name has ``tempfile``'s prefix. Both clients leave the key out when they upload.
    """
    if not isinstance(label, str) or not os.path.isabs(label):
        return None
    try:
        real = Path(label).resolve()
        own = real.parent == Path(tempfile.gettempdir()).resolve() and real.name.startswith(tempfile.gettempprefix())
        return real if own and real.is_file() else None
    except (OSError, ValueError):  # no path: too long, or with a NUL
        return None


def read_label_map(label: Any, shape: Index) -> np.ndarray:
    """``(I, J, K)`` values of an uploaded label map.

    Args:
        label: the request's ``label``.
        shape: voxels of the volume along i, j, k.

    Raises:
        PromptError: if it is no upload, neither NIfTI nor NRRD, or on another grid.
        VolumeError: if it cannot be read.
    """
    path = uploaded_file(label)
    if path is None or suffix_of(path) not in MAP_READERS:
        raise PromptError(f"label: expected an uploaded label map, one of {list(MAP_READERS)}. Export it as NIfTI.")
    array = MAP_READERS[suffix_of(path)](path).array
    if array.shape != tuple(shape):
        raise PromptError(
            f"label: expected a label map on the image's grid of {tuple(shape)} voxels, received {array.shape}."
            " Export it with the image as reference."
        )
    return array
