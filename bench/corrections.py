"""What keeping corrections near the user's points does to clicks, against the decoder's whole answer.

    python -m bench.corrections [--sets hippocampus acdc] [--cases 8] [--minutes 4] [--data-dir DIR] [--out FILE]

One training per set on 16 ``adapt`` cases with ``compact``; then the annotator of the labelling session clicks
(:mod:`bench.session_annotator`) on ``test`` cases, without a server, twice: with :mod:`lib.correction` and
:mod:`lib.claims`, and with the decoder's answer left alone. With ``--minutes 0`` nothing is trained and plain SAM
answers: with :mod:`lib.plain`, and with the first label of the list keeping what several want. A click loses where the
mean Dice is lower after it, and is obeyed where its voxel then shows what the annotator said. Intervals are
bootstrapped over test patients.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench import common
from bench.common import Report
from bench.learned_prompts import SETS, Data, few, interval, learn, read
from bench.session_annotator import MOST, Click, annotate
from lib import assisted, plain
from lib.assisted import AssistedEngine
from lib.claims import Said
from lib.config import method_row
from lib.data.samples import TrainingCase
from lib.engine import Engine
from lib.settings import AppSettings
from lib.types import Click as Point
from lib.types import Prediction, UserPrompts
from lib.versions.record import Trained
from lib.versions.store import open_store

TRAINED, SHOWN = 16, (0, 1, 3, 5, 10, MOST)


def version(data: Data, minutes: float, scratch: Path) -> AssistedEngine:
    """An engine with a version that was trained for this bench, or without one."""
    own = {"backbone": "compact", "cache_dir": str(scratch / "cache"), "state_dir": str(scratch), "prefetch": "false"}
    engine, row = Engine(AppSettings.from_conf(own)), method_row("sam2rad")
    store = open_store(scratch, row.name)
    if not minutes:
        return AssistedEngine(engine, row, store, data.labels)
    model = learn(data, few(data.adapt, TRAINED), "full", 60 * minutes, 1, scratch / "run")
    facts = Trained(
        backbone="compact", backbone_digest=engine.warm().weights_id, labels=data.labels,
        recipe={"preset": "full", "options": row.options}, split={}, metrics={"mean_dice": 0.0},
    )  # fmt: skip
    store.promote(store.add(model.trained(), facts).name, "bench")
    return AssistedEngine(engine, row, store, data.labels)


def by_label(clicks: Sequence[Click], labels: Sequence[str]) -> dict[str, UserPrompts]:
    """As the app reads Slicer's points: of what is there, and of the background for every label."""
    found: dict[str, list[Point]] = {name: [] for name in labels}
    for click in clicks:
        there = click.true_structure
        for name in labels if there is None else [labels[there]]:
            found[name].append(Point(click.ijk, there is not None))
    return {name: UserPrompts(tuple(points)) for name, points in found.items() if points}


def in_the_order_of_the_list(found: Mapping[int, Prediction], *_: Any, **__: Any) -> np.ndarray:
    """Plain SAM's answers, the label before in the list keeping what several want."""
    last_first = sorted(found.items(), reverse=True)
    mask = np.zeros(last_first[0][1].mask.shape, np.uint8)
    for number, answer in last_first:
        mask[answer.mask > 0] = number
    return mask


@contextmanager
def left_alone() -> Iterator[None]:
    """The decoder's answers as they are."""
    with (
        mock.patch.object(assisted, "near_points", lambda after, before, points: after),
        mock.patch.object(Said, "settled", lambda self, found, mask, *, walks: found),
        mock.patch.object(Said, "reach", lambda self, count: range(count)),
        mock.patch.object(plain, "label_map", in_the_order_of_the_list),
    ):
        yield


def session(engine: AssistedEngine, data: Data, case: TrainingCase) -> dict[str, Any]:
    """One case: mean Dice after 0, 1, ... clicks, and the share of clicks that were obeyed."""
    obeyed: list[bool] = []

    def ask(clicks: Sequence[Click]) -> np.ndarray:
        prompts = by_label(clicks, data.labels)
        if engine.live() is None and not any(p.starts for p in prompts.values()):  # plain SAM would refuse
            return np.zeros((len(data.labels), *case.target.shape), bool)
        mask = engine.segment(case.volume, prompts).mask
        if clicks:
            there = clicks[-1].true_structure
            obeyed.append(int(mask[clicks[-1].ijk]) == (0 if there is None else there + 1))
        return np.stack([mask == n for n in range(1, len(data.labels) + 1)])

    course = annotate(case.target, len(data.labels), case.volume.spacing_mm, ask).course
    return {"course": course + course[-1:] * (MOST + 1 - len(course)), "obeyed": obeyed, "gains": np.diff(course)}


def compare(data: Data, cases: Sequence[TrainingCase], engine: AssistedEngine, report: Report) -> None:
    """Both kinds on the same cases."""
    rows, courses = [], []
    for name, kind in (("shown", nullcontext()), ("as decoded", left_alone())):
        with kind:
            done = [session(engine, data, case) for case in cases]
        course = np.array([d["course"] for d in done])
        gains, obeyed = (np.concatenate([d[key] for d in done]) for key in ("gains", "obeyed"))
        shares = [f"{(gains < 0).mean():.2f}", f"{obeyed.mean():.2f}"]
        rows.append([name, *(f"{v:.3f}" for v in course.mean(0)[list(SHOWN)]), f"{gains.mean():+.4f}", *shares])
        courses.append(course)
    header = ("correction", *(f"{n} clicks" for n in SHOWN), "gain per click", "lose", "obeyed")
    report.table(f"{data.name}: mean Dice of {len(cases)} test cases, one per patient", header, rows)
    better = courses[0] - courses[1]
    ends = [f"after {n} clicks {interval(better[:, n])}" for n in (5, 10, MOST)]
    report.add("", "Shown less as decoded: " + "; ".join(ends) + ".")


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=list(SETS))
    parser.add_argument("--cases", type=int, default=8, help="test patients of each set")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training; 0: none, plain SAM")
    options = parser.parse_args()
    report = Report("Corrections as shown and as decoded", options.out)
    for name in options.sets:
        data = read(options.data_dir / name, name, None)
        with tempfile.TemporaryDirectory() as scratch:
            engine = version(data, options.minutes, Path(scratch))
            compare(data, few(data.test, options.cases), engine, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
