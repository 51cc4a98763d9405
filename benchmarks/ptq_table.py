"""The quantization study as tables for docs/results.md, from its JSON alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dacc.benchmarks.ptq_cells import FLOAT_ROW, FLOAT_SETTING, Cell, Study
from dacc.benchmarks.ptq_rows import ROWS, SETTINGS
from dacc.benchmarks.study import write_between
from dacc.evaluate.result import Metric
from dacc.evaluate.table import human_bytes, human_seconds

JUDGED = ("class_accuracy", "class_agreement", "caption_accuracy")
SHARE_STEP = 0.01  # peers within it treat the same layers


def write_tables(file: Path, study: Study, pipelines: Iterable[str], facts: dict[str, str]) -> list[str]:
    """Put the tables between the marks of their pipelines; those without cells stay as they are.

    Args:
        facts: pipeline -> what to say of its request above the table.

    Returns:
        The pipelines that were written.
    """
    wanted = [name for name in pipelines if study.of(name)]
    return write_between(file, "ptq", {name: pipeline_block(study, name, facts.get(name, "")) for name in wanted})


def pipeline_block(study: Study, pipeline: str, facts: str) -> str:
    """Line above, table, lines below."""
    cells = study.of(pipeline)
    below = [*_comparisons(cells), *_unequal_layers(cells), *_peer_notices(cells), *_problems(cells)]
    parts = [heading(cells, facts), _table(cells, _missing(study, pipeline))]
    return "\n\n".join([*parts, *(["\n".join(f"- {line}" for line in below)] if below else [])])


def heading(cells: Sequence[Cell], facts: str, *, what: str = "images") -> str:
    """Counts, machine, dates."""
    measured = [cell for cell in cells if cell.measured]
    seeds = sorted({cell.seeds for cell in measured if cell.seeds})
    fid = sorted({cell.fid_samples for cell in measured if cell.fid_samples})
    machines = sorted({_machine(cell) for cell in measured if cell.machine})
    dates = sorted({cell.date for cell in measured if cell.date})
    steps = sorted({cell.steps for cell in measured if cell.steps})
    counts = f"{_either(seeds)} {what} against the float pipeline's from the same noise, {_either(steps)} steps"
    if fid:
        counts += f"; FID and the judge's column from {_either(fid)} images where FID is given, else from the first"
    when = dates[0] if len(set(dates)) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
    return (
        "; ".join(part for part in (counts, facts, "; ".join(machines), when) if part) + ". Brackets: 95 % intervals."
    )


def _table(cells: Sequence[Cell], missing: dict[str, list[str]]) -> str:
    judged = [name for name in JUDGED if any(name in cell.metrics for cell in cells)]
    columns = [
        "setting",
        "row",
        "bytes / float32",
        "relative L2",
        "PSNR",
        *judged,
        "FID",
        "FID / float",
        "seconds",
        "peak memory",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for setting in (FLOAT_SETTING, *SETTINGS):
        for cell in _ordered([cell for cell in cells if cell.setting == setting]):
            lines.append("| " + " | ".join(_row(cell, judged)) + " |")
        if names := missing.get(setting):
            lines.append(f"| {setting} | {', '.join(names)} | not measured yet |" + " |" * (len(columns) - 3))
    return "\n".join(lines)


def _row(cell: Cell, judged: Sequence[str]) -> list[str]:
    head = [cell.setting, _label(cell)]
    if not cell.measured:
        return [*head, cell.status.replace("|", "/"), *[""] * (6 + len(judged))]
    return [
        *head,
        "-" if cell.bytes_per_float32 is None else f"{cell.bytes_per_float32:.3f}",
        figure(cell.metrics.get("relative_l2")),
        figure(cell.metrics.get("psnr"), interval=False),
        *(figure(cell.metrics.get(name)) for name in judged),
        figure(cell.metrics.get("fid")),
        figure(cell.metrics.get("fid_ratio")),
        "-" if cell.seconds is None else human_seconds(cell.seconds),
        "-" if cell.peak_bytes is None else human_bytes(cell.peak_bytes),
    ]


def _label(cell: Cell) -> str:
    """Peers are marked, with the shares of the parameters that they treated."""
    if not cell.peer:
        return cell.row
    shares = "" if cell.weight_share is None else f"; weights {cell.weight_share:.3f}"
    if cell.input_share is not None and not cell.setting.endswith("A16"):
        shares += f", inputs {cell.input_share:.3f}"
    name, _, variant = cell.row.partition(" (")
    variant = f"{variant.removesuffix(')')}; " if variant else ""
    return f"{name} {cell.options.get('format', '')} (peer; {variant}{shares.removeprefix('; ')})".replace("; )", ")")


def figure(metric: Metric | None, *, interval: bool = True) -> str:
    if metric is None:
        return "-"
    if not interval or metric.low is None:
        return f"{metric.value:.4g}"
    return f"{metric.value:.4g} [{metric.low:.4g}, {metric.high:.4g}]"


def _ordered(cells: Iterable[Cell]) -> list[Cell]:
    """Ours as in the table of rows, then peers."""
    names = [FLOAT_ROW, *ROWS]
    return sorted(cells, key=lambda cell: (cell.peer, names.index(cell.row) if cell.row in names else 99, cell.row))


def _missing(study: Study, pipeline: str) -> dict[str, list[str]]:
    """Setting -> our rows that have no cell."""
    return {
        setting: [
            name
            for name, row in ROWS.items()
            if row.is_for(pipeline, setting) and not row.swept and not study.find(pipeline, setting, name)
        ]
        for setting in SETTINGS
    }


def _comparisons(cells: Sequence[Cell]) -> list[str]:
    """For each setting the best of ours beside the best peer."""
    lines = []
    for setting in SETTINGS:
        here = [cell for cell in cells if cell.setting == setting and cell.measured and "relative_l2" in cell.metrics]
        ours = sorted((cell for cell in here if not cell.peer), key=error_of)
        peers = sorted((cell for cell in here if cell.peer), key=error_of)
        if not ours or not peers:
            continue
        whole = _those_that_treat_most(peers)[0]
        lines.append(f"{setting}, best peer: {_beside(ours, peers[0])}")
        if whole is not peers[0]:
            lines.append(f"{setting}, best peer of those that treat most: {_beside(ours, whole)}")
    return lines


def _beside(ours: Sequence[Cell], peer: Cell) -> str:
    """Our best, and where that takes more bytes than the peer, also our best within the peer's bytes."""
    best = ours[0]
    text = f"{_label(peer)} at {_told(peer)}; best of ours: {best.row} at {_told(best)}, {_ratio(best, peer)}"
    fits = next((cell for cell in ours if _no_larger(cell, peer)), None)
    if _no_larger(best, peer):
        return f"{text}, bytes no larger."
    if fits is None:
        return f"{text}, bytes larger; none of ours takes as few."
    return f"{text}, bytes larger; of those no larger: {fits.row} at {_told(fits)}, {_ratio(fits, peer)}."


