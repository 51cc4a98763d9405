import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dacc.runtime.packing import pack_codes, packed_width, unpack_codes

BITS = range(2, 9)


def random_codes(rows, per_row, bits, signed, seed=0):
    low = -(2 ** (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, low + 2**bits, (rows, per_row), generator=generator)


def slow_pack(codes, bits):
    """Bit by bit, as the rule is written."""
    width = -(-codes.shape[1] * bits // 8)
    packed = [[0] * width for _ in codes]
    for row, values in zip(packed, codes.tolist(), strict=True):
        for index, value in enumerate(values):
            for bit in range(bits):
                byte, place = divmod(index * bits + bit, 8)
                row[byte] |= (value >> bit & 1) << place
    return torch.tensor(packed, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("per_row", [1, 2, 3, 7, 8, 9, 64, 65])
def test_it_equals_the_rule_bit_by_bit(bits, signed, per_row):
    codes = random_codes(3, per_row, bits, signed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, packed_width(per_row, bits))
    assert torch.equal(packed, slow_pack(codes, bits))
    unpacked = unpack_codes(packed, bits, per_row, signed=signed)
    assert unpacked.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(unpacked.long(), codes)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    rows=st.integers(1, 5),
    per_row=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_any_codes_come_back(bits, signed, rows, per_row, seed):
    codes = random_codes(rows, per_row, bits, signed, seed)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, per_row, signed=signed).long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_last_byte_is_padded_with_zero_bits(bits):
    packed = pack_codes(torch.full((1, 9), -1), bits)
    used = 9 * bits - 8 * (packed.shape[1] - 1)
    assert packed[0, -1] == 2**used - 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_packs_to_the_same_bytes(dtype):
    codes = random_codes(2, 11, 5, signed=True)
    assert torch.equal(pack_codes(codes.to(dtype), 5), pack_codes(codes, 5))


def test_four_bits_are_two_nibbles_with_the_low_one_first():
    assert pack_codes(torch.tensor([[1, -1, 7, -8]]), 4).tolist() == [[0xF1, 0x87]]
