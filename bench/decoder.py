"""The bare decoder call, the physical limit of a click: prompt encoder and mask decoder on one slice's features.

It runs in a process and session of its own, as every server does, because the scheduler shares a busy machine out by
session. Its OpenMP threads sleep while they wait: by default they spin, and where another program holds one of two
cores the same call was seen to take 800 ms instead of 8. The limit must not be made easier by that.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from unittest.mock import patch


class BareDecoder:
    """Times calls in the other process.

    Args:
        pipe: to it.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def seconds(self, backbone: str) -> float:
        """How long one call takes now."""
        self._pipe.send(backbone)
        return self._pipe.recv()


@contextmanager
def bare_decoder(*backbones: str) -> Iterator[BareDecoder]:
    """A process that has these backbones ready, with random weights, and ends with the block."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, backbones), daemon=True)
    with patch.dict(os.environ, OMP_WAIT_POLICY="passive"):  # libgomp reads it once, when torch is imported
        process.start()
    theirs.close()
    ours.recv()
    try:
        yield BareDecoder(ours)
    finally:
        ours.close()
        process.join()


def _work(pipe: Connection, backbones: tuple[str, ...]) -> None:
    os.setsid()
    calls = {name: _Call(name) for name in backbones}
    for call in calls.values():
        call.seconds()
    pipe.send("ready")
    while True:
        try:
            pipe.send(calls[pipe.recv()].seconds())
        except EOFError:
            return


class _Call:
    def __init__(self, name: str) -> None:
        import torch

        from lib.contracts import PromptSet
        from lib.loading import load_backbone

        self.backbone = load_backbone(name, random_seed=0)
        side = self.backbone.spec.input_size
        with torch.inference_mode():
            self.features = self.backbone.encode(torch.zeros(1, 3, side, side))
        self.click = PromptSet(points_xy=torch.full((1, 1, 2), side / 2), labels=torch.ones(1, 1, dtype=torch.long))

    def seconds(self) -> float:
        import torch

        from lib.decoder import decode

        start = time.perf_counter()
        with torch.inference_mode():
            prompts = self.backbone.embed_prompts(self.click)
            decode(self.backbone.spec, self.backbone.mask_decoder, self.features, prompts)
        return time.perf_counter() - start
