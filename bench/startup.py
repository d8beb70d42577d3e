"""What starting our server costs, and whether one user's long inference stalls the others.

    python -m bench.startup [--pairs 3] [--backbone compact] [--out FILE]
    python -m bench.startup --blocking [--backbone sam2.1_tiny] [--out FILE]

The first starts an empty MONAI Label app and ours in turn and compares medians: seconds until ``/info/`` answers and
resident memory, then memory after a click on a small volume. The second lets one user segment many slices that nobody
has encoded yet, 20 s or more, and meanwhile asks ``/info/`` and clicks as a second user on another volume.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from bench import common
from bench.common import Report, Slicer, Verdict, median, seconds
from tests.serving import Server

START_S, IDLE_MB = 3.0, 400.0
LONG_S, INFO_S = 20.0, 0.5
SMALL, LARGE = (128, 128, 20), (512, 512, 40)


def main() -> None:
    """Measures and prints."""
    args = parse()
    with common.scratch_folder() as scratch:
        if args.blocking:
            blocking(Report("A server that does not block itself", args.out), scratch, args.backbone or common.SAM2_ROW)
        else:
            startup(Report("Start-up and idle memory", args.out), scratch, args.backbone or "compact", args.pairs)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="how often both apps are started")
    parser.add_argument("--backbone", help="default: compact, with --blocking sam2.1_tiny")
    parser.add_argument("--blocking", action="store_true", help="measure other users' waiting during a long inference")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ startup


@dataclass(frozen=True)
class Start:
    """One start.

    Args:
        start_s: until ``/info/`` answered.
        idle_mb: resident then.
        clicked_mb: resident after a click and its background work, NaN for an app that cannot segment.
    """

    start_s: float
    idle_mb: float
    clicked_mb: float = float("nan")


def startup(report: Report, scratch: Path, backbone: str, pairs: int) -> None:
    """Starts both apps in turn."""
    common.write_phantoms(scratch / "studies", ["small"], SMALL)
    empty, own = common.bench_app("empty", scratch), common.own_app(scratch)
    weights = prepare_weights(own, scratch, backbone)
    report.add(f"{backbone}: {weights} weights. Warm click: `sam` on a volume of {SMALL} voxels, all slices encoded.")
    starts: dict[str, list[Start]] = {"empty app": [], "ours": []}
    for pair in range(pairs):
        starts["empty app"].append(start_once(scratch, f"empty{pair}", empty, wrapper=False))
        conf = {"backbone": backbone, "weights_dir": str(scratch / "weights"), "download": "false"}
        starts["ours"].append(start_once(scratch, f"ours{pair}", own, wrapper=True, **conf))
    rows = [[name, *cells(found)] for name, found in starts.items()]
    report.table("Starts in turn", ("app", "until /info/", "resident", "after a click"), rows)
    middle = {
        n: [median([getattr(s, f) for s in found]) for f in ("start_s", "idle_mb")] for n, found in starts.items()
    }
    more_s, more_mb = (ours - other for ours, other in zip(middle["ours"], middle["empty app"]))
    clicked_mb = median([s.clicked_mb for s in starts["ours"]]) - middle["empty app"][1]
    report.verdicts(
        [
            Verdict("our share of start-up, s", more_s, START_S),
            Verdict("our idle memory over the empty app, MB", more_mb, IDLE_MB),
            Verdict("the same after a click, MB", clicked_mb, IDLE_MB),
        ]
    )


def start_once(scratch: Path, name: str, app: Path, *, wrapper: bool, **conf: str) -> Start:
    """Starts a server, looks at it, and clicks where it can segment."""
    place = scratch / name
    studies = common.copy_studies(scratch / "studies", place / "studies")
    with common.server(app, studies, place, wrapper=wrapper, **conf) as running:
        idle_mb, _ = common.memory_mb(running.pid)
        if not running.info()["models"]:
            return Start(running.start_s, idle_mb)
        slicer = Slicer(running, place / "replies")
        for _ in range(2):
            slicer.ask("sam", "small", foreground=[[64, 64, 10]])
            slicer.wait_for_background()
        return Start(running.start_s, idle_mb, common.memory_mb(running.pid)[0])


def cells(starts: list[Start]) -> list[str]:
    """One table row."""
    clicked = [s.clicked_mb for s in starts if not math.isnan(s.clicked_mb)]
    idle = f"{median([s.idle_mb for s in starts]):.0f} MB"
    return [seconds([s.start_s for s in starts]), idle, f"{median(clicked):.0f} MB" if clicked else "-"]


def prepare_weights(own: Path, scratch: Path, backbone: str) -> str:
    """Random weights where the backbone has none here; says which it has."""
    if backbone == "compact":
        return common.provide_compact(own)
    if backbone == common.SAM2_ROW:
        common.accept_any_weights(own)
        common.write_sam2_checkpoint(scratch / "weights", seed=0)
    return "random"


# ----------------------------------------------------------------------------------------------------------- blocking


def blocking(report: Report, scratch: Path, backbone: str) -> None:
    """One long inference, and what the others feel of it."""
    common.write_phantoms(scratch / "studies", ["long", "second", "probe"], LARGE)
    own = common.own_app(scratch)
    weights = prepare_weights(own, scratch, backbone)
    report.add(f"{backbone}: {weights} weights; volumes of {LARGE} voxels; the server as the README starts it.")
    conf = {"backbone": backbone, "weights_dir": str(scratch / "weights"), "download": "false", "prefetch": "false"}
    with common.server(own, scratch / "studies", scratch / "server", **conf) as running:
        other = Slicer(running, scratch / "other")
        encode_s = time_of_one_slice(other)
        count = min(LARGE[2], math.ceil(1.5 * LONG_S / encode_s))
        quiet = [click(other, 20) for _ in range(3)][1:]
        with long_inference(running, scratch, count) as busy:
            infos, clicks = watch(running, other, busy)
        length_s = busy.length_s
    rows = [
        ["long inference", f"{length_s:.1f} s, clicks on {count} slices at once"],
        ["/info/ meanwhile", seconds(infos)],
        ["second user's click, machine idle", seconds(quiet)],
        ["second user's first click meanwhile", seconds(clicks[:1])],
        ["second user's next clicks meanwhile", seconds(clicks[1:])],
    ]
    report.table("Others during a long inference", ("what", "median (least-most, n)"), rows)
    report.verdicts(
        [
            Verdict("the inference's length, s", length_s, LONG_S, True),
            Verdict("slowest /info/ meanwhile, s", max(infos, default=math.nan), INFO_S),
            Verdict("clicks served meanwhile", len(clicks), 1, True),
        ]
    )


def time_of_one_slice(slicer: Slicer) -> float:
    """Seconds to encode and decode a slice, with everything loaded."""
    slicer.ask("sam", "probe", foreground=[[256, 256, 0]], propagate=False)
    return slicer.ask("sam", "probe", foreground=[[256, 256, 1]], propagate=False).seconds


def click(slicer: Slicer, k: int) -> float:
    """Round trip of the second user's click."""
    return slicer.ask("sam", "second", foreground=[[256, 256, k]], propagate=False).seconds


