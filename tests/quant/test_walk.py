import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from dacc.core.families import find_family
from dacc.core.pipeline import denoisers
from dacc.quant.config import QuantizeConfig
from dacc.quant.plan import plan_layers
from dacc.quant.units import find_units
from dacc.quant.walk import Walk
from dacc.runtime.clock import current_run, fixed_run
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import DenoiserCall, capture_calls

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers


@pytest.fixture(params=["unet_pipeline", "dit_pipeline", "flux_pipeline"])
def scene(request):
    """A denoiser, two of its calls, and the names of its units."""
    pipe = request.getfixturevalue(request.param)()
    size = {"height": 32, "width": 32} if "flux" in request.param else {}
    calls = capture_calls(pipe, RunRequest(seeds=(1, 2), num_inference_steps=2, **size))
    (model,) = denoisers(pipe).values()
    family, _ = find_family(type(model).__name__)
    units = find_units(model, plan_layers(model, family, QuantizeConfig()), family, calls[0])
    return model, calls[:2], [unit.name for unit in units]


class Toy(nn.Module):
    """Three layers; the middle one may be left out or run twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, times=1):
        x = self.first(x)
        for _ in range(times):
            x = self.middle(x)
        return self.last(x)


NAMES = ["first", "middle", "last"]


def toy_calls(*times):
    return [DenoiserCall("toy", None, (torch.full((1, 4), 1.0 + each),), {"times": each}) for each in times]


def plain_inputs(model, call, name):
    """What enters a module when it first runs, and no walk."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    call.replay(model)
    hook.remove()
    return seen[0]


def same(found, expected):
    (values, spec), (others, other_spec) = tree_flatten((found.args, found.kwargs)), tree_flatten(expected)
    assert spec == other_spec
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(values, others, strict=True))


@torch.no_grad()
def shrink_(model, name):
    for weight in model.get_submodule(name).parameters():
        weight.mul_(0.9)


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_every_call_stops_where_asked_with_the_inputs_of_a_plain_replay(scene):
    model, calls, names = scene
    expected = {name: [plain_inputs(model, call, name) for call in calls] for name in names}
    finished = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: finished.append(name))
    with Walk(model, calls, names) as walk:
        for place, name in enumerate(names):
            found = walk.advance(name)
            assert all(map(same, found, expected[name]))
            assert sorted(finished) == sorted(names[:place] * len(calls))  # nothing more, nothing twice


def test_units_may_be_passed_over(scene):
    model, calls, names = scene
    expected = [plain_inputs(model, call, names[-1]) for call in calls]
    with Walk(model, calls, names) as walk:
        walk.advance(names[0])
        assert all(map(same, walk.advance(names[-1]), expected))


def test_changed_weights_of_earlier_units_change_later_inputs_as_in_a_plain_replay(scene):
    model, calls, names = scene
    plain, unchanged = copy.deepcopy(model), plain_inputs(model, calls[0], names[-1])
    with Walk(model, calls, names) as walk:
        for name in names:
            expected = [plain_inputs(plain, call, name) for call in calls]
            found = walk.advance(name)
            assert all(map(same, found, expected))
            shrink_(model, name)
            shrink_(plain, name)
    assert not same(found[0], unchanged)


def test_running_a_unit_by_hand_moves_no_call(scene):
    model, calls, names = scene
    expected = [plain_inputs(model, call, names[-1]) for call in calls]
    with Walk(model, calls, names) as walk, torch.no_grad():
        for name in names[:-1]:
            for entering in walk.advance(name):
                model.get_submodule(name)(*entering.args, **entering.kwargs)
        assert all(map(same, walk.advance(names[-1]), expected))


def test_a_unit_behind_or_unknown_is_refused():
    with Walk(Toy(), toy_calls(1), NAMES) as walk:
        walk.advance("middle")
        for name in ("first", "middle", "other"):
            with pytest.raises(ValueError, match=f"{name} is not a unit ahead"):
                walk.advance(name)
        assert walk.advance("last") != [None]


