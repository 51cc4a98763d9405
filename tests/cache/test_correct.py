from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dacc
from dacc import SearchCacheConfig, search_cache, verify_bundle
from dacc.cache.correct import Moments, Pairs, mapped
from dacc.cache.objective import typical
from dacc.core.cache_plan import CORRECTION_NAME, ModuleUnit
from dacc.core.errors import BundleError, ModelError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter, silent
from dacc.core.seeds import seed_stream
from dacc.runtime.cached import CachedUnits, CachePlanWarning
from dacc.runtime.compare import relative_l2
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

from ..runtime.cache_plans import plan_for

QUICK = {"macs_ratio": 0.6, "steps": 8, "samples": 2, "measure": "never", "method": "dp"}
REQUEST = RunRequest(seeds=(3,), num_inference_steps=8)
PLAIN = {"correct": False, "joint": False}


@pytest.fixture(scope="session")
def corrected_bundle(unet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose plan corrects what it reuses; not to be changed."""
    output = tmp_path_factory.mktemp("corrected") / "bundle"
    return search_cache(unet_folder, SearchCacheConfig(**QUICK), output=output, device="cpu")


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (3, 7, 5)], ids=["map", "tokens"])
def test_affine_targets_are_recovered(shape):
    torch.manual_seed(0)
    axis = 1 if len(shape) == 4 else 2
    wide = [1] * len(shape)
    wide[axis] = 5
    alpha, beta = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    batches = [torch.randn(shape, dtype=torch.float64) * 3 + 1 for _ in range(2)]
    found = [Moments.of(x, alpha.reshape(wide) * x + beta.reshape(wide)) for x in batches]
    scale, shift = (found[0] + found[1]).fit()
    torch.testing.assert_close(scale.double(), alpha, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(shift.double(), beta, atol=1e-6, rtol=1e-6)


def test_no_channel_gets_worse_on_what_it_was_fitted_to():
    torch.manual_seed(1)
    x = torch.randn(4, 6, 3, 3)
    y = torch.stack([x[:, 0], -2 * x[:, 1] + 3, torch.randn(4, 3, 3), x[:, 3] + 0.1, x[:, 4], x[:, 5]], 1)
    x[:, 3], y[:, 5] = 0.25, x[:, 5] + 1e-9 * torch.randn(4, 3, 3)
    scale, shift = Moments.of(x, y).fit()
    mapped = scale.reshape(1, -1, 1, 1) * x + shift.reshape(1, -1, 1, 1)
    before, after = ((y - value).double().pow(2).mean((0, 2, 3)) for value in (x, mapped))
    assert (after <= before).all()
    assert (scale[4].item(), shift[4].item()) == (1, 0)  # nothing to correct
    assert after[1] < 1e-6 < before[1]


class Doubled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.inner(x)


def test_corrected_values_are_nearer_and_others_are_left_alone():
    torch.manual_seed(2)
    units = CachedUnits(Doubled(), [ModuleUnit(id="u", path="inner")])
    kept = [{("u", "inner"): (torch.randn(3, 7, 4), None)} for _ in range(2)]
    wanted = [{("u", "inner"): (own["u", "inner"][0] * 2 + 1, None)} for own in kept]
    moments = Pairs().add(units, "u", (0, 1), kept, wanted)
    for own, goal in zip(mapped(kept, moments), wanted, strict=True):
        torch.testing.assert_close(own["u", "inner"][0], goal["u", "inner"][0])
        assert own["u", "inner"][1] is None


def test_the_correction_of_any_plan_is_fitted_to_its_own_pairs_of_calls(dit_pipeline):
    torch.manual_seed(4)
    unit = ModuleUnit(id="u", path="inner")
    units = CachedUnits(Doubled(), [unit])
    values, goals = torch.randn(2, 2, 5, 2, 3, 7, 4)  # batches, calls, branches, then samples, tokens, channels
    pairs = Pairs()
    for batch in range(2):
        given, wanted = (
            [[{("u", "inner"): (branch, None)} for branch in call] for call in side[batch]] for side in (values, goals)
        )
        for calls in combinations(range(5), 2):
            pairs.add(units, "u", calls, given[calls[0]], wanted[calls[1]])
    tables = pairs.tables(plan_for(dit_pipeline(), {unit: "CRRCR"}))
    scale, shift = tables["u/inner/0.scale"], tables["u/inner/0.shift"]
    for first, to in ((0, 1), (0, 2), (3, 4)):
        for channel in range(4):
            x, y = (side[..., channel].flatten().double() for side in (values[:, first], goals[:, to]))
            columns = torch.stack([x, torch.ones_like(x)], 1)
            slope, rest = torch.linalg.lstsq(columns, y[:, None]).solution.flatten()
            assert scale[to, channel].item() == pytest.approx(slope.item(), rel=1e-5)
            assert shift[to, channel].item() == pytest.approx(rest.item(), rel=1e-4, abs=1e-6)
    assert (scale[[0, 3]] == 1).all()
    assert (shift[[0, 3]] == 0).all()


def test_tables_lie_beside_the_weights_and_are_one_and_zero_where_everything_is_computed(corrected_bundle):
    manifest = read_manifest(corrected_bundle)
    record = manifest.components["unet"]
    codes = record.cache.plan.codes["deep"]
    tables = load_file(corrected_bundle / "unet" / CORRECTION_NAME)
    assert f"unet/{CORRECTION_NAME}" in manifest.files
    assert verify_bundle(corrected_bundle) == []
    for name, table in tables.items():
        if name.endswith((".down", ".up")):  # see test_mixing.py
            continue
        assert table.shape == (8, 16)
        plain = 1 if name.endswith("scale") else 0
        assert all((table[call] == plain).all() == (codes[call] == "C") for call in range(8))


def test_the_fit_is_nearer_to_the_run_without_plan_than_plain_reuse(unet_folder, corrected_bundle):
    config = SearchCacheConfig(**QUICK, settings={"correct": False})
    plain = search_cache(unet_folder, config, output="plain", device="cpu")
    assert not (plain / "unet" / CORRECTION_NAME).exists()
    request = RunRequest(seeds=seed_stream("search", 0, 2), num_inference_steps=8)
    wanted = sample(dacc.load(unet_folder, device="cpu"), request).latents
    errors = [
        relative_l2(wanted, sample(dacc.load(folder, device="cpu"), request).latents).mean()
        for folder in (corrected_bundle, plain)
    ]
    assert errors[0] < errors[1]


def test_the_correction_is_dropped_on_another_grid_with_a_warning(corrected_bundle):
    pipe: Any = dacc.load(corrected_bundle, device="cpu")
    with pytest.warns(CachePlanWarning, match="without the correction"):
        sample(pipe, REQUEST.model_copy(update={"num_inference_steps": 16}))


def change(bundle: Path, target: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a bundle with other tables and a manifest that knows their file."""
    import hashlib
    import shutil

    shutil.copytree(bundle, target)
    file = target / "unet" / CORRECTION_NAME
    save_file(edit(load_file(file)), target / "new")
    file.unlink()
    (target / "new").rename(file)
    manifest = target / "dacc_manifest.json"
    raw = json.loads(manifest.read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    raw["files"][f"unet/{CORRECTION_NAME}"] = {"size": file.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(raw))
    return target


@pytest.mark.parametrize(
    "edit",
    [
        lambda tables: {name: table * 1.5 for name, table in tables.items()},
        lambda tables: {name: table[:-1].clone() for name, table in tables.items()},
        lambda tables: {},
    ],
    ids=["values", "calls", "none"],
)
def test_other_tables_than_the_plan_says_are_refused(corrected_bundle, tmp_path, edit):
    with pytest.raises(BundleError, match="correction of a cache plan is not what the plan says"):
        dacc.load(change(corrected_bundle, tmp_path / "changed", edit), device="cpu")


def test_a_missing_file_is_refused(corrected_bundle, tmp_path):
    import shutil

    shutil.copytree(corrected_bundle, tmp_path / "copy")
    (tmp_path / "copy" / "unet" / CORRECTION_NAME).unlink()
    with pytest.raises(BundleError, match=f"{CORRECTION_NAME} is missing"):
        dacc.load(tmp_path / "copy", device="cpu")


def test_quantizing_keeps_the_correction_and_another_search_drops_it(corrected_bundle):
    quantized = dacc.quantize_pipeline(
        corrected_bundle, dacc.QuantizeConfig(bits=8, measure="never"), output="q", device="cpu"
    )
    kept = quantized / "unet" / CORRECTION_NAME
    assert kept.read_bytes() == (corrected_bundle / "unet" / CORRECTION_NAME).read_bytes()
    assert verify_bundle(quantized) == []
    with pytest.warns(
        CachePlanWarning, match="correction of the cache plan of unet was fitted before its weights were"
    ):
        pipe = dacc.load(quantized, device="cpu")
    sample(pipe, REQUEST)
    dacc.load(corrected_bundle, device="cpu")  # a warning would be an error
    other = SearchCacheConfig(**{**QUICK, "method": "deepcache"})
    second = search_cache(corrected_bundle, other, output="second", device="cpu")
    assert not (second / "unet" / CORRECTION_NAME).exists()
    assert verify_bundle(second) == []


def test_a_quantized_source_is_compared_with_the_float_one_where_that_is_found(unet_folder, bundle_of, tmp_path):
    quantized = bundle_of(unet_folder, bits=3)
    shutil.copytree(quantized, tmp_path / "near")
    shutil.copytree(unet_folder, tmp_path / unet_folder.name)
    found, told = {}, {}
    for name, source, settings in (
        ("joint", tmp_path / "near", {}),
        ("alone", quantized, {}),
        ("naive", tmp_path / "near", {"joint": False}),
    ):
        reporter = Reporter(quiet=True)
        config = SearchCacheConfig(**QUICK, settings=settings)
        bundle = search_cache(source, config, output=tmp_path / name, device="cpu", reporter=reporter)
        found[name] = load_file(bundle / "unet" / CORRECTION_NAME)
        told[name] = any("was not found" in notice for notice in reporter.notices)
    assert told == {"joint": False, "alone": True, "naive": False}
    assert all(torch.equal(table, found["naive"][name]) for name, table in found["alone"].items())
    assert any(not torch.equal(table, found["naive"][name]) for name, table in found["joint"].items())
    request = RunRequest(seeds=seed_stream("search", 0, 2), num_inference_steps=8)
    wanted = sample(dacc.load(unet_folder, device="cpu"), request).latents
    errors = {
        name: relative_l2(wanted, sample(dacc.load(tmp_path / name, device="cpu"), request).latents).mean()
        for name in found
    }
    assert errors["joint"] < errors["naive"]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    ("method", "own", "dtype"),
    [
        ("taylor", {"order": 1}, "auto"),
        ("taylor", {"order": 1}, "bfloat16"),
        ("dp", {"layers": False, "rank": 0}, "auto"),
        ("dp", {"layers": False, "rank": 0}, "bfloat16"),
        ("dp", {"layers": False, "rank": 0, "cost": "feature"}, "auto"),
    ],
)
def test_runs_on_a_quantized_source_are_compared_with_the_float_one_with_what_is_fitted(
    unet_folder, bundle_of, tmp_path, method, own, dtype, joint
):
    source = shutil.copytree(bundle_of(unet_folder, bits=3), tmp_path / "near")
    shutil.copytree(unet_folder, tmp_path / unet_folder.name)
    settings = {"joint": joint, "trials": 2, **own}
    config = SearchCacheConfig(**{**QUICK, "method": method}, dtype=dtype, settings=settings)
    bundle = search_cache(source, config, output=tmp_path / "found", device="cpu")
    told = read_manifest(bundle).components["unet"].cache.chosen["relative_l2"]
    request = RunRequest(seeds=seed_stream("trials", 0, QUICK["samples"]), num_inference_steps=8)
    reference = dacc.load(unet_folder if joint else source, dtype=dtype, device="cpu")
    wanted, found = (
        sample(pipe, request).latents for pipe in (reference, dacc.load(bundle, dtype=dtype, device="cpu"))
    )
    assert told == pytest.approx(typical(relative_l2(wanted, found)), rel=1e-3)


def test_a_reference_that_lies_elsewhere_is_named(unet_folder, bundle_of, tmp_path):
    source = bundle_of(unet_folder, bits=3)
    elsewhere = shutil.copytree(unet_folder, tmp_path / "elsewhere")
    config, reporter = SearchCacheConfig(**{**QUICK, "method": "dp"}, settings={"trials": 0}), silent()
    given = {"output": tmp_path / "found", "device": "cpu", "reporter": reporter}
    search_cache(source, config, **given, reference=elsewhere)
    assert not any("was not found" in notice for notice in reporter.notices)
    with pytest.raises(ModelError, match="other weights"):
        search_cache(source, config, **given, reference=source, overwrite=True)
    search_cache(unet_folder, config, **given, reference=elsewhere, overwrite=True)
    assert any("is not quantized: --reference is not used" in notice for notice in reporter.notices)
