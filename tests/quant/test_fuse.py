"""Adapters in the weights of tiny text-to-image pipelines."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from dacc import QuantizeConfig, quantize_pipeline, verify_bundle
from dacc.core.errors import ConfigError, DaccError, ModelError, UnsupportedError
from dacc.core.manifest import read_manifest
from dacc.core.safe_read import file_sha256
from dacc.core.tensor_file import stored_tensors
from dacc.quant import fuse
from dacc.quant.fuse import find_lora
from dacc.quant.preview import preview_quantization

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
CONFIG = QuantizeConfig(bits=8, measure="never")
FLUX = ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.ff.net.2")
UNET = re.compile(r"attn1\.to_[qv]$")


def pairs_for(pipe, names, rank=2, size=0.3, seed=0):
    """Both matrices of an adapter of some linears of a pipeline."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        component, _, inside = name.partition(".")
        rows, features = getattr(pipe, component).get_submodule(inside).weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, features, generator=generator) * size
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * size
    return tensors


def by_hand_(pipe, tensors, scale):
    """The same without a loader."""
    for name in {key.rpartition(".lora_")[0] for key in tensors}:
        component, _, inside = name.partition(".")
        weight = getattr(pipe, component).get_submodule(inside).weight
        weight.data += scale * (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"])
    return pipe


def unet_names(pipe):
    return [f"unet.{name}" for name, _ in pipe.unet.named_modules() if UNET.search(name)]


def contents(folder):
    return {name: tensor.load() for name, tensor in stored_tensors(folder).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_fused_then_quantized_equals_weights_that_were_changed_by_hand(kind, request, tmp_path):
    pytest.importorskip("peft")
    pipe, folder = request.getfixturevalue(f"{kind}_pipeline")(), request.getfixturevalue(f"{kind}_folder")
    component = "unet" if kind == "sd" else "transformer"
    names = unet_names(pipe) if kind == "sd" else FLUX
    tensors = pairs_for(pipe, names)
    save_file(tensors, tmp_path / "style.safetensors")
    by_hand_(pipe, tensors, 0.5).save_pretrained(tmp_path / "hand")
    options = {"device": "cpu"}
    lora = f"{tmp_path / 'style.safetensors'}:0.5"
    fused = quantize_pipeline(folder, CONFIG, output=tmp_path / "fused", fuse_lora=[lora], **options)
    hand = quantize_pipeline(tmp_path / "hand", CONFIG, output=tmp_path / "expected", **options)
    plain = quantize_pipeline(folder, CONFIG, output=tmp_path / "plain", **options)
    assert same(contents(fused / component), contents(hand / component))
    assert not same(contents(fused / component), contents(plain / component))
    assert same(contents(fused / "text_encoder"), contents(folder / "text_encoder"))
    assert verify_bundle(fused) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".fused.fused")) == []
    manifest = read_manifest(fused)
    assert [done.command for done in manifest.passes] == ["fuse-lora", "quantize"]
    sha256 = file_sha256(tmp_path / "style.safetensors")
    assert manifest.passes[0].config == {"file": "style.safetensors", "sha256": sha256, "scale": 0.5}
    assert manifest.source.weights == read_manifest(plain).source.weights
    assert str(tmp_path) not in manifest.to_json()


