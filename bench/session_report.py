"""Tables of the labelling session: clicks as labels accumulate, totals, paired comparisons, limits, cases not reached.

Works on what :class:`bench.labelling_session.Progress` keeps, finished sessions only. A number is a mean over the
orders that are finished; simulated time is 4 s a click and 10 s a case, without trainings, for which nobody waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.common import Report, Verdict
from bench.learned_prompts import interval
from bench.session_arms import ARMS

CLICK_S, CASE_S = 4.0, 10.0
BLOCK, ENDS = 8, 10  # cases of a row; of the first and the last ones
PAIRS = (("mix", "sam"), ("mix", "deepedit"), ("mix", "random"), ("random", "sam"), ("random", "deepedit"))
Sessions = Mapping[str, Mapping[str, Any]]


def tell(data: str, sessions: Sessions, arms: Sequence[str], report: Report) -> None:
    """All tables of one data set."""
    found = {arm: clicks(sessions, arm) for arm in arms}
    found = {arm: table for arm, table in found.items() if len(table)}
    if not found:
        return
    report.table(f"{data}: clicks per case by labels before it", *accumulating(found))
    report.table(f"{data}: whole session", *totals(found, sessions))
    report.table(f"{data}: trainings", *trainings(found, sessions))
    if rows := compared(found, sessions):
        report.table(f"{data}: clicks per case, paired", ("pair", "difference, 95 % interval over cases"), rows)
    report.add("", "Cases that never reached the target, and how often each:", "", *missed(found, sessions))
    report.verdicts(verdicts(found))


def finished(sessions: Sessions, arm: str) -> list[Mapping[str, Any]]:
    """The arm's sessions."""
    return [s for key, s in sessions.items() if key.split("/")[0] == arm and s["done"]]


def clicks(sessions: Sessions, arm: str) -> np.ndarray:
    """``(orders, cases)`` clicks in the order of labelling."""
    return np.array([[c["clicks"] for c in s["cases"]] for s in finished(sessions, arm)], float)


def ends(table: np.ndarray) -> tuple[float, float]:
    """Mean clicks of the first and the last ten cases; of halves where there are fewer than twenty."""
    count = min(ENDS, max(1, table.shape[1] // 2))
    return float(table[:, :count].mean()), float(table[:, -count:].mean())


def accumulating(found: Mapping[str, np.ndarray]) -> tuple[list[str], list[list[str]]]:
    """Mean clicks of blocks of cases."""
    most = max(table.shape[1] for table in found.values())
    starts = range(0, most, BLOCK)
    header = ["arm", *(f"{s} to {min(s + BLOCK, most) - 1}" for s in starts)]
    return header, [[arm, *(f"{t[:, s : s + BLOCK].mean():.1f}" for s in starts)] for arm, t in found.items()]


def totals(found: Mapping[str, np.ndarray], sessions: Sessions) -> tuple[list[str], list[list[Any]]]:
    """One row per arm."""
    header = [
        "arm", "what", "orders", "clicks", "minutes", "first ten", "last ten", "last/first", "reached", "proposed Dice",
    ]  # fmt: skip
    rows = []
    for arm, table in found.items():
        first, last = ends(table)
        total = float(table.sum(1).mean())
        cases = [c for s in finished(sessions, arm) for c in s["cases"]]
        proposed = [np.mean(c["proposed"]) for c in cases if c["version"]]
        rows.append(
            [
                arm, ARMS[arm].text, len(table), f"{total:.0f}",
                f"{(CLICK_S * total + CASE_S * table.shape[1]) / 60:.1f}", f"{first:.1f}", f"{last:.1f}",
                f"{last / first:.2f}" if first else "-", f"{sum(c['reached'] for c in cases)}/{len(cases)}",
                f"{np.mean(proposed):.3f}" if proposed else "-",
            ]
        )  # fmt: skip
    return header, rows


def trainings(found: Mapping[str, np.ndarray], sessions: Sessions) -> tuple[list[str], list[list[Any]]]:
    """What every training took, start of its process included, and the version that proposes afterwards."""
    rows: list[list[Any]] = []
    for key, session in sessions.items():
        if key.split("/")[0] in found and session["done"]:
            for t in session["trainings"]:
                best = t.get("best_metric")
                dice = f"{best:.3f}" if isinstance(best, (int, float)) else "-"
                rows.append([key, t["labels"], t["by"], t["status"], t["minutes"], t.get("epoch", "-"), dice])
    return ["session", "labels", "started by", "status", "minutes", "epochs", "validation Dice"], rows


def by_case(sessions: Sessions, arm: str) -> dict[str, float]:
    """Mean clicks of every case over the orders."""
    found: dict[str, list[int]] = {}
    for session in finished(sessions, arm):
        for case in session["cases"]:
            found.setdefault(case["case"], []).append(case["clicks"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def compared(found: Mapping[str, np.ndarray], sessions: Sessions) -> list[list[str]]:
    """Differences over the same cases."""
    rows = []
    for a, b in PAIRS:
        if a in found and b in found:
            ours, theirs = by_case(sessions, a), by_case(sessions, b)
            shared = sorted(ours.keys() & theirs.keys())
            rows.append([f"{a} - {b}", interval(np.array([ours[c] - theirs[c] for c in shared]))])
    return rows


def missed(found: Mapping[str, np.ndarray], sessions: Sessions) -> list[str]:
    """One line per arm."""
    lines = []
    for arm in found:
        names = [c["case"] for s in finished(sessions, arm) for c in s["cases"] if not c["reached"]]
        counted = [f"{name} ({names.count(name)})" for name in sorted(set(names))]
        lines.append(f"- {arm}: {len(names)}; {', '.join(counted) or 'none'}")
    return lines


def verdicts(found: Mapping[str, np.ndarray]) -> list[Verdict]:
    """What the session must show; NaN, which is a miss, where an arm is not there."""
    total = {arm: float(table.sum(1).mean()) for arm, table in found.items()}
    first, last = ends(found["mix"]) if "mix" in found else (np.nan, np.nan)
    mix, none = total.get("mix", np.nan), float("nan")
    return [
        Verdict("clicks of the last ten cases / of the first ten (mix)", last / first if first else none, 0.4),
        Verdict("clicks of mix / of sam", mix / (total.get("sam") or none), 0.5),
        Verdict("clicks that mix saves over DeepEdit", total.get("deepedit", none) - mix, 1, least=True),
    ]
