"""Which tensors a training begins with: the live version's where they fit, so that every training adds to the last one.

A server that trains for minutes after every few labels would else begin at the same place each time. Pure functions.
Left out: tensors of fewer labels or another form, which would have to be mapped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

from lib.errors import ConfigError
from lib.versions.record import TRAIN, Version

LIVE, NEW = "live", "new"
STARTS = (LIVE, NEW)


def why_anew(
    wanted: str,
    live: Optional[Version],
    *,
    backbone_digest: str,
    labels: Sequence[str],
    recipe: Mapping[str, Any],
    validation: Collection[str],
) -> Optional[str]:
    """Why a training does not begin with the live version's tensors; None where it does.

    Args:
        wanted: ``live`` or ``new``, as in the recipe.
        live: the live version, if there is one.
        backbone_digest: ``weights_id`` of the loaded backbone.
        labels: of the new version, in its order.
        recipe: of the new version with the method's ``options``; only what shapes tensors is compared.
        validation: names of cases that will choose the best epoch.

    Raises:
        ConfigError: for another ``wanted``.
    """
    if wanted not in STARTS:
        raise ConfigError(f"start: expected one of {list(STARTS)}, received {wanted!r}.")
    if wanted == NEW:
        return "the recipe says so"
    if live is None:
        return "no version is live"
    if live.backbone_digest != backbone_digest:
        return f"{live.name} belongs to another backbone"
    if live.labels != tuple(labels):
        return f"{live.name} knows the labels {', '.join(live.labels)}"
    if any(live.recipe.get(key) != recipe.get(key) for key in ("preset", "options")):
        return f"{live.name} was trained with other options or another preset"
    seen = sum(live.split.get(case) == TRAIN for case in validation)
    if seen:  # its Dice there would promise too much
        return f"{live.name} learned from {seen} of the cases that validate now"
    return None