def test_several_adapters_add_up_and_text_encoders_are_carried_changed(sd_pipeline, sd_folder, tmp_path):
    pytest.importorskip("peft")
    pipe = sd_pipeline()
    reader = next(name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj"))
    files = {"one": unet_names(pipe)[:1], "two": [*unet_names(pipe)[:2], f"text_encoder.{reader}"]}
    loras = []
    for seed, (name, names) in enumerate(files.items()):
        tensors = pairs_for(pipe, names, seed=seed)
        save_file(tensors, tmp_path / f"{name}.safetensors")
        by_hand_(pipe, tensors, 1.0)
        loras.append(str(tmp_path / f"{name}.safetensors"))
    pipe.save_pretrained(tmp_path / "hand")
    fused = quantize_pipeline(sd_folder, CONFIG, output=tmp_path / "fused", fuse_lora=loras, device="cpu")
    hand = quantize_pipeline(tmp_path / "hand", CONFIG, output=tmp_path / "expected", device="cpu")
    assert same(contents(fused / "text_encoder"), contents(hand / "text_encoder"))
    found, expected = contents(fused / "unet"), contents(hand / "unet")
    assert found.keys() == expected.keys()
    for name in (name for name in found if name.endswith(".scale")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)
    assert [done.config["file"] for done in read_manifest(fused).passes[:2]] == ["one.safetensors", "two.safetensors"]
    again = quantize_pipeline(sd_folder, CONFIG, output=tmp_path / "fused", fuse_lora=loras, device="cpu")
    assert again == fused  # it was there
    with pytest.raises(ConfigError, match="exists"):
        quantize_pipeline(sd_folder, CONFIG, output=tmp_path / "fused", fuse_lora=loras[:1], device="cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, tensor: (name.replace("to_q", "to_nowhere"), tensor), "another model"),
        (lambda name, tensor: (name, tensor.repeat(2, 2)), "another model"),
        (lambda name, tensor: (name.replace("lora_", "mystery_"), tensor), "no adapter"),
        (lambda name, tensor: (name.replace("unet.", "transformer."), tensor), "another model"),
    ],
)
def test_a_file_of_another_model_is_refused_once_and_nothing_is_left(change, said, sd_pipeline, sd_folder, tmp_path):
    pytest.importorskip("peft")
    pipe = sd_pipeline()
    tensors = pairs_for(pipe, unet_names(pipe))
    changed = dict(change(name, tensor.clone()) for name, tensor in tensors.items())
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=said) as caught:
        quantize_pipeline(
            sd_folder, CONFIG, output=tmp_path / "out", fuse_lora=[tmp_path / "other.safetensors"], device="cpu"
        )
    assert "other.safetensors" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_a_pipeline_without_adapters_is_refused(dit_folder, tmp_path):
    save_file({"lora_A.weight": torch.zeros(1, 1)}, tmp_path / "any.safetensors")
    with pytest.raises(UnsupportedError, match="DiTPipeline takes no adapters"):
        preview_quantization(dit_folder, CONFIG, fuse_lora=[tmp_path / "any.safetensors"], reporter=fuse.Reporter())


def test_a_missing_package_is_named_with_the_way_to_get_it(flux_folder, tmp_path, monkeypatch):
    save_file({"lora_A.weight": torch.zeros(1, 1)}, tmp_path / "any.safetensors")
    monkeypatch.setattr(fuse, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dacc-diffusion\[lora\]'"):
        quantize_pipeline(flux_folder, CONFIG, output=tmp_path / "out", fuse_lora=[tmp_path / "any.safetensors"])


def test_files_and_scales_are_read(tmp_path):
    file = tmp_path / "style.safetensors"
    save_file({"lora_A.weight": torch.zeros(1, 1)}, file)
    assert (find_lora(str(file)).scale, find_lora(f"{file}:0.8").scale, find_lora(f"{file}:-1").scale) == (1, 0.8, -1)
    (tmp_path / "style:2.safetensors").write_bytes(file.read_bytes())
    assert find_lora(str(tmp_path / "style:2.safetensors")).scale == 1


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("missing.safetensors", ModelError, "no adapter file"),
        ("style.safetensors:much", ConfigError, "no scale"),
        ("style.safetensors:nan", ConfigError, "no scale"),
        ("style.bin", ModelError, "others are not read"),
        ("damaged.safetensors", DaccError, "damaged.safetensors"),
    ],
)
def test_what_cannot_be_read_is_refused(name, error, said, tmp_path):
    save_file({"lora_A.weight": torch.zeros(1, 1)}, tmp_path / "style.safetensors")
    (tmp_path / "style.bin").write_bytes(b"pickle")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(error, match=said):
        find_lora(str(tmp_path / name))
