from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dacc
from dacc import SearchCacheConfig, search_cache, verify_bundle
from dacc.cache import evolution
from dacc.cache.methods.evolve import non_dominated
from dacc.cache.profile import CallCost, told
from dacc.cache.units import choose_units
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.manifest import read_manifest
from dacc.core.seeds import seed_stream
from dacc.runtime.compare import relative_l2
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

QUICK = {"macs_ratio": 0.7, "steps": 5, "samples": 1, "measure": "never", "method": "evolve"}
SMALL = {"generations": 2, "population": 6}


def search(source: Path, output: str, **fields: Any) -> Path:
    config = SearchCacheConfig(**{**QUICK, "settings": SMALL, **fields})
    return search_cache(source, config, output=output, device="cpu")


@pytest.fixture(scope="session")
def evolved(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a plan of several units; not to be changed."""
    return search(dit_folder, str(tmp_path_factory.mktemp("evolved") / "bundle"))


def front_of(bundle: Path, name: str) -> Any:
    return json.loads((bundle / f"dacc_front_{name}.json").read_text())


def test_the_front_is_not_beaten_and_the_chosen_plan_meets_the_target_and_is_what_it_says(dit_folder, evolved):
    front = front_of(evolved, "transformer")
    pairs = [(plan["relative_l2"], plan["macs_ratio"]) for plan in front["plans"]]
    assert non_dominated(pairs) == list(range(len(pairs)))
    chosen = front["plans"][front["chosen"]]
    assert chosen["macs_ratio"] <= 0.7
    assert chosen["relative_l2"] == min(error for error, ratio in pairs if ratio <= 0.7)
    record = read_manifest(evolved).components["transformer"].cache
    assert record.macs_ratio == pytest.approx(chosen["macs_ratio"], abs=1e-12)  # predicted and counted
    assert all(chosen["codes"][unit] == codes for unit, codes in record.plan.codes.items())
    assert verify_bundle(evolved) == []
    assert (evolved / "dacc_front_transformer.png").read_bytes()[:4] == b"\x89PNG"
    request = RunRequest(seeds=seed_stream("search", 0, 1), num_inference_steps=5)
    wanted = sample(dacc.load(dit_folder, device="cpu"), request).latents
    found = sample(dacc.load(evolved, device="cpu"), request).latents
    assert relative_l2(wanted, found).mean().item() == pytest.approx(chosen["relative_l2"], rel=1e-5)


def test_the_same_seed_gives_the_same_bytes(dit_folder, evolved):
    again = search(dit_folder, "again")
    for name in ("dacc_manifest.json", "dacc_front_transformer.json", "dacc_front_transformer.png"):
        assert (again / name).read_bytes() == (evolved / name).read_bytes(), name


def test_a_killed_search_goes_on_with_its_next_generation_and_ends_the_same(dit_folder, evolved, monkeypatch):
    saved: list[int] = []
    keep, born = evolution.Keeper.save, evolution._Search.advance

    def kill(self: Any, state: Any) -> None:
        keep(self, state)
        saved.append(state.generation)
        if state.generation == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(evolution.Keeper, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        search(dit_folder, "resumed")
    monkeypatch.setattr(evolution.Keeper, "save", keep)
    begun: list[int] = []

    def advance(self: Any, state: Any) -> Any:
        begun.append(state.generation)
        return born(self, state)

    monkeypatch.setattr(evolution._Search, "advance", advance)
    resumed = search(dit_folder, "resumed")
    assert (saved, begun) == ([0, 1], [1])
    for name in ("dacc_manifest.json", "dacc_front_transformer.json", "dacc_front_transformer.png"):
        assert (resumed / name).read_bytes() == (evolved / name).read_bytes(), name


def test_no_generation_loses_what_an_earlier_one_found(dit_folder, monkeypatch):
    states: list[evolution.State] = []
    keep = evolution.Keeper.save

    def watch(self: Any, state: evolution.State) -> None:
        states.append(state)
        keep(self, state)

    monkeypatch.setattr(evolution.Keeper, "save", watch)
    search(dit_folder, "out", settings={"generations": 4, "population": 6})
    assert [state.generation for state in states] == [0, 1, 2, 3, 4]
    for earlier, later in itertools.pairwise(states):
        for error, ratio in earlier.known.values():
            assert any(one <= error and other <= ratio for one, other in later.known.values())
    assert set(states[-1].known) - set(states[0].known)


def test_a_search_that_is_not_to_resume_begins_anew(dit_folder, monkeypatch):
    begun: list[int] = []
    begin = evolution._Search.begin

    def counted(self: Any, seeds: Any) -> Any:
        begun.append(1)
        return begin(self, seeds)

    def kill(self: Any, state: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evolution._Search, "begin", counted)
    with monkeypatch.context() as killing:
        killing.setattr(evolution._Search, "advance", kill)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                search(dit_folder, "out")
    assert len(begun) == 1  # the second one went on
    config = SearchCacheConfig(**{**QUICK, "settings": SMALL})
    search_cache(dit_folder, config, output="out", resume=False, device="cpu")
    assert len(begun) == 2


def test_call_times_of_an_interrupted_search_are_those_that_it_had(dit_folder, monkeypatch):
    measured: list[float] = []

    def time_calls(denoiser: Any, units: Any, *_: Any) -> CallCost:
        measured.append(0.2 + 0.1 * len(measured))
        return CallCost(unit=told(units), full_seconds=1.0, partial_seconds=measured[-1])

    def kill(self: Any, state: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dacc.cache.scene.time_calls", time_calls)
    with monkeypatch.context() as killing:
        killing.setattr(evolution.Keeper, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            search(dit_folder, "resumed", macs_ratio=None, speedup=1.5)
    resumed = search(dit_folder, "resumed", macs_ratio=None, speedup=1.5)
    assert measured == [0.2]
    (cost,) = json.loads((resumed / "dacc_run.json").read_text())["cost_profile"]["transformer"]
    assert cost["partial_seconds"] == 0.2


def test_a_cut_and_the_attentions_of_a_unet_are_searched_together(unet_folder):
    bundle = search(unet_folder, "out", settings={"generations": 1, "population": 6})
    front = front_of(bundle, "unet")
    names = set(front["plans"][0]["codes"])
    assert "deep" in names
    assert any(name.endswith("attentions.0") for name in names)
    record = read_manifest(bundle).components["unet"].cache
    assert record.macs_ratio == pytest.approx(front["plans"][front["chosen"]]["macs_ratio"], abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "name", "parts"),
    [
        ("dit_pipeline", "transformer", {"attn1", "ff"}),
        ("sd_pipeline", "unet", {"attn1", "attn2", "ff", "deep"}),
        ("flux_pipeline", "transformer", {"attn", "ff", "ff_context", "proj_mlp", "proj_out"}),
        ("unet_pipeline", "unet", {"deep", "0", "1"}),
    ],
)
def test_units_of_every_family(request, kind, name, parts):
    pipe = request.getfixturevalue(kind)()
    units = choose_units(pipe.components[name], "auto")
    assert {unit.id.rpartition(".")[2] for unit in units} == parts
    assert len({unit.id for unit in units}) == len(units)


def test_several_units_by_name(unet_folder):
    pipe: Any = dacc.load(unet_folder, device="cpu")
    units = choose_units(pipe.unet, "cut:0.0,cut:0.1,module:mid_block")
    assert [unit.id for unit in units] == ["cut:0.0", "cut:0.1", "module:mid_block"]
    with pytest.raises(UnsupportedError, match="overlap"):
        choose_units(pipe.unet, "cut:0.0,encoder")


def test_call_times_of_a_profile_decide_for_a_speed_up(dit_folder, evolved, tmp_path):
    pipe: Any = dacc.load(dit_folder, device="cpu")
    cost = {"unit": told(choose_units(pipe.transformer, "auto")), "full_seconds": 1.0, "partial_seconds": 0.2}
    profile = tmp_path / "costs.json"
    profile.write_text(json.dumps({"cost_profile": {"transformer": [cost]}}))
    config = SearchCacheConfig(**{**QUICK, "macs_ratio": None, "speedup": 1.5, "settings": SMALL})
    bundle = search_cache(dit_folder, config, output="out", cost_profile=profile, device="cpu")
    front = front_of(bundle, "transformer")
    dearest, cheapest = front["plans"][-1], front["plans"][0]
    assert dearest["macs_ratio"] == 1
    chosen = front["plans"][front["chosen"]]
    saved = (1 - chosen["macs_ratio"]) / (1 - cheapest["macs_ratio"]) * 0.8 * 4 / 5  # of 5 calls the first computes
    assert 1 - saved <= 1 / 1.5 + 1e-9


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"macs_ratio": 0.05}, UnsupportedError, "best that can be reached.*--macs-ratio"),
        ({"settings": {"population": 1}}, ConfigError, "population"),
        ({"method": "dp", "settings": {}, "unit": "module:a,module:b"}, ConfigError, "treats one unit"),
        (
            {"unit": "module:transformer_blocks,module:transformer_blocks.1.attn1"},
            ConfigError,
            "skips module:transformer_blocks saves no.*never calls it.*--unit module:NAME",
        ),
        ({"method": "dp", "settings": {}, "unit": "module:transformer_blocks"}, ConfigError, "saves no.*never calls"),
    ],
)
def test_what_cannot_be_is_refused(dit_folder, fields, error, said):
    with pytest.raises(error, match=said):
        search(dit_folder, "out", **fields)
    assert not Path("out").exists()


def test_plans_whose_runs_overflow_are_not_kept(dit_folder, monkeypatch):
    error = evolution.PlanObjective.error

    def overflowing(self: Any, plan: Any) -> float:
        return float("inf") if self.macs_ratio(plan) < 0.6 else error(self, plan)

    monkeypatch.setattr(evolution.PlanObjective, "error", overflowing)
    plans = front_of(search(dit_folder, "out"), "transformer")["plans"]
    assert min(plan["macs_ratio"] for plan in plans) >= 0.6
    with pytest.raises(UnsupportedError, match="no plan that meets the target has finite runs.*--device cpu"):
        search(dit_folder, "other", macs_ratio=0.5)


def test_without_pymoo_it_is_told_how_to_get_it(dit_folder, monkeypatch):
    monkeypatch.setattr(evolution, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package pymoo.*pip install 'dacc-diffusion\[evolve\]'"):
        search(dit_folder, "out")


def test_another_search_leaves_the_front_behind(evolved):
    config = SearchCacheConfig(**{**QUICK, "method": "deepcache"})
    second = search_cache(evolved, config, output="second", device="cpu")
    assert not list(second.glob("dacc_front_*"))
    assert not torch.equal(
        sample(dacc.load(second, device="cpu"), RunRequest(seeds=(1,), num_inference_steps=5)).latents,
        sample(dacc.load(evolved, device="cpu"), RunRequest(seeds=(1,), num_inference_steps=5)).latents,
    )
