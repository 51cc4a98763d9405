"""Nunchaku Lite, which diffusers loads and runs with the kernels of SVDQuant (Li et al., 2024, arXiv 2411.05007) on
NVIDIA GPUs: INT4 from Turing to Ada, NVFP4 on Blackwell.

Linears that a bundle has as 4-bit integers with scales per token and group of 64 keep their codes, smoothing factors
and branches; so do NVFP4 weights. Weights of 4 bits in groups of 64 behind floating-point inputs keep their codes too.
All else is floating point.

Letters: N output and K input features, r rank of all branches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.config import Config
from ...core.errors import UnsupportedError
from ...core.reporter import Reporter
from ...core.safe_read import weight_stem
from ...core.tensor_file import LazyTensor, Writable, write_weights
from ...runtime.packing import unpack_codes
from ...runtime.skeleton import build_skeleton
from ..contents import Contents, StoredLayer
from ..floats import FLOATS, SHORT_FLOATS
from ..nunchaku_layout import (
    FEATURES,
    RANK,
    pack_codes,
    pack_down,
    pack_micro_scales,
    pack_scales,
    pack_up,
    pack_vector,
    pack_words,
)

ROUNDS = False
KEEPS = ()
GROUP = 64
WORDS_FEATURES, WORDS_ROWS = 1024, 8  # multiples that weights behind floating-point inputs have
Make = Callable[[], Tensor]
Kind = Literal["int4", "nvfp4", "words"]

LOAD_LINES = """import torch
from diffusers import DiffusionPipeline

