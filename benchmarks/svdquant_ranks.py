"""What the branch of svdquant is worth in single linears of full size, a few channels of whose inputs are outliers.

    python benchmarks/svdquant_ranks.py                     # writes the tables in docs/results.md
    python benchmarks/svdquant_ranks.py --setting W4A4 --shape 1152x4608

Weights have a leading low-rank part, inputs are correlated, and some of their channels are many times as large: the
published widths of DiT-XL/2, no trained numbers. Errors are relative L2 of the outputs of the layer that would run, on
inputs that the method has not seen. Prints as it goes on.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dacc.benchmarks.study import RESULTS, write_between
from dacc.core.machine import describe_machine
from dacc.core.scheme import Scheme
from dacc.quant.entering import Entering
from dacc.quant.methods import rtn
from dacc.quant.methods.svdquant import SVDQuantConfig, quantize_group
from dacc.runtime.layers import QuantizedLinear
from dacc.runtime.weight import QuantizedWeight

SHAPES = ("1152x1152", "1152x4608")  # inputs x outputs: a projection of attention, and the first of a feed-forward part
SETTINGS = {
    "W4A4": Scheme(bits=4, group_size=64, act_bits=4, act_mode="per-group", act_group_size=64),
    "W4A8": Scheme(bits=4, group_size=64, two_level=True, act_bits=8, act_mode="dynamic"),
    "W8A8": Scheme(bits=8, act_bits=8, act_mode="dynamic"),
}
RANKS = (0, 16, 32, 64, 128)
ROWS: dict[str, dict[str, Any]] = {
    **{f"rank {rank}, nearest": {"rank": rank, "gptq": False} for rank in RANKS},
    "rank 32, nearest, factors alone": {"rank": 32, "gptq": False, "joint": False},
    **{f"rank {rank}": {"rank": rank} for rank in RANKS},
}
ROUNDED = "rtn"  # the row without factors and branch
OUTLIERS, SIZE = 12, 40.0  # channels, and how much larger they are
SEEN, JUDGED = 2048, 2048  # inputs


def planted(features: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (O, K), and inputs (N, K) of which some channels are `SIZE` times as large."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    thin = features // 8
    weight = draw(rows, thin) @ draw(thin, features) / thin**0.5 + draw(rows, features) / 2
    mixing = torch.eye(features) + 1.2 * draw(features, features) / features**0.5
    x = draw(SEEN + JUDGED, features) @ mixing
    x[:, torch.randperm(features, generator=generator)[:OUTLIERS]] *= SIZE
    return weight / features**0.5, x


def quantized(row: str, weight: Tensor, x: Tensor, scheme: Scheme) -> QuantizedWeight:
    """By one row, with inputs that it may look at."""
    if row == ROUNDED:
        return rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse"))
    entering = Entering(x.abs().amax(0), float(x.min()), x.T @ x / len(x), x)
    return quantize_group({"": weight}, {"": scheme}, entering, SVDQuantConfig(**ROWS[row]), 0)[""].weight


@torch.no_grad()
def output_error(weight: Tensor, found: QuantizedWeight, x: Tensor) -> float:
    """Relative L2 of the outputs of the layer that runs."""
    layer = QuantizedLinear(nn.Linear(*reversed(weight.shape), bias=False), found.scheme)
    layer.store_weight(found)
    wanted = x @ weight.T
    return float((layer(x) - wanted).norm() / wanted.norm())


def bits_of(found: QuantizedWeight) -> float:
    """For each weight, with scales, factors and branch."""
    return 8 * sum(tensor.nbytes for tensor in found.tensors().values()) / torch.Size(found.shape).numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"inputs x outputs; default: {', '.join(SHAPES)}")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), help="repeatable; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes, settings = options.shape or SHAPES, options.setting or list(SETTINGS)
    lines = ["| row |" + "".join(f" {shape}, {setting} | bits |" for setting in settings for shape in shapes)]
    lines.append("|---" * (1 + 2 * len(settings) * len(shapes)) + "|")
    layers = {shape: planted(*map(int, shape.split("x"))) for shape in shapes}
    for row in (ROUNDED, *ROWS):
        cells, started = [], time.process_time()
        for setting in settings:
            for weight, x in layers.values():
                found = quantized(row, weight, x[:SEEN], SETTINGS[setting])
                cells.append(f" {output_error(weight, found, x[SEEN:]):.4g} | {bits_of(found):.2f} |")
        lines.append(f"| {row} |" + "".join(cells))
        print(lines[-1], f"{time.process_time() - started:.0f} s", flush=True)
    machine = describe_machine()
    heading = (
        f"{OUTLIERS} of the channels {SIZE:.0f} times as large, {JUDGED} inputs that were not looked at "
        f"(`benchmarks/svdquant_ranks.py`); {machine['processor']} ({machine['instruction_sets']}), torch "
        f"{machine['torch']}, {datetime.date.today().isoformat()}. *bits* are those of each weight, with the branch."
    )
    write_between(options.results, "svdquant", {"ranks": "\n".join([heading, "", *lines])})


if __name__ == "__main__":
    main()
