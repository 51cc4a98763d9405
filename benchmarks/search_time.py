"""How long searches for cache plans take on the clock, and what a killed one has lost.

    python benchmarks/search_time.py                  # writes the paragraphs in docs/results.md

`dp` with its profile at the steps of a usual run, and `evolve` through all its generations: killed (SIGKILL) in the
middle, and begun again by the same command. Pipelines are loaded, and nothing is measured at the end.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dacc.benchmarks.study import RESULTS, write_between
from dacc.core.machine import describe_machine

DACC = str(Path(sys.executable).parent / "dacc")
DP = ["search-cache", "zoo:shapes-sd", "--steps", "50", "--macs-ratio", "0.33", "--method", "dp"]
EVOLVE = ["search-cache", "zoo:digits-dit", "--macs-ratio", "0.33", "--method", "evolve", "--samples", "4"]
GENERATIONS = 20  # what evolve does by default
KILLED_AFTER = 7
TOLD = re.compile(r"evolving: (\d+)/(\d+)")


def command_of(arguments: list[str], folder: Path, threads: int) -> list[str]:
    """The whole command."""
    output = folder / arguments[arguments.index("--method") + 1]
    return [DACC, *arguments, "--measure", "never", "--threads", str(threads), "-o", str(output)]


def dp_paragraph(folder: Path, threads: int) -> str:
    """What `dp` took."""
    started = time.perf_counter()
    subprocess.run(command_of(DP, folder, threads), check=True, capture_output=True)
    taken = time.perf_counter() - started
    return f"`dacc {' '.join(DP)}`, profile and trials included: **{taken / 60:.1f} minutes**."


def evolve_paragraph(folder: Path, threads: int) -> str:
    """What `evolve` took, and where it went on."""
    command, started = command_of(EVOLVE, folder, threads), time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as first:
        assert first.stderr is not None
        finished = 0
        while finished < KILLED_AFTER and (line := first.stderr.readline()):
            if told := TOLD.search(line):
                finished = int(told[1])
        first.kill()
    second = subprocess.run(command, check=True, capture_output=True, text=True)
    taken = time.perf_counter() - started
    told = TOLD.search(second.stderr)
    left = int(told[2]) if told else GENERATIONS
    lost = max(0, left + finished - GENERATIONS)
    return (
        f"`dacc {' '.join(EVOLVE)}`: {GENERATIONS} generations in **{taken / 60:.1f} minutes**, both runs together; "
        f"killed (SIGKILL) when {finished} were reported, it went on with {left} left: {lost} of those were lost."
    )


def main() -> None:
    """Run both and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    machine = describe_machine()
    heading = (
        f"One run of each on {options.threads} threads (`benchmarks/search_time.py`); {machine['processor']} "
        f"({machine['instruction_sets']}), torch {machine['torch']}, {datetime.date.today().isoformat()}."
    )
    with tempfile.TemporaryDirectory() as folder:
        found = [dp_paragraph(Path(folder), options.threads), evolve_paragraph(Path(folder), options.threads)]
    write_between(RESULTS, "cache-time", {"searches": "\n\n".join([heading, *found])})


if __name__ == "__main__":
    main()
