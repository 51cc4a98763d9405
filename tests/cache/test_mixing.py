"""The correction that mixes channels, against the least squares that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dacc
from dacc import SearchCacheConfig, search_cache, verify_bundle
from dacc.cache import mixing
from dacc.cache.mixing import FOLDS, RIDGES, SecondMoments, best_ridge, mixing_moments, with_mixing
from dacc.core.cache_plan import CORRECTION_NAME, CorrectionId
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter
from dacc.core.seeds import seed_stream
from dacc.core.tensor_file import content_hash
from dacc.runtime.compare import relative_l2
from dacc.runtime.macs import counting_calls
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

QUICK = {"macs_ratio": 0.6, "steps": 8, "samples": 2, "measure": "never", "method": "dp"}
SHAPES = pytest.mark.parametrize("shape", [(6, 5, 8, 8), (6, 64, 5)], ids=["map", "tokens"])


def rows(value: Tensor) -> Tensor:
    return value.movedim(1, -1).flatten(0, -2) if value.ndim == 4 else value.flatten(0, -2)


def made(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Correlated channels with means, and a target that is not a linear map of them."""
    torch.manual_seed(0)
    x = rows(torch.randn(shape)) @ torch.randn(5, 5) * torch.tensor([1.0, 3.0, 0.2, 1.0, 8.0]) + torch.arange(5.0)
    y = x @ torch.randn(5, 5) + 0.01 * x.square() + torch.randn(len(x), 5)
    tokens = [value.reshape(*shape[:1], -1, 5) for value in (x, y)]
    back = [value.movedim(-1, 1).reshape(shape) if len(shape) == 4 else value for value in tokens]
    return back[0], back[1]


def affine_of(x: Tensor, y: Tensor) -> Tensor:
    a, b = rows(x).double(), rows(y).double()
    return ((a - a.mean(0)) * (b - b.mean(0))).mean(0) / a.var(0, correction=0)


@SHAPES
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("ridge", RIDGES)
def test_the_fit_is_that_of_reduced_rank_regression(shape, ridge, rank):
    x, y = made(shape)
    scale = affine_of(x, y).float()
    parts = [SecondMoments.of(x[:2], y[:2]), SecondMoments.of(x[2:], y[2:])]
    down, up, shift = (parts[0] + parts[1]).fit(scale, rank, ridge)
    assert down.shape == up.shape == (rank, 5)
    a, b = rows(x).double(), rows(y).double()
    centred = a - a.mean(0)
    left = b - b.mean(0) - centred * scale
    # the ridge as rows of its own: least squares by QR instead of normal equations
    weights = (ridge * len(a) * a.var(0, correction=0)).sqrt().diag()
    full = torch.linalg.lstsq(torch.cat([centred, weights]), torch.cat([left, torch.zeros_like(weights)])).solution
    _, _, directions = torch.linalg.svd(centred @ full, full_matrices=False)
    wanted = centred @ full @ directions[:rank].T @ directions[:rank] + b.mean(0) + centred * scale
    found = a * scale + a @ down.double().T @ up.double() + shift
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(b.std()))


