from dataclasses import replace

import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image

from lib.data.geometry import slice_view
from lib.data.samples import (
    LabelledCase,
    TrainingCase,
    labels_of,
    load_case,
    named_values,
    patient_of,
    training_slices,
    usable_cases,
)
from lib.data.volume import load_volume
from lib.errors import ConfigError, VolumeError

SHAPE = (5, 12, 10)
# thick along i, turned and flipped: neither axial nor isotropic
AFFINE = np.array([[3.0, 0.2, 0.0, -5.1], [-0.3, 0.7, 0.1, 44.9], [0.0, 0.1, -0.7, 7.3], [0.0, 0.0, 0.0, 1.0]])


def mask(blocks=((1, 2, 5), (2, 6, 9))):
    """``(value, first, last)`` along j: a block on slices i 1..3."""
    voxels = np.zeros(SHAPE, np.uint8)
    for value, first, last in blocks:
        voxels[1:4, first:last, 3:7] = value
    return voxels


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def make(tmp_path):
    """Writes a case's image and label and describes them."""

    def case(name="p1_frame01", label=None, values=None, affine=AFFINE):
        image = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32)
        return LabelledCase(
            case=name,
            image=save(tmp_path / f"{name}.nii.gz", image),
            label=save(tmp_path / f"{name}_label.nii.gz", mask() if label is None else label, affine),
            values=values or {},
        )

    return case


@pytest.mark.parametrize(
    ("case", "group", "patient"),
    [
        ("patient007_frame12", None, "patient007"),
        ("a_b_frame1_frame2", None, "a_b"),
        ("hippocampus_001", None, "hippocampus_001"),
        ("_frame01", None, "_frame01"),
        ("1.2.840.5", None, "1.2.840.5"),
        ("site3-041-post", r"site\d+-\d+", "site3-041"),
        ("site3-041-post", r"[a-z]+\d+-(\d+)", "041"),
        ("other", r"(x)?o", "other"),
    ],
)
def test_patient_of_case_follows_the_pattern(case, group, patient):
    assert (patient_of(case) if group is None else patient_of(case, group)) == patient


NAMED = [
    ({}, {}),
    ({"label_info": None, "label_names": None}, {}),
    ({"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}, {1: "liver", 2: "spleen"}),
    ({"label_info": [{"name": "liver", "id": 3}]}, {3: "liver"}),
    ({"label_info": [{"name": "background", "idx": 0}, {"name": "liver", "idx": 1}]}, {1: "liver"}),
    ({"label_info": [{"idx": 1}, {"name": "x"}, {"name": "liver", "idx": "one"}, "liver", None]}, {}),
    ({"label_info": [{"name": "liver", "idx": "1"}, {"name": "spleen", "idx": 2.0}]}, {1: "liver", 2: "spleen"}),
    ({"label_info": [{"name": "a", "idx": 1.5}, {"name": "b", "idx": True}, {"name": "c", "idx": 1e999}]}, {}),
    ({"label_info": 5}, {}),
    ({"label_info": "liver", "label_names": {"liver": 1}}, {1: "liver"}),
    ({"label_names": {"liver": 1, "spleen": 2}}, {1: "liver", 2: "spleen"}),
    ({"label_names": {"background": 0, "liver": 1, "odd": "two"}}, {1: "liver"}),
    ({"label_names": ["liver"]}, {}),
    ({"label_info": [{"name": "liver", "idx": 10**12}, {"name": "spleen", "idx": 2}]}, {2: "spleen"}),
    ({"label_info": [{"name": "drawn", "idx": 1}], "label_names": {"proposed": 1, "other": 2}}, {1: "drawn"}),
]


@pytest.mark.parametrize(("info", "expected"), NAMED)
def test_named_values_table(info, expected):
    assert named_values(info) == expected


def test_patient_of_broken_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"group: expected a regular expression .* received '\(' \(missing"):
        patient_of("case", "(")


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ({}, ("a", "b"), {1: 1, 2: 2}),
        ({1: "a", 2: "b"}, ("a", "b"), {1: 1, 2: 2}),
        ({1: "b", 2: "a"}, ("a", "b"), {1: 2, 2: 1}),
        ({0: "background", 1: "a", 2: "b"}, ("c", "b", "a"), {1: 3, 2: 2}),
        ({1: "a", 2: "a"}, ("b", "a"), {1: 2, 2: 2}),
        ({1: "a", 2: "b", 7: "absent in the file"}, ("a", "b"), {1: 1, 2: 2}),
    ],
)
def test_load_case_numbers_voxels_by_the_place_of_their_name(make, values, labels, classes):
    loaded = load_case(make(values=values), labels)
    expected = np.zeros(SHAPE, np.uint8)
    for value, number in classes.items():
        expected[mask() == value] = number
    assert loaded.target.dtype == np.uint8 and loaded.target.shape == loaded.volume.shape
    np.testing.assert_array_equal(loaded.target, expected)
    np.testing.assert_allclose(loaded.volume.affine, AFFINE, atol=1e-6)


