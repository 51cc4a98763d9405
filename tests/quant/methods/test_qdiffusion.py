"""Q-Diffusion: blocks learned against float blocks, split shortcuts, learned scales; from set to bundle."""

from dataclasses import replace

import pytest
import torch

from dacc import QuantizeConfig, load, quantize_pipeline
from dacc.calibrate.store import open_calibration
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.core.schedule_id import ScheduleId
from dacc.core.scheme import Scheme
from dacc.core.source import resolve_source
from dacc.quant import calibrated
from dacc.quant.block import Treated
from dacc.quant.layerwise import BASELINE
from dacc.quant.methods import rtn
from dacc.quant.methods.qdiffusion import QDiffusionConfig, treat
from dacc.quant.ranges import find_scales, quantized_weights, roundings_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

W4A8 = Scheme(bits=4, act_bits=8, act_mode="static")
FIELDS = {"bits": 4, "act_bits": 8, "settings": {"iterations": 4}}


def unit(make_block, residual_block):
    module, inputs = residual_block()
    schemes = dict.fromkeys(("conv1", "conv2"), W4A8) | {"conv_shortcut": W4A8.model_copy(update={"split": 12})}
    return make_block(module, inputs, schemes)


def error_of(block, treated):
    with quantized_weights(block, treated), block.rounding.instead(roundings_of(block, treated)):
        return block.error()


