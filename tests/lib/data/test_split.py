import json
import os
import random

import pytest

from lib.data.split import PinnedSplit, acdc_split, hippocampus_split, nuclei_split, organs_split
from lib.errors import ConfigError

HIPPOCAMPUS = [f"hippocampus_{n:03d}.nii.gz" for n in range(120)]
NUCLEI = [f"{n:012x}.png" for n in range(100)]
ACDC = [f"patient{n:03d}_frame{frame:02d}.nii.gz" for n in range(1, 31) for frame in (1, 12)]
PINNED_HIPPOCAMPUS = {"pretrain": "hippocampus_007", "adapt": "hippocampus_006", "test": "hippocampus_001"}
PINNED_ACDC_TEST = ["patient001", "patient007", "patient008", "patient009", "patient017", "patient020"]
PINNED_NUCLEI_TEST = ["003cee89357d", "0121d6759c5a"]


def all_cases(parts):
    return sorted(case for part in parts.values() for case in part)


@pytest.mark.parametrize(
    ("split", "names", "sizes"),
    [
        (hippocampus_split, HIPPOCAMPUS, {"pretrain": 40, "adapt": 50, "test": 30}),
        (nuclei_split, NUCLEI, {"pretrain": 80, "test": 20}),
        (acdc_split, ACDC, {"adapt": 48, "test": 12}),
        (organs_split, ["ct_slab.nii.gz", "ct_torso.nii.gz", "mr_slab.nii.gz"], {"pretrain": 2, "test": 1}),
    ],
)
def test_split_has_exact_sizes_whatever_the_order(split, names, sizes):
    parts = split(names)
    shuffled = random.Random(0).sample(names, len(names))
    assert {part: len(cases) for part, cases in parts.items()} == sizes
    assert all_cases(parts) == sorted(name.split(".")[0] for name in names)
    assert split(shuffled) == split(name.split(".")[0] for name in names) == parts


def test_acdc_split_keeps_both_frames_of_a_patient_together():
    parts = acdc_split(ACDC)
    adapt, test = ({case.split("_")[0] for case in parts[part]} for part in ("adapt", "test"))
    assert (len(adapt), len(test)) == (24, 6)
    assert not adapt & test


def test_organs_split_holds_the_ct_slab_back():
    assert organs_split(["mr_slab.nii.gz", "ct_slab.nii.gz"]) == {"pretrain": ["mr_slab"], "test": ["ct_slab"]}


@pytest.mark.parametrize(
    ("split", "names", "text"),
    [
        (hippocampus_split, HIPPOCAMPUS[:-1], "all 120 hippocampus cases; received 119"),
        (nuclei_split, NUCLEI[:5], "all 100 nuclei images; received 5"),
        (acdc_split, ACDC[2:], "all 30 ACDC patients; received 29"),
    ],
)
def test_split_of_a_partial_list_is_refused(split, names, text):
    with pytest.raises(ConfigError, match=text):
        split(names)


def test_split_of_the_real_data_is_pinned(data_dir):
    def names(folder, ending):
        return [p.name for p in (data_dir / folder).glob(f"*{ending}")]

    hippocampus, acdc = hippocampus_split(names("hippocampus", ".nii.gz")), acdc_split(names("acdc", ".nii.gz"))
    nuclei = nuclei_split(names("nuclei", ".png"))
    assert {part: cases[0] for part, cases in hippocampus.items()} == PINNED_HIPPOCAMPUS
    assert sorted({case.split("_")[0] for case in acdc["test"]}) == PINNED_ACDC_TEST
    assert nuclei["test"][:2] == PINNED_NUCLEI_TEST


def test_pinned_split_never_changes_when_patients_come_or_go(tmp_path):
    """Whatever the order and size of the additions: known parts stay, and both parts are there from the first on."""
    for seed in range(60):
        rng = random.Random(seed)
        patients = [f"patient{rng.randrange(10**6):06d}" for _ in range(rng.randint(2, 40))]
        path, known = tmp_path / f"{seed}.json", {}
        count = 2
        while count <= len(set(patients)):
            given = sorted(set(patients))[:count]
            parts = PinnedSplit(path).assign(rng.sample(given, len(given)))
            assert set(parts) == set(given)
            assert set(parts.values()) == {"train", "val"}
            assert parts.items() >= known.items()
            known = parts
            count += rng.randint(1, 6)
        assert PinnedSplit(path, val=0.9).assign(known) == known
        assert json.loads(path.read_text()) == {"version": 1, "patients": known}


