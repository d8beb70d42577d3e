"""Rows that keep the architecture of an official one at a size that runs in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lib.config import BackboneRow, backbone_row

SMALL: dict[str, dict[str, Any]] = {
    "sam": {"embed_dim": 32, "depth": 4, "num_heads": 2, "global_blocks": [1, 3], "image_size": 64},
    "mobile_sam": {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    "sam2": {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 2, 1], "global_blocks": [3], "pos_grid": 4},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_row() -> Callable[..., BackboneRow]:
    """Function from a row's name, and spec overrides, to the same row with S = 64, E = 32 and narrow stages."""

    def shrink(name: str, **spec: Any) -> BackboneRow:
        row = backbone_row("tiny" if name == "compact" else name)
        if row.module not in SMALL:
            return replace(row, spec={**row.spec, **spec})
        numbers = {"input_size": 64, "prompt_width": 32, **spec}
        return replace(row, spec={**row.spec, **numbers}, size={**row.size, **SMALL[row.module]})

    return shrink
