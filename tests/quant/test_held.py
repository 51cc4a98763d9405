import pytest
import torch
from torch import nn

from dacc.calibrate.store import CalibrationSet
from dacc.core.errors import ResourceError
from dacc.core.reporter import Reporter
from dacc.quant.held import calls_to_train_on, calls_within, held_bytes, spread_over
from dacc.runtime.trajectory import DenoiserCall

UNITS = ["0", "2", "4"]


def network(width=1000):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 50), nn.ReLU(), nn.Linear(50, 3))


def calls(count, rows=500):
    return [DenoiserCall("unet", None, (torch.full((rows, 8), float(number)),), {}) for number in range(count)]


def chosen(budget_gb, count=20, seed=0, walks=1):
    reporter = Reporter(quiet=True)
    found, _ = calls_within(budget_gb, network(), calls(count), UNITS, walks=walks, seed=seed, reporter=reporter)
    return [int(call.args[0][0, 0]) for call in found], reporter.notices


def test_a_call_holds_what_is_alive_where_it_waits():
    wide = 4 * 500 * 1000  # what enters the second layer
    found = held_bytes(network(), calls(1)[0], UNITS)
    assert wide <= found <= 2.2 * wide
    assert held_bytes(network(10), calls(1)[0], UNITS) < wide / 5
    assert held_bytes(network(), calls(1, rows=1000)[0], UNITS) == pytest.approx(2 * found, rel=0.1)


def test_two_walks_hold_twice_as_much_and_what_the_float_unit_gives():
    wide = 4 * 500 * 1000  # what the first layer gives
    (call,) = calls(1)
    inputs, once = 4 * 500 * 8, held_bytes(network(), call, UNITS[:1])
    assert once == inputs  # nothing else is there yet
    assert held_bytes(network(), call, UNITS[:1], walks=2) == inputs + wide


class OnDisk(CalibrationSet):
    """Calls that are loaded when they are asked for."""

    moments = (0,) * 20

    def __init__(self, held):
        self.held, self.loaded = held, []

    def __len__(self):
        return len(self.held)

    def __getitem__(self, place):
        self.loaded.append(place)
        return self.held[place]

    @property
    def largest(self):
        return self.held[0]


def test_calls_that_do_not_fit_are_not_loaded():
    stored, each = OnDisk(calls(20)), held_bytes(network(), calls(1)[0], UNITS)
    found, _ = calls_within(
        3.5 * each / 1e9,
        network(),
        stored,
        UNITS,
        walks=1,
        seed=0,
        reporter=Reporter(quiet=True),
    )
    assert stored.loaded == [int(call.args[0][0, 0]) for call in found]


def test_a_call_that_is_trained_on_holds_its_inputs_and_the_float_outputs_alone():
    each, reporter = 4 * 500 * (8 + 3), Reporter(quiet=True)
    for fitting in (5, 20):
        budget = (fitting + 0.5) * each / 1e9
        found = calls_to_train_on(budget, network(), calls(20), seed=0, reporter=reporter)
        assert len(found) == fitting
    (notice,) = reporter.notices
    assert notice.startswith("5 of the 20 calls of the calibration set fit into")
    assert notice.endswith("while the network is trained.")


def test_all_calls_are_taken_where_they_fit():
    assert chosen(4.0) == (list(range(20)), [])


def test_fewer_are_drawn_within_a_small_budget_and_a_notice_says_so():
    each = held_bytes(network(), calls(1)[0], UNITS)
    found, notices = chosen(5.5 * each / 1e9)
    assert len(found) == 5
    assert found == sorted(set(found))
    assert found == chosen(5.5 * each / 1e9)[0]
    assert found != chosen(5.5 * each / 1e9, seed=1)[0]
    assert len(chosen(5.5 * each / 1e9, walks=2)[0]) == 2
    (notice,) = notices
    assert notice.startswith("5 of the 20 calls of the calibration set fit into")


@pytest.mark.parametrize(("count", "most"), [(3, 1), (10, 1), (25, 3), (40, 4)])
def test_those_drawn_cover_the_run_evenly(count, most):
    moments = [call for _ in range(4) for call in range(10)]  # 4 batches of a run of 10 calls
    found = spread_over(moments, count, torch.Generator().manual_seed(0))
    per_moment = [sum(moments[place] == moment for place in found) for moment in range(10)]
    assert len(set(found)) == len(found) == count
    assert max(per_moment) == most
    assert max(per_moment) - min(per_moment) <= 1
    if count == 3:
        assert sorted(moments[place] for place in found) == [1, 5, 8]


def test_where_not_even_one_fits_it_says_what_to_do():
    with pytest.raises(ResourceError, match="one call of the calibration set holds") as caught:
        chosen(1e-6)
    assert "--cache-gb" in caught.value.mend
