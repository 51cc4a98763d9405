import sys

import pytest

from dacc.core.errors import ConfigError
from dacc.core.registry import Registry


@pytest.fixture
def registry(tmp_path, monkeypatch):
    folder = tmp_path / "toy_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "plain.py").write_text("CONFIG = 'plain'\n")
    (folder / "broken.py").write_text("import a_package_that_nobody_has\n")
    (folder / "_shared.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("toy method", "toy_methods", folder)
    for name in [name for name in sys.modules if name.startswith("toy_methods")]:
        del sys.modules[name]


def test_names_are_the_public_files_and_listing_them_imports_nothing(registry):
    assert registry.names() == ["broken", "plain"]
    assert not any(name.startswith("toy_methods") for name in sys.modules)


def test_one_method_is_imported_alone(registry):
    assert registry.load("plain").CONFIG == "plain"
    assert "toy_methods.broken" not in sys.modules


def test_an_import_error_of_a_method_is_not_hidden(registry):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        registry.load("broken")


@pytest.mark.parametrize("name", ["plane", "_shared", "__init__", "../plain"])
def test_an_unknown_name_is_answered_with_known_ones(registry, name):
    with pytest.raises(ConfigError, match="there is no toy method") as caught:
        registry.load(name)
    assert "plain" in caught.value.mend


def test_names_may_be_written_with_dashes(registry):
    (registry.folder / "every_step.py").write_text("CONFIG = 'every'\n")
    dashed = Registry("toy method", "toy_methods", registry.folder, dashed=True)
    assert "every-step" in dashed.names()
    assert dashed.load("every-step").CONFIG == registry.load("every_step").CONFIG == "every"
    with pytest.raises(ConfigError, match="Did you mean every-step"):
        dashed.check("every_step")


FACTS = """\"\"\"A method.\"\"\"
import a_package_that_nobody_has
UNIT = "layer"
NEEDS = ("calls", "grams")
SPLIT = True
FIRST = SECOND = 3

def quantize():
    UNIT = "inside of a function"
"""


def test_a_fact_is_read_from_the_file_without_importing_it(registry):
    (registry.folder / "facts.py").write_text(FACTS)
    assert registry.fact("facts", "UNIT") == "layer"
    assert registry.fact("facts", "NEEDS") == ("calls", "grams")
    assert registry.fact("facts", "SPLIT") is True
    assert registry.fact("facts", "SECOND") == 3
    assert not any(name.startswith("toy_methods") for name in sys.modules)


def test_a_fact_that_a_file_does_not_hold_has_a_default(registry):
    assert registry.fact("plain", "UNIT") is None
    assert registry.fact("plain", "UNIT", "layer") == "layer"
    assert registry.fact("plain", "CONFIG", "other") == "plain"


def test_facts_of_an_unknown_name_are_refused(registry):
    with pytest.raises(ConfigError, match="there is no toy method 'plane'"):
        registry.fact("plane", "UNIT")


def test_facts_of_dashed_names_are_those_of_their_files(registry):
    (registry.folder / "every_step.py").write_text("UNIT = 'call'")
    assert Registry("toy method", "toy_methods", registry.folder, dashed=True).fact("every-step", "UNIT") == "call"


def test_a_fact_with_a_type_beside_it_is_read_too(registry):
    (registry.folder / "typed.py").write_text("NEEDS: tuple[str, ...] = ('grams',)")
    assert registry.fact("typed", "NEEDS", ()) == ("grams",)
