"""`dacc search-cache` at the shell."""

from __future__ import annotations

import json

QUICK = ("--macs-ratio", 0.7, "--method", "deepcache", "--steps", 6, "--measure", "never")


def test_it_reads_what_the_command_before_made_and_says_what_it_did(process, pipeline):
    small = process("quantize", pipeline, "--measure", "never").out
    ran = process("search-cache", *QUICK, "--json", input=small)
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    unet = record["components"]["unet"]
    assert (unet["method"], unet["calls"], len(unet["codes"]["deep"])) == ("deepcache", 6, 6)
    assert unet["macs_ratio"] <= 0.7
    assert process("verify", record["path"]).code == 0
    assert process("generate", record["path"], "--num", 1, "--steps", 6).code == 0


def test_wrong_options_are_named(dacc, pipeline, unchanged):
    unchanged()
    assert "no cache search 'deepcahe'" in dacc("search-cache", pipeline, "--method", "deepcahe").error
    assert "two targets" in dacc("search-cache", pipeline, "--speedup", 2, "--macs-ratio", 0.5).error
    assert "cut:9.9" in dacc("search-cache", pipeline, *QUICK, "--unit", "cut:9.9").error
    unchanged()


def test_a_schedule_file_that_is_not_given_is_asked_for(dacc, pipeline, unchanged):
    unchanged()
    assert dacc("search-cache", pipeline, "--method", "ecad").error == "file has to be given. Add --set file=VALUE."
    unchanged()


def test_a_ratio_out_of_reach_is_exit_7_and_names_the_best(dacc, pipeline, unchanged):
    unchanged()
    ran = dacc("search-cache", pipeline, "--macs-ratio", 0.01, "--method", "deepcache", "--steps", 4)
    assert ran.code == 7
    assert "0." in ran.error
    unchanged()


def test_a_dry_run_tells_what_the_target_allows_and_writes_nothing(dacc, pipeline, unchanged):
    unchanged()
    ran = dacc("search-cache", pipeline, *QUICK, "--dry-run")
    assert ran.code == 0, ran.err
    assert "unet (UNet2DModel), deepcache: 6 calls of" in ran.out
    assert "saved by a call that skips cut:0.0" in ran.out
    assert "of 6 calls may compute" in ran.out
    found = json.loads(dacc("search-cache", pipeline, *QUICK, "--dry-run", "--json").out)
    assert found["components"]["unet"]["methods"]["deepcache"]["macs_ratio"] <= 0.7
    assert dacc("search-cache", pipeline, "--macs-ratio", 0.01, "--dry-run").code == 7
    unchanged()


def test_it_takes_a_calibration_set_out_of_a_pipe_and_its_steps(process, pipeline):
    made = process("calibrate", pipeline, "--steps", 6, "--samples", 2, "--timesteps", 2, "-o", "set").out
    ran = process("search-cache", *QUICK[:4], "--measure", "never", "--json", input=made)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["components"]["unet"]["calls"] == 6


def test_a_plan_is_lost_in_an_export_and_that_needs_lossy(dacc, pipeline):
    assert dacc("search-cache", pipeline, *QUICK, "-o", "cached").code == 0
    refused = dacc("export", "cached")
    assert refused.code == 7
    assert "cache plan of unet" in refused.error
    assert dacc("export", "cached", "--lossy").code == 0
