"""Equal identities for equal sources only, at the price of reading what nobody has hashed."""

import json
import shutil
from pathlib import Path

import pytest

from dacc import PruneConfig, QuantizeConfig, SearchCacheConfig, quantize_pipeline, search_cache
from dacc.cache.api import prepare as prepare_search
from dacc.core import safe_read
from dacc.core.errors import ConfigError
from dacc.core.identity import source_identity
from dacc.core.reporter import silent
from dacc.core.safe_read import file_sha256
from dacc.prune.api import prepare as prepare_pruning
from dacc.quant.api import prepare as prepare_quantization

WEIGHTS = {"transformer": "0" * 64}
PREPARED = {
    "quantize": (prepare_quantization, QuantizeConfig(method="rtn")),
    "prune": (prepare_pruning, PruneConfig(method="bksdm")),
    "search-cache": (prepare_search, SearchCacheConfig()),
}


@pytest.fixture
def source(dit_folder, tmp_path):
    return shutil.copytree(dit_folder, tmp_path / "pipe")


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def flip_last_byte(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are hashed."""
    found: list[str] = []

    def watched(file: Path) -> str:
        found.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr(safe_read, "file_sha256", watched)
    return found


def test_a_copy_of_a_pipeline_is_the_same_source(dit_folder, source):
    assert source_identity(source, WEIGHTS) == source_identity(dit_folder, WEIGHTS)


@pytest.mark.parametrize(
    "edit",
    [
        lambda source: change(source / "scheduler/scheduler_config.json", beta_schedule="scaled_linear"),
        lambda source: change(source / "transformer/config.json", norm_eps=1e-3),
        lambda source: flip_last_byte(source / "vae/diffusion_pytorch_model.safetensors"),
        lambda source: (source / "notes.txt").write_text("more"),
    ],
    ids=["scheduler", "config", "other weights", "one more file"],
)
def test_whatever_a_result_takes_over_tells_sources_apart(edit, source):
    before = source_identity(source, WEIGHTS)
    edit(source)
    assert source_identity(source, WEIGHTS) != before


def test_another_version_of_dacc_may_give_another_result(source, monkeypatch):
    before = source_identity(source, WEIGHTS)
    monkeypatch.setattr("dacc.core.identity.__version__", "99.0")
    assert source_identity(source, WEIGHTS) != before


@pytest.mark.parametrize("command", PREPARED)
def test_every_pass_asks_for_another_result_of_another_scheduler(command, source, unet_folder, tmp_path):
    prepare, config = PREPARED[command]
    source = shutil.copytree(unet_folder, tmp_path / "unet")
    before = prepare(source, config, silent()).run_key
    change(source / "scheduler/scheduler_config.json", beta_schedule="scaled_linear")
    assert prepare(source, config, silent()).run_key != before


def test_the_same_command_after_another_search_does_not_keep_the_old_plan(unet_folder, tmp_path):
    def search(ratio):
        config = SearchCacheConfig(method="deepcache", macs_ratio=ratio, steps=8, samples=1, measure="never")
        return search_cache(unet_folder, config, output=tmp_path / "cached", overwrite=True, device="cpu")

    config = QuantizeConfig(measure="never")
    small = quantize_pipeline(search(0.6), config, output=tmp_path / "small", device="cpu")
    assert quantize_pipeline(search(0.6), config, output=small, device="cpu") == small
    with pytest.raises(ConfigError, match="exists"):
        quantize_pipeline(search(0.8), config, output=small, device="cpu")


def test_other_weights_of_a_bundle_are_known_from_its_manifest(source, tmp_path, read):
    bundle = quantize_pipeline(source, QuantizeConfig(measure="never"), output=tmp_path / "small", device="cpu")
    read.clear()
    found = source_identity(bundle, WEIGHTS)
    assert read
    assert not [name for name in read if name.endswith(".safetensors")]
    change(bundle / "scheduler/scheduler_config.json", beta_schedule="scaled_linear")
    assert source_identity(bundle, WEIGHTS)["files"] != found["files"]


def test_other_weights_of_the_hub_are_known_from_the_name_of_their_blob(source, tmp_path, read):
    plain, weights = source_identity(source, WEIGHTS), "vae/diffusion_pytorch_model.safetensors"
    repository = tmp_path / "models--owner--name"
    snapshot = shutil.copytree(source, repository / "snapshots" / "c0ffee")
    blob = repository / "blobs" / file_sha256(source / weights)
    blob.parent.mkdir()
    (snapshot / weights).rename(blob)
    (snapshot / weights).symlink_to(blob)
    read.clear()
    assert source_identity(snapshot, WEIGHTS) == plain
    assert Path(weights).name not in read
