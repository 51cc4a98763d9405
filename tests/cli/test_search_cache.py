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


def test_a_plan_is_lost_in_an_export_and_that_needs_lossy(dacc, pipeline):
    assert dacc("search-cache", pipeline, *QUICK, "-o", "cached").code == 0
    refused = dacc("export", "cached")
    assert refused.code == 7
    assert "cache plan of unet" in refused.error
    assert dacc("export", "cached", "--lossy").code == 0
