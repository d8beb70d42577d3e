"""What the benches share: servers of several apps in temporary folders, phantom studies, timing and markdown tables.

Every server runs from a copy of its app in a temporary folder, so nothing is written into the repository, the user's
home or shared data. Times are whole HTTP round trips, seen by MONAI Label's own client. Judges nothing by itself: a
limit is compared with what was measured, and both are printed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from tests import serving
from tests.serving import Server, slicer_params

ROOT = Path(__file__).resolve().parents[1]
APPS = ROOT / "bench" / "apps"
OURS = ("apps", "infers", "lib", "trainers")
CREATED = shutil.ignore_patterns("logs", "bin", "model")  # what start_server creates in an app folder
SAM2_ROW = "sam2.1_tiny"
PROC = Path("/proc")


# ------------------------------------------------------------------------------------------------------------- report


class Report:
    """Prints as it goes and keeps the text for ``--out``.

    Args:
        title: heading.
        out: file to write at the end, or None.
    """

    def __init__(self, title: str, out: Optional[Path]) -> None:
        self._lines: list[str] = []
        self._out = out
        self.add(f"# {title}", "", f"{time.strftime('%Y-%m-%d %H:%M')}. {machine()}")

    def add(self, *lines: str) -> None:
        """Adds lines."""
        for line in lines:
            print(line, flush=True)
        self._lines += lines
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text("\n".join(self._lines) + "\n", encoding="utf-8")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Adds a markdown table."""
        self.add("", f"## {title}", "", *markdown(header, rows))

    def verdicts(self, rows: Sequence[Verdict]) -> None:
        """Adds the table of limits; PASS or miss follows from the two numbers alone."""
        cells = [(v.what, f"{v.measured:.2f}", f"{v.sign} {v.limit:g}", "PASS" if v.holds else "miss") for v in rows]
        self.table("Limits", ("what", "measured", "wanted", ""), cells)
        self.add("", f"Load at the end: {load()}.")


@dataclass(frozen=True)
class Verdict:
    """A measured number beside its limit.

    Args:
        what: is compared, with the unit.
        measured: number.
        limit: number.
        least: True where ``measured`` must be at least ``limit``, False where at most.
    """

    what: str
    measured: float
    limit: float
    least: bool = False

    @property
    def sign(self) -> str:
        """How the two must compare."""
        return ">=" if self.least else "<="

    @property
    def holds(self) -> bool:
        """Whether they do; not for NaN, which stands for not measured."""
        return self.measured >= self.limit if self.least else self.measured <= self.limit


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table whose columns are aligned."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def seconds(times: Sequence[float]) -> str:
    """``median (least-most, n=count)`` in ms or s."""
    if not times:
        return "-"
    scale, unit, digits = (1000, "ms", 0) if statistics.median(times) < 1 else (1, "s", 2)
    middle, least, most = (f"{scale * v:.{digits}f}" for v in (statistics.median(times), min(times), max(times)))
    return f"{middle} {unit}" if len(times) == 1 else f"{middle} {unit} ({least}-{most}, n={len(times)})"


def median(times: Sequence[float]) -> float:
    """The median, NaN where nothing was measured."""
    return statistics.median(times) if times else float("nan")


def machine() -> str:
    """Processor, cores, torch and what else runs."""
    import torch

    cpu = re.search(r"model name\s*: (.*)", (PROC / "cpuinfo").read_text())
    name = cpu.group(1) if cpu else "unknown processor"
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    return (
        f"{name}, {cores} cores, {gpu}, torch {torch.__version__} with {threads} threads (OMP_WAIT_POLICY {waiting}). "
        f"Before the run: {load()}."
    )


def load() -> str:
    """How busy the machine is now, seen for one second in which this process only sleeps."""
    before = _cpu_times()
    time.sleep(1)
    spent = [b - a for a, b in zip(before, _cpu_times())]
    busy = (1 - (spent[3] + spent[4]) / max(sum(spent), 1)) * len(os.sched_getaffinity(0))  # 3 idle, 4 waits for disk
    return f"other load {busy:.1f} cores busy, load average {os.getloadavg()[0]:.1f}"


