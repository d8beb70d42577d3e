"""Every method as a user gets it: cases uploaded, labels saved, trained and asked over the server's REST interface.

    python -m bench.methods_rest [--methods NAME ...] [--minutes 5] [--work FOLDER] [--out FILE]

ACDC: the 24 patients of ``adapt`` (48 volumes) are uploaded and labelled, the server itself chooses who validates; the
6 test patients (12 volumes) are uploaded without labels, and the autonomous task of the version that went live answers
for them. Training is ``POST /train/{method}`` with the shipped recipe and a limit in minutes; reading the cases, scores
for the gate and the report come on top. A finished method is a JSON file in ``--work`` and is not trained again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bench import common
from bench.common import Report
from bench.learned_prompts import SETS, interval
from bench.methods import GOAL, by_patient
from lib.config import method_names
from lib.data.split import acdc_split
from lib.train_loop import write_json
from tests.labelling import UNDER_WAY, ask, progress, save_labels, start_training, training_status, upload
from tests.serving import Server, dice

DATA = "acdc"
WORK = common.ROOT / "bench" / "results" / "methods_rest"
EXTRA_S = 900.0  # beyond the budget, until a training must have ended


@contextmanager
def labelled_server(method: str, folder: Path) -> Iterator[tuple[Server, list[str]]]:
    """A server with all cases, and the names of those that are not labelled."""
    parts = acdc_split(p.name for p in folder.glob("*.nii.gz"))
    with common.scratch_folder() as scratch:
        studies = scratch / "studies"
        studies.mkdir()
        app = common.own_app(scratch / "app")
        conf = {"backbone": "compact", "labels": ",".join(SETS[DATA]), "models": method}
        with common.server(app, studies, scratch / "home", **conf) as running:
            upload(running, (folder / f"{case}.nii.gz" for case in parts["adapt"] + parts["test"]))
            labels = folder / "labels" / "final"
            save_labels(running, (labels / f"{case}.nii.gz" for case in parts["adapt"]), SETS[DATA])
            yield running, parts["test"]


def measure(method: str, folder: Path, minutes: float) -> dict[str, Any]:
    """Trains one method and asks its live version about the test cases."""
    with labelled_server(method, folder) as (server, unseen), common.scratch_folder() as replies:
        started = time.monotonic()
        start_training(server, method=method, minutes=minutes)
        while (status := training_status(server)) in UNDER_WAY:
            if time.monotonic() - started > 60 * minutes + EXTRA_S:
                raise TimeoutError(f"{method}: no end of the training")
            time.sleep(1)
        seconds = time.monotonic() - started
        told = progress(server, method)
        if status != "DONE" or not told.get("live"):
            raise RuntimeError(f"{method}: {status}, {told}")
        asked, scores = time.monotonic(), {}
        for case in unseen:
            found, _ = ask(server, replies, method, case)
            truth = np.asarray(nib.load(folder / "labels" / "final" / f"{case}.nii.gz").dataobj)
            scores[case] = [dice(found == n, truth == n) for n in range(1, len(SETS[DATA]) + 1)]
        spent = (time.monotonic() - asked) / len(unseen)
    facts = {"minutes": minutes, "train_s": seconds, "volume_s": spent, "machine": common.machine()}
    return {**facts, "step": told["step"], "validation": told["best_metric"], "dice": scores}


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--methods", nargs="+", choices=method_names(), default=method_names())
    parser.add_argument("--minutes", type=float, default=5.0, help="of each training")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished methods")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    report = Report("Methods trained over REST", options.out)
    rows, reached = [], 0
    for method in options.methods:
        path = options.work / f"{DATA}-{method}-{options.minutes:g}.json"
        if not path.exists():
            write_json(path, measure(method, options.data_dir / DATA, options.minutes))
        result = loads(path.read_text(encoding="utf-8"))
        table = by_patient(result)
        reached += bool(table.mean() >= GOAL)
        rows.append(
            [method, *(f"{v:.3f}" for v in table.mean(0)), interval(table.mean(1), sign=""), result["step"],
             f"{result['train_s']:.0f}", f"{result['validation']:.3f}", f"{result['volume_s']:.2f}"]
        )  # fmt: skip
        print(rows[-1], flush=True)
    header = ["method", *SETS[DATA], "mean", "steps", "train s", "val. Dice", "s/volume"]
    report.table(f"ACDC, {options.minutes:g} minutes each", header, rows)
    report.add("", f"Mean Dice of at least {GOAL}: {reached} of {len(rows)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
