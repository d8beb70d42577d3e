"""Whole labelling sessions through the real server: how many clicks until a data set is labelled, for several arms.

    python -m bench.labelling_session [--sets hippocampus acdc] [--arms mix random sam deepedit] [--out FILE]
    python -m bench.labelling_session --quick      # generated images, seconds of training: does everything work?

Hippocampus: 40 cases of ``adapt`` and ``test``; ACDC: 24 volumes, the first frame of every ``adapt`` patient. A
simulated annotator (:mod:`bench.session_annotator`) takes ``next_sample``, looks at what is proposed and clicks until
every structure has Dice 0.90 or 20 clicks are made; what is saved then is the reference label, as by somebody who
finishes the rest by hand and hands in nothing below the standard. A case that never reaches 0.90 counts 20 clicks and
is listed; so does one that a server cannot answer yet (DeepEdit before its first version). After every 8 labels a
training of at most 5 minutes runs and the annotator waits for it. One seed; every arm labels in two opposite orders;
means are over both.

    mix         this app, ``sam2rad`` proposes, ``sam2rad_edit`` is clicked with, strategy ``mix``
    random      the same in a random order           sam         plain ``sam``, nothing is proposed or learned
    deepedit    MONAI Label's own DeepEdit (``bench/apps/deepedit``), trained on the same schedule

Progress lies in ``bench/results``; a bench that was killed goes on at the next case when it is started again with the
same options. Its studies lie in a temporary folder meanwhile; without it the arm starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bench import common, session_report
from bench.common import Report
from bench.session_annotator import annotate
from bench.session_arms import ARMS, Session, Setting, serving
from lib.data.samples import patient_of
from lib.data.split import acdc_split, hippocampus_split

LABELS = {"hippocampus": ("anterior", "posterior"), "acdc": ("RV", "Myo", "LV"), "phantoms": ("big", "small")}
COUNTS = {"hippocampus": 40, "acdc": 24}
ORDERS = ("forward", "backward")
RESULTS = common.ROOT / "bench" / "results"
QUICK = {"epochs": 1, "steps": 4, "views": 1, "patience": 1}


@dataclass(frozen=True)
class Case:
    """One image and its reference label.

    Args:
        name: in the data set.
        image: file.
        label: file.
    """

    name: str
    image: Path
    label: Path


def cases_of(data: str, folder: Path, limit: int) -> list[Case]:
    """The session's cases, evenly thinned to ``limit``."""
    names = [p.name for p in folder.glob("*.nii.gz")]
    if data == "hippocampus":
        parts = hippocampus_split(names)
        chosen = thinned(sorted(parts["adapt"] + parts["test"]), COUNTS[data])
    elif data == "acdc":
        chosen = sorted({patient_of(c): c for c in sorted(acdc_split(names)["adapt"], reverse=True)}.values())
    else:
        chosen = sorted(n.split(".")[0] for n in names)
    return [
        Case(c, folder / f"{c}.nii.gz", folder / "labels" / "final" / f"{c}.nii.gz") for c in thinned(chosen, limit)
    ]


def thinned(names: Sequence[str], count: int) -> list[str]:
    """``count`` of them, evenly spread; all where ``count`` is 0 or there are fewer."""
    count = min(count or len(names), len(names))
    return [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)]


def ordered(cases: Sequence[Case], order: str, seed: int) -> dict[str, Case]:
    """Cases by the names that their images get: sorted, they are in a random order, or in its opposite."""
    shuffled = [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))]
    return {f"case_{n:03d}": c for n, c in enumerate(shuffled if order == ORDERS[0] else shuffled[::-1])}


def write_phantoms(folder: Path, count: int) -> None:
    """Two structures of different brightness, in different places."""
    (folder / "labels" / "final").mkdir(parents=True)
    for number in range(count):
        rng, grid = np.random.default_rng(number), np.indices((32, 32, 8))
        centre = rng.uniform(11, 20, 2)
        classes = np.zeros(grid.shape[1:], np.uint8)
        classes[((grid[0] - centre[0]) ** 2 + (grid[1] - centre[1]) ** 2 < 49) & (abs(grid[2] - 3.5) < 3)] = 1
        classes[((grid[0] - centre[0]) ** 2 + (grid[1] - centre[1]) ** 2 < 9) & (abs(grid[2] - 3.5) < 3)] = 2
        grey = np.array([50, 150, 220])[classes] + rng.normal(0, 5, classes.shape)
        for path, voxels in ((folder, grey.astype(np.float32)), (folder / "labels" / "final", classes)):
            nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 4.0, 1.0])), path / f"phantom_{number}.nii.gz")


# ------------------------------------------------------------------------------------------------------------- session


class Progress:
    """What was done, in a small JSON file that is replaced as a whole.

    Args:
        path: the file.
        facts: of the run; a file of another run is not continued.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        self._all: dict[str, Any] = {"facts": json.loads(json.dumps(facts)), "sessions": {}}
        if path.exists() and (there := json.loads(path.read_text())).get("facts") == self._all["facts"]:
            self._all = there

    @property
    def sessions(self) -> dict[str, Any]:
        """``cases`` and ``trainings`` by arm and order."""
        return self._all["sessions"]

    def session(self, key: str, folder: Path) -> dict[str, Any]:
        """The one to go on with; from the start where its studies are gone."""
        if not folder.exists() and not self.sessions.get(key, {}).get("done"):
            self.sessions.pop(key, None)
        return self.sessions.setdefault(key, {"cases": [], "trainings": [], "done": False})

    def save(self) -> None:
        """Replaces the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(self._all) + "\n")
        os.replace(partial, self._path)


