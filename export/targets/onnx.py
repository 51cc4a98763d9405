"""ONNX, for ONNX Runtime, OpenVINO and what else reads it: the denoiser as one graph. Layers that a bundle has as
integers keep their codes, behind DequantizeLinear nodes; what multiplies them is up to the reader. All else is float32.

The size of images is fixed to the pipeline's own; the batch is open. The model must fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...core.config import Config
from ...core.errors import UnsupportedError
from ...core.reporter import Reporter
from ..contents import Contents

ROUNDS = False
KEEPS = ()
FILE_NAME = "model.onnx"
MOST_INSIDE = 1_500_000_000  # bytes of weights; with more they lie beside the graph, whose format ends at 2 GB


class OnnxConfig(Config):
    """No fields."""


CONFIG = OnnxConfig


def write(contents: Contents, folder: Path, config: OnnxConfig, reporter: Reporter) -> dict[str, Any]:
    """Write the graph with its weights, and the config as it was.

    Raises:
        UnsupportedError: the onnx package is missing, or the component is no denoiser.
    """
    onnx = _library()
    from ..qdq import expressible, graph_with_weights, integers_of
    from ..trace import PREFIX, examples_of, load_float, write_graph

    examples = examples_of(contents.folder.parent, contents.name)
    model = load_float(contents)
    kept = {f"{name}.weight": layer for name, layer in contents.layers.items() if expressible(layer)}
    reporter.say(f"export {contents.name}: {len(kept)} layers of integers")
    with TemporaryDirectory(dir=folder) as temporary:
        graph = Path(temporary) / FILE_NAME
        write_graph(model, examples, graph)
        weights = {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}
        integers = {name: integers_of(layer) for name, layer in kept.items()}
        made = graph_with_weights(str(graph), weights, integers, PREFIX)
    inside = sum(len(entry.raw_data) for entry in made.graph.initializer) < MOST_INSIDE
    beside = {} if inside else {"save_as_external_data": True, "location": f"{FILE_NAME}.data"}
    onnx.save_model(made, folder / FILE_NAME, **beside)
    (folder / "config.json").write_text(json.dumps(contents.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if others := len(contents.layers) - len(kept):
        reporter.notice(
            f"{others} quantized layers of {contents.name} have no numbers that ONNX has and become floats."
        )
    inputs = {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in examples[0].tensors.items()
    }
    return {"file": f"{contents.name}/{FILE_NAME}", "inputs": inputs, "layers": len(kept)}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    inputs = "\n".join(f"#   {name}: {kind} {shape}" for name, (kind, shape) in written["inputs"].items())
    return f"""import onnxruntime

session = onnxruntime.InferenceSession(f"{{folder}}/{written["file"]}")
# inputs, by their names, here for two samples:
{inputs}
(prediction,) = session.run(None, inputs)
# OpenVINO reads the same file: openvino.Core().compile_model(f"{{folder}}/{written["file"]}", "CPU")(inputs)"""


def _library() -> Any:
    try:
        import onnx
    except ImportError:
        raise UnsupportedError(
            "the onnx package is not installed.", mend="Run pip install 'dacc-diffusion[onnx]'."
        ) from None
    return onnx
