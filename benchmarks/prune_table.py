"""The study of pruning as tables for docs/results.md, from its JSON alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dacc.benchmarks.prune_rows import CUTS, ROWS, VIDEOS, WHOLE, PruneCell, PruneStudy
from dacc.benchmarks.ptq_table import figure, heading
from dacc.benchmarks.study import write_between
from dacc.evaluate.table import human_bytes, human_seconds

JUDGED = (
    "class_agreement",
    "class_accuracy",
    "digit_accuracy",
    "motion_accuracy",
    "caption_accuracy",
    "shape_accuracy",
)
COLUMNS = ("cut", "row", "parameters", "size", "MACs", "speed-up", "relative L2", "PSNR")
DISTANCES = {False: ("FID", "fid"), True: ("Frechet video distance", "frechet_video")}  # of images, of clips
AFTER = ("output error", "updates", "training", "seconds")


def write_prune_tables(file: Path, study: PruneStudy, pipelines: Iterable[str], facts: dict[str, str]) -> list[str]:
    """Put the tables between the marks of their pipelines; those without cells stay as they are.

    Args:
        facts: pipeline -> what to say of its request above the table.

    Returns:
        The pipelines that were written.
    """
    wanted = [name for name in pipelines if study.of(name)]
    return write_between(file, "prune", {name: prune_block(study.of(name), facts.get(name, "")) for name in wanted})


def prune_block(cells: Sequence[PruneCell], facts: str) -> str:
    """Line above, table."""
    videos = cells[0].pipeline in VIDEOS
    title, distance = DISTANCES[videos]
    judged = [name for name in JUDGED if any(name in cell.metrics for cell in cells)]
    columns = [*COLUMNS, *judged, title, f"{title} / float", *AFTER]
    judged += [distance, f"{distance}_ratio"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_row(cell, judged)) + " |" for cell in sorted(cells, key=_order)]
    return "\n\n".join([heading(cells, facts, what="clips" if videos else "images"), "\n".join(lines)])


def _row(cell: PruneCell, judged: Sequence[str]) -> list[str]:
    if not cell.measured:
        return [
            cell.cut,
            cell.row,
            cell.status.replace("|", "/"),
            *[""] * (len(COLUMNS) + len(judged) + len(AFTER) - 3),
        ]
    trained = f"{cell.error_before:.4g} -> {cell.error_after:.4g}" if cell.error_after is not None else "-"
    return [
        cell.cut,
        cell.row,
        _share(cell.parameter_share),
        "-" if cell.weight_bytes is None else human_bytes(cell.weight_bytes),
        _share(cell.macs_share),
        "-" if cell.speedup is None else f"{cell.speedup:.2f}",
        figure(cell.metrics.get("relative_l2")),
        figure(cell.metrics.get("psnr"), interval=False),
        *(figure(cell.metrics.get(name)) for name in judged),
        trained,
        "-" if cell.updates is None else f"{cell.updates:,}",
        "-" if cell.training_seconds is None else human_seconds(cell.training_seconds),
        "-" if cell.seconds is None else human_seconds(cell.seconds),
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _order(cell: PruneCell) -> tuple[int, int]:
    cuts, rows = ["-", *CUTS], [WHOLE, *ROWS]
    return (
        cuts.index(cell.cut) if cell.cut in cuts else len(cuts),
        rows.index(cell.row) if cell.row in rows else len(rows),
    )
