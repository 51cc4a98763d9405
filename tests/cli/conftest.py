"""Two ways to run the command: inside this process (quick), and as a real process (for pipes, signals, terminals)."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DEFAULT_BUNDLE = "digits-unet-w4a16-rtn"


@dataclass(frozen=True)
class Ran:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def error(self) -> str:
        """The one error message; everything that a refused command owes to the user is checked here."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert "Traceback" not in self.err
        message = errors[0].removeprefix("error: ")
        assert message.rstrip().endswith((".", "?", ")")), message
        assert message.count(". ") + message.count("? ") >= 1, f"no advice in: {message}"
        return message


def command() -> list[str]:
    """The installed console script, next to the interpreter."""
    script = Path(sys.executable).with_name("dacc")
    return [str(script)] if script.exists() else [sys.executable, "-m", "dacc.cli.main"]


def environment(**more: str) -> dict[str, str]:
    """Of a real process: one thread, no network, plain text."""
    plain = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "COLUMNS": "200", "TERM": "xterm"}
    return {**os.environ, **plain, **more}


def heed_ctrl_c() -> None:
    """A test run in the background inherits that Ctrl-C is ignored; the command is to be started as from a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def dacc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command in this process: `dacc("quantize", folder, "--bits", 4)`."""
    from dacc.cli.main import run

    # a command may set these for what it imports later; here they are put back
    kept = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}
    for name in (*kept, "DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, kept.get(name, "")))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["dacc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run()
        return Ran(int(left.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def process() -> Callable[..., Ran]:
    """Runs the command as a process of its own; standard input is /dev/null unless given otherwise."""

    def call(*arguments: object, **options: Any) -> Ran:
        given = {"capture_output": True, "text": True, "timeout": 120, "env": environment(), **options}
        if "input" not in given:
            given.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run([*command(), *map(str, arguments)], **given)
        return Ran(done.returncode, done.stdout or "", done.stderr or "")

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what `dacc quantize` makes there by default; not to be changed."""
    from dacc import quantize_pipeline

    folder = tmp_path_factory.mktemp("made")
    quantize_pipeline("zoo:digits-unet", output=folder / DEFAULT_BUNDLE, device="cpu")
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of that bundle, to be damaged."""
    return Path(shutil.copytree(made / DEFAULT_BUNDLE, tmp_path / "bundle"))


@pytest.fixture
def pipeline(unet_folder: Path, tmp_path: Path) -> Path:
    """A copy of a tiny random pipeline, to be damaged."""
    return Path(shutil.copytree(unet_folder, tmp_path / "pipe"))


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden files too: name -> content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def unchanged(tmp_path: Path) -> Callable[[], None]:
    """Call it before and after: the second time it fails when anything in the working folder differs."""
    before: list[dict[str, str]] = []

    def check() -> None:
        if before:
            assert snapshot(tmp_path) == before[0]
        else:
            before.append(snapshot(tmp_path))

    return check
