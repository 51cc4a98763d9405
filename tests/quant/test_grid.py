import pytest
import torch

from dacc.core.scheme import Scheme
from dacc.quant.grid import (
    Grid,
    find_grid,
    minmax_grid,
    round_codes,
    search_grid,
    split_groups,
    squared_error,
    stored_scale,
    two_level_scale,
)
from dacc.runtime.packing import unpack_codes

CASES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def code_range(bits, symmetric):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def through(groups, bits, symmetric, grid):
    """Values after a trip through their codes."""
    scale, zero = grid
    codes = round_codes(groups, scale, zero, code_range(bits, symmetric))
    low, high = code_range(bits, symmetric)
    assert torch.equal(codes, codes.round())
    assert low <= codes.min()
    assert codes.max() <= high
    return (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


def both_grids(groups, bits, symmetric):
    yield minmax_grid(groups, bits, symmetric=symmetric)
    yield search_grid(groups, bits, symmetric=symmetric, code_range=code_range(bits, symmetric))


def test_groups_are_neighbours_in_a_row():
    weight = torch.arange(12.0, dtype=torch.float64).view(2, 6)
    assert split_groups(weight, 3).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert split_groups(weight, None).shape == (2, 1, 6)
    assert split_groups(weight, 3).dtype == torch.float32


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_zero_weights_stay_zero(bits, symmetric):
    groups = torch.zeros(2, 3, 8)
    for grid in both_grids(groups, bits, symmetric):
        assert (grid[0] > 0).all()
        assert torch.equal(through(groups, bits, symmetric, grid), groups)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_that_leaves_zero_out_is_widened_to_it(bits, symmetric, sign):
    groups = sign * torch.linspace(5, 6, 16).view(1, 1, 16)
    scale, zero = minmax_grid(groups, bits, symmetric=symmetric)
    assert float(zero) == (0 if symmetric or sign > 0 else 2**bits - 1)
    steps = 2**bits - 1 if not symmetric else 2 ** (bits - 1) - (1 if sign > 0 else 0)
    assert float(scale) == pytest.approx(6 / steps)
    assert (through(groups, bits, symmetric, (scale, zero)) - groups).abs().max() <= scale / 2 * 1.001


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("value", [3.7, -3.7, 1e-6])
def test_a_group_of_one_repeated_value_is_met_exactly(bits, symmetric, value):
    groups = torch.full((1, 2, 8), value)
    for grid in both_grids(groups, bits, symmetric):
        torch.testing.assert_close(through(groups, bits, symmetric, grid), groups, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_no_value_is_further_than_half_a_step_from_a_full_range(bits, symmetric):
    groups = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    scale, zero = minmax_grid(groups, bits, symmetric=symmetric)
    worst = (through(groups, bits, symmetric, (scale, zero)) - groups).abs().amax(-1)
    room = 0.5 if symmetric else 1.0  # rounding the zero point moves the ends by up to half a step
    assert (worst <= scale * room * 1.0001).all()


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_the_search_never_loses_to_the_full_range_on_any_group(bits, symmetric):
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(6, 4, 32, generator=generator) ** 3  # heavy tails
    groups[0, 0] = 0
    groups[1, 0] = groups[1, 0].abs()
    full, best = (
        (through(groups, bits, symmetric, grid) - groups).square().sum(-1)
        for grid in both_grids(groups, bits, symmetric)
    )
    assert (best <= full).all()
    assert best.sum() < (0.98 if bits < 8 else 1.0) * full.sum()


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("tails", [1, 3])
def test_candidates_that_the_search_passes_over_change_nothing(bits, symmetric, tails):
    groups = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1)) ** tails
    groups[0, 0] = 0
    groups[1, 1] = groups[1, 1].abs()
    limits = code_range(bits, symmetric)

    def error(values, grid):
        return float(squared_error(values, round_codes(values, *grid, limits), *grid))

    for values in groups.flatten(0, 1)[:, None, None]:  # (1, 1, 32): one group at a time
        best = minmax_grid(values, bits, symmetric=symmetric)
        for step in range(1, 20):  # every one of them
            other = minmax_grid((1.0 - 0.02 * step) * values, bits, symmetric=symmetric)
            best = other if error(values, other) < error(values, best) else best
        for _ in range(2):
            centred = round_codes(values, *best, limits) - best[1].unsqueeze(-1)
            fitted = (values * centred).sum(-1) / centred.square().sum(-1).clamp(min=1e-12)
            better = fitted > 0 and error(values, (fitted, best[1])) < error(values, best)
            best = (fitted, best[1]) if better else best
        found = search_grid(values, bits, symmetric=symmetric, code_range=limits)
        assert torch.equal(found[0], best[0])
        assert torch.equal(found[1], best[1])


def test_the_search_finds_the_scale_of_weights_that_lie_on_a_grid():
    codes = torch.tensor([[-3.0, 3, 1, 0, 2, -1, 3, -2]]).unsqueeze(0)
    scale, zero = search_grid(0.37 * codes, 3, symmetric=True, code_range=(-4, 3))
    assert torch.equal(round_codes(0.37 * codes, scale, zero, (-4, 3)), codes)
    assert float(scale) == pytest.approx(0.37)


