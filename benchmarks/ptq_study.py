"""Quantization of the trained zoo pipelines, every method at every width, with other libraries beside ours.

    python benchmarks/ptq_study.py --fid-samples 0            # the cheap part of every cell; goes on where it stopped
    python benchmarks/ptq_study.py                            # adds FID on the digits
    python benchmarks/ptq_study.py --pipeline digits-dit --setting W4A8 --row gptq --again
    python benchmarks/ptq_study.py --table-only               # docs/results.md from the JSON; runs nothing

A cell is a pipeline, a setting and a row: options of `dacc quantize` (`ptq_rows.py`) or a peer (`peers.py`, which says
how they are installed). Each is quantized in a process of its own, sampled from the same noise as the float pipeline,
and written to `ptq_study.json` once it is measured. Bundles and judged images stay in --work, so that FID can be added.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from dacc.benchmarks.peers import PEERS
from dacc.benchmarks.ptq_bench import Bench, pipeline_facts, treat
from dacc.benchmarks.ptq_cells import FLOAT_ROW, FLOAT_SETTING, Cell, Study
from dacc.benchmarks.ptq_child import PEERS_FOLDER, ChildFailed
from dacc.benchmarks.ptq_measure import read_seen
from dacc.benchmarks.ptq_rows import DRAWN, PIPELINES, ROWS, SETTINGS, row_options
from dacc.benchmarks.ptq_summary import README, write_summary
from dacc.benchmarks.ptq_table import write_tables
from dacc.benchmarks.study import add_options, attempt, fingerprint, is_finished, provenance, read_study, record_cell
from dacc.core.config import build_config
from dacc.core.errors import DaccError
from dacc.core.reporter import Reporter
from dacc.evaluate.grid import write_grid
from dacc.quant.api import METHODS
from dacc.quant.config import QuantizeConfig

RECORD = Path(__file__).with_suffix(".json")
COLUMNS = 10  # images in the picture


def main() -> None:
    """Measure what is missing, then write the tables."""
    options = _parse()
    torch.set_num_threads(options.threads)
    reporter = Reporter()
    if not options.table_only:
        for name in options.pipeline or PIPELINES:
            bench = Bench(name, options, reporter)
            for setting, row in _wanted(name, options):
                _fill(bench, setting, row)
            _draw(bench)
    study = read_study(options.json, Study)
    written = write_tables(options.results, study, PIPELINES, {name: pipeline_facts(name) for name in PIPELINES})
    write_summary(options.readme, study, PIPELINES)
    reporter.say(f"{options.results.name}: tables of {', '.join(written) or 'no pipeline'}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [FLOAT_ROW, *ROWS, *PEERS]
    parser.add_argument("--pipeline", action="append", choices=PIPELINES, help="repeatable; default: all")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), help="repeatable; default: all")
    parser.add_argument("--row", action="append", choices=rows, help="repeatable; default: all but sweeps, peers too")
    add_options(parser, RECORD)
    parser.add_argument("--readme", type=Path, default=README, help="where the short table goes")
    parser.add_argument("--peers", type=Path, default=PEERS_FOLDER, help="folder that the peers are installed in")
    return parser.parse_args()


def _wanted(pipeline: str, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Settings and rows in order, the float pipeline first."""
    named = options.row or [FLOAT_ROW, *(name for name, row in ROWS.items() if not row.swept), *PEERS]
    if FLOAT_ROW in named:
        yield FLOAT_SETTING, FLOAT_ROW
    for setting in options.setting or SETTINGS:
        yield from ((setting, row) for row in named if row in ROWS and ROWS[row].is_for(pipeline, setting))
        yield from ((setting, row) for row in named if row in PEERS and setting in PEERS[row].formats)


def _fill(bench: Bench, setting: str, row: str) -> None:
    """Measure one cell unless it is finished; what cannot be measured yet is said and passed over."""
    place = f"{bench.name} {setting} {row}"
    try:
        options = _options(bench, setting, row)
    except DaccError as error:
        return bench.reporter.say(f"{place}: not measured yet: {error}")
    found = read_study(bench.options.json, Study).find(bench.name, setting, row)
    wanted = fingerprint(asked=bench.asked, options=options)
    again, only_missing = bench.options.again, bench.options.only_missing
    if not again and is_finished(found, wanted, bench.fid_samples, only_missing=only_missing):
        return None
    bench.reporter.say(place)
    folder = bench.folder(setting, row, wanted)
    if again and setting != FLOAT_SETTING:
        shutil.rmtree(folder, ignore_errors=True)
    base = Cell(
        pipeline=bench.name,
        setting=setting,
        row=row,
        peer=row in PEERS,
        fingerprint=wanted,
        options=options,
        steps=bench.request.num_inference_steps,
        **provenance(),
    )

    def measure() -> dict[str, Any]:
        facts, seen = treat(bench, setting, row, options, folder)
        return {**facts, **bench.measured(seen, is_float=row == FLOAT_ROW)}

    told = (DaccError, FloatingPointError, ChildFailed)
    word = "cannot run" if base.peer else "failed"
    if cell := attempt(base, measure, found, again=again, reporter=bench.reporter, told=told, word=word):
        record_cell(bench.options.json, cell, Study)
    return None


def _options(bench: Bench, setting: str, row: str) -> dict[str, Any]:
    """What a cell is made from.

    Raises:
        DaccError: there is no such method or option yet, or the peer is not installed.
    """
    if row == FLOAT_ROW:
        return {}
    if row in PEERS:
        package = PEERS[row].package
        places = [str(bench.options.peers), *sys.path]
        if not (found := next(iter(distributions(name=package, path=places)), None)):
            raise DaccError(f"{package} is not installed.", mend="See benchmarks/peers.py.")
        return {"format": PEERS[row].formats[setting], "package": f"{package} {found.version}"}
    method = METHODS.load(ROWS[row].options["method"])
    options = row_options(bench.name, setting, row, temporal_by_itself=getattr(method, "TEMPORAL", False))
    build_config(QuantizeConfig, measure="never", **options)
    return options


def _draw(bench: Bench) -> None:
    """The first images of some rows, one above the other, from the same noise; only when all of them are there."""
    study, rows = read_study(bench.options.json, Study), []
    for setting, row in DRAWN:
        cell = study.find(bench.name, setting, row)
        if not cell or not cell.measured:
            return
        if not (seen := read_seen(bench.folder(setting, row, cell.fingerprint) / "seen.safetensors")):
            return
        label = f"{setting.removesuffix('A16')} {row.removesuffix(' (defaults)')}"
        rows.append((label, f"PSNR {cell.metrics['psnr'].value:.1f} dB", seen.paired.images[:COLUMNS]))
    pictures = bench.options.results.parent / "images"
    pictures.mkdir(exist_ok=True)
    write_grid([(FLOAT_ROW, "", bench.reference.paired.images[:COLUMNS]), *rows], pictures / f"{bench.name}.png")


if __name__ == "__main__":
    main()
