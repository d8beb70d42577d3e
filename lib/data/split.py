"""Which case may be used for what: the project's one place for data splits.

A case is assigned by the rank of the SHA-256 of its name, never by order or content, so lists of files from different
machines agree. Ranks need the complete list: a part of it would be split anew and training would meet test cases, hence
it is refused. Shipped weights see only the ``pretrain`` parts; ACDC is never trained into shipped weights.
A user's store grows, so there the part is the hash itself against a threshold, written down once: :class:`PinnedSplit`.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lib.errors import ConfigError

HIPPOCAMPUS_COUNTS = (("pretrain", 40), ("adapt", 50), ("test", 30))
NUCLEI_IMAGES = 100
ACDC_PATIENTS, ACDC_TEST_PATIENTS = 30, 6
ORGANS_HELD_BACK = "ct_slab"
# ct_slab is ct_torso[:, :, 82:], voxel for voxel: holding back one means holding back those slices of the other
ORGANS_K_LIMIT = {"ct_torso": 82}
PINNED_VERSION = 1
PINNED_PARTS = ("train", "val")


@dataclass(frozen=True)
class PinnedSplit:
    """Which patients of a growing store are trained on and which validate, decided once and kept in a file.

    The file is ``{"version": 1, "patients": {name: "train" or "val"}}``. It is written to a temporary name and moved;
    two processes that add patients at the same time may lose one's, so one training at a time.

    Args:
        path: the file; it and its folder appear with the first assignment.
        val: expected share of patients in ``val``.
    """

    path: Path
    val: float = 0.2

    def assign(self, patients: Iterable[str], former: Optional[Mapping[str, str]] = None) -> dict[str, str]:
        """The part of each patient, ``train`` or ``val``; new ones are decided and stored, known ones never change.

        A new patient validates where the salted SHA-256 of its name, as a fraction of its range, lies below ``val``.
        Where that leaves the given patients without one of the parts, the new one nearest to it by hash takes it.

        Args:
            patients: at least two.
            former: patient by a name that the file may still have instead, such as that of one of the patient's series.
                The patient takes its part, ``train`` where several disagree: a version was trained on some of it.

        Raises:
            ConfigError: for fewer than two patients, patients that were all pinned to one part, or a broken file.
        """
        given = sorted(set(patients), key=_fraction)
        if len(given) < 2:
            raise ConfigError(
                "Expected at least 2 patients, one to train on and one to validate;"
                f" received {len(given)}. Label a case of another patient."
            )
        before = self._read()
        stored = _renamed(before, former or {})
        new = [p for p in given if p not in stored]
        parts = {p: stored[p] for p in given if p in stored}
        most = max(1, round(1.5 * self.val * len(given)))  # or five labels could be four to validate and one to learn
        for patient in new:
            free = sum(part == "val" for part in parts.values()) < most
            parts[patient] = "val" if _fraction(patient) < self.val and free else "train"
        if new and "val" not in parts.values():
            parts[new[0]] = "val"
        elif new and "train" not in parts.values():
            parts[new[-1]] = "train"
        missing = [part for part in PINNED_PARTS if part not in parts.values()]
        if missing:
            raise ConfigError(
                f"Expected patients to train on and to validate; none of the {len(given)} given is pinned to"
                f" {missing[0]!r}. Restore the labels of one that is, or label a new patient."
            )
        if new or stored != before:
            self._write({**stored, **parts})
        return parts

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            content = None
        patients = content.get("patients") if isinstance(content, dict) else None
        if (
            not isinstance(content, dict)
            or content.get("version") != PINNED_VERSION
            or not isinstance(patients, dict)
            or any(part not in PINNED_PARTS for part in patients.values())
        ):
            raise ConfigError(
                f"Expected the pinned split in {self.path.name}; the file is broken or of another version. Restore it"
                " from a copy. Deleting it draws a new split, after which scores do not compare with earlier ones."
            )
        return patients

    def _write(self, patients: dict[str, str]) -> None:
        text = json.dumps({"version": PINNED_VERSION, "patients": dict(sorted(patients.items()))}, indent=1)
        part = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            raise ConfigError(
                f"Expected a folder where {self.path.name} can be written; received {error.strerror}."
                " Free space or allow writing there."
            ) from None
        finally:
            part.unlink(missing_ok=True)


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


def _renamed(stored: Mapping[str, str], former: Mapping[str, str]) -> dict[str, str]:
    """The pinned parts with patients in place of their former names; a patient that is pinned itself stays."""
    parts = dict(stored)
    for name, patient in former.items():
        part = parts.pop(name, None)
        if part is not None and patient not in stored:
            parts[patient] = "train" if "train" in (part, parts.get(patient)) else "val"
    return parts


def _fraction(name: str) -> float:
    """A name's place in 0..1 by a hash of its own: the parts above are ranges of the plain one, and would be lopsided.

    With the plain hash 50 hippocampus cases to adapt on would give 1 to validate.
    """
    return int(hashlib.sha256(f"pinned:{name}".encode()).hexdigest()[:16], 16) / 2**64


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