def test_load_case_of_a_constant_or_float_label_is_fine(make):
    assert (load_case(make(label=np.full(SHAPE, 300, np.float32), values={300: "all"}), ("all",)).target == 1).all()


def test_load_case_accepts_another_format_with_rounded_geometry(make, tmp_path):
    case = make()
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.round(AFFINE, 3)
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    nrrd.write(str(tmp_path / "label.nrrd"), mask(), header)
    loaded = load_case(replace(case, label=tmp_path / "label.nrrd"), ("a", "b"))
    np.testing.assert_array_equal(loaded.target, mask())


def test_load_case_turns_a_label_whose_slices_are_stored_from_the_other_end(make):
    """3D Slicer saves labels of left-handed images so."""
    label, back = mask(), np.diag([1.0, 1.0, -1.0, 1.0])
    label[1, 3, 0], back[2, 3] = 1, SHAPE[2] - 1
    loaded = load_case(make(label=label[:, :, ::-1], affine=AFFINE @ back), ("a", "b"))
    np.testing.assert_array_equal(loaded.target, label)


def test_load_case_of_a_picture_keeps_rows_and_columns(tmp_path):
    label = np.zeros((20, 30), np.uint8)
    label[4:9, 11:25] = 1
    Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(tmp_path / "image.png")
    Image.fromarray(label).save(tmp_path / "label.png")
    case = load_case(LabelledCase("picture", tmp_path / "image.png", tmp_path / "label.png"), ("nucleus",))
    np.testing.assert_array_equal(slice_view(case.target, 2, 0), label)
    assert training_slices(case, 2) == [0]


SHIFTED = AFFINE.copy()
SHIFTED[0, 3] += 0.2
FLIPPED = AFFINE @ np.diag([-1, 1, 1, 1])
BAD_LABELS = [
    (np.zeros(SHAPE, np.uint8), AFFINE, "carries no labelled voxel"),
    (mask()[:4], AFFINE, r"on its image's grid \(5, 12, 10\); received \(4, 12, 10\)"),
    (mask(), SHIFTED, "same shape 0.2 mm away"),
    (mask(), FLIPPED, "same shape 27.1 mm away"),
    (mask(((1, 2, 5), (3, 6, 7), (4, 8, 9))), AFFINE, r"labels \['a', 'b'\] and 0; received the unknown values 3, 4\."),
    (mask().astype(np.float32) * 0.5, AFFINE, "received fractions"),
    (np.where(mask() > 0, np.nan, 0).astype(np.float32), AFFINE, "received nan to nan"),
    (-mask().astype(np.int16), AFFINE, r"label numbers 0\.\.65535; received -2 to 0"),
    (np.stack([mask()] * 5, -1), AFFINE, "The label file: Expected one volume of 3 axes"),
    (np.stack([mask()] * 3, -1), AFFINE, "one label number per voxel; received colours or channels"),
]


