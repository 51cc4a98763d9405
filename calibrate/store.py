"""Calibration sets on disk: `dacc_calibration.json` and one safetensors file for each batch.

A file holds the tensors of a batch, each once, and in the text `record` of its header the calls in which they stand,
see `arguments.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.calibration import CALIBRATION_NAME, CalibrationRecord, ShardRecord, read_calibration
from ..core.config import nearest
from ..core.errors import BundleError, CalibrationError, ConfigError, ModelError
from ..core.folder import place_file, sync_tree
from ..core.manifest import RUN_NAME
from ..core.output import OutputWriter
from ..core.reporter import Reporter, silent
from ..core.safe_read import checked_link, file_sha256, is_plain_name, read_header_and_metadata
from ..core.schedule_id import ScheduleId
from ..runtime.clock import RunState
from ..runtime.trajectory import DenoiserCall
from .arguments import is_finite, unpack

RecordFactory = Callable[[tuple[ShardRecord, ...]], CalibrationRecord]


class SetWriter(OutputWriter):
    """Makes one calibration set, atomically and resumably; the journal's files become its shards."""

    def unit_bytes(self, name: str) -> int:
        """Size of a finished unit's file."""
        return self._journal.file(name).stat().st_size

    def commit(self, units: Sequence[str], make_record: RecordFactory, run_facts: Mapping[str, Any]) -> Path:
        """Complete the folder with these units, in this order, and rename it into place."""
        shards = tuple(self._place(number, name) for number, name in enumerate(units))
        record = make_record(shards)
        record = record.model_copy(update={"id": record.identity()})
        self.write_text(CALIBRATION_NAME, record.to_json())
        self.write_text(RUN_NAME, json.dumps(run_facts, indent=1, sort_keys=True) + "\n")
        sync_tree(self.folder)
        return self._put_in_place()

    def _place(self, number: int, name: str) -> ShardRecord:
        file, record = self.folder / f"calls-{number:05d}.safetensors", self.unit_record(name)
        place_file(self._journal.file(name), file, link=True)
        return ShardRecord(
            file=file.name,
            size=file.stat().st_size,
            sha256=file_sha256(file),
            samples=record["samples"],
            calls=record["calls"],
            records=Counter(entry["component"] for entry in record["records"]),
        )


