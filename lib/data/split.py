"""Which case may be used for what: the project's one place for data splits.

A case is assigned by the rank of the SHA-256 of its name, never by order or content, so lists of files from different
machines agree. Ranks need the complete list: a part of it would be split anew and training would meet test cases, hence
it is refused. Shipped weights see only the ``pretrain`` parts; ACDC is never trained into shipped weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lib.errors import ConfigError

HIPPOCAMPUS_COUNTS = (("pretrain", 40), ("adapt", 50), ("test", 30))
NUCLEI_IMAGES = 100
ACDC_PATIENTS, ACDC_TEST_PATIENTS = 30, 6
ORGANS_HELD_BACK = "ct_slab"
# ct_slab is ct_torso[:, :, 82:], voxel for voxel: holding back one means holding back those slices of the other
ORGANS_K_LIMIT = {"ct_torso": 82}


def hippocampus_split(names: Iterable[str]) -> dict[str, list[str]]:
    """120 file names to ``pretrain`` (40), ``adapt`` (50) and ``test`` (30) case names, by rank of their hash.

    Raises:
        ConfigError: for another number of cases; so do the other splits by rank.
    """
    ranked = _ranked((_case(n) for n in names), sum(count for _, count in HIPPOCAMPUS_COUNTS), "hippocampus cases")
    parts, start = {}, 0
    for part, count in HIPPOCAMPUS_COUNTS:
        parts[part] = sorted(ranked[start : start + count])
        start += count
    return parts


def nuclei_split(names: Iterable[str]) -> dict[str, list[str]]:
    """100 file names to ``pretrain`` and ``test``: every fifth by rank of its hash is held back."""
    ranked = _ranked((_case(n) for n in names), NUCLEI_IMAGES, "nuclei images")
    test = ranked[::5]
    return {"pretrain": sorted(set(ranked) - set(test)), "test": sorted(test)}


def organs_split(names: Iterable[str]) -> dict[str, list[str]]:
    """File names to ``pretrain`` and ``test``: the CT slab is held back."""
    cases = sorted({_case(n) for n in names})
    return {
        "pretrain": [c for c in cases if c != ORGANS_HELD_BACK],
        "test": [c for c in cases if c == ORGANS_HELD_BACK],
    }


def acdc_split(names: Iterable[str]) -> dict[str, list[str]]:
    """``patientNNN_frameMM`` names of 30 patients to ``adapt`` (24) and ``test`` (6), both frames of one together."""
    cases = sorted({_case(n) for n in names})
    ranked = _ranked((_patient(c) for c in cases), ACDC_PATIENTS, "ACDC patients")
    test = set(ranked[:ACDC_TEST_PATIENTS])
    return {
        "adapt": [c for c in cases if _patient(c) not in test],
        "test": [c for c in cases if _patient(c) in test],
    }


def _case(name: str) -> str:
    """``hippocampus_001.nii.gz`` and ``hippocampus_001`` are the same case."""
    return name.split(".")[0]


def _patient(case: str) -> str:
    return case.split("_")[0]


def _ranked(cases: Iterable[str], expected: int, what: str) -> list[str]:
    ranked = sorted(set(cases), key=lambda case: hashlib.sha256(case.encode()).hexdigest())
    if len(ranked) != expected:
        raise ConfigError(
            f"Expected all {expected} {what}; received {len(ranked)}. Pass the complete list and pick after."
        )
    return ranked
