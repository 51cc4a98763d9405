"""The wheel: everything that a user needs is in it, and it works where only it is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True)
    for name in filter(None, tracked.stdout.split("\0")):  # a copy: building leaves files beside the source
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_zoo_but_not_its_training(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for pipeline, denoiser in (("digits-unet", "unet"), ("digits-dit", "transformer")):
        assert f"dacc/zoo/{pipeline}/{denoiser}/diffusion_pytorch_model.safetensors" in names
    assert "dacc/zoo/digits-judge/reference.safetensors" in names
    assert "dacc/zoo/index.json" in names
    assert not [name for name in names if "/zoo/shapes-" in name or "/zoo/digits-video" in name]
    assert not [name for name in names if "/train/" in name or "/tests/" in name or "/benchmarks/" in name]


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]!r}\n"
        "import dacc\nfrom dacc.core.zoo import list_zoo\n"
        "print(dacc.__file__, *[entry.path for entry in list_zoo() if entry.installed])"
    )
    command = [sys.executable, "-S", "-c", program]  # -S: no .pth file, so no editable checkout
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = done.stdout.split()
    assert len(found) == 3
    assert all(path.startswith(str(tmp_path)) for path in found)
