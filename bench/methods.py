"""All learned methods under one budget, a DynUNet beside them, and the Self-Prompt-SAM ladder.

    python -m bench.methods --work FOLDER [--sets acdc hippocampus] [--minutes 5] [--methods NAME ...] [--out FILE]
    python -m bench.methods --work FOLDER --ladder    (with --seeds 1 2 3: rungs S2, S3 and S6 alone, each seed)

Every training is a process of its own and leaves one JSON in ``--work``; a finished one is not run again, so the bench
may be cut off at any time. Cases, splits and budget are those of ``bench.learned_prompts``: every fifth patient of the
``adapt`` ones chooses the best epoch, test patients are seen once, at the end. Intervals are bootstrapped over test
patients, not over volumes, of which ACDC has two per patient. Peak memory is the whole process's, imports included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import common, learned_prompts, unet
from bench.common import ROOT, Report
from bench.ladder import ENTRIES, LADDER, LADDER_PAIRS, METHOD_PAIRS, METHODS, REPEATED, Entry
from bench.learned_prompts import Data, interval
from lib.data.samples import patient_of
from lib.evaluate import case_dice, encoded, segmented
from lib.train_loop import write_json

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.monotonic, "cpu": time.process_time}
GOAL = 0.65
Result = dict[str, Any]

# ------------------------------------------------------------------------------------------------------ one training


def measure(entry: Entry, data: Data, budget_s: float, seed: int, clock: Callable[[], float]) -> Result:
    """Trains one row and scores it on the test cases."""
    segment, found = _trained(entry, data, budget_s, seed, clock)
    found["train_mb"] = common.memory_mb(os.getpid())[1]
    started, dice = clock(), {}
    for case in data.test:
        dice[case.case] = case_dice(segment(case), case.target, len(data.labels))
    spent = (clock() - started) / len(data.test)
    peak = common.memory_mb(os.getpid())[1]
    found |= {"volume_s": spent, "peak_mb": peak, "labels": data.labels, "machine": common.machine()}
    return {**found, "dice": dice}


def _trained(
    entry: Entry, data: Data, budget_s: float, seed: int, clock: Callable[[], float]
) -> tuple[Callable[..., np.ndarray], Result]:
    if entry.method is None:
        started = clock()
        net = unet.train(data.adapt, len(data.labels), budget_s, seed, clock)
        facts: Result = {"train_s": clock() - started}
        return lambda case: unet.segment(net, case), {**facts, "parameters": _count(net)}
    row = entry.row()
    row = replace(row, recipe=replace(row.recipe, seed=seed))
    with tempfile.TemporaryDirectory(prefix="autosam-bench-") as scratch:
        model, facts = learned_prompts.trained(row, data, data.adapt, budget_s, Path(scratch), clock)
    features = encoded(model)
    return lambda case: segmented(model, case, features), {**facts, "parameters": _count(model)}


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------------------- all of them


def results(options: Any, chosen: Sequence[Entry], name: str) -> Iterator[tuple[str, int, Result]]:
    """Rows with seed and result, those on file first; the others are trained now."""
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for entry in chosen:
            path = options.work / f"{name}-{entry.slug}-{_conditions(options, entry)}-{seed}.json"
            if not path.exists() and not _child(options, entry, name, seed, path):
                continue
            result = json.loads(path.read_text(encoding="utf-8"))
            means = np.array(list(result["dice"].values())).mean(0).round(3).tolist()
            print(f"{name}, seed {seed}, {entry.name}: {means} in {result['train_s']:.0f} s", flush=True)
            yield entry.name, seed, result


def _conditions(options: Any, entry: Entry) -> str:
    """What a result on file must have been measured under."""
    row = asdict(entry.row()) if entry.method else None
    if row:
        row["recipe"].pop("start")  # nothing is live here
    facts = [options.minutes, options.clock, options.cases, row]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _child(options: Any, entry: Entry, name: str, seed: int, path: Path) -> bool:
    """Whether one training came to its end; a failed one is named and left out, to be tried again next time."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.methods", "--work", str(options.work), "--job", str(path)]
    command += ["--methods", entry.name, "--sets", name, "--seeds", str(seed), "--minutes", str(options.minutes)]
    command += ["--data-dir", str(options.data_dir), "--clock", options.clock]
    command += ["--cases", str(options.cases)] if options.cases else []
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        print(f"{name}, seed {seed}, {entry.name}: ended with {done.returncode}", flush=True)
    return done.returncode == 0