@pytest.mark.parametrize(("label", "affine", "text"), BAD_LABELS, ids=[text for *_, text in BAD_LABELS])
def test_load_case_with_a_bad_label_says_what_is_wrong(make, label, affine, text):
    with pytest.raises(VolumeError, match=text):
        load_case(make(label=label, affine=affine), ("a", "b"))


def test_load_case_with_an_undeclared_or_unwanted_name_quotes_it(make):
    with pytest.raises(VolumeError, match=r"unknown values 2 \('c'\)\. Name"):
        load_case(make(values={1: "a", 2: "c"}), ("a", "b"))
    with pytest.raises(VolumeError, match=r"unknown values 2\. Name"):
        load_case(make(values={1: "a"}), ("a", "b"))


def test_load_case_with_missing_or_broken_files_says_which(make, tmp_path):
    case = make()
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing" * 99)
    (tmp_path / "label.txt").write_text("1")
    Image.fromarray(np.zeros((12, 5, 3), np.uint8)).save(tmp_path / "colour.png")
    for change, text in [
        ({"image": tmp_path / "gone.nii.gz"}, "Expected an image file or DICOM folder; nothing is there"),
        ({"label": tmp_path / "gone.nii.gz"}, "Expected a label file; nothing is there"),
        ({"label": tmp_path / "empty.nii.gz"}, "Expected a label; received an empty file"),
        ({"label": tmp_path / "broken.nii.gz"}, "The label file: Expected a readable NIfTI"),
        ({"label": tmp_path / "label.txt"}, r"Expected a label file out of \.nii"),
        ({"label": tmp_path / "colour.png"}, "received colours"),
    ]:
        with pytest.raises(VolumeError, match=text):
            load_case(replace(case, **change), ("a", "b"))


def test_usable_cases_go_on_with_the_good_ones_and_name_no_patient(make, tmp_path):
    cases = [
        make("p1_frame01"),
        make("p1_frame09", label=np.zeros(SHAPE, np.uint8)),
        make("p2_frame01", label=mask()[:4]),
        replace(make("p3_frame01"), image=tmp_path / "p3_gone.nii.gz"),
        make("p4_frame01"),
    ]
    usable, left_out = usable_cases(cases, ("a", "b"))
    assert [case.case for case in usable] == ["p1_frame01", "p4_frame01"]
    assert [text[: text.index(" is")] for text in left_out] == ["Case 2 of 5", "Case 3 of 5", "Case 4 of 5"]
    assert (
        "no labelled voxel" in left_out[0]
        and "on its image's grid" in left_out[1]
        and "nothing is there" in left_out[2]
    )
    assert not any(part in text for text in left_out for part in ("p1", "p2", "p3", "frame", str(tmp_path)))


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "no final labels found, 0 usable, of 0 patients. Save final labels for more patients"),
        (["p1"], "1 final label found, 1 usable, of 1 patient. Save"),
        (["p1_frame1", "p1_frame2"], "2 final labels found, 2 usable, of 1 patient. Save"),
    ],
)
def test_usable_cases_of_fewer_than_two_patients_are_refused(make, names, text):
    with pytest.raises(ConfigError, match=f"at least 2 labelled cases of different patients; {text}"):
        usable_cases([make(name) for name in names], ("a", "b"))


def test_usable_cases_of_only_bad_ones_says_why_and_stays_short(make):
    empty = np.zeros(SHAPE, np.uint8)
    cases = [make("p0"), *(make(f"p{n}", label=empty) for n in range(1, 9))]
    with pytest.raises(ConfigError, match=r"9 final labels found, 1 usable, of 1 patient\. Repair") as caught:
        usable_cases(cases, ("a", "b"))
    assert "Case 2 of 9 is left out: Expected a label with a structure" in str(caught.value)
    assert str(caught.value).endswith("3 more are left out.")


