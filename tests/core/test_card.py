import json

import pytest

from dacc.core.card import model_card
from dacc.core.manifest import ComponentRecord, Effect, Manifest, PassRecord, SourceRecord


def manifest_of(name, effect=None, notices=()):
    component = ComponentRecord(
        class_name="UNet2DModel",
        weight_hash="",
        reference_hash="",
        parameters=100,
        bytes_fp32=400,
        bytes_before=400,
        bytes_after=60,
    )
    done = PassRecord(
        command="quantize",
        config={"bits": 4, "method": "rtn", "exclude": []},
        seed=0,
        threads=1,
        notices=list(notices),
        effect={"pipeline": effect or Effect(relative_l2=0.0333, psnr=23.9, ssim=0.98, seeds=4, steps=10)},
    )
    source = SourceRecord(name=name, weights={})
    return Manifest(requires={}, source=source, pipeline="P", passes=[done], components={"unet": component}, files={})


def header_of(card):
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


def test_a_hub_source_is_named_as_base_model(tmp_path):
    header = header_of(model_card(manifest_of("owner/name"), tmp_path))
    assert header["base_model"] == "owner/name"
    assert header["base_model_relation"] == "quantized"
    assert header["library_name"] == "diffusers"
    assert header["tags"] == ["dacc", "dacc-quantize", "rtn"]


@pytest.mark.parametrize("name", ["zoo:digits-unet", "my-folder"])
def test_other_sources_are_no_base_model(tmp_path, name):
    assert "base_model" not in header_of(model_card(manifest_of(name), tmp_path))


def test_licence_and_task_of_the_source_are_kept_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\npipeline_tag: text-to-image\ninference: false\n---\n# Old words\n"
    )
    card = model_card(manifest_of("owner/name"), tmp_path)
    assert header_of(card)["license"] == "apache-2.0"
    assert header_of(card)["pipeline_tag"] == "text-to-image"
    assert "inference" not in header_of(card)
    assert "Old words" not in card


@pytest.mark.parametrize("text", [b"no header", b"---\n: [\n---\n", b"\xff\xfe", b"---\n- a list\n---\n", b""])
def test_an_unreadable_card_of_the_source_is_no_obstacle(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    assert "license" not in header_of(model_card(manifest_of("owner/name"), tmp_path))


def test_the_facts_are_there(tmp_path):
    card = model_card(manifest_of("owner/name", notices=["roles were guessed"]), tmp_path)
    assert "| unet | UNet2DModel | 100 | 400 | 60 | 0.150 | float |" in card
    assert "`quantize` with bits 4, method rtn" in card
    assert "relative L2 0.0333, PSNR 23.90 dB, SSIM 0.9800 (4 seeds, 10 steps)" in card
    assert "roles were guessed" in card
    assert manifest_of("owner/name", notices=["roles were guessed"]).sha256() in card


def test_what_was_not_measured_is_said(tmp_path):
    card = model_card(manifest_of("owner/name", Effect(not_measured="too large")), tmp_path)
    assert "not measured (too large)" in card


def test_the_same_facts_give_the_same_card(tmp_path):
    manifest = manifest_of("owner/name")
    again = Manifest(**json.loads(manifest.to_json()))
    assert model_card(manifest, tmp_path) == model_card(again, tmp_path)
