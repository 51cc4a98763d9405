"""Bytes of quantized denoisers: on disk against float32, and in memory after loading against disk.

    python benchmarks/sizes.py                  # DiT-XL/2 (random weights, 750 M parameters) and the zoo's digits-dit

DiT-XL/2 comes from benchmarks/full_size.py; its size does not depend on the values of its weights. The table is written
into docs/results.md.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from pathlib import Path

import torch

from dacc.benchmarks.full_size import make_pipeline_folder
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
        dit_xl = make_pipeline_folder("dit-xl", Path(folder) / "dit-xl", dtype=torch.float16)
        sources = {"DiT-XL/2": str(dit_xl), "digits-dit": "zoo:digits-dit"}
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
