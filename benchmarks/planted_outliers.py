"""Outliers planted into a trained transformer, and what methods make of them.

    python benchmarks/planted_outliers.py                       # zoo:digits-dit, 4-bit weights and activations
    python benchmarks/planted_outliers.py zoo:shapes-mmdit
    python benchmarks/planted_outliers.py --size 100 --act-bits 8
    python benchmarks/planted_outliers.py --samples 8           # a smaller calibration set: quicker

Some channels of what the attention and the feed-forward part of every block of a DiT or Flux read are made `--size`
times as large, and the weights that read them smaller by the same factor. The network gives what it gave before, but
its layers have outliers now, as those of large diffusion transformers do. Prints a table of the relative L2 of the
final latents, of the network as it was trained and with outliers, both against the float pipeline from the same
noise.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dacc.calibrate.api import calibrate_pipeline
from dacc.calibrate.config import CalibrateConfig
from dacc.core.config import build_config
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter, silent
from dacc.core.seeds import seed_stream
from dacc.core.source import resolve_source, zoo_entry_of
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig
from dacc.runtime.compare import relative_l2
from dacc.runtime.load import load_source
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

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
SEEDS = 16
SCALES = {"per token": "dynamic", "per token and group": "per-group"}  # of activations
# chunks of the modulation that shift and scale the input of an attention and of a feed-forward part
ATTENTION, FEED_FORWARD = (0, 1), (3, 4)
QKV, ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


@dataclass(frozen=True)
class Read:
    """What some linears of a block read: a norm that a linear modulates; names within the block."""

    modulation: str
    chunks: tuple[int, int]  # of its outputs: those that shift, and those that scale
    readers: tuple[str, ...]


READS = {  # list of blocks -> what is read in each, for DiT and Flux
    "DiTTransformer2DModel": {
        "transformer_blocks": (
            Read("norm1.linear", ATTENTION, ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
            Read("norm1.linear", FEED_FORWARD, ("ff.net.0.proj",)),
        )
    },
    "FluxTransformer2DModel": {
        "transformer_blocks": (
            Read("norm1.linear", ATTENTION, QKV),
            Read("norm1.linear", FEED_FORWARD, ("ff.net.0.proj",)),
            Read("norm1_context.linear", ATTENTION, ADDED_QKV),
            Read("norm1_context.linear", FEED_FORWARD, ("ff_context.net.0.proj",)),
        ),
        "single_transformer_blocks": (Read("norm.linear", ATTENTION, (*QKV, "proj_mlp")),),
    },
}


@torch.no_grad()
def plant_(transformer: nn.Module, size: float, channels: int, seed: int = 0) -> None:
    """Make some channels `size` times as large without changing what a DiT or Flux gives."""
    generator = torch.Generator().manual_seed(seed)
    for stack, reads in READS[type(transformer).__name__].items():
        for block in transformer.get_submodule(stack):  # type: ignore[union-attr]
            for read in reads:
                layers: list[Any] = [block.get_submodule(name) for name in read.readers]
                factors = torch.ones(layers[0].in_features)
                factors[torch.randperm(len(factors), generator=generator)[:channels]] = size
                enlarge_(block.get_submodule(read.modulation), factors, *read.chunks)
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
    """A copy of a DiT or Flux pipeline with outliers."""
    pipe: Any = load_source(resolve_source(source, reporter=Reporter()), dtype="float32", device="cpu")
    plant_(pipe.transformer, size, channels)
    pipe.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Bench:
    """What every row is measured against."""

    request: RunRequest
    reference: Tensor  # (N, ...) final latents of the float pipeline
    work: Path

    def measure(self, source: str, calib: Path, fields: dict[str, Any]) -> tuple[float, float]:
        """Mean relative L2 of the final latents, and bytes against float32."""
        config = build_config(QuantizeConfig, measure="never", **fields)
        bundle = quantize_pipeline(source, config, calib=calib, output=self.work / "bundle", overwrite=True)
        manifest = read_manifest(bundle)
        assert manifest is not None
        record = manifest.components["transformer"]
        error = relative_l2(self.reference, latents_of(str(bundle), self.request)).mean().item()
        return error, record.bytes_after / record.bytes_fp32


def latents_of(source: str, request: RunRequest) -> Tensor:
    """(N, ...) float32 of a pipeline on the CPU."""
    pipe = load_source(resolve_source(source, reporter=silent()), dtype="float32", device="cpu")
    return sample(pipe, request).latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="zoo:digits-dit", help="a DiT or Flux pipeline")
    parser.add_argument("--size", type=float, default=30.0, help="factor of the planted channels")
    parser.add_argument("--channels", type=int, default=3, help="planted in each input")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32, help="of the calibration set")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="that are compared")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sources = [
            arguments.source,
            str(planted_folder(arguments.source, work / "planted", arguments.size, arguments.channels)),
        ]
        entry = zoo_entry_of(resolve_source(arguments.source, reporter=silent()))
        config = CalibrateConfig(samples=arguments.samples).resolved(entry)
        request = RunRequest(seeds=seed_stream("evaluation", 0, arguments.seeds), num_inference_steps=config.steps or 1)
        request = request.with_zoo_defaults(entry)
        bench = Bench(request, latents_of(arguments.source, request), work)
        sets = [calibrate_pipeline(source, config, output=work / f"set{at}") for at, source in enumerate(sources)]
        modes = SCALES if arguments.act_bits < 16 else {"float": "auto"}
        print(
            f"{arguments.samples} calibration samples, {arguments.seeds} seeds, {config.steps} steps\n\n| row |", end=""
        )
        print("".join(f" bytes / float32, {kind} | as trained | planted |" for kind in modes))
        print("|---" * (1 + 3 * len(modes)) + "|", flush=True)
        for row, fields in ROWS.items():
            print(f"| {row} |", end="", flush=True)
            for mode in modes.values():
                asked = {"bits": arguments.bits, "act_bits": arguments.act_bits, "act_mode": mode, **fields}
                found = [bench.measure(source, calib, asked) for source, calib in zip(sources, sets, strict=True)]
                (trained, share), (outliers, _) = found
                print(f" {share:.3f} | {trained:.4g} | {outliers:.4g} |", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