def test_a_unit_that_does_not_run_in_a_call_gives_none_and_later_ones_are_reached():
    model, calls = Toy(), toy_calls(0, 1, 0)
    expected = [plain_inputs(model, call, "last") for call in calls]
    with Walk(model, calls, NAMES) as walk:
        walk.advance("first")
        assert [found is None for found in walk.advance("middle")] == [True, False, True]
        assert all(map(same, walk.advance("last"), expected))
    with Walk(model, calls[:1], ["first", "last", "middle"]) as walk:  # also when nothing comes after it
        assert walk.advance("middle") == [None]


def test_a_call_that_waits_further_on_sees_weights_changed_meanwhile():
    model, calls = Toy(), toy_calls(0)
    with Walk(model, calls, ["first", "middle", "last"]) as walk:
        walk.advance("first")
        assert walk.advance("middle") == [None]  # stands in front of `last` already
        shrink_(model, "last")
        (found,) = walk.advance("last")
        assert same(found, plain_inputs(model, calls[0], "last"))


def test_other_hooks_of_a_unit_run_when_the_call_goes_on():
    model, calls, on, seen = Toy(), toy_calls(0), [], []
    model.idle = nn.Identity()
    model.last.register_forward_pre_hook(lambda _, args: (-args[0],) if on else None)
    model.last.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with Walk(model, calls, [*NAMES, "idle"]) as walk:
        walk.advance("middle")  # stands in front of `last` already
        on.append(True)
        (found,) = walk.advance("last")
        walk.advance("idle")
    assert torch.equal(seen[0], -found.args[0])


def test_a_unit_that_runs_again_is_stopped_once():
    model, calls = Toy(), toy_calls(3)
    with Walk(model, calls, NAMES) as walk:
        assert same(walk.advance("middle")[0], plain_inputs(model, calls[0], "middle"))
        assert same(walk.advance("last")[0], plain_inputs(model, calls[0], "last"))


@pytest.mark.parametrize("grad", [True, False])
def test_leaving_early_leaves_everything_as_it_was(scene, grad):
    model, calls, names = scene
    hooks, output = hooks_of(model), calls[0].replay(model)
    with torch.set_grad_enabled(grad), fixed_run(calls[1].state):
        with Walk(model, calls, names) as walk:
            walk.advance(names[-2])
            assert current_run() == calls[1].state
            assert torch.is_grad_enabled() == grad
        assert torch.is_grad_enabled() == grad
        assert current_run() == calls[1].state
    assert current_run() is None
    assert hooks_of(model) == hooks
    assert torch.equal(calls[0].replay(model)[0], output[0])


@pytest.mark.parametrize("unit", [None, "last"])
def test_leaving_frees_what_the_calls_held(unit):
    model = Toy()
    with Walk(model, toy_calls(1, 2), NAMES) as walk:
        held = [weakref.ref(walker) for walker in walk._walkers]
        if unit:
            held += [weakref.ref(found.args[0]) for found in walk.advance(unit)]
    del walk
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_each_call_keeps_the_run_that_it_was_captured_in(scene):
    model, calls, names = scene
    seen = []
    model.get_submodule(names[-2]).register_forward_hook(lambda *_: seen.append(current_run()))
    with Walk(model, calls, names) as walk:
        for name in names:
            walk.advance(name)
    assert seen == [call.state for call in calls]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_the_network_comes_out(error):
    model = Toy()

    def fail(*_):
        raise error("inside")

    def walk_on():
        with Walk(model, toy_calls(1, 1), NAMES) as walk:
            walk.advance("first")
            walk.advance("last")

    hook = model.middle.register_forward_hook(fail)
    with pytest.raises(error, match="inside"):
        walk_on()
    hook.remove()
    assert torch.is_grad_enabled()
    assert hooks_of(model) == []
    walk_on()
