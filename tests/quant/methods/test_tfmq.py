"""TFMQ-DM: temporal layers first, then the blocks, and scales of every step; from set to bundle."""

import hashlib
from collections import Counter

import pytest
import torch

from dacc import QuantizeConfig, load, quantize_pipeline
from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.families import find_family
from dacc.core.manifest import read_manifest
from dacc.core.scheme import Scheme
from dacc.quant import calibrated
from dacc.quant.config import METHODS
from dacc.quant.driver import traits_of
from dacc.quant.methods.tfmq import CONFIG, TFMQConfig, temporal_acts, treat
from dacc.quant.plan import plan_layers
from dacc.quant.ranges import quantized_weights, roundings_of
from dacc.runtime.layers import set_step_table_
from dacc.runtime.request import RunRequest
from dacc.runtime.step_table import StepTable
from dacc.runtime.trajectory import sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

FIELDS = {"bits": 4, "act_bits": 8, "settings": {"iterations": 4}}
PER_STEP = Scheme(bits=8, act_bits=4, act_mode="per-step", act_steps=3)


def error_of(block, treated):
    with quantized_weights(block, treated), block.rounding.instead(roundings_of(block, treated)):
        return block.error()


def plans(model, method, **fields):
    loaded = METHODS.load(method)
    config = QuantizeConfig(method=method, **fields).resolved()
    family, _ = find_family(type(model).__name__)
    traits = traits_of(loaded, build_config(loaded.CONFIG), QuantizeConfig(), 3)
    return {plan.name: plan for plan in plan_layers(model, family, config, traits)}


def test_formula_temporal_units_minimize_the_distance_of_all_projections(unet_folder, quantize_watched):
    done = quantize_watched(unet_folder, "tfmq", **FIELDS)
    block = done.blocks[0]
    model, reference, wrong, power = done.model, block.reference, 0.0, 0.0
    for call, sighting in enumerate(block.sightings):
        assert sighting.call == call
        (entering,) = sighting.entering.args
        args, _ = entering["time_embedding"]
        hidden, quantized = reference.time_embedding(*args), model.time_embedding(*args)
        for name in block.module.sources:
            wanted = reference.get_submodule(name)(torch.nn.functional.silu(hidden))
            mine = model.get_submodule(name)(torch.nn.functional.silu(quantized))
            wrong += float((mine - wanted).square().sum())
            power += float(wanted.square().sum())
    record = read_manifest(done.bundle).components["unet"].quantization.modules["time_embedding.linear_1"]
    assert record.output_error == pytest.approx((wrong / power) ** 0.5, rel=1e-3)


def test_rank_scales_of_every_step_beat_one_for_all(make_block, residual_block):
    errors = {}
    for scheme in (PER_STEP, PER_STEP.model_copy(update={"act_mode": "static", "act_steps": None})):
        module, inputs = residual_block()
        inputs = [(x * 10 ** (number % 3), time) for number, (x, time) in enumerate(inputs)]
        block = make_block(module, inputs, dict.fromkeys(("conv_shortcut",), scheme))
        found = treat(block, TFMQConfig(), {"iterations": 0})
        errors[scheme.act_mode] = [
            error_of(type(block)("", block.module, block.plans, [sighting], block.rounding, 0), found)
            for sighting in block.sightings
        ]
        if scheme is PER_STEP:
            assert found["conv_shortcut"].acts.scale.shape == (4, 1)
            assert len(set(found["conv_shortcut"].acts.scale[:3, 0].tolist())) == 3
    pairs = zip(errors["per-step"], errors["static"], strict=True)
    assert all(mine < 0.7 * shared for number, (mine, shared) in enumerate(pairs) if number % 3 < 2)


# what is quantized


