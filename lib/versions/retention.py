"""Which old versions may go. A pure function over what is stored; deleting is the store's.

Left out: age. A version that nobody trained over stays, however old it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib.versions.record import Version


def expired(versions: Sequence[Version], trail: Sequence[str], keep: int) -> list[str]:
    """Names of the versions that may go.

    What stays: the ``keep`` newest; the live one and the ``keep`` that rolling back would return to, however many
    refused ones lie between; and the one with the best mean Dice, the newest of equals.

    Args:
        versions: all that are stored, oldest first.
        trail: names that were live one after the other, the live one last.
        keep: 1 or more.

    Returns:
        names, oldest first.
    """
    stored = [version.name for version in versions]
    back = list(dict.fromkeys(name for name in reversed(trail) if name in stored))
    scored = [version for version in reversed(versions) if version.mean_dice is not None]
    best = max(scored, key=lambda version: version.mean_dice or 0.0, default=None)
    safe = {*stored[-keep:], *back[: keep + 1], *([best.name] if best else [])}
    return [name for name in stored if name not in safe]
