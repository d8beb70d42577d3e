"""Whether what a client says about an image or a label can be kept as JSON, and read again by any program.

Python writes numbers that are not finite, half characters and nests without end, which other readers refuse, and with
them the whole list of labels. Values; thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lib.errors import PromptError

DEEPEST = 50  # readers stop at some hundred


def check_told(value: Any) -> None:
    """Looks through what is to be kept.

    Args:
        value: of JSON: texts, numbers, objects and lists.

    Raises:
        PromptError: for what another reader would refuse, and for ``label_info`` that names no values.
    """
    _check(value, DEEPEST)
    declared = value.get("label_info") if isinstance(value, Mapping) else None
    if declared is not None and not (_is_list(declared) and all(isinstance(entry, Mapping) for entry in declared)):
        raise PromptError(
            'label_info: expected a list such as [{"name": "liver", "idx": 1}], received '
            f"{type(declared).__name__}. Send one entry per structure, or leave it out."
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check(value: Any, left: int) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise PromptError(f"Expected finite numbers in what is kept; received {value}. Leave it out.")
    if isinstance(value, str) and not _is_text(value):
        raise PromptError("Expected whole characters in what is kept; received half of one. Type the name again.")
    if isinstance(value, Mapping) or _is_list(value):
        if not left:
            raise PromptError(f"Expected at most {DEEPEST} levels in what is kept; received more. Leave some out.")
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for part in parts:
            _check(part, left - 1)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