@pytest.mark.parametrize("kind", ["unet", "sd"])
def test_with_equal_wishes_it_quantizes_the_same_layers_as_qdiffusion_at_the_same_bits(kind, request):
    pipe = request.getfixturevalue(f"{kind}_pipeline")()
    wishes = {
        "bits": 4,
        "act_bits": 8,
        "exclude": ("*.conv_shortcut", "down_blocks.0.*"),
        "layer_bits": [("time_embedding.*", 5), ("*.time_emb_proj", 5), ("mid_block.*.conv2", 16)],
    }
    mine, other = (plans(pipe.unet, method, **wishes) for method in ("tfmq", "qdiffusion"))
    assert list(mine) == list(other)
    for name, plan in mine.items():
        assert plan.reason == other[name].reason
        if plan.scheme:
            found, wanted = plan.scheme, other[name].scheme
            assert (found.bits, found.act_bits, found.group_size) == (wanted.bits, wanted.act_bits, wanted.group_size)
    assert Counter(plan.scheme.bits for plan in mine.values() if plan.scheme)[5] > 5


def test_by_default_temporal_layers_have_fewer_bits_than_with_other_methods(unet_pipeline):
    unet = unet_pipeline().unet
    assert plans(unet, "tfmq", bits=4)["time_embedding.linear_1"].scheme.bits == 4
    assert plans(unet, "qdiffusion", bits=4)["time_embedding.linear_1"].scheme.bits == 8


@pytest.mark.parametrize(("scope", "temporal", "body"), [("all", "none", "per-step"), ("tib", "per-step", "static")])
def test_the_scope_decides_which_activations_have_a_scale_for_every_step(scope, temporal, body, unet_pipeline):
    model, method = unet_pipeline().unet, METHODS.load("tfmq")
    settings = build_config(CONFIG, scope=scope)
    assert temporal_acts(settings) == (scope == "tib")
    config = QuantizeConfig(method="tfmq", bits=8, act_bits=8).resolved()
    found = plan_layers(model, find_family("UNet2DModel")[0], config, traits_of(method, settings, config, 3))
    schemes = {plan.name: plan.scheme for plan in found if plan.scheme}
    assert schemes["time_embedding.linear_2"].act_mode == temporal
    assert schemes["mid_block.resnets.0.time_emb_proj"].act_mode == temporal
    assert schemes["mid_block.resnets.0.conv1"].act_mode == body


# a pass


@pytest.mark.parametrize(("kind", "scope"), [("unet", "all"), ("unet", "tib"), ("dit", "all")])
def test_round_trip_gives_the_network_that_was_learned(kind, scope, request, quantize_watched):
    fields = FIELDS | {"settings": {"iterations": 4} | ({"scope": scope} if scope == "tib" else {})}
    done = quantize_watched(request.getfixturevalue(f"{kind}_folder"), "tfmq", **fields)
    pipe = load(done.bundle, device="cpu", dtype="float32")
    model = pipe.transformer if kind == "dit" else pipe.unet
    rows, moved = Counter(), 0
    rounded = {name for name, acts in done.acts.items() if acts is not None}
    for name, acts in done.acts.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, done.model.get_submodule(name).weight)
        if getattr(layer, "bias", None) is not None:
            own = done.model.get_submodule(name).bias
            assert torch.equal(layer.bias, own.half().float())
            moved += name in rounded and torch.equal(layer.bias, own)
        if acts is not None:
            assert torch.equal(layer.act_scale, acts.scale)
            assert torch.equal(layer.act_zero_point, acts.zero_point)
            rows[len(acts.scale)] += 1
    assert moved > 0.5 * len(rounded)  # biases that were fitted are such as the file can hold
    assert rows[4] >= 4  # three calls, and one row for all
    assert bool(rows[1]) == (scope == "tib")


@pytest.mark.parametrize("scope", ["all", "tib"])
def test_round_trip_computes_what_the_float_network_simulated(scope, unet_folder, quantize_watched, simulation_gap):
    fields = FIELDS | {"settings": {"iterations": 4} | ({"scope": scope} if scope == "tib" else {})}
    done = quantize_watched(unet_folder, "tfmq", **fields)
    model = load(done.bundle, device="cpu", dtype="float32").unet
    assert simulation_gap(done, model) < 1e-5


