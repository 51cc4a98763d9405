"""The schedule file of ECAD (2025), arXiv 2506.15682: a truth value for every step, block and component of a
transformer; true computes. Read and written as plans of module units. Imports no torch.

    {"cache_schedule": {"num_blocks": 28, "num_inference_steps": 20, "name": "...", "attributes": {},
                        "schedule": {"000": {"0": {"attn1": true, "attn2": true, "ff": true}, ...}, ...}},
     "config": {...}, "metrics": {"total_macs": ...}}

A Flux has two lists of blocks: those of the first are `0`, `1`, ... with the components full_attn, full_ff and
full_ff_context, those of the second `single_0`, ... with single_attn, single_proj_mlp and single_proj_out; there is
also `num_single_blocks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.cache_plan import COMPUTE, REUSE, CachePlan, ModuleUnit
from ..core.errors import ConfigError, UnsupportedError
from ..core.safe_read import read_json

SINGLE = "single_"
PLAIN = ("attn1", "attn2", "ff")  # our names are the file's
DOUBLE_PARTS = {"full_attn": "attn", "full_ff": "ff", "full_ff_context": "ff_context"}
SINGLE_PARTS = {"single_attn": "attn", "single_proj_mlp": "proj_mlp", "single_proj_out": "proj_out"}
_BLOCK = re.compile(r"(single_)?(\d+)")


@dataclass(frozen=True)
class EcadSchedule:
    """A schedule file, checked in itself."""

    steps: int
    codes: dict[tuple[str, str], str]  # (block, component) as the file names them -> a letter for each step

    def units(self, stacks: tuple[str, ...], modules: Iterable[str], name: str) -> dict[ModuleUnit, str]:
        """Module units of a denoiser -> their codes.

        Args:
            stacks: its lists of blocks, in the order in which they run.
            modules: the names of its modules.
            name: of its class, for messages.

        Raises:
            UnsupportedError: the schedule is for another kind of model.
        """
        known, found = set(modules), {}
        for (block, part), codes in self.codes.items():
            single = block.startswith(SINGLE)
            stack = stacks[int(single)] if len(stacks) > single else ""
            own = (SINGLE_PARTS if single else DOUBLE_PARTS).get(part, part)
            path = f"{stack}.{block.removeprefix(SINGLE)}.{own}"
            if path not in known:
                raise UnsupportedError(
                    f"the schedule has {part} of block {block}; this {name} has no {path}.",
                    "A schedule is for one kind of model with one number of blocks.",
                    "Give the schedule of this model.",
                )
            found[ModuleUnit(id=path, path=path)] = codes
        return found


def read_schedule(file: Path) -> EcadSchedule:
    """Read a schedule file.

    Raises:
        ConfigError: it is missing, or no schedule.
    """
    if not file.is_file():
        raise ConfigError(f"--set file={file} is no file.", mend="Give a schedule of ECAD as JSON.")
    raw = read_json(file)
    head = raw.get("cache_schedule") if isinstance(raw, dict) else None
    table = head.get("schedule") if isinstance(head, dict) else None
    if not isinstance(head, dict) or not isinstance(table, dict) or not table:
        raise _bad(file, "it has no cache_schedule with a schedule")
    steps = head.get("num_inference_steps")
    if sorted(_numbers(file, table)) != list(range(len(table))) or steps != len(table):
        raise _bad(file, f"num_inference_steps is {steps!r}, and it has {len(table)} steps")
    ordered = [table[key] for key in sorted(table, key=int)]
    rows = [_row(file, number, step) for number, step in enumerate(ordered)]
    if any(row.keys() != rows[0].keys() for row in rows) or not rows[0]:
        raise _bad(file, "not every step has the same blocks and components")
    codes = {key: "".join(COMPUTE if row[key] else REUSE for row in rows) for key in rows[0]}
    return EcadSchedule(len(rows), codes)


def schedule_document(plan: CachePlan, stacks: tuple[str, ...], modules: Iterable[str], macs: int) -> Any | None:
    """A plan as the content of a schedule file; None where the file has no words for it.

    Args:
        stacks: the denoiser's lists of blocks.
        modules: the names of its modules.
        macs: multiply-accumulates of a run.
    """
    names = _file_names(stacks, modules)
    codes = {unit.path: plan.codes[unit.id] for unit in plan.units if isinstance(unit, ModuleUnit)}
    if not names or len(codes) != len(plan.units) or codes.keys() - names.keys():
        return None
    everything, schedule = COMPUTE * plan.calls, dict[str, Any]()
    for call in range(plan.calls):
        blocks: dict[str, dict[str, bool]] = {}
        for path, (block, part) in names.items():
            blocks.setdefault(block, {})[part] = codes.get(path, everything)[call] == COMPUTE
        schedule[f"{call:03d}"] = blocks
    singles = len({block for block, _ in names.values() if block.startswith(SINGLE)})
    head = {
        "name": "dacc",
        "attributes": {},
        "num_blocks": len({block for block, _ in names.values()}) - singles,
        "num_inference_steps": plan.calls,
        "schedule": schedule,
    }
    return {
        "cache_schedule": head | ({"num_single_blocks": singles} if singles else {}),
        "config": {},
        "metrics": {"total_macs": macs},
    }


def _file_names(stacks: tuple[str, ...], modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module -> block and component as the file names them."""
    modules, both = list(modules), len(stacks) == 2
    if not both and (len(stacks) != 1 or f"{stacks[0]}.0.attn1" not in modules):
        return {}
    first: Mapping[str, str] = DOUBLE_PARTS if both else {part: part for part in PLAIN}
    found = {}
    for path in modules:
        stack, _, rest = path.partition(".")
        number, _, own = rest.partition(".")
        if stack in stacks and number.isdigit():
            single = stack == stacks[-1] and both
            words = {ours: theirs for theirs, ours in (SINGLE_PARTS if single else first).items()}
            if own in words:
                found[path] = (f"{SINGLE}{number}" if single else number, words[own])
    return found


def _row(file: Path, number: int, step: Any) -> dict[tuple[str, str], bool]:
    if not isinstance(step, dict):
        raise _bad(file, f"step {number} is not a table of blocks")
    found = {}
    for block, parts in step.items():
        if not _BLOCK.fullmatch(block) or not isinstance(parts, dict):
            raise _bad(file, f"step {number} has {block!r}, which is not a block")
        for part, computes in parts.items():
            if not isinstance(computes, bool):
                raise _bad(file, f"{part} of block {block} at step {number} is neither true nor false")
            found[block, part] = computes
    return found


def _numbers(file: Path, table: Mapping[str, Any]) -> list[int]:
    if not all(key.isdigit() for key in table):
        raise _bad(file, "a step is not named by its number")
    return [int(key) for key in table]


def _bad(file: Path, why: str) -> ConfigError:
    return ConfigError(f"{file} is no schedule of ECAD: {why}.", mend="Give a schedule of ECAD as JSON.")
