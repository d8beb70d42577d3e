"""Labelled phantoms for the tests of learned methods, and a version of ``tiny`` that has learned them in seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Optional

import nibabel as nib
import numpy as np
import torch

from lib.config import TrainRecipe, method_row
from lib.data.samples import LabelledCase, TrainingCase, load_case
from lib.engine import Engine
from lib.learned import Learned
from lib.settings import AppSettings
from lib.train_data import Batches, all_slices
from lib.train_loop import Run, fit
from lib.versions.record import Trained, Version
from lib.versions.store import VersionStore, open_store

LABELS = ("big", "small one")
SHAPE = (32, 36, 6)
ROW = method_row("sam2rad")
FAST = TrainRecipe(preset="full", epochs=3, steps=25, batch=4, views=2, lr=2e-3, backbone_lr=2e-3)
LONGER = replace(FAST, epochs=6)  # after half of it the small label is found on some processors only


def draw(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """An image and its classes: a large disc on some slices, a small one beside it on others."""
    rng = np.random.default_rng(seed)
    classes, grid = np.zeros(shape, np.uint8), np.indices(shape)
    centre = rng.uniform(10, 18, 2)
    disc = (grid[0] - centre[0]) ** 2 + (grid[1] - centre[1]) ** 2
    classes[(disc < 49) & (grid[2] > 0) & (grid[2] < 5)] = 1
    classes[((grid[0] - centre[0] - 3) ** 2 + (grid[1] - centre[1] - 13) ** 2 < 16) & (grid[2] > 1)] = 2
    grey = np.array([50, 150, 220])[classes] + rng.normal(0, 10, shape)
    return grey.astype(np.float32), classes


SIGNS = {2: ((1, -1), (-1, 1)), 4: ((1, 1, -1, -1), (-1, 1, 1, -1))}  # of both classes


def draw_channels(seed: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """The same classes in an image of 2 or 4 channels, ``(I, J, K, M)``, whose mean shows neither: what is bright in
    one is dark in another. Every channel has a unit of its own."""
    classes, rng = draw(seed)[1], np.random.default_rng(1000 + seed)
    grey = 100 + 60 * np.array([(0,) * channels, *SIGNS[channels]])[classes]
    return ((grey + rng.normal(0, 10, grey.shape)) * 10.0 ** np.arange(channels)).astype(np.float32), classes


def write_case(
    folder: Path,
    name: str,
    seed: int,
    classes: Optional[np.ndarray] = None,
    spacing: Sequence[float] = (1, 1, 5),
    channels: int = 1,
) -> LabelledCase:
    """One case as files, with declared names."""
    image, own = draw(seed) if channels == 1 else draw_channels(seed, channels)
    affine = np.diag([*spacing, 1.0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels_in").mkdir(exist_ok=True)
    case = LabelledCase(
        name, folder / f"{name}.nii.gz", folder / "labels_in" / f"{name}.nii.gz", dict(enumerate(LABELS, 1))
    )
    nib.save(nib.Nifti1Image(image, affine), case.image)
    nib.save(nib.Nifti1Image(own if classes is None else classes, affine), case.label)
    return case


def cases(folder: Path, count: int) -> list[TrainingCase]:
    """Phantoms, loaded."""
    return [load_case(write_case(folder, f"c{n}", n), LABELS) for n in range(count)]


def settings(folder: Path, **conf: str) -> AppSettings:
    """Of an app with ``tiny`` and nothing outside the folder."""
    own = {"backbone": "tiny", "cache_dir": str(folder / "cache"), "state_dir": str(folder / "state")}
    return AppSettings.from_conf({**own, "prefetch": "false", **conf})


def learned(engine: Engine, preset: str = "full", seed: int = 1) -> Learned:
    """An untrained model."""
    torch.manual_seed(seed)
    return Learned(ROW, engine.warm(), len(LABELS), preset)


@cache
def trained_tensors() -> dict[str, torch.Tensor]:
    """What ``full`` learns in a few seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = cases(folder, 4)
        model = learned(Engine(settings(folder)))
        run = Run(model, Batches(model, all_slices(found[:3]), LONGER), found[3:], LABELS, LONGER, folder / "run")
        assert min(fit(run)["dice"].values()) > 0.1
        return {k: t.clone() for k, t in model.trained().items()}


def add_version(
    store: VersionStore, engine: Engine, noise: float = 0.0, digest: str = "", labels: tuple[str, ...] = LABELS
) -> Version:
    """Stores the trained tensors and makes them live; ``noise`` gives a version with other answers."""
    torch.manual_seed(7)
    tensors = {k: t + noise * torch.randn_like(t) if t.ndim > 1 else t for k, t in trained_tensors().items()}
    facts = Trained(
        backbone="tiny", backbone_digest=digest or engine.warm().weights_id, labels=labels,
        recipe={"preset": "full", "options": ROW.options}, split={"c0": "train", "c3": "val"},
        metrics={"mean_dice": 0.5, "dice": dict.fromkeys(labels, 0.5), "cases": {}},
    )  # fmt: skip
    version = store.add(tensors, facts)
    store.promote(version.name, "test")
    return version


def store_at(folder: Path) -> VersionStore:
    """The store of the method in an app's state folder."""
    return open_store(folder / "state", ROW.name)


def recipe(**changes: object) -> TrainRecipe:
    """The fast one, changed."""
    return replace(FAST, **changes)  # type: ignore[arg-type]
