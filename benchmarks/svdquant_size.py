"""Time and memory of `dacc quantize --method svdquant` at the size of PixArt-XL: 28 blocks, 610 M random weights in
bfloat16, some channels with outliers.

    python benchmarks/svdquant_size.py --work FOLDER              # all stages; again: those that are not finished
    python benchmarks/svdquant_size.py --work FOLDER --depth 2 --calls 8    # a trial

Stages: make (the pipeline), calibrate (64 denoiser calls at 256 tokens, in bfloat16), full (svdquant on this set) and
data-free. Each runs in a process of its own, whose minutes and peak memory it reports; a quantization that was stopped
goes on at its last finished layer, and reports the minutes of its last run only. Targets, on two cores: 40 minutes and
6 GB for `full`, 8 minutes for `data-free`. Heavy imports lie in the stages: the process that starts them needs none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

MODEL = "pixart-xl"
DEPTH = 28
STEPS = 4  # calls of one run; without guidance each has one row
PIXELS = 256  # 16 x 16 tokens
OUTLIERS, SIZE = 6, 30.0  # channels, and how much larger they are
CACHE_GB = 1.0
REPORT = "report.json"


@torch.no_grad()
def plant_(transformer: nn.Module, *, channels: int = OUTLIERS, size: float = SIZE, seed: int = 0) -> None:
    """Let some channels of what attention and feed-forward parts of PixArt blocks read be `size` times as large."""
    generator = torch.Generator().manual_seed(seed)
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        for scale in (1, 4):  # rows of the table that scale the inputs of attention and of the feed-forward part
            chosen = torch.randperm(block.scale_shift_table.shape[1], generator=generator)[:channels]
            block.scale_shift_table[scale, chosen] += size


def make(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    from diffusers import PixArtTransformer2DModel

    from dacc.benchmarks.full_size import make_pipeline_folder

    folder = make_pipeline_folder(MODEL, work / "pipeline", depth=options.depth)
    # its pipeline takes the size nearest to the asked one out of a list that belongs to this number
    transformer = PixArtTransformer2DModel.from_pretrained(
        folder / "transformer", dtype=torch.bfloat16, sample_size=PIXELS // 8
    )
    plant_(transformer)
    transformer.save_pretrained(folder / "transformer")
    return {"parameters": sum(parameter.numel() for parameter in transformer.parameters())}


def calibrate(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    from dacc.calibrate.api import calibrate_pipeline
    from dacc.calibrate.config import CalibrateConfig
    from dacc.calibrate.store import open_calibration
    from dacc.core.reporter import Reporter

    config = CalibrateConfig(
        strategy="every-step",
        samples=options.calls // STEPS,
        steps=STEPS,
        batch_size=1,
        guidance_scale=1.0,
        height=PIXELS,
        width=PIXELS,
    )
    reporter, place = Reporter(), {"output": work / "set", "overwrite": True, "device": "cpu"}
    calibrate_pipeline(work / "pipeline", config, dtype=options.dtype, reporter=reporter, **place)
    latents = next(iter(open_calibration(work / "set"))).args[0]
    assert latents.shape[-1] == PIXELS // 8, f"{latents.shape[-1]} x {latents.shape[-1]} latents were made"
    return {"notices": reporter.notices}


def full(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    return _quantize(work, options, "full", {})


def data_free(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    return _quantize(work, options, "data-free", {"data_free": True})


def _quantize(work: Path, options: argparse.Namespace, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    from dacc.core.config import build_config
    from dacc.core.manifest import read_manifest
    from dacc.core.reporter import Reporter
    from dacc.quant.api import quantize_pipeline
    from dacc.quant.config import QuantizeConfig

    config = build_config(
        QuantizeConfig,
        method="svdquant",
        bits=options.bits,
        act_bits=options.act_bits,
        cache_gb=CACHE_GB,
        measure="never",
        settings={"rank": options.rank, **settings},
    )
    calib = None if settings else work / "set"
    bundle = quantize_pipeline(
        work / "pipeline", config, calib=calib, output=work / name, overwrite=True, device="cpu", reporter=Reporter()
    )
    manifest = read_manifest(bundle)
    assert manifest is not None
    record = manifest.components["transformer"]
    return {"bytes_per_float32": record.bytes_after / record.bytes_fp32, "notices": manifest.passes[-1].notices}


Stage = Callable[[Path, argparse.Namespace], dict[str, Any]]
STAGES: dict[str, Stage] = {"make": make, "calibrate": calibrate, "full": full, "data-free": data_free}


def run_stage(name: str, options: argparse.Namespace) -> None:
    """One stage in this process; its figures go into the report."""
    from dacc.evaluate.memory import peak_resident_bytes

    started, used = time.time(), time.process_time()
    found = STAGES[name](options.work, options)
    found |= {
        "minutes": (time.time() - started) / 60,
        "processor_minutes": (time.process_time() - used) / 60,
        "peak_gb": peak_resident_bytes() / 1e9,
    }
    _write(options.work, read_report(options.work) | {name: found | asked(options)})


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on."""
    return {name: getattr(options, name) for name in ("depth", "calls", "dtype", "bits", "act_bits", "rank", "threads")}


def read_report(work: Path) -> dict[str, Any]:
    """Stage -> its figures; empty at first."""
    file = work / REPORT
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _write(work: Path, report: dict[str, Any]) -> None:
    partial = work / f".{REPORT}"
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, work / REPORT)


def unfinished(options: argparse.Namespace) -> list[str]:
    """Stages that have no figures for these options, in order."""
    report = read_report(options.work)
    return [name for name in STAGES if not asked(options).items() <= report.get(name, {}).items()]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the pipeline, the set and the results")
    parser.add_argument("--depth", type=int, default=DEPTH, help="blocks")
    parser.add_argument("--calls", type=int, default=64, help=f"denoiser calls that are looked at, {STEPS} or more")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16",
        help="of the calls; float32 for processors without bfloat16 arithmetic, which take many times as long for it",
    )  # fmt: skip
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--rank", default="32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage:
        torch.set_num_threads(options.threads)
        run_stage(options.stage, options)
        return
    for name in unfinished(options):
        words = [f"--{word.replace('_', '-')}={value}" for word, value in asked(options).items()]
        command = [sys.executable, "-P", "-m", "dacc.benchmarks.svdquant_size", f"--work={options.work}", *words]
        subprocess.run([*command, f"--stage={name}"], check=True)
    from dacc.core.machine import describe_machine

    print(*(f"{name} {fact}" for name, fact in describe_machine().items()), sep=" · ")
    print(f"{options.depth} blocks, W{options.bits}A{options.act_bits}, rank {options.rank}, {options.threads} threads")
    print("| stage | minutes | processor minutes | peak GB |\n|---|---|---|---|")
    for name, found in read_report(options.work).items():
        print(f"| {name} | {found['minutes']:.1f} | {found['processor_minutes']:.1f} | {found['peak_gb']:.2f} |")


if __name__ == "__main__":
    main()
