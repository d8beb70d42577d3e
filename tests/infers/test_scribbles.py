"""Label maps as prompts, and which files are opened for them."""

import tempfile
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest

from infers.scribbles import read_label_map, scribble_prompts, uploaded_file
from lib.errors import PromptError, VolumeError
from lib.types import Stroke

LABELS = ("liver", "spleen")
LAYERS = {2: "background_scribbles", 3: "foreground_scribbles"}


def painted(**voxels):
    """A (4, 5, 6) map; ``v3=[(1, 2, 3)]`` paints voxels with 3."""
    array = np.zeros((4, 5, 6), np.float32)
    for value, places in voxels.items():
        for place in places:
            array[place] = int(value[1:])
    return array


def stroke(*voxels, positive=True):
    return Stroke(np.array(voxels), positive)


A, B, C = (0, 1, 2), (3, 4, 5), (1, 1, 1)

# map, names, strokes by label with spleen as the current one
MAPS = [
    (painted(), LAYERS, {}),
    (painted(v3=[A, B]), LAYERS, {"spleen": (stroke(A, B),)}),
    (painted(v3=[A], v2=[B]), LAYERS, {"spleen": (stroke(B, positive=False), stroke(A))}),
    # the segmentation so far is no prompt
    (painted(v1=[A], v3=[B]), {1: "liver", **LAYERS}, {"spleen": (stroke(B),)}),
    (painted(v1=[A]), {1: "liver", 3: "foreground_scribbles"}, {}),
    # without the layers segments are labels
    (painted(v1=[A], v2=[B, C]), {1: "liver", 2: "spleen"}, {"liver": (stroke(A),), "spleen": (stroke(C, B),)}),
    (
        painted(v1=[A], v4=[B]),
        {1: "liver", 4: "background"},
        {"liver": (stroke(A), stroke(B, positive=False)), "spleen": (stroke(B, positive=False),)},
    ),
    (painted(v1=[A], v7=[B]), {1: "lung"}, {}),
]


@pytest.mark.parametrize(("array", "names", "expected"), MAPS)
def test_scribble_prompts_table(array, names, expected):
    assert scribble_prompts(array, names, current="spleen", labels=LABELS) == expected


@pytest.fixture
def upload_folder(tmp_path, monkeypatch):
    """A folder for temporary files of this test's own."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_uploaded_file_is_what_tempfile_put_away(upload_folder):
    with tempfile.NamedTemporaryFile(suffix=".nii.gz") as file:
        assert uploaded_file(file.name) == Path(file.name).resolve()
    assert uploaded_file(file.name) is None  # removed


def test_uploaded_file_refuses_every_other_path(upload_folder, tmp_path):
    secret = tmp_path / "tmpsecret.nii.gz"
    below, other, folder, link = (upload_folder / name for name in ("sub", "mask.nii.gz", "tmpdir", "tmplink.nii.gz"))
    for path in (below, folder):
        path.mkdir()
    for path in (secret, other, below / "tmp1.nii.gz"):
        path.touch()
    link.symlink_to(secret)
    paths = [secret, other, folder, link, below / "tmp1.nii.gz", upload_folder / ".." / secret.name, "/etc/passwd"]
    names = ["liver", "tmpliver", "", None, 3, ["liver"], "/tmp/tmp\0x", "/" + "x" * 5000]
    assert [p for p in [*map(str, paths), *names] if uploaded_file(p) is not None] == []


def test_uploaded_file_accepts_a_way_round_to_the_folder(upload_folder):
    (upload_folder / "tmp1.nrrd").touch()
    around = upload_folder / ".." / upload_folder.name / "tmp1.nrrd"
    assert uploaded_file(str(around)) == (upload_folder / "tmp1.nrrd").resolve()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
def test_read_label_map_keeps_values_and_axes(upload_folder, suffix):
    array = np.random.default_rng(0).integers(0, 300, (4, 5, 6)).astype(np.uint16)
    path = str(upload_folder / f"tmp1{suffix}")
    if suffix == ".nrrd":
        nrrd.write(path, array)
    else:
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, 2.0, 3.0, 1.0])), path)
    assert (read_label_map(path, (4, 5, 6)) == array).all()


def test_read_label_map_refusals_say_why(upload_folder, tmp_path):
    path = upload_folder / "tmp1.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4)), path)
    with pytest.raises(PromptError, match=r"image's grid of \(6, 5, 4\) voxels, received \(4, 5, 6\)"):
        read_label_map(str(path), (6, 5, 4))
    other = tmp_path / "tmp1.nii.gz"
    path.rename(other)
    with pytest.raises(PromptError, match="label: expected an uploaded label map"):
        read_label_map(str(other), (4, 5, 6))
    header = upload_folder / "tmp1.nhdr"
    header.touch()
    with pytest.raises(PromptError, match="label: expected an uploaded label map"):
        read_label_map(str(header), (4, 5, 6))
    path.write_bytes(b"no image")
    with pytest.raises(VolumeError, match="Expected a readable NIfTI"):
        read_label_map(str(path), (4, 5, 6))
