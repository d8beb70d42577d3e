"""The engine with the random ``tiny`` backbone: purity, caching, threads, prompts; quality is tested elsewhere."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.engine import Engine, SegmentOptions
from lib.errors import ConfigError, PromptError, VolumeError
from lib.propagate import StopRule
from lib.settings import AppSettings
from lib.types import Box, Click, UserPrompts

ALONE = SegmentOptions(propagate=False)


def make_engine(folder: Path, **conf: str) -> Engine:
    return Engine(AppSettings.from_conf({"backbone": "tiny", "cache_dir": str(folder / "cache"), **conf}))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(tmp_path, prefetch="false")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(rng.normal(size=(40, 30, 8)).astype(np.float32), np.diag([1, 1, 3, 1.0])), path)
    return path


def clicks(*ijk: tuple[int, int, int]) -> UserPrompts:
    return UserPrompts(tuple(Click(p) for p in ijk))


def test_segment_repeated_request_is_identical_and_hits_the_cache(engine: Engine, image: Path) -> None:
    volume = engine.open(image)
    first = engine.segment(volume, clicks((20, 15, 4)), ALONE)
    again = engine.segment(volume, clicks((20, 15, 4)), ALONE)
    assert first.cache == {"misses": 1}
    assert again.cache == {"memory_hits": 1}
    assert np.array_equal(first.mask, again.mask)
    assert first.quality == again.quality


def test_segment_is_the_same_from_memory_disk_and_encoder(tmp_path: Path, image: Path) -> None:
    cold = make_engine(tmp_path, prefetch="false")
    first = cold.segment(cold.open(image), clicks((20, 15, 4)), ALONE)
    warm = make_engine(tmp_path, prefetch="false")
    second = warm.segment(warm.open(image), clicks((20, 15, 4)), ALONE)
    assert second.cache == {"disk_hits": 1}
    assert np.array_equal(first.mask, second.mask)
    assert first.quality == second.quality


def test_segment_removed_click_gives_the_answer_without_it(engine: Engine, image: Path) -> None:
    volume = engine.open(image)
    one = engine.segment(volume, clicks((20, 15, 4)), ALONE)
    two = engine.segment(volume, clicks((20, 15, 4), (5, 5, 4)), ALONE)
    back = engine.segment(volume, clicks((20, 15, 4)), ALONE)
    assert one.quality != two.quality
    assert np.array_equal(one.mask, back.mask)


def test_segment_without_propagation_touches_prompted_slices_only(engine: Engine, image: Path) -> None:
    volume = engine.open(image)
    found = engine.segment(volume, clicks((20, 15, 2), (20, 15, 6)), ALONE)
    assert sorted(found.quality) == [2, 6]
    assert set(np.unique(np.nonzero(found.mask)[2])) <= {2, 6}
    assert found.prompted == (2, 6)
    assert found.mask.shape == (40, 30, 8)
    assert found.mask.dtype == np.uint8


@pytest.mark.parametrize(("axis", "index"), [("i", 20), ("j", 15), ("k", 4)])
def test_segment_along_each_axis(engine: Engine, image: Path, axis: str, index: int) -> None:
    found = engine.segment(engine.open(image), clicks((20, 15, 4)), SegmentOptions(axis=axis, propagate=False))
    assert found.axis == "ijk".index(axis)
    assert list(found.quality) == [index]


def test_segment_propagates_both_ways(engine: Engine, image: Path) -> None:
    never_stop(engine)
    found = engine.segment(engine.open(image), clicks((20, 15, 4)))
    assert sorted(found.quality) == list(range(8))


@pytest.mark.parametrize(
    ("box", "reached"), [(Box((5, 5, 4), (30, 25, 5)), range(8)), (Box((5, 5, 2), (30, 25, 6)), range(2, 6))]
)
def test_segment_flat_box_walks_everywhere_and_a_3d_box_inside_itself(
    engine: Engine, image: Path, box: Box, reached: range
) -> None:
    never_stop(engine)
    found = engine.segment(engine.open(image), UserPrompts(boxes=(box,)))
    assert sorted(found.quality) == list(reached)


def never_stop(engine: Engine) -> None:
    """Masks that are never empty and a rule that is never broken."""
    engine.rule = StopRule(quality=0, overlap=0, growth=1e9)
    engine.warm().mask_decoder.pred_obj_score_head = _Constant(5.0)  # type: ignore[assignment]
    engine.warm().mask_decoder.output_hypernetworks_mlps = torch.nn.ModuleList(_Loud() for _ in range(4))


class _Constant(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :1] * 0 + self.value


class _Loud(torch.nn.Module):
    """A hypernetwork whose mask is never empty: it follows the features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(x), x.shape[1] // 8)


