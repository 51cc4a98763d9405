"""From the SOURCE that was given to a folder, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from dacc.core.errors import BundleError, DaccError, ModelError
from dacc.core.reporter import Reporter, silent
from dacc.core.source import Source, component_entries, resolve_source, zoo_entry_of
from dacc.core.zoo import copy_zoo, list_zoo, zoo_entry

COMMIT = "c" * 40


class Listener(Reporter):
    """Remembers what was said instead of printing it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def zoo(tmp_path, make_pipeline, monkeypatch):
    folder = tmp_path / "zoo"
    entry = {"pipeline": "TinyPipeline", "description": "tiny", "num_inference_steps": 4, "judge": "judge", "extra": 1}
    for name in ("digits-unet", "digits-dit"):
        make_pipeline(f"zoo/{name}")
    (folder / "index.json").write_text(json.dumps({"digits-unet": entry, "digits-dit": entry}))
    monkeypatch.setenv("DACC_ZOO", str(folder))
    return folder


def piped(text: str) -> int:
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    return reading


# folders


def test_a_local_folder_is_named_without_its_place(make_pipeline):
    folder = make_pipeline("my-model")
    assert resolve_source(str(folder), reporter=silent()) == Source(folder, "my-model", "my-model", None, "folder")


def test_a_dot_means_the_current_folder(make_pipeline, monkeypatch):
    monkeypatch.chdir(make_pipeline("my-model"))
    assert resolve_source(".", reporter=silent()).name == "my-model"


def test_a_folder_with_a_manifest_is_a_bundle(make_pipeline):
    folder = make_pipeline()
    (folder / "dacc_manifest.json").write_text("{}")
    assert resolve_source(str(folder), reporter=silent()).kind == "bundle"


def test_a_folder_wins_over_a_hub_name_and_that_is_said(make_pipeline, tmp_path, monkeypatch):
    make_pipeline("owner/name")
    monkeypatch.chdir(tmp_path)
    listener = Listener()
    assert resolve_source("owner/name", reporter=listener).kind == "folder"
    assert listener.said == ["owner/name is a folder here: using that, not the Hub"]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("no/such/folder", "Check the path"),
        ("digits-unet", "Did you mean zoo:digits-unet?"),
        ("zoo:digits-uent", "Did you mean digits-unet"),
        ("", "a command that failed"),
    ],
)
def test_a_source_that_is_nowhere_gets_advice(zoo, text, advice):
    with pytest.raises(ModelError) as caught:
        resolve_source(text, reporter=silent())
    assert advice in caught.value.mend


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "not a diffusers pipeline"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "not a table of components"),
        (lambda folder: (folder / "model_index.json").write_text('{"unet": '), "no valid JSON"),
        (lambda folder: (folder / "model_index.json").write_text('{"../x": ["a", "b"]}'), "leads out"),
        (lambda folder: (folder / "unet").rename(folder / "other"), "lacks the components unet"),
        (lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").unlink(), "has no weights in unet"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": 3}'),
            "_class_name 3, which names no",
        ),
        (lambda folder: (folder / "unet/config.json").write_text("[]"), r"unet/config.json is not a table"),
        (lambda folder: (folder / "scheduler/scheduler_config.json").write_text("3"), "scheduler_config.json is not a"),
        (
            lambda folder: (folder / "scheduler/scheduler_config.json").unlink(),
            "has no scheduler/scheduler_config.json",
        ),
        (lambda folder: (folder / "text_encoder/config.json").unlink(), "has no text_encoder/config.json"),
    ],
)
def test_a_folder_that_is_no_whole_pipeline_is_refused(make_pipeline, spoil, message):
    folder = make_pipeline()
    spoil(folder)
    with pytest.raises(DaccError, match=message) as caught:
        resolve_source(str(folder), reporter=silent())
    assert caught.value.exit_code == (4 if isinstance(caught.value, BundleError) else 3)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_out(make_pipeline, name):
    folder = make_pipeline()
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet" / name)
    with pytest.raises(ModelError, match=f"pickled weights: unet/{name}") as caught:
        resolve_source(str(folder), reporter=silent())
    assert "save_pretrained(folder, safe_serialization=True)" in caught.value.mend


