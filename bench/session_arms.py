"""The arms of the labelling session: which server answers the annotator, and the requests it is sent.

Word for word what 3D Slicer sends: points of every label and of ``background`` for tasks that know labels, foreground
and background of one label for ``sam``, all clicks so far each time. Where something is too much, Slicer's user clicks
on what is there instead: another label, or ``background``. Frame: voxels of the file. Not thread-safe.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

from bench import common
from bench.session_annotator import Click
from tests.serving import Server, slicer_params

CLIENT = "annotator"
START_S, EXTRA_S = 60.0, 600.0  # a training's start by the trigger; its end after the limit
SIZES = {"hippocampus": "32,64,32", "acdc": "192,192,16", "phantoms": "64,32,16"}  # of DeepEdit's input


@dataclass(frozen=True)
class Arm:
    """One way to label.

    Args:
        text: for the report.
        task: that is clicked with.
        alone: that proposes, and whose presence says that a version is live; empty: nothing is proposed.
        strategy: that chooses the next case; ``first`` is the shuffled order of the files.
        trains: the model; empty: nothing is learned.
    """

    text: str
    task: str
    alone: str = ""
    strategy: str = "first"
    trains: str = ""


OURS = "sam2rad"
ARMS = {
    "mix": Arm("this app, strategy mix", f"{OURS}_edit", OURS, "mix", OURS),
    "random": Arm("this app, random order", f"{OURS}_edit", OURS, "first", OURS),
    "sam": Arm("plain sam, no learning", "sam"),
    "deepedit": Arm("MONAI Label's DeepEdit", "deepedit", "deepedit_seg", "first", "deepedit"),
}


@dataclass(frozen=True)
class Setting:
    """What all arms of one run share.

    Args:
        data: name of the data set.
        labels: names of the structures 1..K.
        every: labels that start a training.
        minutes: of a training at most.
        pause_s: that the server has for itself after its start and after a training: a person's clicks would take
            longer than the annotator's, and scoring in the background needs that time.
        backbone: of our app.
        recipe: more lines for our training, such as a few epochs for the short form.
    """

    data: str
    labels: tuple[str, ...]
    every: int
    minutes: float
    pause_s: float = 20.0
    backbone: str = "compact"
    recipe: tuple[tuple[str, Any], ...] = ()


@contextmanager
def serving(name: str, setting: Setting, folder: Path) -> Iterator[Session]:
    """The server of an arm, on the studies in ``folder``; everything that outlives a killed bench lies there too."""
    end_orphan(folder)
    arm, labels = ARMS[name], ",".join(setting.labels)
    app = folder / "app"
    if arm.trains == "deepedit":
        shutil.copytree(common.APPS / "deepedit", app, ignore=common.CREATED, dirs_exist_ok=True)
        conf = {"labels": labels, "size": SIZES[setting.data]}
    else:
        app = common.own_app(app)
        conf = {"labels": labels, "backbone": setting.backbone}
        limit_training(app / "configs" / "methods" / f"{OURS}.yaml", setting)
        if arm.trains:
            conf["train_after"] = str(setting.every)
    with common.server(app, folder / "studies", folder / "home", wrapper=arm.trains != "deepedit", **conf) as running:
        (folder / "server.pid").write_text(str(running.pid))
        yield Session(arm, setting, running, folder / "replies")
    (folder / "server.pid").unlink()


def end_orphan(folder: Path) -> None:
    """Ends the server that a killed bench left on these studies: two would spoil the store."""
    note = folder / "server.pid"
    if not note.exists():
        return
    pid = int(note.read_text())
    command = common.PROC / str(pid) / "cmdline"
    if command.exists() and str(folder / "studies") in command.read_bytes().decode(errors="replace"):
        os.killpg(pid, signal.SIGKILL)
        time.sleep(1)
    note.unlink()


def limit_training(row: Path, setting: Setting) -> None:
    """Writes the cap into a copied app's recipe, since the trigger gives no options."""
    text = row.read_text(encoding="utf-8")
    for key, value in {"minutes": setting.minutes, **dict(setting.recipe)}.items():
        text = re.sub(rf"(?m)^  {key}:.*\n", "", text) + f"  {key}: {value}\n"
    row.write_text(text, encoding="utf-8")