def test_segment_window_changes_the_answer_and_the_key(engine: Engine, image: Path) -> None:
    plain = engine.segment(engine.open(image), clicks((20, 15, 4)), ALONE)
    other = engine.segment(engine.open(image), clicks((20, 15, 4)), replace(ALONE, window=(-0.5, 0.5)))
    assert other.cache == {"misses": 1}
    assert other.window is not None
    assert (other.window.lo, other.window.hi) == (-0.5, 0.5)
    assert plain.quality != other.quality


def test_open_reads_again_only_when_the_file_changed(engine: Engine, image: Path) -> None:
    first = engine.open(image)
    assert engine.open(image) is first
    os.utime(image, ns=(1, 1))
    assert engine.open(image) is not first


def test_open_reads_again_when_a_file_that_belongs_to_the_image_changed(engine: Engine, tmp_path: Path) -> None:
    voxels = np.arange(60, dtype=np.uint8)
    voxels.tofile(tmp_path / "x.raw")
    head = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 3 4 5\nencoding: raw\ndata file: x.raw\n"
    (tmp_path / "x.nhdr").write_text(head)
    first = engine.open(tmp_path / "x.nhdr")
    assert engine.open(tmp_path / "x.nhdr") is first
    np.flip(voxels).tofile(tmp_path / "x.raw")
    os.utime(tmp_path / "x.raw", (1, 1))
    assert engine.open(tmp_path / "x.nhdr").content_hash != first.content_hash


def test_open_missing_file_says_so(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="cannot be found"):
        engine.open(tmp_path / "nothing.nii.gz")


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        (UserPrompts(), ALONE, "received none"),
        (UserPrompts((Click((1, 1, 1), positive=False),)), ALONE, "negative clicks only"),
        (clicks((40, 0, 0)), ALONE, "received"),
        (clicks((1, 1, 1)), SegmentOptions(axis="z"), "slice axis"),
        (clicks((1, 1, 1), (1, 1, 2)), SegmentOptions(planar=True), "one slice"),
    ],
)
def test_segment_refuses(engine: Engine, image: Path, prompts: UserPrompts, options: SegmentOptions, text: str) -> None:
    with pytest.raises(PromptError, match=text):
        engine.segment(engine.open(image), prompts, options)


def test_segment_negative_slice_without_propagation_warns(engine: Engine, image: Path) -> None:
    prompts = UserPrompts((Click((20, 15, 4)), Click((3, 3, 6), positive=False)))
    found = engine.segment(engine.open(image), prompts, ALONE)
    assert list(found.quality) == [4]
    assert "[6]" in found.warnings[0]


def test_segment_box_alone_covers_its_slices(engine: Engine, image: Path) -> None:
    found = engine.segment(engine.open(image), UserPrompts(boxes=(Box((5, 5, 2), (30, 25, 5)),)), ALONE)
    assert sorted(found.quality) == [2, 3, 4]


def test_segment_many_threads_encode_each_slice_once(tmp_path: Path, image: Path) -> None:
    engine = make_engine(tmp_path, prefetch="false")
    volume, encoded = engine.open(image), []
    backbone: Any = engine.warm()
    encode = backbone.encode
    backbone.encode = lambda *a, **k: encoded.append(threading.get_ident()) or encode(*a, **k)  # type: ignore
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: engine.segment(volume, clicks((20, 15, 4)), ALONE).mask, range(16)))
    assert len(encoded) == 1
    assert all(np.array_equal(answers[0], a) for a in answers)


def test_prefetch_encodes_neighbours_nearest_first(tmp_path: Path, image: Path) -> None:
    engine = make_engine(tmp_path, prefetch_slices="2")
    volume, order = engine.open(image), []
    features = engine.features
    engine.features = lambda v, a, i: order.append(i) or features(v, a, i)  # type: ignore
    engine.segment(volume, clicks((20, 15, 4)), ALONE)
    assert engine.wait_for_background(20)
    assert order[0] == 4
    assert set(order[1:3]) == {3, 5}
    assert set(order[3:]) == {2, 6}
    assert engine.segment(volume, clicks((20, 15, 5)), ALONE).cache == {"memory_hits": 1}


def test_info_counts_and_names_the_weights(engine: Engine, image: Path) -> None:
    assert engine.info()["weights_id"] is None
    engine.segment(engine.open(image), clicks((20, 15, 4)), ALONE)
    info = engine.info()
    assert info["backbone"] == "tiny"
    assert info["weights_id"] == "random-0"
    assert info["cache"]["misses"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU whose absence is tested")
def test_device_missing_gpu_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="usable CUDA GPUs: 0"):
        make_engine(tmp_path, device="cuda").warm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_segment_on_gpu_agrees_with_cpu(tmp_path: Path, image: Path) -> None:
    found = [
        (e := make_engine(tmp_path / d, prefetch="false", device=d)).segment(e.open(image), clicks((20, 15, 4)), ALONE)
        for d in ("cpu", "cuda")
    ]
    assert found[0].quality[4] == pytest.approx(found[1].quality[4], abs=1e-2)


