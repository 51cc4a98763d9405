"""The documentation names everything that exists, and nothing that does not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dacc.cache.config import METHODS as SEARCHES
from dacc.cache.config import SearchCacheConfig
from dacc.calibrate.config import STRATEGIES, CalibrateConfig
from dacc.cli.main import app
from dacc.core.config import Config
from dacc.evaluate.config import EvaluateConfig
from dacc.evaluate.generate import GenerateConfig
from dacc.prune.config import METHODS as PRUNINGS
from dacc.prune.config import PruneConfig
from dacc.prune.recovery.config import RecoveryConfig
from dacc.quant.api import METHODS
from dacc.quant.config import QuantizeConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"] if path.exists())
GROUP: Any = typer.main.get_command(app)
SEPARATORS = ("|", "&&", "||", ";")


def commands(group: Any = GROUP, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below the group, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def page_of(words: tuple[str, ...]) -> str:
    """The page of a command; of `zoo copy` only its own section."""
    text = (DOCS / f"{words[0]}.md").read_text(encoding="utf-8")
    if len(words) == 1:
        return text
    section = re.search(rf"^## dacc {' '.join(words)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"no section for dacc {' '.join(words)}"
    return section[1]


def options_of(command: Any) -> set[str]:
    """Every way to write an option of a command."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return {name for name in own if name.startswith("-")} | {"--help", "-h"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_is_in_the_page_of_its_command(words):
    page = page_of(words)
    missing = {name for name in options_of(COMMANDS[words]) if not re.search(rf"`{name}[` ]", page)}
    assert not missing


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_page_names_no_option_that_does_not_exist(words):
    rows = re.findall(r"^\| (`-.*?) \|", page_of(words), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(--?[a-z][a-z-]*)", row)}
    assert named
    assert named <= options_of(COMMANDS[words])


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_page_tells_exit_codes_and_is_in_the_index(words):
    assert "## Exit codes" in (DOCS / f"{words[0]}.md").read_text(encoding="utf-8")
    assert f"({words[0]}.md)" in (DOCS / "README.md").read_text(encoding="utf-8")


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index]


@pytest.mark.parametrize(
    ("config", "page"),
    [
        (CalibrateConfig, "calibrate"),
        (PruneConfig, "prune"),
        (QuantizeConfig, "quantize"),
        (SearchCacheConfig, "search-cache"),
        (EvaluateConfig, "evaluate"),
        (GenerateConfig, "generate"),
    ],
)
def test_every_config_field_is_documented(config: type[Config], page: str):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert not [field for field in config.model_fields if f"`{field}`" not in text]


def test_every_field_of_recovery_has_a_row_with_its_default():
    text = (DOCS / "prune-recovery.md").read_text(encoding="utf-8")
    for name in RecoveryConfig.model_fields:
        value = re.search(rf"^\| `{name}=(.*?)` \|", text, re.MULTILINE)
        assert value, name
        assert RecoveryConfig(**{name: value[1] or None}) == RecoveryConfig(), name


@pytest.mark.parametrize(
    ("page", "registry", "name"),
    [
        (page, found, name)
        for page, found in (
            ("quantize", METHODS),
            ("prune", PRUNINGS),
            ("search-cache", SEARCHES),
            ("calibrate", STRATEGIES),
        )
        for name in found.names()
    ],
)
def test_every_method_has_a_row_and_its_fields_are_documented(page, registry, name):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{name}` \|", text, re.MULTILINE)
    section = text.partition(f"### Fields of {name}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
    fields = registry.load(name).CONFIG.model_fields
    assert not [field for field in fields if f"| `{field}=" not in section]


def test_every_metric_has_a_row():
    from dacc.evaluate.metrics import REGISTRY

    text = (DOCS / "evaluate.md").read_text(encoding="utf-8")
    assert not [name for name in REGISTRY.names() if f"| `{name}` |" not in text]


def test_every_exit_code_is_in_the_table():
    from dacc.cli.main import INTERRUPTED, READER_LEFT
    from dacc.core import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {0, INTERRUPTED, READER_LEFT, *(value.exit_code for value in classes)}
    text = (DOCS / "environment.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == codes


def headings(page: Path) -> set[str]:
    """The anchors of a page, made as the usual renderers make them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def shell_calls(text: str) -> Iterator[list[str]]:
    """The words of every `dacc ...` in the sh blocks of a page."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        for line in lines:
            plain = re.sub(r"\$\(([^()]*)\)", r"; \1 ; ", line)  # a command inside $(...) is one of its own
            lexer = shlex.shlex(plain, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            call: list[str] = []
            for word in [*lexer, ";"]:
                if word not in SEPARATORS:
                    call.append(word)
                    continue
                if "dacc" in call:
                    yield call[call.index("dacc") + 1 :]
                call = []


def check_call(words: list[str]) -> None:
    """Refuse a call that names a command or an option that does not exist, or lacks an argument."""
    words = words[: next((number for number, word in enumerate(words) if word in (">", ">>", "<")), len(words))]
    group, path = GROUP, ["dacc"]
    while hasattr(group, "commands"):
        if not words or words[0].startswith("-"):
            assert set(words) <= options_of(group) | {"--install-completion", "--show-completion"}
            return
        assert words[0] in group.commands, f"{' '.join(path)} has no command {words[0]!r}"
        path.append(words[0])
        group, words = group.commands[words[0]], words[1:]
    if {"--help", "-h"} & set(words):
        return
    group.make_context(" ".join(path), words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_shell_blocks_can_be_run_as_written(page):
    for call in shell_calls(page.read_text(encoding="utf-8")):
        check_call(call)


def test_wrong_shell_lines_would_be_found():
    for line in (
        "dacc quantise",
        "dacc quantize --bitz 4",
        "x=$(dacc zoo copy) && true",
        "true | dacc evaluate --num many",
    ):
        calls = list(shell_calls(f"```sh\n{line}\n```"))
        assert len(calls) == 1
        with pytest.raises(Exception):  # noqa: B017
            check_call(calls[0])


def test_the_command_pages_have_shell_blocks():
    for words in COMMANDS:
        assert list(shell_calls((DOCS / f"{words[0]}.md").read_text(encoding="utf-8")))


def test_the_figures_of_the_readme_stand_in_the_results():
    """The README repeats some figures of docs/results.md; whoever measures again must change both."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- ptq:readme -->")[2].partition("<!-- /ptq:readme -->")[0]
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figures = re.findall(r"\b0\.\d{3,}\b", table)
    assert len(figures) > 40
    assert [figure for figure in figures if f" {figure} " not in results] == []
