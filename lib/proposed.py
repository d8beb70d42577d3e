"""Points that a learned method proposed, as voxels, for replies and pictures.

Frame: pixels of the backbone's input become ``_ijk`` of the stored volume. Pure, thread-safe. At most K labels times D
slices times P points. Left out: which of them a user's own prompts took the place of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lib.data.geometry import from_slice_rc
from lib.transform import SliceTransform
from lib.types import Click


def points_by_label(
    points: Tensor, labels: Sequence[str], axis: int, transform: SliceTransform
) -> dict[str, dict[int, tuple[Click, ...]]]:
    """The points by label and slice index; a class that is not on a slice has none there.

    Args:
        points: ``(D, K, P, 3)`` x, y in backbone pixels and label: 1 positive, 0 negative, -1 no point.
        labels: K names.
        axis: of the slices.
        transform: of these slices; what lies in its padding is left out.
    """
    found: dict[str, dict[int, tuple[Click, ...]]] = {label: {} for label in labels}
    for index, classes in enumerate(points):
        for label, mine in zip(labels, classes):
            if clicks := _clicks(mine[mine[:, 2] >= 0], index, axis, transform):
                found[label][index] = clicks
    return found


def _clicks(points: Tensor, index: int, axis: int, transform: SliceTransform) -> tuple[Click, ...]:
    places = np.rint(transform.points_rc(points[:, :2])).astype(int)
    inside = ((places >= 0) & (places < transform.size)).all(1)
    told = zip(places[inside].tolist(), points[:, 2].numpy()[inside].tolist())
    return tuple(Click(from_slice_rc(index, row, column, axis), label > 0) for (row, column), label in told)
