"""Label names to coded concepts: SNOMED CT from ``configs/codes.yaml``, or an honest mark that a name is not coded.

No voxels and no DICOM package here. Thread-safe: a table is immutable. Left out: guessing. A name is looked up as
written, apart from case, separators, a side of a paired organ and the number of a numbered structure; nothing similar
is taken for it, because a wrong organ in an archive is worse than none. Nor is an abbreviation that means another organ
elsewhere in the body, such as LV.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from lib.config import CONFIG_DIR, from_mapping, read_yaml
from lib.errors import ConfigError

SNOMED = "SCT"
PRIVATE = "99AUTOSAM"  # DICOM reserves designators that start with 99 for private schemes
CODES = CONFIG_DIR / "codes.yaml"
SIDES = {
    **dict.fromkeys(("left", "l", "lt"), "left"),
    **dict.fromkeys(("right", "r", "rt"), "right"),
    **dict.fromkeys(("both", "bilateral"), "both"),
}
_NUMBER = re.compile(r"[ctls]?\d{1,2}")  # vertebral levels too
_SEPARATORS = re.compile(r"[\s_\-.,/()]+")


@dataclass(frozen=True)
class Code:
    """One coded concept.

    Args:
        value: at most 16 characters.
        meaning: at most 64 characters.
        scheme: designator of the coding scheme.
    """

    value: str
    meaning: str
    scheme: str = SNOMED


NOT_CODED = Code("NOTCODED", "Not coded", PRIVATE)


@dataclass(frozen=True)
class LabelCode:
    """How a label is coded.

    Args:
        category: what kind of thing it is.
        type: what it is.
        modifiers: side and part of the region, where there is one, else of the type.
        region: where a finding sits.
    """

    category: Code
    type: Code
    modifiers: tuple[Code, ...] = ()
    region: Optional[Code] = None


@dataclass(frozen=True)
class CodeRow:
    """One entry of ``structures`` in ``codes.yaml``; its head explains the keys."""

    code: tuple[str, str]
    names: tuple[str, ...]
    category: str = "anatomy"
    region: Optional[tuple[str, str]] = None
    modifier: Optional[tuple[str, str]] = None
    paired: bool = False
    numbered: bool = False


@dataclass(frozen=True)
class CodeTable:
    """All rows.

    Args:
        categories: code by key.
        sides: codes of left, right and both.
        rows: by every normalised name.

    Raises:
        ConfigError: for an unknown category, or a name that stands twice.
    """

    categories: dict[str, Code]
    sides: dict[str, Code]
    rows: dict[str, CodeRow] = field(repr=False)

    @classmethod
    def read(cls, path: Path = CODES) -> CodeTable:
        """The table in a YAML file.

        Raises:
            ConfigError: if the file is missing or malformed.
        """
        values = read_yaml(path)
        if set(values) != {"categories", "sides", "structures"} or set(values["sides"]) != set(SIDES.values()):
            raise ConfigError(f"{path.name}: expected categories, structures and the sides left, right and both.")
        categories = {key: Code(*code) for key, code in values["categories"].items()}
        sides = {key: Code(*code) for key, code in values["sides"].items()}
        return cls(categories, sides, _rows(values["structures"], categories, path.name))

    def code(self, name: str) -> LabelCode:
        """The concept that a label's name stands for; a private code with the name as its meaning where none does."""
        words = normal(name).split()
        row, side = self._row(words)
        if row is None:
            return LabelCode(NOT_CODED, _private(name))
        modifiers = [self.sides[side]] if side else []
        if row.modifier:
            modifiers.append(Code(*row.modifier))
        region = Code(*row.region) if row.region else None
        return LabelCode(self.categories[row.category], Code(*row.code), tuple(modifiers), region)

    def _row(self, words: list[str]) -> tuple[Optional[CodeRow], Optional[str]]:
        """The row of a name, and the side in it."""
        if " ".join(words) in self.rows:  # "left ventricle" is a name, not a side
            return self.rows[" ".join(words)], None
        sides = [SIDES[word] for word in words if word in SIDES]
        plain = [word for word in words if word not in SIDES]
        named = " ".join(plain)
        bare = " ".join(word for word in plain if not _NUMBER.fullmatch(word))
        row = self.rows.get(named) or self.rows.get(bare)
        wrong = (
            row is None or len(sides) > 1 or (sides and not row.paired) or (named not in self.rows and not row.numbered)
        )
        return (None, None) if wrong else (row, sides[0] if sides else None)


def normal(name: str) -> str:
    """A name as the table spells names: lower case, words separated by one space."""
    return _SEPARATORS.sub(" ", name.casefold()).strip()


def _private(name: str) -> Code:
    """Equal names, equal codes, so that a reader can tell structures apart."""
    digest = hashlib.blake2b(normal(name).encode("utf-8"), digest_size=7).hexdigest().upper()
    return Code(f"U{digest}", name[:64], PRIVATE)


def _rows(structures: list[dict[str, Any]], categories: dict[str, Code], where: str) -> dict[str, CodeRow]:
    rows: dict[str, CodeRow] = {}
    for values in structures:
        row = from_mapping(CodeRow, values, where)
        if row.category not in categories:
            raise ConfigError(f"{where}: expected a category out of {sorted(categories)}, received {row.category!r}.")
        for name in row.names:
            if name != normal(name) or name in rows:
                raise ConfigError(f"{where}: expected every name once and in lower case, received {name!r}.")
            rows[name] = row
    return rows
