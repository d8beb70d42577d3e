"""Images made by formulas for the end-to-end tests, and files that nobody can segment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Phantom:
    """A bright ellipsoid in noise.

    Args:
        id: name in the datastore.
        truth: ``(I, J, K)`` bool.
        affine: ``(4, 4)`` voxel to RAS mm as stored.
        centre: a voxel inside.
    """

    id: str
    truth: np.ndarray
    affine: np.ndarray
    centre: tuple[int, int, int]

    def box(self) -> list[int]:
        """The ellipsoid's box as Slicer sends it: pairs of voxels inside, the i pair reversed."""
        ends = np.argwhere(self.truth)
        (i0, j0, k0), (i1, j1, k1) = ends.min(0).tolist(), ends.max(0).tolist()
        return [i1, i0, j0, j1, k0, k1]


def ellipsoid(shape: tuple[int, int, int], radii: tuple[float, float, float]) -> np.ndarray:
    """An ellipsoid around the middle of a grid, bool."""
    grid = np.indices(shape).reshape(3, -1).T
    inside = (((grid - np.array(shape) // 2) / radii) ** 2).sum(1) <= 1
    return inside.reshape(shape)


def grey_values(truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Intensities of a phantom, float32."""
    noise = np.random.default_rng(seed).normal(0, 6, truth.shape)
    return (np.where(truth, 190, 80) + noise).astype(np.float32)


def write_studies(folder: Path, phantoms: dict[str, Phantom]) -> Path:
    """The phantoms and a set of files that cannot be segmented."""
    folder.mkdir(parents=True)
    axial, sagittal = phantoms["axial"], phantoms["sagittal"]
    nib.save(nib.Nifti1Image(grey_values(axial.truth), axial.affine), folder / "axial.nii.gz")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ sagittal.affine
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    nrrd.write(str(folder / "sagittal.nrrd"), grey_values(sagittal.truth, 1), header)
    grey = np.clip(grey_values(phantoms["grey"].truth, 2)[:, :, 0], 0, 255).astype(np.uint8)
    Image.fromarray(grey.T).save(folder / "grey.png")
    red = np.clip(grey_values(phantoms["colour"].truth, 3)[:, :, 0], 0, 255).astype(np.uint8).T
    Image.fromarray(np.stack([red, red // 2, 255 - red], -1)).save(folder / "colour.png")
    write_unusable(folder)
    return folder


def write_unusable(folder: Path) -> None:
    """Files that a store accepts and nobody can segment."""
    voxels = np.random.default_rng(4).normal(100, 10, (16, 16, 8)).astype(np.float32)
    holes = voxels.copy()
    holes[3, 3, 3] = np.nan
    for name, array in (
        ("constant", np.full_like(voxels, 7)),
        ("holes", holes),
        ("series", np.stack([voxels] * 6, -1)),
    ):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "broken.nii.gz").write_bytes(b"no image at all" * 50)
    whole = (folder / "axial.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
