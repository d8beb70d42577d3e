"""Whether a version may answer: does it fit the backbone, and does it beat the one that is live. Pure functions.

The gate looks at the mean and at every class: a mean that rises may hide a structure that got lost. Left out: scoring
(:mod:`lib.evaluate`), and any test of significance, for which a handful of validation cases is too few.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import Any, Optional

from lib.errors import ConfigError, WeightsError
from lib.versions.record import Version

ROUNDING = 1e-9  # a drop of just the tolerance is within it


def check_fits(version: Version, backbone_digest: str, labels: Optional[Sequence[str]] = None) -> None:
    """Refuses a version that was trained on another backbone or for other labels.

    Args:
        version: what shall be used.
        backbone_digest: ``weights_id`` of the loaded backbone.
        labels: names in the order that the caller will use, where that matters.

    Raises:
        WeightsError: if either differs.
    """
    if version.backbone_digest != backbone_digest:
        raise WeightsError(
            f"{version.method} {version.name} was trained on {version.backbone} with weights "
            f"{version.backbone_digest[:12]}, but those loaded are {backbone_digest[:12]}. Start the server with that "
            "backbone or train a new version."
        )
    if labels is not None and tuple(labels) != version.labels:
        raise WeightsError(
            f"{version.method} {version.name} knows the labels {', '.join(version.labels)} in this order, received "
            f"{', '.join(labels)}. Use these or train a new version."
        )


def beats(
    challenger: Mapping[str, Any],
    incumbent: Optional[Mapping[str, Any]],
    *,
    tolerance: float,
    absent: Collection[str] = (),
    standing: str = "nothing is live",
) -> tuple[bool, str]:
    """The gate: whether a new version may replace the live one, and why, in sentences without case names.

    A strictly greater mean Dice wins, unless a class lost more than ``tolerance``. A mean that is None or not finite
    counts as 0 for the incumbent and never wins.

    Args:
        challenger: ``mean_dice``, ``dice`` by label and ``cases`` (names, or a mapping by name) of the new version.
        incumbent: the same of the live version, scored now; None where nothing is live that could answer.
        tolerance: Dice that a class may lose while the mean rises.
        absent: labels that no validation case has. A stray voxel is all that could be judged of them, so they count
            neither in the mean nor as a class, unless there are no others.
        standing: why there is no incumbent.

    Raises:
        ConfigError: if the two were scored on other cases or labels, or ``mean_dice`` is missing.
    """
    cases = len(challenger.get("cases", ()))
    count = f"{cases} case{'' if cases == 1 else 's'}"
    if incumbent is not None:
        _check_comparable(challenger, incumbent)
        incumbent = _judged(incumbent, absent)
    challenger = _judged(challenger, absent)
    new, old = _mean_dice(challenger), _mean_dice(incumbent) if incumbent is not None else None
    if new is None:
        return False, f"The new version has no mean Dice on {count}, so it cannot win."
    won = new > (old or 0.0)
    if old is None or incumbent is None:
        why = standing if incumbent is None else "the live version has no score"
        verdict = "wins" if won else "is too low"
        return won, f"Mean Dice {new:.4f} on {count} {verdict}: {why}, so above 0 is enough.{_unjudged(absent)}"
    verb = "beats" if won else "does not beat"
    means = f"Mean Dice {new:.4f} {verb} {old:.4f} ({new - old:+.2g}) on the same {count}"
    worse = [
        f"{label} drops from {was:.4f} to {now:.4f}" for label, was, now in dropped(challenger, incumbent, tolerance)
    ]
    if worse:
        means += f", {'but' if won else 'and'} {', '.join(worse)}, more than the {tolerance:g} that a class may lose"
    return won and not worse, f"{means}.{_case_by_case(challenger, incumbent)}{_unjudged(absent)}"


def _judged(scores: Mapping[str, Any], absent: Collection[str]) -> Mapping[str, Any]:
    """Scores of the labels that some validation case has."""
    dice = {label: value for label, value in (scores.get("dice") or {}).items() if label not in absent}
    if not absent or not dice:
        return scores
    cases = {case: {k: d for k, d in row.items() if k not in absent} for case, row in by_case(scores).items()}
    return {**scores, "mean_dice": sum(map(_number, dice.values())) / len(dice), "dice": dice, "cases": cases}


def _unjudged(absent: Collection[str]) -> str:
    return f" In no validation case, so not judged: {', '.join(absent)}." if absent else ""


def dropped(
    challenger: Mapping[str, Any], incumbent: Mapping[str, Any], tolerance: float
) -> list[tuple[str, float, float]]:
    """Label, Dice before and Dice now of every class that lost more than ``tolerance``, the worst first.

    A Dice that is None or not finite counts as 0 now, and as nothing to lose before.
    """
    pairs = [(label, _number(old), _number(challenger["dice"].get(label))) for label, old in incumbent["dice"].items()]
    found = [(label, old, new) for label, old, new in pairs if old - new > tolerance + ROUNDING]
    return sorted(found, key=lambda found: found[2] - found[1])


def paired(challenger: Mapping[str, Any], incumbent: Mapping[str, Any]) -> dict[str, float]:
    """Mean Dice of the challenger minus the incumbent's by case, over the cases and labels that both were scored on."""
    before, found = by_case(incumbent), {}
    for case, now in by_case(challenger).items():
        change = [dice - before[case][label] for label, dice in now.items() if label in before.get(case, {})]
        if change:
            found[case] = sum(change) / len(change)
    return found


def by_case(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Dice by case and label, without what is not a finite number; nothing where only names were kept."""
    cases = scores.get("cases")
    rows = {case: row for case, row in cases.items() if isinstance(row, Mapping)} if isinstance(cases, Mapping) else {}
    return {case: {label: float(d) for label, d in row.items() if _known(d)} for case, row in rows.items()}


def _case_by_case(challenger: Mapping[str, Any], incumbent: Mapping[str, Any]) -> str:
    """How the cases' own differences lie: there are few, and one may carry the mean."""
    change = list(paired(challenger, incumbent).values())
    if not change:
        return ""
    better, worse = sum(c > 0 for c in change), sum(c < 0 for c in change)
    spread = f"from {min(change):+.4f} to {max(change):+.4f}, median {median(change):+.4f}"
    return f" Case by case {better} better, {worse} worse, {len(change) - better - worse} equal: {spread}."


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: Any) -> float:
    return float(value) if _known(value) else 0.0


def _mean_dice(scores: Mapping[str, Any]) -> Optional[float]:
    if "mean_dice" not in scores:
        raise ConfigError(f"Expected scores with mean_dice, received {sorted(scores)}. Score the version again.")
    return float(scores["mean_dice"]) if _known(scores["mean_dice"]) else None


def _check_comparable(challenger: Mapping[str, Any], incumbent: Mapping[str, Any]) -> None:
    for key in ("cases", "dice"):
        new, old = sorted(challenger.get(key, ())), sorted(incumbent.get(key, ()))
        if new != old:
            what = "cases" if key == "cases" else "labels"
            raise ConfigError(
                f"Expected both versions scored on the same {what}, received {len(new)} and {len(old)} with "
                f"{len(set(new) & set(old))} in common. Score both on the pinned validation {what}."
            )
