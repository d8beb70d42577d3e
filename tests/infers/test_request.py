"""Tables of options and reply formats that clients send, and what they mean."""

import tempfile

import pytest

from infers.request import option_table, read_options, read_reply
from lib.errors import PromptError

# request, axis, propagate, window
OPTIONS = [
    ({}, None, True, None),
    ({"axis": "auto", "propagate": True, "window": "auto"}, None, True, None),
    ({"axis": ["k", "i"], "propagate": [False], "window": ""}, "k", False, None),
    ({"axis": " J ", "propagate": "False", "window": "-100, 240"}, "j", False, (-100.0, 240.0)),
    ({"axis": "", "propagate": "", "window": None}, None, True, None),
    ({"propagate": 0, "window": [0, 80.5]}, None, False, (0.0, 80.5)),
    ({"propagate": "yes", "window": "[1 2]"}, None, True, (1.0, 2.0)),
    ({"window": "Lung"}, None, True, (-1350.0, 150.0)),
]


@pytest.mark.parametrize(("request_", "axis", "propagate", "window"), OPTIONS)
def test_read_options_table(request_, axis, propagate, window):
    options = read_options(request_, planar=False)
    assert (options.axis, options.propagate, options.window, options.planar) == (axis, propagate, window, False)


def test_read_options_planar_is_one_k_slice():
    options = read_options({"axis": "i", "propagate": True}, planar=True)
    assert (options.axis, options.propagate, options.planar) == ("k", False, True)


WRONG_OPTIONS = [
    ({"window": [0, 10**400]}, "window"),
    ({"axis": "x"}, r"axis: expected one of \['auto', 'i', 'j', 'k'\], received 'x'"),
    ({"axis": 2}, "axis: expected one of"),
    ({"propagate": "maybe"}, "propagate: expected true or false, received 'maybe'"),
    ({"propagate": 2}, "propagate: expected true or false"),
    ({"window": "wide"}, "window: expected auto, one of"),
    ({"window": [1]}, "window: expected"),
    ({"window": [1, 2, 3]}, "window: expected"),
    ({"window": 5}, "window: expected"),
]


@pytest.mark.parametrize(("request_", "words"), WRONG_OPTIONS)
def test_read_options_wrong_value_is_named(request_, words):
    with pytest.raises(PromptError, match=words):
        read_options(request_, planar=False)


def test_option_table_first_items_read_back_as_defaults():
    """Slicer sends the first item of every list in the table."""
    for planar in (False, True):
        sent = {k: v[0] if isinstance(v, list) else v for k, v in option_table(planar).items()}
        assert read_options(sent, planar) == read_options({}, planar)


# request, label, extension, dtype, compress, write_file
REPLIES = [
    ({}, "object", ".nrrd", "uint8", True, True),
    (
        {"label": " left kidney ", "result_extension": ".NII.GZ", "result_dtype": "uint16", "result_compress": "false"},
        "left kidney",
        ".nii.gz",
        "uint16",
        False,
        True,
    ),
    (
        {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False},
        "object",
        ".nrrd",
        "uint8",
        False,
        True,
    ),
    ({"result_write_to_file": False, "result_dtype": None}, "object", ".nrrd", "uint8", True, False),
]


@pytest.mark.parametrize(("request_", "label", "extension", "dtype", "compress", "write_file"), REPLIES)
def test_read_reply_table(request_, label, extension, dtype, compress, write_file):
    reply = read_reply(request_, "object")
    assert (reply.label, reply.extension, reply.dtype) == (label, extension, dtype)
    assert (reply.compress, reply.write_file) == (compress, write_file)


def test_read_reply_of_an_uploaded_label_map_shows_no_path_of_the_server():
    with tempfile.NamedTemporaryFile(suffix=".nii.gz") as file:
        assert read_reply({"label": file.name}, "object").label == "object"
    assert read_reply({"label": file.name}, "object").label == file.name  # no file any more, so a name


WRONG_REPLIES = [
    ({"label": ""}, "label: expected the name of the segment"),
    ({"label": 3}, "label: expected the name of the segment"),
    ({"result_extension": ".mha"}, "result_extension: expected one of"),
    ({"result_extension": "nrrd"}, "Did you mean '.nrrd'"),
    ({"result_dtype": "float64"}, "result_dtype: expected one of"),
    ({"result_dtype": "object"}, "result_dtype: expected one of"),
    ({"result_compress": "perhaps"}, "result_compress: expected true or false"),
]


@pytest.mark.parametrize(("request_", "words"), WRONG_REPLIES)
def test_read_reply_wrong_value_is_named(request_, words):
    with pytest.raises(PromptError, match=words):
        read_reply(request_, "object")
