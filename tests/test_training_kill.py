"""Kill -9 of a real training child and of its server: the same request goes on where it was, and ends the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
import torch
from safetensors.torch import load_file

from tests.labelling import ask, progress, save_labels, start_training, train, training_status, upload
from tests.phantoms import ellipsoid, grey_values
from tests.serving import Server, eventually, running_server

LABELS = ("liver",)
LONG = {"epochs": 3, "steps": 30, "patience": 3, "seed": 5}
CONF = {"backbone": "compact", "labels": ",".join(LABELS)}


def write_cases(folder: Path) -> tuple[list[Path], list[Path]]:
    """Eight volumes with an ellipsoid each, and their labels."""
    images, labels = [], []
    for number in range(8):
        truth = ellipsoid((48, 40, 8), (9.0 + number, 7.0 + number % 3, 3.0))
        noise = np.random.default_rng(100 + number).normal(0, 90, truth.shape).astype(np.float32)  # hard to see
        for kind, voxels, files in (
            ("images", grey_values(truth, number) + noise, images),
            ("labels", truth.astype(np.uint8), labels),
        ):
            file = folder / kind / f"case{number}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), file)
            files.append(file)
    return images, labels


def fill(server: Server, files: tuple[list[Path], list[Path]]) -> None:
    upload(server, files[0])
    save_labels(server, files[1], LABELS)


def resumable_step(server: Server, *, at_least: int) -> int:
    """Waits until a training is past a step and has saved its state; the step that clients see then."""
    state = server.studies / ".autosam" / "sam2rad" / "runs" / "current" / "state.pt"
    end = time.monotonic() + 300
    while time.monotonic() < end:
        step = progress(server).get("step", 0)
        if state.exists() and step >= at_least:
            return step
        time.sleep(0.2)
    raise AssertionError("the training did not get that far")


def training_child(server: Server) -> psutil.Process:
    """The process that MONAI Label trains in."""
    children = psutil.Process(server.pid).children(recursive=True)
    return next(c for c in children if any("monailabel.interfaces.utils.app" in part for part in c.cmdline()))


def trained(studies: Path) -> list[torch.Tensor]:
    """All trained tensors of the second version."""
    (file,) = (studies / ".autosam" / "sam2rad").rglob("v0002/*.safetensors")
    return [tensor for _, tensor in sorted(load_file(file).items())]


def log_of_training(server: Server) -> str:
    """What the child wrote, which upstream keeps in the server's log or in the status."""
    return server.log + requests.get(f"{server.url}/train/", timeout=60).text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_killed_twice_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    files = write_cases(tmp_path / "cases")
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()

    with running_server(tmp_path / "whole", tmp_path / "a", conf=CONF) as server:
        fill(server, files)
        train(server, epochs=1, steps=40)
        uninterrupted = train(server, **LONG)[-1]

    with running_server(tmp_path / "killed", tmp_path / "b", conf=CONF) as server:
        fill(server, files)
        assert train(server, epochs=1, steps=40)[-1]["version"] == "v0001"
        before = ask(server, tmp_path, "sam2rad", "case0")
        start_training(server, **LONG)
        resumable_step(server, at_least=31)
        training_child(server).kill()  # SIGKILL
        assert eventually(lambda: training_status(server) == "ERROR")  # and not RUNNING for ever
        after = ask(server, tmp_path, "sam2rad", "case0")
        assert_same(before, after)
        start_training(server, **LONG)
        killed_at = resumable_step(server, at_least=61)
        training_child(server).kill()
        psutil.Process(server.pid).kill()

    with running_server(tmp_path / "killed", tmp_path / "c", conf=CONF) as server:
        assert_same(before, ask(server, tmp_path, "sam2rad", "case0"))  # the live version never changed
        seen = train(server, **LONG)
        assert "resumed at step" in log_of_training(server)
        done = seen[-1]
        assert done["version"] == "v0002"
        assert killed_at > 30

    assert done["dice"] == pytest.approx(uninterrupted["dice"], abs=0.01)
    assert done["epoch"] == uninterrupted["epoch"]
    apart = [float((a - b).abs().max()) for a, b in zip(*map(trained, (tmp_path / "whole", tmp_path / "killed")))]
    print("largest difference of a trained tensor", max(apart))
    assert max(apart) < 1e-3
    print("uninterrupted", uninterrupted["dice"], "killed twice", done["dice"])


def assert_same(one: tuple[np.ndarray, dict[str, Any]], other: tuple[np.ndarray, dict[str, Any]]) -> None:
    """The same version gave the same voxels."""
    assert one[1]["version"] == other[1]["version"] == "v0001"
    np.testing.assert_array_equal(one[0], other[0])
