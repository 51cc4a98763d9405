from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from safetensors.torch import load
from torch import nn

from dacc.core.bundle import BundleWriter
from dacc.core.errors import CalibrationError
from dacc.core.families import find_family
from dacc.core.manifest import ModuleRecord
from dacc.core.pipeline import denoisers
from dacc.core.reporter import silent
from dacc.core.scheme import Scheme
from dacc.quant.calibrated import quantize_units
from dacc.quant.config import QuantizeConfig
from dacc.quant.driver import plan_component
from dacc.quant.grams import Grams
from dacc.quant.layerwise import weight_error_of
from dacc.quant.methods import gptq, rtn
from dacc.quant.simulate import round_dynamic
from dacc.quant.treatment import Treatment, load_float
from dacc.runtime.layers import swap_layers_
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import capture_calls
from dacc.runtime.weight import QuantizedWeight

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

BOTH = pytest.mark.parametrize("kind", ["unet", "dit"])
EMBEDDING = "norm1.emb.class_embedder.embedding_table"
NEAREST = rtn.RTNConfig(search="mse")
CONFIGS = pytest.mark.parametrize(
    "fields", [{"bits": 3}, {"bits": 8, "act_bits": 8}, {"bits": 4, "act_bits": 8}], ids=["w3", "w8a8", "w4a8"]
)


@dataclass
class Result:
    """What a pass left behind."""

    model: Any  # the float network, computing as quantized
    plans: list
    records: dict[str, ModuleRecord]
    content: bytes  # of the weight file
    notices: list[str]

    def weight(self, name):
        """A layer as it is stored."""
        (plan,) = [plan for plan in self.plans if plan.name == name]
        tensors = load(self.content)
        stored = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        return QuantizedWeight(plan.scheme, plan.shape, **stored)


@pytest.fixture
def calls_of(request):
    """What enters the denoiser of a tiny pipeline in a short run."""
    return lambda kind: capture_calls(
        request.getfixturevalue(f"{kind}_pipeline")(), RunRequest(seeds=(1, 2), num_inference_steps=2)
    )


@pytest.fixture
def run(request, calls_of, tmp_path):
    """Quantizes the denoiser of a tiny pipeline into the journal of a bundle."""

    def make(kind, quantize=gptq.quantize, *, output="out", calls=None, **fields):
        source, calls, reporter = request.getfixturevalue(f"{kind}_folder"), calls or calls_of(kind), silent()
        name = calls[0].component
        skeleton, plans = plan_component(source / name, QuantizeConfig(**fields), reporter)
        method = SimpleNamespace(**vars(gptq) | {"quantize": quantize})
        family, _ = find_family(type(skeleton).__name__)
        with BundleWriter(source, tmp_path / output, replace={name}, run_key="key", reporter=reporter) as writer:
            model = load_float(source / name, skeleton)
            treatment = Treatment(name, method, gptq.GPTQConfig(), writer, source / name)
            quantize_units(treatment, model, plans, family, calls, reporter)
            writer.write_component(name, {}, {})
            records = {
                plan.name: ModuleRecord(**writer.unit_record(f"{name}/{plan.name}")) for plan in plans if plan.scheme
            }
            content = next((writer.folder / name).glob("*.safetensors")).read_bytes()
        return Result(model, plans, records, content, reporter.notices)

    return make


def original(request, kind):
    (model,) = denoisers(request.getfixturevalue(f"{kind}_pipeline")()).values()
    return model.requires_grad_(False)


@BOTH
@CONFIGS
def test_every_layer_gets_a_record_with_the_error_of_what_it_gives(kind, fields, run, request):
    done, model = run(kind, **fields), original(request, kind)
    assert list(done.records) == [plan.name for plan in done.plans if plan.scheme]
    for plan in done.plans:
        if plan.scheme:
            record, weight = done.records[plan.name], model.get_submodule(plan.name).weight
            assert (record.scheme, record.shape, record.reason) == (plan.scheme.name, plan.shape, None)
            assert record.error == pytest.approx(weight_error_of(weight, done.weight(plan.name)), rel=1e-5)
            assert (record.output_error is None) == plan.name.endswith(EMBEDDING)
            assert record.output_error is None or 0 < record.output_error < 2 / 2**plan.scheme.bits