def test_load_case_background_by_name_is_no_structure(make):
    one = make("p0", label=mask(((5, 2, 5), (6, 6, 9))), values={5: "background", 6: "a"})
    assert set(np.unique(load_case(one, ("a",)).target)) == {0, 1}
    with pytest.raises(VolumeError, match="no labelled voxel"):
        load_case(make("p1", label=mask(((5, 2, 5),)), values={5: "background"}), ("a",))


def test_usable_cases_group_by_the_given_pattern(make):
    cases = [make("a-1"), make("a-2")]
    assert len(usable_cases(cases, ("a", "b"))[0]) == 2
    with pytest.raises(ConfigError, match="of 1 patient"):
        usable_cases(cases, ("a", "b"), group=r"(\w+)-")


@pytest.mark.parametrize(
    ("declared", "configured", "labels"),
    [
        ([{1: "a", 2: "b"}, {1: "a"}], (), ("a", "b")),
        ([{3: "c"}, {1: "a"}], (), ("a", "c")),
        ([{0: "background", 2: "b", 1: "a"}, {}], (), ("a", "b")),
        ([{1: "a", 2: "b"}, {1: "b"}], ("b", "a"), ("b", "a")),
        ([{}, {}], ("x",), ("x",)),
        ([{1: "a"}], ("a", "background"), ("a",)),  # offered for clicks on what is no structure
        ([{1: "background", 2: "a"}], (), ("a",)),
        ([{}, {}], (), ("label_1", "label_2")),
    ],
)
def test_labels_of_are_configured_or_declared_or_numbered(make, declared, configured, labels):
    cases = [make(f"p{n}", values=values) for n, values in enumerate(declared)]
    assert labels_of(cases, configured) == labels


@pytest.mark.parametrize(
    ("declared", "configured", "text"),
    [
        ([{1: "a"}, {1: "b"}], (), "value 1 is 'a' in one and 'b' in another"),
        ([{1: "a"}, {2: "a"}], (), r"\['a'\] have several"),
        ([{2: "b"}, {}], (), r"Expected label values 1\.\.1, because some .* received \[2\]"),
        ([{}], ("a", "a"), "expected distinct names"),
        ([{}], ("a", " "), "expected distinct names"),
        ([{}], [f"n{n}" for n in range(256)], "at most 255 names; received 256"),
        ([], (), "received no final labels without names, 0 of them usable, with values up to 0"),
    ],
)
def test_labels_of_contradicting_files_are_refused(make, declared, configured, text):
    cases = [make(f"p{n}", values=values) for n, values in enumerate(declared)]
    with pytest.raises(ConfigError, match=text):
        labels_of(cases, configured)


def test_labels_of_unnamed_files_pass_over_odd_values(make, tmp_path):
    odd = make("p1", label=mask(((255, 2, 5),)))
    gone = replace(make("p2"), label=tmp_path / "gone.nii.gz")
    assert labels_of([make("p0", label=mask(((3, 2, 5),))), odd, gone]) == ("label_1", "label_2", "label_3")
    with pytest.raises(
        ConfigError, match="received 2 final labels without names, 1 of them usable, with values up to 255"
    ):
        labels_of([odd, gone])


@pytest.mark.parametrize(
    ("labelled", "size", "slices"),
    [
        ([0, 1, 2], 3, [0, 1, 2]),
        ([4], 9, [4, 5]),
        ([3, 5], 12, [1, 3, 4, 5, 7, 10]),
        ([0], 8, [0, 4]),
        ([1, 2, 3, 4], 6, [0, 1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_training_slices_hold_the_labelled_extent_and_as_many_empty_ones(make, axis, labelled, size, slices):
    target = np.zeros((size, 4, 5), np.uint8)
    target[labelled, 1:3, 2:4] = 2
    case = TrainingCase("p1", load_volume(make().image), np.moveaxis(target, 0, axis))
    assert training_slices(case, axis) == slices
