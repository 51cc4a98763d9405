"""The zoo: where its pipelines are looked for, their prompts, and how others are installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dacc.core.errors import ModelError, ResourceError
from dacc.core.folder import place_file
from dacc.core.lock import WriterLock
from dacc.core.output import only_writer
from dacc.core.zoo import INDEX_NAME, ZooEntry, copy_zoo, list_zoo, user_zoo, zoo_entry
from dacc.core.zoo_add import add_zoo

ENTRY = {"pipeline": "TinyPipeline", "description": "tiny", "num_inference_steps": 4, "judge": "judge", "extra": 1}
PROMPTS = {"calibration": ["a dog"], "evaluation": ["a cat", "a bird"]}


@pytest.fixture
def checkout(tmp_path, make_pipeline, monkeypatch) -> Path:
    """A zoo folder with two pipelines and their judge, and one that is only named; the user's own zoo is empty."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = tmp_path / "checkout"
    for name in ("drawn", "painted"):
        make_pipeline(f"checkout/{name}")
    (folder / "judge").mkdir()
    (folder / "judge/reference.json").write_text("{}")
    text = {**ENTRY, "conditioning": "text", "height": 32, "width": 48}
    (folder / "painted/prompts.json").write_text(json.dumps(PROMPTS))
    (folder / INDEX_NAME).write_text(json.dumps({"drawn": ENTRY, "painted": text, "absent": ENTRY}))
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# what is where


def test_a_named_pipeline_without_files_is_listed_but_not_ready(checkout, monkeypatch):
    monkeypatch.setenv("DACC_ZOO", str(checkout))
    installed = {entry.name: entry.installed for entry in list_zoo()}
    assert (installed["drawn"], installed["painted"], installed["absent"]) == (True, True, False)
    with pytest.raises(ModelError, match="not installed. Its weights are not part") as caught:
        zoo_entry("zoo:absent")
    assert "dacc zoo add FOLDER" in caught.value.mend


def test_a_folder_that_only_names_a_pipeline_hides_none_that_has_it(checkout, tmp_path, monkeypatch):
    add_zoo(checkout)
    named = tmp_path / "named"
    named.mkdir()
    (named / INDEX_NAME).write_text(json.dumps({"drawn": {**ENTRY, "description": "only named"}}))
    monkeypatch.setenv("DACC_ZOO", str(named))
    assert zoo_entry("drawn").path == user_zoo() / "drawn"


def test_the_users_zoo_lies_in_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert user_zoo() == tmp_path / ".local/share/dacc/zoo"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert user_zoo() == tmp_path / "data/dacc/zoo"


# copy


def test_a_copy_leaves_the_unfinished_run_of_another_command_alone(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("DACC_ZOO", str(checkout))
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial/units").write_text("finished layers")
    copy_zoo("drawn", tmp_path / "mine")
    assert (tmp_path / ".mine.partial/units").read_text() == "finished layers"
    assert (tmp_path / "mine/model_index.json").is_file()
    assert [name for name in names_in(tmp_path) if name.startswith(".mine")] == [".mine.partial"]


def test_a_copy_does_not_disturb_another_writer(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("DACC_ZOO", str(checkout))
    before = names_in(tmp_path)
    with only_writer(tmp_path / "mine"):
        with pytest.raises(ResourceError, match="another run"):
            copy_zoo("drawn", tmp_path / "mine")
        assert names_in(tmp_path) == sorted([*before, ".mine.lock"])
    assert names_in(tmp_path) == before


# prompts


def test_a_text_pipeline_has_two_lists_of_prompts_and_a_size(checkout, monkeypatch):
    monkeypatch.setenv("DACC_ZOO", str(checkout))
    painted = zoo_entry("painted")
    assert (painted.calibration_prompts, painted.evaluation_prompts) == (("a dog",), ("a cat", "a bird"))
    assert (painted.height, painted.width) == (32, 48)
    assert zoo_entry("drawn").evaluation_prompts == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("{", "no valid JSON"),
        ("[]", "valid dictionary"),
        ('{"calibration": ["a"]}', "evaluation"),
        ('{"calibration": [], "evaluation": ["a"]}', "calibration"),
        ('{"calibration": ["a"], "evaluation": [" "]}', "evaluation"),
        ('{"calibration": ["a"], "evaluation": [3]}', "evaluation"),
        ('{"calibration": ["a", "b"], "evaluation": ["b"]}', "'b' is in both lists"),
    ],
)
def test_damaged_prompts_are_refused_and_the_zoo_is_listed_all_the_same(checkout, monkeypatch, content, problem):
    monkeypatch.setenv("DACC_ZOO", str(checkout))
    file = checkout / "painted/prompts.json"
    file.unlink() if content is None else file.write_text(content)
    painted = next(entry for entry in list_zoo() if entry.name == "painted")
    with pytest.raises(ModelError, match="prompts.json.*" + problem):
        _ = painted.evaluation_prompts


