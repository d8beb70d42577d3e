"""The table of coded concepts against DICOM's own dictionaries, and which name gets which code."""

from __future__ import annotations

import pytest
from pydicom.sr._concepts_dict import concepts

from lib.codes import CODES, NOT_CODED, PRIVATE, Code, CodeTable
from lib.config import read_yaml
from lib.errors import ConfigError

TABLE = CodeTable.read()
KIDNEY, LEFT, LIVER = Code("64033007", "Kidney"), Code("7771000", "Left"), Code("10200004", "Liver")
# value: (meaning, context groups), as pydicom generated it from PS3.16
SNOMED: dict[str, list[tuple[str, list[int]]]] = {}
for _entries in concepts["SCT"].values():
    for _value, _entry in _entries.items():
        SNOMED.setdefault(_value, []).append(_entry)


def _all_codes() -> list[tuple[str, str]]:
    values = read_yaml(CODES)
    codes = [*values["categories"].values(), *values["sides"].values()]
    for row in values["structures"]:
        codes += [row[key] for key in ("code", "region", "modifier") if key in row]
    return sorted({tuple(code) for code in codes})


@pytest.mark.parametrize("value, meaning", _all_codes())
def test_every_code_stands_in_a_context_group_with_this_meaning(value, meaning):
    assert [groups for known, groups in SNOMED.get(value, []) if known == meaning and groups]
    assert len(value) <= 16 and len(meaning) <= 64


@pytest.mark.parametrize("part, group", [("categories", 7150), ("sides", 244)])
def test_categories_and_sides_are_those_of_segmentation(part, group):
    for value, meaning in read_yaml(CODES)[part].values():
        assert any(known == meaning and group in groups for known, groups in SNOMED[value])


@pytest.mark.parametrize(
    "name, category, code, meaning",
    [
        ("liver", "anatomy", "10200004", "Liver"),
        ("Liver", "anatomy", "10200004", "Liver"),
        ("spleen", "anatomy", "78961009", "Spleen"),
        ("kidneys", "anatomy", "64033007", "Kidney"),
        ("lungs", "anatomy", "39607008", "Lung"),
        ("Prostate", "anatomy", "41216001", "Prostate"),
        ("left_ventricle", "anatomy", "87878005", "Left Ventricle"),
        ("Right Ventricle", "anatomy", "53085002", "Right ventricle"),
        ("LV blood pool", "anatomy", "87878005", "Left Ventricle"),
        ("Myocardium", "tissue", "122448007", "Cardiac muscle"),
        ("lv-myocardium", "anatomy", "49848007", "Left Ventricle Myocardium"),
        ("left atrium", "anatomy", "82471001", "Left atrium"),
        ("aorta", "anatomy", "15825003", "Aorta"),
        ("vertebrae_L1", "anatomy", "51282000", "Vertebra"),
        ("tumour", "finding", "108369006", "Neoplasm"),
        ("lesion 3", "finding", "52988006", "Lesion"),
        ("blood vessels", "anatomy", "59820001", "Blood vessel"),
        ("white matter", "tissue", "389080008", "White Matter"),
        ("grey matter", "tissue", "389081007", "Gray Matter"),
        ("IVC", "anatomy", "64131007", "Inferior Vena Cava"),
        ("CSF", "substance", "65216001", "Cerebrospinal Fluid"),
    ],
)
def test_name_gets_its_code(name, category, code, meaning):
    found = TABLE.code(name)
    assert (found.category, found.type) == (TABLE.categories[category], Code(code, meaning))
    assert found.modifiers == () and found.region is None


@pytest.mark.parametrize(
    "name, code, sides",
    [
        ("left kidney", KIDNEY, ("Left",)),
        ("kidney_right", KIDNEY, ("Right",)),
        ("Kidney (L)", KIDNEY, ("Left",)),
        ("both lungs", Code("39607008", "Lung"), ("Bilateral",)),
        ("lung_upper_lobe_left", Code("45653009", "Upper lobe of lung"), ("Left",)),
        ("rib_left_7", Code("113197003", "Rib"), ("Left",)),
        ("hippocampus anterior", Code("5366008", "Hippocampus"), ("Anterior",)),
        ("right posterior hippocampus", Code("5366008", "Hippocampus"), ("Right", "Posterior")),
    ],
)
def test_sides_and_parts_are_modifiers(name, code, sides):
    found = TABLE.code(name)
    assert found.type == code
    assert tuple(modifier.meaning for modifier in found.modifiers) == sides


def test_finding_keeps_its_region_and_the_side_belongs_to_that():
    found = TABLE.code("left kidney tumor 2")
    assert (found.category.meaning, found.type.meaning) == ("Morphologically Abnormal Structure", "Neoplasm")
    assert (found.region, found.modifiers) == (KIDNEY, (LEFT,))
    assert TABLE.code("liver tumor").region == LIVER


@pytest.mark.parametrize(
    "name",
    [
        "object", "nuclei", "anterior", "posterior", "thing 1", "livre", "liver2", "liver 2", "left liver",
        "left right kidney", "spleen-ish", "prostate peripheral zone", "Leber", "肝臓", "kidney stone", "", "7",
        "LV", "RV", "LVC", "RVC", "LA", "RA", "Myo", "GM", "WM", "left LV",  # another organ's elsewhere in the body
    ],
)  # fmt: skip
def test_unknown_name_is_marked_and_never_guessed(name):
    found = TABLE.code(name)
    assert found.category == NOT_CODED
    assert (found.type.scheme, found.type.meaning, found.modifiers, found.region) == (PRIVATE, name, (), None)
    assert len(found.type.value) <= 16


def test_unknown_names_have_codes_of_their_own_that_stay():
    assert TABLE.code("my thing").type.value == TABLE.code("My_Thing").type.value
    assert TABLE.code("my thing").type.value != TABLE.code("my things").type.value
    assert len(TABLE.code("x" * 90).type.meaning) == 64


HEAD = 'categories: {anatomy: ["1", a]}\nsides: {left: ["2", l], right: ["3", r], both: ["4", b]}\nstructures:\n'


@pytest.mark.parametrize(
    "text, message",
    [
        (HEAD + '  - {code: ["5", x], names: [x]}\n  - {code: ["6", y], names: [x]}', "every name once"),
        (HEAD + '  - {code: ["5", x], names: [X y]}', "in lower case, received 'X y'"),
        (HEAD + '  - {code: ["5", x], names: [x], category: organ}', "category out of"),
        (HEAD + '  - {code: ["5", x], names: [x], pair: true}', "unknown key 'pair'.*paired"),
        ("categories: {}\nsides: {}\n", "expected categories, structures and the sides"),
    ],
)
def test_malformed_table_is_refused(tmp_path, text, message):
    path = tmp_path / "codes.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        CodeTable.read(path)