def job(options: Any) -> int:
    """What a child does."""
    entry, name, seed = ENTRIES[options.methods[0]], options.sets[0], options.seeds[0]
    data = learned_prompts.read(options.data_dir / name, name, options.cases)
    write_json(options.job, measure(entry, data, options.minutes * 60, seed, CLOCKS[options.clock]))
    return 0


# -------------------------------------------------------------------------------------------------------------- tables


def by_patient(result: Mapping[str, Any]) -> np.ndarray:
    """``(patients, K)`` Dice: the mean of each patient's volumes, which are no independent cases."""
    patients: dict[str, list[list[float]]] = {}
    for case, row in sorted(result["dice"].items()):
        patients.setdefault(patient_of(case), []).append(row)
    return np.array([np.mean(rows, 0) for rows in patients.values()])


def mean_of_seeds(found: Mapping[tuple[str, int], Result], name: str) -> np.ndarray:
    """``(patients, K)`` of a row, averaged over its seeds."""
    return np.mean([by_patient(r) for (row, _), r in found.items() if row == name], 0)


def score_table(report: Report, title: str, found: Mapping[tuple[str, int], Result]) -> None:
    """Dice with intervals, and what it cost."""
    labels = next(iter(found.values()))["labels"]
    header = ["method", "seed", *labels, "mean", "parameters", "steps", "train s", "s/volume", "peak MB", "val. Dice"]
    rows = []
    for (name, seed), r in found.items():
        table = by_patient(r)
        rows.append(
            [name, seed, *(f"{v:.3f}" for v in table.mean(0)), interval(table.mean(1), sign=""), f"{r['parameters']:,}",
             r.get("steps", "-"), f"{r['train_s']:.0f}", f"{r['volume_s']:.2f}", f"{r['peak_mb']:.0f}",
             f"{r['validation']:.3f}" if "validation" in r else "-"]
        )  # fmt: skip
    report.table(title, header, rows)


def difference_table(report: Report, found: Mapping[tuple[str, int], Result], pairs: Sequence[tuple[str, str]]) -> None:
    """Paired over test patients, seeds averaged, for the pairs of which both are there."""
    names, labels = {name for name, _ in found}, next(iter(found.values()))["labels"]
    rows = []
    for a, b in pairs:
        if {a, b} <= names:
            apart = mean_of_seeds(found, a) - mean_of_seeds(found, b)
            rows.append([f"{a} - {b}", *(interval(d) for d in apart.T), interval(apart.mean(1))])
    if rows:
        report.table("Paired differences of Dice", ["pair", *labels, "mean"], rows)


def goal(report: Report, found: Mapping[tuple[str, int], Result]) -> None:
    """How many methods reach the mean that the project wants, each with its own recipe."""
    methods = [e.name for e in METHODS if e.name == e.method and any(row == e.name for row, _ in found)]
    reached = [name for name in methods if mean_of_seeds(found, name).mean() >= GOAL]
    if methods:
        names = ", ".join(reached) or "none"
        report.add("", f"Mean Dice of at least {GOAL}: {names}; {len(reached)} of {len(methods)}.")


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="folder of finished rows; it is made")
    parser.add_argument("--sets", nargs="+", choices=sorted(learned_prompts.SETS), default=["acdc", "hippocampus"])
    parser.add_argument("--methods", nargs="+", choices=list(ENTRIES), help="only these")
    parser.add_argument("--minutes", type=float, default=5.0, help="budget of each training")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="of the budget; cpu where others compute"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--ladder", action="store_true", help="Self-Prompt-SAM part by part, on ACDC, in place of all")
    parser.add_argument("--cases", type=int, default=None, help="at most so many cases per part, to try the bench out")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.absolute()
    options.data_dir = options.data_dir.absolute()
    if options.job:
        return job(options)
    report = Report("Self-Prompt-SAM, part by part" if options.ladder else "Methods", options.out)
    report.add("", f"Budget of each training: {options.minutes:g} minutes ({options.clock} clock) with `compact`.")
    sets = ["acdc"] if options.ladder else options.sets
    for name in sets:
        found = {(row, seed): result for row, seed, result in results(options, _chosen(options), name)}
        if found:
            score_table(report, name, found)
            difference_table(report, found, LADDER_PAIRS if options.ladder else METHOD_PAIRS)
            goal(report, found)
    return 0


def _chosen(options: Any) -> Sequence[Entry]:
    if options.methods:
        return [ENTRIES[name] for name in options.methods]
    if not options.ladder:
        return METHODS
    return LADDER if len(options.seeds) == 1 else [ENTRIES[name] for name in REPEATED]


if __name__ == "__main__":
    sys.exit(main())
