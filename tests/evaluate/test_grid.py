import torch
from PIL import Image

from dacc.evaluate.grid import GAP, MARGIN, draw_grid


def test_small_images_are_enlarged_without_smoothing() -> None:
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float()[None, None]
    picture = draw_grid([("reference", "", board), ("other", "PSNR 1 dB", 1 - board)])
    assert picture.height == 2 * 96 + GAP + 2 * MARGIN
    cell = picture.crop((picture.width - MARGIN - 96, MARGIN, picture.width - MARGIN, MARGIN + 96))
    back = cell.resize((16, 16), Image.Resampling.NEAREST).convert("L")
    assert list(back.tobytes()) == [int(value) * 255 for value in board.flatten()]
    assert {color for _, color in cell.getcolors(10)} == {(0, 0, 0), (255, 255, 255)}


def test_large_images_shrink() -> None:
    picture = draw_grid([("reference", "", torch.rand(2, 3, 600, 600))])
    assert picture.height == 256 + 2 * MARGIN


def test_a_clip_is_a_strip_of_frames_from_top_to_bottom() -> None:
    clip = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 1, 16, 16)[None]
    picture = draw_grid([("reference", "", clip)])
    assert picture.height == 4 * 64 + 3 + 2 * MARGIN
    shades = [picture.getpixel((picture.width - MARGIN - 1, MARGIN + number * 65))[0] for number in range(4)]
    assert shades == [0, 85, 170, 255]


def test_a_long_clip_shows_frames_at_even_distances_with_both_ends() -> None:
    clip = torch.linspace(0, 1, 29)[:, None, None, None].expand(29, 1, 16, 16)[None]
    picture = draw_grid([("reference", "", clip)])
    shades = [picture.getpixel((picture.width - MARGIN - 1, MARGIN + number * 65))[0] for number in range(8)]
    assert shades == [round(number * 4 / 28 * 255) for number in range(8)]
