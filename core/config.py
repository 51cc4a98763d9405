"""Frozen configs: unknown fields are refused, every failed check becomes one ConfigError with advice."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every config: immutable, and it refuses fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def build_config(config_class: type[ConfigT], **values: Any) -> ConfigT:
    """Build a config from raw values.

    Raises:
        ConfigError: a value has the wrong type or range, or a field is unknown (the nearest names are given).
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_describe(config_class, entry) for entry in error.errors()), mend=_advice(config_class)
        ) from None


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """`["field=value", ...]` of `--set` as a dict of raw strings; pydantic converts them.

    Raises:
        ConfigError: an entry has no `=`, or a field is given twice.
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        field, separator, value = pair.partition("=")
        if not separator or not field:
            raise ConfigError(
                f"--set {pair!r} is not of the form field=value.", mend="Write for example --set search=mse."
            )
        if field in settings:
            raise ConfigError(f"--set gives {field!r} twice.", mend="Give each field once.")
        settings[field.replace("-", "_")] = value
    return settings


def nearest(name: str, known: list[str]) -> str:
    """A sentence naming the known names closest to `name`, or all of them when none is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(sorted(known))}."


def _describe(config_class: type[Config], entry: Any) -> str:
    field = ".".join(str(part) for part in entry["loc"]) or config_class.__name__
    if entry["type"] == "extra_forbidden":
        return f"there is no field {field!r}. {nearest(field, list(config_class.model_fields))}"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{field}={entry['input']!r}: {message}" if entry["loc"] else message


def _advice(config_class: type[Config]) -> str:
    return f"Fields: {', '.join(config_class.model_fields)}."
