"""Drawings of two coloured shapes, and the captions that say what they show.

A scene has an axis (one object above the other, or one left of the other) and two objects, each with a size, a colour
and a shape. The "first" place is the upper or the left one. Every scene has two captions, which name its objects in
either order. A tenth of the scenes is held out: no training draws them, evaluation asks for them.

Letters: N scenes, S = 32 pixels a side. Pixel values lie in [-1, 1]; the background is white.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 32
SIZES = ("small", "large")
COLOURS = ("red", "orange", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle")
AXES = ("vertical", "horizontal")
RELATIONS = {  # relation -> axis, and the place of the object that is named first
    "above": ("vertical", "first"),
    "below": ("vertical", "second"),
    "to the left of": ("horizontal", "first"),
    "to the right of": ("horizontal", "second"),
}
PATTERN = "a {size} {colour} {shape} {relation} a {size} {colour} {shape}"
HEADS = {  # the questions that a scene answers, in the order of the columns of `all_scenes`
    "axis": AXES,
    "first size": SIZES,
    "first colour": COLOURS,
    "first shape": SHAPES,
    "second size": SIZES,
    "second colour": COLOURS,
    "second shape": SHAPES,
}
SPLIT_SEED = 2026  # the held-out scenes must stay the same whatever seed a training uses
HELD_OUT_FRACTION = 0.1

RGB = ((0.86, 0.16, 0.16), (0.97, 0.62, 0.12), (0.16, 0.62, 0.28), (0.16, 0.35, 0.86), (0.58, 0.23, 0.74))  # 0 to 1
RADII = (3.5, 6.0)  # pixels, by size
CENTRES = (9.0, 23.0)  # pixels along the axis, by place
ALONG, ACROSS = 1.0, 3.0  # pixels by which a centre moves along its axis and across it, either way
SIZE_JITTER, SHADE_JITTER = 0.06, 0.04


@dataclass(frozen=True)
class Split:
    seen: Tensor  # (M, 7) int64, rows of `all_scenes`
    held_out: Tensor  # (K, 7)


@cache
def all_scenes() -> Tensor:
    """Every scene of two different objects, (1740, 7) int64: one answer per head of `HEADS`."""
    objects = list(product(range(len(SIZES)), range(len(COLOURS)), range(len(SHAPES))))
    pairs = [(*first, *second) for first, second in product(objects, objects) if first != second]
    return torch.tensor([(axis, *pair) for axis in range(len(AXES)) for pair in pairs])


@cache
def split_scenes() -> Split:
    scenes = all_scenes()
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(SPLIT_SEED))
    count = round(HELD_OUT_FRACTION * len(scenes))
    return Split(seen=scenes[order[count:]], held_out=scenes[order[:count]])


def captions_of(scene: Tensor) -> tuple[str, str]:
    """The two captions of a scene (7,): its first object named first, then its second."""
    axis, *answers = scene.tolist()
    first, second = (
        f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}" for size, colour, shape in (answers[:3], answers[3:])
    )
    words = {place: word for word, (of, place) in RELATIONS.items() if of == AXES[axis]}
    return f"{first} {words['first']} {second}", f"{second} {words['second']} {first}"


def scene_of(caption: str) -> Tensor:
    """The scene (7,) that a caption asks for.

    Raises:
        ValueError: it is not one of our captions.
    """
    for relation, (axis, place) in RELATIONS.items():
        named, found, other = caption.partition(f" {relation} ")
        if found:
            objects = [_object(named), _object(other)]
            first, second = objects if place == "first" else reversed(objects)
            return torch.tensor([AXES.index(axis), *first, *second])
    raise ValueError(f"not a caption: {caption!r}")


def _object(phrase: str) -> tuple[int, int, int]:
    _, size, colour, shape = phrase.split()
    return SIZES.index(size), COLOURS.index(colour), SHAPES.index(shape)


def draw(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes (N, 7) -> images (N, 3, S, S): every drawing has its own places, sizes and shades."""
    count = len(scenes)

    def jitter(limit: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * limit

    images = torch.ones(count, 3, IMAGE_SIZE, IMAGE_SIZE)
    horizontal = scenes[:, 0] == 1
    for place, columns in enumerate((slice(1, 4), slice(4, 7))):
        size, colour, shape = scenes[:, columns].unbind(1)
        along, across = CENTRES[place] + jitter(ALONG), IMAGE_SIZE / 2 + jitter(ACROSS)
        x, y = torch.where(horizontal, along, across), torch.where(horizontal, across, along)
        radius = torch.tensor(RADII)[size] * (1 + jitter(SIZE_JITTER))
        shade = (torch.tensor(RGB)[colour] + jitter(SHADE_JITTER, 3)).clamp(0, 1)  # (N, 3)
        covered = _coverage(x, y, radius, shape)[:, None]  # (N, 1, S, S)
        images = images * (1 - covered) + shade[:, :, None, None] * covered
    return images * 2 - 1


def answers_loss(logits: Tensor, scenes: Tensor) -> Tensor:
    """Mean cross entropy of the heads; logits (N, sum of answers), scenes (N, heads)."""
    parts = logits.float().split([len(answers) for answers in HEADS.values()], dim=1)
    losses = [F.cross_entropy(part, scenes[:, head].to(part.device)) for head, part in enumerate(parts)]
    return torch.stack(losses).mean()


def read_answers(logits: Tensor) -> Tensor:
    """(N, sum of answers) logits -> (N, heads) the likeliest answer of every head."""
    parts = logits.split([len(answers) for answers in HEADS.values()], dim=1)
    return torch.stack([part.argmax(dim=1) for part in parts], dim=1)


def score(read: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """What is right in each image: scenes read (N, 7) against scenes asked for (N, 7) -> (N,) bool each.

    Objects are matched with their places, or all with the other place when that agrees in more; then they stand the
    wrong way round, and the relation is wrong.
    """
    swapped = torch.cat([read[:, :1], read[:, 4:], read[:, 1:4]], dim=1)
    in_place, out_of_place = ((one[:, 1:] == asked[:, 1:]).sum(1) for one in (read, swapped))
    stays = in_place >= out_of_place
    agrees = torch.where(stays[:, None], read, swapped) == asked
    right = {
        name: agrees[:, [1 + number, 4 + number]].all(1) for number, name in enumerate(("size", "colour", "shape"))
    }
    right["relation"] = stays & agrees[:, 0]
    right["caption"] = torch.stack(list(right.values())).all(0)
    return right


def _coverage(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """(N, S, S): how much of each pixel a shape covers, from the distance to its edge; x, y, radius, shape are (N,)."""
    pixels = torch.arange(IMAGE_SIZE) + 0.5
    right = pixels[None, None, :] - x[:, None, None]  # (N, 1, S)
    down = pixels[None, :, None] - y[:, None, None]  # (N, S, 1)
    radius = radius[:, None, None]
    circle = (right.square() + down.square()).sqrt() - radius
    square = torch.maximum(right.abs(), down.abs()) - 0.89 * radius
    # upright, equilateral; its middle is halfway between tip and base
    inner = 0.65 * radius
    lower = down - inner / 2
    triangle = torch.maximum(lower, (3**0.5 * right.abs() - lower) / 2) - inner
    distance = torch.stack([part.expand(-1, IMAGE_SIZE, IMAGE_SIZE) for part in (circle, square, triangle)], dim=1)
    chosen = distance[torch.arange(len(shape)), shape]  # (N, S, S), pixels; negative inside
    return (0.5 - chosen).clamp(0, 1)
