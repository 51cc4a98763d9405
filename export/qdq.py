"""Integers in an ONNX graph: initializers behind DequantizeLinear nodes, w = scale * (q - zero point), and behind a Div
where a bundle has factors for the input channels.

8-bit codes are INT8 or UINT8, up to 4 bits INT4 or UINT4, which ONNX has since opset 21; so has it scales for blocks.
Letters: O output channels, I input channels per group, K input features per row, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ..runtime.low_rank import along
from ..runtime.packing import unpack_codes
from ..runtime.weight import from_rows, integer_rows
from .contents import StoredLayer

OPSET = 21
IR_VERSION = 10


@dataclass(frozen=True)
class Integers:
    """A weight as DequantizeLinear takes it, the output channels first."""

    codes: Tensor  # (O, I, *kernel) int8 or uint8
    scale: Tensor  # (O,) float32, or with blocks (O, I / block, *kernel)
    zero_point: Tensor | None  # as the scale, of the type of the codes
    bits: int  # 4 or 8
    block: int | None  # input channels for each scale
    smoothing: Tensor | None = None  # (I,) float32, what the values are divided by to give the weight


def expressible(layer: StoredLayer) -> bool:
    """Whether the codes of a layer can stay as they are."""
    scheme, shape = layer.scheme, layer.shape
    if scheme.format != "integer" or scheme.rank is not None or scheme.split or len(shape) < 2:
        return False
    return scheme.group_size is None or shape[1] % scheme.group_size == 0


def integers_of(layer: StoredLayer) -> Integers:
    """The codes of a layer that is `expressible`, none of them changed."""
    scheme, shape, weight = layer.scheme, layer.shape, layer.load()
    features = 1
    for size in shape[1:]:
        features *= size
    if scheme.symmetric:  # multipliers of two-level scales are small: codes times them are still int8
        rows = integer_rows(weight.qweight, weight.group_scale, scheme, features)
    else:
        rows = unpack_codes(weight.qweight, scheme.bits, features, signed=False)
    scale, zero = weight.scale.float(), weight.zero_point
    block = None if scheme.two_level or scale.shape[1] == 1 else scheme.group_size
    if block is None:
        scale, zero = scale[:, 0], None if zero is None else zero[:, 0]
    else:
        blocks = (shape[0], shape[1] // block, *shape[2:])
        scale, zero = from_rows(scale, blocks), None if zero is None else from_rows(zero, blocks)
    bits = 4 if scheme.bits <= 4 and not scheme.two_level else 8
    smoothing = None if weight.smoothing is None else weight.smoothing.float()
    return Integers(from_rows(rows, shape), scale, zero, bits, block, smoothing)


def graph_with_weights(
    graph_file: str, weights: dict[str, Tensor], integers: dict[str, Integers], prefix: str
) -> onnx.ModelProto:
    """A traced graph whose weights are inputs, with the weights in their place.

    Args:
        weights: name -> what lies in the graph as floats.
        integers: name -> what lies there as integers behind a DequantizeLinear.
        prefix: of the inputs that are weights.
    """
    model = onnx.load(graph_file)
    model.ir_version = IR_VERSION
    (opset,) = (entry for entry in model.opset_import if not entry.domain)
    assert not any(node.op_type == "GroupNormalization" for node in model.graph.node)  # alone changed its meaning
    opset.version = OPSET
    graph = model.graph
    names = [entry.name for entry in graph.input if entry.name.startswith(prefix)]
    kept = [entry for entry in graph.input if not entry.name.startswith(prefix)]
    del graph.input[:]
    graph.input.extend(kept)
    added: list[onnx.NodeProto] = []
    for name in names:
        own = name.removeprefix(prefix)
        if own in integers:
            added.extend(_dequantize(graph, name, integers[own]))
        else:
            graph.initializer.append(numpy_helper.from_array(weights[own].contiguous().numpy(), name))
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _dequantize(graph: onnx.GraphProto, name: str, weight: Integers) -> list[onnx.NodeProto]:
    """Put the integers of a weight into the graph, with the nodes that make the weight of them. A matrix that is only
    read through a transposition lies there transposed, as products with packed weights want it."""
    readers = [node for node in graph.node if name in node.input]
    turned = weight.codes.ndim == 2 and all(node.op_type == "Transpose" for node in readers)
    codes, scale, zero, output = weight.codes, weight.scale, weight.zero_point, name
    if turned and readers:
        codes = codes.t()
        if weight.block:
            scale, zero = scale.t(), None if zero is None else zero.t()
        output = readers[0].output[0]
        _rewire(graph, readers, output)
    channels = 1 if turned and readers else 0
    axis = (1 - channels) if weight.block else channels
    parts = [f"{name}.codes", f"{name}.scale"]
    graph.initializer.append(_integer_tensor(parts[0], codes, weight.bits))
    graph.initializer.append(numpy_helper.from_array(scale.contiguous().numpy(), parts[1]))
    if zero is not None:
        parts.append(f"{name}.zero_point")
        graph.initializer.append(_integer_tensor(parts[2], zero, weight.bits))
    attributes: dict[str, Any] = {"axis": axis} | ({"block_size": weight.block} if weight.block else {})
    values = output if weight.smoothing is None else f"{name}.values"
    nodes = [helper.make_node("DequantizeLinear", parts, [values], name=f"{name}.dequantize", **attributes)]
    if weight.smoothing is not None:
        factors = along(weight.smoothing, codes, 1 - channels)
        graph.initializer.append(numpy_helper.from_array(factors.contiguous().numpy(), f"{name}.smoothing"))
        nodes.append(helper.make_node("Div", [values, f"{name}.smoothing"], [output], name=f"{name}.whole"))
    return nodes


def _rewire(graph: onnx.GraphProto, turns: list[onnx.NodeProto], output: str) -> None:
    """Remove transpositions; who read one reads `output`."""
    gone = {node.output[0] for node in turns}
    for node in graph.node:
        for place, entry in enumerate(node.input):
            if entry in gone:
                node.input[place] = output
    for node in turns:
        graph.node.remove(node)


def _integer_tensor(name: str, values: Tensor, bits: int) -> TensorProto:
    """Codes as they lie in a file: two of 4 bits in one byte, the first in the low half."""
    signed, flat = values.dtype == torch.int8, values.contiguous().flatten().numpy()
    if bits == 8:
        kind, raw = (TensorProto.INT8 if signed else TensorProto.UINT8), flat
    else:
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        halves = numpy.append(flat, numpy.zeros(len(flat) % 2, flat.dtype)).view(numpy.uint8) & 15
        raw = halves[0::2] | halves[1::2] << 4
    return helper.make_tensor(name, kind, values.shape, raw.tobytes(), raw=True)
