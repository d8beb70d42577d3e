"""docs/clients.md names a test in every cell of its tables, and each of them exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "clients.md"
NAMED = re.compile(r"`(?:([\w/]+\.py)::)?(test_\w+)`")
FILE = re.compile(r"^In `tests/([\w/]+\.py)`")


@cache
def names_in(file: str) -> frozenset[str]:
    """Functions of a test file that pytest runs."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def cells(text: str) -> Iterator[tuple[str, str, str]]:
    """File of the section, feature, and cell, of every row below a header."""
    default, is_body = "", False
    for line in text.splitlines():
        if line.startswith("#"):
            default = ""
        elif found := FILE.match(line):
            default = found[1]
        if not line.startswith("|"):
            is_body = False
        elif set(line) <= set("|- "):
            is_body = True
        elif is_body:
            feature, *row = (cell.strip() for cell in line.strip("|").split("|"))
            yield from ((default, feature, cell) for cell in row)


def unproved(text: str) -> list[str]:
    """What is wrong with a page: cells without a test, and tests that do not exist."""
    wrong = []
    for default, feature, cell in cells(text):
        if cell == "-" or cell.startswith("the same"):
            continue
        named = [(file or default, name) for file, name in NAMED.findall(cell)]
        wrong += [f"{feature}: {cell or 'empty'}"] if not named or len(named) != cell.count("`") // 2 else []
        wrong += [f"{feature}: {file}::{name}" for file, name in named if not file or name not in names_in(file)]
    return wrong


def test_every_cell_of_the_client_tables_names_a_test_that_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert unproved(text) == []
    assert len(list(cells(text))) > 60


@pytest.mark.parametrize(
    ("cell", "is_wrong"),
    [
        ("-", False),
        ("the same", False),
        ("`test_clients.py::test_every_cell_of_the_client_tables_names_a_test_that_exists`", False),
        ("`test_every_cell_of_the_client_tables_names_a_test_that_exists` (slow)", False),
        ("`test_clients.py::test_that_nobody_wrote`", True),
        ("`test_clients.py`", True),
        ("`test_every_cell_...`", True),
        ("", True),
    ],
)
def test_a_cell_without_a_proof_is_found(cell: str, is_wrong: bool) -> None:
    head = "# Client\nIn `tests/test_clients.py`, unless another file is named.\n\n| a | b |\n|---|---|\n"
    assert bool(unproved(f"{head}| x | {cell} |\n")) is is_wrong
