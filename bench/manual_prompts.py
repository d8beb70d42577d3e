"""The main job on real images: boxes and clicks through a real server, judged by Dice.

    python -m bench.manual_prompts [--backbone compact] [--cases N] [--structures N] [--data DIR] [--out FILE]
    python -m bench.manual_prompts --overlay docs/overlay.png [--backbone compact]

Hippocampus `test` cases and the held-back organ volume `ct_slab`, copied to a temporary study. Per structure, prompts
are drawn from its true mask: in 2-D the box on the slice of largest area, and up to three clicks of a careful user
(``lib.prompts.simulate.next_click``); in 3-D a flat box on the middle slice, the whole box, and one click, with
propagation. Beside them the ellipse or ellipsoid inscribed in the same box, which looks at no pixel. An empty or full
mask is a bug and is counted. ``--overlay`` draws a picture from the server's answers on the generated phantom instead.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from bench import common
from bench.common import Report, Slicer
from lib.data.split import ORGANS_HELD_BACK, hippocampus_split
from lib.prompts.simulate import box_of, inscribed_ellipse, next_click
from tests.serving import dice

HIPPOCAMPUS = {1: "anterior", 2: "posterior"}
LEAST_AREA, LEAST_SLICES = 100, 5  # smaller structures of the 3 mm organ volume are a few voxels across
FULL = 0.95
METHODS_2D = ("box", "1 click", "3 clicks")
METHODS_3D = ("flat box", "whole box", "1 click 3-D")
COLUMNS = ("box", "ellipse", "1 click", "3 clicks", "flat box", "whole box", "1 click 3-D", "ellipsoid")


@dataclass(frozen=True)
class Case:
    """One structure on one image, both indexed ``_ijk``; slices lie across k.

    Args:
        dataset: name for the table.
        image: id in the server's store.
        structure: name.
        truth: ``(I, J, K)`` bool.
    """

    dataset: str
    image: str
    structure: str
    truth: np.ndarray

    @property
    def largest(self) -> int:
        """The slice where the structure is largest."""
        return int(self.truth.sum((0, 1)).argmax())

    @property
    def middle(self) -> int:
        """The middle one of the slices where the structure is."""
        slices = np.flatnonzero(self.truth.any((0, 1)))
        return int(slices[len(slices) // 2])

    def slice_rc(self, k: int) -> np.ndarray:
        """``(J, I)`` bool: rows j, columns i."""
        return self.truth[:, :, k].T

    def roi(self, k: int) -> list[int]:
        """The structure's box on one slice as Slicer sends it: ends inside the box."""
        r0, c0, r1, c1 = box_of(self.slice_rc(k))
        return [c0, c1 - 1, r0, r1 - 1, k, k]

    def whole_roi(self) -> list[int]:
        """The structure's box in 3-D, likewise."""
        ends = np.argwhere(self.truth)
        return np.stack([ends.min(0), ends.max(0)], 1).ravel().tolist()


