"""Whether the masks of a real server follow the structure, on phantoms and on real images; prints Dice.

The bounds only catch an empty, a full or a misplaced mask; ``bench/`` judges quality. Random weights are left out.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.phantoms import Phantom
from tests.serving import Server, affine_of, dice, slicer_click

pytestmark = pytest.mark.timeout(900)


def inscribed_ellipse(truth: np.ndarray, axis: int) -> np.ndarray:
    """On each slice along ``axis`` the ellipse inscribed in the box of the structure there: what a box alone tells."""
    mask, moved = np.zeros_like(truth), np.moveaxis(truth, axis, 0)
    for index, here in enumerate(moved):
        if here.any():
            rows, columns = np.where(here)
            grid = np.indices(here.shape)
            centre = [(rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2]
            radii = [(np.ptp(rows) + 1) / 2, (np.ptp(columns) + 1) / 2]
            inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii)) <= 1
            np.moveaxis(mask, axis, 0)[index] = inside
    return mask


def roi_of(truth: np.ndarray) -> list[int]:
    """The box of a structure as Slicer sends it."""
    where = np.argwhere(truth)
    return [int(v) for pair in zip(where.min(0), where.max(0)) for v in pair]


def needs_trained(backbone: str) -> None:
    if backbone == "tiny":
        pytest.skip("tiny has random weights")


@pytest.mark.parametrize("name", ["axial", "sagittal", "grey", "colour"])
def test_phantom_box_finds_the_ellipsoid(
    server: Server, phantoms: dict[str, Phantom], tmp_path: Path, backbone: str, name: str
) -> None:
    needs_trained(backbone)
    phantom = phantoms[name]
    model = "sam" if phantom.truth.shape[2] > 1 else "sam_2d"
    mask, _, _ = slicer_click(server, tmp_path, model, name, roi=phantom.box())
    print(f"\n{name}: Dice of a box {dice(mask, phantom.truth):.3f}")
    assert dice(mask, phantom.truth) > 0.8


def test_phantom_negative_click_takes_away(
    server: Server, phantoms: dict[str, Phantom], tmp_path: Path, backbone: str
) -> None:
    needs_trained(backbone)
    i, j, k = phantoms["axial"].centre
    inside = {"foreground": [[i, j, k]], "propagate": False}
    whole, _, _ = slicer_click(server, tmp_path, "sam", "axial", **inside)
    less, _, _ = slicer_click(server, tmp_path, "sam", "axial", **inside, background=[[i + 12, j, k]])
    assert whole[i, j, k] == less[i, j, k] == 1
    assert less[i + 12, j, k] == 0


def test_real_boxes_give_neither_empty_nor_full_masks(
    server: Server, data_dir: Path, tmp_path: Path, backbone: str
) -> None:
    needs_trained(backbone)
    hippocampi = sorted(server.studies.glob("hippocampus_*.nii.gz"))
    assert hippocampi
    for image in [*hippocampi, server.studies / "ct_slab.nii.gz"]:
        group = "hippocampus" if image in hippocampi else "organs"
        labels = np.asarray(nib.load(data_dir / group / "labels" / "final" / image.name).dataobj)
        largest = max(set(np.unique(labels)) - {0}, key=lambda n: int((labels == n).sum()))
        truth = labels > 0 if group == "hippocampus" else labels == largest
        mask, reply, file = slicer_click(server, tmp_path, "sam", image.name.removesuffix(".nii.gz"), roi=roi_of(truth))
        ellipse = inscribed_ellipse(truth, "ijk".index(reply["axis"]))
        print(f"\n{group}: Dice of one 3-D box {dice(mask, truth):.3f}, ellipses per slice {dice(ellipse, truth):.3f}")
        np.testing.assert_array_equal(affine_of(file), nib.load(image).affine)
        assert 0.1 * truth.sum() < mask.sum() < 0.5 * mask.size
        assert dice(mask, truth) > 0.2


def test_real_pictures_give_neither_empty_nor_full_masks(
    server: Server, data_dir: Path, tmp_path: Path, backbone: str
) -> None:
    from PIL import Image

    needs_trained(backbone)
    for image in sorted(p for p in server.studies.glob("*.png") if p.stem not in ("grey", "colour")):
        instances = np.array(Image.open(data_dir / "nuclei" / "instances" / image.name)).T[:, :, None]
        sizes = np.bincount(instances.ravel())
        sizes[0] = 0
        truth = instances == sizes.argmax()
        mask, _, _ = slicer_click(server, tmp_path, "sam_2d", image.stem, roi=roi_of(truth))
        ellipse = dice(inscribed_ellipse(truth, 2), truth)
        print(f"\nnucleus: Dice of a box {dice(mask, truth):.3f}, of its ellipse {ellipse:.3f}")
        assert 0.1 * truth.sum() < mask.sum() < 4 * truth.sum()
