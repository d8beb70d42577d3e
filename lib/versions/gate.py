"""Whether a version may answer: does it fit the backbone, and does it beat the one that is live. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from lib.errors import ConfigError, WeightsError
from lib.versions.record import Version


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


def beats(challenger: Mapping[str, Any], incumbent: Optional[Mapping[str, Any]]) -> tuple[bool, str]:
    """The gate: whether a new version may replace the live one, and why, in a sentence without case names.

    A strictly greater mean Dice wins; a mean that is None or not finite counts as 0 for the incumbent and never wins.

    Args:
        challenger: ``mean_dice``, ``dice`` by label and ``cases`` (names, or a mapping by name) of the new version.
        incumbent: the same of the live version, scored now; None where nothing is live.

    Raises:
        ConfigError: if the two were scored on other cases or labels, or ``mean_dice`` is missing.
    """
    new, count = _mean_dice(challenger), len(challenger.get("cases", ()))
    if incumbent is not None:
        _check_comparable(challenger, incumbent)
    old = _mean_dice(incumbent) if incumbent is not None else None
    if new is None:
        return False, f"The new version has no mean Dice on {count} cases, so it cannot win."
    won = new > (old or 0.0)
    if old is None:
        why = "nothing is live" if incumbent is None else "the live version has no score"
        return (
            won,
            f"Mean Dice {new:.4f} on {count} cases {'wins' if won else 'is too low'}: {why}, so above 0 is enough.",
        )
    verb = "beats" if won else "does not beat"
    return won, f"Mean Dice {new:.4f} {verb} {old:.4f} ({new - old:+.2g}) on the same {count} cases."


def _mean_dice(scores: Mapping[str, Any]) -> Optional[float]:
    if "mean_dice" not in scores:
        raise ConfigError(f"Expected scores with mean_dice, received {sorted(scores)}. Score the version again.")
    mean = scores["mean_dice"]
    return float(mean) if mean is not None and math.isfinite(mean) else None


def _check_comparable(challenger: Mapping[str, Any], incumbent: Mapping[str, Any]) -> None:
    for key in ("cases", "dice"):
        new, old = sorted(challenger.get(key, ())), sorted(incumbent.get(key, ()))
        if new != old:
            what = "cases" if key == "cases" else "labels"
            raise ConfigError(
                f"Expected both versions scored on the same {what}, received {len(new)} and {len(old)} with "
                f"{len(set(new) & set(old))} in common. Score both on the pinned validation {what}."
            )
