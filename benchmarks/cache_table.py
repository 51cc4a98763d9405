"""The study of cache plans as tables for docs/results.md, from its JSON alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dacc.benchmarks.cache_cells import CacheCell, CacheStudy
from dacc.benchmarks.cache_rows import CACHE_PEERS, FEWER, ROWS, SOURCES, TARGETS
from dacc.benchmarks.ptq_table import figure, heading
from dacc.benchmarks.study import write_between
from dacc.evaluate.table import human_seconds

NO_PLAN = "no plan"
JUDGED = ("class_agreement", "caption_accuracy")
COLUMNS = ("source", "target", "row", "MACs", "speed-up", "relative L2", "PSNR")
NAIVE = ("even", "power law", *FEWER)  # what a search has to beat


def write_cache_tables(file: Path, study: CacheStudy, pipelines: Iterable[str], facts: dict[str, str]) -> list[str]:
    """Put the tables between the marks of their pipelines; those without cells stay as they are.

    Args:
        facts: pipeline -> what to say of its request above the table.

    Returns:
        The pipelines that were written.
    """
    wanted = [name for name in pipelines if study.of(name)]
    return write_between(file, "cache", {name: cache_block(study.of(name), facts.get(name, "")) for name in wanted})


def cache_block(cells: Sequence[CacheCell], facts: str) -> str:
    """Line above, table, lines below."""
    judged = [name for name in JUDGED if any(name in cell.metrics for cell in cells)]
    columns = [*COLUMNS, *judged, "FID", "FID / float", "seconds"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_row(cell, judged)) + " |" for cell in sorted(cells, key=_order)]
    below = [f"- {line}" for line in _comparisons(cells)]
    return "\n\n".join([heading(cells, facts), "\n".join(lines), *(["\n".join(below)] if below else [])])


def _row(cell: CacheCell, judged: Sequence[str]) -> list[str]:
    head = [cell.source, cell.target, cell.row]
    if not cell.measured:
        return [*head, cell.status.replace("|", "/"), *[""] * (6 + len(judged))]
    return [
        *head,
        "-" if cell.macs_ratio is None else f"{cell.macs_ratio:.3f}",
        "-" if cell.speedup is None else f"{cell.speedup:.2f}",
        figure(cell.metrics.get("relative_l2")),
        figure(cell.metrics.get("psnr"), interval=False),
        *(figure(cell.metrics.get(name)) for name in judged),
        figure(cell.metrics.get("fid")),
        figure(cell.metrics.get("fid_ratio")),
        "-" if cell.seconds is None else human_seconds(cell.seconds),
    ]


def _order(cell: CacheCell) -> tuple[int, int, int]:
    places = [list(SOURCES), [*("-",), *TARGETS], [NO_PLAN, *FEWER, *CACHE_PEERS, *ROWS]]
    found = zip(places, (cell.source, cell.target, cell.row), strict=True)
    source, target, row = (names.index(name) if name in names else len(names) for names, name in found)
    return source, target, row


def _comparisons(cells: Sequence[CacheCell]) -> list[str]:
    """For each source and target the best searched plan beside the best that looks at nothing, and the best peer."""
    lines = []
    for source in SOURCES:
        for target in TARGETS:
            here = [
                cell
                for cell in cells
                if (cell.source, cell.target) == (source, target) and "relative_l2" in cell.metrics
            ]
            others = (NAIVE, tuple(CACHE_PEERS))
            searched = _best(cell for cell in here if not any(cell.row in rows for rows in others))
            beside = [found for rows in others if (found := _best(cell for cell in here if cell.row in rows))]
            if searched and beside:
                shares = [
                    f"{_error(searched) / _error(found):.2f} times {found.row} with {_ratio_of(found)}"
                    for found in beside
                ]
                own = f"{searched.row} at {_error(searched):.4g} with {_ratio_of(searched)} of the MACs"
                lines.append(f"{source}, {target}: {own}, {' and '.join(shares)}.")
    return lines


def _best(cells: Iterable[CacheCell]) -> CacheCell | None:
    return min(cells, key=_error, default=None)


def _ratio_of(cell: CacheCell) -> str:
    return "?" if cell.macs_ratio is None else f"{cell.macs_ratio:.3f}"


def _error(cell: CacheCell) -> float:
    return max(cell.metrics["relative_l2"].value, 1e-12)
