"""One case beside the others of its store: sides, orientation of the image, missing labels, outlier volumes. Names that
are exchanged show in one case alone, by its left and right or beside the model's label.

Frame: RAS mm from the middle of the image's grid, so that a crop or a shifted table matters little. Each case is
compared with all others, never with itself. Pure functions, thread-safe. What a store does not show (fewer cases than
``cases_needed``, no majority) is not said.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Optional

import numpy as np
from scipy import ndimage

from lib.quality.checks import LabelMap
from lib.quality.rules import Remark, Rules

SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))  # negative, positive RAS
# How much of the body's length an image takes in differs from exam to exam, and with it what lies above its middle: the
# liver lies low in an image of the chest. Across the body most images take in all of it.
ACROSS = (0, 1)
LEFT, RIGHT = {"left", "l"}, {"right", "r"}
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")  # of a name: kidney_left, KidneyLeft, L-kidney
SHOWN = 8
MAD_TO_SIGMA = 1.4826
Place = tuple[float, float, float]


@dataclass(frozen=True)
class Facts:
    """What is kept of a case for the comparison.

    Args:
        volume_mm3: by label that has voxels.
        centre_mm: centre of mass by label, RAS mm from the image's middle.
        orientation: where the axes i, j, k run to, such as ``RAS``; its handedness with it.
        model_mm: centres in the model's label of the same image, if there is one.
        is_picture: the grid is a picture's, which does not say where left is.
    """

    volume_mm3: dict[str, float]
    centre_mm: dict[str, Place]
    orientation: str
    model_mm: dict[str, Place] = field(default_factory=dict)
    is_picture: bool = False


def facts_of(label: LabelMap, model: Optional[LabelMap] = None, *, is_picture: bool = False) -> Facts:
    """Volumes and places of one label map.

    Args:
        label: of the case.
        model: the model's for the same image.
        is_picture: whether the image is a picture, without an orientation of its own.
    """
    volumes, centres = _measured(label)
    model_mm = _measured(model)[1] if model else {}
    return Facts(volumes, centres, orientation_of(label.affine), model_mm, is_picture)


def _measured(label: LabelMap) -> tuple[dict[str, float], dict[str, Place]]:
    voxel_mm3 = float(np.prod(label.spacing_mm))
    middle = (np.array(label.voxels.shape) - 1) / 2
    volumes: dict[str, float] = {}
    centres: dict[str, Place] = {}
    for name, box, mask in label.structures():
        start = np.array([s.start for s in box])
        offset = label.affine[:3, :3] @ (np.array(ndimage.center_of_mass(mask)) + start - middle)
        volumes[name] = int(mask.sum()) * voxel_mm3
        centres[name] = (float(offset[0]), float(offset[1]), float(offset[2]))
    return volumes, centres


def orientation_of(affine: np.ndarray) -> str:
    """Where the axes i, j, k run to, the nearest anatomical direction of each, such as ``RAS`` or ``LPS``."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    code = ""
    for column in directions.T:
        axis = int(np.abs(column).argmax())
        code += SIDES[axis][int(column[axis] > 0)][0].upper()
    return code


def compare(cases: Mapping[str, Facts], rules: Rules) -> dict[str, list[Remark]]:
    """What is remarkable about each case beside all the others, and about sides in itself.

    Args:
        cases: by identifier.
        rules: thresholds.
    """
    found: dict[str, list[Remark]] = {}
    for case, one in cases.items():
        others = [facts for name, facts in cases.items() if name != case]
        found[case] = [*_sides(one, others, rules)]
        if len(cases) >= _needed(rules):
            found[case] += [*_orientation(one, others, rules), *_missing(one, others, rules)]
        for label in one.volume_mm3:
            same = [facts for facts in others if label in facts.volume_mm3]
            if len(same) + 1 >= _needed(rules):
                found[case] += _volume(label, one, same, rules)
    return found


def _needed(rules: Rules) -> int:
    return max(2, rules.cases_needed)


def _sides(one: Facts, others: list[Facts], rules: Rules) -> Iterator[Remark]:
    """Pairs that are exchanged, and of the rest what lies on another side than in the other cases."""
    swapped = [] if one.is_picture else [*_swapped(one, rules)]
    if swapped:
        pairs = [f"{left} lies right of {right}" for left, right in swapped]
        yield Remark("side", f"Left and right are exchanged: {_listed(pairs)}.")
    misnamed = [pair for pair in _misnamed(one, rules) if {*pair} not in [{*p} for p in swapped]]
    if misnamed:
        pairs = [f"{a} and {b} lie where the model has the other" for a, b in misnamed]
        yield Remark("side", f"Names are exchanged: {_listed(pairs)}.")
    told = {name for pair in (*swapped, *misnamed) for name in pair}
    for label in one.centre_mm:
        if label not in told:
            yield from _side(label, one, [facts for facts in others if label in facts.centre_mm], rules)


def _swapped(one: Facts, rules: Rules) -> Iterator[tuple[str, str]]:
    """Left and right one of two names that differ only in that, where the left one lies to the right."""
    sides: dict[tuple[str, ...], dict[bool, str]] = defaultdict(dict)
    for name in one.centre_mm:
        words = [word.lower() for word in WORDS.findall(name)]
        said = {word in LEFT for word in words if word in LEFT | RIGHT}
        if len(said) == 1:
            sides[tuple(sorted("" if word in LEFT | RIGHT else word for word in words))][said.pop()] = name
    for pair in sides.values():
        if len(pair) == 2 and one.centre_mm[pair[True]][0] - one.centre_mm[pair[False]][0] >= rules.side_mm:
            yield pair[True], pair[False]


def _misnamed(one: Facts, rules: Rules) -> Iterator[tuple[str, str]]:
    """Two structures that each lie nearer to where the model has the other."""
    for a, b in combinations(sorted(one.centre_mm.keys() & one.model_mm.keys()), 2):
        nearer = [
            np.linalg.norm(np.subtract(one.centre_mm[own], one.model_mm[own]))
            - np.linalg.norm(np.subtract(one.centre_mm[own], one.model_mm[other]))
            for own, other in ((a, b), (b, a))
        ]
        if min(nearer) >= rules.side_mm:
            yield a, b


def _listed(sentences: list[str]) -> str:
    return "; ".join(sentences[:SHOWN]) + ("; ..." if len(sentences) > SHOWN else "")


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


def _side(label: str, one: Facts, others: list[Facts], rules: Rules) -> Iterator[Remark]:
    """Where most of the others that have a side at all have the other one."""
    for axis in ACROSS:
        mine = one.centre_mm[label][axis]
        theirs = np.array([facts.centre_mm[label][axis] for facts in others])
        sided = theirs[np.abs(theirs) >= rules.side_mm]
        against = int((sided * mine < 0).sum())
        if abs(mine) < rules.side_mm or against < max(1, rules.side_cases, rules.side_majority * len(sided)):
            continue
        if _has_side(theirs, rules):
            here, there = SIDES[axis][int(mine > 0)], SIDES[axis][int(mine < 0)]
            text = f"{label} lies {here} of the image's middle, in {against} of {len(theirs)} other cases {there}."
            yield Remark("side", text, label)


def _has_side(offsets_mm: np.ndarray, rules: Rules) -> bool:
    """Whether it keeps a distance from the middle, on whichever side; what lies in the middle, as a spine, strays to
    either, and a majority there is chance."""
    distances = np.abs(offsets_mm)
    usual = float(np.median(distances))
    spread = MAD_TO_SIGMA * float(np.median(np.abs(distances - usual)))
    return usual >= max(rules.side_mm, rules.side_spread * spread)
