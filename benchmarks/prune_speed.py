"""Whether a pruned denoiser is as much faster as it has fewer multiply-accumulates, at the sizes that people run.

    python benchmarks/prune_speed.py                  # writes the table in docs/results.md
    python benchmarks/prune_speed.py --model sd15     # one model, printed

The weights are random: `dacc prune --method bksdm` removes fixed patterns and looks at none. Whole and pruned networks
take turns with one call of one image.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dacc.benchmarks.full_size import example_inputs, make_pipeline_folder
from dacc.benchmarks.study import RESULTS, write_between
from dacc.core.machine import describe_machine
from dacc.core.pipeline import denoisers
from dacc.prune.api import prune_pipeline
from dacc.prune.config import PruneConfig
from dacc.runtime.load import DTYPES, load
from dacc.runtime.macs import count_macs
from dacc.runtime.timing import measure_in_turns

DEPTH = {"dit-xl": 8, "pixart-xl": 8, "sd15": 2}
CUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dit-xl": {"a quarter": {"ratio": 0.2}, "half": {"ratio": 0.4}},
    "pixart-xl": {"a quarter": {"ratio": 0.2}, "half": {"ratio": 0.4}},
    "sd15": {"base": {"settings": {"size": "base"}}, "small": {"settings": {"size": "small"}}},
}


def denoiser_of(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network of a pipeline folder."""
    (network,) = denoisers(load(folder, device="cpu", dtype=dtype)).values()
    return network


@torch.inference_mode()
def rows_of(model: str, folder: Path, dtype: torch.dtype, repeats: int) -> list[str]:
    """Rows of the table of one model."""
    whole = make_pipeline_folder(model, folder / "whole", depth=DEPTH[model], dtype=dtype)
    networks = {"whole": denoiser_of(whole, dtype)}
    for cut, options in CUTS[model].items():
        config = PruneConfig(method="bksdm", measure="never", allow_adjacent=True, **options)
        networks[cut] = denoiser_of(prune_pipeline(whole, config, output=folder / cut.replace(" ", "-")), dtype)
    inputs = example_inputs(model, dtype=dtype)
    calls = [lambda network=network: network(**inputs) for network in networks.values()]
    macs = [count_macs(call) for call in calls]
    seconds = [statistics.median(times) for times in measure_in_turns(calls, repeats)]
    found = []
    for place, name in enumerate(networks):
        parameters = sum(parameter.numel() for parameter in networks[name].parameters()) / 1e6
        promised, reached = macs[0] / macs[place], seconds[0] / seconds[place]
        found.append(
            f"| {model}, {DEPTH[model]} | {name} | {parameters:.0f} M | {macs[place] / 1e9:.0f} G "
            f"| {seconds[place]:.2f} s | {promised:.2f} | {reached:.2f} | {reached / promised:.2f} |"
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", choices=CUTS, action="append", help="default: all, into the results")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for model in options.model or CUTS:
        with tempfile.TemporaryDirectory() as temporary:
            rows += rows_of(model, Path(temporary), DTYPES[options.dtype], options.repeats)
    if options.model:
        return
    machine = describe_machine()
    heading = (
        f"One call of one image in {options.dtype}, medians of {options.repeats} in turns "
        f"(`benchmarks/prune_speed.py`); {machine['processor']} ({machine['instruction_sets']}), "
        f"{options.threads} threads, torch {machine['torch']}, {datetime.date.today().isoformat()}."
    )
    table = [
        "| model, depth | removed | parameters | MACs | time | of MACs | speed-up | speed-up / of MACs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    write_between(RESULTS, "prune-speed", {"full-size": "\n".join([heading, "", *table, *rows])})


if __name__ == "__main__":
    main()
