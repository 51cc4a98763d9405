import pytest
import torch

from dacc.core.scheme import Scheme
from dacc.quant.layerwise import BASELINE, output_error_of, weight_error_of
from dacc.quant.methods import rtn
from dacc.runtime.weight import to_rows


@pytest.mark.parametrize("shape", [(5, 32), (5, 8, 2, 2)])
def test_output_error_is_that_of_the_products_one_by_one(shape):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(50, 32) @ torch.randn(32, 32)
    quantized = rtn.quantize(weight, Scheme(bits=3, group_size=16, symmetric=False), BASELINE)
    off = power = 0.0
    for column in x.double():
        exact = to_rows(weight).double() @ column
        off += float((to_rows(quantized.dequantize()).double() @ column - exact).square().sum())
        power += float(exact.square().sum())
    assert output_error_of(weight, quantized, x.T @ x / 50) == pytest.approx((off / power) ** 0.5, rel=1e-4)


def test_on_white_inputs_the_output_error_is_that_of_the_weight():
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    quantized = rtn.quantize(weight, Scheme(bits=3), BASELINE)
    assert output_error_of(weight, quantized, 7 * torch.eye(32)) == pytest.approx(weight_error_of(weight, quantized))


def test_a_layer_without_weights_or_inputs_has_no_error():
    weight = torch.randn(5, 32)
    quantized = rtn.quantize(weight, Scheme(bits=3), BASELINE)
    assert output_error_of(weight, quantized, torch.zeros(32, 32)) == 0
    nothing = rtn.quantize(0 * weight, Scheme(bits=3), BASELINE)
    assert output_error_of(0 * weight, nothing, torch.eye(32)) == weight_error_of(0 * weight, nothing) == 0
