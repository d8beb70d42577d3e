"""The training schedule in a real server process: every trigger, the retry, the pause, and a restart in between."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.cases import LABELS, write_case
from tests.labelling import progress, save_labels, start_training, training_status, upload
from tests.serving import ROOT, Server, post_infer, running_server

CONF = {"backbone": "tiny", "labels": ",".join(LABELS), "train_minutes": "0.05"}
LIMIT_S = 300.0


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    return folder


def add(server: Server, folder: Path, *numbers: int, tag: str = "final") -> None:
    """Uploads cases and saves their labels as Slicer does."""
    made = [write_case(folder / "new", f"patient{n}", n) for n in numbers]
    upload(server, (case.image for case in made))
    save_labels(server, (case.label for case in made), LABELS)


def schedule(server: Server) -> dict[str, Any]:
    """What ``GET /schedule`` shows."""
    response = requests.get(f"{server.url}/schedule", timeout=60)
    assert response.ok, response.text
    return response.json()


def switch(server: Server, command: str) -> dict[str, Any]:
    """``POST /schedule/pause`` or ``resume``."""
    response = requests.post(f"{server.url}/schedule/{command}", timeout=60)
    assert response.ok, response.text
    return response.json()


def said(server: Server) -> list[str]:
    """The decisions, oldest first."""
    return [line["what"] for line in schedule(server)["log"]]


def wait_for(server: Server, holds: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Until something holds; what was decided, where it does not."""
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, (schedule(server), server.log[-2000:])
        time.sleep(0.5)


def wait_said(server: Server, *sentences: str) -> None:
    """Until the log's last lines are these; a line that ends with ``...`` may go on."""

    def holds() -> bool:
        last = said(server)[-len(sentences) :]
        return len(last) == len(sentences) and all(
            line.startswith(text.removesuffix("...")) if text.endswith("...") else line == text
            for line, text in zip(last, sentences)
        )

    wait_for(server, holds)


def wait_trained(server: Server, version: str) -> None:
    """Until a training has ended with a version."""
    wait_for(server, lambda: training_status(server) == "DONE")
    assert progress(server)["version"] == version, progress(server)


def test_labels_start_a_training_once_it_is_resumed(tmp_path: Path, studies: Path) -> None:
    """Pause and resume over REST and offline, the count of labels, one job at a time, and what /info/ shows."""
    with running_server(studies, tmp_path / "server", conf={**CONF, "train_after": "3"}) as server:
        assert switch(server, "pause")["paused"] is True
        add(server, tmp_path, 0, 1, 1)  # the second one twice
        wait_said(server, "paused")
        wait_for(server, lambda: schedule(server)["new_labels"] == 2)
        add(server, tmp_path, 2)
        wait_said(server, "paused", "due: train_after 3", "waits: paused")
        assert requests.get(f"{server.url}/train/", timeout=60).status_code == 404  # none yet

        command = [sys.executable, "-m", "trainers.schedule", "resume", "--state", str(studies / ".autosam")]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        wait_said(server, "waits: paused", "resumed", "started: train_after 3")
        shown = requests.get(f"{server.url}/train/", timeout=60).json()
        assert shown["request"]["model"] == "sam2rad" and shown["request"]["minutes"] == 0.05
        wait_for(server, lambda: training_status(server) == "RUNNING")
        assert requests.post(f"{server.url}/train/sam2rad", json={}, timeout=60).status_code == 429
        wait_trained(server, "v0001")
        wait_said(server, "started: train_after 3", "the training ended")
        info = server.info()["schedule"]
        assert info["last_training"]["by"] == "schedule" and info["last_training"]["status"] == "DONE"
        assert (info["new_labels"], info["pending"], info["paused"]) == (0, [], False)
        assert "patient" not in str(info)
        assert requests.post(f"{server.url}/schedule/stop", timeout=60).status_code == 422


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_time_and_idle(tmp_path: Path, studies: Path) -> None:
    """A cron line; a server in use is left alone; nothing new, nothing trained; the interval between two starts."""
    conf = {**CONF, "train_at": "* * * * *", "train_idle": "0.2", "train_min_interval": "1.5"}
    with running_server(studies, tmp_path / "server", conf=conf) as server:
        add(server, tmp_path, 0, 1)

        def used_until_it_waits() -> bool:
            post_infer(server, "sam", "patient0", {"foreground": [[10, 10, 3]]}, output="json")
            return said(server)[-1:] == ["waits: somebody used the server in the last 0.2 minutes"]

        wait_for(server, used_until_it_waits)
        wait_said(server, "waits: somebody...", "started: train_at * * * * *")
        wait_trained(server, "v0001")
        wait_for(server, lambda: said(server)[-1].startswith("not started: no final label changed"))
        add(server, tmp_path, 2)
        wait_for(server, lambda: said(server).count("started: train_at * * * * *") == 2)
        starts = [line["time"] for line in schedule(server)["log"] if line["what"].startswith("started")]
        seconds = [time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) for text in starts]
        assert seconds[1] - seconds[0] >= 89
        wait_trained(server, "v0002")


