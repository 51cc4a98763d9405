"""The frame around all commands: help, versions, what happens when output has nowhere to go or a bug strikes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .conftest import command, environment

COMMANDS = ["inspect", "quantize", "generate", "evaluate", "verify", "zoo list", "zoo copy", "zoo add"]


def shell(line: str) -> subprocess.CompletedProcess[str]:
    script = f'dacc() {{ {" ".join(command())} "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def test_the_version_is_told(dacc):
    import dacc as package

    ran = dacc("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"dacc {package.__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_has_an_example(dacc, name, option):
    ran = dacc(*name.split(), option)
    assert ran.code == 0
    assert ran.err == ""
    assert "Example" in ran.out
    assert f"dacc {name}".strip() in ran.out


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_that_of_usage(dacc):
    ran = dacc()
    assert ran.code == 2
    assert "Usage: dacc" in ran.out + ran.err
    assert "Traceback" not in ran.err


def test_help_and_refusals_do_not_import_torch():
    for arguments in (
        "--help",
        "quantize --help",
        "zoo list",
        "quantize nowhere",
        "quantize --bits 9",
        "generate nowhere",
    ):
        code = (
            "import sys; from dacc.cli.main import run; sys.argv = ['dacc', *sys.argv[1:]]\n"
            "try: run()\nexcept SystemExit: pass\n"
            "sys.exit(7 if {'torch', 'diffusers', 'transformers'} & set(sys.modules) else 0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments.split()],
            env=environment(),
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, arguments


def test_a_bug_shows_its_traceback(dacc, pipeline, monkeypatch):
    def stumble(*_: object, **__: object) -> None:
        raise ZeroDivisionError("stumbled")

    monkeypatch.setattr("dacc.core.source.resolve_source", stumble)
    ran = dacc("verify", "zoo:digits-unet")
    assert ran.code == 1
    assert "ZeroDivisionError: stumbled" in ran.err
    assert "a bug in dacc" in ran.err
    assert "error: " not in ran.err.replace("ZeroDivisionError: ", "")


def test_a_reader_who_leaves_is_no_failure_worth_words():
    done = shell("dacc zoo list | true; dacc --help | true; dacc verify --help | true")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("written", ["zoo list", "--help", "quantize --help", "--version"])
def test_a_reader_who_leaves_before_the_first_word_is_told_to_the_shell(written):
    done = shell(f"set -o pipefail; (sleep 0.5; dacc {written}) | true")
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_standard_output_is_told():
    done = shell("dacc zoo list > /dev/full")
    assert done.returncode == 5
    assert done.stderr.startswith("error: the disk is full")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(closed):
    assert shell(f"dacc zoo list {closed}").returncode == 0


def test_an_error_does_not_land_on_standard_output_when_standard_error_is_closed():
    done = shell("dacc verify nowhere 2>&-")
    assert (done.returncode, done.stdout) == (3, "")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dacc quan", ["quantize"]),
        ("dacc quantize --method ", ["auto", "rtn"]),
        ("dacc quantize --act-bits ", ["16", "8", "4"]),
        ("dacc generate --dtype b", ["bfloat16"]),
        ("dacc evaluate --metrics p", ["psnr_ssim"]),
        ("dacc inspect z", ["zoo:digits-dit", "zoo:digits-unet"]),
        ("dacc inspect p", ["pipe"]),
        ("dacc zoo copy digits-d", ["digits-dit"]),
    ],
)
def test_words_are_completed(pipeline, tmp_path, typed, offered):
    asked = {"_DACC_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run(command(), env=environment(**asked), cwd=tmp_path, capture_output=True, text=True)
    assert set(offered) <= set(done.stdout.split()), done.stderr


def test_completion_scripts_are_shown():
    done = subprocess.run(
        command(),
        env=environment(_DACC_COMPLETE="source_bash"),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    assert "_DACC_COMPLETE=complete_bash" in done.stdout


def test_a_broken_zoo_completes_nothing_and_says_nothing(tmp_path):
    asked = {"_DACC_COMPLETE": "complete_bash", "COMP_WORDS": "dacc inspect ", "COMP_CWORD": "2"}
    environment_ = environment(**asked, DACC_ZOO=os.devnull)
    done = subprocess.run(command(), env=environment_, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([], "")


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_sleep_after_a_while_unless_the_user_decides(monkeypatch, given, expected):
    from dacc.cli.options import start

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    start(quiet=True)
    assert os.environ.get("GOMP_SPINCOUNT") == expected
