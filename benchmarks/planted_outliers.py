"""Outliers planted into a trained transformer, and what methods make of them.

    python benchmarks/planted_outliers.py                       # zoo:digits-dit, 4-bit weights and activations
    python benchmarks/planted_outliers.py --size 100 --act-bits 8
    python benchmarks/planted_outliers.py --samples 8           # a smaller calibration set: quicker

Some channels of what the attention and the feed-forward part of every DiT block read are made `--size` times as large,
and the weights that read them smaller by the same factor. The network gives what it gave before, but its layers have
outliers now, as those of large diffusion transformers do. Prints a table of the errors of the images, of the network as
it was trained and with outliers, both against the float pipeline from the same noise.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dacc.calibrate.api import calibrate_pipeline
from dacc.calibrate.config import CalibrateConfig
from dacc.core.config import build_config
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter
from dacc.core.source import resolve_source
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig
from dacc.runtime.load import load_source

NEAREST = {"gptq": False}
ROWS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "settings": {"search": "mse"}},
    "gptq": {"method": "gptq"},
    "smoothing only": {"method": "svdquant", "settings": {"rank": 0, **NEAREST}},
    "svdquant, rank 8": {"method": "svdquant", "settings": {"rank": 8, **NEAREST}},
    "svdquant, rank 16": {"method": "svdquant", "settings": {"rank": 16, **NEAREST}},
    "svdquant, rank 16, GPTQ": {"method": "svdquant", "settings": {"rank": 16}},
    "svdquant, rank auto, GPTQ": {"method": "svdquant"},
}
SCALES = {"per token": "dynamic", "per token and group": "per-group"}  # of activations
MODULATION = {"attention": (0, 1), "feed-forward": (3, 4)}  # chunks of norm1.linear that shift and scale its input


@torch.no_grad()
def plant_(transformer: nn.Module, size: float, channels: int, seed: int = 0) -> None:
    """Make some channels `size` times as large without changing what a DiT gives."""
    generator = torch.Generator().manual_seed(seed)
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        attention = block.attn1
        readers = {
            "attention": [attention.to_q, attention.to_k, attention.to_v],
            "feed-forward": [block.ff.net[0].proj],
        }
        for part, layers in readers.items():
            factors = torch.ones(layers[0].in_features)
            factors[torch.randperm(len(factors), generator=generator)[:channels]] = size
            enlarge_(block.norm1.linear, factors, *MODULATION[part])
            for layer in layers:
                layer.weight /= factors


def enlarge_(modulation: nn.Linear, factors: Tensor, shift: int, scale: int) -> None:
    """x (1 + scale) + shift becomes `factors` (K,) times as large: scale' = factors (1 + scale) - 1."""
    width = len(factors)
    for chunk, added in ((shift, 0.0), (scale, 1.0)):
        rows = slice(chunk * width, (chunk + 1) * width)
        modulation.weight[rows] *= factors[:, None]
        modulation.bias[rows] = factors * (modulation.bias[rows] + added) - added


def planted_folder(source: str, folder: Path, size: float, channels: int) -> Path:
    """A copy of a DiT pipeline with outliers."""
    pipe: Any = load_source(resolve_source(source, reporter=Reporter()), dtype="float32", device="cpu")
    plant_(pipe.transformer, size, channels)
    pipe.save_pretrained(folder)
    return folder


def measure(source: str, calib: Path, fields: dict[str, Any], work: Path) -> tuple[float, float]:
    """Relative L2 of the images, and bytes against float32."""
    config = build_config(QuantizeConfig, **fields)
    bundle = quantize_pipeline(source, config, calib=calib, output=work / "bundle", overwrite=True, device="cpu")
    manifest = read_manifest(bundle)
    assert manifest is not None
    error, record = manifest.passes[-1].effect["pipeline"].relative_l2, manifest.components["transformer"]
    assert error is not None
    return error, record.bytes_after / record.bytes_fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="zoo:digits-dit", help="a DiT pipeline")
    parser.add_argument("--size", type=float, default=30.0, help="factor of the planted channels")
    parser.add_argument("--channels", type=int, default=3, help="planted in each input")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32, help="of the calibration set")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sources = [
            arguments.source,
            str(planted_folder(arguments.source, work / "planted", arguments.size, arguments.channels)),
        ]
        config = CalibrateConfig(samples=arguments.samples)
        sets = [calibrate_pipeline(source, config, output=work / f"set{at}") for at, source in enumerate(sources)]
        modes = SCALES if arguments.act_bits < 16 else {"float": "auto"}
        print(f"{arguments.samples} calibration samples\n\n| row |", end="")
        print("".join(f" bytes / float32, {kind} | as trained | planted |" for kind in modes))
        print("|---" * (1 + 3 * len(modes)) + "|", flush=True)
        for row, fields in ROWS.items():
            print(f"| {row} |", end="", flush=True)
            for mode in modes.values():
                asked = {"bits": arguments.bits, "act_bits": arguments.act_bits, "act_mode": mode, **fields}
                found = [measure(source, calib, asked, work) for source, calib in zip(sources, sets, strict=True)]
                (trained, share), (outliers, _) = found
                print(f" {share:.3f} | {trained:.4g} | {outliers:.4g} |", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
