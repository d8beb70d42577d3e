"""One night of labelling against a real server process whose clock the test moves.

Every trigger and what holds it up, the retry when another job runs, a promotion that is blocked, the pause, the restart
in between, and the rollback.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests

from tests.cases import LABELS, write_case
from tests.labelling import ask, save_labels, start_training, train, upload
from tests.serving import ROOT, Server, post_infer, running_server
from tests.test_schedule_server import add, said, schedule, switch, wait_for, wait_said, wait_trained

CONF = {
    "backbone": "tiny", "labels": ",".join(LABELS), "models": "sam2rad,promise", "prefetch": "false",
    "train_at": "02:00", "train_after": "2", "train_hours": "20:00-06:00", "train_idle": "30",
    "train_min_interval": "90", "train_minutes": "0.05",
}  # fmt: skip
QUICK = {"preset": "full", "steps": 25, "batch": 4, "views": 2, "lr": 2e-3, "backbone_lr": 2e-3, "epochs": 8}
PATIENTS = [f"patient{n}" for n in range(4)]


class Clock:
    """What the server takes for now."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def show(self, text: str) -> None:
        """Monday is 2 March 2026."""
        day, clock = text.split()
        partial = self.file.with_suffix(".part")
        partial.write_text(f"2026-03-{ {'Mon': 2, 'Tue': 3}[day]:02d}T{clock}:00")
        partial.replace(self.file)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(tmp_path / "clock")
    made.show("Mon 17:00")
    monkeypatch.setenv("AUTOSAM_TEST_CLOCK", str(made.file))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "moved_clock"))
    return made


def accept(server: Server, folder: Path, cases: list[str]) -> None:
    """Saves what the live version answers as final labels, as somebody does who finds nothing to mend."""
    files = []
    for case in cases:
        mask = ask(server, folder, "sam2rad", case)[0].astype(np.uint8)
        assert set(np.unique(mask)) > {0}, "nothing was learned"
        files.append(folder / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(mask, np.diag([1.0, 1.0, 5.0, 1.0])), files[-1])
    save_labels(server, files, LABELS)


def versions(server: Server, *command: str) -> str:
    line = [sys.executable, "-m", "lib.versions", "--state", str(server.studies / ".autosam"), *command]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def history(server: Server) -> list[tuple[str, str]]:
    lines = (server.studies / ".autosam" / "sam2rad" / "history.jsonl").read_text().splitlines()
    return [(line["decision"], line["version"]) for line in map(json.loads, lines)]


@pytest.mark.timeout(1200)
def test_one_night(tmp_path: Path, clock: Clock) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    with running_server(studies, tmp_path / "a", conf=CONF) as server:
        upload(server, [write_case(tmp_path / "images", name, n).image for n, name in enumerate(PATIENTS)])
        first_label(server, tmp_path)
        hours_use_and_the_time_between_two(server, clock)
        another_job(server, clock)
        blocked_promotion(server, tmp_path)
        paused_at_its_time(server, clock, tmp_path)
        psutil.Process(server.pid).kill()
    with running_server(studies, tmp_path / "b", conf=CONF) as server:
        restart_in_between(server, clock)
        rollback(server, tmp_path)
        assert "patient" not in str(schedule(server))


def first_label(server: Server, folder: Path) -> None:
    """Two of four labels are due; a training by hand answers them; what it made is accepted where it is judged."""
    add(server, folder, 0, 1)
    wait_said(server, "due: train_after 2", "waits: outside the allowed hours 20:00-06:00")
    assert schedule(server)["next"] == "2026-03-02T20:00:00+01:00"
    add(server, folder, 2, 3)
    assert train(server, **QUICK)[-1]["live"] is True
    wait_said(server, "started by hand", "the training ended")
    assert schedule(server)["pending"] == []
    split = json.loads((server.studies / ".autosam/sam2rad/versions/v0001/version.json").read_text())["split"]
    judged = [case for case in PATIENTS if split[case] == "val"]
    accept(server, folder, judged)
    others = [case for case in PATIENTS if case not in judged]
    add(server, folder, *(int(case[-1]) for case in others[: 2 - len(judged)]))
    wait_said(server, "due: train_after 2", "waits: outside the allowed hours 20:00-06:00")


def hours_use_and_the_time_between_two(server: Server, clock: Clock) -> None:
    clock.show("Mon 19:50")
    assert post_infer(server, "sam", PATIENTS[0], {"foreground": [[10, 10, 3]]}, output="json").ok
    clock.show("Mon 20:00")
    wait_said(server, "waits: somebody used the server in the last 30 minutes")
    assert schedule(server)["next"] is None


def another_job(server: Server, clock: Clock) -> None:
    """Somebody trains another method; the schedule's own start comes when that is over."""
    start_training(server, method="promise", epochs=500, steps=40, patience=500)
    wait_said(server, "waits: another training is running")
    clock.show("Mon 20:20")
    wait_for(server, lambda: schedule(server)["log"][-1]["count"] > 2)  # it goes on looking
    assert requests.post(f"{server.url}/train/sam2rad", json={}, timeout=60).status_code == 429
    assert requests.delete(f"{server.url}/train/", timeout=60).ok
    wait_said(server, "waits: another training is running", "started: train_after 2")


def blocked_promotion(server: Server, folder: Path) -> None:
    """Nothing beats the live version where its own answers are the truth."""
    before = ask(server, folder, "sam2rad", PATIENTS[0])[0]
    wait_trained(server, "v0002")
    wait_said(server, "started: train_after 2", "the training ended")
    told = server.info()["train_stats"]["sam2rad"]
    assert told["live"] is False and "does not beat" in told["reason"], told
    assert history(server) == [("promoted", "v0001"), ("refused", "v0002")]
    np.testing.assert_array_equal(ask(server, folder, "sam2rad", PATIENTS[0])[0], before)


def paused_at_its_time(server: Server, clock: Clock, folder: Path) -> None:
    """Two more labels wait for the interval, and the pause outlasts that and the time of day."""
    add(server, folder, 4, 5)
    wait_said(server, "due: train_after 2", "waits: less than 90 minutes after the last start, not before Mon 21:50")
    assert switch(server, "pause")["paused"] is True
    clock.show("Tue 02:00")
    wait_said(server, "due: train_at 02:00", "waits: paused")
    assert schedule(server)["next"] is None


def restart_in_between(server: Server, clock: Clock) -> None:
    assert schedule(server)["paused"] and schedule(server)["pending"] == ["train_after 2", "train_at 02:00"]
    clock.show("Tue 03:00")
    switch(server, "resume")
    wait_said(server, "resumed", "started: train_after 2, train_at 02:00")
    wait_trained(server, "v0003")
    wait_said(server, "started: train_after 2, train_at 02:00", "the training ended")
    clock.show("Tue 05:00")
    wait_for(server, lambda: schedule(server)["next"] == "2026-03-04T02:00:00+01:00")
    assert not any("late" in line for line in said(server))


def rollback(server: Server, folder: Path) -> None:
    """Back to what was live before, and the server answers with it at once."""
    shown = {}
    for name in ("v0001", "v0002"):
        versions(server, "promote", name, "--reason", "test")
        shown[name] = ask(server, folder, "sam2rad", PATIENTS[0])[0]
    assert not np.array_equal(shown["v0001"], shown["v0002"])
    assert "v0001 is live" in versions(server, "rollback", "--reason", "test")
    mask, reply = ask(server, folder, "sam2rad", PATIENTS[0])
    assert reply["version"] == "v0001"
    np.testing.assert_array_equal(mask, shown["v0001"])
