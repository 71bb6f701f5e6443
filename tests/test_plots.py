"""Previews: the sheet is a grid of the images that were given."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sanitize.plots import CELL, LABEL, write_reconstructions, write_sheet

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
STEP_X, STEP_Y = CELL + 4, CELL + LABEL + 4


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def flat(colour: tuple[int, int, int], size: int = 8) -> torch.Tensor:
    """(3, size, size) in [0, 1], one colour."""
    return (torch.tensor(colour) / 255)[:, None, None].expand(3, size, size)


def centre(sheet: Image.Image, position: int, columns: int) -> tuple[int, ...]:
    """The pixel in the middle of one cell of a sheet."""
    left, top = position % columns * STEP_X, position // columns * STEP_Y
    found = sheet.getpixel((left + CELL // 2, top + LABEL + CELL // 2))
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (5, 2, 3)])
def test_a_sheet_is_a_grid_of_its_cells_row_by_row(tmp_path, count, columns, rows):
    write_sheet(str(tmp_path / "sheet.png"), [(flat(colour), "name") for colour in COLOURS[:count]], columns)
    sheet = opened(tmp_path / "sheet.png")
    assert (sheet.format, sheet.mode, sheet.size) == ("PNG", "RGB", (columns * STEP_X, rows * STEP_Y))
    assert [centre(sheet, position, columns) for position in range(count)] == COLOURS[:count]
    rest = range(count, rows * columns)
    assert {centre(sheet, position, columns) for position in rest} <= {(255, 255, 255)}


def test_images_of_any_size_fill_their_cell_and_the_label_stands_above(tmp_path):
    write_sheet(str(tmp_path / "sheet.png"), [(flat(COLOURS[0], size), "mmmm") for size in (1, 7, 300)], 3)
    pixels = np.asarray(opened(tmp_path / "sheet.png"))
    for position in range(3):
        cell = pixels[LABEL : LABEL + CELL, position * STEP_X : position * STEP_X + CELL]
        assert (cell == COLOURS[0]).all()
        assert (pixels[:LABEL, position * STEP_X : position * STEP_X + CELL] < 128).any()  # black on white


def test_reconstructions_stand_beside_their_image_usual_ones_left_worst_ones_right(tmp_path):
    """Image i is of grey i / 10, its reconstruction 0.05 lighter, its score i: the worst are 9 and 8."""
    grey = (torch.arange(10) / 10)[:, None, None, None].expand(10, 3, 8, 8)
    write_reconstructions(str(tmp_path / "r.png"), grey, grey + 0.05, torch.arange(10.0), count=2)
    sheet = opened(tmp_path / "r.png")
    assert sheet.size == (4 * STEP_X, 2 * STEP_Y)
    shown = [centre(sheet, position, 4)[0] / 255 for position in range(8)]
    for left, right in zip(shown[::2], shown[1::2], strict=True):
        assert right - left == pytest.approx(0.05, abs=0.01)
    assert [shown[2], shown[6]] == pytest.approx([0.9, 0.8], abs=0.01)


def test_fewer_images_than_asked_for_give_a_smaller_sheet(tmp_path):
    images = torch.rand(3, 3, 8, 8)
    write_reconstructions(str(tmp_path / "r.png"), images, images, torch.rand(3), count=8)
    assert opened(tmp_path / "r.png").size == (4 * STEP_X, 3 * STEP_Y)
