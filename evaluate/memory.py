"""Peak memory of loading a source and generating one batch, in a fresh process: a process's peak never goes down again,
so it cannot be measured twice in one. Run as a module, this file is that process; it prints one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..core.errors import ResourceError
from .result import Memory

TIMEOUT_SECONDS = 1800


def measure_memory(
    folder: Path, request: dict[str, Any], *, device: str, dtype: str, prefer: str, threads: int
) -> Memory:
    """Peak and baseline memory of one pipeline.

    Args:
        folder: the pipeline.
        request: a RunRequest as JSON values; its first batch is generated.

    Raises:
        ResourceError: the process failed or took too long.
    """
    order = {"folder": str(folder), "request": request, "device": device, "dtype": dtype, "prefer": prefer}
    paths = [str(Path(entry).resolve()) for entry in sys.path if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as empty:  # the folder of -m comes first on the path and must hold no modules
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__],
                input=json.dumps(order),
                capture_output=True,
                text=True,
                cwd=empty,
                env=environment,
                timeout=TIMEOUT_SECONDS,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise ResourceError(f"it took more than {TIMEOUT_SECONDS} s.") from None
        except subprocess.CalledProcessError as error:
            last = error.stderr.strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
            raise ResourceError(f"the process failed ({last[0]}).") from None
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far.

    On Linux from /proc: `getrusage` there counts what the parent held before the process became ours.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def _probe(order: dict[str, Any]) -> Memory:
    import psutil
    import torch

    from ..core.reporter import silent
    from ..runtime.load import load_source
    from ..runtime.request import RunRequest
    from ..runtime.trajectory import run_batch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    baseline = psutil.Process().memory_info().rss
    pipe: Any = load_source(
        Path(order["folder"]),
        device=order["device"],
        dtype=order["dtype"],
        prefer=order["prefer"],
        reporter=silent(),
    )
    request = RunRequest(**order["request"])
    run_batch(pipe, request, next(request.batches()))
    device_peak = torch.cuda.max_memory_allocated(pipe.device) if pipe.device.type == "cuda" else None
    return Memory(peak_bytes=peak_resident_bytes(), baseline_bytes=baseline, device_peak_bytes=device_peak)


if __name__ == "__main__":
    sys.stdout.write(_probe(json.load(sys.stdin)).model_dump_json() + "\n")
