"""Endless synthetic anatomy for pretraining: label maps with organ-like, tubular, ring, multi-part and tiny shapes.

Each sample is a slice and its label map. Contrasts range from nearly none to strong; textures, bias field, speckle,
noise, blur and resolution loss vary, and some samples are coloured. numpy and scipy only, deterministic in the seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

Rng = np.random.Generator


def make_sample(seed: int, side: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """One synthetic slice.

    Args:
        seed: any integer; equal seeds give equal samples.
        side: rows and columns in pixels.

    Returns:
        ``(side, side, 3)`` uint8 image and ``(side, side)`` uint8 label map, 0 background.
    """
    rng = np.random.default_rng(seed)
    kind = rng.random()
    labels = _partition(rng, side) if kind < 0.25 else _scene(rng, side, walled=kind < 0.55)
    return _render(rng, labels), labels


def _noise(rng: Rng, side: int, scale: float) -> np.ndarray:
    """Smooth noise of unit deviation; ``scale`` is the length of its features in pixels."""
    coarse = max(4, int(np.ceil(side / max(scale, 1.0))) + 2)
    field = ndimage.zoom(rng.standard_normal((coarse, coarse)).astype(np.float32), side / coarse, order=3)[:side, :side]
    return field / (field.std() + 1e-6)


def _partition(rng: Rng, side: int) -> np.ndarray:
    """Neighbouring regions without gaps: the largest of several smooth fields wins."""
    count, scale = int(rng.integers(3, 9)), float(rng.uniform(0.1, 0.45)) * side
    fields = np.stack([_noise(rng, side, scale) for _ in range(count)])
    labels = fields.argmax(0).astype(np.uint8)
    if rng.random() < 0.6:  # inside a body
        labels = np.where(_blob(rng, side, 0.42 * side, centre=(side / 2, side / 2)), labels + 1, 0).astype(np.uint8)
    return labels


def _scene(rng: Rng, side: int, walled: bool) -> np.ndarray:
    """Shapes drawn over an optional body, later ones hiding earlier ones; or a few walled ones that stay whole.

    Among many shapes whole rings come to one object in twenty, which is too few to learn that a wall is not its cavity.
    """
    labels = np.zeros((side, side), np.uint8)
    if rng.random() < 0.7:
        labels[_blob(rng, side, rng.uniform(0.35, 0.48) * side, centre=(side / 2, side / 2))] = 1
    shapes: tuple[Callable[[Rng, np.ndarray], None], ...] = (
        _organ, _organ, _ring, _ring, _chambers, _crescent, _tube, _parts, _tiny, _sheet,
    )  # fmt: skip
    count = int(rng.integers(3, 12))
    if walled:
        shapes, count = (_ring, _ring, _chambers, _chambers, _crescent), int(rng.integers(1, 4))
    for _ in range(count):
        shapes[int(rng.integers(len(shapes)))](rng, labels)
    return labels


def _free(labels: np.ndarray) -> int:
    return int(labels.max()) + 1


def _blob(rng: Rng, side: int, radius: float, centre: tuple[float, float] | None = None) -> np.ndarray:
    """Star-shaped region: an ellipse whose radius varies with the angle."""
    cy, cx = centre or tuple(rng.uniform(0.1, 0.9, 2) * side)
    yy, xx = np.mgrid[:side, :side].astype(np.float32)
    angle, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.5, 0.5))
    dy, dx = yy - cy, xx - cx
    u = (dx * np.cos(angle) + dy * np.sin(angle)) * stretch
    v = (-dx * np.sin(angle) + dy * np.cos(angle)) / stretch
    theta, wobble = np.arctan2(v, u), np.ones((side, side), np.float32)
    roughness = rng.uniform(0.03, 0.25)  # from a nearly perfect ellipse to a lobed organ
    for harmonic in range(2, 7):
        wobble += rng.normal(0, roughness / harmonic) * np.cos(harmonic * theta + rng.uniform(0, 2 * np.pi))
    return np.hypot(u, v) < radius * np.maximum(wobble, 0.2)


def _organ(rng: Rng, labels: np.ndarray) -> None:
    side = labels.shape[0]
    labels[_blob(rng, side, float(np.exp(rng.uniform(np.log(0.03), np.log(0.25)))) * side)] = _free(labels)


def _ring(rng: Rng, labels: np.ndarray) -> None:
    side = labels.shape[0]
    blob = _blob(rng, side, float(np.exp(rng.uniform(np.log(0.05), np.log(0.22)))) * side)
    depth = ndimage.distance_transform_edt(blob)
    wall = depth.max() * rng.uniform(0.2, 0.6)
    new = _free(labels)
    labels[blob] = new
    if rng.random() < 0.8:
        labels[depth > wall] = new + 1 if rng.random() < 0.7 else 0


def _chambers(rng: Rng, labels: np.ndarray) -> None:
    """A walled cavity and a neighbour that hugs its wall, as ventricles, joints and follicles do."""
    side = labels.shape[0]
    centre = rng.uniform(0.2, 0.8, 2) * side
    radius = float(np.exp(rng.uniform(np.log(0.06), np.log(0.18)))) * side
    outer = _blob(rng, side, radius, centre=(centre[0], centre[1]))
    depth = ndimage.distance_transform_edt(outer)
    away, angle = radius * rng.uniform(0.5, 1.2), rng.uniform(0, 2 * np.pi)
    beside = (float(centre[0] + away * np.sin(angle)), float(centre[1] + away * np.cos(angle)))
    new = _free(labels)
    labels[_blob(rng, side, radius * rng.uniform(0.7, 1.3), centre=beside)] = new + 2
    labels[outer] = new
    labels[depth > depth.max() * rng.uniform(0.15, 0.6)] = new + 1


def _crescent(rng: Rng, labels: np.ndarray) -> None:
    """A blob without the blob that bites into it."""
    side = labels.shape[0]
    centre, radius, angle = rng.uniform(0.15, 0.85, 2) * side, rng.uniform(0.05, 0.2) * side, rng.uniform(0, 2 * np.pi)
    bite = centre + radius * rng.uniform(0.3, 0.9) * np.array([np.sin(angle), np.cos(angle)])
    whole = _blob(rng, side, radius, centre=(centre[0], centre[1]))
    labels[whole & ~_blob(rng, side, radius * rng.uniform(0.7, 1.1), centre=(bite[0], bite[1]))] = _free(labels)


def _tube(rng: Rng, labels: np.ndarray) -> None:
    side, steps = labels.shape[0], int(rng.integers(20, 120))
    heading = np.cumsum(rng.normal(0, 0.15, steps)) + rng.uniform(0, 2 * np.pi)
    path = rng.uniform(0.1, 0.9, 2) * side + np.cumsum(np.stack([np.sin(heading), np.cos(heading)], 1), 0) * side / 128
    path = path[((path >= 0) & (path < side - 1)).all(1)].astype(int)
    line = np.ones((side, side), bool)
    line[path[:, 0], path[:, 1]] = False
    if len(path):
        labels[ndimage.distance_transform_edt(line) < rng.uniform(0.008, 0.035) * side] = _free(labels)


def _parts(rng: Rng, labels: np.ndarray) -> None:
    side, new = labels.shape[0], _free(labels)
    for _ in range(int(rng.integers(2, 5))):
        labels[_blob(rng, side, rng.uniform(0.02, 0.08) * side)] = new


def _tiny(rng: Rng, labels: np.ndarray) -> None:
    side = labels.shape[0]
    for _ in range(int(rng.integers(1, 6))):
        labels[_blob(rng, side, rng.uniform(0.012, 0.03) * side)] = min(_free(labels), 250)


def _sheet(rng: Rng, labels: np.ndarray) -> None:
    field = _noise(rng, labels.shape[0], rng.uniform(0.2, 0.5) * labels.shape[0])
    near = _blob(rng, labels.shape[0], rng.uniform(0.1, 0.3) * labels.shape[0])
    labels[(np.abs(field) < rng.uniform(0.05, 0.15)) & near] = _free(labels)


def _render(rng: Rng, labels: np.ndarray) -> np.ndarray:
    side, count = labels.shape[0], int(labels.max()) + 1
    spread = float(np.exp(rng.uniform(np.log(0.06), np.log(0.35))))  # contrast between regions, from faint to strong
    means = np.clip(0.5 + rng.normal(0, spread, count), 0, 1).astype(np.float32)
    for region in range(1, count):  # some regions look like another one, so that only a wall tells them apart
        if rng.random() < 0.2:
            means[region] = means[int(rng.integers(count))]
    if rng.random() < 0.5:
        means[0] = rng.uniform(0, 0.15)
    if rng.random() < 0.5:
        labels = _inclusions(rng, labels, count)
        means = np.append(means, np.clip(0.5 + rng.normal(0, 0.25, 3), 0, 1)).astype(np.float32)
        count += 3
    image = ndimage.gaussian_filter(means[labels], rng.uniform(0.3, 1.8))
    for _ in range(int(rng.integers(1, 3))):  # tissue texture, stronger in some regions than in others
        weight = rng.uniform(0, 1, count).astype(np.float32)[labels]
        image += rng.uniform(0, 0.1) * weight * _noise(rng, side, float(np.exp(rng.uniform(0.7, 3.2))))
    image = _acquire(rng, image, spread)
    low, high = np.percentile(image, [0.5, 99.5])
    image = np.clip((image - low) / max(high - low, 1e-3), 0, 1)
    return (_colour(rng, image, labels, count) * 255).astype(np.uint8)


def _inclusions(rng: Rng, labels: np.ndarray, count: int) -> np.ndarray:
    """What shows in the image and is no object of its own: vessels in an organ, papillary muscles, calcium."""
    shown = labels.astype(np.int32)
    for _ in range(int(rng.integers(2, 14))):
        spot = _blob(rng, labels.shape[0], rng.uniform(0.005, 0.03) * labels.shape[0])
        shown[spot] = count + int(rng.integers(3))
    return shown


def _acquire(rng: Rng, image: np.ndarray, spread: float) -> np.ndarray:
    """What a scanner adds: bias field, speckle or noise (up to the contrast itself), blur and lost resolution."""
    side = image.shape[0]
    if rng.random() < 0.4:
        image = image * (1 + 0.25 * _noise(rng, side, 0.6 * side))
    if rng.random() < 0.2:  # ultrasound-like speckle is multiplicative and has a grain of a few pixels
        grain = ndimage.gaussian_filter(rng.rayleigh(1.0, image.shape), rng.uniform(0.6, 1.6))
        image = image * (1 + rng.uniform(0.4, 1.2) * (grain / grain.mean() - 1))
    noise = rng.normal(0, rng.uniform(0, min(0.1, 0.8 * spread)), image.shape)
    if rng.random() < 0.3:
        noise = ndimage.gaussian_filter(noise, 1.0) * 2
    image = image + noise
    if rng.random() < 0.4:
        factor = rng.uniform(1.5, 5)
        small = ndimage.zoom(ndimage.gaussian_filter(image, factor / 3), 1 / factor, order=1)
        image = ndimage.zoom(small, side / np.array(small.shape), order=1)[:side, :side]
    return np.asarray(image, np.float32)


def _colour(rng: Rng, image: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """``(H, W, 3)``: mostly grey, sometimes a stain-like tint per region."""
    rgb = np.repeat(image[..., None], 3, 2)
    if rng.random() < 0.15:
        tint = rng.uniform(0.4, 1.0, (count, 3)).astype(np.float32)
        rgb = rgb * ndimage.gaussian_filter(tint[labels], (1, 1, 0))
    return np.clip(rgb, 0, 1)