def _told(cell: Cell) -> str:
    size = "?" if cell.bytes_per_float32 is None else f"{cell.bytes_per_float32:.3f}"
    return f"relative L2 {error_of(cell):.4g} ({size} of float32)"


def _ratio(cell: Cell, peer: Cell) -> str:
    return f"{error_of(cell) / max(error_of(peer), 1e-12):.2f} times the peer's"


def _no_larger(cell: Cell, peer: Cell) -> bool:
    if cell.bytes_per_float32 is None or peer.bytes_per_float32 is None:
        return False
    return cell.bytes_per_float32 <= peer.bytes_per_float32


def error_of(cell: Cell) -> float:
    """Relative L2."""
    return cell.metrics["relative_l2"].value


def _those_that_treat_most(peers: Sequence[Cell]) -> list[Cell]:
    """Peers that quantize as large a share of the parameters as any of them, in their order."""
    most = max(map(_treated, peers), default=0.0)
    return [cell for cell in peers if _treated(cell) >= most - SHARE_STEP]


def _treated(cell: Cell) -> float:
    """The share of the parameters that a peer treated as the setting says."""
    weights = cell.weight_share or 0.0
    return weights if cell.setting.endswith("A16") else min(weights, cell.input_share or 0.0)


def _unequal_layers(cells: Sequence[Cell]) -> list[str]:
    """Rows at one granularity that did not quantize the same layers at the same bits as the first of them."""
    lines = []
    for setting in SETTINGS:
        rows = [
            cell
            for cell in _ordered(cells)
            if cell.setting == setting and cell.row in ROWS and ROWS[cell.row].one_granularity and cell.layers
        ]
        odd = [cell.row for cell in rows if cell.layers != rows[0].layers]
        if odd:
            lines.append(f"{setting}: {', '.join(odd)} quantized other layers, or at other bits, than {rows[0].row}.")
    return lines


def _peer_notices(cells: Sequence[Cell]) -> list[str]:
    """What each peer could not do, once for all settings of which it is so."""
    said: dict[tuple[str, str], list[str]] = {}
    for cell in _ordered(cells):
        if cell.peer and cell.measured:
            package = str(cell.options.get("package", cell.row))
            said.setdefault((package, cell.notice or "no notice"), []).append(cell.setting)
    order = list(SETTINGS)
    return [
        f"{package} ({', '.join(sorted(set(settings), key=order.index))}): {notice}."
        for (package, notice), settings in said.items()
    ]


def _problems(cells: Sequence[Cell]) -> list[str]:
    """Settings that no peer has."""
    lacking = [name for name in SETTINGS if name == "W4A4" and not any(c.peer and c.setting == name for c in cells)]
    return [f"{name}: none of these peers multiplies 4-bit activations." for name in lacking]


def _machine(cell: Cell) -> str:
    facts = cell.machine
    return f"{facts.get('processor', '?')} ({facts.get('instruction_sets', '')}), torch {facts.get('torch', '?')}"


def _either(counts: Sequence[int]) -> str:
    return " or ".join(map(str, counts)) or "no"
