"""What `dacc export` is asked for. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..core.config import Config
from ..core.registry import Registry

TARGETS = Registry("export format", f"{__package__}.targets", Path(__file__).parent / "targets", dashed=True)


class ExportConfig(Config):
    """Options of `dacc export`."""

    format: str
    component: tuple[str, ...] = ()  # empty: all denoisers
    lossy: bool = False  # go on where the format cannot hold all that the source has
    settings: dict[str, Any] = Field(default_factory=dict)  # of the format

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        TARGETS.check(name)
        return name
