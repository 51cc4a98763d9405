"""The layouts against their closed forms, index by index, with a value of its own for every entry."""

import itertools

import pytest
import torch

from dacc.export import nunchaku_layout as layout

SHAPES = [(128, 128), (256, 384), (384, 256)]


def codes(shape):
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_lie_where_the_kernels_read_them(shape):
    values = codes(shape)
    packed = layout.pack_codes(values)
    assert (packed.dtype, tuple(packed.shape)) == (torch.int8, (shape[0], shape[1] // 2))
    data = packed.flatten().view(torch.uint8)
    for n, k in itertools.product(range(0, shape[0], 3), range(0, shape[1], 5)):
        row = ((n // 128) * (shape[1] // 64) + k // 64) * 8 + (n % 128) // 16
        word = ((row * 8 + n % 8) * 4 + (k % 32) // 8) * 4 + 2 * ((n % 16) // 8) + (k % 64) // 32
        byte = int(data[4 * word + (k % 8) // 2])
        assert (byte >> 4 * (k % 2)) & 15 == int(values[n, k])
    assert torch.equal(layout.unpack_codes(packed, shape), values.to(torch.uint8))


def test_signed_codes_are_twos_complement():
    values = codes((128, 128)) - 8
    assert torch.equal(layout.unpack_codes(layout.pack_codes(values), (128, 128)).to(torch.int16), values & 15)


@pytest.mark.parametrize(("rows", "groups"), [(128, 1), (256, 3), (384, 2)])
def test_scales_lie_where_the_kernels_read_them(rows, groups):
    values = torch.arange(rows * groups, dtype=torch.float32).view(rows, groups)
    packed = layout.pack_scales(values)
    assert tuple(packed.shape) == (groups, rows)
    for n, g in itertools.product(range(rows), range(groups)):
        place = (n // 128 * groups + g) * 128 + 16 * (n % 128 // 16) + 4 * (n % 8 // 2) + 2 * (n % 16 // 8) + n % 2
        assert packed.flatten()[place] == values[n, g]
    assert torch.equal(layout.unpack_scales(packed), values)


def test_a_vector_lies_as_the_scales_of_one_group():
    values = torch.arange(256.0)
    packed = layout.pack_vector(values)
    assert packed[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert torch.equal(packed, layout.pack_scales(values.view(-1, 1)).flatten())
    assert torch.equal(layout.unpack_vector(packed), values)


@pytest.mark.parametrize(("rows", "groups"), [(128, 8), (256, 12)])
def test_micro_scales_lie_where_the_kernels_read_them(rows, groups):
    values = torch.arange(rows * groups, dtype=torch.float32).view(rows, groups)
    packed = layout.pack_micro_scales(values)
    for n, g in itertools.product(range(rows), range(groups)):
        tile = ((n // 128 * (groups // 4) + g // 4) * 8 + n % 8) * 4 + n % 32 // 8
        assert packed.flatten()[tile * 16 + 4 * (n % 128 // 32) + g % 4] == values[n, g]
    assert torch.equal(layout.unpack_micro_scales(packed), values)


@pytest.mark.parametrize(("features", "rank"), [(128, 16), (256, 48)])
def test_factors_lie_where_the_kernels_read_them(features, rank):
    down = torch.arange(rank * features, dtype=torch.float32).view(rank, features)
    up = torch.arange(rank * features, dtype=torch.float32).view(features, rank)
    packed_down, packed_up = layout.pack_down(down), layout.pack_up(up)
    assert packed_down.shape == packed_up.shape == (features, rank)
    for c, r in itertools.product(range(features), range(rank)):
        tile = (c // 16 * (rank // 16) + r // 16) * 256
        for packed, value, i, j in (
            (packed_down, down[r, c], r % 16, c % 16),
            (packed_up, up[c, r], c % 16, r % 16),
        ):
            inside = 32 * (i % 8) + 8 * (j % 8 // 2) + 4 * (i // 8) + 2 * (j // 8) + j % 2
            assert packed.flatten()[tile + inside] == value
    assert torch.equal(layout.unpack_down(packed_down), down)
    assert torch.equal(layout.unpack_up(packed_up), up)


@pytest.mark.parametrize("shape", [(8, 128), (12, 192)])
def test_words_of_weight_only_layers_lie_where_the_kernels_read_them(shape):
    values = codes(shape)
    packed = layout.pack_words(values)
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (shape[0] // 4, shape[1] // 2))
    words = packed.flatten().view(torch.int16)
    for n, k in itertools.product(range(shape[0]), range(shape[1])):
        word = n // 4 * shape[1] + k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8
        assert (int(words[word]) >> 4 * (k % 32 // 8)) & 15 == int(values[n, k])
    assert torch.equal(layout.unpack_words(packed, shape), values.to(torch.uint8))
