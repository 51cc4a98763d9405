"""Clips of a handwritten digit that moves straight across a larger frame, and the captions that ask for them.

Letters: N clips, F = 8 frames, S = 32 pixels a side, d = 16 pixels of a digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from data import IMAGE_SIZE, NUM_CLASSES, Digits, Jitter, draw_batch
from torch import Tensor

FRAMES, FRAME_SIZE = 8, 32
SPEED = 2  # pixels from frame to frame
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")
FORMS = ("{digit} moving {direction}", "the digit {digit} moves {direction}")  # measured with, calibrated with
JITTER = Jitter(degrees=7, scale=0.06, shift=0.6, probability=0.5)
ROOM = FRAME_SIZE - IMAGE_SIZE  # places of a digit along one side: 0..ROOM
SLACK = ROOM - SPEED * (FRAMES - 1)  # how far from the side a digit may start and still be inside at the end


@dataclass(frozen=True)
class Clips:
    frames: Tensor  # (N, F, 1, S, S) in [-1, 1], background -1
    digits: Tensor  # (N,) int64
    directions: Tensor  # (N,) int64, into DIRECTIONS

    @property
    def rows(self) -> Tensor:
        """(N,) places of their captions in `all_captions`."""
        return self.digits * len(DIRECTIONS) + self.directions


def draw_clips(digits: Digits, count: int, generator: torch.Generator) -> Clips:
    """Clips of random digits in random directions from random places, from which they never leave the frame."""
    chosen = draw_batch(digits, count, JITTER, generator)
    directions = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    start = torch.randint(SLACK + 1, (count, 1), generator=generator)
    across = torch.randint(ROOM + 1, (count, 1), generator=generator).expand(-1, FRAMES)
    along = start + SPEED * torch.arange(FRAMES)  # (N, F)
    along = torch.where((directions % 2 == 0)[:, None], ROOM - along, along)  # left and up count down
    horizontal = (directions < 2)[:, None]
    left, top = torch.where(horizontal, along, across), torch.where(horizontal, across, along)
    return Clips(place(chosen.images, left, top), chosen.labels, directions)


def place(images: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """Images (N, 1, d, d) at offsets (N, F) of empty frames: (N, F, 1, S, S)."""
    count, frames = left.shape
    canvas = torch.full((count, frames, FRAME_SIZE, FRAME_SIZE), -1.0)
    within = torch.arange(images.shape[-1])
    rows = (top[..., None] + within)[..., :, None]  # (N, F, d, 1)
    columns = (left[..., None] + within)[..., None, :]  # (N, F, 1, d)
    clip = torch.arange(count)[:, None, None, None]
    frame = torch.arange(frames)[None, :, None, None]
    canvas[clip, frame, rows, columns] = images.expand(-1, frames, -1, -1)
    return canvas[:, :, None]


def all_captions() -> list[tuple[str, str]]:
    """Both captions of every digit and direction: digits outside, directions inside."""
    return [
        tuple(form.format(digit=digit, direction=direction) for form in FORMS)
        for digit in DIGIT_NAMES
        for direction in DIRECTIONS
    ]


def make_prompts() -> dict[str, list[str]]:
    """Every digit in every direction once, in words of their own for either use; neighbours differ in both."""
    captions = all_captions()
    order = [
        (number % NUM_CLASSES) * len(DIRECTIONS) + (number + number // NUM_CLASSES) % len(DIRECTIONS)
        for number in range(len(captions))
    ]
    return {
        "calibration": [captions[row][1] for row in order],
        "evaluation": [captions[row][0] for row in order],
    }
