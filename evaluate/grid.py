"""One picture that shows what the numbers mean: a row per source, a column per noise, the reference on top.

A clip is a strip of frames, the first on top.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_CELL, LARGEST_CELL = 96, 256  # pixels: small images are enlarged so that a person sees them
SMALLEST_FRAME, LARGEST_FRAME, MOST_FRAMES = 64, 128, 8  # of a clip; longer ones show frames at even distances
GAP, MARGIN, FONT_SIZE = 6, 12, 15
PAPER, INK, MUTED = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def write_grid(rows: list[tuple[str, str, Tensor]], file: Path) -> None:
    """Write the picture as PNG.

    Args:
        rows: label, second line of the label, and images (N, C, H, W) or clips (N, F, C, H, W) in [0, 1], for every
            source.
        file: where to write.
    """
    draw_grid(rows).save(file)


def draw_grid(rows: list[tuple[str, str, Tensor]]) -> Image.Image:
    """The picture: labels left, images right."""
    font = ImageFont.load_default(FONT_SIZE)
    cells = [[_cell(image) for image in images] for _, _, images in rows]
    width, height = cells[0][0].size
    label_width = int(max(font.getlength(text) for label, below, _ in rows for text in (label, below))) + MARGIN
    columns = max(map(len, cells))
    left = MARGIN + label_width
    size = (left + columns * (width + GAP) - GAP + MARGIN, len(rows) * (height + GAP) - GAP + 2 * MARGIN)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for row, (label, below, _) in enumerate(rows):
        top = MARGIN + row * (height + GAP)
        draw.text((MARGIN, top + height // 2), label, INK, font, anchor="ld")
        draw.text((MARGIN, top + height // 2 + 4), below, MUTED, font, anchor="la")
        for column, cell in enumerate(cells[row]):
            picture.paste(cell, (left + column * (width + GAP), top))
    return picture


def _cell(sample: Tensor) -> Image.Image:
    """One image (C, H, W), or some frames of a clip (F, C, H, W) from top to bottom."""
    if sample.ndim == 3:
        return _frame(sample, SMALLEST_CELL, LARGEST_CELL)
    chosen = torch.linspace(0, len(sample) - 1, min(len(sample), MOST_FRAMES)).round().long()
    frames = [_frame(sample[index], SMALLEST_FRAME, LARGEST_FRAME) for index in chosen]
    width, height = frames[0].size
    strip = Image.new("RGB", (width, len(frames) * (height + 1) - 1), PAPER)
    for number, frame in enumerate(frames):
        strip.paste(frame, (0, number * (height + 1)))
    return strip


def _frame(image: Tensor, smallest: int, largest: int) -> Image.Image:
    """One image (C, H, W), enlarged without smoothing or shrunk with it."""
    channels = image if image.shape[0] in (1, 3) else image[:1]
    pixels = (channels.expand(3, -1, -1).movedim(0, -1).numpy() * 255).round().astype(numpy.uint8)
    cell = Image.fromarray(pixels)
    longest = max(cell.size)
    if longest < smallest:
        factor = -(-smallest // longest)
        return cell.resize((cell.width * factor, cell.height * factor), Image.Resampling.NEAREST)
    cell.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return cell
