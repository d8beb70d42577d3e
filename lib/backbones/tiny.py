"""``tiny``: :mod:`lib.backbones.compact` with tiny numbers and random weights, for tests and memory probing.

SAM-2-family shape (high-resolution maps, objectness) at a few ten thousand parameters. Its masks mean nothing.
"""

from __future__ import annotations

from lib.backbones.compact import Compact
from lib.backbones.compact import build as build_compact
from lib.config import BackboneRow
from lib.contracts import no_grad_eval


def build(row: BackboneRow) -> Compact:
    """The backbone of one YAML row with random weights, frozen; works under ``torch.device("meta")``."""
    backbone = build_compact(row)
    no_grad_eval(backbone)
    return backbone
