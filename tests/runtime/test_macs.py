import torch
from torch import nn

from dacc.runtime.macs import count_macs


def test_layers_attention_and_integer_products_are_counted_by_hand() -> None:
    tokens, queries = torch.randn(2, 5, 12), torch.randn(2, 3, 7, 4)
    codes = torch.ones(6, 8, dtype=torch.int8)
    with torch.no_grad():
        assert count_macs(lambda: nn.Linear(12, 20)(tokens)) == 2 * 5 * 12 * 20
        assert count_macs(lambda: nn.Conv2d(3, 4, 3, padding=1)(torch.randn(2, 3, 8, 8))) == 2 * 8 * 8 * 3 * 4 * 9
        attention = count_macs(lambda: nn.functional.scaled_dot_product_attention(queries, queries, queries))
    assert attention == 2 * (2 * 3 * 7 * 7 * 4)
    assert count_macs(lambda: torch._int_mm(codes, codes.t().contiguous())) == 6 * 8 * 6
