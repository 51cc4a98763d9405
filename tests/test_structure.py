"""What no single file can promise: imports point down only, and packaging agrees with the folders."""

import ast
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("reads pyproject.toml with tomllib", allow_module_level=True)
import tomllib

ROOT = Path(__file__).resolve().parents[1]
PASSES = {"quant", "prune", "cache", "export", "evaluate"}
MAY_IMPORT = {
    "core": set(),
    "runtime": {"core"},
    "calibrate": {"core", "runtime"},
    **{name: {"core", "runtime", "calibrate"} for name in PASSES},
    "cli": {"core", "runtime", "calibrate", *PASSES},
}
NOT_SHIPPED = {"tests", "zoo", "scripts", "benchmarks", "docs", "examples", "build", "dist", "studies"}
HEAVY = {"torch", "diffusers", "transformers", "numpy", "safetensors", "accelerate", "torchmetrics"}
LIGHT_CORE = (
    "errors",
    "config",
    "registry",
    "manifest",
    "calibration",
    "identity",
    "scheme",
    "target",
    "requirements",
    "reporter",
    "source",
    "verify",
)
LIGHT = [
    *(f"core/{name}.py" for name in LIGHT_CORE),
    "calibrate/config.py",
    "calibrate/api.py",
    "cache/config.py",
    "cache/api.py",
    "prune/config.py",
    "prune/api.py",
    "quant/config.py",
    "evaluate/config.py",
    "prune/recovery/config.py",
    "__init__.py",
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def shipped():
    """Python files of the package, relative to the repository."""
    files = [file.relative_to(ROOT) for file in ROOT.rglob("*.py")]
    return sorted(file for file in files if not file.parts[0].startswith(".") and file.parts[0] not in NOT_SHIPPED)


@cache
def imports(file, *, top_only=False):
    """Absolute dotted names that a file imports, our own with `dacc` in front."""
    tree = ast.parse((ROOT / file).read_text())
    package = ["dacc", *file.parts[:-1]]
    found = set()
    for node in _at_import_time(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found.update(".".join([*base, alias.name]) for alias in node.names)
    return frozenset(found)


def _at_import_time(node):
    """Statements that run when the file is imported: not inside functions, not under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import_time(child)


def our_files(names):
    """The files of the package behind dotted names such as `dacc.core.errors.DaccError`."""
    for name in names:
        parts = name.split(".")[1:] if name.split(".")[0] == "dacc" else []
        for length in range(len(parts), 0, -1):
            for candidate in (Path(*parts[:length]).with_suffix(".py"), Path(*parts[:length]) / "__init__.py"):
                if (ROOT / candidate).is_file():
                    yield candidate
                    break
            else:
                continue
            break


@pytest.mark.parametrize("file", [file for file in shipped() if len(file.parts) > 1], ids=str)
def test_imports_point_down_only(file):
    layer = file.parts[0]
    reached = {other.parts[0] for other in our_files(imports(file)) if len(other.parts) > 1}
    assert reached <= MAY_IMPORT[layer] | {layer}


@pytest.mark.parametrize("file", shipped(), ids=str)
def test_inside_the_package_imports_are_relative(file):
    tree = ast.parse((ROOT / file).read_text())
    absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = {"dacc", *MAY_IMPORT} - {"cache", "export"} | {"dacc"}
    assert not {name.split(".")[0] for name in [*absolute, *plain]} & ours


@pytest.mark.parametrize("file", [*LIGHT, *sorted(f"cli/{file.name}" for file in (ROOT / "cli").glob("*.py"))])
def test_light_files_import_nothing_heavy_directly_or_through_others(file):
    todo, seen = [Path(file)], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        heavy = {name.split(".")[0] for name in imports(current, top_only=True)} & HEAVY
        assert not heavy, f"{current} imports {heavy}"
        packages = {parent / "__init__.py" for parent in current.parents if (ROOT / parent / "__init__.py").is_file()}
        todo += [*our_files(imports(current, top_only=True)), *packages]


def test_the_packages_in_pyproject_are_the_folders_with_python():
    folders = {file.parent for file in shipped()}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {".".join(["dacc", *folder.parts]) for folder in folders}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_every_third_party_import_is_a_declared_dependency():
    names = {name.split(".")[0] for file in shipped() for name in imports(file)}
    third_party = names - {"dacc"} - set(sys.stdlib_module_names)
    extras = [entry for group in PYPROJECT["project"]["optional-dependencies"].values() for entry in group]
    declared = {_plain(entry) for entry in [*PYPROJECT["project"]["dependencies"], *extras]}
    distributions = packages_distributions()
    missing = {
        name for name in third_party if not {_plain(each) for each in distributions.get(name, [name])} & declared
    }
    assert not missing


def test_every_dependency_has_a_lower_bound():
    assert all(">=" in entry for entry in PYPROJECT["project"]["dependencies"])


def _plain(requirement):
    name = requirement.split(">=")[0].split("[")[0].strip()
    return name.lower().replace("_", "-")


@pytest.mark.parametrize(
    "file",
    [file for file in shipped() if file.parts[-2:-1] in {("methods",), ("strategies",)} and file.stem[0] != "_"],
    ids=str,
)
def test_every_method_has_a_test_of_its_own(file):
    assert (ROOT / "tests" / file.with_name(f"test_{file.name}")).is_file()


@pytest.mark.parametrize("file", shipped(), ids=str)
def test_no_file_is_a_grab_bag_or_too_long(file):
    assert file.stem not in {"utils", "helpers", "common"}
    assert len((ROOT / file).read_text().splitlines()) <= 330
