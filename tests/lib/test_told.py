"""What can be kept as JSON and read again."""

from __future__ import annotations

from typing import Any

import pytest

from lib.errors import PromptError
from lib.told import DEEPEST, check_told


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": float("nan")}, "finite"),
        ({"a": [1, {"b": float("inf")}]}, "finite"),
        ({"name": "li\ud83d"}, "whole characters"),
        ({"li\ud83d": 1}, "whole characters"),
        ({"a": nested(DEEPEST)}, "levels"),
        ({"a": nested(10_000)}, "levels"),
        ({"label_info": 5}, "label_info: expected a list"),
        ({"label_info": "liver"}, "label_info: expected a list"),
        ({"label_info": [{"name": "liver", "idx": 1}, "spleen"]}, "label_info: expected a list"),
        ({"label_info": {"name": "liver"}}, "label_info: expected a list"),
    ],
)
def test_told_that_cannot_be_kept_is_refused(value: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        check_told(value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, 2.5, None, True, "Lëber 😀"], "b": {"c": (1, 2)}},
        {"a": nested(DEEPEST - 1)},
        {"label_info": None},
        {"label_info": []},
        {"label_info": [{"name": "liver", "idx": 1}]},
    ],
)
def test_told_that_can_be_kept_passes(value: Any) -> None:
    check_told(value)
