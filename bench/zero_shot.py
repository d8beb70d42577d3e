"""Zero-shot Dice of a backbone from simulated prompts on real slices, beside a baseline that looks at no pixel.

    python -m bench.zero_shot [--backbone compact] [--data-dir DIR] [--cases N] [--out FILE]

Hippocampus ``test``, held-back nuclei and all of ACDC: none of it was seen in pretraining, ACDC's domain neither. Every
slice (across k) where a structure has at least 12 pixels counts; Dice is averaged per case, then over cases. Clicks
follow ``lib.prompts.simulate.next_click``; after the first each call also gets the previous mask.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image

from bench import common
from lib.contracts import Features
from lib.data.split import hippocampus_split, nuclei_split
from lib.data.volume import load_volume
from lib.data.window import apply_window
from lib.decoder import decode
from lib.loading import load_backbone
from lib.prompts.simulate import box_of, inscribed_ellipse, next_click
from lib.prompts.user import SlicePrompts, prompt_set
from lib.transform import SliceTransform
from tests.serving import dice

CLICKS = (1, 3, 5, 10)
LEAST_PIXELS = 12
NAMES = {
    "hippocampus": {1: "anterior", 2: "posterior"},
    "acdc": {1: "RV", 2: "Myo", 3: "LV"},
}


@dataclass(frozen=True)
class Sample:
    """One slice: ``(H, W[, 3])`` in 0..1 and a mask per structure."""

    case: str
    pixels: np.ndarray
    masks: dict[str, np.ndarray]


def volume_samples(folder: Path, cases: list[str], names: dict[int, str]) -> Iterator[Sample]:
    """Slices across k with at least one structure."""
    for case in cases:
        volume = load_volume(folder / f"{case}.nii.gz")
        labels = load_volume(folder / "labels" / "final" / f"{case}.nii.gz").array
        for k in range(volume.shape[2]):
            masks = {name: value == labels[:, :, k].T for value, name in names.items()}
            masks = {name: mask for name, mask in masks.items() if mask.sum() >= LEAST_PIXELS}
            if masks:
                yield Sample(case, apply_window(volume.array[:, :, k].T, volume.window), masks)


def nuclei_samples(folder: Path, cases: list[str], per_image: int = 8) -> Iterator[Sample]:
    """Whole pictures with the first few nuclei of each that are large enough."""
    for case in cases:
        pixels = np.asarray(Image.open(folder / f"{case}.png").convert("RGB"), np.float32) / 255
        instances = np.asarray(Image.open(next((folder / "instances").glob(f"{case}.*"))))
        numbers = [n for n in np.unique(instances) if n and (instances == n).sum() >= LEAST_PIXELS][:per_image]
        for number in numbers:
            yield Sample(case, pixels, {"nucleus": instances == number})


class Prompted:
    """A backbone that answers prompts on one slice."""

    def __init__(self, backbone: Any, pixels: np.ndarray) -> None:
        self.backbone = backbone
        self.transform = SliceTransform(backbone.spec, pixels.shape[:2])  # type: ignore[arg-type]
        started = time.perf_counter()
        self.features: Features = backbone.encode(self.transform.image(pixels)[None])
        self.encode_s = time.perf_counter() - started

    def ask(
        self, prompts: SlicePrompts, previous: Optional[torch.Tensor] = None
    ) -> tuple[np.ndarray, torch.Tensor, float]:
        """Mask ``(H, W)`` bool, low-resolution logits, predicted IoU."""
        given = replace(prompt_set(prompts, self.transform), masks=previous)
        embedded = self.backbone.embed_prompts(given)
        out = decode(self.backbone.spec, self.backbone.mask_decoder, self.features, embedded)
        best = 1 + int(out.iou[0, 1:].argmax()) if prompts.is_ambiguous else 0
        low = out.masks[:, best : best + 1]
        return (self.transform.logits(low)[0, 0] > 0).numpy(), low.clamp(-32, 32), float(out.iou[0, best])


def box_dice(model: Prompted, target: np.ndarray) -> tuple[float, float, float]:
    """Dice of the box prompt, of the inscribed ellipse, and the predicted IoU."""
    box = box_of(target)
    mask, _, quality = model.ask(SlicePrompts(box_rc=box))
    return dice(mask, target), dice(inscribed_ellipse(target.shape, box), target), quality


def click_dice(model: Prompted, target: np.ndarray) -> dict[int, float]:
    """Dice after each number of clicks of ``CLICKS``."""
    prompts, mask, low = SlicePrompts(), None, None
    scores: dict[int, float] = {}
    for number in range(1, max(CLICKS) + 1):
        click = next_click(target, mask)
        if click is not None:
            prompts.points_rc.append(click)
            mask, low, _ = model.ask(prompts, low)
        if number in CLICKS and mask is not None:
            scores[number] = dice(mask, target)
    return scores


def sources(data_dir: Path, limit: Optional[int]) -> dict[str, Iterator[Sample]]:
    """The three test sets, cut to ``limit`` cases each."""

    def names(folder: str, ending: str) -> list[str]:
        return [p.name for p in (data_dir / folder).glob(f"*.{ending}")]

    acdc = sorted(n.split(".")[0] for n in names("acdc", "nii.gz"))
    hippocampus = hippocampus_split(names("hippocampus", "nii.gz"))["test"]
    nuclei = nuclei_split(names("nuclei", "png"))["test"]
    return {
        "hippocampus": volume_samples(data_dir / "hippocampus", hippocampus[:limit], NAMES["hippocampus"]),
        "nuclei": nuclei_samples(data_dir / "nuclei", nuclei[:limit]),
        "acdc": volume_samples(data_dir / "acdc", acdc[:limit], NAMES["acdc"]),
    }


def evaluate(backbone: Any, samples: Iterator[Sample]) -> tuple[dict[str, dict[str, float]], list[tuple[float, float]]]:
    """Mean Dice per structure and prompt, and ``(predicted, true)`` IoU of the box prompts."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    calibration = []
    with torch.inference_mode():
        for sample in samples:
            model = Prompted(backbone, sample.pixels)
            for structure, target in sample.masks.items():
                box, ellipse, quality = box_dice(model, target)
                calibration.append((quality, box / (2 - box)))
                found = {"ellipse": ellipse, "box": box}
                found |= {f"{n} clicks": d for n, d in click_dice(model, target).items()}
                for prompt, value in found.items():
                    scores[structure, prompt][sample.case].append(value)
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for (structure, prompt), cases in scores.items():
        table[structure][prompt] = float(np.mean([np.mean(v) for v in cases.values()]))
    return dict(table), calibration


def report(name: str, backbone: Any, table: dict[str, dict[str, float]], calibration: list[tuple[float, float]]) -> str:
    """A markdown table."""
    from scipy.stats import spearmanr

    columns = ["ellipse", "box", *(f"{n} clicks" for n in CLICKS)]
    lines = [f"### {name}, {backbone.spec.name} at {backbone.spec.input_size} px", ""]
    lines += ["| structure | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for structure, row in table.items():
        lines.append(f"| {structure} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |")
    predicted, true = zip(*calibration)
    lines.append(f"\npredicted against true IoU of {len(true)} boxes: Spearman {spearmanr(predicted, true)[0]:.2f}\n")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="compact")
    parser.add_argument("--weights-dir", type=Path, default=None)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cases", type=int, default=None, help="at most so many per data set")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    backbone = load_backbone(options.backbone, weights_dir=options.weights_dir, download=False)
    parts = [f"{common.machine()}\nWeights {backbone.weights_id}.\n"]
    print(parts[0], flush=True)
    for name, samples in sources(options.data_dir, options.cases).items():
        parts.append(report(name, backbone, *evaluate(backbone, samples)))
        print(parts[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
