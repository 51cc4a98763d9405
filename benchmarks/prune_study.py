"""Pruned zoo pipelines: every method at every cut, with and without training of what is left.

    python benchmarks/prune_study.py --fid-samples 0          # the cheap part of every cell; goes on where it stopped
    python benchmarks/prune_study.py                          # adds FID on the digits
    python benchmarks/prune_study.py --pipeline digits-dit --cut "15 %" --row score --again
    python benchmarks/prune_study.py --pipeline digits-video --clips 200    # vdmini beside its negative control
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
from dacc.benchmarks.prune_rows import (
    CUTS,
    PIPELINES,
    ROWS,
    VIDEOS,
    WHOLE,
    PruneCell,
    PruneStudy,
    cell_options,
    cuts_of,
)
from dacc.benchmarks.prune_table import write_prune_tables
from dacc.benchmarks.ptq_bench import Bench, pipeline_facts
from dacc.benchmarks.ptq_measure import Seen
from dacc.benchmarks.study import (
    add_options,
    attempt,
    commit,
    fingerprint,
    is_finished,
    provenance,
    read_study,
    record_cell,
)
from dacc.cache.measuring import loop_seconds
from dacc.core.config import build_config
from dacc.core.manifest import RUN_NAME, ComponentRecord, read_manifest
from dacc.core.pipeline import denoiser_names
from dacc.core.reporter import Reporter
from dacc.core.safe_read import read_json, resolve_shards
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
            bench = Bench(name, options_for(name, options), reporter)
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
    parser.add_argument("--clips", type=int, default=200, help="clips of a video pipeline, all judged and compared")
    parser.add_argument("--recover", type=int, help="training steps of the cuts that train, in place of their own")
    add_options(parser, RECORD)
    return parser.parse_args()


def options_for(pipeline: str, options: argparse.Namespace) -> argparse.Namespace:
    """The options as one pipeline has them: of videos clips are counted."""
    return argparse.Namespace(**vars(options) | ({"seeds": options.clips} if pipeline in VIDEOS else {}))


def wanted_cells(pipeline: str, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Cut and row of every cell, the whole pipeline first."""
    named = options.row or [WHOLE, *ROWS]
    if WHOLE in named:
        yield "-", WHOLE
    for cut in (cut for cut in cuts_of(pipeline) if cut in (options.cut or CUTS)):
        yield from ((cut, row) for row in named if row in ROWS and pipeline in ROWS[row].pipelines)


def fill(bench: Bench, cut: str, row: str) -> None:
    """Measure one cell unless it is finished."""
    settings = bench.options
    options = cell_options(bench.name, cut, row, settings.recover)
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
        facts, seen = whole(bench) if row == WHOLE else treat(bench, options, folder)
        return facts | bench.measured(seen, is_float=row == WHOLE)

    if cell := attempt(base, measure, found, again=settings.again, reporter=bench.reporter):
        record_cell(settings.json, cell, PruneStudy)


def whole(bench: Bench) -> tuple[dict[str, Any], Seen]:
    """The same of the pipeline that nothing was removed from."""
    (component,) = denoiser_names(bench.entry.path)
    files = resolve_shards(bench.entry.path / component).values()
    return {"weight_bytes": sum(file.stat().st_size for file in files)}, bench.reference


def treat(bench: Bench, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Seen]:
    """Facts for a cell, and its images. The bundle is made once, its seconds and its commit beside it."""
    bundle, notes = folder / "bundle", folder / "pruned.json"
    if not notes.is_file() or not bundle.is_dir():
        config = build_config(PruneConfig, measure="never", **options)
        started = time.process_time()
        prune_pipeline(
            f"zoo:{bench.name}", config, output=bundle, overwrite=True, device="cpu", reporter=bench.reporter
        )
        notes.write_text(json.dumps({"seconds": time.process_time() - started, "commit": commit()}))
    component, record = _component(bundle)
    assert record.pruning is not None
    source, pipe = bench.load(f"zoo:{bench.name}"), bench.load(str(bundle))
    one = bench.request.model_copy(update={"seeds": bench.request.seeds[:1], "batch_size": 1})
    before, after = (count_macs(lambda pipe=pipe: loop_seconds(pipe, one)) for pipe in (source, pipe))
    cut, trained = record.pruning, record.pruning.recovery
    seconds = read_json(bundle / RUN_NAME).get("recovery_cpu_seconds", {})
    facts = {
        "removed": tuple(name for name, unit in cut.units.items() if unit.removed),
        "parameter_share": cut.parameters_after / cut.parameters_before,
        "weight_bytes": record.bytes_after,
        "macs_share": after / before,
        "speedup": speedup(lambda: loop_seconds(source, one), lambda: loop_seconds(pipe, one)),
        "error_before": trained.error_before if trained else None,
        "error_after": trained.error_after if trained else None,
        "updates": trained.steps_done if trained else None,
        "training_seconds": seconds.get(component),
        **json.loads(notes.read_text()),
    }
    return facts, bench.see(lambda: pipe, folder / "seen.safetensors", bench.request)


def _component(bundle: Path) -> tuple[str, ComponentRecord]:
    """The one that was pruned."""
    manifest = read_manifest(bundle)
    assert manifest is not None
    (found,) = ((name, record) for name, record in manifest.components.items() if record.pruning)
    return found


if __name__ == "__main__":
    main()
