"""EfficientDM: adapters that fold into integers, learning rates that know the scales, one activation scale per call."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dacc.core.config import build_config
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.families import find_family
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.core.scheme import Scheme
from dacc.quant import distill, whole_network
from dacc.quant.config import QuantizeConfig
from dacc.quant.distill import Training
from dacc.quant.methods.efficientdm import CONFIG, INSIDE, EfficientDMConfig, QALoRA, base_of, decide, student_of
from dacc.quant.methods.rtn import RTNConfig, quantize
from dacc.quant.plan import Traits, plan_layers
from dacc.quant.reconstruct import ReconstructionConfig, reconstruct_weights
from dacc.quant.simulate import put_weight_
from dacc.quant.treatment import Treatment
from dacc.quant.units import find_units
from dacc.runtime.load import load_source
from dacc.runtime.packing import unpack_codes
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import capture_calls, sample
from dacc.runtime.weight import to_rows

DYNAMIC = {"act_bits": 8, "act_mode": "dynamic"}
SCHEMES = [
    Scheme(bits=4),
    Scheme(bits=3, split=16),
    Scheme(bits=4, group_size=16, symmetric=False),
    Scheme(bits=4, group_size=16, two_level=True, **DYNAMIC),
]
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
SHAPES = pytest.mark.parametrize("shape", [(6, 48), (6, 16, 3, 1)], ids=["linear", "convolution"])
BASES = ["cell", "quantized", "float"]


def codes_of(weight):
    features = torch.Size(weight.shape[1:]).numel()
    return unpack_codes(weight.qweight, weight.scheme.bits, features, signed=weight.scheme.symmetric).float()


def example(scheme, shape=(6, 48), base="cell", rank=4, disturbance=0.0):
    """A float weight, its quantized form, and an adapter; `disturbance` moves all that can be learned."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    if scheme.group_size and not scheme.symmetric:
        weight = weight + 0.5
    start = quantize(weight, scheme, RTNConfig())
    learned = QALoRA(base_of(base, to_rows(weight), start), start, rank, generator)
    with torch.no_grad():
        learned.up.normal_(generator=generator).mul_(disturbance)
        learned.growth.normal_(generator=generator).mul_(0.1 * disturbance)
    return weight, start, learned


# formula


@NAMED
@SHAPES
def test_formula_equals_the_rows_one_by_one(scheme, shape):
    weight, start, learned = example(scheme, shape, "float", disturbance=1.0)
    found, rows, (low, high) = learned().detach(), to_rows(weight), scheme.code_range
    learned.requires_grad_(False)
    for row in range(6):
        for column in range(48):
            delta = sum(float(learned.up[row, r]) * float(learned.down[r, column]) for r in range(4))
            group = (column >= 16) * 1 if scheme.split else column // 16 if scheme.group_size else 0
            part = 0 if scheme.two_level else group
            step = float(learned.scale()[row, part])
            if scheme.two_level:
                step *= int(start.group_scale[row, group])
            zero = 0 if scheme.symmetric else int(start.zero_point[row, group])
            ratio = (float(rows[row, column]) + delta) / step
            if abs(ratio % 1 - 0.5) > 1e-4:
                code = min(max(round(ratio) + zero, low), high)
                assert float(found[row, column]) == pytest.approx((code - zero) * step, abs=1e-5)


@NAMED
def test_scales_grow_by_their_logarithm_in_the_precision_of_the_file(scheme):
    _, start, learned = example(scheme, disturbance=1.0)
    expected = (start.scale.float() * learned.growth.exp()).to(start.scale.dtype)
    assert torch.equal(learned.scale(), expected.float())
    assert learned.result().scale.dtype == start.scale.dtype


@NAMED
@SHAPES
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_of_zeros_gives_what_rounding_gives(base, shape, scheme):
    _, start, learned = example(scheme, shape, base)
    found = learned.result()
    assert torch.equal(found.qweight, start.qweight)  # for "float" because it was rounded to nearest
    assert torch.equal(found.scale, start.scale)
    torch.testing.assert_close(learned(), to_rows(start.dequantize()), rtol=1e-6, atol=1e-6)


def test_the_base_of_a_cell_is_the_float_weight_where_that_rounds_the_same():
    weight, start, _ = example(Scheme(bits=3))
    moved = replace(start, qweight=quantize(weight * 1.3, Scheme(bits=3), RTNConfig()).qweight)
    base, rounded = base_of("cell", weight, moved), moved.dequantize()
    away = (weight - rounded).abs() / start.scale
    torch.testing.assert_close(base[away < INSIDE], weight[away < INSIDE])
    torch.testing.assert_close(((base - rounded) / start.scale).abs(), away.clamp(max=INSIDE), rtol=1e-4, atol=1e-4)
    assert bool((away > 0.6).any())
    assert torch.equal((base / start.scale).round(), codes_of(moved))


