"""How long a user waits for a click: our ``sam`` beside MONAI Label's own ``Sam2InferTask``.

    python -m bench.click_latency [--rounds 7] [--volumes 3] [--skip-upstream-3d] [--out FILE]

Four real servers (upstream, ours with sam2.1_tiny, ours with compact, one that returns empty labels) answer the same
Slicer requests on the same generated 512x512x40 volumes. Upstream and sam2.1_tiny read the same checkpoint: random
weights in the official layout, since no time depends on their values. Steps are interleaved between systems, and
everything else stands still meanwhile. Beside them: the bare decoder call in a process of its own. About 15 minutes on
two idle cores, half of them upstream's 3-D click and the encoding of whole volumes with sam2.1_tiny.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import common
from bench.common import Answer, Report, Slicer, Verdict, median, seconds
from bench.decoder import bare_decoder
from lib.engine import StopRule

SHAPE = (512, 512, 40)
MIDDLE = (179, 234, 20)
PARK = "park"  # one slice; a click on it ends the background encoding of every other volume
FASTER_2D, FASTER_3D, OVER_THE_FLOOR, LIKE_A_SECOND_CLICK = 20.0, 10.0, 1.5, 1.5
UPSTREAM, EMPTY, SAM2, COMPACT = "upstream Sam2InferTask", "empty request", "ours, sam2.1_tiny", "ours, compact"

BACKBONES = {SAM2: common.SAM2_ROW, COMPACT: "compact"}


@dataclass
class System:
    """A server and what was measured on it.

    Args:
        name: for the tables.
        slicer: asks it.
        times: round trips in seconds by what was asked.
        stages: the server's own seconds per stage, likewise.
        notes: what else the tables say about it.
        encoded_again: clicks of two alternating users that found their slice forgotten.
    """

    name: str
    slicer: Slicer
    times: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    encoded_again: int = 0

    @property
    def is_ours(self) -> bool:
        """Whether it encodes in the background."""
        return self.name in BACKBONES

    def click(self, what: str, image: str, k: int = MIDDLE[2], **more: object) -> Answer:
        """A click on slice ``k`` as this system's 2-D click: ours is the 3-D task without propagation."""
        model, options = {UPSTREAM: ("sam_2d", {"slice": k}), EMPTY: ("empty", {})}.get(
            self.name, ("sam", {"propagate": False})
        )
        return self.ask(what, model, image, foreground=[[*MIDDLE[:2], k]], **{**options, **more})

    def ask(self, what: str, model: str, image: str, **prompts: object) -> Answer:
        """Any request, its time noted under ``what``."""
        print(f"{self.name}: {what} on {image}", file=sys.stderr, flush=True)
        answer = self.slicer.ask(model, image, **prompts)
        self.times.setdefault(what, []).append(answer.seconds)
        self.stages.setdefault(what, []).append(answer.reply.get("latencies", {}))
        return answer

    def park(self) -> None:
        """Ends background encoding, so that the next system has the machine to itself."""
        if self.is_ours:
            self.click("park", PARK, 0)
            self.slicer.wait_for_background()


