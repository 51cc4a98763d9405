"""Quantization of the trained zoo pipelines, every method at every width: quality, bytes, as one table.

    python benchmarks/ptq_study.py                     # everything; goes on where it stopped
    python benchmarks/ptq_study.py --num 100 --zoo digits-dit --row W4

Every row is `dacc quantize` with the options in `ROWS`, sampled from the same noise as the full-precision pipeline.
Samples are kept in --work, so an interrupted study goes on with the next row. The tables are written into
docs/results.md between the marks of each pipeline. Text pipelines are asked for the zoo's evaluation prompts.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dacc.core.config import build_config
from dacc.core.machine import describe_machine
from dacc.core.manifest import read_manifest
from dacc.core.pipeline import denoiser_names
from dacc.core.reporter import Reporter
from dacc.core.seeds import seed_stream
from dacc.core.source import resolve_source
from dacc.core.tensor_file import stored_tensors, tensor_bytes
from dacc.core.zoo import zoo_entry
from dacc.evaluate.grid import write_grid
from dacc.evaluate.judge import load_judge
from dacc.evaluate.quality import measure_quality
from dacc.evaluate.result import Metric
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig
from dacc.runtime.compare import Samples
from dacc.runtime.load import load_source
from dacc.runtime.trajectory import RunRequest, sample

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results.md"
PICTURES = RESULTS.parent / "images"
DRAWN = ("full precision", "W4", "W4 gptq", "W2", "W2 gptq")  # rows of the picture
COLUMNS = 10
PIPELINES = ("digits-unet", "digits-dit", "shapes-sd", "shapes-mmdit")
COLUMN_ORDER = (
    "class_accuracy",
    "class_agreement",
    "caption_accuracy",
    "shape_accuracy",
    "relation_accuracy",
    "relative_l2",
    "psnr",
    "ssim",
    "fid",
)
ROWS: dict[str, dict[str, Any]] = {  # name -> options of `dacc quantize`; rtn where no method is named
    "W8": {"bits": 8},
    "W8A8": {"bits": 8, "act_bits": 8},
    "W8A8 gptq": {"bits": 8, "act_bits": 8, "method": "gptq"},
    "W6": {"bits": 6},
    "W4": {"bits": 4},
    "W4 gptq": {"bits": 4, "method": "gptq"},
    "W4A8": {"bits": 4, "act_bits": 8},
    "W4A8 gptq": {"bits": 4, "act_bits": 8, "method": "gptq"},
    "W3": {"bits": 3},
    "W3 gptq": {"bits": 3, "method": "gptq"},
    "W2": {"bits": 2},
    "W2 gptq": {"bits": 2, "method": "gptq"},
}


def main() -> None:
    """Sample what is missing, then write the tables."""
    options = _parse()
    torch.set_num_threads(options.threads)
    reporter = Reporter()
    for name in options.zoo or PIPELINES:
        rows = {row: ROWS[row] for row in options.row or ROWS}
        entry = zoo_entry(name)
        request = RunRequest(
            seeds=seed_stream("evaluation", 0, options.num),
            num_inference_steps=options.steps or entry.num_inference_steps,
            batch_size=options.batch_size,
        ).with_zoo_defaults(entry)
        work = options.work / name / _fingerprint(name, request)
        sets = [_samples(f"zoo:{name}", work / "float", request, reporter)]
        sizes = [_float_share(name)]
        for row, settings in rows.items():
            bundle = quantize_pipeline(
                f"zoo:{name}",
                build_config(QuantizeConfig, measure="never", **settings),
                output=work / row.replace(" ", "-"),
                reporter=reporter,
            )
            sets.append(_samples(str(bundle), work / f"{row.replace(' ', '-')}-samples", request, reporter))
            sizes.append(_share(bundle))
        judge = load_judge(entry)
        results = measure_quality(sets, request, judge)
        table = _table(["full precision", *rows], sizes, results)
        _write(name, request, table, judge.facts if judge else {})
        _draw(name, dict(zip(["full precision", *rows], sets, strict=True)), results)
        print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=500, help="images per row")
    parser.add_argument("--steps", type=int, help="solver steps; default: the zoo's own")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--zoo", action="append", choices=PIPELINES, help="repeatable; default: all")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="repeatable; default: all")
    parser.add_argument("--work", type=Path, default=Path(".work/study"))
    return parser.parse_args()


def _fingerprint(name: str, request: RunRequest) -> str:
    """Samples are kept per weights and request."""
    source = resolve_source(f"zoo:{name}", reporter=Reporter(quiet=True))
    weights = [file.stat().st_size for file in sorted(source.path.rglob("*.safetensors"))]
    digest = hashlib.sha256(f"{weights}{request.model_dump_json()}".encode())
    for file in sorted(source.path.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _samples(source: str, cache: Path, request: RunRequest, reporter: Reporter) -> Samples:
    """Sampled once, then read from disk."""
    file = cache.with_suffix(".safetensors")
    if not file.is_file():
        reporter.say(f"sampling {source}")
        pipe = load_source(resolve_source(source, reporter=reporter), device="cpu", reporter=reporter)
        found = sample(pipe, request, reporter=reporter)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": found.latents, "images": found.images}, file.with_suffix(".partial"))
        file.with_suffix(".partial").rename(file)
    return Samples(**load_file(file))


def _share(bundle: Path) -> float:
    """Bytes of the denoiser against float32."""
    manifest = read_manifest(bundle)
    assert manifest is not None
    (record,) = manifest.components.values()
    return record.bytes_after / record.bytes_fp32


def _float_share(name: str) -> float:
    """The same for the float source."""
    folder = zoo_entry(name).path
    (component,) = denoiser_names(folder)
    stored = stored_tensors(folder / component).values()
    return sum(map(tensor_bytes, stored)) / (4 * sum(prod(tensor.shape) for tensor in stored))


def _table(names: list[str], sizes: list[float], results: list[dict[str, Metric]]) -> str:
    columns = [key for key in COLUMN_ORDER if key in results[1]]
    lines = ["| | bytes / float32 | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, size, result in zip(names, sizes, results, strict=True):
        cells = [_cell(result.get(column)) for column in columns]
        lines.append(f"| {name} | {size:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(name: str, sets: dict[str, Samples], results: list[dict[str, Metric]]) -> None:
    """The first images of some rows, one above the other, from the same noise."""
    rows = [
        (row, f"PSNR {result['psnr'].value:.1f} dB" if "psnr" in result else "", samples.images[:COLUMNS])
        for (row, samples), result in zip(sets.items(), results, strict=True)
        if row in DRAWN
    ]
    PICTURES.mkdir(exist_ok=True)
    write_grid(rows, PICTURES / f"{name}.png")


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    interval = f" [{metric.low:.4g}, {metric.high:.4g}]" if metric.low is not None else ""
    return f"{metric.value:.4g}{interval}"


def _write(name: str, request: RunRequest, table: str, facts: dict[str, Any]) -> None:
    """Put the table between the marks of this pipeline in docs/results.md."""
    begin, end = f"<!-- ptq:{name} -->", f"<!-- /ptq:{name} -->"
    half = facts.get("fid_between_halves")
    machine = describe_machine()
    note = (
        f"{len(request.seeds)} images, {request.num_inference_steps} steps, "
        f"guidance {request.guidance_scale or 'none'}, float32 arithmetic; "
        f"{machine['processor']} ({machine['instruction_sets']}), torch {machine['torch']}, "
        f"{datetime.date.today().isoformat()}. Brackets: 95 % intervals."
        + (f" FID between two halves of the real images: {half:.3g}." if half else "")
    )
    text = RESULTS.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    RESULTS.write_text(f"{head}{begin}\n{note}\n\n{table}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
