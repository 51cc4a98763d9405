"""A bundle appears whole or not at all, and an interrupted run goes on where it stopped."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dacc.core.bundle import BundleWriter, component_weight_bytes, component_weight_hash, existing_bundle
from dacc.core.errors import BundleError, ConfigError, DaccError, ModelError, ResourceError
from dacc.core.manifest import ComponentRecord, FileRecord, Manifest, SourceRecord, read_manifest
from dacc.core.output import chosen_output
from dacc.core.reporter import Reporter, silent
from dacc.core.safe_read import read_header_and_metadata, weight_hash
from dacc.core.tensor_file import stored_tensors, write_tensors

UNITS = [f"unet/blocks.{number}" for number in range(4)]


def make_manifest(files: dict[str, FileRecord]) -> Manifest:
    record = ComponentRecord(
        class_name="UNet2DModel",
        weight_hash=component_weight_hash(files, "unet"),
        reference_hash="",
        parameters=1,
        bytes_fp32=4,
        bytes_before=4,
        bytes_after=component_weight_bytes(files, "unet"),
    )
    source = SourceRecord(name="pipe", weights={})
    return Manifest(
        requires={}, source=source, pipeline="TinyPipeline", passes=[], components={"unet": record}, files=files
    )


def writer_for(source: Path, output: Path, **options) -> BundleWriter:
    settings = {"replace": {"unet"}, "run_key": "key", "reporter": silent()} | options
    return BundleWriter(source, output, **settings)


def halve(writer: BundleWriter, *, stop_after: int = 99, error: BaseException | None = None) -> list[str]:
    """A toy pass: four units stored in half precision, the rest passed through. Names the units that it worked on."""
    stored = stored_tensors(writer.source / "unet")
    worked = []
    for number, unit in enumerate(UNITS):
        if number == stop_after:
            raise error
        if unit not in writer.finished_units():
            name = f"{unit.removeprefix('unet/')}.weight"
            writer.save_unit(unit, {name: stored[name].load().half()}, {"number": number})
            worked.append(unit)
    rest = {name: value for name, value in stored.items() if f"unet/{name.removesuffix('.weight')}" not in UNITS}
    writer.write_component("unet", {"_class_name": "UNet2DModel", "b": 1, "a": 2}, rest, info="halved")
    return worked


def make_bundle(source: Path, output: Path, **options) -> Path:
    with writer_for(source, output, **options) as writer:
        halve(writer)
        return writer.commit(make_manifest, {"seconds": 1.5}, lambda manifest: "# card\n")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def siblings(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# the result


def test_a_bundle_holds_the_merged_units_and_everything_else_unchanged(make_pipeline, tmp_path):
    source = make_pipeline()
    (source / "unet/extra.txt").write_text("kept")
    (source / ".git").mkdir()
    (source / ".git/config").write_text("")
    output = make_bundle(source, tmp_path / "out")
    tensors = stored_tensors(output / "unet")
    assert [value.dtype for value in tensors.values()] == 4 * ["F16"] + 2 * ["F32"]
    for name, value in stored_tensors(source / "unet").items():
        assert torch.equal(tensors[name].load(), value.load().to(tensors[name].load().dtype))
    old, new = content(source), content(output)
    assert {name for name in new if old.get(name) != new[name]} == {
        "README.md",
        "dacc_manifest.json",
        "dacc_run.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert old.keys() - new.keys() == {".git/config"}
    assert siblings(tmp_path) == ["out", "pipe"]


def test_the_manifest_records_every_file_and_the_run(make_pipeline, tmp_path):
    output = make_bundle(make_pipeline(), tmp_path / "out")
    manifest = read_manifest(output)
    assert set(manifest.files) == set(content(output)) - {"README.md", "dacc_manifest.json", "dacc_run.json"}
    assert all((output / name).stat().st_size == record.size for name, record in manifest.files.items())
    assert manifest.components["unet"].weight_hash == weight_hash(output / "unet")
    assert manifest.extra["run_key"] == "key"
    metadata = read_header_and_metadata(output / "unet/diffusion_pytorch_model.safetensors")[1]
    assert metadata == {"format": "pt", "dacc": "halved"}
    assert (output / "unet/config.json").read_text().startswith('{\n  "_class_name"')


def test_two_runs_give_equal_bytes(make_pipeline, tmp_path):
    source = make_pipeline()
    assert content(make_bundle(source, tmp_path / "a")) == content(make_bundle(source, tmp_path / "b"))


def test_diffusers_loads_what_was_written_in_shards(tmp_path):
    from diffusers import AutoencoderTiny

    tiny = {"encoder_block_out_channels": (4, 4, 4, 4), "decoder_block_out_channels": (4, 4, 4, 4)}
    model = AutoencoderTiny(**tiny)
    source = tmp_path / "pipe"
    model.save_pretrained(source / "vae")
    (source / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderTiny"]}))
    with writer_for(source, tmp_path / "out", replace={"vae"}) as writer:
        config = json.loads((source / "vae/config.json").read_text())
        writer.write_component("vae", config, stored_tensors(source / "vae"), shard_bytes=8000)
        writer.stage(lambda files: make_manifest(files), {}, lambda manifest: "")
        loaded = AutoencoderTiny.from_pretrained(writer.folder / "vae")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_files_are_shared_between_bundles_and_copied_from_elsewhere(make_pipeline, tmp_path):
    source = make_pipeline()
    first = make_bundle(source, tmp_path / "first")
    second = make_bundle(first, tmp_path / "second")
    name = "text_encoder/model.safetensors"
    assert not (first / name).samefile(source / name)
    assert (second / name).samefile(first / name)
    assert not (second / "dacc_manifest.json").samefile(first / "dacc_manifest.json")


def test_links_of_a_hub_snapshot_become_files(make_hub_cache, tmp_path):
    snapshot = make_hub_cache() / "models--owner--tiny/snapshots" / ("c" * 40)
    output = make_bundle(snapshot, tmp_path / "out")
    assert not [file for file in output.rglob("*") if file.is_symlink()]
    assert (output / "tokenizer/merges.txt").read_text() == "a b\n"


def test_pickles_and_whole_checkpoints_stay_behind_with_a_notice(make_pipeline, tmp_path):
    source, reporter = make_pipeline(), silent()
    (source / "text_encoder/pytorch_model.bin").write_bytes(b"x")
    (source / "whole.safetensors").write_bytes(b"x")
    output = make_bundle(source, tmp_path / "out", reporter=reporter)
    assert not {"text_encoder/pytorch_model.bin", "whole.safetensors"} & set(content(output))
    assert len(reporter.notices) == 1
    assert "text_encoder/pytorch_model.bin, whole.safetensors" in reporter.notices[0]


def test_a_source_bundle_that_changed_since_it_was_made_is_refused(make_pipeline, tmp_path):
    first = make_bundle(make_pipeline(), tmp_path / "first")
    (first / "tokenizer/merges.txt").write_text("c d\n")
    with pytest.raises(BundleError, match=r"tokenizer/merges.txt is not what its manifest says"):
        make_bundle(first, tmp_path / "second")


def test_a_text_written_anew_replaces_the_source_file(make_pipeline, tmp_path):
    first = make_bundle(make_pipeline(), tmp_path / "first")
    with writer_for(first, tmp_path / "out", replace=set()) as writer:
        writer.write_text("scheduler/scheduler_config.json", "{}")
        output = writer.commit(make_manifest, {}, lambda manifest: "")
    assert (output / "scheduler/scheduler_config.json").read_text() == "{}"
    assert (output / "unet/config.json").samefile(first / "unet/config.json")
    assert (first / "scheduler/scheduler_config.json").read_text() != "{}"


def test_the_very_same_run_is_recognised_while_its_result_is_intact(make_pipeline, tmp_path):
    output = make_bundle(make_pipeline(), tmp_path / "out")
    assert existing_bundle(output, "key")
    assert not existing_bundle(output, "another")
    assert not existing_bundle(tmp_path / "pipe", "key")
    assert not existing_bundle(tmp_path / "nothing", "key")


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda output: os.truncate(output / "unet/config.json", 1),
        lambda output: flip_last_byte(output / "unet/diffusion_pytorch_model.safetensors"),
        lambda output: (output / "unet/model.safetensors").write_bytes(b"added"),
        lambda output: (output / "tokenizer/merges.txt").unlink(),
    ],
)
def test_a_damaged_result_of_the_very_same_run_is_refused_as_such(make_pipeline, tmp_path, damage):
    output = make_bundle(make_pipeline(), tmp_path / "out")
    damage(output)
    with pytest.raises(ConfigError, match="this very result, but damaged: (unet|tokenizer)") as caught:
        existing_bundle(output, "key")
    assert "--overwrite" in caught.value.mend
    assert not existing_bundle(output, "another")


# refusals before any work


@pytest.mark.parametrize("place", ["pipe", "pipe/out", "pipe/unet", "."])
def test_output_and_source_cannot_lie_in_each_other(make_pipeline, tmp_path, place):
    with pytest.raises(ConfigError, match="lie in each other"):
        writer_for(make_pipeline(), tmp_path / place, overwrite=True)


@pytest.mark.parametrize("here", [".", "deep/inside"])
@pytest.mark.parametrize("written", ["absolute", "relative", "linked"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_folder_is_never_an_output(make_pipeline, tmp_path, monkeypatch, here, written, overwrite):
    source, output = make_pipeline(), make_pipeline("out")
    (output / here).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(output / here)
    if written == "relative":
        place = Path(os.path.relpath(output))
    elif written == "linked":
        (tmp_path / "link").symlink_to(tmp_path)
        place = tmp_path / "link/out"
    else:
        place = output
    before = content(output)
    with pytest.raises(ConfigError, match="is, or holds, the current folder"):
        writer_for(source, place, overwrite=overwrite)
    assert content(output) == before


def test_where_the_current_folder_was_deleted_others_are_written_all_the_same(make_pipeline, tmp_path, monkeypatch):
    source = make_pipeline()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        make_bundle(source, tmp_path / "out")
    finally:
        monkeypatch.chdir(tmp_path)


def test_an_empty_output_is_not_the_default():
    assert chosen_output(None, "default") == Path("default")
    assert chosen_output("out", "default") == Path("out")
    with pytest.raises(ConfigError, match="is empty"):
        chosen_output("", "default")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_not_ours_is_never_touched(make_pipeline, tmp_path, kind, overwrite):
    output, thesis = tmp_path / "out", tmp_path / "elsewhere/thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    if kind == "link":
        output.symlink_to(thesis.parent)
    elif kind == "file":
        thesis = thesis.rename(output)
    else:
        thesis = thesis.parent.rename(output) / thesis.name
    with pytest.raises(ConfigError, match="exists|is a file or a link|something else than a pipeline"):
        writer_for(make_pipeline(), output, overwrite=overwrite)
    assert thesis.read_text() == "years of work"


def test_overwrite_exchanges_the_old_pipeline_at_the_very_end(make_pipeline, tmp_path):
    source, old = make_pipeline(), make_pipeline("out")
    (old / "old.txt").write_text("old")
    with writer_for(source, old, overwrite=True) as writer:
        halve(writer)
        assert (old / "old.txt").exists()
        writer.commit(make_manifest, {}, lambda manifest: "")
    assert not (old / "old.txt").exists()
    assert siblings(tmp_path) == ["out", "pipe"]


def test_a_disk_that_is_too_small_is_found_before_the_work(make_pipeline, tmp_path):
    with (
        pytest.raises(ResourceError, match="needs about 1000000.0 GB"),
        writer_for(make_pipeline(), tmp_path / "out", estimated_bytes=10**15),
    ):
        pytest.fail("the work began")
    assert siblings(tmp_path) == ["pipe"]


# interruptions


def test_a_unit_is_kept_that_was_written_when_ctrl_c_came(tmp_path, make_pipeline, monkeypatch):
    def interrupted(*arguments):
        write_tensors(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("dacc.core.journal.write_tensors", interrupted)
    source = make_pipeline()
    with pytest.raises(KeyboardInterrupt), writer_for(source, tmp_path / "out") as writer:
        halve(writer)
    assert siblings(tmp_path) == [".out.partial", "pipe"]
    monkeypatch.undo()
    with writer_for(source, tmp_path / "out") as writer:
        assert len(writer.finished_units()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), ResourceError("full")])
def test_an_interrupted_run_goes_on_where_it_stopped(make_pipeline, tmp_path, error):
    source, output = make_pipeline(), tmp_path / "out"
    with pytest.raises(type(error)), writer_for(source, output) as writer:
        halve(writer, stop_after=2, error=error)
    assert siblings(tmp_path) == [".out.partial", "pipe"]
    with writer_for(source, output) as writer:
        assert writer.finished_units() == set(UNITS[:2])
        assert writer.unit_record(UNITS[1]) == {"number": 1}
        assert list(writer.unit_tensors(UNITS[1])) == ["blocks.1.weight"]
        assert halve(writer) == UNITS[2:]
        writer.commit(make_manifest, {"seconds": 1.5}, lambda manifest: "# card\n")
    assert content(output) == content(make_bundle(source, tmp_path / "plain"))
    assert siblings(tmp_path) == ["out", "pipe", "plain"]


def test_an_error_that_a_second_try_cannot_mend_leaves_nothing(make_pipeline, tmp_path):
    with pytest.raises(ModelError), writer_for(make_pipeline(), tmp_path / "out") as writer:
        halve(writer, stop_after=2, error=ModelError("NaN"))
    assert siblings(tmp_path) == ["pipe"]


@pytest.mark.parametrize("options", [{"run_key": "another"}, {"arithmetic": ("cpu", "2 threads")}, {"resume": False}])
def test_units_of_another_run_are_thrown_away(make_pipeline, tmp_path, options):
    source = make_pipeline()
    with pytest.raises(KeyboardInterrupt), writer_for(source, tmp_path / "out") as writer:
        halve(writer, stop_after=2, error=KeyboardInterrupt())
    with writer_for(source, tmp_path / "out", **options) as writer:
        assert writer.finished_units() == set()


@pytest.mark.parametrize("cut", [True, False])
def test_a_unit_that_never_wholly_reached_the_disk_is_done_again(make_pipeline, tmp_path, cut):
    source = make_pipeline()
    with pytest.raises(KeyboardInterrupt), writer_for(source, tmp_path / "out") as writer:
        halve(writer, stop_after=2, error=KeyboardInterrupt())
    damaged = next((tmp_path / ".out.partial/units").glob("*.safetensors"))
    size = damaged.stat().st_size
    os.truncate(damaged, size - 40)
    if not cut:
        os.truncate(damaged, size)  # zeros, as some file systems leave them after a power cut
    with writer_for(source, tmp_path / "out") as writer:
        assert len(writer.finished_units()) == 1


def test_an_error_before_the_first_unit_leaves_nothing(make_pipeline, tmp_path):
    with pytest.raises(KeyboardInterrupt), writer_for(make_pipeline(), tmp_path / "out") as writer:
        halve(writer, stop_after=0, error=KeyboardInterrupt())
    assert siblings(tmp_path) == ["pipe"]


@pytest.mark.parametrize("place", ["bundle.place_file", "bundle.write_weights", "output.swap_in", "bundle.sync_tree"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_loses_neither_the_old_output_nor_the_units(make_pipeline, tmp_path, monkeypatch, place, code):
    source, old = make_pipeline(), make_pipeline("out")
    before = content(old)

    def full(*arguments, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(f"dacc.core.{place}", full)
        with pytest.raises(ResourceError, match="is full"):
            make_bundle(source, old, overwrite=True)
    assert content(old) == before
    with writer_for(source, old, overwrite=True) as writer:
        assert halve(writer) == []


def test_a_crash_between_the_two_renames_brings_the_old_output_back(make_pipeline, tmp_path):
    source, old = make_pipeline(), make_pipeline("out")
    old.rename(tmp_path / ".out.old")  # what a killed process leaves
    with pytest.raises(ConfigError, match="exists"), writer_for(source, old):
        pytest.fail("the old output was not seen")
    assert siblings(tmp_path) == ["out", "pipe"]
    make_bundle(source, old, overwrite=True)
    assert siblings(tmp_path) == ["out", "pipe"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_result_that_is_not_good_enough_is_kept_aside_or_dropped(make_pipeline, tmp_path, keep):
    with writer_for(make_pipeline(), tmp_path / "out") as writer:
        halve(writer)
        assert writer.abandon(keep=keep) == (tmp_path / "out.failed" if keep else None)
    assert siblings(tmp_path) == (["out.failed", "pipe"] if keep else ["pipe"])
    assert not keep or (tmp_path / "out.failed/tokenizer/merges.txt").is_file()


def test_a_folder_that_cannot_be_written_is_nobodys_bug(make_pipeline, tmp_path, monkeypatch):
    source = make_pipeline()

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("dacc.core.lock.os.open", refuse)
    with pytest.raises(ResourceError, match="cannot be written"), writer_for(source, tmp_path / "out"):
        pytest.fail("the work began")


# two writers


def test_a_second_writer_is_refused_and_disturbs_nothing(make_pipeline, tmp_path):
    source = make_pipeline()
    with writer_for(source, tmp_path / "out") as first:
        halve(first)
        with (
            pytest.raises(ResourceError, match=f"process {os.getpid()}") as caught,
            writer_for(source, tmp_path / "out"),
        ):
            pytest.fail("two writers at once")
        assert caught.value.exit_code == 5
        with writer_for(source, tmp_path / "other"):
            pass
        first.commit(make_manifest, {}, lambda manifest: "")
    assert siblings(tmp_path) == ["out", "pipe"]


def test_the_lock_of_a_dead_process_is_no_obstacle(make_pipeline, tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from dacc.core.lock import WriterLock\n"
        "WriterLock(Path(sys.argv[1])).acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / ".out.lock")], check=False)
    assert (tmp_path / ".out.lock").exists()
    make_bundle(make_pipeline(), tmp_path / "out")
    assert siblings(tmp_path) == ["out", "pipe"]


@pytest.mark.parametrize("strict", [False, True])
def test_strict_refuses_at_the_beginning_not_at_the_end(make_pipeline, tmp_path, strict):
    source = make_pipeline()
    (source / "text_encoder/pytorch_model.bin").write_bytes(b"x")
    reporter = Reporter(quiet=True, strict=strict)
    with pytest.raises(DaccError) if strict else nullcontext(), writer_for(source, tmp_path / "out", reporter=reporter):
        assert not strict