def _cpu_times() -> list[int]:
    return [int(n) for n in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process now and at its peak, in MiB."""
    status = (PROC / str(pid) / "status").read_text()
    now, peak = (int(re.search(rf"{key}:\s+(\d+)", status).group(1)) for key in ("VmRSS", "VmHWM"))  # type: ignore[union-attr]
    return now / 1024, peak / 1024


def arguments(doc: Optional[str]) -> argparse.ArgumentParser:
    """A parser with the options that every bench has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    return parser


# ------------------------------------------------------------------------------------------------------------ servers


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that everything goes into."""
    with tempfile.TemporaryDirectory(prefix="autosam-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def bench_app(name: str, scratch: Path) -> Path:
    """A copy of one of the apps in ``bench/apps``."""
    return Path(shutil.copytree(APPS / name, scratch / name, ignore=CREATED))


def own_app(scratch: Path, compact: Optional[Path] = None) -> Path:
    """A copy of the project's app with the packages beside it.

    Args:
        scratch: folder for the copy.
        compact: weights of compact in place of those that ship.
    """
    root = scratch / "autosam"
    for package in OURS:
        if (ROOT / package).is_dir():
            shutil.copytree(ROOT / package, root / package, ignore=CREATED, dirs_exist_ok=True)
    if compact is not None:
        shutil.copy(compact, root / "lib" / "weights" / "compact.safetensors")
    return root / "apps" / "autosam_label"


@contextmanager
def server(app: Path, studies: Path, scratch: Path, *, wrapper: bool = True, **conf: str) -> Iterator[Server]:
    """A server process of any app.

    Args:
        app: folder of the app.
        studies: folder of images; the server writes into it.
        scratch: new folder for its home, caches and log.
        wrapper: with our ``--uvicorn_app`` as in the README.
        conf: ``--conf`` pairs.
    """
    with serving.running_server(studies, scratch, app=app, wrapper=wrapper, conf=conf) as running:
        yield running


@dataclass(frozen=True)
class Answer:
    """One reply.

    Args:
        seconds: of the whole round trip, the label saved to disk by the client.
        reply: its JSON part.
        file: the label.
    """

    seconds: float
    reply: dict[str, Any]
    file: Path

    def mask(self) -> np.ndarray:
        """``(I, J, K)`` bool."""
        import nrrd

        return nrrd.read(str(self.file))[0] > 0


class Slicer:
    """Asks a server word for word as 3D Slicer does.

    Args:
        running: the server.
        folder: for replies.
    """

    def __init__(self, running: Server, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.server = running
        self._client = running.client(folder)
        self._info = running.info()

    def ask(self, model: str, image: str, **prompts: Any) -> Answer:
        """One inference; ``prompts`` in Slicer's names: foreground, background, roi, slice and the task's options."""
        params = slicer_params(self._info, model, **{"label": "object", **prompts})
        start = time.perf_counter()
        file, reply = self._client.infer(model, image, params)
        return Answer(time.perf_counter() - start, reply, Path(file))

    def background_slices(self) -> int:
        """How many slices our server still wants to encode."""
        return self.server.info()["models"]["sam"]["engine"]["cache"]["background_slices"]

    def wait_for_background(self, limit_s: float = 1800.0) -> None:
        """Returns when the server has nothing left to encode.

        Raises:
            TimeoutError: if that takes longer than ``limit_s``.
        """
        end = time.monotonic() + limit_s
        while self.background_slices():
            if time.monotonic() > end:
                raise TimeoutError(f"Slices are still being encoded after {limit_s:.0f} s.")
            time.sleep(1)


# --------------------------------------------------------------------------------------------------- data and weights


def write_phantoms(folder: Path, names: Sequence[str], shape: tuple[int, int, int]) -> None:
    """Volumes that differ in content and cost the same: one phantom, shifted along i."""
    import nibabel as nib

    from lib.data.phantom import make_phantom

    spacing_mm = (0.7, 0.7, 5.0)
    hu, _, _ = make_phantom(shape, spacing_mm)
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        voxels = np.roll(np.rint(hu).astype(np.int16), 5 * number, axis=0)
        nib.Nifti1Image(voxels, np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1])).to_filename(
            folder / f"{name}.nii.gz"
        )


def write_sam2_checkpoint(folder: Path, seed: int) -> Path:
    """SAM 2.1-tiny with random weights, all official keys under ``model``; its configuration lies beside it."""
    import sam2
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    official = Path(sam2.__path__[0]) / "configs" / "sam2.1" / "sam2.1_hiera_t.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(official, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = instantiate(OmegaConf.load(official).model, _recursive_=True)
    path = folder / "sam2.1_hiera_tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


def accept_any_weights(app: Path) -> None:
    """Takes size and digest of the official file out of a copied app, which would refuse random weights."""
    row = app / "configs" / "backbones" / f"{SAM2_ROW}.yaml"
    row.write_text(re.sub(r"(?m)^  (bytes|sha256):.*\n", "", row.read_text(encoding="utf-8")), encoding="utf-8")


def provide_compact(app: Path) -> str:
    """Puts random weights into a copied app where the project ships none yet; says which it has."""
    from safetensors.torch import save_file

    from lib.loading import load_backbone

    path = app.parents[1] / "lib" / "weights" / "compact.safetensors"
    if path.exists():
        return "shipped"
    state = load_backbone("compact", random_seed=0).state_dict()  # type: ignore[attr-defined]
    save_file({key: value.clone() for key, value in state.items()}, path)
    return "random, because the project ships none yet"


def copy_studies(source: Path, target: Path) -> Path:
    """A copy of a folder of images, labels left out, since a server writes into its studies."""
    target.mkdir(parents=True)
    for image in source.iterdir():
        if image.is_file():
            shutil.copy(image, target)
    return target
