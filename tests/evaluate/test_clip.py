from __future__ import annotations

import pytest
import torch

from dacc.evaluate.caption import Head
from dacc.evaluate.clip import ClipReader, clip_answers, clip_features, pairs_of

HEADS = (Head(name="digit", labels=("zero", "one")), Head(name="direction", labels=("left", "right", "still")))
FORMS = ("{digit} moving {direction}", "the digit {digit} moves {direction}")


def test_every_frame_stands_beside_its_successor_and_the_last_beside_itself() -> None:
    frames = torch.arange(3.0).reshape(1, 3, 1, 1, 1).expand(2, 3, 1, 2, 2)
    pairs = pairs_of(frames)
    assert pairs.shape == (2, 3, 2, 2, 2)
    assert pairs[0, :, :, 0, 0].tolist() == [[0, 1], [1, 2], [2, 2]]


def test_features_are_mean_and_deviation_over_the_pairs_of_two_frames() -> None:
    pooled = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [100.0, 100.0]]])
    assert clip_features(pooled).tolist() == [[2.0, 5.0, 1.0, 0.0]]


def test_the_digit_is_read_in_every_frame_and_the_motion_from_all_pairs_together() -> None:
    logits = torch.tensor(
        [
            [
                [1.0, 0.0, 0.3, 0.0, 0.0],  # zero, a little to the left
                [0.0, 1.0, 0.0, 4.0, 0.0],  # one, clearly to the right
                [1.0, 0.0, 0.2, 0.0, 0.0],
                [0.0, 1.0, 0.0, 0.0, 99.0],  # the last frame twice: has no say
            ]
        ]
    )
    assert clip_answers(logits, HEADS).tolist() == [[0, 1, 0, 1, 1]]


def test_captions_are_read_in_any_case_and_spacing_and_strangers_are_not() -> None:
    reader = ClipReader(FORMS, HEADS)
    assert reader.read(" One  moving LEFT ") == {"digit": "one", "direction": "left"}
    assert reader.read("the digit zero moves right") == {"digit": "zero", "direction": "right"}
    for caption in ("two moving left", "one moving", "a lighthouse at dusk", "one moving left slowly"):
        assert reader.read(caption) is None


@pytest.mark.parametrize(
    ("forms", "heads"),
    [(("{digit} moving",), HEADS), (("{digit} {direction} {speed}",), HEADS), (FORMS, HEADS[:1])],
)
def test_forms_that_do_not_fit_the_heads_are_refused(forms: tuple[str, ...], heads: tuple[Head, ...]) -> None:
    with pytest.raises(ValueError, match="digit"):
        ClipReader(forms, heads)
