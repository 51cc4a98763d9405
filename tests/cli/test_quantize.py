"""`dacc quantize` when all goes well, and when it is interrupted."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dacc.core.manifest import read_manifest

from .conftest import command, environment, heed_ctrl_c, snapshot


def test_one_line_on_standard_output_names_the_folder(dacc, pipeline, tmp_path):
    ran = dacc("quantize", pipeline)
    assert (ran.code, ran.out) == (0, "pipe-w4a16-rtn\n")
    assert "PSNR" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "pipe-w4a16-rtn"]
    assert read_manifest(tmp_path / "pipe-w4a16-rtn").passes[-1].config["bits"] == 4


def test_the_same_command_again_does_nothing(dacc, pipeline, unchanged):
    assert dacc("quantize", pipeline, "--measure", "never").code == 0
    unchanged()
    ran = dacc("quantize", pipeline, "--measure", "never")
    assert (ran.code, ran.out) == (0, "pipe-w4a16-rtn\n")
    assert "already holds this result" in ran.err
    unchanged()


def test_json_is_one_document_with_what_was_done(dacc, pipeline):
    ran = dacc("quantize", pipeline, "--bits", 8, "--act-bits", 8, "--json")
    assert ran.code == 0
    assert len(ran.lines) == 1
    record = json.loads(ran.out)
    assert list(record) == ["schema", "path", "manifest", "components", "effect", "notices"]
    assert record["path"] == "pipe-w8a8-rtn"
    assert record["components"]["unet"]["bytes"] < record["components"]["unet"]["bytes_fp32"] / 2
    assert record["effect"]["pipeline"]["psnr"] > 20


def test_quiet_prints_the_path_alone(dacc, pipeline):
    ran = dacc("quantize", pipeline, "--quiet", "--measure", "never", "-o", "out")
    assert (ran.code, ran.out, ran.err) == (0, "out\n", "")


def test_verbose_tells_more(dacc, pipeline):
    plain = dacc("quantize", pipeline, "--measure", "never", "-o", "a")
    verbose = dacc("quantize", pipeline, "--measure", "never", "-o", "b", "--verbose")
    assert "method auto: rtn" in verbose.err
    assert "method auto: rtn" not in plain.err


def test_a_notice_is_told_and_becomes_an_error_under_strict(dacc, pipeline, unchanged):
    (pipeline / "unet/old.bin").write_bytes(b"pickle")
    unchanged()
    strict = dacc("quantize", pipeline, "--measure", "never", "--strict", "-o", "out")
    assert strict.code == 2
    assert "old.bin" in strict.error
    assert "run without --strict" in strict.error
    unchanged()
    lenient = dacc("quantize", pipeline, "--measure", "never", "-o", "out")
    assert lenient.code == 0
    assert "notice: " in lenient.err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_dry_run_writes_nothing(dacc, pipeline, unchanged, form):
    unchanged()
    ran = dacc("quantize", pipeline, "--dry-run", "--bits", 3, *form)
    unchanged()
    assert ran.code == 0
    if form:
        preview = json.loads(ran.out)
        assert next(iter(preview)) == "schema"
        assert preview["components"]["unet"]["bytes_after"] < preview["components"]["unet"]["bytes_fp32"] / 2
    else:
        assert "UNet2DModel" in ran.out
        assert "first and last layers" in ran.out


def test_overwrite_replaces_a_pipeline(dacc, pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "out")
    ran = dacc("quantize", pipeline, "-o", "out", "--overwrite", "--measure", "never")
    assert (ran.code, ran.out) == (0, "out\n")
    assert read_manifest(tmp_path / "out") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pipe"]


def test_layers_are_chosen_by_pattern(dacc, pipeline, tmp_path):
    options = ["--include", "mid_block.*", "--exclude", "*.to_q", "--layer-bits", "*.to_k=8", "--set", "search=minmax"]
    ran = dacc("quantize", pipeline, "-o", "out", "--measure", "never", "--group-size", "channel", *options)
    assert ran.code == 0, ran.err
    modules = read_manifest(tmp_path / "out").components["unet"].quantization.modules
    assert modules["mid_block.attentions.0.to_q"].reason == "excluded"
    assert modules["mid_block.attentions.0.to_k"].scheme == "w8"
    assert modules["down_blocks.0.resnets.0.conv1"].reason == "not included"


def test_activation_bits_are_chosen_by_pattern(dacc, pipeline, tmp_path):
    options = ["--act-bits", 4, "--layer-act-bits", "mid_block.*=8", "--layer-act-bits", "*.to_q=16"]
    ran = dacc("quantize", pipeline, "-o", "out", "--measure", "never", "--group-size", "channel", *options)
    assert ran.code == 0, ran.err
    modules = read_manifest(tmp_path / "out").components["unet"].quantization.modules
    assert modules["mid_block.resnets.0.conv1"].scheme == "w4a8-offset"
    assert modules["mid_block.attentions.0.to_q"].scheme == "w4"
    assert modules["down_blocks.0.resnets.0.conv1"].scheme == "w4a4-offset"


def test_a_floor_that_is_met_changes_nothing(dacc, pipeline):
    ran = dacc("quantize", pipeline, "--bits", 8, "--require", "psnr>=10", "--require", "relative_l2<=1", "-o", "out")
    assert (ran.code, ran.out) == (0, "out\n"), ran.err


def test_verify_agrees_with_quantize(dacc, made):
    ran = dacc("verify", made / "digits-unet-w4a16-rtn")
    assert (ran.code, ran.out) == (0, f"{made / 'digits-unet-w4a16-rtn'}: intact\n")


def test_the_zoo_is_listed_and_copied(dacc, tmp_path):
    listed = dacc("zoo", "list")
    assert listed.code == 0
    names = ["digits-dit", "digits-unet", "digits-video", "shapes-mmdit", "shapes-sd"]
    assert [line.split()[0] for line in listed.lines] == [f"zoo:{name}" for name in names]
    entries = json.loads(dacc("zoo", "list", "--json").out)["pipelines"]
    assert [entry["name"] for entry in entries] == names
    copied = dacc("zoo", "copy", "zoo:digits-unet", "-o", "mine", "--json")
    assert json.loads(copied.out)["path"] == "mine"
    assert dacc("quantize", "mine", "--dry-run").code == 0


def test_inspect_describes_a_pipeline(dacc, pipeline):
    table = dacc("inspect", pipeline)
    assert table.code == 0, table.err
    assert "UNet2DModel" in table.out
    document = json.loads(dacc("inspect", pipeline, "--json").out)
    assert next(iter(document)) == "schema"
    assert document["components"]["unet"]["is_denoiser"] is True


def test_generate_writes_pictures_and_prints_their_folder(dacc, pipeline, tmp_path):
    ran = dacc("generate", pipeline, "--num", 2, "--steps", 2)
    assert (ran.code, ran.out) == (0, "pipe-images\n"), ran.err
    record = json.loads(dacc("generate", pipeline, "--num", 2, "--steps", 2, "-o", "again", "--json").out)
    assert record == {"schema": 1, "path": "again", "images": ["0000.png", "0001.png"]}
    assert (tmp_path / "again/0001.png").read_bytes() == (tmp_path / "pipe-images/0001.png").read_bytes()
    assert dacc("generate", pipeline, "--num", 1, "--steps", 2, "-o", "again", "--overwrite").code == 0
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["0000.png"]


def test_evaluate_writes_a_report_and_prints_a_table(dacc, pipeline, tmp_path):
    quick = ["--num", 2, "--steps", 2, "--no-memory", "--no-speed", "-o", "report"]
    assert dacc("quantize", pipeline, "-o", "small", "--measure", "never").code == 0
    ran = dacc("evaluate", "small", "--reference", pipeline, *quick)
    assert ran.code == 0, ran.err
    assert "PSNR" in ran.out
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["evaluation.json", "samples.png"]
    again = dacc("evaluate", "small", "--reference", pipeline, *quick, "--overwrite", "--json")
    assert json.loads(again.out) == json.loads((tmp_path / "report/evaluation.json").read_text())


def start(folder: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command(), *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        preexec_fn=heed_ctrl_c,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_goes_on_and_leaves_nothing_behind(tmp_path):
    arguments = ["quantize", "zoo:digits-unet", "--measure", "never", "-o", "out"]
    (tmp_path / "plain").mkdir()
    plain = start(tmp_path / "plain", *arguments)
    assert plain.communicate(timeout=120)[0] == "out\n"
    running = start(tmp_path, *arguments)
    units = tmp_path / ".out.partial/units"
    deadline = time.monotonic() + 120
    while not list(units.glob("[!.]*.safetensors")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "plain"]

    resumed = start(tmp_path, *arguments)
    out, err = resumed.communicate(timeout=120)
    assert (resumed.returncode, out) == (0, "out\n"), err
    assert "finished units of the interrupted run" in err
    assert not {"━", "\x1b", "\r"} & set(err)  # no bar where there is no terminal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    volatile = {"dacc_run.json"}
    once, twice = snapshot(tmp_path / "plain" / "out"), snapshot(tmp_path / "out")
    assert {name for name in once if once[name] != twice.get(name)} <= volatile


@pytest.mark.slow
def test_a_terminal_shows_a_bar(pipeline, tmp_path):
    ours, terminal = pty.openpty()
    running = start(tmp_path, "quantize", str(pipeline), "--measure", "never", "-o", "a", stderr=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    out, _ = running.communicate(timeout=60)
    os.close(ours)
    assert (running.returncode, out) == (0, "a\n")
    assert "quantize unet" in shown.decode()
    assert "━" in shown.decode()


@pytest.mark.slow
def test_threads_reach_torch(pipeline, tmp_path):
    ran = start(tmp_path, "quantize", str(pipeline), "--measure", "never", "-o", "out", "--threads", "2")
    _, err = ran.communicate(timeout=60)
    assert ran.returncode == 0, err
    assert read_manifest(tmp_path / "out").passes[-1].threads == 2  # the environment says 1
