"""The directions of imports, read from the source of every file: nothing is imported here.

"At module level" is everything that runs on import; imports inside functions count only where a rule says "anywhere".
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("apps", "bench", "infers", "lib", "tests", "trainers")
SERVER_SIDE = ("apps", "bench", "infers", "tests", "trainers")
# modules that pretraining loads on a machine with nothing but these packages
BARE = ("lib.backbones.compact", "lib.contracts", "lib.decoder", "lib.nn", "lib.plugins", "lib.prompts", "lib.types")
BARE_PACKAGES = {"torch", "numpy", "scipy"}
# modules that the scheduler and command lines load without waiting for torch
LIGHT = (
    "lib.codes", "lib.config", "lib.errors", "lib.provenance", "lib.schedule_record", "lib.sessions", "lib.settings",
    "lib.train_rules", "lib.triggers", "lib.types", "lib.versions", "lib.weights", "trainers.gate", "trainers.schedule",
)  # fmt: skip
SAM_PACKAGES = ("segment_anything", "sam2", "mobile_sam")


def _files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in _files(*OURS)}


@cache
def imports(module: str, anywhere: bool) -> frozenset[str]:
    """Dotted names that a module of ours imports; of ours as modules, of others as they stand."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if anywhere else _on_import(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            base = node.module or ""
            found.update(f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names)
    return frozenset(found)


def _on_import(tree: ast.AST) -> list[ast.AST]:
    """Nodes outside functions and outside ``if TYPE_CHECKING``."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found += [node, *_on_import(node)]
    return found


@cache
def loaded(module: str) -> frozenset[str]:
    """Packages of others that importing a module of ours brings in, through our own modules and their packages."""
    seen, todo, others = set(), [module], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
        for target in imports(name, anywhere=False) if name in MODULES else ():
            if target.split(".")[0] in OURS:
                todo.append(target)
            else:
                others.add(target.split(".")[0])
    return frozenset(others - sys.stdlib_module_names)


def _within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def _select(*places: str) -> list[str]:
    return sorted(m for m in MODULES if _within(m, places))


THEIR_LIB = "bench.apps.deepedit"  # runs in MONAI Label's sample app, whose own package is called lib as well


def test_every_import_of_ours_exists():
    ours = [m for m in MODULES if not _within(m, (THEIR_LIB,))]
    wrong = [(m, t) for m in ours for t in imports(m, anywhere=True) if t.split(".")[0] in OURS and t not in MODULES]
    assert not wrong


@pytest.mark.parametrize("module", _select("lib"))
def test_lib_imports_nothing_above_it_and_no_server(module):
    forbidden = {"apps", "bench", "infers", "monailabel", "tests", "trainers"}
    assert not {t.split(".")[0] for t in imports(module, anywhere=True)} & forbidden


def test_infers_and_trainers_do_not_know_each_other_nor_the_app():
    for here, others in (("infers", ("trainers", "apps")), ("trainers", ("infers", "apps"))):
        for module in _select(here):
            assert not [t for t in imports(module, anywhere=True) if _within(t, others)], module


def test_server_package_stays_out_of_lib():
    users = {m.split(".")[0] for m in MODULES if any(_within(t, ("monailabel",)) for t in imports(m, anywhere=True))}
    assert users <= set(SERVER_SIDE)


def _bare() -> list[str]:
    inits = [
        m for m, path in MODULES.items() if path.name == "__init__.py" and m.split(".")[0] not in ("tests", "bench")
    ]
    return sorted({*_select(*BARE), *inits})


@pytest.mark.parametrize("module", _bare())
def test_bare_modules_load_with_torch_numpy_and_scipy_only(module):
    assert loaded(module) <= BARE_PACKAGES


@pytest.mark.parametrize("module", _select(*LIGHT))
def test_light_modules_load_without_torch(module):
    assert not loaded(module) & {"torch", "torchvision", "monai"}


def test_methods_and_backbones_do_not_know_each_other():
    for here, other in (("lib.methods", "lib.backbones"), ("lib.backbones", "lib.methods")):
        for module in _select(here):
            assert not [t for t in imports(module, anywhere=True) if _within(t, (other,))], module


@pytest.mark.parametrize("package", SAM_PACKAGES)
def test_sam_packages_belong_to_one_backbone_file(package):
    users = [
        m for m in _select("lib", "infers", "trainers", "apps") if any(_within(t, (package,)) for t in imports(m, True))
    ]
    assert len(users) <= 1
    assert all(m.startswith("lib.backbones.") for m in users)


def test_dicom_packages_belong_to_the_reader_and_the_dicom_seg_writer():
    users = {
        m
        for m in _select("lib", "infers", "trainers", "apps")
        for t in imports(m, True)
        if _within(t, ("pydicom", "highdicom"))
    }
    assert users <= {"lib.data.volume", "lib.data.dicom", "lib.data.readers", "lib.dicom_seg"}
    assert len([m for m in users if m.startswith("lib.data.")]) <= 1


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    """A rule that finds nothing because it looks at nothing would pass for ever."""
    culprit = tmp_path / "culprit.py"
    culprit.write_text("import torch\ndef f():\n    from monailabel.config import settings\n    return settings\n")
    monkeypatch.setitem(MODULES, "lib.culprit", culprit)
    assert imports("lib.culprit", anywhere=True) == {"torch", "monailabel.config"}
    assert imports("lib.culprit", anywhere=False) == {"torch"}
    assert loaded("lib.culprit") == {"torch"}
    assert len(_select("lib")) > 10
