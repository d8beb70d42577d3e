"""One case beside the others of its store: sides, orientation of the image, missing labels, outlier volumes.

Frame: RAS mm from the middle of the image's grid, so that a crop or a shifted table matters little. Each case is
compared with all others, never with itself. Pure functions, thread-safe. What a store does not show (fewer cases than
``cases_needed``, no majority) is not said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lib.quality.checks import LabelMap
from lib.quality.rules import Remark, Rules

SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))  # negative, positive RAS
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Facts:
    """What is kept of a case for the comparison.

    Args:
        volume_mm3: by label that has voxels.
        centre_mm: centre of mass by label, RAS mm from the image's middle.
        orientation: where the axes i, j, k run to, such as ``RAS``; its handedness with it.
    """

    volume_mm3: dict[str, float]
    centre_mm: dict[str, tuple[float, float, float]]
    orientation: str


def facts_of(label: LabelMap) -> Facts:
    """Volumes and places of one label map."""
    voxel_mm3 = float(np.prod(label.spacing_mm))
    middle = (np.array(label.voxels.shape) - 1) / 2
    volumes: dict[str, float] = {}
    centres: dict[str, tuple[float, float, float]] = {}
    for value, name, box in label.structures():
        mask = label.voxels[box] == value
        start = np.array([s.start for s in box])
        offset = label.affine[:3, :3] @ (np.array(ndimage.center_of_mass(mask)) + start - middle)
        volumes[name] = int(mask.sum()) * voxel_mm3
        centres[name] = (float(offset[0]), float(offset[1]), float(offset[2]))
    return Facts(volumes, centres, orientation_of(label.affine))


def orientation_of(affine: np.ndarray) -> str:
    """Where the axes i, j, k run to, the nearest anatomical direction of each, such as ``RAS`` or ``LPS``."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    code = ""
    for column in directions.T:
        axis = int(np.abs(column).argmax())
        code += SIDES[axis][int(column[axis] > 0)][0].upper()
    return code


def compare(cases: Mapping[str, Facts], rules: Rules) -> dict[str, list[Remark]]:
    """What is remarkable about each case beside all the others.

    Args:
        cases: by identifier.
        rules: thresholds.
    """
    found: dict[str, list[Remark]] = {case: [] for case in cases}
    if len(cases) < max(2, rules.cases_needed):
        return found
    for case, one in cases.items():
        others = [facts for name, facts in cases.items() if name != case]
        found[case] = [*_orientation(one, others, rules), *_missing(one, others, rules)]
        for label in one.volume_mm3:
            same = [facts for facts in others if label in facts.volume_mm3]
            if len(same) + 1 >= rules.cases_needed:
                found[case] += [*_volume(label, one, same, rules), *_side(label, one, same, rules)]
    return found


def _orientation(one: Facts, others: list[Facts], rules: Rules) -> list[Remark]:
    code, count = Counter(facts.orientation for facts in others).most_common(1)[0]
    if one.orientation == code or count < rules.majority * len(others):
        return []
    mirrored = _is_right(one.orientation) != _is_right(code)
    more = ", which is its mirror image: check that left is left" if mirrored else ""
    text = f"The image's axes run to {one.orientation}, in {count} of {len(others)} other cases to {code}{more}."
    return [Remark("orientation", text)]


def _is_right(code: str) -> bool:
    """Whether axes that run so are right-handed."""
    pairs = ("LR", "PA", "IS")
    columns = np.zeros((3, 3))
    for n, letter in enumerate(code):
        axis = next(a for a, pair in enumerate(pairs) if letter in pair)
        columns[axis, n] = 1 if letter == pairs[axis][1] else -1
    return bool(np.linalg.det(columns) > 0)


def _missing(one: Facts, others: list[Facts], rules: Rules) -> list[Remark]:
    if not one.volume_mm3:  # an empty label says it all
        return []
    have = Counter(label for facts in others for label in facts.volume_mm3)
    return [
        Remark("missing", f"{label} is missing; {count} of {len(others)} other cases have it.", label)
        for label, count in sorted(have.items())
        if label not in one.volume_mm3 and count >= rules.majority * len(others)
    ]


def _volume(label: str, one: Facts, others: list[Facts], rules: Rules) -> list[Remark]:
    """Robust z of the logarithm, which a volume ten times too large or too small moves equally."""
    logs = np.log([facts.volume_mm3[label] for facts in others])
    median = float(np.median(logs))
    spread = max(MAD_TO_SIGMA * float(np.median(np.abs(logs - median))), rules.volume_spread)
    z = (float(np.log(one.volume_mm3[label])) - median) / spread
    if abs(z) <= rules.volume_z:
        return []
    mine, usual = one.volume_mm3[label] / 1000, float(np.exp(median)) / 1000
    text = f"{label}: {mine:.3g} ml, in the other cases about {usual:.3g} ml (robust z {z:+.1f})."
    return [Remark("volume", text, label)]


def _side(label: str, one: Facts, others: list[Facts], rules: Rules) -> list[Remark]:
    found = []
    for axis, names in enumerate(SIDES):
        mine = one.centre_mm[label][axis]
        theirs = np.array([facts.centre_mm[label][axis] for facts in others])
        against = -np.sign(mine) * theirs >= rules.side_mm
        if abs(mine) >= rules.side_mm and against.sum() >= rules.majority * len(theirs):
            here, there = names[int(mine > 0)], names[int(mine < 0)]
            text = (
                f"{label} lies {here} of the image's middle, in {against.sum()} of {len(theirs)} other cases {there}."
            )
            found.append(Remark("side", text, label))
    return found