def label_all(name: str, cases: dict[str, Case], setting: Setting, folder: Path, progress: Progress, key: str) -> None:
    """One arm in one order, from where it was."""
    done = progress.session(key, folder)
    if done["done"]:
        return
    studies = folder / "studies"
    if not studies.exists():
        partial = folder / "studies.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for image, case in cases.items():
            shutil.copy(case.image, partial / f"{image}.nii.gz")
        partial.rename(studies)
    with serving(name, setting, folder) as session:
        save_labels(session, cases, done, progress)
        while True:
            train_if_due(session, done, len(cases), progress)
            sample = session.next_sample()
            if not sample:
                break
            label_one(session, sample, cases, done, progress)
            print(f"{key} {len(done['cases'])}/{len(cases)}: {json.dumps(done['cases'][-1])}", flush=True)
    done["done"] = True
    progress.save()
    shutil.rmtree(folder, ignore_errors=True)


def train_if_due(session: Session, done: dict[str, Any], total: int, progress: Progress) -> None:
    """Waits for a training after every ``every`` labels, the last ones excepted."""
    count, every = len(done["cases"]), session.setting.every
    if not session.arm.trains or count == 0 or count % every or count == total:
        return
    if not any(t["labels"] == count for t in done["trainings"]):
        done["trainings"].append({"labels": count, **session.train()})
        progress.save()
        print(f"  training: {json.dumps(done['trainings'][-1])}", flush=True)


def label_one(
    session: Session, sample: dict[str, Any], cases: dict[str, Case], done: dict[str, Any], progress: Progress
) -> None:
    """Clicks on one case and writes it down before its label is saved, so that a kill loses neither."""
    image, case = sample["id"], cases[sample["id"]]
    label, started = nib.load(case.label), time.monotonic()
    truth = np.asarray(label.dataobj).astype(np.uint8)
    clicked = session.on(image, truth.shape)
    found = annotate(truth, len(session.setting.labels), label.header.get_zooms()[:3], clicked)
    chosen = {k: sample.get("selection", {}).get(k) for k in ("used", "scored", "candidates")}
    facts = {"image": image, "case": case.name, "version": session.live, "chosen": chosen}
    seconds = round(time.monotonic() - started, 1)
    done["cases"].append({**facts, **asdict(found), "seconds": seconds, "saved": False})
    progress.save()
    save_labels(session, cases, done, progress)


def save_labels(session: Session, cases: dict[str, Case], done: dict[str, Any], progress: Progress) -> None:
    """Labels of cases that were written down and not saved: the last one, or that of a bench that was killed."""
    for one in done["cases"]:
        if not one["saved"]:
            session.save(one["image"], cases[one["image"]].label)
            one["saved"] = True
            progress.save()


def run(data: str, folder: Path, setting: Setting, options: argparse.Namespace, report: Report) -> None:
    """All arms on one data set."""
    cases = cases_of(data, folder, options.cases)
    facts = {"setting": asdict(setting), "seed": options.seed, "cases": [c.name for c in cases]}
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    progress = Progress(options.results / f"labelling_{data}_{mark}.json", facts)
    for order in options.orders:  # an order is complete for all arms before the next one begins
        for name in options.arms:
            key, work = f"{name}/{order}", options.work / f"{data}-{mark}-{name}-{order}"
            label_all(name, ordered(cases, order, options.seed), setting, work, progress, key)
    session_report.tell(data, progress.sessions, options.arms, report)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", choices=sorted(COUNTS), default=["hippocampus", "acdc"])
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--cases", type=int, default=0, help="so many of each set; 0: all")
    parser.add_argument("--every", type=int, default=8, help="labels that start a training")
    parser.add_argument("--minutes", type=float, default=5.0, help="of a training at most")
    parser.add_argument("--seed", type=int, default=1, help="of the random order")
    parser.add_argument("--quick", action="store_true", help="generated images, one order, seconds of training")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the progress")
    work = Path(tempfile.gettempdir()) / "labelling-session"
    parser.add_argument("--work", type=Path, default=work, help="folder of studies under way")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    report = Report("Labelling sessions", options.out)
    if options.quick:
        options.orders, options.seed = options.orders[:1], 1
        with common.scratch_folder() as scratch:
            write_phantoms(scratch / "phantoms", options.cases or 3)
            recipe = tuple(QUICK.items())
            setting = Setting("phantoms", LABELS["phantoms"], 2, 0.2, pause_s=0.0, backbone="tiny", recipe=recipe)
            run("phantoms", scratch / "phantoms", setting, options, report)
        return 0
    for data in options.sets:
        setting = Setting(data, LABELS[data], options.every, options.minutes)
        run(data, options.data_dir / data, setting, options, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
