"""The names that `import dacc` gives, and that giving them costs nothing."""

from pathlib import Path

import pytest

import dacc

HEAVY = "sorted({'torch', 'diffusers', 'transformers', 'numpy', 'accelerate', 'safetensors'} & set(sys.modules))"


def test_importing_dacc_imports_nothing_heavy(run_python):
    assert run_python(f"import sys, dacc; dir(dacc); print({HEAVY})").stdout.strip() == "[]"


@pytest.mark.parametrize("words", [["--help"], ["quantize", "--help"], ["--version"]])
def test_asking_the_command_for_help_imports_nothing_heavy(run_python, words):
    code = f"""
import sys
sys.argv = ["dacc", *{words!r}]
from dacc.cli.main import run
try:
    run()
except SystemExit as end:
    print({HEAVY}, end.code)
"""
    assert run_python(code).stdout.splitlines()[-1] == "[] 0"


def test_a_wrong_option_is_answered_without_importing_anything_heavy(run_python):
    code = f"""
import sys
sys.argv = ["dacc", "quantize", "--bits", "99"]
from dacc.cli.main import run
try:
    run()
except SystemExit as end:
    print({HEAVY}, end.code)
"""
    assert run_python(code).stdout.splitlines()[-1] == "[] 2"


def test_the_public_names_are_sorted_and_listed():
    assert dacc.__all__ == sorted(dacc.__all__)
    assert set(dacc.__all__) == set(dacc._FACE)
    assert set(dacc.__all__) <= set(dir(dacc))


@pytest.mark.parametrize("name", dacc.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    assert callable(getattr(dacc, name))
    assert getattr(dacc, name).__doc__


@pytest.mark.parametrize("name", dacc.__all__)
def test_no_public_name_is_that_of_a_folder(name):
    """`dacc.prune` would be replaced by the submodule at its first import."""
    folders = {folder.name for root in dacc.__path__ for folder in Path(root).iterdir()}
    assert name not in folders


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dacc' has no attribute 'quantise'"):
        _ = dacc.quantise
    assert not hasattr(dacc, "setup_module")


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert dacc.__version__ == version("dacc-diffusion")
