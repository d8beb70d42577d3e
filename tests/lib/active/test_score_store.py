"""Scores on disk: what is written is read, nothing else is, and no name of an image is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.active.store import CaseScore, ScoreStore, digest_of
from lib.errors import VolumeError

SCORE = CaseScore({"liver": 0.75}, 0.125, (0.5, -1.0), "abc")


def test_scores_come_back_by_version(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores")
    assert store.read("v0001-a", {"x"}) == {}
    store.write("v0001-a", "x", SCORE)
    store.write("v0002-b", "y", CaseScore())
    assert store.read("v0001-a", {"x", "y"}) == {"x": SCORE}
    assert store.read("v0002-b", {"y"})["y"].failed
    store.keep_only({"v0002-b"})
    assert store.read("v0001-a", {"x"}) == {} and store.read("v0002-b", {"y"})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"raw": {}, "disagreement": null, "embedding": ["a"], "content": ""}',
     '{"raw": {"a": NaN}, "disagreement": null, "embedding": [1], "content": ""}',
     '{"raw": {}, "disagreement": null, "embedding": [1], "content": "", "more": 1}',
     '{"raw": [0.5], "disagreement": null, "embedding": [1], "content": ""}',
     '{"raw": null, "disagreement": null, "embedding": [1], "content": ""}',
     '{"raw": {}, "disagreement": null, "embedding": "12", "content": ""}',
     '{"raw": {}, "disagreement": null, "embedding": [1], "content": 5}',
     '{"raw": {}, "disagreement": 1' + "0" * 400 + ', "embedding": [1], "content": ""}'],
)  # fmt: skip
def test_a_damaged_file_counts_as_none(tmp_path: Path, text: str) -> None:
    store = ScoreStore(tmp_path)
    store.write("k", "x", SCORE)
    (tmp_path / "k" / "x.json").write_text(text)
    assert store.read("k", {"x"}) == {}


def test_digest_follows_the_file_and_hides_its_name(tmp_path: Path) -> None:
    file = tmp_path / "miller_john.nii.gz"
    file.write_bytes(b"one")
    first = digest_of("miller_john", file)
    assert first == digest_of("miller_john", file) and "miller" not in first
    assert first != digest_of("other", file)
    os.utime(file, ns=(1, 1))
    assert first != digest_of("miller_john", file)
    file.unlink()
    with pytest.raises(VolumeError, match="its file is gone"):
        digest_of("miller_john", file)
