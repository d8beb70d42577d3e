"""Zero-shot Dice from simulated prompts on real slices: ``compact``, whatever official checkpoint is there, baselines.

    python -m bench.zero_shot [--backbone NAME ...] [--sets NAME ...] [--cases N] [--no-baselines] [--out FILE]

Hippocampus ``test``, held-back nuclei and all of ACDC: none of it was seen in pretraining, ACDC's domain neither. Every
slice (across k) where a structure has at least 12 pixels counts; Dice is averaged per case, then over cases. Clicks
follow ``lib.prompts.simulate.next_click`` against each method's own mask; after the first, each call of a model also
gets the previous mask. Baselines on the same slices: the ellipse inscribed in the box, random walker, graph cut. At the
end: size of the weights, time to encode a 512 x 512 slice and to decode a click, memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image

from bench import classical, common
from lib import weights
from lib.config import backbone_names, backbone_row
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
Row = dict[str, float]
Pairs = list[tuple[str, float, float]]
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
        best = 1 + int(out.iou[0, 1:].argmax()) if prompts.is_ambiguous(self.backbone.spec) else 0
        low = out.masks[:, best : best + 1]
        return (self.transform.logits(low)[0, 0] > 0).numpy(), low.clamp(-32, 32), float(out.iou[0, best])


Ask = Callable[[SlicePrompts], np.ndarray]


def model_ask(model: Prompted) -> tuple[Ask, list[float]]:
    """A function from prompts to a mask that feeds the previous mask back, and the predicted IoU of every call."""
    previous: list[torch.Tensor] = []
    quality: list[float] = []

    def ask(prompts: SlicePrompts) -> np.ndarray:
        mask, low, predicted = model.ask(prompts, previous[-1] if previous else None)
        previous.append(low)
        quality.append(predicted)
        return mask

    return ask, quality


def click_dice(ask: Ask, target: np.ndarray) -> dict[str, float]:
    """Dice after each number of clicks of ``CLICKS``."""
    prompts, mask = SlicePrompts(), None
    scores: dict[str, float] = {}
    for number in range(1, max(CLICKS) + 1):
        click = next_click(target, mask)
        if click is not None:
            prompts.points_rc.append(click)
            mask = ask(prompts)
        if number in CLICKS and mask is not None:
            scores[f"{number} clicks"] = dice(mask, target)
    return scores


def measure(backbone: Any, sample: Sample, baselines: bool) -> Iterator[tuple[str, str, dict[str, float], Pairs]]:
    """Structure, method, Dice per prompt, and ``(predicted, true)`` IoU of the model's masks."""
    model = Prompted(backbone, sample.pixels)
    for structure, target in sample.masks.items():
        box = SlicePrompts(box_rc=box_of(target))
        mask, _, predicted = model.ask(box)
        found = {"box": dice(mask, target)}
        ask, quality = model_ask(model)
        clicked = click_dice(ask, target)
        pairs = [("box", predicted, found["box"]), ("1 click", quality[0], clicked["1 clicks"])]
        yield structure, backbone.spec.name, found | clicked, pairs
        yield structure, "ellipse", {"box": dice(inscribed_ellipse(target.shape, box.box_rc), target)}, []  # type: ignore
        for name in ("random_walk", "graph_cut") if baselines else ():
            classic = partial(getattr(classical, name), sample.pixels)
            yield structure, name, {"box": dice(classic(box), target)} | click_dice(classic, target), []


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


def evaluate(backbone: Any, samples: Iterator[Sample], baselines: bool) -> tuple[dict[tuple[str, str], Row], Pairs]:
    """Mean Dice per (structure, method) and prompt, and ``(prompt, predicted, true Dice)`` of the model's masks."""
    scores: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    calibration: Pairs = []
    with torch.inference_mode():
        for sample in samples:
            for structure, method, found, pairs in measure(backbone, sample, baselines):
                row = scores.setdefault((structure, method), defaultdict(lambda: defaultdict(list)))
                for prompt, value in found.items():
                    row[prompt][sample.case].append(value)
                calibration += pairs
    return {
        key: {p: float(np.mean([np.mean(v) for v in cases.values()])) for p, cases in row.items()}
        for key, row in scores.items()
    }, calibration