def test_squared_error_is_per_group():
    groups = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]])
    codes = torch.tensor([[[1.0, 1.0], [1.0, 3.0]]])
    assert squared_error(groups, codes, torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([[0.1, 0.2]], torch.float16),
        ([[0.1]], torch.float16),
        ([[2.0**-14, 65504.0]], torch.float16),
        ([[2.0**-15, 0.1]], torch.float32),  # float16 would lose mantissa bits
        ([[0.1, 70000.0]], torch.float32),  # float16 would overflow
    ],
)
def test_scales_are_float16_only_where_that_loses_no_range(values, dtype):
    assert stored_scale(torch.tensor(values)).dtype == dtype


def test_two_level_scales_are_a_row_scale_times_small_integers():
    scale = torch.tensor([[1.5, 0.8, 0.01], [3.0, 3.0, 3.0], [0.0, 1.5, 0.1], [0.0, 0.0, 0.0]])
    row_scale, multipliers = two_level_scale(scale)
    assert row_scale.flatten().tolist() == pytest.approx([0.1, 0.2, 0.1, 1.0])
    assert multipliers.tolist() == [[15, 8, 1], [15, 15, 15], [1, 15, 1], [1, 1, 1]]


# the grid of a weight

SCHEMES = [
    Scheme(bits=4),
    Scheme(bits=3, symmetric=False),
    Scheme(bits=4, group_size=16),
    Scheme(bits=8, group_size=16, symmetric=False),
    Scheme(bits=4, group_size=16, two_level=True, act_bits=8, act_mode="dynamic"),
]
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
SEARCH = pytest.mark.parametrize("search", [False, True], ids=["minmax", "mse"])


def weight_rows():
    return torch.randn(7, 48, generator=torch.Generator().manual_seed(0)) ** 3


@NAMED
@SEARCH
def test_a_grid_holds_scales_as_they_are_stored(scheme, search):
    grid = find_grid(weight_rows(), scheme, search=search)
    groups = 3 if scheme.group_size else 1
    assert grid.scale.shape == (7, 1 if scheme.two_level else groups)
    assert grid.scale.dtype == torch.float16
    assert grid.zero_point.shape == (7, groups)
    assert grid.zero_point.any() != scheme.symmetric
    assert grid.group_scale.shape == (7, groups if scheme.two_level else 1)
    assert torch.equal(grid.group_scale, grid.group_scale.round())
    assert scheme.two_level or (grid.group_scale == 1).all()


@NAMED
@SEARCH
def test_a_grid_is_that_of_its_groups(scheme, search):
    groups = split_groups(weight_rows(), scheme.group_size)
    arguments = {"symmetric": scheme.symmetric} | ({"code_range": scheme.code_range} if search else {})
    scale, zero = (search_grid if search else minmax_grid)(groups, scheme.bits, **arguments)
    grid = find_grid(weight_rows(), scheme, search=search)
    assert torch.equal(grid.zero_point, zero)
    if scheme.two_level:
        row_scale, multipliers = two_level_scale(scale)
        assert torch.equal(grid.scale, stored_scale(row_scale))
        assert torch.equal(grid.group_scale, multipliers)
    else:
        assert torch.equal(grid.scale, stored_scale(scale))


@NAMED
def test_columns_are_what_a_packed_weight_is_multiplied_out_with(scheme):
    rows = weight_rows()
    grid = find_grid(rows, scheme, search=True)
    codes = grid.nearest(rows)
    scale, zero = grid.columns(48)
    assert scale.shape == zero.shape == (7, 48)
    packed = grid.pack(codes, (7, 3, 4, 4))
    found = packed.dequantize().movedim(1, -1).flatten(1)
    torch.testing.assert_close(found, (codes - zero) * scale, rtol=1e-6, atol=0)
    assert torch.equal(unpack_codes(packed.qweight, scheme.bits, 48, signed=scheme.symmetric).short(), codes)
    assert (packed.zero_point is None) == scheme.symmetric
    assert (packed.group_scale is None) != scheme.two_level


@NAMED
def test_nearest_codes_are_in_range_and_no_other_code_is_nearer(scheme):
    rows = weight_rows()
    grid = find_grid(rows, scheme, search=True)
    (scale, zero), codes = grid.columns(48), grid.nearest(rows)
    low, high = scheme.code_range
    values = (torch.arange(low, high + 1) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)  # (O, K, codes)
    best = (values - rows.unsqueeze(-1)).abs().amin(-1)
    assert codes.dtype == torch.int16
    torch.testing.assert_close(((codes - zero) * scale - rows).abs(), best, rtol=1e-5, atol=1e-6)


@NAMED
@SEARCH
@pytest.mark.parametrize("values", [1, 100])
def test_dealing_rows_in_parts_changes_nothing(scheme, search, values, monkeypatch):
    rows = weight_rows()
    whole = find_grid(rows, scheme, search=search)
    codes = whole.nearest(rows)
    monkeypatch.setattr("dacc.quant.grid.ROWS_VALUES", values)
    parts = find_grid(rows, scheme, search=search)
    for name in ("scale", "zero_point", "group_scale"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    assert torch.equal(parts.nearest(rows), codes)


def test_nearest_takes_rows_that_the_grid_was_not_made_for():
    grid = Grid(Scheme(bits=3), torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1, 1))
    assert grid.nearest(torch.tensor([[-9.0, -0.8, 0.2, 0.3, 9.0]])).tolist() == [[-4, -2, 0, 1, 3]]
