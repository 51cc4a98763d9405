"""Run mypy on the package and make sure that it saw every file: strict on most folders, plain elsewhere.

The repository root is the package `dacc`, so mypy is pointed at a folder in which a link of that name leads here.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STRICT = ("core", "runtime", "calibrate", "cli")
PLAIN = ("quant", "evaluate", "cache", "export", "prune")
UNTYPED_NEIGHBOURS = ("--allow-untyped-calls", "--no-warn-return-any")  # diffusers carries few annotations


def run_mypy(workspace: Path, folders: tuple[str, ...], *options: str) -> bool:
    """Type-check folders of the package; True when clean and every file was seen."""
    files = sorted(
        str(Path("dacc") / file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*.py")
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *options, *files]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, end="")
    seen = f"{len(files)} source files" in done.stdout
    if done.returncode == 0 and not seen:
        print(f"mypy did not report on all {len(files)} files of {', '.join(folders)}")
    return done.returncode == 0 and seen


def main() -> None:
    """Exit 1 when anything is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        (workspace / "dacc").symlink_to(ROOT)
        strict = run_mypy(workspace, STRICT, "--strict", *UNTYPED_NEIGHBOURS)
        plain = run_mypy(workspace, PLAIN)
    sys.exit(0 if strict and plain else 1)


if __name__ == "__main__":
    main()
