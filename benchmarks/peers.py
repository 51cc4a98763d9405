"""Other people's quantization of the same denoisers, in memory: what our rows of `ptq_study.py` stand beside.

    pip install -c constraints.txt --no-deps --target .work/peers optimum-quanto bitsandbytes torchao sdnq ninja

They live in a folder of their own, since diffusers imports torchao and bitsandbytes wherever they are installed, which
costs every command seconds and memory. Each peer is one function with one signature: it changes the layers that it is
given as far as it can, and says what it could not do. It is given all but the first and last, and at 4 bits a second
time without the layers that embed time and class, which our own defaults hold at 8 bits. Bytes are what its weights
take packed, with scales as a float16 pipeline stores them, and two for every parameter that stays float. Peers are
imported inside the functions: none is needed for our own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from dacc.core.families import find_family
from dacc.core.pipeline import walk_layers

ROUNDED = 2e-3  # bend of a layer with rounded inputs; 8 bits give 9e-3, casts to float16 less than 1e-3
INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009  (torch's stubs do not know it)
FLOAT_BYTES = 2  # of a parameter that stays float
HALF, SINGLE, BYTE = 2, 4, 1  # of what a peer stores for each group


@dataclass(frozen=True)
class Treated:
    """What a peer did."""

    weight_bytes: dict[str, int]  # layer -> packed weight with its scales
    notice: str  # what it could not do, and how it ran


@dataclass(frozen=True)
class Peer:
    """One row: the function of a library, and the name of its format at every setting that the row has."""

    package: str
    quantize_: Callable[[nn.Module, list[str], str, Callable[[], None]], Treated]
    formats: dict[str, str]  # setting -> format
    temporal: bool = True  # whether the layers that embed time are treated too


def peer_layers(denoiser: nn.Module, *, temporal: bool = True) -> list[str]:
    """Linears and convolutions that a peer may treat: all but the first and last of the model, as in our rows.

    Args:
        temporal: also those that embed time and class.
    """
    family, _ = find_family(type(denoiser).__name__)
    plain, spared = (nn.Linear, nn.Conv2d), {"edge"} if temporal else {"edge", "temporal"}
    return [name for name, layer in walk_layers(denoiser) if type(layer) in plain and family.role(name) not in spared]


def summarize(denoiser: nn.Module, shapes: dict[str, tuple[int, ...]], treated: Treated) -> dict[str, float]:
    """What a treated denoiser is, measured: shares of the parameters in layers with quantized weights, and in layers
    that really round what enters them; bytes against float32.

    Args:
        shapes: every parameter of the float denoiser and its shape.
    """
    values = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(values.values())
    weights = {name: values[f"{name}.weight"] for name in treated.weight_bytes}
    rounding = [
        count
        for name, count in weights.items()
        if _rounds_inputs(denoiser.get_submodule(name), shapes[f"{name}.weight"])
    ]
    size = sum(treated.weight_bytes.values()) + FLOAT_BYTES * (total - sum(weights.values()))
    return {
        "weight_share": sum(weights.values()) / total,
        "input_share": sum(rounding) / total,
        "bytes_per_float32": size / (4 * total),
    }


def quanto_(denoiser: nn.Module, layers: list[str], setting: str, calibrate: Callable[[], None]) -> Treated:
    """optimum-quanto: weights, and activations where the setting has them, calibrated in its own context."""
    from optimum import quanto

    bits, act_bits = _bits(setting)
    shapes = _shapes(denoiser, layers)
    activations = quanto.qint8 if act_bits == 8 else None
    quanto.quantize(
        denoiser, weights=quanto.qint8 if bits == 8 else quanto.qint4, activations=activations, include=layers
    )
    if activations is not None:
        with quanto.Calibration():
            calibrate()
    quanto.freeze(denoiser)
    sizes = {}
    for name, shape in shapes.items():
        layer: Any = denoiser.get_submodule(name)
        groups = shape[1] // layer.weight_group_size if layer.weight_group_size else 1
        sizes[name] = _packed(shape, bits, groups, HALF if bits == 8 else 2 * HALF)
    scales = "; one static scale per tensor of inputs, from its own Calibration; inputs of convolutions stay float"
    scales = scales if activations is not None else ""
    return Treated(sizes, f"absmax or min-max weights{scales}")


def bitsandbytes_(denoiser: nn.Module, layers: list[str], setting: str, calibrate: Callable[[], None]) -> Treated:
    """bitsandbytes: nf4 and int8 by its functions, LLM.int8() by its layer; linear layers only."""
    import bitsandbytes
    from bitsandbytes import functional

    bits, act_bits = _bits(setting)
    linears = _linears(denoiser, layers)
    shapes = _shapes(denoiser, linears)
    for name in linears:
        layer: Any = denoiser.get_submodule(name)
        if act_bits == 8:
            _replace_(denoiser, name, _llm_int8(bitsandbytes, layer))
        elif bits == 8:
            codes, scales, _ = functional.int8_vectorwise_quant(layer.weight.data.half())
            layer.weight.data = functional.int8_vectorwise_dequant(codes, scales).to(layer.weight.dtype)
        else:
            codes, state = functional.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
            layer.weight.data = functional.dequantize_4bit(codes, state).to(layer.weight.dtype)
    blocks = {name: shape[1] / 64 if bits == 4 else 1 for name, shape in shapes.items()}
    sizes = {name: _packed(shape, bits, blocks[name], SINGLE) for name, shape in shapes.items()}
    layer_way = "its Linear8bitLt, threshold 6, put in place, which casts inputs to float16"
    function_way = "its functions applied to the weights, which are dequantized before the forward"
    how = layer_way if act_bits == 8 else function_way
    return Treated(sizes, f"linear layers only; {how}; diffusers itself refuses bitsandbytes on a CPU")


def torchao_(denoiser: nn.Module, layers: list[str], setting: str, calibrate: Callable[[], None]) -> Treated:
    """torchao: weight-only and dynamic activations; linear layers only."""
    from torchao import quantization
    from torchao.quantization.granularity import PerAxis, PerGroup

    bits, act_bits = _bits(setting)
    linears = _linears(denoiser, layers)
    shapes = _shapes(denoiser, linears)
    groups: dict[str, int] = {}
    for name, shape in shapes.items():
        size = next((size for size in (64, 32) if shape[1] % size == 0), None) if bits == 4 else None
        groups[name] = shape[1] // size if size else 1
        granularity = PerGroup(size) if size else PerAxis(0)
        config: Any
        if bits == 4 and act_bits == 8:
            config = quantization.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=INT4, weight_granularity=granularity
            )
        elif bits == 4:
            config = quantization.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=granularity)
        elif act_bits == 8:
            config = quantization.Int8DynamicActivationInt8WeightConfig()
        else:
            config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(denoiser, config, filter_fn=lambda _, found, wanted=name: found == wanted)
    per_group = HALF + BYTE if bits == 4 else HALF
    sizes = {name: _packed(shape, bits, groups[name], per_group) for name, shape in shapes.items()}
    odd = sum(1 for name in groups if bits == 4 and groups[name] == 1)
    fit = f"; {odd} layers whose width neither 64 nor 32 divides have one scale per row" if odd else ""
    how = "groups of 64 or 32" if bits == 4 else "one scale per row"
    kernel = "; IntxWeight formats, since Int4WeightOnly wants an accelerator's packing" if bits == 4 else ""
    return Treated(sizes, f"linear layers only; {how}{fit}{kernel}")


def sdnq_(denoiser: nn.Module, layers: list[str], setting: str, calibrate: Callable[[], None]) -> Treated:
    """SDNQ: linears and convolutions, integer products with dynamic activations where the setting has them."""
    from sdnq import SDNQConfig, sdnq_post_load_quant

    bits, act_bits = _bits(setting)
    shapes = _shapes(denoiser, layers)
    config = SDNQConfig(
        weights_dtype="int8" if bits == 8 else "uint4",
        quant_conv=True,
        use_quantized_matmul=act_bits == 8,
        use_quantized_matmul_conv=act_bits == 8,
        quantized_matmul_dtype="int8" if act_bits == 8 else None,
        add_skip_keys=False,
        # a leading dot anchors a name: "proj_out" alone would also spare the proj_out of every block
        modules_to_not_convert=[f".{name}" for name, _ in walk_layers(denoiser) if name not in layers],
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
    )
    sdnq_post_load_quant(denoiser, quantization_config=config, torch_dtype=torch.float32)
    sizes, plain = {}, 0
    for name, shape in shapes.items():
        layer: Any = denoiser.get_submodule(name)
        if not hasattr(layer, "sdnq_dequantizer"):
            continue
        plain += act_bits == 8 and not layer.sdnq_dequantizer.use_quantized_matmul
        per_group = HALF if layer.zero_point is None else 2 * HALF
        sizes[name] = _packed(shape, bits, layer.scale.numel() / shape[0], per_group)
    rest = f"; {len(shapes) - len(sizes)} layers left float" if len(sizes) < len(shapes) else ""
    slow = f"; {plain} of {len(sizes)} layers keep float activations, which its integer product does not take"
    return Treated(sizes, f"its own group sizes; eager products on the CPU{rest}{slow if plain else ''}")


PEERS: dict[str, Peer] = {
    "quanto": Peer(
        "optimum-quanto",
        quanto_,
        {"W8A16": "qint8", "W4A16": "qint4", "W8A8": "qint8, qint8 inputs", "W4A8": "qint4, qint8 inputs"},
    ),
    "bitsandbytes": Peer("bitsandbytes", bitsandbytes_, {"W8A16": "int8 rows", "W4A16": "nf4", "W8A8": "LLM.int8()"}),
    "torchao": Peer(
        "torchao",
        torchao_,
        {"W8A16": "int8", "W4A16": "int4", "W8A8": "int8 dynamic", "W4A8": "int4, int8 dynamic"},
    ),
    "sdnq": Peer(
        "sdnq", sdnq_, {"W8A16": "int8", "W4A16": "uint4", "W8A8": "int8 product", "W4A8": "uint4, int8 product"}
    ),
}
PEERS |= {
    f"{name} (temporal float)": replace(
        peer,
        formats={setting: one for setting, one in peer.formats.items() if setting.startswith("W4")},
        temporal=False,
    )
    for name, peer in PEERS.items()
}


def _bits(setting: str) -> tuple[int, int]:
    """`W4A16` -> (4, 16)."""
    weights, _, activations = setting.removeprefix("W").partition("A")
    return int(weights), int(activations)


def _linears(denoiser: nn.Module, layers: list[str]) -> list[str]:
    return [name for name in layers if type(denoiser.get_submodule(name)) is nn.Linear]


def _shapes(denoiser: nn.Module, layers: list[str]) -> dict[str, tuple[int, int]]:
    """Rows and values per row of every weight, before it is treated."""
    weights: dict[str, Tensor] = {name: denoiser.get_submodule(name).weight for name in layers}  # type: ignore[misc]
    return {name: (len(weight), weight[0].numel()) for name, weight in weights.items()}


def _packed(shape: tuple[int, int], bits: int, groups_per_row: float, bytes_per_group: int) -> int:
    rows, columns = shape
    return ceil(rows * columns * bits / 8) + ceil(rows * groups_per_row) * bytes_per_group


def _replace_(denoiser: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), own, layer)


def _llm_int8(bitsandbytes: Any, layer: nn.Linear) -> nn.Module:
    """bitsandbytes' 8-bit layer with this layer's weight."""
    has_bias = layer.bias is not None
    made: nn.Module = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=has_bias, has_fp16_weights=False, threshold=6.0
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").eval()  # in training mode it multiplies floats on a CPU


@torch.no_grad()
def _rounds_inputs(layer: nn.Module, weight_shape: tuple[int, ...]) -> bool:
    """Whether a treated layer bends what is linear: f(a + b) - f(a) - f(b) + f(0) is 0 where inputs stay float."""
    size = (64, weight_shape[1]) if len(weight_shape) == 2 else (2, weight_shape[1], 8, 8)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    both, one, other, none = (_plain(layer(x)) for x in (first + second, first, second, torch.zeros(size)))
    bend, length = (both - one - other + none).norm(), (both - none).norm()
    return bool(bend > ROUNDED * length)


def _plain(output: Any) -> Tensor:
    """A plain float tensor: quanto's layers may give quantized ones."""
    found: Tensor = output if type(output) is Tensor else output.dequantize()
    return found.float()
