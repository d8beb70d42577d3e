"""What ``bench.methods`` trains, as data: methods and what they are compared with, and Self-Prompt-SAM's ladder.

The ladder's rungs S1 to S9 are in the published order (METHODS 4.5): each adds one part to the rung before, except that
S4 to S6 differ in where the adapters' depth layer stands. S1 and S2 have no adapters, so all of SAM is frozen; their
features are not kept, since windows around every slice would take the budget and 4 GB, but their steps are cheaper.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Optional

from lib.config import MethodRow, method_row
from lib.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One trained row.

    Args:
        name: as it is shown.
        method: name of a file in ``configs/methods``; None is the DynUNet.
        options: of the method, that differ from the file's.
        recipe: its settings that differ from the file's.
    """

    name: str
    method: Optional[str]
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name in a file's name."""
        return re.sub(r"\W+", "_", self.name)

    def row(self) -> MethodRow:
        """What is trained.

        Raises:
            ConfigError: for the DynUNet.
        """
        if self.method is None:
            raise ConfigError(f"{self.name} is no learned method, and has no row. Train it with bench.unet.")
        row = recipe_row(self.method)
        return replace(row, options={**row.options, **self.options}, recipe=replace(row.recipe, **self.recipe))


def recipe_row(method: str, *, auto: str = "full") -> MethodRow:
    """A method as it is trained: ``auto`` is what the train task makes of that preset, ``full`` with ``compact``."""
    row = method_row(method)
    preset = auto if row.recipe.preset == "auto" else row.recipe.preset
    return replace(row, recipe=replace(row.recipe, preset=preset))


METHODS = (
    Entry("sam2rad", "sam2rad"),
    Entry("autosam", "autosam"),
    Entry("promise", "promise"),  # 16P
    Entry("sam_med2d", "sam_med2d"),
    Entry("self_prompt", "self_prompt"),
    Entry("DynUNet", None),
    Entry("autosam light", "autosam", {"head": "light"}),  # h(g(I))
    Entry("promise 5P", "promise", {"positive": 2, "negative": 3}),
    Entry("promise 3P", "promise", {"positive": 1, "negative": 2}),
    Entry("autosam frozen", "autosam", recipe={"preset": "frozen"}),  # the papers freeze all of SAM
    Entry("autosam light frozen", "autosam", {"head": "light"}, {"preset": "frozen"}),
    Entry("promise frozen", "promise", recipe={"preset": "frozen"}),
)
METHOD_PAIRS = (
    *((e.name, "DynUNet") for e in METHODS[:5]),
    ("autosam", "autosam light"), ("autosam", "autosam frozen"), ("promise", "promise frozen"),
    ("promise", "promise 5P"), ("promise 5P", "promise 3P"), ("autosam frozen", "autosam light frozen"),
)  # fmt: skip


def _rung(name: str, mix: str, *parts: str) -> Entry:
    return Entry(name, "self_prompt", {"mix": mix, "parts": list(parts)}, {"preset": "adapters", "memory_mb": 0})


LADDER = (
    _rung("S1 stacked CNN", "none"),
    _rung("S2 multi-scale generator", "none", "taps"),
    _rung("S3 plain adapters", "none", "taps", "adapters"),
    _rung("S4 depth before", "before", "taps", "adapters"),
    _rung("S5 depth after", "after", "taps", "adapters"),
    _rung("S6 depth fused", "inside", "taps", "adapters"),
    _rung("S7 depth position", "inside", "taps", "adapters", "place"),
    _rung("S8 modality adapter", "inside", "taps", "adapters", "place", "modality"),
    _rung("S9 multi-class adapter", "inside", "taps", "adapters", "place", "modality", "weigh"),
)
REPEATED = (LADDER[1].name, LADDER[2].name, LADDER[5].name)  # none, plain and depth-fused, for several seeds
LADDER_PAIRS = (
    *((b.name, a.name) for a, b in pairwise(LADDER)),
    (LADDER[5].name, LADDER[2].name), (LADDER[5].name, LADDER[1].name),
)  # fmt: skip
ENTRIES = {e.name: e for e in (*METHODS, *LADDER)}
