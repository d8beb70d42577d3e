"""The caches: computed once, bounded, exact on disk."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from lib.cache import DiskTier, EmbeddingCache, EmbeddingKey, Lru
from lib.contracts import Features

PE = torch.zeros(1, 16, 2, 2)


def key(index: int = 0, **changes: object) -> EmbeddingKey:
    values = {"content_hash": "c", "axis": 2, "index": index, "window": "0:1", "weights_id": "w", "backbone": "tiny:64"}
    return EmbeddingKey(**{**values, **changes})  # type: ignore[arg-type]


def tensors() -> dict[str, torch.Tensor]:
    return {"embed": torch.full((1, 16, 2, 2), 0.1)}


def features(value: float = 0.1, high: bool = True) -> Features:
    maps = (torch.full((1, 2, 8, 8), value), torch.full((1, 4, 4, 4), value)) if high else None
    return Features(torch.full((1, 16, 2, 2), value), PE, maps)


def test_lru_concurrent_requests_compute_once() -> None:
    made, barrier = [], threading.Barrier(8)
    cache: Lru[int] = Lru(100, lambda _: 1)

    def make() -> int:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return 7

    def ask(out: list[int]) -> None:
        barrier.wait()
        out.append(cache.get_or_make("k", make)[0])

    answers: list[int] = []
    threads = [threading.Thread(target=ask, args=(answers,)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == [7] * 8
    assert len(made) == 1


def test_lru_failure_reaches_caller_and_is_not_kept() -> None:
    cache: Lru[int] = Lru(10, lambda _: 1)

    def fail() -> int:
        raise ValueError("broken slice")

    with pytest.raises(ValueError, match="broken slice"):
        cache.get_or_make("k", fail)
    assert cache.get_or_make("k", lambda: 3) == (3, False)


def test_lru_limit_drops_least_recently_used() -> None:
    cache: Lru[int] = Lru(30, lambda v: v)
    cache.get_or_make("a", lambda: 10)
    cache.get_or_make("b", lambda: 10)
    cache.get_or_make("a", lambda: 10)  # used again
    cache.get_or_make("c", lambda: 15)
    assert [k in cache for k in "abc"] == [True, False, True]
    assert cache.size == 25


def test_lru_value_above_limit_leaves_the_others_alone() -> None:
    cache: Lru[int] = Lru(5, lambda v: v)
    cache.get_or_make("a", lambda: 3)
    cache.get_or_make("large", lambda: 6)
    assert "a" in cache and "large" not in cache and cache.size == 3


def test_lru_keeps_the_newest_whatever_its_size_where_asked_to() -> None:
    cache: Lru[int] = Lru(5, lambda v: v, least=1)
    cache.get_or_make("a", lambda: 3)
    cache.get_or_make("large", lambda: 6)
    assert "a" not in cache and cache.get_or_make("large", lambda: 0) == (6, True)
    cache.get_or_make("b", lambda: 1)
    assert "b" in cache and "large" not in cache and cache.size == 1


def test_lru_value_above_limit_is_answered_but_not_kept() -> None:
    cache: Lru[int] = Lru(5, lambda v: v)
    assert cache.get_or_make("big", lambda: 9) == (9, False)
    assert len(cache) == 0
    assert cache.size == 0


@pytest.mark.parametrize("high", [True, False])
def test_embedding_cache_survives_restart_bit_equal(tmp_path: Path, high: bool) -> None:
    first, source = EmbeddingCache(1 << 20, tmp_path, 1 << 20).get(key(), lambda: features(1 / 3, high), PE)
    assert source == "misses"
    assert first.embed.dtype == torch.float16

    def never() -> Features:
        raise AssertionError("the encoder ran although the slice lies on disk")

    again, source = EmbeddingCache(1 << 20, tmp_path, 1 << 20).get(key(), never, PE)
    assert source == "disk_hits"
    assert torch.equal(first.embed, again.embed)
    assert (again.high_res is None) == (not high)


def test_embedding_cache_keeps_taps_through_a_restart(tmp_path: Path) -> None:
    tapped = Features(torch.zeros(1, 16, 2, 2), PE, None, {"stride8": torch.full((1, 4, 4, 4), 0.5)})
    EmbeddingCache(1 << 20, tmp_path, 1 << 20).get(key(), lambda: tapped, PE)
    again, source = EmbeddingCache(1 << 20, tmp_path, 1 << 20).get(key(), features, PE)
    assert source == "disk_hits"
    assert list(again.taps) == ["stride8"] and torch.equal(again.taps["stride8"], tapped.taps["stride8"].half())


def test_embedding_cache_knows_what_is_in_memory(tmp_path: Path) -> None:
    cache = EmbeddingCache(1 << 20, tmp_path, 0)
    assert key() not in cache
    cache.get(key(), features, PE)
    assert key() in cache and key(1) not in cache


@pytest.mark.parametrize(
    "change",
    [{"content_hash": "d"}, {"axis": 1}, {"index": 5}, {"window": "0:2"}, {"weights_id": "x"}, {"backbone": "y"}],
)
def test_embedding_key_each_part_changes_digest(change: dict) -> None:
    assert key(**change).digest() != key().digest()


def test_disk_tier_damaged_file_is_a_miss(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 20)
    disk.write("a", tensors())
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    assert disk.read("a") is None


def test_disk_tier_limit_deletes_oldest(tmp_path: Path) -> None:
    one = DiskTier(tmp_path / "size", 1 << 20)
    one.write("x", tensors())
    size = one.size()
    disk = DiskTier(tmp_path / "cache", int(size * 3.5))
    for n in range(6):
        disk.write(str(n), tensors())
        time.sleep(0.02)
    left = sorted(p.stem for p in (tmp_path / "cache").glob("*.safetensors"))
    assert sum(p.stat().st_size for p in (tmp_path / "cache").iterdir()) <= size * 3.5
    assert "5" in left
    assert "0" not in left


def test_disk_tier_unwritable_folder_does_not_fail(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    cache = EmbeddingCache(1 << 20, blocked / "cache", 1 << 20)
    assert cache.get(key(), features, PE)[1] == "misses"
    assert cache.get(key(), features, PE)[1] == "memory_hits"


def test_info_counts(tmp_path: Path) -> None:
    cache = EmbeddingCache(1 << 20, tmp_path, 0)
    for index in (0, 0, 1):
        cache.get(key(index), features, PE)
    info = cache.info()
    assert (info["misses"], info["memory_hits"], info["slices"]) == (2, 1, 2)
    assert info["memory_bytes"] == 2 * 2 * (64 + 128 + 64)
