"""Super-blocks of GGUF, read back by the gguf package's own decoder."""

import gguf
import numpy
import pytest
import torch

from dacc.export.k_quants import SUPER, quantize_k

KINDS = {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}  # bits of a value
EACH = pytest.mark.parametrize("kind", KINDS)
SIMPLER = {"Q4_K": "Q4_0", "Q5_K": "Q5_0", "Q6_K": "Q5_1"}


def decoded(packed, kind):
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]))


def weights(rows=6, features=2 * SUPER):
    torch.manual_seed(0)
    return torch.randn(rows, features) * torch.rand(rows, 1) * torch.rand(1, features)


def relative(found, rows):
    return float((found - rows).norm() / rows.norm())


@EACH
def test_bytes_are_as_many_as_the_type_has(kind):
    packed = quantize_k(weights(), kind)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert block == SUPER
    assert packed.dtype == torch.uint8
    assert packed.shape == (6, 2 * size)
    assert 8 * size / SUPER == KINDS[kind]


@EACH
def test_values_come_back_nearer_than_in_simpler_blocks_of_as_many_bits(kind):
    rows = weights()
    simple = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[SIMPLER[kind]])
    other = torch.from_numpy(gguf.quants.dequantize(simple, gguf.GGMLQuantizationType[SIMPLER[kind]]))
    assert relative(decoded(quantize_k(rows, kind), kind), rows) < 0.9 * relative(other, rows)


@EACH
def test_every_place_is_its_own(kind):
    """Values of few levels, another pattern in every block, come back to within the precision of the scales."""
    torch.manual_seed(0)
    size = 16 if kind == "Q6_K" else 32
    top = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 31}[kind]
    codes = torch.randint(0, top + 1, (4, SUPER))
    codes.view(4, -1, size)[..., 0], codes.view(4, -1, size)[..., 1] = 0, top
    scale = (1 + torch.arange(SUPER // size).float()).repeat_interleave(size)
    rows = codes * scale / 100 if kind == "Q6_K" else (codes - 3) * scale / 100
    found = decoded(quantize_k(rows, kind), kind)
    assert ((found - rows).abs() <= 0.06 * rows.view(4, -1, size).abs().amax(-1).repeat_interleave(size, 1)).all()
    assert relative(found, rows) < 0.03


@EACH
@pytest.mark.parametrize("rows", [torch.zeros(2, SUPER), torch.full((2, SUPER), 0.25), torch.full((2, SUPER), -0.25)])
def test_flat_blocks_come_back(kind, rows):
    torch.testing.assert_close(decoded(quantize_k(rows, kind), kind), rows, rtol=0.02, atol=0)


@EACH
def test_outliers_of_a_block_leave_other_blocks_fine(kind):
    rows = weights()
    rows[0, 3] = 50.0
    found = decoded(quantize_k(rows, kind), kind)
    assert relative(found[0, SUPER:], rows[0, SUPER:]) < 0.12
    assert abs(float(found[0, 3]) - 50) < 1


@EACH
def test_equal_rows_give_equal_bytes_whatever_stands_beside_them(kind):
    rows = weights()
    assert torch.equal(quantize_k(rows, kind)[2:4], quantize_k(rows[2:4], kind))
    assert numpy.array_equal(quantize_k(rows, kind).numpy(), quantize_k(rows.clone(), kind).numpy())
