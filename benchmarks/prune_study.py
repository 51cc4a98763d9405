"""Pruned zoo pipelines: every method at every cut, with and without training of what is left.

    python benchmarks/prune_study.py --fid-samples 0          # the cheap part of every cell; goes on where it stopped
    python benchmarks/prune_study.py                          # adds FID on the digits
    python benchmarks/prune_study.py --pipeline digits-dit --cut "15 %" --row score --again
    python benchmarks/prune_study.py --table-only             # docs/results.md from the JSON; runs nothing

A cell is a pipeline, a cut and a row of `prune_rows.py`. The bundle's loop is timed against that of the whole pipeline
in turns, and its images are compared with those of the whole one from the same noise. It is written to
`prune_study.json` once it is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dacc.benchmarks.cache_bench import speedup
from dacc.benchmarks.prune_rows import CUTS, PIPELINES, ROWS, WHOLE, PruneCell, PruneStudy
from dacc.benchmarks.prune_table import write_prune_tables
from dacc.benchmarks.ptq_bench import Bench, pipeline_facts
from dacc.benchmarks.ptq_measure import Seen
from dacc.benchmarks.study import add_options, attempt, fingerprint, is_finished, provenance, read_study, record_cell
from dacc.cache.search import loop_seconds
from dacc.core.config import build_config
from dacc.core.manifest import PruningRecord, read_manifest
from dacc.core.reporter import Reporter, silent
from dacc.prune.api import prune_pipeline
from dacc.prune.config import PruneConfig
from dacc.runtime.macs import count_macs

RECORD = Path(__file__).with_suffix(".json")


def main() -> None:
    """Measure what is missing, then write the tables."""
    options = _parse()
    torch.set_num_threads(options.threads)
    reporter = Reporter()
    if not options.table_only:
        for name in options.pipeline or PIPELINES:
            bench = Bench(name, options, reporter)
            for place in wanted_cells(name, options):
                fill(bench, *place)
    study = read_study(options.json, PruneStudy)
    written = write_prune_tables(options.results, study, PIPELINES, {name: pipeline_facts(name) for name in PIPELINES})
    reporter.say(f"{options.results.name}: tables of {', '.join(written) or 'no pipeline'}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", action="append", choices=PIPELINES, help="repeatable; default: all")
    parser.add_argument("--cut", action="append", choices=list(CUTS), help="repeatable; default: all")
    parser.add_argument("--row", action="append", choices=[WHOLE, *ROWS], help="repeatable; default: all")
    add_options(parser, RECORD)
    return parser.parse_args()


def wanted_cells(pipeline: str, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Cut and row of every cell, the whole pipeline first."""
    named = options.row or [WHOLE, *ROWS]
    if WHOLE in named:
        yield "-", WHOLE
    for cut in options.cut or CUTS:
        yield from ((cut, row) for row in named if row in ROWS and pipeline in ROWS[row].pipelines)


def cell_options(cut: str, row: str) -> dict[str, Any]:
    """Options of `dacc prune`."""
    return {} if row == WHOLE else {"method": ROWS[row].method, "settings": ROWS[row].settings, **CUTS[cut]}


def fill(bench: Bench, cut: str, row: str) -> None:
    """Measure one cell unless it is finished."""
    settings, options = bench.options, cell_options(cut, row)
    found = read_study(settings.json, PruneStudy).find(bench.name, cut, row)
    wanted = fingerprint(asked=bench.asked, options=options)
    if not settings.again and is_finished(found, wanted, bench.fid_samples, only_missing=settings.only_missing):
        return
    bench.reporter.say(f"{bench.name} {cut} {row}")
    folder = bench.folder("prune", row, wanted)
    if settings.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    base = PruneCell(
        pipeline=bench.name,
        cut=cut,
        row=row,
        fingerprint=wanted,
        options=options,
        steps=bench.request.num_inference_steps,
        **provenance(),
    )

    def measure() -> dict[str, Any]:
        facts, seen = ({}, bench.reference) if row == WHOLE else treat(bench, options, folder)
        return facts | bench.measured(seen, is_float=row == WHOLE)

    if cell := attempt(base, measure, found, again=settings.again, reporter=bench.reporter):
        record_cell(settings.json, cell, PruneStudy)


def treat(bench: Bench, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Seen]:
    """Facts for a cell, and its images. The bundle is made once; its seconds are kept beside it."""
    bundle, notes = folder / "bundle", folder / "pruned.json"
    if not notes.is_file() or not bundle.is_dir():
        config = build_config(PruneConfig, measure="never", **options)
        started = time.process_time()
        prune_pipeline(f"zoo:{bench.name}", config, output=bundle, overwrite=True, device="cpu", reporter=silent())
        notes.write_text(json.dumps({"seconds": time.process_time() - started}))
    record = _pruning(bundle)
    whole, pipe = bench.load(f"zoo:{bench.name}"), bench.load(str(bundle))
    one = bench.request.model_copy(update={"seeds": bench.request.seeds[:1], "batch_size": 1})
    before, after = (count_macs(lambda pipe=pipe: loop_seconds(pipe, one)) for pipe in (whole, pipe))
    trained = record.recovery
    facts = {
        "removed": tuple(name for name, unit in record.units.items() if unit.removed),
        "parameter_share": record.parameters_after / record.parameters_before,
        "macs_share": after / before,
        "speedup": speedup(lambda: loop_seconds(whole, one), lambda: loop_seconds(pipe, one)),
        "error_before": trained.error_before if trained else None,
        "error_after": trained.error_after if trained else None,
        **json.loads(notes.read_text()),
    }
    return facts, bench.see(lambda: pipe, folder / "seen.safetensors", bench.request)


def _pruning(bundle: Path) -> PruningRecord:
    manifest = read_manifest(bundle)
    assert manifest is not None
    (record,) = (one.pruning for one in manifest.components.values() if one.pruning)
    return record


if __name__ == "__main__":
    main()