def test_pickles_beside_safetensors_are_no_obstacle(make_pipeline):
    folder = make_pipeline()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    assert resolve_source(str(folder), reporter=silent()).path == folder


def test_a_single_component_is_told_from_a_pipeline(make_pipeline):
    folder = make_pipeline()
    with pytest.raises(ModelError, match="is a single component") as caught:
        resolve_source(str(folder / "unet"), reporter=silent())
    assert caught.value.mend == f"Give {folder} and --component unet."


def test_a_checkpoint_file_is_refused_with_the_way_out(make_pipeline):
    with pytest.raises(ModelError) as caught:
        resolve_source(str(make_pipeline() / "unet/diffusion_pytorch_model.safetensors"), reporter=silent())
    assert "from_single_file" in caught.value.mend


def test_null_components_and_private_keys_are_no_components(make_pipeline):
    assert set(component_entries(make_pipeline())) == {"unet", "text_encoder", "scheduler", "tokenizer"}


# standard input


@pytest.mark.parametrize(
    "form", ["{path}\n", '{{"schema": 1, "path": "{path}"}}', "noise\n{path}\n\n", 'a\n{{"path": "{path}"}}']
)
@pytest.mark.parametrize("text", [None, "-"])
def test_the_command_before_names_the_source(make_pipeline, form, text):
    folder = make_pipeline()
    assert resolve_source(text, reporter=silent(), stdin=piped(form.format(path=folder))).path == folder


def test_a_json_record_may_be_written_over_several_lines(make_pipeline):
    folder = make_pipeline()
    text = json.dumps({"schema": 1, "path": str(folder)}, indent=2)
    assert resolve_source(None, reporter=silent(), stdin=piped(text)).path == folder


def test_a_regular_file_on_standard_input_is_read(make_pipeline, tmp_path):
    (tmp_path / "record").write_text(f"{make_pipeline()}\n")
    with (tmp_path / "record").open() as stream:
        assert resolve_source(None, reporter=silent(), stdin=stream.fileno()).name == "pipe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the command before failed"),
        (" \n", "the command before failed"),
        ('{"a": 1}', "no key 'path'"),
        ("a\nb", "no line"),
    ],
)
def test_what_names_no_source_is_refused(text, message):
    with pytest.raises(ModelError, match=message):
        resolve_source(None, reporter=silent(), stdin=piped(text))


def test_given_text_leaves_standard_input_alone(make_pipeline):
    reading = piped("something for another program")
    resolve_source(str(make_pipeline()), reporter=silent(), stdin=reading)
    assert os.read(reading, 100) == b"something for another program"


@pytest.mark.parametrize("kind", ["null", "terminal", "closed", "socket"])
def test_without_a_pipe_the_embedded_default_is_used_and_said(zoo, kind):
    import socket

    pair = socket.socketpair()
    descriptor = {
        "null": lambda: os.open(os.devnull, os.O_RDONLY),
        "terminal": lambda: os.openpty()[1],
        "closed": lambda: 999,
        "socket": lambda: pair[0].fileno(),
    }[kind]()
    listener = Listener()
    source = resolve_source(None, reporter=listener, stdin=descriptor)
    assert (source.identity, source.kind) == ("zoo:digits-unet", "zoo")
    assert listener.said == ["no SOURCE given: using zoo:digits-unet"]


def test_a_dash_on_a_terminal_does_not_wait(zoo):
    with pytest.raises(ModelError, match="nothing is piped"):
        resolve_source("-", reporter=silent(), stdin=os.openpty()[1])


def test_the_reader_is_told_what_is_waited_for(make_pipeline, monkeypatch):
    monkeypatch.setattr("dacc.core.piped.PATIENCE_S", 0.01)
    folder, listener = make_pipeline(), Listener()
    reading, writing = os.pipe()
    later = threading.Timer(0.2, lambda: (os.write(writing, str(folder).encode()), os.close(writing)))
    later.start()
    assert resolve_source(None, reporter=listener, stdin=reading).path == folder
    assert listener.said == ["waiting for the command before, which is to name the SOURCE"]


