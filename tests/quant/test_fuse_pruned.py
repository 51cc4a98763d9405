"""Adapters of a whole pipeline in the weights of a pruned one."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import save_file

from dacc import PruneConfig, QuantizeConfig, prune_pipeline, quantize_pipeline, verify_bundle
from dacc.core.errors import ModelError, UnsupportedError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.core.source import resolve_source
from dacc.core.tensor_file import stored_tensors
from dacc.quant.fuse import check_fusing, find_lora, fused

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LINEARS = ("to_q", "to_v", "to_out.0", "proj_mlp", "net.2")


@pytest.fixture
def deep(request):
    """Makes a tiny pipeline whose denoiser has blocks to lose: its component, and the pipeline."""

    def make(kind):
        pipe = request.getfixturevalue(f"{kind}_pipeline")()
        component = "transformer" if kind == "flux" else "unet"
        config = dict(getattr(pipe, component).config)
        torch.manual_seed(1)
        if kind == "flux":
            model = FluxTransformer2DModel.from_config(config | {"num_layers": 3, "num_single_layers": 4})
        else:
            cls = UNet2DConditionModel if kind == "sd" else UNetMotionModel
            model = cls.from_config(config | {"layers_per_block": 3 if kind == "sd" else 2})
        setattr(pipe, component, model.eval())
        return component, pipe

    return make


CUTS = {
    "flux": {"method": "random", "ratio": 0.5, "allow_adjacent": True},
    "sd": {"method": "bksdm", "settings": {"size": "base"}},
    "video": {"method": "vdmini", "ratio": 0.05},
}


def adapter_of(pipe, component, file, rank=2):
    """An adapter of every attention and feed-forward layer, with other numbers in each."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in getattr(pipe, component).named_modules():
        if name.endswith(LINEARS):
            rows, features = module.weight.shape
            tensors[f"{component}.{name}.lora_A.weight"] = torch.randn(rank, features, generator=generator)
            tensors[f"{component}.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, file)
    return tensors


def contents(folder):
    return {name: tensor.load() for name, tensor in stored_tensors(folder).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def fuse(folder, file, output, reporter=None):
    """The denoisers' tensors of a pipeline with an adapter in its weights."""
    source = resolve_source(str(folder), reporter=silent())
    check_fusing(source)
    with fused(source, [find_lora(str(file))], output, reporter or silent()) as found:
        return {part.name: contents(part) for part in found.path.iterdir() if part.name in ("unet", "transformer")}


def pruned(folder, output, kind, **more):
    return prune_pipeline(folder, PruneConfig(measure="never", **{**CUTS[kind], **more}), output=output, device="cpu")


@pytest.mark.parametrize("kind", ["flux", "sd", "video"])
def test_fused_after_pruning_equals_pruned_after_fusing(kind, deep, tmp_path):
    component, pipe = deep(kind)
    pipe.save_pretrained(tmp_path / "whole")
    tensors = adapter_of(pipe, component, tmp_path / "style.safetensors")
    small = pruned(tmp_path / "whole", tmp_path / "small", kind)
    reporter = silent()
    found = fuse(small, tmp_path / "style.safetensors:0.5", tmp_path / "out", reporter)[component]

    source = resolve_source(str(tmp_path / "whole"), reporter=silent())
    with fused(source, [find_lora(f"{tmp_path / 'style.safetensors'}:0.5")], tmp_path / "any", silent()) as whole:
        expected = contents(pruned(whole.path, tmp_path / "expected", kind) / component)
    assert same(found, expected)
    assert not same(found, contents(small / component))

    record = read_manifest(small).components[component].pruning
    (notice,) = [notice for notice in reporter.notices if "style" in notice]
    pairs = len(tensors) // 2
    left = sum(name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)) for name in found)
    assert f"{pairs - left} of {pairs} pairs of matrices are left out" in notice
    gone = [module for unit in record.units.values() if unit.removed for module in unit.modules]
    assert any(f"{component}.{module}" in notice for module in gone)
    if kind == "video":
        assert record.identity_modules == ("mid_block",)
        assert f"{component}.mid_block" in notice


