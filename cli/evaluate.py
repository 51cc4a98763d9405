"""`dacc evaluate`: quality, size, memory and speed side by side."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def mount(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(source: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Not yet."""
    sys.stdout.write("")
