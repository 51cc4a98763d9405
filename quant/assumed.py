"""What enters a linear, where nothing is known but its weight.

Training keeps the share of each channel in the outputs within bounds: inputs are taken to be as much larger as the
weights that read them are smaller, up to a factor, and independent. That is what makes outliers of inputs visible in
the weight.

Letters: O rows, K input features, N inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.weight import to_rows
from .entering import Entering
from .smoothing import weight_factors

ROWS = 256  # inputs that are drawn; more: steadier, slower


def assumed_inputs(weight: Tensor, seed: int) -> Entering:
    """Inputs of a weight (O, K), the same for the same seed."""
    rows = to_rows(weight).detach().float()
    sizes = weight_factors([rows]).float()  # (K,)
    drawn = torch.randn(ROWS, rows.shape[1], generator=torch.Generator().manual_seed(seed))
    inputs = drawn.to(sizes.device) * sizes
    return Entering(inputs.abs().amax(0), float(inputs.min()), sizes.square().diag(), inputs)