def test_pinned_split_is_by_hash_and_near_its_share(tmp_path):
    patients = [f"p{n}" for n in range(1000)]
    parts = PinnedSplit(tmp_path / "a.json").assign(patients)
    assert 0.16 < list(parts.values()).count("val") / len(parts) < 0.24
    other = PinnedSplit(tmp_path / "b.json")
    for end in (100, 550, 1000):
        grown = other.assign(patients[:end])
    assert grown == parts


@pytest.mark.parametrize(
    ("split", "names", "least", "most"), [(hippocampus_split, HIPPOCAMPUS, 5, 15), (acdc_split, ACDC, 3, 8)]
)
def test_pinned_split_of_a_part_by_rank_keeps_its_share(tmp_path, split, names, least, most):
    """Both are by hash; with one and the same hash the part to adapt on has next to nothing to validate."""
    patients = {case.split("_frame")[0] for case in split(names)["adapt"]}
    parts = PinnedSplit(tmp_path / "split.json").assign(patients)
    assert least <= list(parts.values()).count("val") <= most


def test_pinned_split_of_two_patients_is_pinned(tmp_path):
    assert PinnedSplit(tmp_path / "new" / "split.json").assign(["patient001", "patient002", "patient002"]) == {
        "patient001": "val",
        "patient002": "train",
    }


@pytest.mark.parametrize(("val", "forced"), [(0.0, "val"), (1.0, "train")])
def test_pinned_split_forces_one_patient_into_an_empty_part(tmp_path, val, forced):
    parts = PinnedSplit(tmp_path / "split.json", val=val).assign([f"p{n}" for n in range(9)])
    assert list(parts.values()).count(forced) == 1


@pytest.mark.parametrize("patients", [[], ["p1"], ["p1", "p1"]])
def test_pinned_split_of_fewer_than_two_patients_is_refused_and_stores_nothing(tmp_path, patients):
    with pytest.raises(ConfigError, match=f"at least 2 patients.*received {len(set(patients))}. Label a case"):
        PinnedSplit(tmp_path / "split.json").assign(patients)
    assert not list(tmp_path.iterdir())


def test_pinned_split_whose_validation_labels_are_gone_takes_a_new_patient_or_says_so(tmp_path):
    split = PinnedSplit(tmp_path / "split.json", val=0.0)
    parts = split.assign(["p1", "p2", "p3"])
    left = [p for p, part in parts.items() if part == "train"]
    with pytest.raises(ConfigError, match=r"none of the 2 given is pinned to 'val'\. Restore the labels"):
        split.assign(left)
    assert split.assign([*left, "p4"]) == {**dict.fromkeys(left, "train"), "p4": "val"}
    assert split.assign(["p1", "p2", "p3", "p4"]).items() >= parts.items()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"version": 2, "patients": {}}', '{"version": 1}', '{"version": 1, "patients": {"a": "x"}}'],
)
def test_pinned_split_in_a_broken_file_says_what_to_do_and_keeps_it(tmp_path, text):
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"in split\.json; the file is broken .* Restore it from a copy"):
        PinnedSplit(path).assign(["p1", "p2"])
    assert path.read_text() == text


def test_pinned_split_survives_a_write_that_fails(tmp_path, monkeypatch):
    split = PinnedSplit(tmp_path / "split.json")
    before = split.assign(["p1", "p2"])

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ConfigError, match=r"No space left on device\. Free space"):
            split.assign(["p1", "p2", "p3"])
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]
    assert split.assign(["p1", "p2"]) == before


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"s1": "train", "s2": "train", "s3": "val"}, {"A": "train", "B": "val"}),
        ({"s1": "val", "s2": "train", "s3": "val"}, {"A": "train", "B": "val"}),
        ({"s1": "train", "s2": "val", "s3": "val"}, {"A": "train", "B": "val"}),
        ({"s2": "val", "B": "train"}, {"A": "val", "B": "train"}),
        ({"A": "val", "s1": "train", "s3": "train"}, {"A": "val", "B": "train"}),
        ({"A": "train", "B": "val", "other": "val"}, {"A": "train", "B": "val"}),
    ],
)
def test_pinned_split_of_series_becomes_one_of_patients(tmp_path, stored, expected):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"version": 1, "patients": stored}))
    former = {"s1": "A", "s2": "A", "s3": "B"}
    assert PinnedSplit(path).assign(["A", "B"], former) == expected
    kept = {name: part for name, part in stored.items() if name == "other"}
    assert json.loads(path.read_text())["patients"] == {**expected, **kept}
    assert PinnedSplit(path).assign(["A", "B"], former) == expected