# on a GPU that has such products; DIFFUSERS_TRUST_REMOTE_KERNELS=true lets diffusers fetch them
pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.DTYPE).to("cuda")"""


class NunchakuLiteConfig(Config):
    """Fields of `--set`."""

    # of scales and floats; float16 holds the scales of integers as they are, bfloat16 to 0.4 %, but larger values
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


CONFIG = NunchakuLiteConfig


def write(contents: Contents, folder: Path, config: NunchakuLiteConfig, reporter: Reporter) -> dict[str, Any]:
    """Write a component as diffusers' loader of this format wants it.

    Raises:
        UnsupportedError: no layer has numbers that this format multiplies.
    """
    kinds = {name: kind for name, layer in contents.layers.items() if (kind := kind_of(layer))}
    products = {name: kind for name, kind in kinds.items() if kind != "words"}
    if len(set(products.values())) > 1:
        raise UnsupportedError(
            f"{contents.name} has linears of 4-bit integers and of 4-bit floats.", "This format holds one kind of both."
        )
    if not products:
        raise UnsupportedError(
            f"no linear of {contents.name} has numbers that nunchaku-lite multiplies.",
            f"It takes 4-bit weights and activations with a scale for each {GROUP} features, or NVFP4 weights, in "
            f"linears whose sizes are multiples of {FEATURES}.",
            "Make them by dacc quantize --bits 4 --act-bits 4 --method svdquant --set shift=false, or --format nvfp4.",
        )
    precision = next(iter(products.values()))
    rank = _common_rank([contents.layers[name] for name in products])
    tensors = _floats(contents, set(kinds), SHORT_FLOATS[config.dtype])
    for name, kind in kinds.items():
        made = _words(contents.layers[name]) if kind == "words" else _products(contents.layers[name], rank)
        bias = f"{name}.bias"
        if kind != "words" and bias in contents.floats:
            made["bias"] = (contents.floats[bias].shape, SHORT_FLOATS[config.dtype], _packed_bias(contents, bias))
        tensors |= {
            f"{name}.{key}": LazyTensor(shape, dtype or SHORT_FLOATS[config.dtype], make)
            for key, (shape, dtype, make) in made.items()
        }
    write_weights(folder, weight_stem(contents.folder), tensors, {"format": "pt"})
    block = _config_block(kinds, precision, rank, config)
    text = json.dumps({**contents.config, "quantization_config": block}, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    _tell(contents, kinds, precision, reporter)
    return {"precision": precision, "rank": rank, "dtype": config.dtype, "layers": len(kinds)}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    return LOAD_LINES.replace("DTYPE", written["dtype"])


def kind_of(layer: StoredLayer) -> Kind | None:
    """How the format holds a layer; None: as floats."""
    scheme, shape = layer.scheme, layer.shape
    if len(shape) != 2 or scheme.bits != 4 or scheme.split or scheme.two_level or scheme.shifted:
        return None
    tiled = all(size % FEATURES == 0 for size in shape)
    if scheme.format == "nvfp4":
        return "nvfp4" if tiled else None
    if scheme.group_size != GROUP:
        return None
    if scheme.act_bits == 4 and scheme.act_group_size == GROUP and not scheme.act_offset and tiled:
        return "int4"
    fits = shape[1] % WORDS_FEATURES == 0 and shape[0] % WORDS_ROWS == 0
    return "words" if scheme.act_bits == 16 and not scheme.absorbs_outliers and fits else None


def _common_rank(layers: list[StoredLayer]) -> int:
    """One for all layers, and one that the kernels take; smaller branches are filled up with zeros."""
    largest = max(layer.scheme.rank or 0 for layer in layers)
    return max(RANK, -(-largest // RANK) * RANK)


Made = dict[str, tuple[tuple[int, ...], str | None, Make]]  # leaf -> shape, type (None: that of floats), how it is made


def _products(layer: StoredLayer, rank: int) -> Made:
    """A linear that multiplies 4-bit numbers."""
    (rows, features), scheme, stored = layer.shape, layer.scheme, layer.tensors
    floats = scheme.format == "nvfp4"

    def codes() -> Tensor:
        return pack_codes(unpack_codes(stored["qweight"].load(), 4, features, signed=not floats))

    def smoothing() -> Tensor:
        return stored["smoothing"].load().float() if scheme.smooth else torch.ones(features)

    def down() -> Tensor:
        """The branch takes inputs as they are: what smoothing divides them by goes into this factor."""
        factor = torch.zeros(rank, features, dtype=torch.float64)
        if scheme.rank:
            factor[: scheme.rank] = stored["low_rank_down"].load().double() / smoothing().double()
        return pack_down(factor)

    def up() -> Tensor:
        factor = torch.zeros(rows, rank)
        if scheme.rank:
            factor[:, : scheme.rank] = stored["low_rank_up"].load().float()
        return pack_up(factor)

    made: Made = {
        "qweight": ((rows, features // 2), "I8", codes),
        "smooth_factor": ((features,), None, lambda: pack_vector(smoothing())),
        "proj_down": ((features, rank), None, down),
        "proj_up": ((rows, rank), None, up),
    }
    if not floats:
        made["wscales"] = ((features // GROUP, rows), None, lambda: pack_scales(stored["scale"].load()))
        return made
    groups = features // 16

    def micro() -> Tensor:
        return pack_micro_scales(stored["group_scale"].load()).view(torch.float8_e4m3fn)

    return made | {
        "wscales": ((groups, rows), "F8_E4M3", micro),
        "wcscales": ((rows,), None, lambda: torch.ones(rows)),
        "wtscale": ((1,), None, lambda: stored["scale"].load().view(1)),
    }


def _words(layer: StoredLayer) -> Made:
    """A linear that multiplies floats by 4-bit weights: q scale + zero, unsigned q."""
    (rows, features), scheme, stored = layer.shape, layer.scheme, layer.tensors
    lift = 8 if scheme.symmetric else 0  # signed codes become unsigned ones

    def codes() -> Tensor:
        return pack_words(
            unpack_codes(stored["qweight"].load(), 4, features, signed=scheme.symmetric).to(torch.int16) + lift
        )

    def zeros() -> Tensor:
        scale = stored["scale"].load().float()
        point = torch.full_like(scale, lift) if scheme.symmetric else stored["zero_point"].load().float()
        return (-point * scale).t()

    groups = features // GROUP
    return {
        "qweight": ((rows // 4, features // 2), "I32", codes),
        "wscales": ((groups, rows), None, lambda: stored["scale"].load().t()),
        "wzeros": ((groups, rows), None, zeros),
    }


def _floats(contents: Contents, kept: set[str], dtype: str) -> dict[str, Writable]:
    """Everything that is not 4 bits, integers of other kinds dequantized. diffusers' loader of this format also wants
    the buffers that a model makes by itself and no other file holds."""
    found: dict[str, Writable] = dict(build_skeleton(contents.folder).named_buffers())
    found |= {name: tensor.to(dtype) if tensor.dtype in FLOATS else tensor for name, tensor in contents.floats.items()}
    for name, layer in contents.layers.items():
        if name not in kept:
            weight = f"{name}.weight"
            found[weight] = LazyTensor(layer.shape, dtype, lambda weight=weight: contents.load(weight))  # type: ignore[misc]
    return found


def _packed_bias(contents: Contents, name: str) -> Make:
    return lambda: pack_vector(contents.floats[name].load().float())


def _config_block(kinds: Mapping[str, Kind], precision: Kind, rank: int, config: NunchakuLiteConfig) -> dict[str, Any]:
    words = [name for name, kind in kinds.items() if kind == "words"]
    block: dict[str, Any] = {
        "quant_method": "nunchaku_lite",
        "compute_dtype": config.dtype,
        "svdq_w4a4": {
            "precision": precision,
            "group_size": 16 if precision == "nvfp4" else GROUP,
            "rank": rank,
            "targets": [name for name, kind in kinds.items() if kind != "words"],
        },
    }
    if words:
        block["awq_w4a16"] = {"precision": "int4", "group_size": GROUP, "targets": words}
    return block


def _tell(contents: Contents, kinds: Mapping[str, Kind], precision: Kind, reporter: Reporter) -> None:
    reporter.say(f"export {contents.name}: {len(kinds)} linears of 4 bits")
    if others := len(contents.layers) - len(kinds):
        reporter.notice(f"{others} quantized layers of {contents.name} have no such numbers and become floats.")
    if precision == "nvfp4":
        reporter.notice(
            f"what runs {contents.name} also rounds its activations to 4-bit floats, which the bundle did not."
        )
