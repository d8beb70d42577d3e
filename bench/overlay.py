"""The README's picture: what the real server answers on the generated phantom to a click, a box and a 3-D prompt.

Drawn from the demo study only, never from shared data. Slices across k, rows j and columns i, so a panel looks like an
axial CT. Run by ``python -m bench.manual_prompts --overlay FILE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from bench import common
from bench.common import Slicer
from lib.data.phantom import make_phantom, write_demo_study
from lib.prompts.simulate import box_of, next_click
from tests.serving import dice

IMAGE, SHAPE, SPACING_MM = "phantom_1", (192, 192, 32), (1.9, 1.9, 5.0)  # as write_demo_study makes it
CLICKED, BOXED, CARRIED = "spine", "liver", "left kidney"
WINDOW_HU = (-160, 240)
MASK, PROMPT, PAPER, TEXT = "#ffb000", "#35d0ff", "#14181d", "#e8ecf0"


@dataclass(frozen=True)
class Panel:
    """One slice with a prompt and the answer.

    Args:
        title: above the slice.
        k: slice.
        mask: ``(I, J, K)`` bool.
        click_rc: the click on this slice.
        box_rc: half-open box on this slice.
    """

    title: str
    k: int
    mask: np.ndarray
    click_rc: Optional[tuple[int, int]] = None
    box_rc: Optional[tuple[int, int, int, int]] = None


def draw(path: Path, scratch: Path, app: Path, backbone: str) -> None:
    """Starts a server on the demo study, asks it and writes the PNG."""
    write_demo_study(scratch / "studies")
    hu, labels, names = make_phantom(SHAPE, SPACING_MM, seed=0)
    truth = {name: labels == value for name, value in names.items()}
    with common.server(app, scratch / "studies", scratch / "server", backbone=backbone) as running:
        slicer = Slicer(running, scratch / "replies")
        click, box = clicked(slicer, truth[CLICKED]), boxed(slicer, truth[BOXED])
        strip = carried(slicer, truth[CARRIED])
    score = dice(strip[0].mask, truth[CARRIED])
    figure(path, hu, (click, box), strip, backbone)
    print(f"{path}: Dice of the propagated {CARRIED} {score:.2f}; look at the picture before it is committed.")


def clicked(slicer: Slicer, truth: np.ndarray) -> Panel:
    """One click on the slice where the structure is largest."""
    k = int(truth.sum((0, 1)).argmax())
    row, column = click_on(truth, k)
    answer = slicer.ask("sam_2d", IMAGE, foreground=[[column, row, k]], slice=k)
    return Panel("one click", k, answer.mask(), click_rc=(row, column))


def boxed(slicer: Slicer, truth: np.ndarray) -> Panel:
    """One box, likewise."""
    k = int(truth.sum((0, 1)).argmax())
    r0, c0, r1, c1 = box_of(truth[:, :, k].T)
    answer = slicer.ask("sam_2d", IMAGE, roi=[c0, c1 - 1, r0, r1 - 1, k, k])
    return Panel("one box", k, answer.mask(), box_rc=(r0, c0, r1, c1))


def carried(slicer: Slicer, truth: np.ndarray) -> list[Panel]:
    """A box around the whole structure and a click in its middle, carried to slices above and below."""
    slices = np.flatnonzero(truth.any((0, 1)))
    middle = int(slices[len(slices) // 2])
    row, column = click_on(truth, middle)
    ends = np.argwhere(truth)
    roi = np.stack([ends.min(0), ends.max(0)], 1).ravel().tolist()
    mask = slicer.ask("sam", IMAGE, foreground=[[column, row, middle]], roi=roi).mask()
    box_rc = (roi[2], roi[0], roi[3] + 1, roi[1] + 1)
    shown = [int(slices[round(f * (len(slices) - 1))]) for f in (0.15, 0.35, 0.65, 0.85)]
    panels = [Panel(f"slice {k - middle:+d}", k, mask, box_rc=box_rc) for k in shown]
    return [*panels[:2], Panel("prompted slice", middle, mask, (row, column), box_rc), *panels[2:]]


def click_on(truth: np.ndarray, k: int) -> tuple[int, int]:
    """Row and column deepest inside the structure on a slice."""
    row, column, _ = next_click(truth[:, :, k].T)  # type: ignore[misc]
    return row, column


def figure(path: Path, hu: np.ndarray, two: tuple[Panel, Panel], strip: list[Panel], backbone: str) -> None:
    """Click and box on top, the carried structure as a strip of close-ups below."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(10, 6.6), facecolor=PAPER)
    top, bottom = sheet.subfigures(2, 1, height_ratios=(4.15, 2.35), hspace=0)
    for part in (top, bottom):
        part.set_facecolor(PAPER)
    for axes, panel in zip(top.subplots(1, 2), two):
        show(axes, hu, panel, crop=body(hu))
    close_up = around(strip)
    for axes, panel in zip(bottom.subplots(1, len(strip)), strip):
        show(axes, hu, panel, crop=close_up)
    top.subplots_adjust(0.01, 0.0, 0.99, 0.93, wspace=0.02)
    bottom.subplots_adjust(0.01, 0.02, 0.99, 0.76, wspace=0.03)
    bottom.suptitle("one click and a 3-D box, carried through the volume", color=TEXT, fontsize=12, y=0.98)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=110, facecolor=PAPER, metadata={"Software": f"autosam_label, {backbone}"})


def show(axes: Any, hu: np.ndarray, panel: Panel, crop: tuple[slice, slice]) -> None:
    """One slice: grey values, the mask's outline, the prompts."""
    from matplotlib.patches import Rectangle

    grey, mask = hu[:, :, panel.k].T, panel.mask[:, :, panel.k].T
    axes.imshow(grey, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], interpolation="bilinear")
    if mask.any():
        axes.contourf(mask, levels=(0.5, 1.5), colors=[MASK], alpha=0.25)
        axes.contour(mask, levels=(0.5,), colors=[MASK], linewidths=1.8)
    if panel.box_rc:
        r0, c0, r1, c1 = panel.box_rc
        axes.add_patch(
            Rectangle(
                (c0 - 0.5, r0 - 0.5), c1 - c0, r1 - r0, fill=False, edgecolor=PROMPT, linewidth=1.5, linestyle="--"
            )
        )
    if panel.click_rc:
        row, column = panel.click_rc
        axes.plot(column, row, "o", color=PROMPT, markeredgecolor=PAPER, markersize=9, markeredgewidth=1.5)
    rows, columns = crop
    axes.set(xlim=(columns.start - 0.5, columns.stop - 0.5), ylim=(rows.stop - 0.5, rows.start - 0.5))
    axes.set_title(panel.title, color=TEXT, fontsize=11)
    axes.set_axis_off()


def body(hu: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns that hold more than air."""
    r0, c0, r1, c1 = box_of((hu > -500).any(2).T)
    return slice(max(r0 - 3, 0), r1 + 3), slice(max(c0 - 3, 0), c1 + 3)


def around(strip: list[Panel], margin: int = 12, ratio: float = 1.15) -> tuple[slice, slice]:
    """Rows and columns of a close-up around the box, ``ratio`` times as wide as high."""
    r0, c0, r1, c1 = strip[0].box_rc  # type: ignore[misc]
    half_height = (r1 - r0) // 2 + margin
    half_width = round(half_height * ratio)
    row, column = max((r0 + r1) // 2, half_height), max((c0 + c1) // 2, half_width)
    return slice(row - half_height, row + half_height), slice(column - half_width, column + half_width)
