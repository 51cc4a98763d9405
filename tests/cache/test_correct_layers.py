from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dacc
from dacc import SearchCacheConfig, search_cache, verify_bundle
from dacc.cache.correct_layers import fit_layers, layers_to_correct
from dacc.core.cache_plan import CORRECTION_NAME, CachePlan, CorrectionId, UnetEncoder
from dacc.core.errors import BundleError, ModelError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.core.seeds import seed_stream
from dacc.core.tensor_file import content_hash
from dacc.runtime.cached import CachedUnits
from dacc.runtime.compare import relative_l2
from dacc.runtime.correction import Correction, affine
from dacc.runtime.installed import install_plan_
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import capture_calls, sample

PROFILED = RunRequest(seeds=seed_stream("search", 0, 2), num_inference_steps=8, batch_size=2)
LAYERS = ("up_blocks.1.resnets.1.conv1", "up_blocks.1.resnets.1.conv_shortcut")


@pytest.fixture(scope="module")
def sources(unet_folder: Path, bundle_of: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The float pipeline and, beside it, one of 3 bits; not to be changed."""
    root = tmp_path_factory.mktemp("sources")
    shutil.copytree(unet_folder, root / unet_folder.name)
    shutil.copytree(bundle_of(unet_folder, bits=3), root / "q")
    return root / unet_folder.name, root / "q"


def search(source: Path, output: Path, **settings: Any) -> Path:
    fields = {"macs_ratio": 0.6, "steps": 8, "samples": 2, "measure": "never", "method": "dp"}
    config = SearchCacheConfig(**fields, settings={"cost": "feature", **settings})
    return search_cache(source, config, output=output, device="cpu")


@pytest.fixture(scope="module")
def bundle(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose plan corrects layers too; not to be changed."""
    return search(sources[1], tmp_path_factory.mktemp("layers") / "bundle")


def plan_of(folder: Path) -> CachePlan:
    record = read_manifest(folder).components["unet"].cache
    assert record is not None
    return record.plan


def loaded(sources: tuple[Path, Path]) -> tuple[Any, Any]:
    reference, quantized = (dacc.load(source, device="cpu") for source in sources)
    return quantized, reference


def without_layers(folder: Path) -> tuple[CachePlan, dict[str, torch.Tensor]]:
    """The plan of a bundle and its tables as they are before layers are corrected."""
    tables = {
        name: table
        for name, table in load_file(folder / "unet" / CORRECTION_NAME).items()
        if not name.startswith(tuple(f"deep/{layer}/" for layer in LAYERS))
    }
    return plan_of(folder).model_copy(update={"correction": CorrectionId(sha256=content_hash(tables))}), tables


def readings(pipe: Any, reference: Any, plan: CachePlan, correction: Correction) -> list[tuple[int, str, torch.Tensor]]:
    """Call, layer and input of every evaluation of a corrected layer in the calls that reuse, written out."""
    calls, seen = capture_calls(reference, PROFILED), []
    units, now = CachedUnits(pipe.unet, plan.units), [0]
    handles = [
        pipe.unet.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.append((now[0], path, args[0]))
        )
        for path in LAYERS
    ]
    kept: dict[Any, Any] = {}
    for number, call in enumerate(calls):
        now[0] = number
        if plan.codes["deep"][number] == "C":
            kept = {}
            with units.recording(kept):
                call.replay(pipe.unet)
            del seen[-len(LAYERS) :]
        else:
            real = units.layouts["deep"].kept
            given = {key: correction.apply(*key, number, own) if key[1] in real else own for key, own in kept.items()}
            with units.reusing(given, ["deep"]):
                call.replay(pipe.unet)
    for handle in handles:
        handle.remove()
    units.remove_()
    return seen


def test_maps_are_those_of_the_products_with_the_bias_added_once(sources, bundle):
    pipe, reference = loaded(sources)
    plan, tables = without_layers(bundle)
    assert layers_to_correct(pipe.unet, plan) == LAYERS
    found = fit_layers(pipe, "unet", plan, tables, PROFILED, silent(), reference)
    seen = readings(pipe, reference, plan, Correction(tables, plan))
    assert len(seen) == len(LAYERS) * plan.codes["deep"].count("R")
    for call, path, entering in seen:
        layer, exact = pipe.unet.get_submodule(path), reference.unet.get_submodule(path)
        with torch.no_grad():
            output, bias = layer(entering), layer.bias.reshape(1, -1, 1, 1)
            products, wanted = output - bias, exact(entering) - bias
        scale, shift = (found[f"deep/{path}/0.{part}"][call] for part in ("scale", "shift"))
        mapped = affine(output, scale, shift)
        for channel in range(output.shape[1]):
            p, f = (value[:, channel].flatten().double() for value in (products, wanted))
            solved = torch.linalg.lstsq(torch.stack([p, torch.ones_like(p)], 1), f[:, None]).solution
            expected = solved[0] * p + solved[1] + bias[0, channel].item()
            plain = (f - p).pow(2).mean()
            own = (mapped[:, channel].flatten().double() - bias[0, channel].double() - f).pow(2).mean()
            assert own <= plain * (1 + 1e-6)
            if (scale[channel], shift[channel]) != (1, 0):
                torch.testing.assert_close(
                    mapped[:, channel].flatten().double(), expected, atol=1e-5, rtol=1e-4, check_dtype=False
                )
    assert any((table != 1).any() for name, table in found.items() if name.endswith("scale"))


