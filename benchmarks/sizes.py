"""Bytes of quantized denoisers: on disk against float32, and in memory after loading against disk.

    python benchmarks/sizes.py                  # DiT-XL/2 (random weights, 750 M parameters) and the zoo's digits-dit

DiT-XL/2 is diffusers' own class at its published size; its size does not depend on the values of its weights. The table
is written into docs/results.md.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dacc.core.config import build_config
from dacc.core.machine import describe_machine
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter
from dacc.evaluate.size import component_sizes
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig
from dacc.runtime.load import load_source

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results.md"
ROWS = {"W8": {"bits": 8}, "W4, groups of 64": {"bits": 4, "group_size": 64}}
BEGIN, END = "<!-- sizes -->", "<!-- /sizes -->"


def make_dit_xl(folder: Path) -> Path:
    """A DiT-XL/2 pipeline with random float16 weights and a toy autoencoder."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).half()
    pipe = DiTPipeline(transformer, AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), DDIMScheduler())
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def measure(source: str, settings: dict[str, int], work: Path) -> tuple[int, float, float, float]:
    """Parameters, bytes against float32, memory against disk, seconds to quantize."""
    started = time.monotonic()
    config = build_config(QuantizeConfig, measure="never", **settings)
    bundle = quantize_pipeline(source, config, output=work / "bundle", overwrite=True, reporter=Reporter())
    seconds = time.monotonic() - started
    manifest = read_manifest(bundle)
    assert manifest is not None
    ((name, record),) = manifest.components.items()
    size = component_sizes(load_source(bundle, dtype="float16", device="cpu"), bundle)[name]
    return record.parameters, record.bytes_after / record.bytes_fp32, size.bytes_in_memory / size.bytes_on_disk, seconds


def main() -> None:
    """Measure both pipelines and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder on a disk with 4 GB free; default: a temporary one")
    options = parser.parse_args()
    lines = [
        "| denoiser | parameters | | bytes / float32 | memory after loading / disk | seconds to quantize |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        sources = {"DiT-XL/2": str(make_dit_xl(Path(folder) / "dit-xl")), "digits-dit": "zoo:digits-dit"}
        for name, source in sources.items():
            for row, settings in ROWS.items():
                parameters, share, memory, seconds = measure(source, settings, Path(folder))
                lines.append(
                    f"| {name} | {parameters / 1e6:.1f} M | {row} | {share:.3f} | {memory:.3f} | {seconds:.0f} |"
                )
    machine = describe_machine()
    note = (
        f"Loaded with float16 for what stays float; {machine['processor']} ({machine['instruction_sets']}), "
        f"{machine['threads']} threads, torch {machine['torch']}, {datetime.date.today().isoformat()}."
    )
    head, rest = RESULTS.read_text(encoding="utf-8").split(BEGIN)
    table = "\n".join(lines)
    RESULTS.write_text(f"{head}{BEGIN}\n{note}\n\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
