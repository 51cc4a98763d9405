"""`dacc zoo`: what is listed, and what is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dacc.core.zoo import user_zoo


@pytest.fixture
def checkout(tmp_path: Path, unet_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo folder with one pipeline that is installed nowhere yet."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    shutil.copytree(unet_folder, tmp_path / "zoo/tiny")
    entry = {"pipeline": "DDIMPipeline", "description": "Tiny.", "num_inference_steps": 4}
    (tmp_path / "zoo/index.json").write_text(json.dumps({"tiny": entry, "gone": entry}))
    return tmp_path / "zoo"


def test_an_added_pipeline_is_a_source(dacc, checkout, tmp_path):
    ran = dacc("zoo", "add", checkout)
    assert (ran.code, ran.out, ran.err) == (0, "zoo:tiny\n", "")
    assert dacc("zoo", "copy", "tiny", "-o", "mine").out == "mine\n"
    assert (tmp_path / "mine/model_index.json").is_file()
    again = dacc("zoo", "add", checkout)
    assert (again.code, again.out) == (0, "")
    assert "installed already" in again.err
    replaced = dacc("zoo", "add", checkout, "--overwrite", "--json")
    assert json.loads(replaced.out) == {"schema": 1, "folder": str(user_zoo()), "added": ["zoo:tiny"]}


def test_the_list_says_what_is_installed(dacc, checkout, monkeypatch):
    monkeypatch.setenv("DACC_ZOO", str(checkout))
    lines = {line.split()[0]: line for line in dacc("zoo", "list").lines}
    assert "not installed" in lines["zoo:gone"]
    assert "not installed" not in lines["zoo:tiny"]
    rows = {row["name"]: row for row in json.loads(dacc("zoo", "list", "--json").out)["pipelines"]}
    assert (rows["tiny"]["installed"], rows["gone"]["installed"]) == (True, False)
    assert rows["shapes-sd"]["conditioning"] == "text"


def test_prompts_are_read_from_a_file_after_those_that_were_given(tmp_path):
    from dacc.cli.options import read_prompts

    (tmp_path / "prompts.txt").write_text("\ufeff  a small circle \n\n\na large square", encoding="utf-8")
    assert read_prompts(["a cat"], tmp_path / "prompts.txt") == ("a cat", "a small circle", "a large square")
    assert read_prompts(["a cat"], None) == ("a cat",)
    assert read_prompts(None, None) is None
