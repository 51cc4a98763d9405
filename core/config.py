"""Frozen configs: unknown fields are refused, every failed check becomes one ConfigError with advice."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")
NAMED_AT_MOST = 16  # names in one message


class Config(BaseModel):
    """Base of every config: immutable, and it refuses fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(Config):
    """A JSON document that we print or write; `schema` comes first and grows with every incompatible change."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    schema_version: int = Field(default=1, alias="schema")


def build_config(config_class: type[ConfigT], **values: Any) -> ConfigT:
    """Build a config from raw values.

    Raises:
        ConfigError: a value has the wrong type or range, or a field is unknown (the nearest names are given).
    """
    try:
        config = config_class(**values)
    except ValidationError as error:
        raise ConfigError(_describe_all(config_class, error.errors()), mend=_advice(config_class, error)) from None
    for field, value in config:
        if isinstance(value, float) and not math.isfinite(value):  # no JSON could hold it
            raise ConfigError(f"{field}={value}: Input should be a finite number.")
    return config


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
    more = f" and {len(known) - NAMED_AT_MOST} more" if len(known) > NAMED_AT_MOST else ""
    return f"Known: {', '.join(sorted(known)[:NAMED_AT_MOST])}{more}."


def _describe_all(config_class: type[Config], entries: Sequence[Any]) -> str:
    """One sentence per field; the branches of a union speak of the same field."""
    told: dict[str, list[str]] = {}
    for entry in entries:
        field, text = _describe(config_class, entry)
        told.setdefault(field, []).append(text)
    return "; ".join(field + " or ".join(texts).rstrip(".") for field, texts in told.items()) + "."


def _describe(config_class: type[Config], entry: Any) -> tuple[str, str]:
    """The beginning, which names the field, and what is wrong with it."""
    field = str(entry["loc"][0]) if entry["loc"] else ""
    if entry["type"] == "extra_forbidden":
        known = list(config_class.model_fields)
        return f"there is no field {field!r}", f". {nearest(field, known)}" if known else ""
    if entry["type"] == "missing":
        return f"{field} has to be given", ""
    message = entry["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    return (f"{field}={entry['input']!r}: " if field else ""), message


def _advice(config_class: type[Config], error: ValidationError) -> str:
    kinds = {entry["type"] for entry in error.errors()}
    missing = [str(entry["loc"][0]) for entry in error.errors() if entry["type"] == "missing"]
    if "extra_forbidden" in kinds and not config_class.model_fields:
        return "It has no fields: leave --set out."
    if "extra_forbidden" in kinds:
        return f"Fields: {', '.join(config_class.model_fields)}."
    return f"Add {' '.join(f'--set {field}=VALUE' for field in missing)}." if missing else ""
