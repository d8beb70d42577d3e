"""docs/clients.md names a test in every cell of its tables; each exists, and names the task of its column."""

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
SAME = re.compile(r"the same(?: as `(\w+)`)?")
NONE = re.compile(r"-(?: \(.+\))?")  # there is no such feature, and why
TASKS = ("sam", "sam_2d", "sam2rad", "sam2rad_edit")


@cache
def top_level(file: str) -> dict[str, ast.stmt]:
    """Functions and constants of a test file."""
    body = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
    found: dict[str, ast.stmt] = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


@cache
def words_in(file: str, name: str) -> frozenset[str]:
    """Words of the texts in a test: its own, its parameters', and those of the constants that it uses."""
    nodes = [*ast.walk(top_level(file)[name])]
    used = {n.id for n in nodes if isinstance(n, ast.Name)}
    nodes += [n for key in used - {name} if key in top_level(file) for n in ast.walk(top_level(file)[key])]
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


def cells(text: str) -> Iterator[tuple[str, str, str, str]]:
    """File of the section, feature, column and cell, of every row below a header."""
    default, header, is_body = "", [""], False
    for line in text.splitlines():
        if line.startswith("#"):
            default = ""
        elif found := FILE.match(line):
            default = found[1]
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            is_body = False
        elif set(line) <= set("|- "):
            is_body = True
        elif is_body:
            columns = [title.strip("`") for title in header[1:]]
            yield from ((default, row[0], column, cell) for column, cell in zip(columns, resolved(columns, row[1:])))
        else:
            header = row


def resolved(columns: list[str], row: list[str]) -> list[str]:
    """The cells of a row with what *the same* stands for."""
    full: list[str] = []
    for cell in row:
        found = SAME.fullmatch(cell)
        place = columns.index(found[1]) if found and found[1] in columns else len(full) - 1
        full.append(full[place] if found and 0 <= place < len(full) else cell)
    return full


def unproved(text: str) -> list[str]:
    """What is wrong with a page: cells without a test, tests that do not exist, and those that run another task."""
    wrong = []
    for default, feature, column, cell in cells(text):
        if NONE.fullmatch(cell):
            continue
        named = [(file or default, name) for file, name in NAMED.findall(cell)]
        wrong += [f"{feature}: {cell or 'empty'}"] if not named or len(named) != cell.count("`") // 2 else []
        for file, name in named:
            if not file or name not in top_level(file):
                wrong.append(f"{feature}: {file}::{name}")
            elif column in TASKS and column not in words_in(file, name):
                wrong.append(f"{feature}: {file}::{name} does not run {column}")
    return wrong


def test_every_cell_of_the_client_tables_names_a_test_that_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert unproved(text) == []
    assert len(list(cells(text))) > 60


@pytest.mark.parametrize(
    ("cell", "is_wrong"),
    [
        ("-", False),
        ("- (a reason)", False),
        ("the same", True),  # as nothing
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


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("`test_autonomous_task` | -", ["sam"]),
        ("- | `test_autonomous_task`", []),
        ("`test_points_on_a_real_mr_series` | the same", ["sam2rad"]),
        ("`test_study_opens_and_the_panel_connects` | the same as `sam`", []),
        ("`test_slicer_core.py::test_click_on_an_own_image_comes_back_at_its_place` | -", []),  # in its table
        ("- | `test_slicer_core.py::test_click_on_an_own_image_comes_back_at_its_place`", ["sam2rad"]),
    ],
)
def test_a_cell_whose_test_runs_another_task_is_found(row: str, wrong: list[str]) -> None:
    head = "# Client\nIn `tests/test_ohif.py`, unless another file is named.\n\n"
    head += "| a | `sam` | `sam2rad` |\n|---|---|---|\n"
    assert [line.rsplit(" ", 1)[1] for line in unproved(f"{head}| x | {row} |\n")] == wrong
