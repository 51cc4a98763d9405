"""Writing a bundle, see `core/output.py`: replaced components unit by unit, all other files as they were.

How a pass uses it:

with BundleWriter(source, output, replace={"unet"}, run_key=key, reporter=reporter) as writer:
    for name in names - writer.finished_units():
        writer.save_unit(f"unet/{name}", tensors, record)
    writer.write_component("unet", config, kept_tensors)
    writer.commit(make_manifest, run_facts, make_card)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache_plan import CORRECTION_NAME
from .errors import BundleError, ConfigError
from .folder import carried_files, check_replaceable, files_in, place_file, swap_in, sync_tree
from .manifest import MANIFEST_NAME, RUN_NAME, UNHASHED, FileRecord, Manifest, read_manifest
from .output import OutputWriter
from .reporter import Reporter
from .safe_read import combined_hash, file_hashes, resolve_shards, weight_stem
from .tensor_file import SHARD_BYTES, StoredTensor, write_tensors, write_weights
from .verify import verify_bundle

if TYPE_CHECKING:
    from torch import Tensor

ManifestFactory = Callable[[dict[str, FileRecord]], Manifest]
CardFactory = Callable[[Manifest], str]


def existing_bundle(output: Path, run_key: str) -> bool:
    """Whether `output` already is the intact result of the very same run.

    Raises:
        ConfigError: it is that result, but damaged.
    """
    try:
        manifest = read_manifest(output)
    except BundleError:
        return False
    if manifest is None or manifest.extra.get("run_key") != run_key:
        return False
    if problems := verify_bundle(output):
        raise ConfigError(
            f"the output {output} is this very result, but damaged: {problems[0].file} {problems[0].problem}.",
            f"dacc verify {output} names all that is wrong.",
            "Give --overwrite to make it anew, or choose another --output.",
        )
    return True


def component_weight_hash(files: Mapping[str, FileRecord], component: str) -> str:
    """`safe_read.weight_hash` of a written component, from the table of files instead of the disk."""
    weights = {Path(name).name: record.sha256 for name, record in files.items() if _is_weight_of(name, component)}
    return combined_hash(weights)


def component_weight_bytes(files: Mapping[str, FileRecord], component: str) -> int:
    """Bytes of the weight files of a written component."""
    return sum(record.size for name, record in files.items() if _is_weight_of(name, component))


class BundleWriter(OutputWriter):
    """Makes one pipeline folder, atomically and resumably.

    Args:
        source: the pipeline folder that is transformed.
        output: the folder to make.
        replace: components whose weights and config this pass writes anew.
        run_key: names the result; decides whether units of an interrupted run can be used.
        arithmetic: what these units must have been made with besides, see `core/machine.py`.
        overwrite: an old pipeline at `output` is exchanged for the new one, at the very end.
        resume: use finished units of an interrupted run.
        reporter: where to speak.
        estimated_bytes: what the replaced components will take; default: as much as in the source.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        *,
        replace: set[str],
        run_key: str,
        reporter: Reporter,
        arithmetic: Sequence[str] = (),
        overwrite: bool = False,
        resume: bool = True,
        estimated_bytes: int | None = None,
    ) -> None:
        super().__init__(
            source,
            output,
            run_key=run_key,
            reporter=reporter,
            arithmetic=arithmetic,
            overwrite=overwrite,
            resume=resume,
        )
        self.replace, self._estimate = frozenset(replace), estimated_bytes
        self._carried: dict[str, Path] = {}
        self._inherited: dict[str, FileRecord] = {}  # what the source's own manifest says about its files
        self._linked = False

    def save_unit(self, name: str, tensors: Mapping[str, StoredTensor | Tensor], record: Any) -> None:
        """Keep one finished unit, named `component/unit`; tensors by their full names within the component.

        What only a resumed run needs is named `purpose:component`, and not written to the component.
        """
        purpose, _, component = name.partition("/")[0].rpartition(":")
        assert purpose or component in self.replace, f"{name!r} does not begin with a replaced component"
        super().save_unit(name, tensors, record)

    # files

    def write_component(
        self,
        component: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor | Tensor] | None = None,
        *,
        info: str = "",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write a replaced component: all its units together with `tensors`, and its config.json.

        Memory follows the largest tensor, not the shard. `info` is a short text for the files' metadata, so that a lone
        file says what it is.
        """
        merged = dict(tensors or {})
        for unit in sorted(self._journal.names()):
            if unit.startswith(f"{component}/"):
                stored = self._journal.tensors(unit)
                twice = merged.keys() & stored.keys()
                assert not twice, f"tensors given twice: {sorted(twice)}"
                merged.update(stored)
        metadata = {"format": "pt"} | ({"dacc": info} if info else {})
        folder = self.folder / component
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, weight_stem(self.source / component), merged, metadata, shard_bytes)
        self.write_text(f"{component}/config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")

    def write_table(self, name: str, tensors: Mapping[str, StoredTensor | Tensor], *, info: str) -> None:
        """Write tensors that are no weights; the source's file of that name is then not carried over."""
        self.leave_out(name)
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors, {"dacc": info, "format": "pt"})

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file as it is; the source's file of that name is then not carried over."""
        self.leave_out(name)
        (self.folder / name).write_bytes(content)

    def leave_out(self, name: str) -> None:
        """Do not carry over the source's file of this name."""
        self._carried.pop(name, None)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file; the source's file of that name is then not carried over."""
        self.leave_out(name)
        super().write_text(name, text)

    def carry_unchanged(self) -> None:
        """Bring over everything of the source that was not written anew. From then on `folder` can be loaded."""
        for name, file in self._carried.items():
            if not (self.folder / name).exists():  # brought over by an earlier call
                place_file(file, self.folder / name, link=self._linked)

    # the end

    def stage(self, make_manifest: ManifestFactory, run_facts: Mapping[str, Any], make_card: CardFactory) -> None:
        """Complete the folder, up to the rename: unchanged files, manifest, run facts and model card."""
        for component in self.replace:
            assert (self.folder / component).is_dir(), f"component {component!r} was to be replaced and is not written"
        self.carry_unchanged()
        manifest = make_manifest(self._file_records())
        manifest = manifest.model_copy(update={"extra": {**manifest.extra, "run_key": self.run_key}})
        self.write_text(MANIFEST_NAME, manifest.to_json())
        self.write_text(RUN_NAME, json.dumps(run_facts, indent=1, sort_keys=True) + "\n")
        self.write_text("README.md", make_card(manifest))
        sync_tree(self.folder)

    def commit(self, make_manifest: ManifestFactory, run_facts: Mapping[str, Any], make_card: CardFactory) -> Path:
        """Complete the folder and rename it into place."""
        self.stage(make_manifest, run_facts, make_card)
        return self._put_in_place()

    def abandon(self, *, keep: bool) -> Path | None:
        """Give up a result that is not good enough; with `keep` it stays beside the output as `<output>.failed`."""
        failed = self.output.with_name(f"{self.output.name}.failed")
        if keep:
            self.carry_unchanged()
            check_replaceable(failed, overwrite=True)
            swap_in(self.folder, failed)
        self._close()
        return failed if keep else None

    # inside

    def _prepare(self) -> None:
        manifest = read_manifest(self.source)
        self._linked = manifest is not None
        self._inherited = dict(manifest.files) if manifest else {}
        self._carried, left_out = carried_files(self.source, self.replace)
        if left_out:
            self.reporter.notice(f"not carried over (pickled, or no part of the pipeline): {', '.join(left_out)}")
        needed = 0 if self._linked else sum(file.stat().st_size for file in self._carried.values())
        self.check_disk(needed + (self._replaced_bytes() if self._estimate is None else self._estimate))

    def _replaced_bytes(self) -> int:
        shards = (resolve_shards(self.source / component) for component in self.replace)
        return sum(path.stat().st_size for found in shards for path in found.values())

    def _file_records(self) -> dict[str, FileRecord]:
        files = {name: file for name, file in files_in(self.folder) if name not in UNHASHED}
        records = {
            name: FileRecord(size=files[name].stat().st_size, sha256=digest)
            for name, digest in file_hashes(files).items()
        }
        for name in self._carried:
            if self._inherited.get(name, records[name]) != records[name]:
                raise BundleError(f"{self.source / name} is not what its manifest says.", mend="Copy the source again.")
        return records


def _is_weight_of(name: str, component: str) -> bool:
    folder, _, rest = name.rpartition("/")
    return folder == component and rest.endswith(".safetensors") and rest != CORRECTION_NAME
