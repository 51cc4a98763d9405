from __future__ import annotations

from typing import Any

import pytest

from dacc.evaluate.caption import CaptionReader, Grammar, Head, Scene, agreement

from .conftest import CAPTION, HEADS

READER = CaptionReader(Grammar.model_validate(CAPTION), [Head.model_validate(head) for head in HEADS])
SCENE = {
    "axis": "vertical",
    "first size": "small",
    "first colour": "red",
    "first shape": "circle",
    "second size": "large",
    "second colour": "blue",
    "second shape": "square",
}


def swapped(scene: Scene) -> Scene:
    other = {"first": "second", "second": "first"}
    return {" ".join(other.get(word, word) for word in name.split()): label for name, label in scene.items()}


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a small red circle above a large blue square", SCENE),
        ("a small red circle below a large blue square", swapped(SCENE)),
        ("a small red circle to the left of a large blue square", {**SCENE, "axis": "horizontal"}),
        ("a large blue square to the right of a small red circle", {**SCENE, "axis": "horizontal"}),
        ("  A small RED circle\tabove  a Large blue square ", SCENE),
    ],
)
def test_a_caption_says_what_lies_where(caption: str, scene: Scene) -> None:
    assert READER.read(caption) == scene


@pytest.mark.parametrize(
    "caption",
    ["", "a dog", "a small green circle above a large blue square", "a small red circle above a large blue square."],
)
def test_other_words_are_not_understood(caption: str) -> None:
    assert READER.read(caption) is None


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, set()),
        ({"first size": "large"}, {"size"}),
        ({"second colour": "red", "second size": "small"}, {"size", "colour"}),
        ({"axis": "horizontal"}, {"relation"}),
        (swapped(SCENE), {"relation"}),
        ({**swapped(SCENE), "first shape": "circle"}, {"relation", "shape"}),
    ],
)
def test_what_is_wrong_is_told_apart(change: Scene, wrong: set[str]) -> None:
    right = agreement(SCENE, {**SCENE, **change})
    assert {name for name, fine in right.items() if not fine} == wrong | ({"caption"} if wrong else set())


def test_equal_agreement_in_both_orders_counts_as_in_order() -> None:
    twins = {**SCENE, **{f"second {name}": SCENE[f"first {name}"] for name in ("size", "colour", "shape")}}
    assert agreement(twins, twins)["relation"]


@pytest.mark.parametrize(
    "change", [{"pattern": "a {shape} {relation} a {shape}"}, {"relations": {"on": ["x", "third"]}}]
)
def test_a_grammar_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Grammar.model_validate({**CAPTION, **change})


def test_a_grammar_needs_a_head_for_all_that_it_speaks_of() -> None:
    with pytest.raises(ValueError, match="second shape"):
        CaptionReader(READER.grammar, [Head.model_validate(head) for head in HEADS[:-1]])