@BOTH
def test_two_runs_give_the_same_bytes(kind, run):
    first, second = (run(kind, output=output, bits=4, act_bits=8) for output in ("first", "second"))
    assert first.content == second.content
    assert first.records == second.records
    assert first.notices == second.notices


@BOTH
def test_rank_of_the_denoiser_is_below_rounding_to_nearest(kind, run, calls_of, request):
    def nearest(weight, scheme, config, gram):
        return rtn.quantize(weight, scheme, NEAREST)

    calls, model = calls_of(kind), original(request, kind)
    expected = [call.replay(model)[0] for call in calls]
    errors = {}
    for name, quantize in (("gptq", gptq.quantize), ("rtn", nearest)):
        done = run(kind, quantize, output=name, bits=3)
        found = [call.replay(done.model)[0] for call in calls]
        outputs = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
        errors[name] = outputs, sum(record.output_error or 0 for record in done.records.values())
    assert errors["gptq"][0] < 0.8 * errors["rtn"][0]
    assert errors["gptq"][1] < 0.9 * errors["rtn"][1]


@BOTH
@CONFIGS
def test_the_network_is_left_computing_with_the_stored_weights(kind, fields, run, calls_of, request):
    done, model = run(kind, **fields), original(request, kind)
    swap_layers_(model, {plan.name: plan.scheme for plan in done.plans if plan.scheme})
    for name in done.records:
        weight = done.weight(name)
        assert torch.equal(done.model.get_submodule(name).weight, weight.dequantize())
        model.get_submodule(name).store_weight(weight)
    if "act_bits" not in fields:  # a rounded input that falls the other way changes all that follows
        for call in calls_of(kind):
            torch.testing.assert_close(call.replay(done.model)[0], call.replay(model)[0], rtol=1e-4, atol=1e-4)


@CONFIGS
def test_later_units_see_what_the_treated_ones_before_them_give(fields, run, calls_of):
    last, seen = "up_blocks.1.resnets.1.conv1", {}

    def watched(weight, scheme, config, gram):
        seen[tuple(weight.shape), len(seen)] = gram
        return gptq.quantize(weight, scheme, config, gram)

    calls = calls_of("unet")
    done = run("unet", watched, calls=calls, **fields)
    layer = done.model.get_submodule(last)
    with Grams({"layer": layer}, rows_per_call=10**6) as grams:
        for call in calls:
            call.replay(done.model)
    found = [gram for (shape, _), gram in seen.items() if shape == tuple(layer.weight.shape)]
    nearest = min(float((gram - grams.mean("layer")).norm()) for gram in found)
    assert nearest < 1e-5 * float(grams.mean("layer").norm())


@BOTH
def test_what_enters_the_treated_layers_is_rounded(kind, run, calls_of):
    calls, seen = calls_of(kind), []
    done = run(kind, calls=calls, bits=8, act_bits=8)
    for plan in done.plans:
        if plan.scheme and plan.scheme.act_bits == 8:
            done.model.get_submodule(plan.name).register_forward_hook(
                lambda layer, args, _: seen.append((args[0], isinstance(layer, nn.Conv2d)))
            )
    calls[0].replay(done.model)
    assert len(seen) > 10
    scheme = Scheme(bits=8, act_bits=8, act_mode="dynamic", act_offset=True)
    for x, per_sample in seen:
        torch.testing.assert_close(round_dynamic(x, scheme, per_sample=per_sample), x, rtol=1e-5, atol=1e-6)


# going on