def test_formula_a_unit_computes_with_two_scales_where_two_tensors_join(make_block, residual_block):
    block = unit(make_block, residual_block)
    found = treat(block, QDiffusionConfig(), {"iterations": 10})["conv_shortcut"]
    assert found.weight.scheme.split == 12
    x, bias = block.sightings[0].entering.args[0], found.bias.float()
    weight = found.weight.dequantize()
    expected = bias.view(-1, 1, 1)
    for number, part in enumerate((slice(None, 12), slice(12, None))):
        step, zero = found.acts.scale[0, number], float(found.acts.zero_point[0, number])
        rounded = (((x[:, part] / step).round() + zero).clamp(0, 255) - zero) * step
        expected = expected + torch.einsum("bchw,oc->bohw", rounded, weight[:, part, 0, 0])
    alone = block.only([plan for plan in block.plans if plan.name == "conv_shortcut"])
    treated = {"conv_shortcut": found}
    with quantized_weights(alone, treated), block.rounding.instead(roundings_of(alone, treated)):
        torch.testing.assert_close(block.module.conv_shortcut(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_rank_is_below_rounding_to_nearest(start, make_block, residual_block):
    block = unit(make_block, residual_block)
    scales = find_scales(block, "mse")
    nearest = {
        name: Treated(rtn.quantize(layer.weight, block.scheme(name), BASELINE), scales[name])
        for name, layer in block.layers.items()
    }
    found = treat(block, QDiffusionConfig(start=start, learning_rate=3e-2), {"iterations": 200})
    assert error_of(block, found) < 0.95 * error_of(block, nearest)


@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_a_unit_that_no_call_reaches_is_rounded_to_nearest(start, make_block, residual_block):
    idle = replace(unit(make_block, residual_block), sightings=[])
    found = treat(idle, QDiffusionConfig(start=start), {"iterations": 8})
    assert {part.method for part in found.values()} == {"rtn"}
    for name, layer in idle.layers.items():
        nearest = rtn.quantize(layer.weight, idle.scheme(name), BASELINE)
        assert torch.equal(found[name].weight.qweight, nearest.qweight)


def test_scales_take_a_quarter_of_the_updates_unless_asked_otherwise(make_block, residual_block, monkeypatch):
    asked = []

    def watch(block, treated, updates, rate):
        asked.append((updates, rate))
        return treated

    monkeypatch.setattr("dacc.quant.methods.qdiffusion.learn_scales", watch)
    block = unit(make_block, residual_block)
    treat(block, QDiffusionConfig(), {"iterations": 8})
    treat(block, QDiffusionConfig(act_iterations=5, act_learning_rate=0.1), {"iterations": 8})
    treat(block, QDiffusionConfig(act_iterations=0), {"iterations": 8})
    assert asked == [(2, 2e-3), (5, 0.1), (0, 2e-3)]


# a pass


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_round_trip_gives_the_network_that_was_learned(kind, request, quantize_watched):
    done = quantize_watched(request.getfixturevalue(f"{kind}_folder"), "qdiffusion", **FIELDS)
    pipe = load(done.bundle, device="cpu", dtype="float32")
    model = pipe.transformer if kind == "dit" else pipe.unet
    assert len(done.acts) > 10
    for name, acts in done.acts.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, done.model.get_submodule(name).weight)
        if acts is not None:
            assert torch.equal(layer.act_scale, acts.scale)
            assert torch.equal(layer.act_zero_point, acts.zero_point)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_round_trip_computes_what_the_float_network_simulated(kind, request, quantize_watched, simulation_gap):
    done = quantize_watched(request.getfixturevalue(f"{kind}_folder"), "qdiffusion", **FIELDS)
    pipe = load(done.bundle, device="cpu", dtype="float32")
    model = pipe.transformer if kind == "dit" else pipe.unet
    assert simulation_gap(done, model) < 1e-5


def test_repeat_gives_the_same_bytes(unet_folder, quantize_watched, files_of, tmp_path):
    done = quantize_watched(unet_folder, "qdiffusion", **FIELDS)
    config = QuantizeConfig(method="qdiffusion", measure="never", **FIELDS)
    again = quantize_pipeline(unet_folder, config, calib=done.calibration, output=tmp_path / "again")
    assert files_of(again) == files_of(done.bundle)


@pytest.mark.parametrize("units", [3])
def test_an_interrupted_run_goes_on_and_ends_with_equal_bytes(
    units, unet_folder, quantize_watched, files_of, tmp_path, monkeypatch
):
    whole = quantize_watched(unet_folder, "qdiffusion", **FIELDS)
    done, treat_unit = [], calibrated._treat

    def stop(*arguments):
        if len(done) == units:
            raise KeyboardInterrupt
        done.append(arguments)
        return treat_unit(*arguments)

    config = QuantizeConfig(method="qdiffusion", measure="never", **FIELDS)
    monkeypatch.setattr(calibrated, "_treat", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(unet_folder, config, calib=whole.calibration, output=tmp_path / "out")
    rest = []
    monkeypatch.setattr(calibrated, "_treat", lambda *given: rest.append(given) or treat_unit(*given))
    quantize_pipeline(unet_folder, config, calib=whole.calibration, output=tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(whole.bundle)
    assert len(rest) == len(whole.blocks) - units


def test_the_number_of_updates_is_decided_once_and_written_down(unet_folder, calibration_of, tmp_path, monkeypatch):
    counts = iter([3, 77])
    monkeypatch.setattr("dacc.quant.methods.qdiffusion.choose_iterations", lambda *_: next(counts))
    monkeypatch.setattr(calibrated, "_treat", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    config = QuantizeConfig(method="qdiffusion", measure="never", bits=4)
    given = {"calib": calibration_of(unet_folder), "output": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(unet_folder, config, **given)
    monkeypatch.undo()
    monkeypatch.setattr("dacc.quant.methods.qdiffusion.choose_iterations", lambda *_: pytest.fail("decided again"))
    monkeypatch.setenv("DACC_CACHE", str(tmp_path))
    manifest = read_manifest(quantize_pipeline(unet_folder, config, **given))
    assert manifest.components["unet"].quantization.chosen == {"iterations": 3}


def test_a_later_block_sees_what_the_quantized_ones_before_it_give_and_aims_at_the_float_output(
    unet_folder, unet_pipeline, quantize_watched
):
    done = quantize_watched(unet_folder, "qdiffusion", **FIELDS)
    float_model = unet_pipeline().unet.requires_grad_(False)
    first, last = done.blocks[0], done.blocks[-1]
    for sighting in first.sightings:
        assert torch.equal(sighting.entering.args[0], sighting.intact.args[0])
    assert last.name != first.name
    unit = float_model.get_submodule(last.name)
    for sighting in last.sightings:
        mine, clean = sighting.entering.args[0], sighting.intact.args[0]
        assert 1e-4 < float((mine - clean).norm() / clean.norm()) < 1
        with torch.no_grad():
            given = unit(*sighting.intact.args, **sighting.intact.kwargs)
        torch.testing.assert_close(sighting.target[0], given)


def test_one_scale_serves_all_steps(unet_folder, quantize_watched):
    done = quantize_watched(unet_folder, "qdiffusion", **FIELDS)
    manifest = read_manifest(done.bundle)
    assert manifest.components["unet"].quantization.steps is None
    assert {acts.scale.shape[0] for acts in done.acts.values() if acts is not None} == {1}
    assert isinstance(open_calibration(done.calibration).schedule, ScheduleId)


@pytest.mark.slow
def test_a_bundle_is_as_small_as_its_bits(tmp_path, calibration_of):
    source = resolve_source("zoo:digits-unet", reporter=silent())
    calibration = calibration_of(source.path, steps=2, samples=2)
    config = QuantizeConfig(
        method="qdiffusion", bits=4, act_bits=8, group_size="channel", settings={"iterations": 1}, measure="never"
    )
    bundle = quantize_pipeline(source, config, calib=calibration, output=tmp_path / "out")
    unet = load(bundle, device="cpu").unet
    packed = parameters = 0.0
    for module in unet.modules():
        if getattr(module, "scheme", None) is not None:
            named = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            packed += sum(each.numel() * each.element_size() for name, each in named.items() if name != "bias")
            parameters += module.scheme.bits / 8 * torch.Size(module.weight_shape).numel()
    assert parameters > 1e5
    assert packed <= 1.15 * parameters
    total = sum(file.stat().st_size for file in (bundle / "unet").glob("*.safetensors"))
    biases = sum(each.numel() for name, each in unet.named_parameters() if not name.endswith("qweight"))
    assert total <= 1.15 * parameters + 2 * biases + 2e5  # names and shapes of the tensors