# zoo


def test_the_zoo_is_listed_with_what_its_index_says(zoo):
    names = [entry.name for entry in list_zoo()]
    assert names[:2] == ["digits-dit", "digits-unet"]
    assert zoo_entry("digits-unet").path == zoo / "digits-unet"
    assert zoo_entry("zoo:digits-dit").judge == "judge"
    assert zoo_entry("digits-dit").num_inference_steps == 4


def test_a_bundle_from_a_zoo_that_is_not_known_here_is_a_pipeline_like_any_other(make_pipeline, monkeypatch):
    folder = make_pipeline()
    made_from = SimpleNamespace(source=SimpleNamespace(name="zoo:somebody-elses"))
    monkeypatch.setattr("dacc.core.source.read_manifest", lambda path: made_from)
    assert zoo_entry_of(Source(folder, "small", "small", None, "bundle")) is None


def test_a_zoo_pipeline_is_copied_whole_and_not_over_something(zoo, tmp_path):
    copied = copy_zoo("digits-unet", tmp_path / "mine")
    assert resolve_source(str(copied), reporter=silent()).name == "mine"
    names = sorted(file.relative_to(copied) for file in copied.rglob("*"))
    assert names == sorted(file.relative_to(zoo / "digits-unet") for file in (zoo / "digits-unet").rglob("*"))
    with pytest.raises(DaccError, match="exists") as caught:
        copy_zoo("digits-unet", tmp_path / "mine")
    assert caught.value.exit_code == 2
    copy_zoo("digits-unet", tmp_path / "mine", overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "zoo"]


def test_a_zoo_variable_that_names_no_zoo_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("DACC_ZOO", str(tmp_path))
    with pytest.raises(ModelError, match="holds no index.json"):
        list_zoo()


# Hub


def test_a_cached_hub_model_resolves_offline_to_its_commit(make_hub_cache):
    program = (
        "import sys; from dacc.core.source import resolve_source; from dacc.core.reporter import silent\n"
        "for text in sys.argv[1:]:\n"
        "    found = resolve_source(text, reporter=silent())\n"
        "    print(found.path, found.name, found.identity, found.revision, found.kind)"
    )
    cache = make_hub_cache()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}  # read once, at import
    command = [sys.executable, "-c", program, "owner/tiny", f"owner/tiny@{COMMIT}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder = cache / "models--owner--tiny/snapshots" / COMMIT
    assert done.stdout.splitlines() == 2 * [f"{folder} tiny owner/tiny {COMMIT} hub"]


@pytest.mark.parametrize(
    ("text", "without", "message"),
    [
        ("owner/absent", "", "is not in the Hub cache"),
        ("owner/tiny@v9", "", "is not in the Hub cache"),
        ("owner/tiny", "text_encoder", "lacks the components text_encoder. Only a part of it is in the Hub cache"),
        ("owner/tiny", "unet/diffusion", "has no weights in unet. Only a part of it is in the Hub cache"),
    ],
)
def test_what_the_cache_lacks_is_named_offline(make_hub_cache, monkeypatch, text, without, message):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(make_hub_cache(without=without)))
    with pytest.raises(ModelError, match=message):
        resolve_source(text, reporter=silent())


def test_a_download_takes_components_only_and_never_pickles(make_pipeline, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns, local_files_only):
        calls.append((revision, allow_patterns, ignore_patterns))
        return str(folder)

    folder = make_pipeline("a" * 40)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = resolve_source("owner/tiny@main", reporter=silent())
    assert (source.identity, source.revision) == ("owner/tiny", "a" * 40)
    wanted = [pattern for _, patterns, _ in calls for pattern in patterns]
    assert calls[0][:2] == ("main", ["model_index.json", "dacc_manifest.json"])
    assert calls[1][0] == "a" * 40
    assert "unet/*.safetensors" in wanted
    assert not [
        pattern for pattern in wanted if pattern.endswith((".bin", ".ckpt", ".pt")) or pattern == "*.safetensors"
    ]
    assert "*.fp16.*" in calls[1][2]
