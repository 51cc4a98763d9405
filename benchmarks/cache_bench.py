"""One pipeline of the study of cache plans: how one row of it is made, sampled and timed."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers

from dacc.benchmarks.cache_peers import PEERS, CachePeer, fit_strength
from dacc.benchmarks.cache_rows import FEWER, FLOAT, ROWS, SOURCES, TARGETS
from dacc.benchmarks.ptq_bench import Bench
from dacc.benchmarks.ptq_measure import Seen
from dacc.benchmarks.study import commit, fingerprint
from dacc.cache.api import search_cache
from dacc.cache.config import SearchCacheConfig
from dacc.cache.measuring import loop_seconds
from dacc.core.config import build_config
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig
from dacc.runtime.clockwork import attach_clock
from dacc.runtime.installed import no_cache
from dacc.runtime.request import RunRequest
from dacc.runtime.timing import measure_in_turns

COUNTED = 8  # samples whose multiply-accumulates are counted with a cache of others
TIMED_RUNS = 4  # in turns; the first of each warms up
NO_PLAN = "no plan"
IMAGES = "seen.safetensors"


def cell_options(bench: Bench, target: str, row: str) -> dict[str, Any]:
    """What a cell is made from: options of `dacc search-cache`, or solver and steps."""
    steps = bench.request.num_inference_steps
    if row == NO_PLAN:
        return {"steps": steps}
    if row in FEWER:
        return {"steps": max(2, round(steps / TARGETS[target])), "solver": FEWER[row]}
    if row in PEERS:
        return {"peer": PEERS[row].package, "macs_ratio": round(1 / TARGETS[target], 6), "steps": steps}
    wanted = ROWS[row]
    ratio = round(1 / TARGETS[target], 6)
    named = {} if wanted.unit == "auto" else {"unit": wanted.unit}
    return {"method": wanted.method, "settings": wanted.settings, "macs_ratio": ratio, "steps": steps, **named}


def treat(bench: Bench, source: str, row: str, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Seen]:
    """Facts for a cell, and its images."""
    if row == NO_PLAN:
        seen = bench.reference if source == FLOAT else bench.look(_source(bench, source), folder / IMAGES)
        return {"macs_ratio": 1.0}, seen
    if row in FEWER:
        return _fewer(bench, source, options, folder)
    if row in PEERS:
        return _by_peer(bench, PEERS[row], options, folder)
    return _searched(bench, source, options, folder)


def _searched(bench: Bench, source: str, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Seen]:
    """A plan is searched for, once; its seconds and the commit that did it are kept beside it."""
    bundle, notes = folder / "bundle", folder / "searched.json"
    if not notes.is_file() or not bundle.is_dir():
        config = build_config(SearchCacheConfig, measure="never", **options)
        started = time.process_time()
        search_cache(_source(bench, source), config, output=bundle, overwrite=True, device="cpu", reporter=silent())
        notes.write_text(json.dumps({"seconds": time.process_time() - started, "commit": commit()}))
    manifest = read_manifest(bundle)
    assert manifest is not None
    (record,) = (record.cache for record in manifest.components.values() if record.cache)
    pipe = bench.load(str(bundle))
    one = _one(bench)

    def full() -> float:
        with no_cache(pipe):
            return loop_seconds(pipe, one)

    facts = {
        "macs_ratio": record.macs_ratio,
        "codes": record.plan.codes if len(record.plan.codes) == 1 else {},
        "speedup": speedup(full, lambda: loop_seconds(pipe, one)),
        **json.loads(notes.read_text()),
    }
    return facts, bench.see(lambda: pipe, folder / IMAGES, bench.request)


def _fewer(bench: Bench, source: str, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Seen]:
    """The same pipeline with fewer steps of its own solver, or of another."""
    pipe, one = bench.load(_source(bench, source)), _one(bench)
    steps, own = options["steps"], pipe.scheduler
    solver = getattr(diffusers, options["solver"]).from_config(own.config) if options["solver"] else own

    def run(scheduler: Any, count: int) -> float:
        pipe.scheduler = scheduler
        attach_clock(pipe)
        return loop_seconds(pipe, one.model_copy(update={"num_inference_steps": count}))

    full = bench.request.num_inference_steps
    ratio = speedup(lambda: run(own, full), lambda: run(solver, steps))
    pipe.scheduler = solver
    attach_clock(pipe)
    request = bench.request.model_copy(update={"num_inference_steps": steps})
    seen = bench.see(lambda: pipe, folder / IMAGES, request)
    return {"macs_ratio": steps / full, "speedup": ratio}, seen


def _by_peer(bench: Bench, peer: CachePeer, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Seen]:
    """Another library's cache, as strong as the target asks for."""

    def make() -> Any:
        return bench.load(f"zoo:{bench.name}")

    fitted = fit_strength(make, peer, bench.ask("calibration", COUNTED), options["macs_ratio"])
    plain, cached, one = make(), make(), _one(bench)
    peer.switch_on_(cached, fitted.strength)
    ratio = speedup(lambda: loop_seconds(plain, one), lambda: loop_seconds(cached, one))
    facts = {"macs_ratio": fitted.macs_ratio, "strength": str(fitted.strength), "speedup": ratio}
    return facts, bench.see(lambda: cached, folder / IMAGES, bench.request)


def speedup(full: Any, short: Any) -> float:
    """Seconds of one over those of the other, medians in turns."""
    found: dict[str, list[float]] = {"full": [], "short": []}
    actions = [lambda: found["full"].append(full()), lambda: found["short"].append(short())]
    measure_in_turns(actions, TIMED_RUNS, silent())
    first, second = (statistics.median(values[1:]) for values in found.values())
    return first / second


def _one(bench: Bench) -> RunRequest:
    return bench.request.model_copy(update={"seeds": bench.request.seeds[:1], "batch_size": 1})


def _source(bench: Bench, source: str) -> str:
    """The float pipeline, or a bundle of it, quantized once with the defaults."""
    if source == FLOAT:
        return f"zoo:{bench.name}"
    config = build_config(QuantizeConfig, measure="never", **SOURCES[source])
    folder = bench.work / f"cache-{source}-{fingerprint(**SOURCES[source])}"
    return str(quantize_pipeline(f"zoo:{bench.name}", config, output=folder, device="cpu", reporter=silent()))