def main() -> None:
    """Measures and prints, or draws."""
    args = parse()
    with common.scratch_folder() as scratch:
        if args.overlay:
            from bench.overlay import draw

            draw(args.overlay, scratch, common.own_app(scratch, args.weights), args.backbone)
            return
        report = Report("Manual prompts on real images", args.out)
        studies = scratch / "studies"
        cases = [*copy_hippocampus(args.data, studies, args.cases), *copy_organs(args.data, studies, args.structures)]
        app = common.own_app(scratch, args.weights)
        with common.server(app, studies, scratch / "server", backbone=args.backbone) as running:
            slicer = Slicer(running, scratch / "replies")
            scores = [(case, score(slicer, case)) for case in progress(cases)]
            weights = running.info()["models"]["sam"]["engine"]["weights_id"]
        report.add(f"Backbone {args.backbone}, weights {weights[:12]}. Data: {args.data}, never trained on.")
        report.table("Mean Dice", ("dataset", "structure", "n", *COLUMNS, "empty", "full"), list(rows(scores)))
        report.add(
            "", "Columns box to 3 clicks: one slice, `sam_2d`. The others: whole volume, `sam` with propagation."
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--backbone", default="compact")
    parser.add_argument("--weights", type=Path, help="weights of compact that are not in lib/weights (yet)")
    parser.add_argument("--cases", type=int, default=30, help="at most so many hippocampus cases")
    parser.add_argument("--structures", type=int, default=10, help="at most so many structures of the organ volume")
    parser.add_argument("--data", type=Path, default=common.ROOT.parent / "shared" / "data", help="folder of real data")
    parser.add_argument("--overlay", type=Path, help="draw a picture of the phantom into this PNG and do nothing else")
    return parser.parse_args()


def progress(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases, with a line on standard error for each."""
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {case.dataset}: {case.structure}", end="\r", file=sys.stderr, flush=True)
        yield case


# --------------------------------------------------------------------------------------------------------------- data


def copy_hippocampus(data: Path, studies: Path, count: int) -> list[Case]:
    """Copies test cases into the studies; every case has two structures."""
    folder = data / "hippocampus"
    studies.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in hippocampus_split(p.name for p in folder.glob("*.nii.gz"))["test"][:count]:
        shutil.copy(folder / f"{name}.nii.gz", studies)
        labels = read_labels(folder / "labels" / "final" / f"{name}.nii.gz")
        cases += [Case("hippocampus", name, text, labels == value) for value, text in HIPPOCAMPUS.items()]
    return cases


def copy_organs(data: Path, studies: Path, count: int) -> list[Case]:
    """Copies the held-back organ volume and takes its largest structures that are more than a few voxels wide."""
    name = f"{ORGANS_HELD_BACK}.nii.gz"
    shutil.copy(data / "organs" / name, studies)
    path = data / "organs" / "labels" / "final" / name
    labels, names = read_labels(path), label_names(path)
    found = [Case(ORGANS_HELD_BACK, ORGANS_HELD_BACK, names[v], labels == v) for v in np.unique(labels)[1:].tolist()]
    wide = [c for c in found if c.truth.sum((0, 1)).max() >= LEAST_AREA and c.truth.any((0, 1)).sum() >= LEAST_SLICES]
    return sorted(wide, key=lambda c: -int(c.truth.sum()))[:count]


def read_labels(path: Path) -> np.ndarray:
    """``(I, J, K)`` integers."""
    return np.rint(np.asarray(nib.load(path).dataobj)).astype(np.int16)


def label_names(path: Path) -> dict[int, str]:
    """Names of the classes, out of the label table that TotalSegmentator puts into the header."""
    text = b"".join(e.get_content() for e in nib.load(path).header.extensions).decode("utf-8", "replace")
    return {int(k): name for k, name in re.findall(r'<Label Key="(\d+)"[^>]*><!\[CDATA\[(.*?)\]\]>', text)}


# -------------------------------------------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Score:
    """How good one mask is.

    Args:
        dice: overlap with the truth.
        is_empty: nothing was segmented.
        is_full: nearly everything was, on the slices that were touched.
    """

    dice: float
    is_empty: bool = False
    is_full: bool = False


def score(slicer: Slicer, case: Case) -> dict[str, Score]:
    """All methods and baselines on one structure."""
    k, middle = case.largest, case.middle
    target = case.slice_rc(k)
    point = next_click(case.slice_rc(middle))
    row, column, _ = point  # type: ignore[misc]
    flat = slicer.ask("sam_2d", case.image, roi=case.roi(k)).mask()[:, :, k].T
    clicked = click_masks(slicer, case, k, 3)
    return {
        "box": judge(flat, target),
        "ellipse": Score(dice(inscribed_ellipse(target.shape, box_of(target)), target)),  # type: ignore[arg-type]
        "1 click": judge(clicked[0], target),
        "3 clicks": judge(clicked[-1], target),
        "flat box": judge(slicer.ask("sam", case.image, roi=case.roi(middle)).mask(), case.truth),
        "whole box": judge(slicer.ask("sam", case.image, roi=case.whole_roi()).mask(), case.truth),
        "1 click 3-D": judge(slicer.ask("sam", case.image, foreground=[[column, row, middle]]).mask(), case.truth),
        "ellipsoid": Score(dice(inscribed_ellipsoid(case), case.truth)),
    }


def click_masks(slicer: Slicer, case: Case, k: int, count: int) -> list[np.ndarray]:
    """``(J, I)`` masks after each click of a user who corrects the largest error; fewer where nothing is wrong."""
    target, masks = case.slice_rc(k), []
    points: dict[str, list[list[int]]] = {"foreground": [], "background": []}
    click = next_click(target)
    while click is not None and len(masks) < count:
        row, column, positive = click
        points["foreground" if positive else "background"].append([column, row, k])
        masks.append(slicer.ask("sam_2d", case.image, slice=k, **points).mask()[:, :, k].T)
        click = next_click(target, masks[-1])
    return masks


def judge(mask: np.ndarray, truth: np.ndarray) -> Score:
    """Dice, and whether the mask is empty or full; works on slices and volumes."""
    if not mask.any():
        return Score(dice(mask, truth), is_empty=True)
    touched = mask if mask.ndim == 2 else mask[:, :, mask.any((0, 1))]
    return Score(dice(mask, truth), is_full=bool(touched.mean() >= FULL))


def inscribed_ellipsoid(case: Case) -> np.ndarray:
    """``(I, J, K)`` bool: the ellipsoid in the structure's box."""
    ends = np.argwhere(case.truth)
    centre, radius = (ends.min(0) + ends.max(0)) / 2, (np.ptp(ends, axis=0) + 1) / 2
    offset = (np.indices(case.truth.shape) - centre[:, None, None, None]) / radius[:, None, None, None]
    return (offset**2).sum(0) <= 1


def rows(scores: Sequence[tuple[Case, dict[str, Score]]]) -> Iterator[list[object]]:
    """One table row per structure, and one per dataset."""
    for dataset in dict.fromkeys(case.dataset for case, _ in scores):
        mine = [(case, found) for case, found in scores if case.dataset == dataset]
        for structure in dict.fromkeys(case.structure for case, _ in mine):
            yield row(dataset, structure, [found for case, found in mine if case.structure == structure])
        yield row(dataset, "**mean**", [found for _, found in mine])


def row(dataset: str, structure: str, found: Sequence[dict[str, Score]]) -> list[object]:
    """Mean Dice per method, and how many masks are empty and full."""
    means = [f"{np.mean([scores[name].dice for scores in found]):.3f}" for name in COLUMNS]
    judged = [scores[name] for scores in found for name in METHODS_2D + METHODS_3D]
    return [dataset, structure, len(found), *means, sum(s.is_empty for s in judged), sum(s.is_full for s in judged)]


if __name__ == "__main__":
    sys.exit(main())
