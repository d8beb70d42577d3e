"""A real server process for tests, and the clients' requests word for word."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import nibabel as nib
import nrrd
import numpy as np
import requests
from monailabel.client import MONAILabelClient

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "apps" / "autosam_label"
WRAPPER = "apps.autosam_label.server:app"
START_LIMIT_S = 180.0


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        url: without a slash at its end.
        studies: its folder of images.
        scratch: its home, caches and temporary files.
        pid: of the process.
        start_s: seconds until ``/info/`` answered.
    """

    url: str
    studies: Path
    scratch: Path
    pid: int
    start_s: float

    @property
    def log(self) -> str:
        """What the server wrote so far."""
        return (self.scratch / "server.log").read_text(errors="replace")

    def client(self, folder: Path) -> MONAILabelClient:
        """MONAI Label's own client; replies are saved in ``folder``."""
        return MONAILabelClient(self.url, str(folder), client_id="tester")

    def info(self) -> dict[str, Any]:
        """``GET /info/``."""
        response = requests.get(f"{self.url}/info/", timeout=60)
        response.raise_for_status()
        return response.json()


@contextmanager
def running_server(
    studies: Union[Path, str],
    scratch: Path,
    *,
    app: Path = APP,
    wrapper: bool = True,
    conf: Optional[Mapping[str, str]] = None,
) -> Iterator[Server]:
    """Starts a server on a free loopback port and ends its process tree.

    Args:
        studies: folder of images, written into by the server, or the address of a PACS.
        scratch: new folder for everything that would otherwise lie in the user's home or in /tmp.
        app: folder of the app.
        wrapper: False starts MONAI Label's own ASGI app.
        conf: ``--conf`` pairs.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--uvicorn_app", WRAPPER] if wrapper else []
    for pair in (conf or {}).items():
        command += ["--conf", *pair]
    start = time.monotonic()
    with open(scratch / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=scratch, env=_environment(scratch), stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, scratch / "server.log")
        yield Server(url, Path(studies), scratch, process.pid, time.monotonic() - start)
    finally:
        _end(process)


def _environment(scratch: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MONAI_") and k != "PYTHONDONTWRITEBYTECODE"}
    env.setdefault("OMP_WAIT_POLICY", "passive")  # as start.py does
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env["PATH"]
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR", "MPLCONFIGDIR"):
        folder = scratch / name.lower()
        folder.mkdir(exist_ok=True)
        env[name] = str(folder)
    return env


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            if requests.get(f"{url}/info/", timeout=30).status_code == 200:
                return
        except requests.ConnectionError:
            time.sleep(0.2)
    raise RuntimeError(f"No answer in {START_LIMIT_S} s:\n{log.read_text()[-4000:]}")


def _end(process: subprocess.Popen) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)  # its own session: the server and what it started
            process.wait(timeout=15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def slicer_params(
    info: Mapping[str, Any], model: str, *, label: str, foreground: Any = (), background: Any = (), **more: Any
) -> dict[str, Any]:
    """What 3D Slicer's ``onClickDeepgrow`` and ``infer`` send: points, the model's config, the result format."""
    params: dict[str, Any] = {"label": label, "foreground": list(foreground), "background": list(background)}
    config = info["models"][model]["config"]
    params.update({k: v[0] if isinstance(v, list) else v for k, v in config.items()})
    params.update(ijk="file")  # tests give the file's voxels; tests/slicer.py has Slicer's own
    params.update(more)
    params.update(result_extension=".nrrd", result_dtype="uint8")
    return params


def ohif_click(server: Server, model: str, image: str, **params: Any) -> requests.Response:
    """OHIF's point prompt: a form field ``params``, the raw NRRD back."""
    params.update(result_extension=".nrrd", result_dtype="uint8", result_compress=False, restore_label_idx=False)
    return post_infer(server, model, image, params, output="image")


def post_infer(server: Server, model: str, image: str, params: Any, **query: str) -> requests.Response:
    """``POST /infer/{model}`` with ``params`` as JSON, or as it stands where it is text."""
    text = params if isinstance(params, str) else json.dumps(params)
    return requests.post(
        f"{server.url}/infer/{model}",
        params={"image": image, **query},
        files={"params": (None, text)},
        timeout=300,
    )


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two masks; 1 where both are empty."""
    a, b = a > 0, b > 0
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def slicer_click(
    server: Server, folder: Path, model: str, image: str, **prompts: Any
) -> tuple[np.ndarray, dict[str, Any], str]:
    """Mask, JSON and file of a Slicer request."""
    params = slicer_params(server.info(), model, **{"label": "liver", **prompts})
    file, reply = server.client(folder).infer(model, image, params)
    assert file.endswith(".nrrd")
    return read_mask(file), reply, file


def read_mask(path: str | Path) -> np.ndarray:
    """The voxels of a reply, ``(I, J, K)`` as stored, checked to be a mask."""
    path = str(path)
    voxels = nrrd.read(path)[0] if path.endswith(".nrrd") else np.asarray(nib.load(path).dataobj)
    voxels = voxels if voxels.ndim == 3 else voxels[:, :, None]
    assert voxels.dtype == np.uint8
    assert set(np.unique(voxels)) <= {0, 1}
    return voxels


def affine_of(path: str | Path) -> np.ndarray:
    """The affine that a reply's header states, voxel to RAS mm, read by this test and not by our reader."""
    if not str(path).endswith(".nrrd"):
        return nib.load(path).affine
    header = nrrd.read_header(str(path))
    assert header["space"] == "left-posterior-superior"
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = np.array(header["space directions"]).T, header["space origin"]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it holds within ten seconds: the server logs and tidies after it has answered."""
    deadline = time.monotonic() + 10
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds


def save(response: requests.Response, path: Path) -> Path:
    """The body of a good answer as a file."""
    assert response.status_code == 200, response.text
    path.write_bytes(response.content)
    return path