def test_tables_are_one_and_zero_where_everything_is_computed_and_stand_in_the_plan(bundle):
    plan, tables = plan_of(bundle), load_file(bundle / "unet" / CORRECTION_NAME)
    assert plan.correction is not None
    assert plan.correction.layers == LAYERS
    assert plan.correction.sha256 == content_hash(tables)
    assert verify_bundle(bundle) == []
    for name, table in tables.items():
        plain = 1 if name.endswith("scale") else 0
        assert all((table[call] == plain).all() for call in range(8) if plan.codes["deep"][call] == "C")


def test_a_loaded_bundle_corrects_bit_for_bit_as_the_search_did(sources, bundle):
    plan = plan_of(bundle)
    pipe, reference = loaded(sources)
    before, tables = without_layers(bundle)
    tables |= fit_layers(pipe, "unet", before, tables, PROFILED, silent(), reference)
    install_plan_(pipe, "unet", plan, Correction(tables, plan))
    assert torch.equal(sample(pipe, PROFILED).latents, sample(dacc.load(bundle, device="cpu"), PROFILED).latents)


def test_what_the_layers_give_is_mapped_in_calls_that_reuse(sources, bundle):
    """In a run with the plan, against the layers without hooks."""
    pipe: Any = dacc.load(bundle, device="cpu")
    plain: Any = dacc.load(sources[1], device="cpu")
    plan, tables = plan_of(bundle), load_file(bundle / "unet" / CORRECTION_NAME)
    seen: list[Any] = []
    layer = pipe.unet.get_submodule(LAYERS[0])
    layer.register_forward_hook(
        lambda _, args, output: seen.append((dacc.current_run().call, args[0].clone(), output.clone()))
    )
    sample(pipe, PROFILED)
    assert len(seen) == 8
    for call, entering, output in seen:
        with torch.no_grad():
            wanted = plain.unet.get_submodule(LAYERS[0])(entering)
        if plan.codes["deep"][call] == "R":
            wanted = affine(wanted, *(tables[f"deep/{LAYERS[0]}/0.{part}"][call] for part in ("scale", "shift")))
        assert torch.equal(output, wanted)


def test_it_is_nearer_to_the_float_pipeline_than_without(sources, bundle):
    pipe, reference = loaded(sources)
    wanted = sample(reference, PROFILED).latents
    found = sample(dacc.load(bundle, device="cpu"), PROFILED).latents
    plan, tables = without_layers(bundle)
    install_plan_(pipe, "unet", plan, Correction(tables, plan))
    without = sample(pipe, PROFILED).latents
    assert relative_l2(wanted, found).mean() < relative_l2(wanted, without).mean()


def test_nothing_is_corrected_behind_other_units_and_on_float_networks(sources, bundle, unet_folder):
    found = plan_of(search(unet_folder, Path("float")))
    assert found.correction is not None
    assert found.correction.layers == ()
    assert "layers" not in found.model_dump()["correction"]
    pipe, reference = loaded(sources)
    assert layers_to_correct(reference.unet, plan_of(bundle)) == ()
    blank = plan_of(bundle).model_copy(update={"units": (UnetEncoder(id="deep"),)})
    assert layers_to_correct(pipe.unet, blank) == ()
    with pytest.raises(ValueError, match="a cut of a UNet"):
        CachePlan(**blank.model_dump())


def test_a_layer_that_is_not_there_is_refused(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    file = tmp_path / "copy" / "dacc_manifest.json"
    raw = json.loads(file.read_text())
    raw["components"]["unet"]["cache"]["plan"]["correction"]["layers"] = ["up_blocks.7.conv"]
    file.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="cache plan of unet was edited"):
        dacc.load(tmp_path / "copy", device="cpu")
    pipe: Any = dacc.load(bundle, device="cpu")
    plan = plan_of(bundle)
    other = plan.correction.model_copy(update={"layers": ("up_blocks.7.conv",)})  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="has the module 'up_blocks.7.conv'"):
        install_plan_(pipe, "unet", plan.model_copy(update={"correction": other}))