@NAMED
def test_what_is_folded_gives_the_output_of_the_student(scheme):
    _, start, learned = example(scheme, disturbance=1.0)
    x, folded = torch.randn(20, 48), learned.result()
    assert not torch.equal(folded.qweight, start.qweight)
    torch.testing.assert_close(x @ to_rows(folded.dequantize()).T, x @ learned().T, rtol=1e-5, atol=1e-5)


@NAMED
def test_gradients_reach_the_adapter_and_the_scales(scheme):
    _, _, learned = example(scheme, disturbance=0.3)
    (learned() * torch.randn(6, 48)).sum().backward()
    for parameter in learned.parameters():
        assert float(parameter.grad.abs().min()) > 0


def test_rounding_passes_gradients_inside_the_range_only():
    _, start, learned = example(Scheme(bits=3), base="float")
    move = torch.nn.Parameter(torch.zeros(6, 48))
    learned.base = learned.base * 1.7 + move
    learned().sum().backward()
    inside = codes_of(start) * 0 + (
        (learned.base / start.scale).round().clamp(-4, 3) == (learned.base / start.scale).round()
    )
    assert torch.equal(move.grad != 0, inside.bool())


def test_a_rank_beyond_the_size_of_the_weight_is_cut():
    learned = example(Scheme(bits=4), rank=1000)[2]
    assert learned.down.shape == (6, 48)
    assert float(learned.down.detach().abs().max()) <= 48**-0.5
    assert not learned.up.any()


# a network with weights of very different sizes

CALLS = 3
BODY = Scheme(bits=4, act_bits=4, act_mode="per-step", act_steps=CALLS)
SIZES = (0.01, 0.1, 1.0)


@pytest.fixture
def scene(make_block):
    """Layers whose weights differ by orders of magnitude, each after a norm that hides it; computing as quantized."""
    torch.manual_seed(0)
    parts = []
    for size in SIZES:
        linear = nn.Linear(24, 24, bias=False)
        linear.weight.data.mul_(size)
        parts += [linear, nn.LayerNorm(24), nn.SiLU()]
    inputs = [torch.randn(16, 24) @ torch.randn(24, 24) for _ in range(CALLS * 8)]
    schemes = {str(3 * number): BODY for number in range(len(SIZES))}
    block = make_block(nn.Sequential(*parts), inputs, schemes, calls=CALLS)
    starts = reconstruct_weights(block, ReconstructionConfig(start="nearest"), 0)
    for name, found in starts.items():
        put_weight_(block.layers[name], found.weight)
    return block, starts


def trained(scene, updates=40, **fields):
    block, starts = scene
    student = student_of(block, starts, EfficientDMConfig(updates=updates, **fields))
    training = Training(student, starts, updates, seed=0)
    for _ in range(updates):
        training.update(block, 0.0)
    return student


def test_the_same_share_of_integers_changes_in_small_and_in_large_weights(scene):
    _, starts = scene

    def shares(**fields):
        folded = trained(scene, scale_learning_rate=0, **fields).folded(starts)
        return [
            float((codes_of(found.weight) != codes_of(starts[name].weight)).float().mean()) + 1e-4
            for name, found in folded.items()
        ]

    aware, flat = shares(), shares(scale_aware=False)
    assert max(aware) < 10 * min(aware)
    assert max(flat) > 10 * min(flat)
    assert min(aware) > 0.01


def test_learning_rates_are_those_of_the_scales(scene):
    block, starts = scene
    student = student_of(block, starts, EfficientDMConfig(learning_rate=0.5))
    for name, (parameters, rate) in zip(starts, student.rates, strict=False):
        assert parameters == [student.weights[name].down, student.weights[name].up]
        assert rate == pytest.approx(0.5 * float(starts[name].weight.scale.float().mean()))
    assert [rate for _, rate in student.rates[3:]] == [
        EfficientDMConfig().scale_learning_rate,
        EfficientDMConfig().act_learning_rate,
    ]


# one scale for each call, told by the run and not by counting


def test_extra_evaluations_change_nothing(scene):
    block, _ = scene
    student = trained(scene, 10)
    before = [student.outputs(block, sighting)[0] for sighting in block.sightings[:CALLS]]
    scales = {name: scale.result().scale for name, scale in student.scales.items()}
    for _ in range(2):
        student.outputs(block, block.sightings[1])
    for sighting, expected in zip(reversed(block.sightings[:CALLS]), reversed(before), strict=True):
        assert torch.equal(student.outputs(block, sighting)[0], expected)
    assert all(torch.equal(scale.result().scale, scales[name]) for name, scale in student.scales.items())
    first = replace(block.sightings[0], state=block.sightings[1].state)
    assert not torch.equal(student.outputs(block, first)[0], before[0])