def test_a_pruned_bundle_is_quantized_with_an_adapter(deep, tmp_path):
    component, pipe = deep("flux")
    pipe.save_pretrained(tmp_path / "whole")
    adapter_of(pipe, component, tmp_path / "style.safetensors")
    small = pruned(tmp_path / "whole", tmp_path / "small", "flux")
    options = {"config": QuantizeConfig(bits=8, measure="never"), "device": "cpu"}
    styled = quantize_pipeline(small, output=tmp_path / "styled", fuse_lora=[tmp_path / "style.safetensors"], **options)
    plain = quantize_pipeline(small, output=tmp_path / "plain", **options)
    assert contents(styled / component).keys() == contents(plain / component).keys()
    assert not same(contents(styled / component), contents(plain / component))
    assert verify_bundle(styled) == []
    manifest = read_manifest(styled)
    assert [done.command for done in manifest.passes] == ["prune", "fuse-lora", "quantize"]
    assert manifest.components[component].pruning == read_manifest(small).components[component].pruning
    assert manifest.source == read_manifest(plain).source
    assert "pairs of matrices are left out" in " ".join(manifest.passes[-1].notices)
    with pytest.raises(UnsupportedError, match="dacc prune"):
        check_fusing(resolve_source(str(plain), reporter=silent()))


def test_what_other_programs_wrote_and_what_a_file_says_of_itself_follow_their_blocks(deep, tmp_path):
    component, pipe = deep("sd")
    pipe.save_pretrained(tmp_path / "whole")
    tensors = adapter_of(pipe, component, tmp_path / "plain.safetensors")
    small = pruned(tmp_path / "whole", tmp_path / "small", "sd")
    expected = fuse(small, tmp_path / "plain.safetensors:2", tmp_path / "out")[component]

    kohya = {}
    for name in {full.removeprefix("unet.").rpartition(".lora_")[0] for full in tensors}:
        flat = f"lora_unet_{name.replace('.', '_')}"
        kohya[f"{flat}.lora_down.weight"] = tensors[f"unet.{name}.lora_A.weight"]
        kohya[f"{flat}.lora_up.weight"] = tensors[f"unet.{name}.lora_B.weight"]
        kohya[f"{flat}.alpha"] = torch.tensor(4.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    assert same(fuse(small, tmp_path / "kohya.safetensors", tmp_path / "out")[component], expected)

    names = [full.removeprefix("unet.").rpartition(".lora_")[0] for full in tensors if "lora_A" in full]
    told = {"unet.r": 8, "unet.lora_alpha": 4, "unet.target_modules": names}
    told |= {"unet.rank_pattern": dict.fromkeys(names, 2), "unet.alpha_pattern": {f"^{name}": 4 for name in names}}
    save_file(tensors, tmp_path / "told.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    assert same(fuse(small, tmp_path / "told.safetensors", tmp_path / "out")[component], expected)


def test_an_adapter_of_removed_blocks_alone_is_refused(deep, tmp_path):
    component, pipe = deep("flux")
    pipe.save_pretrained(tmp_path / "whole")
    tensors = adapter_of(pipe, component, tmp_path / "style.safetensors")
    small = pruned(tmp_path / "whole", tmp_path / "small", "flux")
    units = read_manifest(small).components[component].pruning.units
    gone = next(name for name, unit in units.items() if unit.removed)
    only = {name: one for name, one in tensors.items() if name.startswith(f"{component}.{gone}.")}
    save_file(only, tmp_path / "only.safetensors")
    with pytest.raises(ModelError, match=f"all {len(only) // 2} pairs of matrices of only.safetensors"):
        fuse(small, tmp_path / "only.safetensors", tmp_path / "out")
    strange = {name.replace("to_q", "to_nowhere"): one for name, one in tensors.items()}
    save_file(strange, tmp_path / "strange.safetensors")
    with pytest.raises(ModelError, match="one of another model"):
        fuse(small, tmp_path / "strange.safetensors", tmp_path / "out")
