"""Labels of the datastore as label maps with names, for what looks at labels: scoring and provenance.

Frame: voxels of the image's file. Thread-safe: no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore

from lib.data.geometry import choose_axis
from lib.data.samples import BACKGROUND, names_of, read_label
from lib.quality.checks import LabelMap
from lib.types import Volume

LATEST = 1e12  # seconds since 1970: no time that a store has


def stored_map(datastore: Datastore, image: str, tag: str, volume: Volume, labels: Sequence[str] = ()) -> LabelMap:
    """A label of the store.

    Args:
        datastore: the store.
        image: identifier.
        tag: of a label that the image has.
        volume: the image.
        labels: names of the values 1..K in a label that declares none.

    Raises:
        GridError: for a label on another grid.
        VolumeError: for one that cannot be read.
        CapacityError: for one that does not fit the memory.
    """
    label = datastore.get_label_by_image_id(image, tag)
    info = datastore.get_label_info(label, tag) or {}
    return label_map(volume, Path(datastore.get_label_uri(label, tag)), names_of(info), labels)


def hand_outs(info: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What MONAI Label wrote of an image's hand-outs by strategies, each with its ``ts``; clients may write there too.

    Args:
        info: of the image, as the datastore gives it.
    """
    found = info.get("strategy")
    entries = found.values() if isinstance(found, Mapping) else ()
    return [e for e in entries if isinstance(e, Mapping) and time_of(e)]


def time_of(info: Mapping[str, Any]) -> float:
    """When something was written into the store, in seconds since 1970; 0 where a client wrote nonsense there.

    Args:
        info: of a label or a hand-out, with its ``ts``.
    """
    ts = info.get("ts")
    return float(ts) if isinstance(ts, (int, float)) and 0 < ts < LATEST else 0.0


def label_map(volume: Volume, path: Path, names: Mapping[int, str], labels: Sequence[str] = ()) -> LabelMap:
    """A label file with the names of its values.

    Args:
        volume: the image.
        path: of the label file.
        names: value to name, as declared; empty where nothing was.
        labels: names of the values 1..K in a label that declares none; background is none of them, as in training.

    Raises:
        GridError, VolumeError, CapacityError: as :func:`lib.data.samples.read_label`.
    """
    voxels, found = read_label(volume, path)
    declared = dict(names) or dict(enumerate((name for name in labels if name != BACKGROUND), start=1))
    unnamed = tuple(value for value in found if declared and value not in declared)
    known = {value: f"label_{value}" for value in found} | declared
    axis = choose_axis(volume.spacing_mm, volume.shape, is_2d=volume.is_2d)
    return LabelMap(np.asarray(voxels), known, volume.affine, volume.spacing_mm, axis, unnamed, bool(declared))
