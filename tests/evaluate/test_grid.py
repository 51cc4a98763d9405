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
