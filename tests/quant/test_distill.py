"""Training against the float network: what it is shown, what it changes, and that it can be interrupted."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dacc.calibrate.held_out import split_calls
from dacc.core.errors import UnsupportedError
from dacc.core.reporter import Reporter, silent
from dacc.core.scheme import Scheme
from dacc.quant import distill as module
from dacc.quant.block import Treated
from dacc.quant.distill import DistillConfig, Student, Training, distill, error_of, fitting_updates
from dacc.quant.methods.efficientdm import EfficientDMConfig, student_of
from dacc.quant.ranges import roundings_of
from dacc.quant.reconstruct import ReconstructionConfig, reconstruct_weights
from dacc.quant.simulate import put_weight_

CALLS = 4
BODY = Scheme(bits=3, act_bits=4, act_mode="per-step", act_steps=CALLS)
SCHEMES = {"time_embed": Scheme(bits=8), "first": BODY, "last": BODY, "table": Scheme(bits=8)}
TRAINED = {"first", "last"}


class Toy(nn.Module):
    """A network that reads samples, times and classes."""

    def __init__(self):
        super().__init__()
        self.time_embed, self.first, self.last = nn.Linear(4, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.table = nn.Embedding(3, 32)

    def forward(self, x, time, label):
        return self.last(nn.functional.silu(self.first(x) + self.time_embed(time) + self.table(label)))


class Memory:
    """A checkpoint that stays in memory."""

    def __init__(self):
        self.kept, self.saves = None, 0

    def save(self, tensors, record):
        self.kept = copy.deepcopy(tensors), json.dumps(record)
        self.saves += 1

    def load(self, device):
        return self.kept and (self.kept[0], json.loads(self.kept[1]))


@pytest.fixture
def scene(make_block):
    """The toy network computing with its quantized layers, and these; another seed gives the same."""

    def make(*, seed=0, rounds=10):
        torch.manual_seed(0)
        network, count = Toy(), CALLS * rounds
        mixing = torch.randn(6, 16)
        inputs = [
            (torch.randn(24, 6) @ mixing * (1 + number % CALLS), torch.randn(24, 4), torch.randint(3, (24,)))
            for number in range(count)
        ]
        block = make_block(network, inputs, SCHEMES, calls=CALLS, seed=seed)
        starts = reconstruct_weights(block, ReconstructionConfig(start="nearest"), 0)
        for name, found in starts.items():
            put_weight_(block.layers[name], found.weight)
            block.rounding.put(name, roundings_of(block, starts)[name])
        return block, starts

    return make


def train(block, starts, updates=200, checkpoint=None, reporter=None, **fields):
    config = EfficientDMConfig(updates=updates, **fields)
    student = student_of(block, starts, config)
    return distill(block, starts, student, config, updates, checkpoint or Memory(), reporter or silent())


def tensors_of(treated):
    return {f"{name}.{key}": value for name in treated for key, value in treated[name].tensors().items()}


def equal(first, second):
    first, second = tensors_of(first), tensors_of(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def held_out(block):
    return replace(block, sightings=split_calls(block.sightings, [sighting.call for sighting in block.sightings])[1])


# what training does


def test_the_loss_falls_and_so_does_the_error_of_calls_not_trained_on(scene):
    block, starts = scene()
    training = Training(student_of(block, starts, EfficientDMConfig(updates=200)), starts, 200, seed=0)
    losses = [training.update(block, 0.0) for _ in range(200)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    found = train(block, starts)
    before, after = (error_of(held_out(block), treated) for treated in (starts, found))
    assert after < 0.9 * before
    assert found["first"].output_error == pytest.approx(after)


def test_only_adapters_scales_and_biases_change(scene):
    block, starts = scene()
    kept = copy.deepcopy(block.module.state_dict()), copy.deepcopy(block.reference.state_dict())
    found = train(block, starts, 60)
    for now, before in zip((block.module.state_dict(), block.reference.state_dict()), kept, strict=True):
        assert all(torch.equal(now[name], before[name]) for name in before)
    for name, start in starts.items():
        now = found[name]
        assert (now.weight.scheme, now.weight.shape) == (start.weight.scheme, start.weight.shape)
        assert torch.equal(now.weight.qweight, start.weight.qweight) == (name not in TRAINED)
        assert torch.equal(now.weight.scale, start.weight.scale) == (name not in TRAINED)
        assert (now.bias is not None) == (name in TRAINED)
        if name in TRAINED:
            assert now.bias.dtype == torch.float16
            assert 1e-4 < float((now.bias - block.layers[name].bias).abs().max()) < 0.1
            assert torch.equal(now.acts.zero_point, start.acts.zero_point)
            changed = (now.acts.scale - start.acts.scale).abs().flatten() > 1e-5
            assert changed.tolist() == [True] * CALLS + [False]  # the last row is of no call
    assert {name for name in starts if found[name] is starts[name]} == set(SCHEMES) - TRAINED


def test_what_the_student_makes_of_a_sample_changes_nothing_that_it_is_shown(scene):
    block, starts = scene()
    shown, outputs = {}, {}
    for label, disturbance in (("as it is", 0.0), ("disturbed", 0.5)):
        student = student_of(block, starts, EfficientDMConfig(updates=20))
        for weight in student.weights.values():
            weight.up.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(disturbance)
        training, seen, given = Training(student, starts, 20, seed=0), [], []

        def watch(_, args, output, seen=seen, given=given):
            seen.append(args)
            given.append(output)

        hook = block.module.register_forward_hook(watch)
        for _ in range(20):
            training.update(block, 0.0)
        hook.remove()
        shown[label], outputs[label] = seen, given
    assert not torch.equal(outputs["as it is"][0], outputs["disturbed"][0])
    for first, second in zip(shown["as it is"], shown["disturbed"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_call_that_weighs_more_ends_nearer(scene):
    block, starts = scene()

    def errors(heavy):
        weighed = [replace(one, weight=3.7 if one.call == heavy else 0.1) for one in block.sightings]
        found = train(replace(block, sightings=weighed), starts)
        alone = [replace(block, sightings=[one for one in block.sightings if one.call == call]) for call in (0, 3)]
        return [error_of(part, found) for part in alone]

    first, last = errors(0), errors(3)
    assert first[0] < last[0]
    assert first[1] > last[1]


def test_a_call_trains_its_own_scales_and_no_momentum_moves_the_others(scene):
    block, starts = scene()
    student = student_of(block, starts, EfficientDMConfig(updates=8))
    training = Training(student, starts, 8, seed=0)
    for call in (0, 2):
        one = replace(block, sightings=[sighting for sighting in block.sightings if sighting.call == call])
        before = {name: scale.result().scale for name, scale in student.scales.items()}
        for _ in range(3):
            training.update(one, 0.0)
        for name, scale in student.scales.items():
            moved = (scale.result().scale != before[name]).flatten().tolist()
            assert moved == [row == call for row in range(CALLS + 1)]


def test_learning_rates_fall_to_zero_in_a_line(scene):
    block, starts = scene()
    student = student_of(block, starts, EfficientDMConfig(updates=4))
    training, seen = Training(student, starts, 4, seed=0), []
    for _ in range(4):
        training.update(block, 0.0)
        seen.append([group["lr"] for group in training.optimizer.param_groups])
    for place, (_, rate) in enumerate(student.rates):
        assert [rates[place] for rates in seen] == pytest.approx([rate, rate * 0.75, rate * 0.5, rate * 0.25])


# the best that was seen


def test_a_training_that_ruins_the_network_is_thrown_away_with_a_notice(scene):
    block, starts = scene()
    reporter = silent()
    found = train(block, starts, 20, reporter=reporter, learning_rate=1e3)
    assert found == starts
    (notice,) = reporter.notices
    assert notice.startswith("training for 20 updates did not lower the error")


def test_a_training_that_diverges_ends_with_a_notice(scene):
    block, starts = scene()
    broken = [replace(sighting, target=(sighting.target[0] * float("nan"),)) for sighting in block.sightings]
    reporter = silent()
    assert equal(train(replace(block, sightings=broken), starts, 20, reporter=reporter), starts)
    assert reporter.notices[0] == "training diverged at update 1; the best state before it is kept."


def test_the_best_of_several_checks_is_kept(scene, monkeypatch):
    block, starts = scene()
    errors = iter([1.0, 0.9, 0.5, 0.7, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9])
    seen = []
    monkeypatch.setattr(module, "error_of", lambda judge, treated: seen.append(treated) or next(errors))
    found = train(block, starts, 20)
    assert len(seen) == 11
    assert found["first"].output_error == 0.5
    assert equal(found, seen[2])
    assert not equal(found, seen[10])


# going on


class Stopping(Reporter):
    """Presses Ctrl-C after some updates."""

    def __init__(self, after):
        super().__init__(quiet=True)
        self.after = after

    def progress(self, items, title, total=None):
        for done, item in enumerate(items):
            if done == self.after:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("stops", [[1], [33], [13, 20], [60]])
def test_an_interrupted_training_ends_with_the_same_bytes(stops, scene, monkeypatch):
    block, starts = scene()
    starts = {name: replace(found, method="rtn") for name, found in starts.items()}  # nothing better was found
    whole = train(block, starts, 60)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    checkpoint = Memory()
    for after in stops[: 1 if stops == [60] else None]:
        if after < 60:
            with pytest.raises(KeyboardInterrupt):
                train(block, starts, 60, checkpoint, Stopping(after))
            assert checkpoint.saves
        else:
            train(block, starts, 60, checkpoint)
    again = train(block, starts, 60, checkpoint)
    assert equal(again, whole)
    assert again["first"].output_error == whole["first"].output_error
    assert {name: found.method for name, found in again.items()} == {
        name: found.method for name, found in whole.items()
    }
    assert whole["first"].method is None
    assert whole["table"].method == "rtn"
    assert not equal(whole, starts)


def test_training_repeats_by_seed(scene):
    first, second, other = (train(*scene(seed=seed), 40) for seed in (0, 0, 1))
    assert equal(first, second)
    assert not equal(first, other)


def test_a_network_without_anything_to_learn_is_refused(scene):
    block, starts = scene()
    only = block.only([plan for plan in block.plans if plan.name not in TRAINED])
    rest = {name: starts[name] for name in only.layers}
    with pytest.raises(UnsupportedError, match="no layer is left.*another --method"):
        train(only, rest, 10)


@pytest.mark.parametrize(("seconds", "updates"), [(0.04, 10000), (0.3, 1000), (2.0, 200), (100.0, 50)])
def test_the_updates_fit_into_the_time(seconds, updates):
    assert fitting_updates(seconds, DistillConfig(minutes=10), silent()) == updates


def test_clipping_keeps_all_gradients_together_below_a_norm(scene, monkeypatch):
    block, starts = scene()
    student = student_of(block, starts, EfficientDMConfig(updates=5))
    training = Training(student, starts, 5, seed=0)
    training.update(block, 1e-3)
    grads = [parameter.grad for parameter in student.parameters if parameter.grad is not None]
    assert float(torch.stack([grad.norm() for grad in grads]).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_layers_that_are_not_trained_keep_what_rounded_them(scene):
    block, starts = scene()
    named = {name: replace(found, method="rtn") for name, found in starts.items()}
    found = Student(student_of(block, starts, EfficientDMConfig()).weights, {}, {}, []).folded(named)
    assert {name: each.method for name, each in found.items()} == {
        name: None if name in TRAINED else "rtn" for name in SCHEMES
    }
    assert all(isinstance(each, Treated) for each in found.values())
