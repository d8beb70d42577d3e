"""Gives a server that is started with this folder on ``PYTHONPATH`` a clock that a test moves: the time in a file.

Python imports this module by its name in every process. Only what the schedule takes for now is replaced, when its
module has been loaded; everything else is the product as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

FILE, MODULE = "AUTOSAM_TEST_CLOCK", "trainers.schedule"


def moved_time() -> datetime:
    """The time in the file, in Berlin."""
    return datetime.fromisoformat(Path(os.environ[FILE]).read_text()).replace(tzinfo=ZoneInfo("Europe/Berlin"))


class Loader(importlib.abc.Loader):
    """Loads the schedule and replaces its clock."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        module._local_time = moved_time  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    """Finds that one module, as Python would."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == MODULE else None
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec


if FILE in os.environ:
    sys.meta_path.insert(0, Finder())