class CalibrationSet(Sequence[DenoiserCall]):
    """What entered the denoisers of a pipeline, call by call, read from the disk as it is asked for.

    Calls of one batch follow each other in the order of the run, so whoever takes only a part should draw it at random.

    Args:
        component: calls of this denoiser alone.
        dtype: of float tensors of at least two dimensions; None: as they entered. Vectors, such as timesteps, stay.
        device: where all tensors are.
    """

    def __init__(
        self,
        folder: Path,
        record: CalibrationRecord,
        component: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.folder, self.record, self.component = folder, record, component
        self._dtype, self._device = dtype, device
        self._last: _Shard | None = None  # that a single call was taken from: its neighbours share tensors

    @property
    def schedule(self) -> ScheduleId:
        """The grid of the run."""
        return self.record.schedule

    @property
    def moments(self) -> list[int]:
        """At which call of its run each was made; of all headers, without a tensor."""
        return [moment for number in range(len(self.record.shards)) for moment in self._shard(number).moments]

    @property
    def largest(self) -> DenoiserCall:
        """One with the most samples."""
        shards = self.record.shards
        known = [number for number, shard in enumerate(shards) if self._count(shard)]
        number = max(known, key=lambda place: (len(shards[place].samples), -place))
        return self._shard(number).call(0)

    def of(
        self, component: str, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> CalibrationSet:
        """The calls of one denoiser alone, for a network of this type on this device; see the class."""
        return CalibrationSet(self.folder, self.record, component, dtype, device)

    def __len__(self) -> int:
        return sum(map(self._count, self.record.shards))

    def __iter__(self) -> Iterator[DenoiserCall]:
        for number in range(len(self.record.shards)):
            yield from self.batch(number)

    @overload
    def __getitem__(self, place: int) -> DenoiserCall: ...

    @overload
    def __getitem__(self, place: slice) -> list[DenoiserCall]: ...

    def __getitem__(self, place: int | slice) -> DenoiserCall | list[DenoiserCall]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        place, number = range(len(self))[place], 0
        while place >= (count := self._count(self.record.shards[number])):
            place, number = place - count, number + 1
        if self._last is None or self._last.number != number:
            self._last = self._shard(number)
        return self._last.call(place)

    def batch(self, number: int) -> Iterator[DenoiserCall]:
        """The calls of one shard, whose samples and calls `record.shards[number]` names.

        Their run states carry a run number of their own, below zero, so that they are taken for one run and no other.

        Raises:
            CalibrationError: a value is NaN or infinite.
            BundleError: the shard is not written as it should be.
        """
        if count := self._count(self.record.shards[number]):
            yield from map(self._shard(number).call, range(count))

    def _shard(self, number: int) -> _Shard:
        file = self.folder / self.record.shards[number].file
        return _Shard(file, number, self.component, self._dtype, self._device)

    def _count(self, shard: ShardRecord) -> int:
        return sum(count for name, count in shard.records.items() if self.component in (None, name))


class _Shard:
    """The calls of one file. Only the tensors of those that are asked for are loaded and checked, each once."""

    def __init__(
        self, file: Path, number: int, component: str | None, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        self.number, self._file, self._dtype, self._device = number, file, dtype, device
        self._known: dict[tuple[str, torch.dtype | None], Tensor] = {}
        with self._as_written():
            entries = json.loads(read_header_and_metadata(file)[1]["record"])["records"]
            self._entries = [entry for entry in entries if component in (None, entry["component"])]

    @property
    def moments(self) -> list[int]:
        """At which call of the run each was made."""
        with self._as_written():
            return [RunState(run=-1 - self.number, **entry["state"]).call for entry in self._entries]

    def call(self, place: int) -> DenoiserCall:
        """One of them, in the order of the run."""
        with self._as_written(), safe_open(self._file, framework="pt") as stored:  # mapped, not read
            entry, load = self._entries[place], partial(self._load, stored.get_tensor)
            return DenoiserCall(
                component=entry["component"],
                state=RunState(run=-1 - self.number, **entry["state"]),
                args=tuple(unpack(value, load) for value in entry["args"]),
                kwargs={name: unpack(value, load) for name, value in entry["kwargs"]},
                truth=unpack(entry.get("truth"), load),
            )

    def _load(self, read: Callable[[str], Tensor], name: str, entered_as: torch.dtype | None) -> Tensor:
        if (name, entered_as) not in self._known:
            tensor = read(name).clone()  # a mapped one is not aligned as torch does it: its products differ
            if not is_finite(tensor):
                raise CalibrationError(
                    f"{self._file} holds NaN or infinity.", mend="Make the set anew with dacc calibrate."
                )
            wanted = self._dtype if tensor.is_floating_point() and tensor.ndim > 1 else None
            self._known[name, entered_as] = tensor.to(self._device, wanted or entered_as or tensor.dtype)
        return self._known[name, entered_as]

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            raise BundleError(
                f"{self._file} has a record that cannot be read ({error}).", mend="Make it anew."
            ) from error


def open_calibration(
    folder: str | Path,
    *,
    component: str | None = None,
    weights: Mapping[str, str] | None = None,
    ancestors: Mapping[str, Collection[str]] | None = None,
    reporter: Reporter | None = None,
) -> CalibrationSet:
    """Check a calibration set byte by byte and give its calls.

    Args:
        component: calls of this denoiser alone.
        weights: component -> weight hash of the pipeline that the set is to serve.
        ancestors: component -> weight hashes that it had before earlier passes; a set of those serves, with a notice.

    Raises:
        BundleError: a file is damaged, cut short or missing, or the record was changed.
        ModelError: the folder is no calibration set, or one of another model.
        ConfigError: it holds no call of this component.
    """
    folder = Path(folder)
    record = read_calibration(folder)
    if record is None:
        raise ModelError(f"{folder} is not a calibration set ({CALIBRATION_NAME} is missing).", mend=_MAKE)
    if record.id != record.identity():
        raise BundleError(f"{folder / CALIBRATION_NAME} is not what it was when it was written.", mend=_AGAIN)
    if component is not None and component not in record.branches:
        raise ConfigError(f"{folder} holds no calls of {component!r}.", mend=nearest(component, list(record.branches)))
    _check_model(folder, record, [component] if component else list(record.branches), weights, ancestors, reporter)
    for shard in record.shards:
        _check_shard(folder, shard)
    return CalibrationSet(folder, record, component)


_MAKE = "Make one with dacc calibrate."
_AGAIN = "Copy the set again, or make it anew with dacc calibrate."


def _check_model(
    folder: Path,
    record: CalibrationRecord,
    components: Sequence[str],
    weights: Mapping[str, str] | None,
    ancestors: Mapping[str, Collection[str]] | None,
    reporter: Reporter | None,
) -> None:
    for name in components:
        made_on = record.source.weights[name]
        if weights is None or weights.get(name, made_on) == made_on:
            continue
        if made_on not in (ancestors or {}).get(name, ()):
            raise ModelError(
                f"{folder} was made with {record.source.name}, whose {name} has other weights.",
                "Another model's inputs say nothing about this one's.",
                "Make a set of this pipeline with dacc calibrate.",
            )
        (reporter or silent()).notice(f"the calibration set was made before earlier passes changed {name}")


def _check_shard(folder: Path, shard: ShardRecord) -> None:
    if not is_plain_name(shard.file):
        raise BundleError(f"{folder} names {shard.file!r}, which leads out of it.", mend="Do not trust it.")
    file = checked_link(folder / shard.file, folder)
    if (size := file.stat().st_size) != shard.size:
        raise BundleError(f"{file} has {size} bytes; it was written with {shard.size}.", mend=_AGAIN)
    if file_sha256(file) != shard.sha256:
        raise BundleError(f"{file} is damaged: its hash is another than when it was written.", mend=_AGAIN)
