"""A CT-like abdomen made of formulas: images that may be shown, shipped and labelled without any patient.

Frame: i runs from the patient's right to left, j from front to back, k from feet to head, so a slice across k with rows
j and columns i looks like an axial CT. Deterministic in the seed and thread-safe. Left out: realism beyond what a demo
and a test need; no claim about accuracy on patients may rest on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import numpy as np
from scipy import ndimage

LABELS = {"liver": 1, "right kidney": 2, "left kidney": 3, "spine": 4, "aorta": 5}
AIR, FAT, MUSCLE = -1000.0, -105.0, 55.0

Rng = np.random.Generator
Bounds = tuple[float, float, float]


@dataclass
class _Scene:
    """Hounsfield units and labels being painted, over normalised coordinates -1..1 that are slightly warped."""

    hu: np.ndarray
    labels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    def ellipsoid(self, centre: Bounds, radii: Bounds) -> np.ndarray:
        """Voxels inside an ellipsoid, ``(I, J, K)`` bool."""
        parts = zip((self.x, self.y, self.z), centre, radii)
        return sum(((axis - c) / r) ** 2 for axis, c, r in parts) < 1  # type: ignore[return-value]

    def paint(self, where: np.ndarray, hu: Union[float, np.ndarray], label: Optional[str] = None) -> None:
        """Later paint covers earlier paint; without a label it takes the label away."""
        self.hu[where] = hu if np.isscalar(hu) else np.broadcast_to(hu, self.hu.shape)[where]
        self.labels[where] = 0 if label is None else LABELS[label]


def make_phantom(
    shape: tuple[int, int, int] = (96, 96, 24), spacing_mm: tuple[float, float, float] = (1.0, 1.0, 3.0), seed: int = 0
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """One phantom; the anatomy fills the grid whatever its size.

    Args:
        shape: voxels along i, j, k.
        spacing_mm: voxel edges; only the blur depends on them, so thick slices are smooth in the slice alone.
        seed: varies sizes, places, textures and noise.

    Returns:
        ``(I, J, K)`` float32 in Hounsfield units, ``(I, J, K)`` uint8 labels, and the label of each name.
    """
    rng = np.random.default_rng(seed)
    scene = _empty_scene(rng, shape)
    _body(scene)
    _bowel(scene, rng)
    _organs(scene, rng)
    _kidneys(scene, rng)
    _vessels(scene, rng)
    _spine(scene)
    return _scanned(scene.hu, spacing_mm, rng), scene.labels, dict(LABELS)


def write_demo_study(folder: Union[str, Path], seed: int = 0) -> list[Path]:
    """Writes a MONAI Label study of two phantom volumes (NIfTI) and one picture (PNG), without labels.

    Args:
        folder: created where it is missing; files of the same names are replaced.
        seed: equal seeds give equal files.

    Returns:
        The paths written, images on the top level as the server expects them.
    """
    import nibabel
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape, spacing_mm = (192, 192, 32), (1.9, 1.9, 5.0)
    paths = [folder / "phantom_1.nii.gz", folder / "phantom_2.nii.gz", folder / "phantom_picture.png"]
    for number, path in enumerate(paths[:2]):
        hu, _, _ = make_phantom(shape, spacing_mm, seed=seed + number)
        image = nibabel.Nifti1Image(
            np.rint(hu).astype(np.int16), np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1])
        )
        image.header.set_xyzt_units("mm")
        image.to_filename(path)
    hu, _, _ = make_phantom((256, 256, 8), (1.4, 1.4, 20.0), seed=seed + 2)
    grey = np.clip((hu[:, :, 4].T + 160) / 400, 0, 1) * 255
    Image.fromarray(grey.astype(np.uint8)).save(paths[2])
    return paths


def _empty_scene(rng: Rng, shape: tuple[int, int, int]) -> _Scene:
    grid = np.meshgrid(*((np.arange(n) + 0.5) * 2 / n - 1 for n in shape), indexing="ij")
    x, y, z = (axis.astype(np.float32) + 0.03 * _smooth(rng, shape, 6) for axis in grid)
    return _Scene(np.full(shape, AIR, np.float32), np.zeros(shape, np.uint8), x, y, z)


def _smooth(rng: Rng, shape: tuple[int, ...], knots: int) -> np.ndarray:
    """Smooth noise of about unit deviation with ``knots`` features across each axis."""
    coarse = rng.standard_normal((knots, knots, knots)).astype(np.float32)
    # Cubic interpolation axis by axis: 20 times faster than ndimage.zoom of the whole field.
    along = [
        ndimage.zoom(np.eye(knots, dtype=np.float32), (n / knots, 1), mode="nearest", grid_mode=True) for n in shape
    ]
    return np.einsum("abc,ia,jb,kc->ijk", coarse, *along, optimize=True)


def _body(scene: _Scene) -> None:
    """Skin, fat, the muscle wall with ribs, and the fat that organs lie in."""
    x, y = scene.x, scene.y
    radius = np.sqrt((x / 0.92) ** 2 + ((y + 0.02) / 0.7) ** 2)
    scene.paint(radius < 1, MUSCLE)
    scene.paint(radius < 0.975, FAT)
    scene.paint(radius < 0.86, MUSCLE)
    angle = np.arctan2(y, x)
    ribs = (np.abs(radius - 0.82) < 0.022) & (np.sin(9 * angle + 7 * scene.z) > 0.72) & (scene.z > -0.35)
    scene.paint(ribs, 420.0)
    scene.paint(radius < 0.78, FAT)
    back = scene.ellipsoid((-0.2, 0.45, 0), (0.17, 0.15, 9)) | scene.ellipsoid((0.2, 0.45, 0), (0.17, 0.15, 9))
    scene.paint(back, MUSCLE + 5)


def _bowel(scene: _Scene, rng: Rng) -> None:
    """Loops with wall, content and some gas in the front of the belly."""
    for _ in range(14):
        centre = (rng.uniform(-0.45, 0.5), rng.uniform(-0.42, -0.02), rng.uniform(-1.0, 0.1))
        size = rng.uniform(0.08, 0.14)
        radii = (size * rng.uniform(1.0, 1.6), size, size * 2.2)
        scene.paint(scene.ellipsoid(centre, radii), 60.0)
        scene.paint(scene.ellipsoid(centre, tuple(0.75 * r for r in radii)), rng.uniform(10, 40))  # type: ignore[arg-type]
        if rng.random() < 0.35:
            gas = scene.ellipsoid((centre[0], centre[1] - 0.03, centre[2]), tuple(0.5 * r for r in radii))  # type: ignore[arg-type]
            scene.paint(gas, -850.0)


def _organs(scene: _Scene, rng: Rng) -> None:
    """Stomach, spleen and the liver with its lobes and veins."""
    scene.paint(scene.ellipsoid((0.36, -0.2, 0.55), (0.26, 0.19, 0.5)), 70.0)
    scene.paint(scene.ellipsoid((0.36, -0.2, 0.55), (0.22, 0.15, 0.45)), 25.0)
    scene.paint(scene.ellipsoid((0.34, -0.29, 0.6), (0.14, 0.06, 0.3)), -900.0)
    scene.paint(scene.ellipsoid((0.56, 0.16, 0.5), (0.12, 0.22, 0.4)), 122.0)
    size = rng.uniform(0.94, 1.06)
    right = scene.ellipsoid((-0.36, -0.03, 0.4), (0.34 * size, 0.42 * size, 0.85))
    left = scene.ellipsoid((-0.02, -0.27, 0.55), (0.34, 0.16 * size, 0.45))
    inside = np.sqrt((scene.x / 0.92) ** 2 + ((scene.y + 0.02) / 0.7) ** 2) < 0.76
    liver = (right | left) & inside & ~scene.ellipsoid((-0.3, 0.42, -0.35), (0.24, 0.28, 0.6))
    scene.paint(liver, 105 + 3 * _smooth(rng, scene.hu.shape, 16), "liver")
    veins = np.abs(_smooth(rng, scene.hu.shape, 7)) + np.abs(_smooth(rng, scene.hu.shape, 7)) < 0.14
    scene.hu[liver & veins] = 150.0
    gall = scene.ellipsoid((-0.2, -0.22, -0.05), (0.09, 0.09, 0.25))
    scene.paint(gall, 8.0)


def _kidneys(scene: _Scene, rng: Rng) -> None:
    """Bright cortex, darker medulla, and the fatty sinus that opens towards the spine and is no kidney."""
    for name, side, z in (("right kidney", -1.0, -0.35), ("left kidney", 1.0, -0.2)):
        size = rng.uniform(0.92, 1.06)
        x, y = side * rng.uniform(0.37, 0.4), rng.uniform(0.22, 0.26)
        scene.paint(scene.ellipsoid((x, y, z), (0.2 * size, 0.21 * size, 0.72)), FAT)
        scene.paint(scene.ellipsoid((x, y, z), (0.15 * size, 0.165 * size, 0.58)), 190.0, name)
        scene.paint(scene.ellipsoid((x - side * 0.015, y, z), (0.1 * size, 0.115 * size, 0.46)), 140.0, name)
        scene.paint(scene.ellipsoid((x - side * 0.1, y - 0.02, z), (0.11, 0.05, 0.2)), FAT + 20)


def _vessels(scene: _Scene, rng: Rng) -> None:
    """The winding aorta with a calcified spot, and the vena cava beside it."""
    bend = 0.025 * np.sin(2.5 * scene.z + rng.uniform(0, 6))
    aorta = ((scene.x - 0.07 - bend) / 0.062) ** 2 + ((scene.y - 0.13) / 0.07) ** 2 < 1
    cava = ((scene.x + 0.11 - bend) / 0.075) ** 2 + ((scene.y - 0.14) / 0.06) ** 2 < 1
    scene.paint(cava, 130.0)
    scene.paint(aorta, 215.0, "aorta")
    scene.hu[aorta & scene.ellipsoid((0.12, 0.16, rng.uniform(-0.5, 0.5)), (0.03, 0.03, 0.15))] = 600.0


def _spine(scene: _Scene) -> None:
    """Vertebral bodies with cortex, discs between, the arch with its processes, and the canal, which is no bone."""
    x, y = scene.x, scene.y
    body = np.sqrt((x / 0.15) ** 2 + ((y - 0.33) / 0.125) ** 2)
    arch = np.sqrt((x / 0.13) ** 2 + ((y - 0.47) / 0.1) ** 2) < 1
    process = ((np.abs(x) < 0.022) & (y > 0.5) & (y < 0.63)) | ((np.abs(y - 0.46) < 0.022) & (np.abs(x) < 0.26))
    disc = np.sin(np.pi * 5 * scene.z) > 0.75
    scene.paint((process & ~disc) | arch, 380.0, "spine")
    scene.paint(body < 1, np.where(disc, 85.0, 430.0), "spine")
    scene.paint((body < 0.86) & ~disc, 210.0, "spine")
    scene.paint(np.sqrt((x / 0.065) ** 2 + ((y - 0.475) / 0.055) ** 2) < 1, 25.0)


def _scanned(hu: np.ndarray, spacing_mm: tuple[float, float, float], rng: Rng) -> np.ndarray:
    """Partial volume, correlated noise and the scanner's floor at -1024."""
    fine = min(spacing_mm)
    blurred = ndimage.gaussian_filter(hu, [0.6 * fine / s for s in spacing_mm])
    grain = ndimage.gaussian_filter(rng.standard_normal(hu.shape).astype(np.float32), (0.6, 0.6, 0))
    return np.maximum(blurred + 14 * grain / grain.std(), -1024).astype(np.float32)