# whole pipelines

FIELDS = {"bits": 4, "act_bits": 4, "group_size": "channel", "settings": {"updates": 30}}


def quick(quantize_watched, folder, **fields):
    return quantize_watched(folder, "efficientdm", **FIELDS | fields)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_bundle_holds_what_was_trained_and_no_adapters(kind, request, quantize_watched):
    done = quick(quantize_watched, request.getfixturevalue(f"{kind}_folder"))
    (file,) = [file for file in done.bundle.rglob("*.safetensors") if file.parent.name in ("unet", "transformer")]
    with safe_open(file, "pt") as tensors:
        names = {name.rpartition(".")[2] for name in tensors.keys()}  # noqa: SIM118
    assert names <= {"qweight", "scale", "act_scale", "act_zero_point", "weight", "bias"}
    pipe = load_source(done.bundle, device="cpu")
    (denoiser,) = [part for part in pipe.components.values() if type(part).__name__ == type(done.model).__name__]
    for name, acts in done.acts.items():
        layer = denoiser.get_submodule(name)
        assert torch.equal(layer.stored.dequantize(), done.model.get_submodule(name).weight)
        if acts is not None:
            assert torch.equal(layer.act_scale, acts.scale)


def test_a_bundle_tells_the_error_of_the_trained_network(dit_folder, quantize_watched):
    manifest = read_manifest(quick(quantize_watched, dit_folder).bundle)
    record = manifest.components["transformer"].quantization
    assert manifest.passes[-1].notices == []
    assert record.chosen == {"updates": 30}
    assert record.steps is not None
    errors = {each.output_error for each in record.modules.values() if each.scheme and "w4" in each.scheme}
    assert len(errors) == 1  # of the network as a whole


def test_a_run_with_other_steps_takes_the_rows_of_the_nearest_noise(unet_folder, quantize_watched):
    pipe = load_source(quick(quantize_watched, unet_folder).bundle, device="cpu")
    layer = pipe.unet.get_submodule("down_blocks.0.resnets.0.conv1")
    rows = []

    def watch(*_):
        scale = layer.activation_scale()[0]
        rows.append(int((layer.act_scale == scale).all(1).nonzero()[0]))

    layer.register_forward_pre_hook(watch)
    sample(pipe, RunRequest(seeds=(1,), num_inference_steps=3))
    assert rows == [0, 1, 2]
    rows.clear()
    with pytest.warns(UserWarning, match="nearest noise level"):
        sample(pipe, RunRequest(seeds=(1,), num_inference_steps=6))
    assert rows == sorted(rows)
    assert set(rows) == {0, 1, 2}


@pytest.fixture
def again(dit_folder, calibration_of, tmp_path, files_of):
    """Makes the same bundle anew, and gives the weights in it."""
    from dacc import QuantizeConfig, quantize_pipeline

    def make():
        config = QuantizeConfig(method="efficientdm", measure="never", **FIELDS)
        calib = calibration_of(dit_folder, "every-step")
        return weights_of(
            files_of(quantize_pipeline(dit_folder, config, calib=calib, output=tmp_path / "again", device="cpu"))
        )

    return make


def weights_of(files):
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


def test_calls_weigh_in_the_loss_as_an_error_there_moves_the_result(dit_folder, quantize_watched, monkeypatch):
    seen = []
    weighing = whole_network.Sighting

    def watched(state, *arguments, weight=1.0, **fields):
        seen.append((state.call, weight))
        return weighing(state, *arguments, weight=weight, **fields)

    monkeypatch.setattr("dacc.quant.driver.call_sensitivity", lambda *_, **__: [4.0, 1.0, 1.0])
    monkeypatch.setattr(whole_network, "Sighting", watched)
    quick(quantize_watched, dit_folder, settings={"updates": 2, "weigh": "sensitivity"})
    assert dict(seen) == {0: 2.0, 1: 0.5, 2: 0.5}