@SHAPES
def test_each_rank_comes_nearer(shape):
    x, y = made(shape)
    scale = affine_of(x, y).float()
    moments = SecondMoments.of(x, y)
    a, b = rows(x), rows(y)
    errors = [float((a * scale + (b - a * scale).mean(0) - b).square().mean())]
    for rank in range(1, 6):
        down, up, shift = moments.fit(scale, rank, RIDGES[0])
        errors.append(float((a * scale + a @ down.T @ up + shift - b).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_a_channel_that_is_still_is_no_trouble():
    x, y = made((6, 5, 8, 8))
    x[:, 2] = 0.25
    scale = torch.ones(5)
    down, up, shift = SecondMoments.of(x, y).fit(scale, 2, RIDGES[0])
    assert all(part.isfinite().all() for part in (down, up, shift))
    still = SecondMoments.of(torch.zeros(2, 5, 4, 4), torch.ones(2, 5, 4, 4)).fit(scale, 2, RIDGES[0])
    assert torch.equal(still[2], torch.ones(5))


@pytest.fixture(scope="module")
def mixed_bundle(unet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("mixed") / "bundle"
    config = SearchCacheConfig(**QUICK, settings={"rank": 3})
    return search_cache(unet_folder, config, output=output, device="cpu")


def test_the_tables_have_the_ranks_and_are_zero_where_everything_is_computed(mixed_bundle):
    record = read_manifest(mixed_bundle).components["unet"]
    codes = record.cache.plan.codes["deep"]
    tables = load_file(mixed_bundle / "unet" / CORRECTION_NAME)
    assert verify_bundle(mixed_bundle) == []
    assert {name.rpartition(".")[2] for name in tables} == {"scale", "shift", "down", "up"}
    for name, table in tables.items():
        if name.endswith((".down", ".up")):
            assert table.shape == (8, 3, 16)
            assert all((table[call] == 0).all() == (codes[call] == "C") for call in range(8))


@SHAPES
def test_the_error_is_that_of_the_map(shape):
    x, y = made(shape)
    scale = affine_of(x, y).float()
    down, up, shift = SecondMoments.of(x[:3], y[:3]).fit(scale, 2, 0.1)
    found = SecondMoments.of(x[3:], y[3:]).error(scale, down, up, shift)
    a, b = rows(x[3:]), rows(y[3:])
    wanted = (a * scale + a @ down.T @ up + shift - b).square().sum()
    assert found == pytest.approx(float(wanted), rel=1e-4)


def folds_of(x: Tensor, y: Tensor) -> list[SecondMoments]:
    return [SecondMoments.of(a, b) for a, b in zip(x.chunk(FOLDS), y.chunk(FOLDS), strict=True)]


def obvious_errors(x: Tensor, y: Tensor, rank: int) -> dict[float | None, float]:
    """Each fold by maps that are fitted without it, tensor by tensor."""
    errors: dict[float | None, float] = dict.fromkeys((None, *RIDGES), 0.0)
    size = len(x) // FOLDS
    for start in range(0, len(x), size):
        seen = [sample for sample in range(len(x)) if not start <= sample < start + size]
        a, b = rows(x[start : start + size]), rows(y[start : start + size])
        scale = affine_of(x[seen], y[seen]).float()
        plain = a * scale + rows(y[seen]).mean(0) - scale * rows(x[seen]).mean(0)
        errors[None] += float((plain - b).square().sum())
        for ridge in RIDGES:
            down, up, shift = SecondMoments.of(x[seen], y[seen]).fit(scale, rank, ridge)
            errors[ridge] += float((a * scale + a @ down.T @ up + shift - b).square().sum())
    return errors


def few_tokens(noise: float) -> tuple[Tensor, Tensor]:
    """Samples small beside the channels, and targets that mix channels and have noise."""
    torch.manual_seed(0)
    x = torch.randn(8, 6, 40)
    return x, x + 0.2 * x @ torch.randn(40, 2) @ torch.randn(2, 40) / 40**0.5 + noise * torch.randn(8, 6, 40)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_samples_that_were_left_out_choose_the_ridge(noise):
    x, y = few_tokens(noise)
    errors = obvious_errors(x, y, 2)
    assert best_ridge(folds_of(x, y), 2) == min(errors, key=lambda ridge: errors[ridge])


def test_noise_is_not_mixed_and_what_is_linear_in_all_channels_is():
    assert best_ridge(folds_of(*few_tokens(0.01)), 2) == RIDGES[0]
    assert best_ridge(folds_of(*few_tokens(3.0)), 2) is None
    assert best_ridge(folds_of(*few_tokens(0.01))[:1], 2) is None  # nothing can be left out


def test_only_calls_that_come_nearer_are_mixed(mixed_bundle):
    plan = read_manifest(mixed_bundle).components["unet"].cache.plan
    stored = load_file(mixed_bundle / "unet" / CORRECTION_NAME)
    tables = {name: table for name, table in stored.items() if name.endswith((".scale", ".shift"))}
    plan = plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(tables))})
    (stem,) = {name.rpartition(".")[0] for name in tables}
    reused = [call for call, code in enumerate(plan.codes["deep"]) if code == "R"]
    torch.manual_seed(0)
    x = torch.randn(8, 16, 4, 4)
    linear = x + torch.einsum("bchw,cd->bdhw", x, torch.randn(16, 16))
    moments = {(stem, call): folds_of(x, torch.randn(8, 16, 4, 4)) for call in reused[1:]}
    reporter = Reporter(quiet=True)
    assert with_mixing(plan, tables, moments, 2, reporter) == (plan, tables)
    moments[stem, reused[0]] = folds_of(x, linear)
    found, mixed = with_mixing(plan, tables, moments, 2, reporter)
    assert found.correction.sha256 == content_hash(mixed)
    for call in range(plan.calls):
        assert mixed[f"{stem}.up"][call].ne(0).any() == (call == reused[0])
        assert torch.equal(mixed[f"{stem}.scale"][call], tables[f"{stem}.scale"][call])
        assert torch.equal(mixed[f"{stem}.shift"][call], tables[f"{stem}.shift"][call]) == (call != reused[0])