def test_a_judge_outside_the_zoo_is_refused(checkout, monkeypatch):
    monkeypatch.setenv("DACC_ZOO", str(checkout))
    (checkout / INDEX_NAME).write_text(json.dumps({"drawn": {**ENTRY, "judge": "../judge"}}))
    with pytest.raises(ModelError, match="leads out of the zoo"):
        list_zoo()


# add


def test_pipelines_are_installed_with_their_judge_and_all_their_facts(checkout):
    assert add_zoo(checkout) == ("drawn", "painted")
    assert names_in(user_zoo()) == ["drawn", "index.json", "judge", "painted"]
    painted = zoo_entry("painted")
    assert painted.path == user_zoo() / "painted"
    assert painted.evaluation_prompts == ("a cat", "a bird")
    index = json.loads((checkout / INDEX_NAME).read_text())
    assert json.loads((user_zoo() / INDEX_NAME).read_text()) == {name: index[name] for name in ("drawn", "painted")}
    assert add_zoo(checkout) == ()


def test_a_second_folder_is_merged_and_only_overwrite_replaces(checkout, make_pipeline, tmp_path):
    add_zoo(checkout)
    (user_zoo() / "judge/mark").touch()
    make_pipeline("checkout/absent")
    (checkout / "drawn/note").touch()
    assert add_zoo(checkout) == ("absent",)
    assert not (user_zoo() / "drawn/note").exists()
    assert (user_zoo() / "judge/mark").exists()
    assert add_zoo(checkout, overwrite=True) == ("absent", "drawn", "painted")
    assert (user_zoo() / "drawn/note").exists()
    assert not (user_zoo() / "judge/mark").exists()
    assert {entry.name for entry in list_zoo()} >= {"absent", "drawn", "painted"}


def test_an_interrupted_copy_leaves_nothing_half(checkout, monkeypatch):
    from dacc.core import zoo_add

    def stop(source: Path, target: Path, *, link: bool) -> None:
        if source.parent.parent.name == "painted":  # all others are copied by now
            raise KeyboardInterrupt
        place_file(source, target, link=link)

    with monkeypatch.context() as patched:
        patched.setattr(zoo_add, "place_file", stop)
        with pytest.raises(KeyboardInterrupt):
            add_zoo(checkout)
    assert names_in(user_zoo()) == []
    (user_zoo() / ".partial/drawn").mkdir(parents=True)  # a process that was killed cleans nothing up
    assert add_zoo(checkout) == ("drawn", "painted")
    assert names_in(user_zoo()) == ["drawn", "index.json", "judge", "painted"]


def test_what_is_no_zoo_or_an_empty_one_is_refused(checkout, tmp_path):
    with pytest.raises(ModelError, match="is no zoo") as caught:
        add_zoo(tmp_path / "nowhere")
    assert "a checkout" in caught.value.mend
    (tmp_path / "repository").mkdir()
    checkout.rename(tmp_path / "repository/zoo")
    with pytest.raises(ModelError) as caught:
        add_zoo(tmp_path / "repository")
    assert caught.value.mend == f"Give {tmp_path / 'repository/zoo'}."
    for name in ("drawn", "painted"):
        shutil.rmtree(tmp_path / "repository/zoo" / name)
    with pytest.raises(ModelError, match="holds none of the pipelines"):
        add_zoo(tmp_path / "repository/zoo")


def test_a_pipeline_without_its_judge_is_not_installed(checkout):
    shutil.rmtree(checkout / "judge")
    with pytest.raises(ModelError, match="lacks judge, the judge of drawn"):
        add_zoo(checkout)
    assert not user_zoo().exists()


def test_two_processes_do_not_add_at_the_same_time(checkout):
    user_zoo().mkdir(parents=True)
    lock = WriterLock(user_zoo() / ".lock")
    lock.acquire()
    try:
        with pytest.raises(ResourceError):
            add_zoo(checkout)
    finally:
        lock.release()


def test_an_entry_keeps_facts_that_this_version_does_not_know(checkout):
    entry = ZooEntry(name="x", path=checkout, **ENTRY)
    assert entry.model_dump()["extra"] == 1