def test_rows_of_the_tables_differ_from_step_to_step(unet_folder, quantize_watched):
    done = quantize_watched(unet_folder, "tfmq", **FIELDS)
    tables = [acts.scale[:3] for acts in done.acts.values() if acts is not None]
    assert len(tables) > 10
    assert sum(bool((table != table[:1]).any()) for table in tables) > 0.9 * len(tables)


def test_a_table_whose_rule_is_exact_refuses_another_number_of_steps(unet_folder, quantize_watched):
    done = quantize_watched(unet_folder, "tfmq", **FIELDS)
    steps = read_manifest(done.bundle).components["unet"].quantization.steps
    assert (len(steps.schedule.timesteps), steps.rule) == (3, "nearest")
    pipe = load(done.bundle, device="cpu")
    set_step_table_(pipe.unet, StepTable(steps.schedule, "exact"))
    sample(pipe, RunRequest(seeds=(1,), num_inference_steps=3))
    with pytest.raises(ConfigError, match="the per-step scales of this model are fitted for 3 DDIMScheduler calls"):
        sample(pipe, RunRequest(seeds=(1,), num_inference_steps=5))


PROGRAM = """
import hashlib, sys, torch
from dacc import load
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample
torch.set_num_threads(1)
found = sample(load(sys.argv[1], device="cpu"), RunRequest(seeds=(5, 6), num_inference_steps=3))
print(hashlib.sha256(found.latents.contiguous().numpy().tobytes()).hexdigest())
"""


def test_round_trip_in_a_fresh_process_gives_the_same_latents(unet_folder, quantize_watched, run_python):
    done = quantize_watched(unet_folder, "tfmq", **FIELDS)
    found = sample(load(done.bundle, device="cpu"), RunRequest(seeds=(5, 6), num_inference_steps=3))
    here = hashlib.sha256(found.latents.contiguous().numpy().tobytes()).hexdigest()
    assert run_python(PROGRAM, done.bundle).stdout.split()[-1] == here


def test_repeat_gives_the_same_bytes(unet_folder, quantize_watched, files_of, tmp_path):
    done = quantize_watched(unet_folder, "tfmq", **FIELDS)
    config = QuantizeConfig(method="tfmq", measure="never", **FIELDS)
    again = quantize_pipeline(unet_folder, config, calib=done.calibration, output=tmp_path / "again")
    assert files_of(again) == files_of(done.bundle)


@pytest.mark.parametrize("units", [1, 4])
def test_an_interrupted_run_goes_on_and_ends_with_equal_bytes(
    units, unet_folder, quantize_watched, files_of, tmp_path, monkeypatch
):
    whole = quantize_watched(unet_folder, "tfmq", **FIELDS)
    done, treat_unit = [], calibrated._treat

    def stop(*arguments):
        if len(done) == units:
            raise KeyboardInterrupt
        done.append(arguments)
        return treat_unit(*arguments)

    config = QuantizeConfig(method="tfmq", measure="never", **FIELDS)
    monkeypatch.setattr(calibrated, "_treat", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(unet_folder, config, calib=whole.calibration, output=tmp_path / "out")
    rest = []
    monkeypatch.setattr(calibrated, "_treat", lambda *given: rest.append(given) or treat_unit(*given))
    quantize_pipeline(unet_folder, config, calib=whole.calibration, output=tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole.bundle)
    assert len(rest) == len(whole.blocks) - units


def test_a_network_without_temporal_layers_is_treated_with_a_notice(unet_folder, calibration_of, tmp_path):
    from dacc.core.reporter import Reporter

    reporter = Reporter(quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dacc.quant.temporal.find_temporal", lambda *_: None)
        bundle = quantize_pipeline(
            unet_folder,
            QuantizeConfig(method="tfmq", measure="never", **FIELDS),
            calib=calibration_of(unet_folder, "every-step"),
            output=tmp_path / "out",
            reporter=reporter,
        )
    assert [notice for notice in reporter.notices if "no layers that depend on the time alone" in notice]
    modules = read_manifest(bundle).components["unet"].quantization.modules
    assert modules["time_embedding.linear_1"].scheme