@pytest.mark.parametrize(("samples", "batch", "folds"), [(1, 8, 0), (2, 8, 2), (6, 8, 3), (8, 8, 4), (8, 1, 4)])
def test_the_folds_are_parts_of_the_samples(samples, batch, folds, mixed_bundle, unet_folder):
    plan = read_manifest(mixed_bundle).components["unet"].cache.plan
    tables = load_file(mixed_bundle / "unet" / CORRECTION_NAME)
    request = RunRequest(seeds=range(samples), num_inference_steps=8, batch_size=batch)
    reporter = Reporter(quiet=True)
    pipe = dacc.load(unet_folder, device="cpu")
    found = mixing_moments(pipe, "unet", plan, tables, request, reporter, None)
    assert bool(reporter.notices) == (folds == 0)
    reused = [call for call, code in enumerate(plan.codes["deep"]) if code == "R"]
    assert sorted(call for _, call in found) == (reused if folds else [])
    counts = {tuple(own.count for own in parts) for parts in found.values()}
    assert {len(count) for count in counts} == ({folds} if folds else set())
    assert len({sum(count) // samples for count in counts}) == (1 if folds else 0)


def test_what_mixing_costs_is_counted(mixed_bundle, unet_folder):
    totals = []
    for folder in (mixed_bundle, unet_folder):
        pipe: Any = dacc.load(folder, device="cpu")
        with counting_calls(pipe.unet) as total:
            sample(pipe, RunRequest(seeds=(5,), num_inference_steps=8))
        totals.append(total.macs)
    record = read_manifest(mixed_bundle).components["unet"].cache
    assert record.macs_ratio == pytest.approx(totals[0] / totals[1], abs=1e-4)


def test_it_is_nearer_than_channel_by_channel_on_what_it_was_fitted_to(unet_folder, mixed_bundle):
    config = SearchCacheConfig(**QUICK, settings={"rank": 0})
    plain = search_cache(unet_folder, config, output="plain", device="cpu")
    request = RunRequest(seeds=seed_stream("search", 0, 2), num_inference_steps=8)
    wanted = sample(dacc.load(unet_folder, device="cpu"), request).latents
    mixed, own = (
        relative_l2(wanted, sample(dacc.load(folder, device="cpu"), request).latents).mean()
        for folder in (mixed_bundle, plain)
    )
    assert mixed < own


def test_more_channels_than_fit_are_a_notice(unet_folder, monkeypatch):
    monkeypatch.setattr(mixing, "WIDEST", 8)
    reporter = Reporter(quiet=True)
    bundle = search_cache(unet_folder, SearchCacheConfig(**QUICK), output="wide", device="cpu", reporter=reporter)
    tables = load_file(bundle / "unet" / CORRECTION_NAME)
    assert {name.rpartition(".")[2] for name in tables} == {"scale", "shift"}
    assert [notice for notice in reporter.notices if "16 channels, more than 8" in notice]


@pytest.mark.slow
def test_on_a_trained_pipeline_other_images_are_nearer_too(tmp_path):
    fields = {"macs_ratio": 0.4, "steps": 20, "samples": 4, "measure": "never", "method": "dp"}
    request = RunRequest(seeds=seed_stream("effect", 0, 8), num_inference_steps=20, batch_size=8)
    wanted = sample(dacc.load("zoo:digits-unet", device="cpu"), request).latents
    errors = {}
    for rank in (0, 8):
        config = SearchCacheConfig(**fields, settings={"cost": "feature", "trials": 0, "rank": rank})
        bundle = search_cache("zoo:digits-unet", config, output=tmp_path / str(rank), device="cpu")
        errors[rank] = float(relative_l2(wanted, sample(dacc.load(bundle, device="cpu"), request).latents).mean())
    assert errors[8] < 0.95 * errors[0]