def report(name: str, backbone: Any, table: dict[tuple[str, str], Row], calibration: Pairs) -> str:
    """A markdown table."""
    from scipy.stats import spearmanr

    columns = ["box", *(f"{n} clicks" for n in CLICKS)]
    rows = [[*key, *(f"{row[c]:.3f}" if c in row else "" for c in columns)] for key, row in sorted(table.items())]
    lines = [f"### {name}, {backbone.spec.name} at {backbone.spec.input_size} px", ""]
    lines += [*common.markdown(("structure", "method", *columns), rows), ""]
    for prompt in ("box", "1 click"):
        predicted, true = zip(*[(q, d / (2 - d)) for p, q, d in calibration if p == prompt])
        lines.append(f"predicted against true IoU, {prompt}, {len(true)}: Spearman {spearmanr(predicted, true)[0]:.2f}")
    predicted, true = zip(*[(q, d / (2 - d)) for _, q, d in calibration])
    lines.append(f"predicted against true IoU, both: Spearman {spearmanr(predicted, true)[0]:.2f}\n")
    return "\n".join(lines)


def cost(backbone: Any) -> str:
    """Size, time and memory of one model on this machine."""
    from bench.common import seconds

    pixels = np.random.default_rng(0).random((512, 512), np.float32)
    with torch.inference_mode():
        encode = [Prompted(backbone, pixels).encode_s for _ in range(12)][2:]
        model, decode_s = Prompted(backbone, pixels), []
        for n in range(22):
            started = time.perf_counter()
            model.ask(SlicePrompts([(100 + n, 200, True)]))
            decode_s.append(time.perf_counter() - started)
    size, memory = sum(p.numel() for p in backbone.parameters()), model_memory_mb(backbone)
    file = backbone_row(backbone.spec.name).weights.bytes
    return (
        f"{backbone.spec.name}: {size / 1e6:.2f} M parameters, file {file / 1e6:.2f} MB; 512 x 512 slice encoded in "
        f"{seconds(encode)}, click decoded and resized in {seconds(decode_s[2:])}; at peak {memory:.0f} MB "
        f"more than a process that has only imported everything.\n"
    )


def model_memory_mb(backbone: Any) -> float:
    """Peak resident memory that loading the model, encoding a 512 x 512 slice and a click add to a fresh process."""
    code = f"""
import os, torch, numpy as np
from bench.common import memory_mb
from bench.zero_shot import Prompted, SlicePrompts, load_backbone
torch.ones(8, 8) @ torch.ones(8, 8)
before = memory_mb(os.getpid())[0]
with torch.inference_mode():
    model = Prompted(load_backbone({backbone.spec.name!r}, download=False), np.random.rand(512, 512).astype(np.float32))
    model.ask(SlicePrompts([(100, 200, True)]))
print(memory_mb(os.getpid())[1] - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def available(weights_dir: Optional[Path]) -> list[str]:
    """``compact`` and every backbone whose official file lies in the weights folder."""
    folder = weights.weights_dir(weights_dir)
    files = {n: backbone_row(n).weights.file for n in backbone_names() if n != "compact"}
    return ["compact"] + [n for n, file in files.items() if file and (folder / file).exists()]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", help="default: compact and every official checkpoint that is there")
    parser.add_argument("--weights-dir", type=Path, default=None)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cases", type=int, default=None, help="at most so many per data set")
    parser.add_argument("--sets", nargs="+", default=["hippocampus", "nuclei", "acdc"], help="data sets")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    parts = [f"{common.machine()}\n"]
    print(parts[0], flush=True)
    baselines = not options.no_baselines
    for name in options.backbone or available(options.weights_dir):
        backbone = load_backbone(name, weights_dir=options.weights_dir, download=False)
        parts.append(f"## {name}, weights {backbone.weights_id}\n\n{cost(backbone)}")
        print(parts[-1], flush=True)
        for dataset, samples in sources(options.data_dir, options.cases).items():
            if dataset not in options.sets:
                continue
            parts.append(report(dataset, backbone, *evaluate(backbone, samples, baselines)))
            print(parts[-1], flush=True)
        baselines = False  # the same for every model
    if options.out:
        options.out.write_text("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
