"""Small backbones of every family, and learned models on them that run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lib import plugins
from lib.config import BackboneRow, MethodRow, TrainRecipe, backbone_row
from lib.contracts import Backbone, no_grad_eval
from lib.learned import Learned

SMALL: dict[str, dict[str, Any]] = {
    "sam": {"embed_dim": 32, "depth": 4, "num_heads": 2, "global_blocks": [1, 3], "image_size": 64},
    "mobile_sam": {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    "sam2": {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 2, 1], "global_blocks": [3], "pos_grid": 4},
}
SIDE = 64
CLASSES = 3


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _small(name: str) -> BackboneRow:
    row = backbone_row(name)
    if row.module in ("tiny", "compact"):  # their own numbers
        return replace(row, spec={**row.spec, "input_size": SIDE})
    spec = {**row.spec, "input_size": SIDE, "prompt_width": 32}
    return replace(row, spec=spec, size={**row.size, **SMALL[row.module]})


@pytest.fixture
def make() -> Callable[[str], Any]:
    """Function from a row's name to a frozen backbone of that family, S = 64, no parameter zero."""

    def build(name: str) -> Backbone:
        row = _small(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = plugins.load("backbones", row.module).build(row)
            with torch.no_grad():
                for p in backbone.parameters():  # zero-initialised parts would hide mistakes
                    p += 0.02 * torch.randn_like(p)
        return no_grad_eval(backbone)  # type: ignore[return-value]

    return build


@pytest.fixture
def learn(make) -> Callable[..., Learned]:
    """Function to a learned model in eval mode; ``seed`` is that of the method's weights."""

    def build(method: str, backbone: Any, options: dict[str, Any], preset: str = "frozen", *, seed: int = 1) -> Learned:
        owner = make(backbone) if isinstance(backbone, str) else backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Learned(MethodRow(method, method, options, TrainRecipe()), owner, CLASSES, preset).eval()

    return build
