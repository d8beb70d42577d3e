"""Shared data and recipe to what the bare training loop reads: ``.npz`` shards and ``recipe.json``.

Only the ``pretrain`` part of every split is converted, and ACDC never.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Optional

import numpy as np

from lib.config import CONFIG_DIR, from_mapping, read_yaml
from lib.data.split import ORGANS_K_LIMIT, hippocampus_split, nuclei_split, organs_split
from trainers.pretrain_loop import Pair, Recipe, save_shard, write_synthetic

logger = logging.getLogger(__name__)


def convert(data_dir: Path, recipe_file: Optional[Path], run: Path) -> None:
    """Writes ``recipe.json`` and one shard per source into the run's folder; absent sources are left out."""
    values = read_yaml(recipe_file or CONFIG_DIR / "pretrain.yaml")
    row = read_yaml(CONFIG_DIR / "backbones" / "compact.yaml")
    row.pop("weights")
    recipe = from_mapping(Recipe, {**values, "backbone": row}, "pretrain.yaml")
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    sources = {"hippocampus": _hippocampus, "nuclei": _nuclei, "organs": _organs}
    for name, read in sources.items():
        folder = data_dir / name
        if not folder.is_dir():
            logger.warning("%s is absent: the run goes without it", name)
            continue
        pairs = list(read(folder))
        save_shard(run / f"{name}.npz", pairs)
        logger.info("%s: %d slices", name, len(pairs))
    write_synthetic(run, recipe)


def _volume_slices(image: Path, label: Path, step: int, k_limit: Optional[int] = None) -> Iterator[Pair]:
    import nibabel as nib

    voxels = np.asarray(nib.load(image).dataobj, np.float32)[:, :, :k_limit]
    classes = np.asarray(nib.load(label).dataobj).astype(np.uint8)[:, :, :k_limit]
    low, high = np.percentile(voxels, [0.5, 99.5])
    voxels = np.clip((voxels - low) / max(high - low, 1e-6), 0, 1) * 255
    for axis in range(3):
        if voxels.shape[axis] < 4 or min(np.delete(voxels.shape, axis)) < 24:
            continue
        for index in range(0, voxels.shape[axis], step):
            labels = classes.take(index, axis)
            if (labels > 0).sum() >= 12:
                yield voxels.take(index, axis).round().astype(np.uint8), labels


def _hippocampus(folder: Path) -> Iterator[Pair]:
    cases = hippocampus_split(p.name for p in folder.glob("*.nii.gz"))["pretrain"]
    for case in cases:
        yield from _volume_slices(folder / f"{case}.nii.gz", folder / "labels/final" / f"{case}.nii.gz", 2)


def _organs(folder: Path) -> Iterator[Pair]:
    for case in organs_split(p.name for p in folder.glob("*.nii.gz"))["pretrain"]:
        label = folder / "labels/final" / f"{case}.nii.gz"
        yield from _volume_slices(folder / f"{case}.nii.gz", label, 1, ORGANS_K_LIMIT.get(case))


def _nuclei(folder: Path) -> Iterator[Pair]:
    rng = np.random.default_rng(0)
    for case in nuclei_split(p.name for p in folder.glob("*.png"))["pretrain"]:
        yield from _nuclei_crops(folder, case, rng)


def _nuclei_crops(folder: Path, case: str, rng: np.random.Generator) -> Iterator[Pair]:
    from PIL import Image

    image = np.asarray(Image.open(folder / f"{case}.png").convert("RGB"))
    instances = np.asarray(Image.open(next((folder / "instances").glob(f"{case}.*"))))
    for whole in (True, False, False, False):
        top, left, high, wide = (0, 0, *instances.shape) if whole else _crop(rng, instances.shape)
        part = np.s_[top : top + high, left : left + wide]
        labels = _renumbered(instances[part])
        if labels.any():
            yield image[part], labels


def _crop(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    high, wide = (max(48, int(n * rng.uniform(0.3, 0.7))) for n in shape)
    return int(rng.integers(max(1, shape[0] - high))), int(rng.integers(max(1, shape[1] - wide))), high, wide


def _renumbered(instances: np.ndarray) -> np.ndarray:
    """Labels 1..250; more instances than that are dropped, a byte holds no more."""
    names, numbers = np.unique(instances, return_inverse=True)
    numbers = numbers.reshape(instances.shape) + int(names[0] != 0)
    return np.where(numbers <= 250, numbers, 0).astype(np.uint8)