def test_calls_that_did_not_fit_on_their_way_through_the_network_are_trained_on_all_the_same(
    dit_folder, quantize_watched, monkeypatch
):
    seen, sightings = [], whole_network.Sighting

    def watched(*arguments, **fields):
        seen.append(arguments[0].call)
        return sightings(*arguments, **fields)

    def few(budget_gb, model, calls, units, **_):
        return list(calls[:3]), 0

    monkeypatch.setattr("dacc.quant.calibrated.calls_within", few)
    monkeypatch.setattr(whole_network, "Sighting", watched)
    quick(quantize_watched, dit_folder, settings={"updates": 2})
    assert sorted(seen) == sorted([0, 1, 2] * (len(seen) // 3))
    assert len(seen) > 3


def test_the_same_seed_gives_the_same_bytes(dit_folder, quantize_watched, files_of, again):
    assert again() == weights_of(files_of(quick(quantize_watched, dit_folder).bundle))


@pytest.mark.parametrize("stage", ["training", "storing"])
def test_an_interrupted_pass_goes_on_and_ends_with_equal_bytes(
    stage, dit_folder, quantize_watched, files_of, again, monkeypatch
):
    done = quick(quantize_watched, dit_folder)
    monkeypatch.setattr(distill, "SAVE_SECONDS", 0.0)
    place = {"training": (distill.Training, "update", 17), "storing": (Treatment, "put_stored", len(done.acts) + 5)}
    owner, name, at = place[stage]
    original, count = getattr(owner, name), itertools.count(1)

    def stopping(*arguments):
        if next(count) == at:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert again() == weights_of(files_of(done.bundle))


def test_what_the_training_told_is_told_again_by_a_run_that_goes_on_behind_it(
    dit_folder, calibration_of, tmp_path, monkeypatch
):
    from dacc import QuantizeConfig, quantize_pipeline

    still = {"updates": 2, "learning_rate": 1e-12, "scale_learning_rate": 0.0, "act_learning_rate": 0.0}
    still |= {"bias_learning_rate": 0.0}
    config = QuantizeConfig(method="efficientdm", measure="never", **FIELDS | {"settings": still})
    calib, original = calibration_of(dit_folder, "every-step"), Treatment.put_stored

    def notices(output):
        bundle = quantize_pipeline(dit_folder, config, calib=calib, output=tmp_path / output, device="cpu")
        return read_manifest(bundle).passes[-1].notices

    def stopping(treatment, *arguments):
        if f"trained:{treatment.component}" in treatment.writer.finished_units():
            raise KeyboardInterrupt
        return original(treatment, *arguments)

    expected = notices("whole")
    assert any("did not lower the error" in notice for notice in expected)
    with monkeypatch.context() as patch:
        patch.setattr(Treatment, "put_stored", stopping)
        with pytest.raises(KeyboardInterrupt):
            notices("parts")
    assert notices("parts") == expected


def test_weights_alone_are_trained_where_activations_stay_float(dit_folder, quantize_watched):
    done = quantize_watched(dit_folder, "efficientdm", bits=3, group_size=16, settings={"updates": 10})
    schemes = read_manifest(done.bundle).components["transformer"].quantization.schemes
    assert any(not scheme.symmetric for scheme in schemes.values())
    assert all(scheme.act_bits == 16 for scheme in schemes.values())


# settings


def test_the_updates_that_are_asked_for_are_made(dit_pipeline):
    pipe = dit_pipeline()
    calls = capture_calls(pipe, RunRequest(seeds=(1,), num_inference_steps=2))
    units = units_of(pipe.transformer, calls[0])
    assert decide(pipe.transformer, units, calls, EfficientDMConfig(updates=7), silent()) == {"updates": 7}


def test_a_network_of_which_nothing_is_trained_is_refused_before_anything_is_rounded(dit_pipeline):
    model = dit_pipeline().transformer
    with pytest.raises(UnsupportedError, match="no layer is left that can be trained"):
        decide(model, [], [], EfficientDMConfig(), silent())


def test_the_updates_are_chosen_by_the_time_that_one_takes(dit_pipeline):
    pipe = dit_pipeline()
    pipe.transformer.requires_grad_(False)
    calls = capture_calls(pipe, RunRequest(seeds=(1,), num_inference_steps=2))
    units = units_of(pipe.transformer, calls[0])
    few, many = (
        decide(pipe.transformer, units, calls, EfficientDMConfig(minutes=minutes), silent())["updates"]
        for minutes in (1e-9, 1e9)
    )
    assert (few, many) == (50, 20000)
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


def units_of(model, call):
    family, _ = find_family(type(model).__name__)
    config = QuantizeConfig(bits=4, act_bits=8, act_mode="per-step")
    return find_units(model, plan_layers(model, family, config, Traits(calls=2)), family, call)


@pytest.mark.parametrize("fields", [{"rank": 0}, {"base": "none"}, {"learning_rate": 0}, {"updates": -1}, {"lr": 1}])
def test_wrong_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        build_config(CONFIG, **fields)
