"""`dacc calibrate` from options to the path of a set, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dacc import open_calibration
from dacc.cli.calibrate import read_inputs

from .conftest import command, environment, heed_ctrl_c, snapshot

SMALL = ("--samples", 3, "--batch-size", 2, "--steps", 4, "--timesteps", 2, "--device", "cpu")


def test_it_prints_the_path_and_says_what_was_kept(dacc, pipeline):
    ran = dacc("calibrate", pipeline, *SMALL)
    assert (ran.code, ran.out) == (0, "pipe-calibration\n")
    assert "4 records of 3 samples at 2 of 4 calls: " in ran.err
    assert len(open_calibration("pipe-calibration")) == 4
    again = dacc("calibrate", pipeline, *SMALL)
    assert (again.code, again.out) == (0, "pipe-calibration\n")
    assert "already holds this set" in again.err


def test_the_json_record_names_the_set(dacc, pipeline):
    ran = dacc("calibrate", pipeline, *SMALL, "-o", "set", "--json", "--quiet")
    record = json.loads(ran.out)
    assert list(record)[:2] == ["schema", "path"]
    assert record["calibration"] == open_calibration("set").record.id
    assert (record["samples"], record["calls"], record["records"]) == (3, 2, {"unet": {"none": 4}})
    assert ran.err == ""


def test_a_set_stands_for_its_pipeline_in_the_next_command(dacc, pipeline):
    dacc("calibrate", pipeline, *SMALL, "-o", "set")
    ran = dacc("quantize", "set", "--dry-run")
    assert ran.code == 0, ran.err
    assert "set is a calibration set of pipe: using that pipeline" in ran.err


def test_it_chains(dacc, process):
    first = dacc("calibrate", "zoo:digits-unet", *SMALL)
    second = process("quantize", "--dry-run", input=first.out)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "digits-unet-calibration is a calibration set of zoo:digits-unet" in second.err


def test_options_reach_the_run(dacc, dit_folder):
    inputs = Path("inputs.jsonl")
    inputs.write_text('{"class": 7}\n\n{"class": 3}\n')
    options = ["--inputs", inputs, "--guidance-scale", "2", "--seed", "5", "--strategy", "ndtc", "--set", "form=paper"]
    ran = dacc("calibrate", dit_folder, "--samples", 3, "--steps", 4, *options, "-o", "set")
    assert ran.code == 0, ran.err
    record = open_calibration("set").record
    assert [sample.class_label for sample in record.samples] == [7, 3, 7]
    assert record.recipe["settings"] == {"form": "paper", "mu_fraction": 0.4, "sd_fraction": 0.4}
    assert (record.recipe["seed"], record.recipe["guidance_scale"]) == (5, 2.0)
    assert record.branches.keys() == {"transformer"}


def test_prompts_come_from_a_file(dacc, sd_folder):
    Path("lines.txt").write_text("a red circle\na blue square\n")
    Path("inputs.jsonl").write_text('{"prompt": "a red circle", "negative_prompt": "small"}\n{"prompt": "a square"}\n')
    sizes = ("--height", 32, "--width", 32)
    assert dacc("calibrate", sd_folder, *SMALL, *sizes, "--prompts", "lines.txt", "-o", "one").code == 0
    assert dacc("calibrate", sd_folder, *SMALL, *sizes, "--inputs", "inputs.jsonl", "-o", "two").code == 0
    one, two = (open_calibration(name).record.samples for name in ("one", "two"))
    assert [sample.prompt for sample in one] == ["a red circle", "a blue square", "a red circle"]
    assert [(sample.prompt, sample.negative_prompt) for sample in two[:2]] == [
        ("a red circle", "small"),
        ("a square", ""),
    ]


@pytest.mark.parametrize(
    ("options", "code", "advice"),
    [
        (["--strategy", "unifrom"], 2, "Did you mean uniform?"),
        (["--strategy", "every_step"], 2, "Did you mean every-step?"),
        (["--strategy", "every-step", "--timesteps", "4"], 2, "or use --strategy uniform"),
        (["--set", "form=code"], 2, "Fields: timesteps"),
        (["--strategy", "ndtc", "--set", "form=poster"], 2, "'code' or 'paper'"),
        (["--strategy", "ndtc", "--set", "sd_fraction=inf"], 2, "less than or equal to 100"),
        (["--timesteps", "0"], 2, "dacc calibrate --help"),
        (["--samples", "none"], 2, "dacc calibrate --help"),
        (["--budget-gb", "0"], 2, "greater than 0"),
        (["--budget-gb", "0.000001"], 2, "larger --budget-gb"),
        (["--store-dtype", "int8"], 2, "'bfloat16'"),
        (["--dtype", "float31"], 2, "float32"),
        (["--component", "unett"], 2, "Did you mean unet?"),
        (["--device", "abacus"], 2, "--device cpu"),
        (["--class", "3"], 2, "Leave them out"),
        (["--prompts", "nowhere.txt"], 2, "Give a text file"),
        (["--inputs", "nowhere.jsonl"], 2, "Give a UTF-8 text file"),
        (["--inputs", "nowhere.jsonl", "--class", "3"], 2, "one or the other"),
        (["--strict", "--samples", "64", "--budget-gb", "0.0001"], 2, "without --strict"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused(dacc, pipeline, unchanged, options, code, advice):
    unchanged()
    ran = dacc("calibrate", pipeline, "--steps", 2, *options)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert advice in ran.error
    unchanged()


@pytest.mark.parametrize(
    "text",
    ["", "3\n", '{"prompt": ""}\n', '{"class": "3"}\n', '{"class": 3, "prompt": "x"}\n', '{"prompt": "x", "seed": 1}\n'
     , '{"class": 3}\n{"prompt": "x"}\n', "[" * 100_000],
)  # fmt: skip
def test_lines_that_are_no_inputs_are_refused(dacc, pipeline, text):
    Path("inputs.jsonl").write_text(text)
    ran = dacc("calibrate", pipeline, "--inputs", "inputs.jsonl")
    assert ran.code == 2
    assert '{"class": 3}' in ran.error


def test_a_prompt_may_hold_what_else_ends_a_line():
    Path("inputs.jsonl").write_text('{"prompt": "a red\u2028circle"}\r\n{"prompt": "a\x85square"}\n', encoding="utf-8")
    assert read_inputs(Path("inputs.jsonl"))["prompts"] == ("a red\u2028circle", "a\x85square")


@pytest.mark.slow
def test_an_interrupted_command_goes_on_where_it_stopped(dacc, tmp_path, pipeline):
    words = [
        "calibrate",
        str(pipeline),
        "--samples",
        "60",
        "--batch-size",
        "1",
        "--steps",
        "20",
        "--device",
        "cpu",
        "-o",
        "set",
    ]
    running = subprocess.Popen(
        [*command(), *words],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        preexec_fn=heed_ctrl_c,
    )
    units = tmp_path / ".set.partial/units"
    deadline = time.monotonic() + 100
    while len(list(units.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert not (tmp_path / "set").exists()
    assert dacc(*words).code == 0
    assert dacc(*words[:-1], "plain").code == 0
    first, second = (snapshot(tmp_path / name) for name in ("set", "plain"))
    assert {**first, "dacc_run.json": ""} == {**second, "dacc_run.json": ""}
