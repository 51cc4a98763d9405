"""Bundles of tiny pipelines beside the float ones that they were made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    """Quantize a copy of a folder in the test's own folder: `bundle(flux_folder, bits=4)`."""

    def make(folder: Path, calibrated: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> Path:
        source = tmp_path / folder.name
        if not source.exists():
            shutil.copytree(folder, source)
        config = QuantizeConfig(measure="never", **options)
        return quantize_pipeline(source, config, output=tmp_path / "bundle", device="cpu", **calibrated)

    return make
