import json

import pytest
from jsonschema import Draft202012Validator

from dacc.core.errors import BundleError
from dacc.core.manifest import (
    FORMAT,
    MANIFEST_NAME,
    REQUIRES,
    ComponentRecord,
    FileRecord,
    Manifest,
    ModuleRecord,
    PassRecord,
    QuantizationRecord,
    SourceRecord,
    StepRecord,
    read_manifest,
)
from dacc.core.schedule_id import ScheduleId
from dacc.core.scheme import Scheme


@pytest.fixture
def manifest():
    scheme = Scheme(bits=4, group_size=64, symmetric=False)
    modules = {"a": ModuleRecord(scheme=scheme.name, error=0.1), "b": ModuleRecord(reason="excluded")}
    component = ComponentRecord(
        class_name="UNet2DModel",
        weight_hash="ab",
        reference_hash="cd",
        parameters=100,
        bytes_fp32=400,
        bytes_before=400,
        bytes_after=60,
        quantization=QuantizationRecord(method="rtn", schemes={scheme.name: scheme}, modules=modules),
    )
    return Manifest(
        requires={"dacc": "0.1.0"},
        source=SourceRecord(name="zoo:digits-unet", weights={"unet": "cd"}),
        pipeline="DDIMPipeline",
        passes=[PassRecord(command="quantize", config={"bits": 4}, seed=0, threads=1, notices=["naïve — ok"])],
        components={"unet": component},
        files={"unet/config.json": FileRecord(size=3, sha256="ef")},
    )


def write(folder, text):
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def test_it_survives_the_disk(manifest, tmp_path):
    write(tmp_path, manifest.to_json())
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path).sha256() == manifest.sha256()


def test_the_grid_of_per_step_scales_and_what_a_method_decided_survive_the_disk(manifest, tmp_path):
    schedule = ScheduleId(scheduler="DDIMScheduler", config_sha256="ab", timesteps=(900.0, 100.5), sigmas=(3.0, 0.1))
    component = manifest.components["unet"]
    quantization = component.quantization.model_copy(
        update={"steps": StepRecord(schedule=schedule), "chosen": {"iterations": 3, "damping": 0.5, "order": "noise"}}
    )
    component = component.model_copy(update={"quantization": quantization})
    manifest = manifest.model_copy(update={"components": {"unet": component}})
    write(tmp_path, manifest.to_json())
    again = read_manifest(tmp_path)
    assert again == manifest
    assert again.components["unet"].quantization.steps.rule == "nearest"
    assert type(again.components["unet"].quantization.chosen["iterations"]) is int


def test_the_text_is_canonical(manifest):
    text = manifest.to_json()
    assert text.endswith("}\n")
    assert "naïve — ok" in text
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    shuffled = json.loads(text)
    assert Manifest(**dict(reversed(shuffled.items()))).sha256() == manifest.sha256()


def test_it_follows_its_own_schema(manifest):
    schema = Manifest.model_json_schema()
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(manifest.to_json()))


def test_a_folder_without_one_is_no_bundle(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("[]", "has no format number"),
        ("{}", "has no format number"),
        ('{"format": "1"}', "has no format number"),
        ('{"format": 1}', "requires: Field required"),
    ],
)
def test_damage_is_named(tmp_path, text, message):
    write(tmp_path, text)
    with pytest.raises(BundleError, match=message):
        read_manifest(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="is not readable JSON"):
        read_manifest(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(manifest, tmp_path):
    newer = {**json.loads(manifest.to_json()), "format": FORMAT + 1, "something": "new"}
    write(tmp_path, json.dumps(newer))
    with pytest.raises(BundleError, match=f"has format {FORMAT + 1}; this dacc reads up to {FORMAT}") as caught:
        read_manifest(tmp_path)
    assert "pip install -U" in caught.value.mend


@pytest.mark.parametrize("where", [(), ("components", "unet"), ("source",), ("passes", 0)])
def test_unknown_keys_are_refused_at_every_level(manifest, tmp_path, where):
    raw = json.loads(manifest.to_json())
    inner = raw
    for key in where:
        inner = inner[key]
    inner["surprise"] = 1
    write(tmp_path, json.dumps(raw))
    with pytest.raises(BundleError, match="surprise: Extra inputs"):
        read_manifest(tmp_path)


def test_free_additions_go_under_extra(manifest, tmp_path):
    write(tmp_path, manifest.model_copy(update={"extra": {"anything": [1, None]}}).to_json())
    assert read_manifest(tmp_path).extra == {"anything": [1, None]}


def test_a_result_goes_on_from_the_manifest_of_its_source(manifest):
    this = PassRecord(command="search-cache", config={}, seed=1, threads=1)
    treated = {"transformer": manifest.components["unet"].model_copy(update={"parameters": 7})}
    here = SourceRecord(name="elsewhere", weights={})
    asked = {"source": here, "pipeline": "DDIMPipeline", "components": treated, "files": {}}
    before = manifest.model_copy(update={"requires": {"dacc": "0.3.0"}})
    after = Manifest.after(before, [this], **asked)
    assert [entry.command for entry in after.passes] == ["quantize", "search-cache"]
    assert after.source == manifest.source
    assert after.history == [before.sha256()]
    assert set(after.components) == {"unet", "transformer"}
    assert after.requires == {**REQUIRES, "dacc": "0.3.0"}
    alone = Manifest.after(None, [this], **asked)
    assert (alone.source, alone.history, alone.passes, alone.requires) == (here, [], [this], REQUIRES)
