"""What an evaluation or an inspection looks like to a person, and on disk. Human units live here and in `table.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .result import Evaluation, Metric, SourceReport
from .table import human_bytes, human_count, human_seconds, print_table

if TYPE_CHECKING:
    from .inspection import Inspection

JSON_NAME, PICTURE_NAME = "evaluation.json", "samples.png"
TITLES = {  # metric -> what a person reads, in this order
    "relative_l2": "relative L2 of latents",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "fid": "FID (judge)",
    "frechet_video": "Frechet video distance (judge)",
    "class_accuracy": "class accuracy",
    "class_agreement": "class agreement",
    "caption_accuracy": "whole caption right",
    "relation_accuracy": "  relation right",
    "shape_accuracy": "  both shapes right",
    "colour_accuracy": "  both colours right",
    "size_accuracy": "  both sizes right",
    "digit_accuracy": "  frames with the right digit",
    "motion_accuracy": "  moving the right way",
}
SHARES = ("_accuracy", "_agreement")  # endings of metrics that are shares of images
MISSING = "-"


def print_evaluation(evaluation: Evaluation) -> None:
    """The table on stdout, and below it what to keep in mind."""
    settings = evaluation.settings
    title = f"{settings.num} images, {settings.steps} steps of {settings.scheduler}, {settings.device} {settings.dtype}"
    headers = ["", *(report.name + " (reference)" * report.is_reference for report in evaluation.sources)]
    print_table(title, headers, evaluation_rows(evaluation))
    for line in remarks(evaluation):
        print(line)


def evaluation_rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows of the table: a quantity and its value for every source."""
    reports = evaluation.sources
    rows: list[list[str]] = []
    names = dict.fromkeys(name for report in reports for name in report.metrics)
    for name in sorted(names, key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES)):
        rows.append([TITLES.get(name, name), *(_metric(name, report.metrics.get(name)) for report in reports)])
        if any(report.metrics[name].worst is not None for report in reports if name in report.metrics):
            rows.append(["  worst image", *(_worst(report.metrics.get(name)) for report in reports)])
    for component in dict.fromkeys(name for report in reports for name in report.components):
        rows.append([f"{component} on disk", *_sizes(evaluation, component, "bytes_on_disk")])
        rows.append([f"{component} in memory", *_sizes(evaluation, component, "bytes_in_memory")])
    for title, cell in (("time per image", _time), ("speed-up", _speedup), ("peak memory of a run", _memory)):
        cells = [cell(report) for report in reports]
        if set(cells) != {MISSING}:
            rows.append([title, *cells])
    return rows


def remarks(evaluation: Evaluation) -> list[str]:
    """Lines below the table."""
    lines = ["In brackets: 95 % intervals over images; for times the fastest and slowest repeat."]
    halves = evaluation.judge_fid_between_halves
    distances = {name for report in evaluation.sources for name in report.metrics} & {"fid", "frechet_video"}
    if halves is not None and distances:
        what, of = ("The Frechet video distance", "clips") if "frechet_video" in distances else ("FID", "images")
        lines.append(f"{what} uses {evaluation.judge}: real {of} against real {of} give {halves:.3g}.")
    noted: dict[str, dict[str, None]] = {}  # note -> the titles that it belongs to, each once and in order
    for name, metric in ((name, metric) for report in evaluation.sources for name, metric in report.metrics.items()):
        if metric.note:
            noted.setdefault(metric.note, {})[TITLES.get(name, name).strip()] = None
    lines += [f"{', '.join(titles)}: {note}." for note, titles in noted.items()]
    if memory := next((report.memory for report in evaluation.sources if report.memory), None):
        baseline = human_bytes(memory.baseline_bytes)
        lines.append(f"Peak memory includes the interpreter and libraries (about {baseline} before loading).")
    return lines + [f"Not measured: {reason}" for reason in evaluation.absent]


def write_json(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.json."""
    (folder / JSON_NAME).write_text(evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8")


def row_label(report: SourceReport) -> tuple[str, str]:
    """Two lines beside a source's images."""
    if report.is_reference:
        return report.name, "reference"
    metric = report.metrics.get("psnr")
    return report.name, f"PSNR {metric.value:.1f} dB" if metric else ""


def print_inspection(inspection: Inspection) -> None:
    """The tables of `dacc inspect` on stdout."""
    headers = ["component", "class", "parameters", "on disk", "MACs per call", "time per call"]
    rows = [
        [
            name,
            component.class_name,
            human_count(component.parameters) if component.parameters else MISSING,
            human_bytes(component.bytes_on_disk) if component.bytes_on_disk else MISSING,
            human_count(component.macs_per_call) if component.macs_per_call else MISSING,
            human_seconds(component.seconds_per_call) if component.seconds_per_call else MISSING,
        ]
        for name, component in inspection.components.items()
    ]
    print_table(f"{inspection.identity}: {inspection.pipeline}", headers, rows)
    for name, component in inspection.components.items():
        if component.blocks:
            blocks = [
                [
                    block.name,
                    block.class_name,
                    human_count(block.parameters),
                    *map(_share, (block.parameter_share, block.time_share)),
                ]
                for block in component.blocks
            ]
            print_table(f"\n{name}: blocks", ["block", "class", "parameters", "share", "time"], blocks)
        if component.quantizable:
            kinds = [
                [kind, str(row.layers), *map(human_bytes, (row.bytes_now, row.bytes_at_8_bits, row.bytes_at_4_bits))]
                for kind, row in component.quantizable.items()
            ]
            print_table(
                f"\n{name}: what quantize could do", ["layers", "count", "now", "at 8 bits", "at 4 bits"], kinds
            )
        if component.pruning:
            print(f"\n{name} is pruned: {component.pruning}.")
        if component.quantization:
            print(f"\n{name} is quantized: {component.quantization}.")
    for options, products in inspection.products.items():
        print(f"{options} would run here as {products}")
    for reason in inspection.absent:
        print(f"Not measured: {reason}")


def _metric(name: str, metric: Metric | None) -> str:
    if metric is None:
        return MISSING
    show: Callable[[float], str] = _share if name.endswith(SHARES) else lambda value: f"{value:.3g}"
    interval = (
        f" [{show(metric.low)}, {show(metric.high)}]" if metric.low is not None and metric.high is not None else ""
    )
    return show(metric.value) + interval


def _worst(metric: Metric | None) -> str:
    return MISSING if metric is None or metric.worst is None else f"{metric.worst:.3g}"


def _sizes(evaluation: Evaluation, component: str, field: str) -> list[str]:
    first = evaluation.reference.components.get(component)
    cells = []
    for report in evaluation.sources:
        size = report.components.get(component)
        if size is None:
            cells.append(MISSING)
        elif first is None or report.is_reference:
            cells.append(human_bytes(getattr(size, field)))
        else:
            cells.append(
                f"{human_bytes(getattr(size, field))} ({getattr(first, field) / getattr(size, field):.3g}x less)"
            )
    return cells


def _time(report: SourceReport) -> str:
    if report.speed is None:
        return MISSING
    speed = report.speed
    low, high = human_seconds(speed.seconds_low), human_seconds(speed.seconds_high)
    return f"{human_seconds(speed.seconds_per_image)} [{low}, {high}]"


def _speedup(report: SourceReport) -> str:
    speed = report.speed
    if speed is None or speed.speedup is None:
        return MISSING
    return f"{speed.speedup:.3g}x [{speed.speedup_low:.3g}, {speed.speedup_high:.3g}]"


def _memory(report: SourceReport) -> str:
    return human_bytes(report.memory.peak_bytes) if report.memory else MISSING


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"