class Session:
    """The annotator's side of one server.

    Args:
        arm: what is asked.
        setting: of the run.
        running: the server.
        replies: folder for label files, each removed when it was read.
    """

    def __init__(self, arm: Arm, setting: Setting, running: Server, replies: Path) -> None:
        replies.mkdir(exist_ok=True)
        self.arm, self.setting, self._server = arm, setting, running
        self._client = running.client(replies)
        self._info = running.info()
        self.strategy = arm.strategy if arm.strategy in self._info["strategies"] else "first"
        self.pause()

    def pause(self) -> None:
        """Time for scores in the background."""
        if self.strategy != "first":
            time.sleep(self.setting.pause_s)

    def next_sample(self) -> dict[str, Any]:
        """The server's choice, with ``id``; nothing where all are labelled."""
        answer = requests.post(
            f"{self._server.url}/activelearning/{self.strategy}", json={"client_id": CLIENT}, timeout=300
        )
        answer.raise_for_status()
        return answer.json()

    def on(self, image: str, shape: Sequence[int]) -> Clicked:
        """A case that is opened."""
        self._info = self._server.info()
        return Clicked(self, image, shape)

    @property
    def live(self) -> str:
        """The version that proposes: its name where the server gives one, ``yes``, or nothing."""
        task = self._info["models"].get(self.arm.alone)
        return "" if task is None else str(task.get("version_live") or "yes")

    def can(self, task: str) -> bool:
        """Whether the server offers it now: DeepEdit does not before its first version."""
        return task in self._info["models"]

    def infer(self, task: str, image: str, **prompts: Any) -> np.ndarray:
        """``(I, J, K)`` numbers."""
        params = slicer_params(self._info, task, **{"label": self.setting.labels[0], **prompts})
        file, _ = self._client.infer(task, image, {**params, "result_extension": ".nii.gz"})
        try:
            return np.asarray(nib.load(file).dataobj).astype(np.uint8)
        finally:
            os.unlink(file)

    def save(self, image: str, label: Path) -> None:
        """The final label, as Slicer saves it."""
        names = [{"name": name, "idx": n} for n, name in enumerate(self.setting.labels, start=1)]
        with label.open("rb") as body:
            form = {
                "label": (f"{image}.nii.gz", body),
                "params": (None, json.dumps({"label_info": names, "client_id": CLIENT})),
            }
            url = f"{self._server.url}/datastore/label?image={image}&tag=final"
            requests.put(url, files=form, timeout=120).raise_for_status()

    def train(self) -> dict[str, Any]:
        """Waits for the training that the trigger starts, or starts it where there is none; what became of it."""
        started, by = time.monotonic(), "trigger"
        before = self._job()
        deadline = started + (START_S if self.arm.trains == OURS else 0)
        while not (new := _runs(job := self._job()) or job.get("id") != before.get("id")):
            if time.monotonic() > deadline:
                break
            time.sleep(1)
        if not new:
            by = "bench"
            self._start()
        return {"by": by, **self._wait(started), "minutes": round((time.monotonic() - started) / 60, 2)}

    def _wait(self, started: float) -> dict[str, Any]:
        end = started + 60 * self.setting.minutes + EXTRA_S
        while _runs(job := self._job()):
            if time.monotonic() > end:
                requests.delete(f"{self._server.url}/train/", timeout=60)
                return {"status": "STOPPED by the bench"}
            time.sleep(1)
        stats = self._server.info().get("train_stats", {}).get(self.arm.trains) or {}
        kept = {key: stats[key] for key in ("epoch", "step", "best_metric", "version", "live") if key in stats}
        if job.get("status") != "DONE":
            kept["error"] = next((line for line in reversed(job.get("details", [])) if line.strip()), "")[-300:]
        self.pause()
        return {"status": job.get("status", "none"), **kept}

    def _job(self) -> dict[str, Any]:
        answer = requests.get(f"{self._server.url}/train/", timeout=300)
        return answer.json() if answer.ok else {}

    def _start(self) -> None:
        options: dict[str, Any] = {}
        if self.arm.trains == "deepedit":
            config = self._info["trainers"]["deepedit"]["config"]
            options = {k: v[0] if isinstance(v, list) and v else v for k, v in config.items()}
            options |= {"minutes": self.setting.minutes, "max_epochs": 100_000, "multi_gpu": False}
            options |= {"dataset": "CacheDataset", "tracking": "None"}  # its MLflow refuses the default address
        requests.post(f"{self._server.url}/train/{self.arm.trains}", json=options, timeout=300).raise_for_status()


def _runs(job: dict[str, Any]) -> bool:
    return job.get("status") in ("SUBMITTED", "PENDING", "RUNNING")


class Clicked:
    """One opened case: answers to all clicks so far.

    Args:
        session: with the server.
        image: identifier.
        shape: of its voxels.
    """

    def __init__(self, session: Session, image: str, shape: Sequence[int]) -> None:
        self._session, self._image, self._labels = session, image, session.setting.labels
        self._found = np.zeros((len(self._labels), *shape), bool)

    def __call__(self, clicks: Sequence[Click]) -> np.ndarray:
        """``(structures, I, J, K)`` bool; nothing where the server cannot answer yet."""
        session = self._session
        if not clicks:
            if session.live:
                self._found = self._each(session.infer(session.arm.alone, self._image))
        elif not session.can(session.arm.task):
            pass
        elif session.arm.task == "sam":
            number = clicks[-1].structure
            mine = [c for c in clicks if c.structure == number]
            points = {
                "foreground": [c.ijk for c in mine if c.missing],
                "background": [c.ijk for c in mine if not c.missing],
            }
            self._found[number] = session.infer("sam", self._image, label=self._labels[number], **points) > 0
        else:
            self._found = self._each(session.infer(session.arm.task, self._image, **self._by_label(clicks)))
        return self._found.copy()

    def _by_label(self, clicks: Sequence[Click]) -> dict[str, Any]:
        """Points by what is there."""
        points: dict[str, Any] = {name: [] for name in (*self._labels, "background")}
        for click in clicks:
            name = "background" if click.true_structure is None else self._labels[click.true_structure]
            points[name].append(click.ijk)
        last = clicks[-1].true_structure
        return {**points, "label": self._labels[last if last is not None else clicks[-1].structure]}

    def _each(self, numbers: np.ndarray) -> np.ndarray:
        return np.stack([numbers == n for n in range(1, len(self._labels) + 1)])
