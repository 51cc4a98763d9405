"""How long calibrated methods take: processor time at equal numbers of updates, and a default run against the clock.

    python benchmarks/quantize_time.py                        # writes the tables in docs/results.md
    python benchmarks/quantize_time.py --source zoo:digits-unet --repeats 1

Methods take turns, each `dacc quantize` a process of its own on one thread. The calibration set of each method, made as
its command would make it, is there before and not counted.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dacc.benchmarks.study import RESULTS, write_between
from dacc.core.machine import describe_machine
from dacc.quant.config import QuantizeConfig, on_the_fly

SOURCES = ("zoo:digits-unet", "zoo:shapes-sd")
NAMES = ("qdiffusion", "tfmq")  # the first is what the others are compared with
UPDATES = 200
BITS = ["--bits", "4", "--act-bits", "8"]
DEFAULT_RUN = "zoo:shapes-sd", "tfmq"


@dataclass(frozen=True)
class Spent:
    """What one command took."""

    seconds: float
    processor_seconds: float
    said: str  # its standard error


def spend(*arguments: str) -> Spent:
    """Run a command of dacc to its end."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [str(Path(sys.executable).parent / "dacc"), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(time.perf_counter() - started, taken, done.stderr)


def quantize(source: str, method: str, sets: Path, *options: str, threads: int) -> Spent:
    """Quantize with a calibration set that is made first, unless it is there."""
    folder = sets / f"{source.removeprefix('zoo:')}-{method}"
    if not folder.exists():
        own = on_the_fly(QuantizeConfig(bits=4, act_bits=8, method=method), [])
        made = ["--strategy", own.strategy, "--samples", str(own.samples)]
        spend("calibrate", source, *made, "-o", str(folder), "--quiet")
    run = ["quantize", source, *BITS, "--method", method, "--calib", str(folder), "--measure", "never"]
    return spend(*run, *options, "--threads", str(threads), "-o", str(sets / "out"), "--overwrite", "--no-resume")


def compare(source: str, sets: Path, repeats: int) -> list[str]:
    """Rows of the table of one source."""
    taken: dict[str, list[float]] = {method: [] for method in NAMES}
    for _ in range(repeats):
        for method, times in taken.items():
            times.append(quantize(source, method, sets, "--set", f"iterations={UPDATES}", threads=1).processor_seconds)
            print(source, method, f"{times[-1]:.0f} s", flush=True)
    medians = {method: statistics.median(times) for method, times in taken.items()}
    first = next(iter(medians.values()))
    return [f"| {source} | {method} | {taken:.0f} s | {taken / first:.2f} |" for method, taken in medians.items()]


def default_run(sets: Path) -> str:
    """The sentence about a run with nothing but the bits and the method."""
    source, method = DEFAULT_RUN
    spent = quantize(source, method, sets, threads=os.cpu_count() or 1)
    chosen = next((line.strip() for line in spent.said.splitlines() if "updates each" in line), "")
    return (
        f"`dacc quantize {source} {' '.join(BITS)} --method {method}` with its defaults took {spent.seconds / 60:.1f} "
        f"minutes on {os.cpu_count()} threads ({chosen})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--source", action="append", help=f"default: {', '.join(SOURCES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--default-run", action=argparse.BooleanOptionalAction, default=True, help="time that as well")
    parser.add_argument("--sets", type=Path, help="keep the calibration sets in this folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as temporary:
        sets = options.sets or Path(temporary)
        sets.mkdir(parents=True, exist_ok=True)
        rows = [row for source in options.source or SOURCES for row in compare(source, sets, options.repeats)]
        said = ["", default_run(sets)] if options.default_run else []
    heading = (
        f"Processor time of `dacc quantize {' '.join(BITS)} --set iterations={UPDATES}` on one thread, median of "
        f"{options.repeats} (`benchmarks/quantize_time.py`); {machine['processor']} ({machine['instruction_sets']}), "
        f"torch {machine['torch']}, {datetime.date.today().isoformat()}."
    )
    table = ["| source | method | time | ratio |", "|---|---|---|---|", *rows]
    write_between(options.results, "time", {"methods": "\n".join([heading, "", *table, *said])})


if __name__ == "__main__":
    main()
