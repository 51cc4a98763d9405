"""What a caption asks for, in the judge's words, and how far a picture agrees.

A scene maps each head of the judge to one of its labels: `axis` to how the two objects lie to each other, `first shape`
and the like to what lies in a place. The first place is the upper one of a vertical axis, the left one of a horizontal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from ..core.config import Config

AXIS, RELATION = "axis", "relation"
PLACES = ("first", "second")
ATTRIBUTES = ("shape", "colour", "size")
Scene = dict[str, str]  # name of a head -> label
Words = Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True, min_length=1)]


class Head(Config):
    """One question that the judge answers, by one of its labels."""

    name: Words
    labels: tuple[Words, ...] = Field(min_length=2)


class Grammar(Config):
    """The form of the captions that a judge can check."""

    pattern: str  # "a {size} {colour} {shape} {relation} a {size} {colour} {shape}"
    # words -> label of the axis, and the place of the object that is named first
    relations: dict[Words, tuple[Words, Literal["first", "second"]]] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_fields(self) -> Grammar:
        fields = sorted(re.findall(r"{(.*?)}", self.pattern))
        if fields != sorted([RELATION, *ATTRIBUTES, *ATTRIBUTES]):
            raise ValueError(f"the pattern needs {{{RELATION}}} once and {', '.join(ATTRIBUTES)} twice")
        return self


class CaptionReader:
    """Reads captions of one grammar with the labels of one judge.

    Raises:
        ValueError: the grammar speaks of what no head answers.
    """

    def __init__(self, grammar: Grammar, heads: Sequence[Head]) -> None:
        self.grammar = grammar
        self._labels = {head.name: head.labels for head in heads}
        needed = [AXIS, *(f"{place} {attribute}" for place in PLACES for attribute in ATTRIBUTES)]
        if missing := [name for name in needed if name not in self._labels]:
            raise ValueError(f"there is no head {missing[0]!r}")

    def read(self, caption: str) -> Scene | None:
        """The scene that a caption asks for; None when it has another form or other words."""
        found = self._form.fullmatch(caption.strip())
        if found is None:
            return None
        said = {name: " ".join(words.lower().split()) for name, words in found.groupdict().items()}
        axis, place = self.grammar.relations[said[RELATION]]
        order = PLACES if place == PLACES[0] else PLACES[::-1]
        return {AXIS: axis} | {
            f"{place} {attribute}": said[f"{attribute}_{number}"]
            for number, place in enumerate(order)
            for attribute in ATTRIBUTES
        }

    @cached_property
    def _form(self) -> re.Pattern[str]:
        """The pattern with the known words in place of its fields: any case, any white space."""
        seen = dict.fromkeys(ATTRIBUTES, 0)
        parts = []
        for word in self.grammar.pattern.split():
            field = word[1:-1] if word.startswith("{") else None
            if field is None:
                parts.append(re.escape(word))
            elif field == RELATION:
                parts.append(_any_of(RELATION, self.grammar.relations))
            else:
                parts.append(_any_of(f"{field}_{seen[field]}", self._labels[f"{PLACES[0]} {field}"]))
                seen[field] += 1
        return re.compile(r"\s+".join(parts), re.IGNORECASE)


def agreement(asked: Scene, seen: Scene) -> dict[str, bool]:
    """What of a scene is right: shape, colour and size (of both objects), relation, caption (all of it).

    The objects are taken in the order of their places, or swapped where more of their attributes agree so.
    """
    matches = [
        {
            (place, attribute): asked[f"{place} {attribute}"] == seen[f"{found} {attribute}"]
            for place, found in zip(PLACES, order, strict=True)
            for attribute in ATTRIBUTES
        }
        for order in (PLACES, PLACES[::-1])
    ]
    swapped = sum(matches[1].values()) > sum(matches[0].values())
    right = {attribute: all(matches[swapped][place, attribute] for place in PLACES) for attribute in ATTRIBUTES}
    right[RELATION] = asked[AXIS] == seen[AXIS] and not swapped
    return {**right, "caption": all(right.values())}


def _any_of(name: str, words: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(map(_spaced, words))})"


def _spaced(text: str) -> str:
    return r"\s+".join(map(re.escape, text.split()))
