"""Where a command finds its SOURCE, and what it leaves on standard output for the next one.

`dacc verify` and a `dacc quantize` whose result exists already import no torch, so most real processes here are quick.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

BUNDLE = "digits-unet-w4a16-rtn"
DEFAULT_SAID = "no SOURCE given: using zoo:digits-unet"


def run_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One line of bash with the command on the path and pipefail set."""
    from .conftest import command, environment

    script = f'dacc() {{ {" ".join(command())} "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def test_with_a_source_standard_input_is_never_touched(process, made):
    never_closed, writer = os.pipe()
    try:
        ran = process("verify", made / BUNDLE, stdin=never_closed)
    finally:
        os.close(writer)
        os.close(never_closed)
    assert (ran.code, ran.out) == (0, f"{made / BUNDLE}: intact\n")


def test_a_source_wins_over_what_is_piped(process, made):
    assert process("verify", made / BUNDLE, input="/nowhere\n").code == 0


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_a_path_is_read_from_a_pipe(process, made, arguments):
    ran = process("verify", *arguments, input=f"{made / BUNDLE}\n")
    assert (ran.code, ran.out, ran.err) == (0, f"{made / BUNDLE}: intact\n", "")


def test_a_path_is_read_from_a_regular_file(process, made, tmp_path):
    (tmp_path / "list").write_text(f"{made / BUNDLE}\n")
    with (tmp_path / "list").open() as file:
        assert process("verify", stdin=file).code == 0


def test_a_json_record_is_read_from_a_pipe(process, made):
    record = json.dumps({"schema": 1, "path": str(made / BUNDLE), "notices": []})
    assert process("verify", input=record).code == 0


def test_json_without_a_path_is_refused(process, unchanged):
    unchanged()
    ran = process("quantize", input='{"schema": 1}')
    assert ran.code == 3
    assert "no key 'path'" in ran.error
    unchanged()


@pytest.mark.parametrize("name", ["quantize", "generate", "evaluate", "inspect", "verify"])
def test_an_empty_pipe_says_that_the_command_before_failed(process, unchanged, name):
    unchanged()
    ran = process(name, input="")
    assert ran.code == 3
    assert "the command before failed" in ran.error
    assert ran.out == ""
    unchanged()


def test_without_any_input_the_default_is_used_and_said(process, made):
    ran = process("quantize", cwd=made)
    assert (ran.code, ran.out) == (0, f"{BUNDLE}\n")
    assert DEFAULT_SAID in ran.err
    assert "already holds this result" in ran.err


def test_on_a_terminal_the_default_is_used_and_said(process, made):
    ours, terminal = pty.openpty()
    try:
        ran = process("quantize", cwd=made, stdin=terminal)
    finally:
        os.close(terminal)
        os.close(ours)
    assert (ran.code, ran.out) == (0, f"{BUNDLE}\n")
    assert DEFAULT_SAID in ran.err


def test_with_standard_input_closed_the_default_is_used_and_said(made):
    done = run_shell("dacc quantize <&-", made)
    assert (done.returncode, done.stdout) == (0, f"{BUNDLE}\n")
    assert DEFAULT_SAID in done.stderr


def test_a_dash_on_a_terminal_is_refused(process):
    ours, terminal = pty.openpty()
    try:
        ran = process("verify", "-", stdin=terminal)
    finally:
        os.close(terminal)
        os.close(ours)
    assert ran.code == 3
    assert "nothing is piped" in ran.error


def test_quiet_keeps_even_the_choice_of_the_default_to_itself(process, made):
    ran = process("quantize", "--quiet", cwd=made)
    assert (ran.code, ran.out, ran.err) == (0, f"{BUNDLE}\n", "")


def test_quantize_pipes_into_verify(made):
    done = run_shell("dacc quantize | dacc verify", made)
    assert (done.returncode, done.stdout) == (0, f"{made / BUNDLE}: intact\n")


def test_the_record_of_quantize_pipes_into_verify(made):
    done = run_shell("dacc quantize --json | dacc verify --json", made)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"schema": 1, "path": str(made / BUNDLE), "intact": True, "problems": []}


def test_a_failed_command_fails_the_whole_pipe_with_both_messages(tmp_path, unchanged):
    unchanged()
    done = run_shell("dacc quantize nowhere | dacc verify", tmp_path)
    assert done.returncode == 3
    assert "there is no folder 'nowhere'" in done.stderr
    assert "the command before failed" in done.stderr
    unchanged()


def test_a_failed_command_substitution_is_told_from_a_missing_source(tmp_path):
    done = run_shell('dacc verify "$(dacc quantize nowhere)"', tmp_path)
    assert done.returncode == 3
    assert "the SOURCE is empty" in done.stderr


def test_the_path_is_caught_by_command_substitution(made):
    done = run_shell('out=$(dacc quantize 2>&-) && test -d "$out" && echo "$out"', made)
    assert (done.returncode, done.stdout) == (0, f"{BUNDLE}\n")


@pytest.mark.slow
def test_quantize_pipes_into_evaluate(tmp_path):
    done = run_shell(
        "dacc quantize zoo:digits-dit --bits 4 --measure never"
        " | dacc evaluate --reference zoo:digits-dit --json --num 2 --steps 2 --no-memory --no-speed",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert next(iter(report)) == "schema"
    reference, small = report["sources"]
    assert (reference["name"], reference["is_reference"]) == ("digits-dit", True)
    assert small["name"] == "digits-dit-w4a16-rtn"
    assert small["components"]["transformer"]["bytes_on_disk"] < reference["components"]["transformer"]["bytes_on_disk"]
    assert small["metrics"]["psnr"]["value"] > 10
    assert [path.name for path in tmp_path.iterdir()] == ["digits-dit-w4a16-rtn"]


@pytest.mark.slow
def test_quantize_pipes_into_generate(made, tmp_path):
    done = run_shell(f"dacc quantize | dacc generate --num 2 --steps 2 -o {tmp_path}/pictures", made)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/pictures\n"
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0000.png", "0001.png"]
