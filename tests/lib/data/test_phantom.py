import hashlib

import numpy as np
import pytest

from lib.data.phantom import make_phantom, write_demo_study
from lib.data.volume import load_volume
from lib.types import WindowSource


@pytest.fixture(scope="module")
def phantom():
    return make_phantom((64, 64, 20))


def test_make_phantom_shapes_types_and_names(phantom):
    hu, labels, names = phantom
    assert hu.shape == labels.shape == (64, 64, 20)
    assert (hu.dtype, labels.dtype) == (np.float32, np.uint8)
    assert set(np.unique(labels)) == {0, *names.values()}


def test_make_phantom_has_plausible_hounsfield_units(phantom):
    hu, labels, names = phantom
    means = {name: hu[labels == value].mean() for name, value in names.items()}
    assert hu.min() >= -1024
    assert 80 < means["liver"] < 130
    assert 120 < means["right kidney"] < 200
    assert 140 < means["aorta"] < 240
    assert means["spine"] > means["liver"]


def test_make_phantom_lies_as_a_patient(phantom):
    _, labels, names = phantom
    middle = {name: np.argwhere(labels == value).mean(axis=0) for name, value in names.items()}
    assert middle["liver"][0] < 32 < middle["left kidney"][0]
    assert middle["right kidney"][0] < middle["spine"][0] < middle["left kidney"][0]
    assert middle["aorta"][1] < middle["spine"][1]


def test_make_phantom_is_deterministic_in_the_seed(phantom):
    again, other = make_phantom((64, 64, 20)), make_phantom((64, 64, 20), seed=1)
    assert np.array_equal(again[0], phantom[0])
    assert not np.array_equal(other[1], phantom[1])


def test_write_demo_study_is_readable_and_reproducible(tmp_path):
    first, second = write_demo_study(tmp_path / "a"), write_demo_study(tmp_path / "b")
    assert [p.name for p in first] == ["phantom_1.nii.gz", "phantom_2.nii.gz", "phantom_picture.png"]
    assert sorted(tmp_path.joinpath("a").iterdir()) == sorted(first)
    for a, b in zip(first, second):
        assert hashlib.sha256(a.read_bytes()).digest() == hashlib.sha256(b.read_bytes()).digest()
    volumes = [load_volume(p) for p in first]
    assert volumes[0].window.source is WindowSource.PRESET
    assert volumes[0].spacing_mm == pytest.approx((1.9, 1.9, 5.0))
    assert volumes[0].content_hash != volumes[1].content_hash
    assert volumes[2].is_2d