def test_engine_is_freed_after_background_work(tmp_path: Path, image: Path) -> None:
    engine = make_engine(tmp_path)
    engine.segment(engine.open(image), clicks((20, 15, 4)), ALONE)
    assert engine.wait_for_background(20)
    thread, gone = engine._background._thread, weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert thread is not None
    assert not thread.is_alive()


def test_any_next_request_ends_the_prefetch_of_the_last(tmp_path: Path, image: Path) -> None:
    engine = make_engine(tmp_path, prefetch="false")
    begun, release, done = threading.Event(), threading.Event(), []
    engine._background.replace([lambda: (begun.set(), release.wait(10)), lambda: done.append("old")])
    assert begun.wait(10)
    engine.segment(engine.open(image), clicks((20, 15, 4)), SegmentOptions(planar=True))
    release.set()
    assert engine.wait_for_background(10)
    assert not done


def test_prefetch_leaves_the_counters_to_clicks(tmp_path: Path, image: Path) -> None:
    engine = make_engine(tmp_path)
    volume = engine.open(image)
    for _ in range(3):
        engine.segment(volume, clicks((20, 15, 4)), ALONE)
        assert engine.wait_for_background(20)
    counts = engine.info()["cache"]
    assert (counts["misses"], counts["memory_hits"], counts["disk_hits"]) == (1, 2, 0)
    assert counts["slices"] == 8


def test_prefetch_takes_at_most_half_the_memory(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, cache_memory_mb="1", prefetch_slices="1000")
    path = tmp_path / "long.nii.gz"
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.normal(size=(16, 16, 400)).astype(np.float32), np.diag([1, 1, 3, 1.0])), path)
    volume = engine.open(path)
    engine.segment(volume, clicks((8, 8, 200)), ALONE)
    assert engine.wait_for_background(120)
    assert engine.segment(volume, clicks((8, 8, 200)), ALONE).cache == {"memory_hits": 1}
    assert 1 < engine.info()["cache"]["slices"] < 400


def test_follow_with_a_box_that_the_walk_misses_uses_the_box(engine: Engine, image: Path) -> None:
    prompts = UserPrompts((Click((35, 25, 6)),), (Box((1, 1, 2), (8, 8, 5)),))
    seen: list[torch.Tensor] = []
    embed = engine.warm().embed_prompts
    engine.warm().embed_prompts = lambda p, *a: seen.append(p.boxes_xy) or embed(p, *a)  # type: ignore
    never_stop(engine)
    engine.segment(engine.open(image), prompts)
    boxes = torch.cat([b for b in seen if b is not None])
    assert (boxes[:, :2] < boxes[:, 2:]).all()


def test_features_of_another_backbone_or_with_taps_have_entries_of_their_own(engine: Engine, image: Path) -> None:
    volume, plain = engine.open(image), engine.warm()
    adapted: Any = copy.deepcopy(plain)
    adapted.weights_id = "adapted"
    with torch.no_grad():
        next(adapted.parameters()).mul_(2.0)
    sources = [
        engine.features(volume, 2, 4, backbone, taps)[1]
        for backbone, taps in ((None, ()), (plain, ()), (adapted, ()), (plain, ("stride8",)), (adapted, ()))
    ]
    assert sources == ["misses", "memory_hits", "misses", "misses", "memory_hits"]
    own, other = engine.features(volume, 2, 4)[0], engine.features(volume, 2, 4, adapted)[0]
    assert not torch.equal(own.embed, other.embed)
    assert engine.features(volume, 2, 4, plain, ("stride8",))[0].taps["stride8"].shape == (1, 16, 8, 8)


def test_stack_is_the_slices_one_by_one(engine: Engine, image: Path) -> None:
    volume, backbone = engine.open(image), engine.warm()
    engine.features(volume, 2, 3)
    together, sources = engine.stack(volume, 2, range(2, 6), backbone)
    assert sources == {"memory_hits": 1, "misses": 3}
    for n, index in enumerate(range(2, 6)):
        one = engine.features(volume, 2, index)[0]
        row = together.row(n)
        assert torch.equal(row.embed, one.embed)
        assert row.high_res is not None and one.high_res is not None
        assert all(torch.equal(a, b) for a, b in zip(row.high_res, one.high_res))
