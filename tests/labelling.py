"""What an annotation team does over REST: upload images, save labels, train. Word for word as the clients do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import requests

from tests.serving import Server

TRAINING_LIMIT_S = 600.0
UNDER_WAY = ("SUBMITTED", "PENDING", "RUNNING")


def upload(server: Server, files: Iterable[Path]) -> None:
    """Images of the store, named by their files."""
    for file in files:
        with file.open("rb") as body:
            url = f"{server.url}/datastore/?image={file.name.split('.')[0]}"
            assert requests.put(url, files={"file": (file.name, body)}, timeout=60).ok


def save_labels(server: Server, files: Iterable[Path], labels: Sequence[str]) -> None:
    """Final labels as Slicer saves them, named by their files."""
    info = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(labels, start=1)], "client_id": "tester"}
    for file in files:
        with file.open("rb") as body:
            form = {"label": (file.name, body), "params": (None, json.dumps(info))}
            url = f"{server.url}/datastore/label?image={file.name.split('.')[0]}&tag=final"
            assert requests.put(url, files=form, timeout=60).ok


def start_training(server: Server, *, method: str = "sam2rad", **options: Any) -> None:
    """``POST /train/{method}``."""
    assert requests.post(f"{server.url}/train/{method}", json=options, timeout=60).ok


def progress(server: Server, method: str = "sam2rad") -> dict[str, Any]:
    """What clients see of a training."""
    return server.info()["train_stats"][method]


def training_status(server: Server) -> str:
    """``SUBMITTED``, ``PENDING``, ``RUNNING``, ``DONE``, ``ERROR`` or ``STOPPED``, as clients see it."""
    return requests.get(f"{server.url}/train/", timeout=60).json()["status"]


def train(server: Server, *, method: str = "sam2rad", **options: Any) -> list[dict[str, Any]]:
    """Trains to the end; what ``/info/`` showed meanwhile, the last entry being the result."""
    start_training(server, method=method, **options)
    seen, end = [], time.monotonic() + TRAINING_LIMIT_S
    while time.monotonic() < end:
        seen.append(progress(server, method))
        status = training_status(server)
        assert status in (*UNDER_WAY, "DONE"), requests.get(f"{server.url}/train/", timeout=60).text[-3000:]
        if status == "DONE":
            return [*seen, progress(server, method)]
        time.sleep(2)
    raise AssertionError(f"no end of the training in {TRAINING_LIMIT_S} s")


def ask(server: Server, folder: Path, model: str, case: str, **prompts: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Label map and JSON as Slicer gets them."""
    params = {**prompts, "result_extension": ".nrrd", "result_dtype": "uint8"}
    file, reply = server.client(folder).infer(model, case, params)
    return nrrd.read(file)[0], reply
