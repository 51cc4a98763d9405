"""One pipeline of the quantization study: its request, its float images, and how one row of it is treated."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from dacc.benchmarks.peers import PEERS
from dacc.benchmarks.ptq_cells import FLOAT_ROW
from dacc.benchmarks.ptq_child import run_child
from dacc.benchmarks.ptq_measure import Seen, look, measure, read_seen
from dacc.benchmarks.ptq_rows import CALIBRATION, ROWS, WITH_FID
from dacc.benchmarks.study import commit, fingerprint
from dacc.calibrate.api import calibrate_pipeline
from dacc.calibrate.config import CalibrateConfig
from dacc.core.config import build_config
from dacc.core.manifest import read_manifest
from dacc.core.pipeline import denoiser_names
from dacc.core.reporter import Reporter
from dacc.core.safe_read import weight_hash
from dacc.core.seeds import SeedKind, seed_stream
from dacc.core.source import resolve_source
from dacc.core.tensor_file import stored_tensors, tensor_bytes
from dacc.core.zoo import ZooEntry, zoo_entry
from dacc.evaluate.judge import Judge, load_judge
from dacc.quant.api import METHODS
from dacc.runtime.load import load_source
from dacc.runtime.request import RunRequest

PEER_CALIBRATION = 8  # samples for peers that calibrate


@dataclass(frozen=True)
class Bench:
    """One pipeline and all that its cells have in common."""

    name: str
    options: argparse.Namespace
    reporter: Reporter

    @cached_property
    def entry(self) -> ZooEntry:
        """What the zoo knows of it."""
        return zoo_entry(self.name)

    @cached_property
    def judge(self) -> Judge | None:
        """Who looks at its images."""
        return load_judge(self.entry)

    @property
    def fid_samples(self) -> int:
        """Images that FID is taken from."""
        return int(self.options.fid_samples) if self.name in WITH_FID else 0

    @cached_property
    def request(self) -> RunRequest:
        """The paired images and those that only the judge sees; the former are the first of them."""
        count = max(self.options.seeds, self.fid_samples)
        return self.ask("evaluation", count)

    def ask(self, kind: SeedKind, count: int) -> RunRequest:
        """As the zoo asks for it."""
        return RunRequest(
            seeds=seed_stream(kind, 0, count),
            num_inference_steps=self.options.steps or self.entry.num_inference_steps,
            batch_size=self.options.batch_size,
        ).with_zoo_defaults(self.entry)

    @cached_property
    def asked(self) -> str:
        """What every figure depends on beside the row: weights, request, how many images are paired."""
        (component,) = denoiser_names(self.entry.path)
        request = self.request.model_dump(mode="json", exclude={"seeds", "batch_size"})
        return fingerprint(weights=weight_hash(self.entry.path / component), request=request, seeds=self.options.seeds)

    @cached_property
    def work(self) -> Path:
        """Where everything of this request lies."""
        folder: Path = self.options.work / self.name / self.asked
        return folder

    @cached_property
    def reference(self) -> Seen:
        """The float pipeline's images, sampled once."""
        return self.look(f"zoo:{self.name}", self.work / "float.safetensors")

    def folder(self, setting: str, row: str, wanted: str) -> Path:
        """Where a cell keeps its bundle and its images."""
        return self.work / f"{setting}-{row.replace(' ', '-')}-{wanted}"

    def look(self, source: str, cache: Path) -> Seen:
        """The images of a source, sampled where they are not kept."""
        return self.see(lambda: self.load(source), cache, self.request)

    def load(self, source: str) -> Any:
        """A pipeline as every row runs."""
        self.reporter.say(f"loading {source}")
        found = resolve_source(source, reporter=self.reporter)
        return load_source(found, device="cpu", dtype="float32", prefer="speed")

    def see(self, make: Callable[[], Any], cache: Path, request: RunRequest) -> Seen:
        """The images of a pipeline that is made only where they are not kept."""
        kept = read_seen(cache)
        enough = kept and (kept.judged is None or len(kept.judged.answers) >= len(request.seeds))
        if kept and enough and len(kept.paired) == self.options.seeds:
            return kept
        return look(make(), request, self.options.seeds, self.judge, cache, self.reporter)

    def measured(self, seen: Seen, *, is_float: bool) -> dict[str, Any]:
        """Metrics of a row and from how many images.

        Raises:
            FloatingPointError: its images are not numbers.
        """
        if not torch.isfinite(seen.paired.latents).all() or not torch.isfinite(seen.paired.images).all():
            raise FloatingPointError("it gives NaN or infinity")
        reference = None if is_float else self.reference
        count = self.fid_samples if self.judge else 0
        metrics = measure(seen, reference, self.request, self.judge, fid_samples=count)
        return {"metrics": metrics, "seeds": len(seen.paired), "fid_samples": count}

    def calibration(self, strategy: str, wanted: dict[str, Any]) -> Path:
        """The set of a strategy, made once: calibrate_pipeline returns one that is there.

        Args:
            wanted: options of `dacc calibrate` beside those of the strategy.
        """
        asked = {"steps": self.options.steps, **CALIBRATION[strategy], **wanted}
        config = build_config(CalibrateConfig, strategy=strategy, **asked)
        folder = self.work / f"calibration-{strategy}-{fingerprint(**config.model_dump(mode='json'))}"
        source = f"zoo:{self.name}"
        return calibrate_pipeline(source, config, output=folder, device="cpu", reporter=self.reporter)