def child(server: Server) -> psutil.Process:
    """The process that MONAI Label trains in."""
    children = psutil.Process(server.pid).children(recursive=True)
    return next(c for c in children if any("monailabel.interfaces.utils.app" in part for part in c.cmdline()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_restart_in_between(tmp_path: Path, studies: Path) -> None:
    """Due while a training by hand runs; kill -9 of the server, whose child lives on, then of that; all paused."""
    conf = {**CONF, "train_after": "2"}
    with running_server(studies, tmp_path / "a", conf=conf) as one:
        switch(one, "pause")
        add(one, tmp_path, 0, 1)
        wait_said(one, "paused", "due: train_after 2", "waits: paused")
        start_training(one, epochs=500, steps=40, patience=500, seed=5)
        wait_said(one, "started by hand")  # answers the two labels
        add(one, tmp_path, 2, 3)
        wait_said(one, "started by hand", "due: train_after 2", "waits: paused")
        state = studies / ".autosam" / "sam2rad" / "runs" / "current" / "state.pt"
        wait_for(one, state.exists)
        training = child(one)
        psutil.Process(one.pid).kill()

        with running_server(studies, tmp_path / "b", conf=conf) as two:
            assert schedule(two)["paused"] and schedule(two)["pending"] == ["train_after 2"]
            switch(two, "resume")
            wait_said(two, "resumed", "waits: another training is running")  # it outlived its server
            assert requests.get(f"{two.url}/train/", timeout=60).status_code == 404  # upstream knows nothing of it
            training.kill()
            wait_said(two, "the server ended during a training", "started: train_after 2, a training was cut off")
            wait_trained(two, "v0001")
            wait_said(two, "the training ended")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cut_off_training_goes_on_where_it_was(tmp_path: Path, studies: Path) -> None:
    """The server and its child die; the next server asks for the same, and the trainer resumes. Also after a reload."""
    conf = {**CONF, "train_after": "2", "train_minutes": "0"}
    with running_server(studies, tmp_path / "a", conf=conf) as one:
        add(one, tmp_path, 0, 1)
        wait_for(one, lambda: progress(one).get("step", 0) >= 40)
        training = child(one)
        psutil.Process(one.pid).kill()
        training.kill()
    with running_server(studies, tmp_path / "b", conf=conf) as two:
        assert requests.post(f"{two.url}/reload", timeout=60).ok
        wait_for(two, lambda: "started: a training was cut off" in said(two))
        wait_for(two, lambda: "resumed at step" in two.log)
        assert requests.delete(f"{two.url}/train/", timeout=60).ok
        wait_said(two, "the training was stopped by hand")
        time.sleep(12)
        assert said(two)[-1] == "the training was stopped by hand"  # and not started again
