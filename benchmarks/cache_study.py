"""Cache plans of the trained zoo pipelines, float and quantized: every method at every target, beside fewer steps and
the caches of other libraries.

    python benchmarks/cache_study.py --fid-samples 0          # the cheap part of every cell; goes on where it stopped
    python benchmarks/cache_study.py                          # adds FID on the digits
    python benchmarks/cache_study.py --pipeline digits-dit --target 3x --row taylor --again
    python benchmarks/cache_study.py --table-only             # docs/results.md from the JSON; runs nothing

A cell is a pipeline, float or quantized, a target of multiply-accumulates and a row of `cache_rows.py` or
`cache_peers.py`. Its plan is
searched for, its loop timed against one without a plan in turns, and its images are compared with those of the float
pipeline without a plan from the same noise. It is written to `cache_study.json` once it is measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dacc.benchmarks.cache_bench import NO_PLAN, cell_options, treat
from dacc.benchmarks.cache_cells import CacheCell, CacheStudy
from dacc.benchmarks.cache_rows import CACHE_PEERS, FEWER, FLOAT, NO_OTHER_SOLVER, PIPELINES, ROWS, SOURCES, TARGETS
from dacc.benchmarks.cache_table import write_cache_tables
from dacc.benchmarks.ptq_bench import Bench, pipeline_facts
from dacc.benchmarks.study import add_options, attempt, fingerprint, is_finished, provenance, read_study, record_cell
from dacc.core.reporter import Reporter

RECORD = Path(__file__).with_suffix(".json")


def main() -> None:
    """Measure what is missing, then write the tables."""
    options = _parse()
    torch.set_num_threads(options.threads)
    sys.path.insert(0, str(options.peers.resolve()))
    reporter = Reporter()
    if not options.table_only:
        for name in options.pipeline or PIPELINES:
            bench = Bench(name, options, reporter)
            for place in wanted_cells(name, options):
                fill(bench, *place)
    study = read_study(options.json, CacheStudy)
    written = write_cache_tables(options.results, study, PIPELINES, {name: pipeline_facts(name) for name in PIPELINES})
    reporter.say(f"{options.results.name}: tables of {', '.join(written) or 'no pipeline'}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [NO_PLAN, *FEWER, *CACHE_PEERS, *ROWS]
    parser.add_argument("--pipeline", action="append", choices=PIPELINES, help="repeatable; default: all")
    parser.add_argument("--source", action="append", choices=list(SOURCES), help="repeatable; default: all")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable; default: all")
    parser.add_argument("--row", action="append", choices=rows, help="repeatable; default: all but slow ones")
    parser.add_argument("--peers", type=Path, default=Path(".work/cache-peers"), help="see cache_peers.py")
    add_options(parser, RECORD)
    return parser.parse_args()


def wanted_cells(pipeline: str, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Source, target and row of every cell, those without a plan first."""
    named = options.row or [NO_PLAN, *FEWER, *CACHE_PEERS, *(name for name, row in ROWS.items() if not row.slow)]
    for source in options.source or SOURCES:
        if NO_PLAN in named:
            yield source, "-", NO_PLAN
        for target in options.target or TARGETS:
            yield from ((source, target, row) for row in named if _is_for(pipeline, source, target, row))


def _is_for(pipeline: str, source: str, target: str, row: str) -> bool:
    if row in FEWER:
        return source == FLOAT and not (FEWER[row] and pipeline in NO_OTHER_SOLVER)
    if row in CACHE_PEERS:
        return source == FLOAT and pipeline in CACHE_PEERS[row]
    found = ROWS.get(row)
    return found is not None and source in found.sources and pipeline in found.pipelines and target in found.targets


def fill(bench: Bench, source: str, target: str, row: str) -> None:
    """Measure one cell unless it is finished."""
    settings = bench.options
    options = cell_options(bench, target, row)
    found = read_study(settings.json, CacheStudy).find(bench.name, source, target, row)
    wanted = fingerprint(asked=bench.asked, source=SOURCES[source], options=options)
    if not settings.again and is_finished(found, wanted, bench.fid_samples, only_missing=settings.only_missing):
        return
    bench.reporter.say(f"{bench.name} {source} {target} {row}")
    folder = bench.folder(f"cache-{source}-{target}", row.replace(",", ""), wanted)
    if settings.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    base = CacheCell(
        pipeline=bench.name,
        source=source,
        target=target,
        row=row,
        fingerprint=wanted,
        options=options,
        steps=bench.request.num_inference_steps,
        **provenance(),
    )

    def measure() -> dict[str, Any]:
        facts, seen = treat(bench, source, row, options, folder)
        return facts | bench.measured(seen, is_float=source == FLOAT and row == NO_PLAN)

    if cell := attempt(base, measure, found, again=settings.again, reporter=bench.reporter):
        record_cell(settings.json, cell, CacheStudy)


if __name__ == "__main__":
    main()