def pipeline_facts(name: str) -> str:
    """What to say of a pipeline's request above its table."""
    entry = zoo_entry(name)
    judge = load_judge(entry)
    text = f"guidance {entry.guidance_scale or 'none'}, float32 arithmetic"
    if judge is None or not (judge.clip_reader or name in WITH_FID):
        return text
    distance, real = ("Frechet video distance", "clips") if judge.clip_reader else ("FID", "images")
    return f"{text}; {distance} between two halves of the real {real}: {judge.facts['fid_between_halves']:.3g}"


def treat(bench: Bench, setting: str, row: str, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Seen]:
    """Quantize and sample: facts for the cell, and the images."""
    if row == FLOAT_ROW:
        return {"bytes_per_float32": _float_share(bench)}, bench.reference
    if row in PEERS:
        return _treat_peer(bench, setting, row, folder)
    facts = _quantized(bench, options, ROWS[row].calibration, folder)
    return facts, bench.look(str(folder / "bundle"), folder / "seen.safetensors")


def _quantized(bench: Bench, options: dict[str, Any], calibration: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The bundle of one of our rows and what is known of it; made once; its seconds and its commit lie beside it."""
    bundle, notes = folder / "bundle", folder / "quantized.json"
    if not notes.is_file() or not bundle.is_dir():
        facts: dict[str, Any] = {}
        calib = None
        method = METHODS.load(options["method"])
        if getattr(method, "NEEDS", ()) or ("act_bits" in options and _act_mode(method, options) != "dynamic"):
            strategy = str(getattr(method, "CALIBRATION", "uniform"))
            started = time.monotonic()
            calib = bench.calibration(strategy, calibration)
            facts |= {
                "calibration": _said(strategy, calibration),
                "calibration_seconds": _making(calib, time.monotonic() - started),
            }
        job = {"do": "quantize", "source": f"zoo:{bench.name}", "options": options, "output": str(bundle)}
        folder.mkdir(parents=True, exist_ok=True)
        facts |= run_child({**job, "calib": str(calib) if calib else None}, threads=bench.options.threads)
        notes.write_text(json.dumps(facts | {"commit": commit()}))
    manifest = read_manifest(bundle)
    assert manifest is not None
    (record,) = manifest.components.values()
    assert record.quantization is not None
    bits = {name: scheme.bits for name, scheme in record.quantization.schemes.items()}
    layers = {name: bits[one.scheme] for name, one in record.quantization.modules.items() if one.scheme}
    found: dict[str, Any] = json.loads(notes.read_text())
    (component,) = manifest.components
    return found | {"bytes_per_float32": _share(bundle / component, record.parameters), "layers": fingerprint(**layers)}


def _said(strategy: str, options: dict[str, Any]) -> str:
    """`every-step, samples 64`."""
    return ", ".join([strategy, *(f"{name} {value}" for name, value in options.items())])


def _act_mode(method: Any, options: dict[str, Any]) -> str:
    return str(options.get("act_mode", getattr(method, "ACT_MODE", "dynamic")))


def _making(calib: Path, now: float) -> float:
    """Seconds that the set took when it was made."""
    notes = calib / "dacc_run.json"
    return float(json.loads(notes.read_text()).get("seconds", now)) if notes.is_file() else now


def _treat_peer(bench: Bench, setting: str, row: str, folder: Path) -> tuple[dict[str, Any], Seen]:
    """A peer quantizes and samples in its own process: its layers cannot leave it."""
    cache = folder / "seen.safetensors"
    job = {
        "do": "peer",
        "source": f"zoo:{bench.name}",
        "peer": row,
        "setting": setting,
        "request": bench.request.model_dump(mode="json"),
        "calibration": bench.ask("calibration", PEER_CALIBRATION).model_dump(mode="json"),
        "paired": bench.options.seeds,
        "cache": str(cache),
    }
    facts = run_child(job, threads=bench.options.threads, peers=bench.options.peers)
    seen = read_seen(cache)
    assert seen is not None
    return facts, seen


def _float_share(bench: Bench) -> float:
    """Bytes of the float denoiser's weights against float32."""
    (component,) = denoiser_names(bench.entry.path)
    folder = bench.entry.path / component
    return _share(folder, sum(prod(tensor.shape) for tensor in stored_tensors(folder).values()))


def _share(folder: Path, parameters: int) -> float:
    """Bytes of the tensors in a folder against float32; headers of files are not weights."""
    return sum(map(tensor_bytes, stored_tensors(folder).values())) / (4 * parameters)
