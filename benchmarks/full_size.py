"""Denoisers at the sizes that people run, with random weights: made from their published configs, nothing downloaded.

    python benchmarks/full_size.py list                          # class, parameters, bytes and work of each
    python benchmarks/full_size.py make pixart-xl -o FOLDER      # an ordinary pipeline folder for any dacc command

Size, speed and memory do not depend on what a network has learned; image quality does, and is not measured on these. A
model too deep for a small machine is made with fewer blocks of the full width unless --depth says otherwise. The MACs
are those of one row at the published resolution; what is made reads its inputs at any resolution. On a folder, give
`dacc quantize` the option --measure never, or it runs the whole pipeline to compare noise with noise.

Other benchmarks import the factories as `from dacc.benchmarks.full_size import example_inputs, make_denoiser`: the
repository root is the package `dacc`, so this works from every folder and under PYTHONSAFEPATH=1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dacc.benchmarks.full_size_models import MODELS, Shape
from dacc.runtime.load import DTYPES
from dacc.runtime.macs import count_macs

LATENTS_PER_TOKEN = 4  # every transformer here folds 2 x 2 latents into one token


def make_denoiser(
    name: str, *, depth: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """A denoiser with seeded random weights, as `from_pretrained(..., dtype=dtype)` would give it.

    Every weight is drawn in its final dtype, so memory holds little more than the model.
    """
    with init_empty_weights():  # parameters only: position embeddings and rotation tables are computed as always
        model = MODELS[name].build(depth)
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for path, tensor in model.state_dict().items():
        target = _stored_dtype(model, path, dtype)
        values[path] = _random(path, tensor.shape, target, generator) if tensor.is_meta else tensor.to(target)
    model.load_state_dict(values, assign=True)
    return model


def example_inputs(
    name: str,
    *,
    batch_size: int = 1,
    resolution: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of one call of the denoiser.

    Args:
        batch_size: rows of the call; a pipeline with guidance makes two for each image.
        resolution: one of the model's `resolutions`; default the published one.
    """
    entry = MODELS[name]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(dtype)

    latent = entry.resolutions[resolution or next(iter(entry.resolutions))]
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), entry.inputs(draw, latent))


def make_pipeline_folder(
    name: str, folder: str | Path, *, depth: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """An ordinary pipeline folder: the denoiser at full size in `dtype`, everything around it tiny and random too."""
    entry, folder = MODELS[name], Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = entry.parts()
    role = "transformer" if entry.is_transformer else "unet"
    pipe = entry.pipeline(**{role: make_denoiser(name, depth=depth, dtype=dtype, seed=seed)}, **parts)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def _stored_dtype(model: nn.Module, path: str, dtype: torch.dtype) -> torch.dtype:
    """Some classes keep a few layers in float32, whatever dtype they are loaded in."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if kept & set(path.split(".")) else dtype


def _random(path: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values by fan-in, so that activations stay of order 1. Vectors are norms and biases: ones and zeros."""
    values = torch.empty(shape, dtype=dtype)
    if len(shape) == 1:
        return values.fill_(float(path.endswith("weight")))
    return values.normal_(std=prod(shape[1:]) ** -0.5, generator=generator)


def table() -> Iterator[str]:
    """Rows of markdown: every model as published, and as made where that is less deep. Nothing is materialised."""
    yield "| name | class | depth | parameters | GB in bfloat16 | latents | tokens | TMAC per call |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, entry in MODELS.items():
        latent = next(iter(entry.resolutions.values()))
        tokens = prod(latent[1:]) // LATENTS_PER_TOKEN if entry.is_transformer else "-"
        inputs = example_inputs(name, device="meta")
        for depth in dict.fromkeys((entry.published_depth, entry.depth)):
            with torch.device("meta"):
                model = entry.build(depth)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            size = sum(
                tensor.numel() * _stored_dtype(model, path, torch.bfloat16).itemsize
                for path, tensor in model.state_dict().items()
            )
            macs = count_macs(lambda model=model, inputs=inputs: model.bfloat16()(**inputs))
            yield (
                f"| {name} | {entry.model.__name__} | {depth} | {parameters / 1e6:.1f} M | {size / 1e9:.2f} "
                f"| {' x '.join(map(str, latent))} | {tokens} | {macs / 1e12:.2f} |"
            )


def main() -> None:
    """List the models, or make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every model: class, parameters, bytes, work per call of one row")
    make = commands.add_parser("make", help="write a pipeline folder")
    make.add_argument("name", choices=MODELS)
    make.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    make.add_argument("--depth", type=int, help="; ".join(f"{name}: {entry.note}" for name, entry in MODELS.items()))
    make.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    make.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "list":
        for row in table():
            print(row, flush=True)
        return
    if options.output.exists():
        parser.error(f"{options.output} exists already")
    print(
        make_pipeline_folder(
            options.name, options.output, depth=options.depth, dtype=DTYPES[options.dtype], seed=options.seed
        )
    )


if __name__ == "__main__":
    main()