class Busy:
    """The long inference in its thread; ``running`` until its answer is there."""

    def __init__(self, slicer: Slicer, count: int) -> None:
        self.length_s = math.nan
        self._slicer, self._count = slicer, count
        self._thread = threading.Thread(target=self._run, name="long-inference")

    def _run(self) -> None:
        points = [[256, 256, k] for k in range(self._count)]
        self.length_s = self._slicer.ask("sam", "long", foreground=points, propagate=False).seconds

    def start(self) -> None:
        """Sends the request."""
        self._thread.start()

    def join(self) -> None:
        """Waits for the answer."""
        self._thread.join()

    @property
    def running(self) -> bool:
        """Whether the answer is still awaited."""
        return self._thread.is_alive()


@contextmanager
def long_inference(running: Server, scratch: Path, count: int) -> Iterator[Busy]:
    """Runs while the block does; leaving it waits for the end."""
    busy = Busy(Slicer(running, scratch / "long"), count)
    busy.start()
    try:
        yield busy
    finally:
        busy.join()


def watch(running: Server, other: Slicer, busy: Busy) -> tuple[list[float], list[float]]:
    """Times of ``/info/`` every 0.2 s and of the second user's clicks, all answered while the inference ran."""
    infos: list[float] = []
    asker = threading.Thread(target=_ask_info, args=(running.url, busy, infos))
    asker.start()
    time.sleep(1)
    clicks, k = [], 21  # the first on a slice nobody has seen, the next on the same
    while busy.running:
        seconds_taken = click(other, k)
        if busy.running:
            clicks.append(seconds_taken)
        time.sleep(1)
    asker.join()
    return infos, clicks


def _ask_info(url: str, busy: Busy, infos: list[float]) -> None:
    while busy.running:
        start = time.perf_counter()
        json.loads(requests.get(f"{url}/info/", timeout=120).text)
        infos.append(time.perf_counter() - start)
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
