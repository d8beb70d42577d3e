import random

import pytest

from lib.data.split import acdc_split, hippocampus_split, nuclei_split, organs_split
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
