"""The process that quantizes for one cell of the study, so that its peak memory is its own. It reads a job as JSON on
stdin and writes its answer as JSON to the file that the job names; run as `python -P -m dacc.benchmarks.ptq_child`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

PEERS_FOLDER = Path(".work/peers")
MODULE = "dacc.benchmarks.ptq_child"
PARENT_SECONDS = 2.0  # between looks whether the study still runs
EXACT = "its int8 products were taken out of float ones, exactly, as this CPU has no instructions for them"


class ChildFailed(Exception):
    """The process ended without an answer; says its last line."""


def run_child(job: dict[str, Any], *, threads: int, peers: Path | None = None) -> dict[str, Any]:
    """Do a job in a process of its own.

    Args:
        peers: folder where peers are installed, put on the path of this process alone.

    Raises:
        ChildFailed: with the last line that it wrote.
    """
    paths = [str(peers.resolve())] if peers else []
    paths += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        answer, errors = Path(folder) / "answer.json", Path(folder) / "stderr"
        with errors.open("w") as stderr:
            done = subprocess.run(
                [sys.executable, "-P", "-m", MODULE],
                input=json.dumps({**job, "answer": str(answer), "threads": threads}),
                text=True,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        if done.returncode == 0 and answer.is_file():
            found: dict[str, Any] = json.loads(answer.read_text())
            return found
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        raise ChildFailed((lines or [f"exit code {done.returncode}"])[-1].strip()[:300])


def main() -> None:
    """Do one job."""
    import torch

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    answer = {"quantize": _quantize, "peer": _peer}[job["do"]](job)
    Path(job["answer"]).write_text(json.dumps(answer))


def _end_with(parent: int) -> None:
    """A study that is killed takes its process along."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _quantize(job: dict[str, Any]) -> dict[str, Any]:
    """One of our rows: a bundle."""
    import dacc.quant.driver
    import dacc.runtime.measure  # noqa: F401  (what the pass imports on its way is not counted)
    from dacc.core.config import build_config
    from dacc.core.reporter import silent
    from dacc.evaluate.memory import peak_resident_bytes
    from dacc.quant.api import quantize_pipeline
    from dacc.quant.config import QuantizeConfig

    config = build_config(QuantizeConfig, measure="never", **job["options"])
    reporter, started = silent(), time.process_time()
    quantize_pipeline(
        job["source"],
        config,
        calib=job["calib"],
        output=job["output"],
        overwrite=True,
        resume=False,
        device="cpu",
        reporter=reporter,
    )
    seconds = time.process_time() - started
    return {"seconds": seconds, "peak_bytes": peak_resident_bytes(), "notice": "; ".join(reporter.notices) or None}


def _peer(job: dict[str, Any]) -> dict[str, Any]:
    """A peer: quantize in memory, say what was done, sample."""
    _quiet()
    exact = exact_products()
    from dacc.benchmarks.peers import PEERS, peer_layers, summarize
    from dacc.benchmarks.ptq_measure import look
    from dacc.core.pipeline import denoisers
    from dacc.core.reporter import silent
    from dacc.core.source import resolve_source
    from dacc.core.zoo import zoo_entry
    from dacc.evaluate.judge import load_judge
    from dacc.evaluate.memory import peak_resident_bytes
    from dacc.runtime.load import load_source
    from dacc.runtime.request import RunRequest
    from dacc.runtime.trajectory import sample

    source = resolve_source(job["source"], reporter=silent())
    pipe = load_source(source, device="cpu", dtype="float32")
    (denoiser,) = denoisers(pipe).values()
    shapes = {name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()}
    calibrating = 0.0

    def calibrate() -> None:
        nonlocal calibrating
        began = time.process_time()
        sample(pipe, RunRequest(**job["calibration"]), reporter=silent())
        calibrating += time.process_time() - began

    started = time.process_time()
    peer = PEERS[job["peer"]]
    layers = peer_layers(denoiser, temporal=peer.temporal)
    treated = peer.quantize_(denoiser, layers, job["setting"], calibrate)
    seconds = time.process_time() - started - calibrating
    peak = peak_resident_bytes()
    facts = summarize(denoiser, shapes, treated)
    judge = load_judge(zoo_entry(job["source"]))
    look(pipe, RunRequest(**job["request"]), job["paired"], judge, Path(job["cache"]), silent())
    return {
        **facts,
        "seconds": seconds,
        "calibration_seconds": calibrating or None,
        "peak_bytes": peak,
        "notice": "; ".join([treated.notice, *([EXACT] if exact else [])]),
    }


def exact_products() -> Any:
    """Where the CPU has no int8 instructions, let `torch._int_mm` take its integers out of float products: the same
    ones, in a twentieth of the time.

    Returns:
        What the change lasts as long as; None where it is not needed.
    """
    import torch

    from dacc.runtime.kernels_exact import exact_product, has_int8_products

    if has_int8_products():
        return None
    library = torch.library.Library("aten", "IMPL")
    library.impl("_int_mm", exact_product, "CPU")
    return library


def _quiet() -> None:
    """Peers warn at every layer."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt")


if __name__ == "__main__":
    main()
