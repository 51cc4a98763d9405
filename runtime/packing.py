"""Integer codes to bytes and back. One rule for every width: the codes of a row form a little-endian bit stream; code i
occupies bits [i*bits, (i+1)*bits) of its row, lowest bit first, and a row is padded with zero bits to whole bytes.

So 8-bit codes are plain bytes and two 4-bit codes share one byte, low nibble first. Signed codes are stored as b-bit
two's complement. Letters: R rows, K codes per row, B = ceil(K * bits / 8) bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(codes_per_row: int, bits: int) -> int:
    """Bytes per packed row."""
    return -(-codes_per_row * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes.

    Args:
        codes: (R, K) integers, each in [0, 2**bits) or, when signed, in [-2**(bits-1), 2**(bits-1)).
        bits: 2 to 8.

    Returns:
        (R, B) uint8.
    """
    unsigned = (codes.to(torch.int16) & (2**bits - 1)).to(torch.uint8)  # two's complement wraps negatives
    if bits == 8:
        return unsigned
    rows, per_row = unsigned.shape
    unit = _codes_per_unit(bits)  # codes that fill whole bytes together
    padded = torch.nn.functional.pad(unsigned, (0, -per_row % unit)).view(rows, -1, unit)
    out = torch.zeros(rows, padded.shape[1], unit * bits // 8, dtype=torch.uint8, device=codes.device)
    for index in range(unit):
        byte, shift = index * bits // 8, index * bits % 8  # torch.compile does not follow divmod
        out[:, :, byte] |= padded[:, :, index] << shift
        if shift + bits > 8:
            out[:, :, byte + 1] |= padded[:, :, index] >> (8 - shift)
    return out.view(rows, -1)[:, : packed_width(per_row, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, codes_per_row: int, *, signed: bool) -> Tensor:
    """Inverse of `pack_codes`.

    Args:
        packed: (R, B) uint8.
        codes_per_row: K.
        signed: read codes as two's complement.

    Returns:
        (R, K) int8 when signed, uint8 otherwise.
    """
    if bits == 8:
        return packed.view(torch.int8) if signed else packed
    rows = packed.shape[0]
    unit = _codes_per_unit(bits)
    units = -(-codes_per_row // unit)
    bytes_per_unit = unit * bits // 8
    padded = torch.nn.functional.pad(packed, (0, units * bytes_per_unit - packed.shape[1]))
    padded = padded.view(rows, units, bytes_per_unit)
    codes = torch.empty(rows, units, unit, dtype=torch.uint8, device=packed.device)
    for index in range(unit):
        byte, shift = index * bits // 8, index * bits % 8  # torch.compile does not follow divmod
        value = padded[:, :, byte] >> shift
        if shift + bits > 8:
            value = value | (padded[:, :, byte + 1] << (8 - shift))
        codes[:, :, index] = value & (2**bits - 1)
    codes = codes.view(rows, -1)[:, :codes_per_row]
    if not signed:
        return codes.contiguous()
    sign_bit = 2 ** (bits - 1)
    return ((codes ^ sign_bit).view(torch.int8) - sign_bit).contiguous()


def _codes_per_unit(bits: int) -> int:
    """Smallest number of codes that fills whole bytes: 8 codes for odd widths, 4 for 2 and 6 bits, 2 for 4 bits."""
    return {2: 4, 4: 2, 6: 4}.get(bits, 8)
