"""Fixtures that several test files share: real data where it lies, phantoms, and one server for the whole run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.data.split import hippocampus_split, nuclei_split
from tests.phantoms import Phantom, ellipsoid, write_studies
from tests.serving import Server, running_server

ROOT = Path(__file__).resolve().parents[1]
TILT = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-dir", default=str(ROOT.parent / "shared" / "data"), help="folder of the real data")
    parser.addoption("--backbone", default="compact", help="what the servers of the end-to-end tests run")
    parser.addoption("--pictures", default="", help="folder for screenshots of the browser tests")


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The real data; tests that need it skip where it is absent."""
    folder = Path(request.config.getoption("--data-dir"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (--data-dir)")
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Phantom]:
    """What lies in the server's studies: thick slices along k and along i, flipped and tilted, and two pictures."""
    flipped = np.eye(4)
    flipped[:3, :3] = TILT @ np.diag([-0.8, 0.8, 4.0])
    flipped[:3, 3] = [31.7, -12.3, 101.1]
    sagittal = np.eye(4)
    sagittal[:3, :3] = TILT @ np.diag([3.0, -0.7, 0.7])
    sagittal[:3, 3] = [-5.1, 44.9, 7.3]
    made = {
        "axial": ((64, 56, 16), (15, 12, 4), flipped),
        "sagittal": ((14, 60, 64), (4, 14, 16), sagittal),
        "grey": ((80, 64, 1), (20, 14, 1), np.eye(4)),
        "colour": ((72, 96, 1), (18, 24, 1), np.eye(4)),
    }
    return {
        name: Phantom(name, ellipsoid(shape, radii), affine, tuple(n // 2 for n in shape))  # type: ignore[arg-type]
        for name, (shape, radii, affine) in made.items()
    }


@pytest.fixture(scope="session")
def backbone(request: pytest.FixtureRequest) -> str:
    """Name of the servers' backbone."""
    return request.config.getoption("--backbone")


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    phantoms: dict[str, Phantom],
    backbone: str,
    request: pytest.FixtureRequest,
) -> Iterator[Server]:
    """A server as the README starts it, on phantoms and, where there is real data, on copies of some of it."""
    scratch = tmp_path_factory.mktemp("server")
    studies = write_studies(scratch / "studies", phantoms)
    copy_real(Path(request.config.getoption("--data-dir")), studies)
    with running_server(studies, scratch, conf={"backbone": backbone}) as running:
        yield running


def copy_real(data: Path, studies: Path) -> None:
    """A few cases that pretraining never saw, under their own names; nothing where the folder is absent."""
    if not data.is_dir():
        return
    cases = hippocampus_split(p.name for p in (data / "hippocampus").glob("*.nii.gz"))["test"][:3]
    pictures = nuclei_split(p.name for p in (data / "nuclei").glob("*.png"))["test"][:2]
    files = [data / "hippocampus" / f"{case}.nii.gz" for case in cases]
    files += [data / "nuclei" / f"{case}.png" for case in pictures]
    for file in [*files, data / "organs" / "ct_slab.nii.gz"]:
        shutil.copy(file, studies)