def interrupted(layers, quantize=gptq.quantize):
    """A method that is stopped by Ctrl-C after some layers, and the list of those that it did."""
    done = []

    def counting(weight, scheme, config, gram):
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(tuple(weight.shape))
        return quantize(weight, scheme, config, gram)

    return counting, done


@pytest.mark.parametrize(("kind", "layers"), [("unet", 9), ("dit", 14)])
def test_an_interrupted_run_goes_on_and_ends_with_equal_bytes(kind, layers, run):
    whole = run(kind, output="whole", bits=4, act_bits=8)
    stopped, _ = interrupted(layers)
    with pytest.raises(KeyboardInterrupt):
        run(kind, stopped, bits=4, act_bits=8)
    counting, rest = interrupted(None)
    again = run(kind, counting, bits=4, act_bits=8)
    assert again.content == whole.content
    assert again.records == whole.records
    seeing = sum(record.output_error is not None for record in whole.records.values())
    assert seeing - layers <= len(rest) < seeing  # the block that it was in is done again


def test_a_run_that_went_on_gives_the_notices_of_a_whole_one(run):
    def garbage(weight, scheme, config, gram):
        return gptq.quantize(torch.zeros_like(weight), scheme, config, gram)

    whole = run("dit", garbage, output="whole")
    stopped, _ = interrupted(14, garbage)
    with pytest.raises(KeyboardInterrupt):
        run("dit", stopped)
    assert run("dit", garbage).notices == whole.notices != []


# never worse than the baseline, and never in silence


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_method_that_returns_garbage_is_replaced_by_rounding_to_nearest(factor, run, request):
    def garbage(weight, scheme, config, gram):
        found = gptq.quantize(weight, scheme, config, gram)
        return replace(found, scale=found.scale * factor) if weight.ndim == 4 else found

    done, model = run("unet", garbage), original(request, "unet")
    lost = [plan.name for plan in done.plans if plan.scheme and len(plan.shape) == 4]
    for name in lost:
        expected = rtn.quantize(model.get_submodule(name).weight, done.weight(name).scheme, NEAREST)
        assert torch.equal(done.weight(name).qweight, expected.qweight)
        assert torch.equal(done.weight(name).scale, expected.scale)
    (notice,) = done.notices
    assert notice.startswith("gptq was no better than rounding to nearest, which was kept, on ")
    assert notice.endswith(f" and {len(lost) - 3} more.")
    assert all(name in notice for name in lost[:3])


def test_embeddings_are_rounded_to_nearest_which_is_no_news(run, request):
    done, model = run("dit"), original(request, "dit")
    names = [f"transformer_blocks.{block}.{EMBEDDING}" for block in (0, 1)]
    for name in names:
        expected = rtn.quantize(model.get_submodule(name).weight, Scheme(bits=8), NEAREST)
        assert torch.equal(done.weight(name).qweight, expected.qweight)
    assert done.notices == []


def test_activation_ranges_that_are_a_guess_are_told(run, calls_of, monkeypatch):
    calls = calls_of("unet")
    monkeypatch.setattr(UNetMidBlock2D, "forward", lambda self, hidden_states, temb=None: hidden_states)
    done = run("unet", calls=calls, bits=8, act_bits=8, act_mode="static")
    fixed = [plan.name for plan in done.plans if plan.scheme and plan.scheme.has_fixed_acts]
    blind = [name for name in fixed if name.startswith("mid_block.")]
    told = [notice for notice in done.notices if "-8 to 8" in notice]
    assert told == [
        "no call of the calibration set reaches these layers; the ranges of their activations are a guess, -8 to 8: "
        f"{', '.join(blind[:3])} and {len(blind) - 3} more."
    ]


@pytest.mark.parametrize("fields", [{}, {"bits": 8, "act_bits": 8, "act_mode": "static"}], ids=["w4", "static"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_no_numbers_are_refused(value, fields, run, calls_of):
    calls = calls_of("unet")
    calls[1].args[0][0, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match="what enters .* holds NaN or infinity"):
        run("unet", calls=calls, **fields)
