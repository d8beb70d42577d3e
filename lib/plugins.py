"""Finds a backbone or method by module name: no table, no registration, so reloading the app is safe."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from lib.errors import ConfigError


def names(kind: str) -> list[str]:
    """Module names in ``lib/<kind>``, sorted; ``kind`` is ``backbones`` or ``methods``."""
    package = importlib.import_module(f"lib.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """Imports ``lib.<kind>.<name>``.

    Raises:
        ConfigError: if there is no such module; the message lists those that exist.
    """
    known = names(kind)
    if name not in known:
        raise ConfigError(f"Expected one of the {kind} {known}, received {name!r}.{did_you_mean(name, known)}")
    return importlib.import_module(f"lib.{kind}.{name}")


def did_you_mean(word: str, known: list[str]) -> str:
    """A sentence that names the nearest spelling, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
