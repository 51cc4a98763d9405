"""What every export format holds of a bundle: bytes, and the output of the denoiser as the format's own library reads
it back, for the table in docs/export.md.

    pip install -c constraints.txt --no-deps --target .work/peers optimum-quanto bitsandbytes torchao ninja
    PYTHONPATH=.work/peers python benchmarks/export_table.py

diffusers loads bitsandbytes on accelerators only: here its own functions decode the file. nunchaku-lite has no row:
nothing runs it on a processor.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dacc.core.machine import describe_machine
from dacc.core.pipeline import denoisers
from dacc.core.reporter import silent
from dacc.core.source import resolve_source
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig
from dacc.export.trace import Example, examples_of
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig
from dacc.runtime.load import load_source
from dacc.runtime.skeleton import build_skeleton

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
BEGIN, END = "<!-- formats -->", "<!-- /formats -->"
SOURCES = ("zoo:digits-dit", "zoo:shapes-sd")
BUNDLES: dict[str, dict[str, Any]] = {"W8": {"bits": 8}, "W4": {"bits": 4}}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def call(model: nn.Module, example: Example) -> Tensor:
    """Output of a denoiser, float32."""
    arguments = {**example.others, **example.tensors}
    output: Tensor = model(**arguments, return_dict=False)[0]
    return output.float()


def plain(folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """The model of a component with these weights."""
    model = build_skeleton(folder)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def by_diffusers(folder: Path, example: Example) -> Tensor:
    return call(diffusers.AutoModel.from_pretrained(str(folder), torch_dtype=torch.float32), example)


def by_gguf(folder: Path, example: Example) -> Tensor:
    import gguf

    (file,) = folder.glob("*.gguf")
    decode = gguf.quants.dequantize
    entries = gguf.GGUFReader(file).tensors
    return call(
        plain(folder, {each.name: torch.from_numpy(decode(each.data, each.tensor_type).copy()) for each in entries}),
        example,
    )


def by_int8(folder: Path, example: Example) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    tensors = load_file(folder / WEIGHTS)
    for layer in [key.removesuffix(".SCB") for key in tensors if key.endswith(".SCB")]:
        weight = f"{layer}.weight"
        tensors[weight] = int8_vectorwise_dequant(tensors[weight], tensors.pop(f"{layer}.SCB"))
        del tensors[f"{weight}_format"]
    return call(plain(folder, tensors), example)


def by_nf4(folder: Path, example: Example) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    tensors = load_file(folder / WEIGHTS)
    for weight in [key.removesuffix(".absmax") for key in tensors if key.endswith(".absmax")]:
        stats = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{weight}.")}
        packed = Params4bit.from_prequantized(tensors[weight], stats, device="cpu")
        tensors[weight] = dequantize_4bit(packed.data, packed.quant_state)
    return call(plain(folder, tensors), example)


def by_onnxruntime(folder: Path, example: Example) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in example.tensors.items()})[0])


READERS: dict[str, Callable[[Path, Example], Tensor]] = {
    "safetensors-bf16": by_diffusers,
    "safetensors-fp8": by_diffusers,
    "gguf": by_gguf,
    "quanto": by_diffusers,
    "torchao": by_diffusers,
    "bitsandbytes-int8": by_int8,
    "bitsandbytes-nf4": by_nf4,
    "onnx": by_onnxruntime,
}


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def measure(source_name: str, row: str, work: Path) -> list[str]:
    """Rows of the table for one bundle of one pipeline."""
    source = resolve_source(source_name, reporter=silent())
    config = QuantizeConfig(measure="never", **BUNDLES[row])
    bundle = quantize_pipeline(source, config, output=work / f"{source.name}-{row}", device="cpu")
    ((name, denoiser),) = denoisers(load_source(source, dtype="float32", device="cpu")).items()
    treated = denoisers(load_source(bundle, dtype="float32", device="cpu"))[name]
    example = examples_of(source.path, name)[0]
    exact, ours = call(denoiser, example), call(treated, example)
    float_bytes = 4 * sum(parameter.numel() for parameter in denoiser.parameters())
    lines = []
    for format_name, read in READERS.items():
        folder = export_pipeline(bundle, ExportConfig(format=format_name), output=work / f"{bundle.name}-{format_name}")
        files = [file for file in (folder / name).iterdir() if file.name != "config.json"]
        share = sum(file.stat().st_size for file in files) / float_bytes
        found = read(folder / name, example)
        distances = (relative(found, ours), relative(found, exact), relative(ours, exact))
        told = " | ".join(f"{value:.4f}" for value in distances)
        lines.append(f"| {source_name.removeprefix('zoo:')} {row} | `{format_name}` | {share:.3f} | {told} |")
        print(lines[-1], flush=True)
    return lines


def write_table(lines: list[str]) -> None:
    """Put what was measured so far into the page."""
    heading = [
        "| bundle | format | bytes / float32 | from the bundle's | from the float one's | the bundle's from it |",
        "|---|---|---|---|---|---|",
    ]
    machine = describe_machine()
    note = (
        "Relative L2 distance of one denoiser call in float32, read back by the library of the format "
        f"(`benchmarks/export_table.py`); {machine['processor']} ({machine['instruction_sets']}), torch "
        f"{machine['torch']}, {datetime.date.today().isoformat()}."
    )
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    table = "\n".join(heading + lines)
    PAGE.write_text(f"{head}{BEGIN}\n{note}\n\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Measure all; the table is written anew after each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the exports; default: a temporary one")
    parser.add_argument("--source", action="append", help=f"repeatable; default: {', '.join(SOURCES)}")
    options = parser.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for source in options.source or SOURCES:
            for row in BUNDLES:
                lines += measure(source, row, Path(folder))
                write_table(lines)


if __name__ == "__main__":
    main()
