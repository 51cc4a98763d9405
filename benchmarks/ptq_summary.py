"""What the README says of the quantization study: defaults beside the best of the peers. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from dacc.benchmarks.ptq_cells import Cell, Study
from dacc.benchmarks.ptq_rows import SETTINGS
from dacc.benchmarks.ptq_table import error_of
from dacc.benchmarks.study import ROOT, write_between

README = ROOT / "README.md"
SHOWN = ("W8A16", "W4A16", "W8A8", "W4A8")
DEFAULTS = {"rtn (defaults)": "", "gptq (defaults)": " --method gptq"}  # row -> its options beside the bits

LEEWAY = 0.1  # by which the bytes of a peer of our size may exceed ours


def write_summary(file: Path, study: Study, pipelines: Sequence[str]) -> None:
    """Put the table between the marks of the README."""
    write_between(file, "ptq", {"readme": summary_block(study, pipelines)})


def summary_block(study: Study, pipelines: Sequence[str]) -> str:
    """Relative L2 of our defaults and of the best peers, a column for each pipeline; empty where there is no cell."""
    lines = [f"| | {' | '.join(pipelines)} |", "|---" * (len(pipelines) + 1) + "|"]
    for setting in SHOWN:
        bits = SETTINGS[setting]
        asked = f"--bits {bits['bits']}" + (f" --act-bits {bits['act_bits']}" if "act_bits" in bits else "")
        for row, options in DEFAULTS.items():
            lines.append(_line(f"`{asked}{options}`", study, pipelines, setting, partial(_named, row)))
        lines.append(_line(f"{setting}, best peer", study, pipelines, setting, _best_peer))
        lines.append(_line(f"{setting}, best peer of that size", study, pipelines, setting, _best_peer_of_our_size))
    return "\n".join(lines)


def _line(
    head: str,
    study: Study,
    pipelines: Sequence[str],
    setting: str,
    choose: Callable[[list[Cell]], Cell | None],
) -> str:
    shown = []
    for pipeline in pipelines:
        cells = [cell for cell in study.of(pipeline) if cell.setting == setting and "relative_l2" in cell.metrics]
        shown.append(_told(choose(cells)))
    return f"| {head} | {' | '.join(shown)} |"


def _told(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    who = f" {cell.row.partition(' (')[0]}" if cell.peer else ""
    size = "" if cell.bytes_per_float32 is None else f" ({cell.bytes_per_float32:.3f})"
    return f"{error_of(cell):.4g}{who}{size}"


def _named(row: str, cells: Iterable[Cell]) -> Cell | None:
    return next((cell for cell in cells if cell.row == row), None)


def _best_peer(cells: Iterable[Cell]) -> Cell | None:
    return min((cell for cell in cells if cell.peer), key=error_of, default=None)


def _best_peer_of_our_size(cells: Sequence[Cell]) -> Cell | None:
    ours = [cell.bytes_per_float32 or 0.0 for cell in cells if cell.row in DEFAULTS]
    return _best_peer(
        cell for cell in cells if (cell.bytes_per_float32 or 1.0) <= (1 + LEEWAY) * max(ours, default=0.0)
    )