def main() -> None:
    """Measures and prints."""
    args = parse()
    report = Report("Click latency", args.out)
    with common.scratch_folder() as scratch, servers(scratch, report, args) as systems:
        images = [f"volume{n}" for n in range(args.volumes)]
        for image in images:
            for system in systems.values():
                open_image(system, image)
        for system in systems.values():
            encode_all(system, images[0])
        floor = second_clicks(systems, images[0], args.rounds)
        for system in systems.values():
            two_users(system, images, args.rounds)
        clicks_3d(systems, images[0], args)
        for system in systems.values():
            system.notes["memory"] = "{:.0f} / {:.0f} MB".format(*common.memory_mb(system.slicer.server.pid))
        report_times(report, systems, floor)
        report.verdicts(verdicts(systems, floor, args.skip_upstream_3d))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of a second click")
    parser.add_argument(
        "--volumes", type=int, default=3, help="how many volumes a first click is measured on, 2 or more"
    )
    parser.add_argument(
        "--skip-upstream-3d", action="store_true", help="leave out upstream's 3-D click, about 3 minutes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    return parser.parse_args()


@contextmanager
def servers(scratch: Path, report: Report, args: argparse.Namespace) -> Iterator[dict[str, System]]:
    """The four systems, all up, each on its own copy of the same studies."""
    studies = scratch / "studies"
    common.write_phantoms(studies, [f"volume{n}" for n in range(args.volumes)], SHAPE)
    common.write_phantoms(scratch / "one", [PARK], (*SHAPE[:2], 1))
    (scratch / "one" / f"{PARK}.nii.gz").rename(studies / f"{PARK}.nii.gz")
    checkpoint = common.write_sam2_checkpoint(scratch / "weights", args.seed)
    upstream = common.bench_app("upstream_sam2", scratch)
    (upstream / "model").symlink_to(checkpoint.parent)
    own = common.own_app(scratch)
    common.accept_any_weights(own)
    report.add(
        f"{args.volumes} generated volumes of {'x'.join(map(str, SHAPE))} voxels (NIfTI, int16). sam2.1_tiny: random "
        f"weights, seed {args.seed}, one file for upstream and ours. compact: {common.provide_compact(own)} weights."
    )
    conf = {"download": "false", "weights_dir": str(checkpoint.parent)}
    starts: dict[str, tuple[Path, bool, dict[str, str]]] = {
        UPSTREAM: (upstream, False, {}),
        EMPTY: (common.bench_app("empty_label", scratch), True, {}),
        COMPACT: (own, True, {**conf, "backbone": "compact"}),
        SAM2: (own, True, {**conf, "backbone": common.SAM2_ROW}),
    }
    with ExitStack() as stack:
        systems = {}
        for number, (name, (app, wrapper, pairs)) in enumerate(starts.items()):
            place = scratch / f"server{number}"
            mine = Path(common.copy_studies(studies, place / "studies"))
            running = stack.enter_context(common.server(app, mine, place, wrapper=wrapper, **pairs))
            systems[name] = System(name, Slicer(running, place / "replies"))
        yield systems


# ------------------------------------------------------------------------------------------------------------- clicks


def open_image(system: System, image: str) -> None:
    """First click, the next two at once, the neighbouring slices after two seconds."""
    system.click("first", image)
    if system.name == EMPTY:
        return
    for _ in range(2):
        system.click("second, neighbours being encoded" if system.is_ours else "second", image)
    time.sleep(2)
    for k in (MIDDLE[2] + 1, MIDDLE[2] - 1):
        system.click("neighbour after 2 s", image, k)
    system.park()


def encode_all(system: System, image: str) -> None:
    """Lets our servers encode all slices of a volume."""
    if system.is_ours:
        start = time.perf_counter()
        system.click("back again", image)
        system.slicer.wait_for_background()
        system.notes.setdefault("all slices encoded after", f"{time.perf_counter() - start:.0f} s")


def second_clicks(systems: dict[str, System], image: str, rounds: int) -> dict[str, list[float]]:
    """Clicks where everything is encoded, all systems in turn, and the bare decoder; returns the latter's times."""
    floor: dict[str, list[float]] = {name: [] for name in BACKBONES}
    with bare_decoder(*BACKBONES.values()) as bare:
        for _ in range(rounds):
            for system in systems.values():
                system.click("second", image)
                if system.is_ours:
                    system.ask("second, sam_2d", "sam_2d", image, foreground=[list(MIDDLE)], slice=MIDDLE[2])
                    floor[system.name] += [bare.seconds(BACKBONES[system.name]) for _ in range(2)]
    return floor


def two_users(system: System, images: list[str], rounds: int) -> None:
    """Clicks on two volumes in turn; the first pair is not counted."""
    if system.name == EMPTY:
        return
    for image in images[:2]:
        system.click("warm", image)
    for _ in range(2 if system.name == UPSTREAM else rounds):
        for user, image in zip("AB", images):
            answer = system.click(f"two users, {user}", image)
            system.encoded_again += answer.reply.get("cache", {}).get("misses", 0)
    system.park()


def clicks_3d(systems: dict[str, System], image: str, args: argparse.Namespace) -> None:
    """Clicks that are carried through the volume, all slices encoded; a box over all slices keeps the walk going."""
    whole = {"roi": [100, 260, 150, 320, 0, SHAPE[2] - 1]}
    for system in (s for s in systems.values() if s.is_ours):
        encode_all(system, image)
        for _ in range(3):
            answer = system.ask("3-D", "sam", image, foreground=[list(MIDDLE)], **whole)
        slices = len(answer.reply["quality"]) - 1
        each_ms = 1000 * (median(system.times["3-D"]) - median(system.times["second"])) / max(slices, 1)
        system.notes["3-D"] = f"{slices} slices propagated, {each_ms:.0f} ms each"
        system.park()
    if not args.skip_upstream_3d:
        systems[UPSTREAM].ask("3-D", "sam_3d", image, foreground=[list(MIDDLE)])
        systems[UPSTREAM].notes["3-D"] = f"forwards only: {SHAPE[2] - 1 - MIDDLE[2]} slices propagated"


# ------------------------------------------------------------------------------------------------------------- report


def report_times(report: Report, systems: dict[str, System], floor: dict[str, list[float]]) -> None:
    """All times."""
    lines = (
        "first",
        "second",
        "second, sam_2d",
        "second, neighbours being encoded",
        "neighbour after 2 s",
        "two users, A",
        "two users, B",
        "3-D",
    )
    rows = [[line, *(seconds(s.times.get(line, [])) for s in systems.values())] for line in lines]
    rows.append(["bare decoder", *(seconds(floor.get(name, [])) for name in systems)])
    for note in ("3-D", "all slices encoded after", "memory"):
        rows.append([f"({note})", *(s.notes.get(note, "-") for s in systems.values())])
    report.table("Round trips: median (least-most, n)", ("click", *systems), rows)
    report.table("Where a second click of ours goes, ms", ("stage", SAM2, COMPACT), list(stage_rows(systems)))
    rule = StopRule()
    report.add(
        "",
        "First: with loading the volume and, on the first of the volumes, the model. Second: the same slice again, all "
        "slices encoded. Clicks of ours are `sam` with `propagate` off unless named otherwise, of upstream `sam_2d`. "
        f"3-D of ours: click and a box over all {SHAPE[2]} slices, inside which the stop rule (quality {rule.quality}, "
        f"overlap {rule.overlap}) does not bind; of upstream: `sam_3d`, the same click. "
        "Memory: resident at the end / at its peak.",
    )


def stage_rows(systems: dict[str, System]) -> Iterator[list[str]]:
    """Medians of the stages that our servers state, and the rest: the way there and back."""
    ours = [systems[SAM2], systems[COMPACT]]
    stages = ("pre", "encode", "decode", "assemble", "write", "total")
    for stage in stages:
        yield [stage, *(f"{1000 * median([s[stage] for s in system.stages['second']]):.0f}" for system in ours)]
    rests = [zip(system.times["second"], system.stages["second"]) for system in ours]
    yield ["round trip less total", *(f"{1000 * median([t - s['total'] for t, s in rest]):.0f}" for rest in rests)]


def verdicts(systems: dict[str, System], floor: dict[str, list[float]], skip_3d: bool) -> list[Verdict]:
    """The limits of docs/latency.md."""
    upstream, sam2, compact = systems[UPSTREAM], systems[SAM2], systems[COMPACT]
    empty = median(systems[EMPTY].times["second"])

    def of(system: System, what: str) -> float:
        return median(system.times.get(what, []))

    rows = [
        Verdict(
            "upstream's 2-D click / ours, sam2.1_tiny", of(upstream, "second") / of(sam2, "second"), FASTER_2D, True
        )
    ]
    for system in (sam2, compact):
        limit = median(floor[system.name]) + empty
        rows.append(
            Verdict(
                f"second click / (bare decoder + empty), {system.name}", of(system, "second") / limit, OVER_THE_FLOOR
            )
        )
    if not skip_3d:
        rows.append(
            Verdict("upstream's 3-D click / ours, sam2.1_tiny", of(upstream, "3-D") / of(sam2, "3-D"), FASTER_3D, True)
        )
    rows.append(
        Verdict(
            "neighbour after 2 s / second click, ours, compact",
            of(compact, "neighbour after 2 s") / of(compact, "second"),
            LIKE_A_SECOND_CLICK,
        )
    )
    for system in (sam2, compact):
        rows.append(Verdict(f"two users: slices encoded again, {system.name}", system.encoded_again, 0))
    return rows


if __name__ == "__main__":
    sys.exit(main())
