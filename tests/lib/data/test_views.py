import numpy as np
import pytest
import torch

from lib.data import views
from lib.data.views import MOVES, Moves, augmented

SEEDS = range(80)


def blob(height=96, width=72):
    """An ellipse off the centre, smooth at its edge, and its mask."""
    rows, columns = np.mgrid[:height, :width]
    inside = 1 - ((rows - height * 0.45) / (height * 0.2)) ** 2 - ((columns - width * 0.55) / (width * 0.25)) ** 2
    return np.clip(inside * 3 + 0.5, 0, 1).astype(np.float32), (inside > 0).astype(np.uint8)


def only(monkeypatch, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(views, name, value)


def test_views_keep_image_and_target_together():
    pixels, target = blob()
    for seed in SEEDS:
        moved, classes = augmented(pixels, target, seed)
        assert moved.shape == classes.shape == target.shape
        assert (moved.dtype, classes.dtype) == (np.float32, np.uint8)
        assert moved.min() >= 0 and moved.max() <= 1
        inside = (moved > 0.5).astype(np.uint8)
        assert (inside != classes).mean() < 0.01


def test_view_of_a_target_as_image_is_the_target_away_from_edges():
    target = (np.indices((64, 80)) // 16).sum(0).astype(np.uint8) % 4
    for seed in SEEDS:
        moved, classes = augmented(target / 3, target, seed)
        nearest = np.abs(moved * 3 - classes)
        assert np.median(nearest) < 1e-3  # only pixels across an edge are mixed
        assert (nearest < 0.51).mean() > 0.75
        assert set(np.unique(classes)) <= {0, 1, 2, 3}


def test_view_of_colour_moves_every_channel_alike():
    pixels, target = blob()
    moved, _ = augmented(np.stack([pixels, pixels * 0.5, pixels * 0], -1), target, 5)
    grey, _ = augmented(pixels, target, 5)
    np.testing.assert_allclose(moved, np.stack([grey, grey * 0.5, grey * 0], -1), atol=1e-6)


def test_views_are_equal_for_equal_seeds_and_leave_their_input_and_global_generators_alone():
    pixels, target = blob()
    before = (pixels.copy(), target.copy(), torch.get_rng_state(), np.random.get_state()[1].copy())
    first = [augmented(pixels, target, seed, Moves(intensity=True)) for seed in SEEDS]
    again = [augmented(pixels, target, seed, Moves(intensity=True)) for seed in SEEDS]
    for (a, b), (c, d) in zip(first, again):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)
    assert len({a.tobytes() for a, _ in first}) > 0.9 * len(SEEDS)
    after = (pixels, target, torch.get_rng_state(), np.random.get_state()[1])
    assert all(np.array_equal(x, y) for x, y in zip(before, after))


def test_view_without_any_move_is_the_slice(monkeypatch):
    only(monkeypatch, PROBABILITY=0.0)
    pixels, target = blob()
    moved, classes = augmented(pixels, target, 3)
    np.testing.assert_allclose(moved, pixels, atol=2e-5)
    np.testing.assert_array_equal(classes, target)


def test_views_by_flips_alone_are_exact_and_each_happens():
    flips = Moves(rotation=0.0, shift=0.0, crop=1.0)
    pixels, target = blob(31, 48)
    target[3, 5] = 7
    seen = []
    for seed in range(40):
        _, classes = augmented(pixels, target, seed, flips)
        equal = [
            k for k, f in enumerate([(1, 1), (-1, 1), (1, -1), (-1, -1)]) if (classes == target[:: f[0], :: f[1]]).all()
        ]
        assert len(equal) == 1
        seen += equal
    assert min(seen.count(k) for k in range(4)) >= 3


def moves(seed, size=(100, 200)):
    return views._matrix(np.random.default_rng(seed), size, MOVES["paper"])


def test_moves_stay_in_the_papers_ranges_and_come_half_of_the_time():
    matrices = np.array([moves(seed) for seed in range(2000)])
    sides = np.sqrt(np.abs(np.linalg.det(matrices[:, :2, :2])))
    cropped = sides < 1 - 1e-9
    assert sides.min() >= 0.8 - 1e-9 and sides.max() <= 1 + 1e-9
    assert cropped.mean() == pytest.approx(0.5, abs=0.04)
    plain = matrices[~cropped]
    angles = np.degrees(np.arccos(np.clip(np.abs(plain[:, 0, 0]), 0, 1)))
    assert (angles > 1e-6).mean() == pytest.approx(0.5, abs=0.05)
    assert angles.max() > 80
    back = np.linalg.inv(plain[:, :2, :2]) @ plain[:, :2, 2:]  # in the frame before turning and flipping
    shifts = np.abs(back[:, :, 0]) / (100, 200)
    assert shifts.max() <= 0.2 + 1e-9
    assert (shifts.max(1) > 1e-9).mean() == pytest.approx(0.5, abs=0.05)
    assert (np.linalg.det(matrices[:, :2, :2]) < 0).mean() == pytest.approx(0.5, abs=0.04)


def test_crops_alone_stay_inside_the_slice():
    crops = Moves(rotation=0.0, shift=0.0)
    pixels, target = np.ones((40, 60), np.float32), np.ones((40, 60), np.uint8)
    for seed in SEEDS:
        moved, classes = augmented(pixels, target, seed, crops)
        assert moved.min() > 0.49 and classes.all()


def test_view_outside_the_slice_is_zero(monkeypatch):
    only(monkeypatch, PROBABILITY=1.1)
    moves = Moves(rotation=0.0, crop=1.0)
    ones = np.ones((64, 64), np.float32)
    for seed in range(20):
        moved, classes = augmented(ones, ones.astype(np.uint8), seed, moves)
        assert (classes != (moved > 0.5)).sum() <= 1  # the corner, where two borders fade
        rows, columns = classes.any(1).sum(), classes.any(0).sum()
        assert min(rows, columns) >= 64 * 0.8 - 1 and classes.sum() == rows * columns
        assert (moved == 0).sum() >= 64 * 64 - (rows + 1) * (columns + 1)


def test_intensity_is_an_option_that_leaves_geometry_and_black_alone():
    pixels, target = blob()
    changed = 0
    for seed in SEEDS:
        (plain, classes), (moved, same) = augmented(pixels, target, seed), augmented(
            pixels, target, seed, Moves(intensity=True)
        )
        np.testing.assert_array_equal(classes, same)
        assert (moved[plain == 0] == 0).all() and moved.max() <= 1
        assert np.abs(moved - plain).max() < 0.22
        changed += not np.array_equal(moved, plain)
    assert changed / len(SEEDS) == pytest.approx(0.3, abs=0.1)


def test_mild_views_keep_the_orientation():
    for seed in range(300):
        matrix = views._matrix(np.random.default_rng(seed), (100, 200), MOVES["mild"])
        assert np.linalg.det(matrix[:2, :2]) > 0
        assert abs(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))) <= 15 + 1e-9
