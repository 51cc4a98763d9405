"""The float pipeline of a bundle: found where its manifest says, or named and then checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dacc.core.errors import ModelError
from dacc.core.manifest import Manifest, SourceRecord
from dacc.core.reference import find_reference, given_reference
from dacc.core.reporter import silent
from dacc.core.safe_read import weight_hash
from dacc.core.source import Source, resolve_source

COMMIT = "c" * 40


@pytest.fixture
def bundle_from(make_pipeline, tmp_path) -> Callable[..., Source]:
    """A bundle that says where it came from."""

    def make(name: str, revision: str | None = None, weights: str | None = None) -> Source:
        folder = make_pipeline("bundle")
        record = SourceRecord(name=name, revision=revision, weights={"unet": weights or weight_hash(folder / "unet")})
        manifest = Manifest(requires={}, source=record, pipeline="Tiny", passes=[], components={}, files={})
        (folder / "dacc_manifest.json").write_text(manifest.to_json())
        return resolve_source(str(folder), reporter=silent())

    return make


def test_a_folder_beside_the_bundle_is_found_while_its_weights_are_the_same(bundle_from, make_pipeline):
    bundle = bundle_from("origin")
    assert find_reference(bundle, silent()) is None
    origin = make_pipeline("origin")
    assert find_reference(bundle, silent()).path == origin
    assert find_reference(bundle_from("origin", weights="0" * 64), silent()) is None


def test_a_damaged_folder_beside_the_bundle_is_told(bundle_from, make_pipeline):
    shutil.rmtree(make_pipeline("origin") / "text_encoder")
    with pytest.raises(ModelError, match="lacks the components text_encoder"):
        find_reference(bundle_from("origin"), silent())


def test_what_is_no_bundle_has_no_reference(make_pipeline):
    assert find_reference(resolve_source(str(make_pipeline()), reporter=silent()), silent()) is None


def test_a_pipeline_of_the_hub_is_found_in_its_cache_and_keeps_its_name(bundle_from, make_hub_cache, monkeypatch):
    from huggingface_hub import constants

    cache = make_hub_cache()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    found = find_reference(bundle_from("owner/tiny", COMMIT), silent())
    assert found == Source(cache / "models--owner--tiny/snapshots" / COMMIT, "tiny", "owner/tiny", COMMIT, "hub")
    assert find_reference(bundle_from("owner/tiny", "d" * 40), silent()) is None
    assert find_reference(bundle_from("owner/absent", COMMIT), silent()) is None
    assert find_reference(bundle_from("owner/tiny", f"../snapshots/{COMMIT}"), silent()) is None
    assert find_reference(bundle_from("owner/tiny", COMMIT, weights="0" * 64), silent()) is None


def test_a_part_of_a_pipeline_in_the_hubs_cache_is_none(bundle_from, make_hub_cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(make_hub_cache(without="text_encoder")))
    assert find_reference(bundle_from("owner/tiny", COMMIT), silent()) is None


def test_one_that_is_named_must_have_the_weights(bundle_from, make_pipeline, tmp_path):
    bundle = bundle_from("origin")
    elsewhere = Path(shutil.copytree(make_pipeline("origin"), tmp_path / "far" / "origin"))
    hashes = {"unet": weight_hash(elsewhere / "unet")}
    assert given_reference(elsewhere, bundle, hashes, silent()).path == elsewhere
    with pytest.raises(ModelError, match="other weights than what bundle was made from") as caught:
        given_reference(str(elsewhere), bundle, {"unet": "0" * 64}, silent())
    assert "Give origin" in caught.value.mend
