"""`dacc export` at the shell."""

from __future__ import annotations

import json


def test_one_line_names_the_folder(dacc, pipeline, tmp_path):
    ran = dacc("export", pipeline)
    assert (ran.code, ran.out) == (0, "pipe-safetensors-bf16\n")
    assert (tmp_path / "pipe-safetensors-bf16" / "model_index.json").is_file()


def test_it_reads_what_the_command_before_made(process, pipeline):
    small = process("quantize", pipeline, "--measure", "never", "--json").out
    ran = process("export", "--format", "gguf", "--set", "type=q8_0", "--json", input=small)
    assert ran.code == 0
    record = json.loads(ran.out)
    assert record["path"].endswith("pipe-w4a16-rtn-gguf")
    assert record["components"]["unet"]["file"].endswith(".gguf")
    assert record["weights"] == "rounded anew from the float reference"


def test_an_output_that_exists_stays(dacc, pipeline, unchanged):
    assert dacc("export", pipeline).code == 0
    unchanged()
    ran = dacc("export", pipeline)
    assert ran.code == 2
    assert "exists" in ran.error
    unchanged()
    assert dacc("export", pipeline, "--overwrite").code == 0


def test_wrong_options_are_named(dacc, pipeline, unchanged):
    unchanged()
    assert "no export format 'ggml'" in dacc("export", pipeline, "--format", "ggml").error
    assert "type" in dacc("export", pipeline, "--format", "gguf", "--set", "type=q9").error
    fieldless = dacc("export", pipeline, "--format", "safetensors-bf16", "--set", "type=q9").error
    assert fieldless == "there is no field 'type'. It has no fields: leave --set out."
    assert "component" in dacc("export", pipeline, "--component", "prior").error
    unchanged()


def test_a_loss_is_exit_7_unless_lossy(dacc, pipeline):
    made = dacc(
        "quantize", pipeline, "--bits", 8, "--act-bits", 8, "--attention-bits", 8, "--measure", "never", "-o", "small"
    )
    assert made.code == 0
    ran = dacc("export", "small")
    assert ran.code == 7
    assert "--lossy" in ran.error
    assert dacc("export", "small", "--lossy").code == 0
